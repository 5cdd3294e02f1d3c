"""Where drafted tokens come from: a model with a small cache, or the text itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from kvrewrite.errors import CacheError

if TYPE_CHECKING:
    from kvrewrite.cache.eviction_cache import EvictionCache
    from kvrewrite.runtime.model import RewrittenModel

Process = Callable[[Tensor, Tensor], Tensor]  # a text (1, T) and logits (1, vocabulary) -> those to choose by


class Drafted(NamedTuple):
    """tokens: (k,) int64; q: the probabilities (k, vocabulary) that they were drawn with, None: they were not drawn."""

    tokens: Tensor
    q: Tensor | None = None


class Draft(Protocol):
    """What drafts. It knows how much of the text it has seen."""

    def propose(self, text: Tensor, count: int) -> Drafted:
        """At most `count` tokens that may follow a text (1, T)."""

    def accepted(self, length: int) -> None:
        """The text that stays has `length` tokens; the newest of them need not have been drafted."""


class ModelDraft:
    """A model whose cache has evicted from the prompt, and only appends from then on: rejected tokens are taken back.

    prompt (1, T) int64 and mask (1, T) bool: the text so far; own: how many of its columns later texts leave out, which
    begin after them. process: of the logits; draws: whether tokens are drawn from their probabilities (else the likeliest
    is taken).
    """

    def __init__(
        self,
        model: RewrittenModel,
        prompt: tuple[Tensor, Tensor],
        max_length: int | None,
        process: Process,
        draws: bool,
        own: int = 0,
    ):
        self.model, self.process, self.draws, self.own = model, process, draws, own
        self.cache: EvictionCache = model.new_cache(1, max_length=max_length)
        if self.cache.why_never is not None:
            raise CacheError(
                f"{model.policy.name} can't draft, because drafted tokens have to be taken back: {self.cache.why_never}; use "
                "snapkv, expected_attention, h2o, keydiff or another policy with positions=original"
            )
        ids, mask = prompt
        model(ids, attention_mask=mask, cache=self.cache, logits_to_keep=1, generated=True)
        self.cache.end_prompt()
        self.cache.append_only()

    def propose(self, text: Tensor, count: int) -> Drafted:
        """Single steps, each from the token before; nothing waits for the device. Where all drafted tokens stayed, the first
        step has two: the last of them has not been read yet."""
        tokens: list[Tensor] = []
        chances: list[Tensor] = []
        coming = text[:, self.cache.columns - self.own :]
        while len(tokens) < count:
            logits = self.model(coming, cache=self.cache, generated=True, logits_to_keep=1).logits[:, -1]
            scores = self.process(text, logits)
            if self.draws:
                chances.append(scores.float().softmax(-1))
                token = torch.multinomial(chances[-1], 1)
            else:
                token = scores.argmax(-1, keepdim=True)
            text, coming = torch.cat([text, token], 1), token
            tokens.append(token)
        return Drafted(torch.cat(tokens, 1)[0], torch.cat(chances) if self.draws else None)

    def accepted(self, length: int) -> None:
        """Takes back what the text has no more; its newest token goes in with the next proposal."""
        self.cache.crop(min(0, length - 1 + self.own - self.cache.columns))


class LookupDraft:
    """What followed the text's last words where they stood before (transformers' prompt lookup)."""

    def __init__(self, ngram: int):
        self.ngram = ngram

    def propose(self, text: Tensor, count: int) -> Drafted:
        """As many tokens as followed there, perhaps none."""
        search = PromptLookupCandidateGenerator(
            num_output_tokens=count, max_matching_ngram_size=self.ngram, max_length=text.shape[1] + count + 1
        )
        ids: Any = text
        found, _ = search.get_candidates(ids)
        return Drafted(found[0, text.shape[1] :])

    def accepted(self, length: int) -> None:
        """Nothing to take back."""
