"""The interface of an eviction policy.

A policy is a frozen dataclass: its fields are its options (`options.py`), its class attributes say what kind it is
(`traits.py`). Its methods say what a slot is worth (`score`, in torch code on the tensors of one attention site) and how a
prompt is cut into segments (`plan`). Everything else (finding attention, caches, positions, padding, batching, kernels) is
the compiler's and the runtime's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import OptionError
from kvrewrite.policies.budgets import pyramid
from kvrewrite.policies.options import Options
from kvrewrite.policies.segments import NEW_ROW, UNLIMITED, RowState, Segment

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies.site import Site


PROMPT = "prompt_tokens"  # the row input that says how many of a row's first tokens protect_prompt keeps


def rotation_known(sites: list[AttentionSite], facts: Mapping[str, Any]) -> bool:
    """Whether a model has rotary embeddings, and its rotation was found; both are arguments of `Policy.adapt`."""
    return any(site.rope for site in sites) and "rope_problem" not in facts


@dataclass
class Scores:
    """What a policy's code computes at one site. C: cached slots, T: new tokens.

    new: (B, Hkv, T), the scores of the new tokens. slots: (B, Hkv, C), which replaces the scores of cached slots, or None
    where they stay as they were. select: (B, Hkv, C + T), what this eviction goes by where it is not the stored scores.
    keep: (B, Hkv) int32, how many slots stay where the text decides (`data_dependent`), else the budget holds.
    """

    new: Tensor
    slots: Tensor | None = None
    select: Tensor | None = None
    keep: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Policy(Options):
    """An eviction policy. Its options: `Options`. What else it can say of itself: `Traits`."""

    @property
    def uniform_layers(self) -> bool:
        """Whether all layers keep as many slots."""
        return self.layer_budgets == "equal"

    @property
    def ragged(self) -> bool:
        """Whether the device decides which of a layer's heads keeps how many slots."""
        return self.gates or self.data_dependent or self.head_budgets != "equal"

    @property
    def row_inputs(self) -> list[str]:
        """Inputs of the graph (B,) int32 whose numbers `Segment.values` has."""
        return [*self.inputs, *[PROMPT] * self.protect_prompt]

    @property
    def rates_prompts_only(self) -> bool:
        """Whether nothing goes once a row's first prompt is through, so that single tokens are only added and need no score."""
        own = type(self)
        return self.whole_prompt and own.plan is Policy.plan and own.decode_segment is Policy.decode_segment

    def adapt(self, sites: list[AttentionSite], facts: dict[str, Any]) -> Policy:
        """The policy as it fits a model; raises OptionError where it does not. facts: "activation" and other config."""
        return self

    def tokenized(self, encode: Callable[[str], list[int]]) -> Policy:
        """The policy with token ids where options may be text; `encode` gives those of a text, without special tokens."""
        return self

    def of_rank(self, rank: int, ranks: int) -> Policy:
        """The policy as one of several processes has it, each of which holds a block of every layer's heads (tensor
        parallelism). Raises OptionError where that is not possible."""
        if self.merge:
            raise OptionError(
                f"{self.name}: merge=True judges the tokens of all heads of a layer together, and with tensor parallelism no "
                "process has them all; use merge=False or one process"
            )
        return self

    # -- graph ---------------------------------------------------------------------------------------------------
    def weights(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the policy weights that a site which owns its keys and values needs."""
        return {}

    def gate(self, site: Site) -> Tensor:
        """With `gates`: flags new tokens to drop before attention, (B, Hkv, T) bool. Only they themselves see them, and they
        never enter the cache."""
        raise TypeError(
            f"{type(self).__name__} gates tokens, but has no gate(site); define it (docs/develop/add_a_policy.md)"
        )

    def ask(self, site: Site) -> None:
        """With `recalls`: what attention to the memory needs and can be known before attention to the cache."""
        raise TypeError(f"{type(self).__name__} does not say what it asks for")

    def recall(self, site: Site) -> Tensor:
        """With `recalls`: attention to the cache and the memory together, (B, H, T, Dv); the site's "out" and "lse" are
        those of attention to the cache."""
        raise TypeError(f"{type(self).__name__} does not say what it recalls")

    def has_memory(self, site: AttentionSite) -> bool:
        """With `recalls`: whether a site has a memory."""
        return True

    def memory_bytes(self, site: AttentionSite, itemsize: int, context: int) -> tuple[int, int]:
        """With `recalls`: bytes of a row's memory at a site for a text of so many tokens: on the device, and of the host."""
        return 0, 0

    def rate(self, site: Site) -> None:
        """With `shares_layers`: keeps what `score` will need of this site (`site.remember`), after its attention."""
        raise TypeError(
            f"{type(self).__name__} shares layers, but has no rate(site); define it (docs/develop/add_a_policy.md)"
        )

    def score(self, site: Site) -> Scores | Tensor:
        """What slots are worth at one site, in torch code on its tensors; a tensor is `Scores(new)`. Called after the site's
        attention (after the logits with `after_logits`, after the last layer with `shares_layers`)."""
        raise TypeError(f"{type(self).__name__} has no score(site); define it (docs/guide/own_policy.md)")

    # -- plans ---------------------------------------------------------------------------------------------------
    def slots(self, seen: int) -> int:
        """The budget in slots for a row that has seen this many tokens."""
        if self.budget is None:
            return UNLIMITED
        if isinstance(self.budget, int):
            return self.budget
        return max(math.floor(self.budget * seen + 1e-9), self.sinks + self.recent + 1)

    def recent_of(self, keep: int) -> int:
        """How many of the newest slots are protected when `keep` stay."""
        return self.recent

    def segment(self, length: int, keep: int, **rest: Any) -> Segment:
        """A segment with the window that goes with `keep`."""
        recent = self.recent if keep == UNLIMITED else self.recent_of(keep)
        return Segment(length, keep, rest.pop("recent", recent), **rest)

    def plan(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """How a prompt of `length` tokens is cut; the same for every row in that state, whatever its batch."""
        keep = self.slots(row.seen + length)
        if self.whole_prompt and row.seen:
            keep = UNLIMITED
        step = self.chunk or max(1, length)
        return self.protecting([self.segment(min(step, length - at), keep) for at in range(0, length, step)], row)

    def passes(self, length: int, row: RowState = NEW_ROW) -> list[Segment]:
        """What runs for such a prompt: the segments of `plan`, and with `repeats_prompt` those of the repetition."""
        return self.plan(length, row)

    def decode_segment(self, row: RowState = NEW_ROW) -> Segment:
        """What one generated token does."""
        evicts = self.decode_eviction and not self.whole_prompt
        segment = self.segment(1, self.slots(row.seen + 1) if evicts else UNLIMITED, prompt=False)
        return self.protecting([segment], row)[0]

    def protecting(self, segments: list[Segment], row: RowState) -> list[Segment]:
        """With protect_prompt: the segments without an eviction in the first prompt, and with what the later ones protect."""
        if not self.protect_prompt:
            return segments
        if row.prompt is None and all(segment.prompt for segment in segments):
            return [replace(segment, keep=UNLIMITED) for segment in segments]
        kept = {PROMPT: row.seen if row.prompt is None else row.prompt}
        return [replace(segment, values={**segment.values, **kept}) for segment in segments]

    def why_no_prompt(self, length: int) -> str | None:
        """With protect_prompt: why a first prompt of so many tokens can't be kept; None: it can."""
        if not self.protect_prompt:
            return None
        budget = self.slots(length)
        others = self.recent_of(budget) + 1
        if length + others <= budget:
            return None
        return (
            f"{self.name} keeps the prompt of {length} tokens (protect_prompt), and beside it at least {others} tokens, but its "
            f"budget is {budget}; expected a budget of at least {length + others}"
        )

    def evicts(self, segments: Sequence[Segment], layers: int = 1) -> bool:
        """Whether these segments of a row's first prompt lose any token; with gates that is so before any has ended. layers:
        how many layers own a cache."""
        tokens = 0
        for segment in segments:
            tokens += segment.length
            if min(self.layer_keeps(segment, tokens, layers)) < tokens:
                return True
        return self.gates or (self.data_dependent and not self.shares_layers and bool(segments))

    def layer_keeps(self, segment: Segment, tokens: int, layers: int) -> list[int]:
        """Slots that each of `layers` cache owners keeps after a segment, when the row has `tokens` tokens then."""
        if self.layer_budgets == "equal" or segment.keep == UNLIMITED:
            return [segment.keep] * layers
        if self.layer_budgets == "pyramid":
            return pyramid(segment.keep, self.sinks + segment.recent, tokens, layers)
        base = self.slots(tokens)
        return [n if base == segment.keep else n * segment.keep // base for n in self.layer_list()]

    def head_keeps(self, keep: int, layer: int, heads: int) -> list[int]:
        """Slots that each of the `heads` kv heads of the layer-th cache owner keeps, where the layer's budget is `keep`."""
        return [keep] * heads
