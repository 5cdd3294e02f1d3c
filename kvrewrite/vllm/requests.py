"""Runs the pieces of requests that a scheduler deals out, so that no answer depends on how it cut them.

A prompt is computed in its policy's own segments, wherever the scheduler cuts it: tokens of a segment that is not complete
wait. A request that was preempted begins again at position 0, its prompt in the same segments and the tokens of its answer
one by one, as before. So its tokens and what it keeps are those of the request alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kvrewrite.errors import CacheError
from kvrewrite.runtime.batch import Batch, Running, side_by_side
from kvrewrite.runtime.model import RewrittenModel


@dataclass
class Piece:
    """Tokens of one request in one step. request: its number; prompt: tokens of its prompt, None in a piece of its answer;
    start: the position of the first token; ids (tokens,): integers on the model's device."""

    request: int
    prompt: int | None
    start: int
    ids: Tensor


@dataclass
class _Held:
    """A request. ids (prompt,): filled in as pieces come; ends: where each segment of the prompt ends; given: tokens that
    came, of prompt and answer; answer (n,): those of the answer that came in this step."""

    running: Running
    ids: Tensor
    ends: list[int]
    answer: Tensor
    given: int = 0
    logits: Tensor | None = None

    @property
    def prompt(self) -> int:
        return self.ids.shape[0]

    @property
    def segment_is_there(self) -> bool:
        """Whether the prompt has a segment left, and its tokens came."""
        left = self.running.prompt_left
        return left > 0 and self.ends[-left] <= self.given

    @property
    def next_length(self) -> int:
        """Tokens of the next segment."""
        at = len(self.ends) - self.running.prompt_left
        return self.ends[at] - (self.ends[at - 1] if at else 0)


class Requests:
    """The requests of one engine. length: most tokens that a request has, prompt and answer; memory: bytes for their pages,
    None: without a limit."""

    def __init__(self, model: RewrittenModel, *, length: int, memory: int | None = None):
        self.model, self.length = model, length
        self.batch = Batch(model, memory=memory)
        self._held: dict[int, _Held] = {}

    def __contains__(self, request: int) -> bool:
        return request in self._held

    def __len__(self) -> int:
        return len(self._held)

    def end(self, request: int) -> None:
        """A request leaves, whether it is through or not; does nothing where it is not here."""
        held = self._held.pop(request, None)
        if held is not None:
            self.batch.end(held.running)

    def step(self, pieces: Sequence[Piece]) -> Tensor:
        """Takes one piece of each of some requests: logits (pieces, vocabulary) of the next token of each; zeros where a prompt
        is not complete."""
        took = [self._take(piece) for piece in pieces]
        self._prefill(took)
        self._decode(took)
        rows = [self._zeros if held.logits is None else held.logits for held in took]
        return torch.stack(rows)

    def try_out(self, most: int) -> None:
        """Runs the largest step that there can be, of at most so many requests: prompts side by side, and a token of each."""
        first = self.model.policy.plan(self.length)[0].length
        prompt = min(2 * first, self.length - 1)
        numbers = range(max(1, min(most, side_by_side(first))))
        ids = torch.zeros(prompt, dtype=torch.int64, device=self.model.device)
        self.step([Piece(number, prompt, 0, ids) for number in numbers])
        self.step([Piece(number, None, prompt, ids[:1]) for number in numbers])
        for number in numbers:
            self.end(number)

    @property
    def _zeros(self) -> Tensor:
        return torch.zeros(self.model.program.vocab_size, device=self.model.device, dtype=self.model.dtype)

    def _take(self, piece: Piece) -> _Held:
        """Adds a piece to its request."""
        if piece.start == 0:
            self.end(piece.request)  # it was preempted
            assert piece.prompt is not None
            self._held[piece.request] = self._start(piece.prompt)
        held = self._held.get(piece.request)
        if held is None or held.given != piece.start:
            had = "nothing" if held is None else f"{held.given} tokens"
            raise CacheError(
                f"a request goes on at position {piece.start}, but {had} of it came before; expected each piece to begin where "
                "the last one ended, or at 0"
            )
        count = max(0, min(held.prompt - piece.start, piece.ids.shape[0]))
        held.ids[piece.start : piece.start + count] = piece.ids[:count]
        held.answer = piece.ids[count:].long()  # stays on the device: looking at it would wait for the step before
        held.given += piece.ids.shape[0]
        held.logits = None
        return held

    def _start(self, prompt: int) -> _Held:
        # Zeros on the host, which are checked without waiting for the device; the ids come later, into the batch's copy there.
        running = self.batch.start(torch.zeros(prompt, dtype=torch.int64), max_length=self.length)
        assert running.call is not None
        ids = running.call.ids[0]
        ends = list(accumulate(segment.length for segment in self.model.policy.plan(prompt)))
        return _Held(running, ids, ends, ids[:0])

    def _prefill(self, took: Sequence[_Held]) -> None:
        """Computes the segments whose tokens are all there: those of equal length side by side."""
        while ready := [held for held in took if held.segment_is_there]:
            length = ready[0].next_length
            some = [held for held in ready if held.next_length == length][: side_by_side(length)]
            for held, logits in zip(some, self.batch.advance_together([held.running for held in some])):
                held.logits = logits

    def _decode(self, took: Sequence[_Held]) -> None:
        """Computes the tokens of answers: one of each request at a time."""
        longest = max((held.answer.shape[0] for held in took), default=0)
        for i in range(longest):
            at_work = [held for held in took if held.answer.shape[0] > i]
            tokens = torch.stack([held.answer[i] for held in at_work])
            logits = self.batch.decode([held.running for held in at_work], tokens)
            for held, row in zip(at_work, logits):
                held.logits = row


def bytes_at_most(batch: Batch, length: int) -> int:
    """The most bytes of pages that a request of up to `length` tokens holds, wherever its prompt ends and its answer
    begins. Pools are as large as this for each request, in the proportions of `Batch(memory=)`."""
    classes = batch.model.program.layout.classes
    heads = [len(c.layers) * c.kv_heads for c in classes]
    prompts = {*range(1, length, max(1, length // 64)), length}
    pages = max(
        -(-need // n)
        for prompt in prompts
        for need, n in zip(batch.pages_needed(prompt, length)[0], heads, strict=True)
    )
    return pages * sum(n * store.page_bytes for n, store in zip(heads, batch.stores, strict=True))
