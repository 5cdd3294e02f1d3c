"""A conversation with a rewritten model: turns whose text is checked, on one cache.

A chat template writes the whole conversation anew at every turn, and what it writes need not begin with what the cache was
given: the answer may be tokenized otherwise than it was generated, and reasoning may be left out. So each turn's text is
compared with the cache, which goes back to the end of the last user's turn that agrees (a checkpoint, which shares pages) and
computes the rest again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.cache.memory import MemoryReport
from kvrewrite.errors import OptionError

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel

REASONING = ("<think>", "</think>")


class Chat:
    """A conversation. Make one with `kvrewrite.chat(model, tokenizer)`.

    messages: the conversation so far, dicts of "role" and "content", as chat templates take them. cache: what the model
    remembers of it. pinned: how many ids of the system prompt stay whatever the policy says. A turn that fails or is
    interrupted leaves the conversation as it was before.
    """

    def __init__(
        self,
        model: RewrittenModel,
        tokenizer: Any,
        system: str | None = None,
        keep_reasoning: bool = False,
        template: Mapping[str, Any] | None = None,
        pin_system: bool = True,
    ):
        if not getattr(tokenizer, "chat_template", None):
            raise OptionError(
                "the tokenizer has no chat template, which says how turns are written; use generate with a text of your own"
            )
        self.model, self.tokenizer, self.keep_reasoning = model, tokenizer, keep_reasoning
        self.template, self.pin_system = dict(template or {}), pin_system
        self.cache: EvictionCache = model.new_cache(1)
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Begins again, with the system prompt alone."""
        self.cache.reset()
        self.pinned = 0
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str, **options: Any) -> str:
        """The answer to a user's turn, without its reasoning. options: of generate (max_new_tokens, do_sample, streamer,
        ...)."""
        turn = [*self.messages, {"role": "user", "content": text}]
        ids, end = self._ids(turn, True), self._user_end(turn)
        try:
            self._go_to(ids, end)
            made = self._generate(ids, options)
        except BaseException:
            self.cache.roll_back(max(0, end - 1))  # what this turn has marked goes, too
            raise
        answer: str = self.tokenizer.decode(made, skip_special_tokens=True)
        shown = without_reasoning(answer)
        self.messages = [*turn, {"role": "assistant", "content": answer if self.keep_reasoning else shown}]
        return shown

    def memory(self) -> MemoryReport:
        """What the cache holds, in bytes (`EvictionCache.memory`)."""
        return self.cache.memory()

    def _ids(self, messages: list[dict[str, str]], answers: bool) -> Tensor:
        """The conversation as the template writes it, (1, T). answers: with the beginning of an answer."""
        made = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=answers, return_tensors="pt", return_dict=True, **self.template
        )
        ids: Tensor = made["input_ids"].to(self.model.device)
        return ids

    def _user_end(self, turn: list[dict[str, str]]) -> int:
        """How many ids of a turn are the user's and all before: where later turns will agree with it, whatever the
        beginning of the answer becomes (some templates open a reasoning that they leave out later)."""
        whole, without = self._ids(turn, True), self._ids(turn, False)
        both = min(whole.shape[1] - 1, without.shape[1])
        differs = (whole[0, :both] != without[0, :both]).nonzero()
        return int(differs[0]) if len(differs) else both

    def _go_to(self, ids: Tensor, end: int) -> None:
        """Computes a text up to `end`, from where the cache agrees with it, and remembers what is held there."""
        cache = self.cache
        found = cache.history.first_difference(ids, cache.columns)
        agree = min(end, ids.shape[1] if found is None else found[1])
        if agree < cache.columns:
            cache.roll_back(agree)
        if self.pin_system and cache.columns == 0 and self.system is not None:
            self._pin_system(ids)
        if cache.columns < end:
            self.model(ids[:, cache.columns : end], cache=cache, logits_to_keep=1)
            cache.end_prompt()
            cache.checkpoint()

    def _pin_system(self, ids: Tensor) -> None:
        """Pins what every conversation with this system prompt begins with: what two other ones and this share."""
        others = [self._ids([*self.messages[:1], {"role": "user", "content": text}], False)[0] for text in "ab"]
        both = min(len(x) for x in (ids[0], *others))
        same = torch.stack([x[:both] == ids[0, :both] for x in others]).all(0)
        self.pinned = int(same.long().cumprod(0).sum())
        if self.pinned:
            self.cache.pin(0, self.pinned)

    def _generate(self, ids: Tensor, options: dict[str, Any]) -> list[int]:
        pad = self.tokenizer.pad_token_id
        options.setdefault("pad_token_id", self.tokenizer.eos_token_id if pad is None else pad)
        mask = torch.ones_like(ids)
        out = self.model.generate(ids, attention_mask=mask, cache=self.cache, **options)
        made: list[int] = out[0, ids.shape[1] :].tolist()
        return made


def without_reasoning(answer: str) -> str:
    """An answer without what stands between <think> and </think>; a reasoning whose beginning the template wrote counts,
    and one that was cut off, too."""
    begin, end = REASONING
    before, found, after = answer.rpartition(end)
    if found:
        return (before.partition(begin)[0] if begin in before else "") + after.lstrip("\n")
    return answer.partition(begin)[0] if begin in answer else answer


def chat(
    model: RewrittenModel,
    tokenizer: Any,
    *,
    system: str | None = None,
    keep_reasoning: bool = False,
    template: Mapping[str, Any] | None = None,
    pin_system: bool = True,
) -> Chat:
    """A conversation with a rewritten model, whose cache keeps the budget however long it becomes.

        talk = kvrewrite.chat(small, tokenizer, system="You are brief.")
        print(talk.ask("Who wrote Faust?", max_new_tokens=100), talk.memory())

    keep_reasoning: whether what stands between <think> and </think> in an answer is part of later turns. template: further
    arguments of the chat template. pin_system: whether the system prompt stays whatever the policy says
    (`EvictionCache.pin`; it counts within the budget). Raises OptionError where the tokenizer has no template.
    """
    return Chat(model, tokenizer, system, keep_reasoning, template, pin_system)
