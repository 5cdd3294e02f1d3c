"""KVzip: what a repetition of the text looks up in the cache; all heads of all layers share one budget."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import OptionError, UnsupportedModelError
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.registry import register
from kvrewrite.policies.scope import Scoped
from kvrewrite.policies.segments import NEW_ROW, UNLIMITED, RowState, Segment

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies.site import Site

PROMPTS = ("repeat_prompt", "repeat_next", "repeat_answer")
# What the authors' code asks, for `repeat_prompt="authors"`: before the first part, and before the others.
AUTHORS = {
    "repeat_prompt": "\n\nRepeat the previous context exactly.",
    "repeat_next": "\n\nRepeat the part of the previous context exactly, starting with ",
}


def numbers(text: str) -> tuple[int, ...] | None:
    """Token ids ("12,7,301" or "12 7 301") as numbers; None where the text is no such list."""
    parts = re.split(r"[,\s]+", text.strip()) if text else []
    return tuple(int(p) for p in parts) if all(p.isascii() and p.isdigit() for p in parts) else None


@register
@dataclass(frozen=True, kw_only=True)
class KVzip(Scoped):
    """KVzip (Kim et al., arXiv 2505.23416, sections 3.2 to 3.4; code snu-mllab/KVzip @ 5d84729).

    A row's first prompt is computed as it is, with the full cache. Then the model reads it again, in parts of repeat_chunk
    tokens, after the whole cache: repeat_prompt (repeat_next and the last `lead` tokens before the part, from the second
    on), repeat_answer, and the part. score_j = the largest softmax weight that any of these tokens gives to token j of the
    part, in any head of j's group, where the softmax is over the first n_sink tokens, the part, and what was read so far.
    Nothing of the repetition stays. Then the prompt is evicted from, once; later prompts and generated tokens are only added.
    scope as in `Scoped`; "model" is the authors' own, "head" their uniform variant, "layer" kvpress's layerwise one. The first
    n_sink tokens stay (the authors': the system prompt; kvpress: 4) and are not repeated.

    repeat_prompt, repeat_next and repeat_answer are token ids ("12,7,301"), or text where there is a tokenizer; "authors"
    stands for the prompts of their code. Default: nothing, so that the model reads the bare text a second time; that needs
    no tokenizer. repeat_answer is what a chat template has between a request and its answer. The budget counts the first
    tokens, too, which the authors' does not. chunk cuts the first pass only.
    """

    name = "kvzip"
    summary = "what a repetition of the prompt attends to, over all heads of all layers"
    source = "arXiv 2505.23416"
    evicts_when = "first prompt, read twice"
    whole_prompt = True
    repeats_prompt = True
    inputs = ("repeat_begins", "repeat_ends")

    budget: int | float | None = 0.3
    chunk: int | None = 16000
    repeat_chunk: int = 2000
    lead: int = 8
    repeat_prompt: str = ""
    repeat_next: str = ""
    repeat_answer: str = ""

    @property
    def rates_prompts_only(self) -> bool:
        """After the first prompt tokens are only added."""
        return True

    def validate(self) -> None:
        """Sizes that make sense."""
        self.require_budget()
        for option in ("repeat_chunk", "lead"):
            if getattr(self, option) < 1:
                raise OptionError(f"{self.name}: {option} is {getattr(self, option)}, expected at least 1")
        super().validate()

    # -- prompts of the repetition
    def tokenized(self, encode: Callable[[str], list[int]]) -> Policy:
        """The policy with its texts as token ids."""
        texts = {name: getattr(self, name) for name in PROMPTS}
        if texts["repeat_prompt"] == "authors":
            texts |= {name: text for name, text in AUTHORS.items() if texts[name] in ("", "authors")}
        made = {n: ",".join(map(str, encode(t))) for n, t in texts.items() if numbers(t) is None}
        return dataclasses.replace(self, **made)  # type: ignore[arg-type]

    def adapt(self, sites: list[AttentionSite], facts: dict[str, Any]) -> Policy:
        """Checks what the model is asked."""
        if not any(self.judges(site) for site in sites):
            raise UnsupportedModelError(
                f"{self.name}: every layer of this model has a sliding window, which keeps what it sees; expected a layer without"
            )
        for name in PROMPTS:
            ids = numbers(getattr(self, name))
            if ids is None:
                raise OptionError(
                    f"{self.name}: {name} is {getattr(self, name)!r}, and there is no tokenizer for it here; expected token ids "
                    'such as "12,7,301" (tokenizer.encode(text, add_special_tokens=False)), or a model directory with a '
                    "tokenizer"
                )
            vocabulary = facts.get("vocab_size", UNLIMITED)
            if ids and max(ids) >= vocabulary:
                raise OptionError(
                    f"{self.name}: {name} has token {max(ids)}, but the model has {vocabulary} tokens; expected ids of its "
                    "own tokenizer"
                )
        return self

    def of_rank(self, rank: int, ranks: int) -> Policy:
        """Refused: the ranks' planners don't know of repetitions."""
        raise OptionError(
            f"{self.name}: reading the prompt a second time is not possible with tensor parallelism yet; use one process, or "
            "a policy that reads it once (fast_kvzip, kvzap, snapkv)"
        )

    # -- graph
    def worth(self, site: Site) -> tuple[Scores, Tensor]:
        """Cached slots have what the repetition gave them. Tokens of a repetition can't stay."""
        slots = site.reconstruct(self.n_sink, self.repeat_chunk)
        again = site.per_row(site.input("repeat_ends")) > 0
        cached, new = site.split(site.slot_positions())
        zeros = site.position_scores() * 0.0
        return Scores(zeros, slots=slots), site.join(cached, new.masked_fill(again, -1))

    # -- runtime
    def plan(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """Chunks, of which the last one says what stays."""
        plan = super().plan(length, row)
        return [dataclasses.replace(s, keep=UNLIMITED) for s in plan[:-1]] + plan[-1:]

    def passes(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """The chunks without an eviction, then the repetition, whose last part evicts; the chunks alone where nothing
        would go."""
        plan = self.plan(length, row)
        keep = plan[-1].keep if plan else UNLIMITED
        if keep == UNLIMITED or (self.layer_budgets == "equal" and keep >= length) or length <= self.n_sink:
            return plan
        whole = dataclasses.replace(plan[-1], keep=UNLIMITED)
        return [*plan[:-1], whole, *self._repetition(length, keep)]

    def _repetition(self, length: int, keep: int) -> list[Segment]:
        prompt, following, answer = (numbers(getattr(self, name)) or () for name in PROMPTS)
        found: list[Segment] = []
        for begin in range(self.n_sink, length, self.repeat_chunk):
            end = min(length, begin + self.repeat_chunk)
            lead = range(max(self.n_sink, begin - self.lead), begin)
            pieces = (following, lead, answer) if found else (prompt, answer)
            again = (*(piece for piece in pieces if len(piece)), range(begin, end))
            values = {"repeat_begins": begin, "repeat_ends": end}
            size = sum(map(len, again))
            found.append(Segment(size, keep if end == length else UNLIMITED, 0, values, again=again))
        return found
