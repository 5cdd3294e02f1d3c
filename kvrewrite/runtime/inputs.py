"""What a call gives a rewritten model: checked, row by row, and turned into the row inputs of its graph.

`new_tokens` finds the real tokens of each row. `row_numbers` are what the host tells the graph about each row, and
`row_inputs` the inputs that come of them: chunks of prompts and single tokens from static buffers are given the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvrewrite.cache.request import Request
from kvrewrite.cache.slot_plan import walk
from kvrewrite.errors import CacheError, InputError
from kvrewrite.ir.layout import CacheLayout
from kvrewrite.policies import Policy, RowState, Segment

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel

WIDE = ("positions", "following")  # row numbers that are int64 to the graph; the others are int32


# -- what is new -----------------------------------------------------------------------------------------------------
@dataclass
class Tokens:
    """What a call gives each row.

    ids (rows, columns): those of the call with, before them, `late` columns that some row has still to be given; where:
    the columns of each row's real tokens among them; real: which columns are real from then on, (rows, all columns)
    bool, or None where all that is new is; decoding: rows that go on by one token, or pause.
    """

    ids: Tensor
    late: int
    where: list[np.ndarray]
    real: np.ndarray | None
    decoding: list[bool]

    @property
    def counts(self) -> list[int]:
        """New tokens of each row."""
        return [len(columns) for columns in self.where]


def new_tokens(ids: Tensor, mask: Tensor | None, cache: Request) -> Tokens:
    """What `ids` (rows, columns) and the mask of a call give each row of a cache. Raises InputError for a mask of
    another shape, or one that differs from what went in."""
    batch, width = ids.shape
    late, where, real = 0, [np.arange(width)] * batch, None
    if mask is not None:
        past = cache.columns
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (width, past + width):
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {past + width}) or ({batch}, {width})"
            )
        given = mask.to(torch.bool).cpu().numpy()
        new, first = given[:, given.shape[1] - width :], past
        if given.shape[1] > width:
            first = cache.history.late(given[:, :past], past)
        if first < past or not new.all():
            before = cache.history.real(past)
            real = np.concatenate([before, new], 1)
            if first < past:
                ids = torch.cat([cache.history.ids(past)[:, first:].to(ids), ids], 1)
                real, late = given, past - first
                new = np.concatenate([given[:, first:past] & ~before[:, first:], new], 1)
            where = [np.flatnonzero(row) for row in new]
    # Row by row, by its real tokens, so that a row does not depend on what else is in the batch. One that pauses keeps
    # its ranks, too.
    decoding = [len(columns) <= 1 and seen > 0 for columns, seen in zip(where, cache.seen)]
    return Tokens(ids, late, where, real, decoding)


# -- checks ----------------------------------------------------------------------------------------------------------
def check_ids(ids: Tensor, vocab_size: int, decoding: bool) -> None:
    """Raises InputError for ids beyond the vocabulary. Single tokens on a GPU are not looked at: that would stall
    it."""
    if ids.numel() and not (decoding and ids.is_cuda):
        low, high = torch.stack(torch.aminmax(ids)).tolist()
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"token ids reach from {low} to {high}, expected 0 to {vocab_size - 1}; does the tokenizer belong to this model?"
            )


def check_positions(position_ids: Tensor, tokens: Tokens, cache: Request) -> None:
    """Raises InputError where positions that are given are not those that the cache counts."""
    rows = position_ids.expand(len(tokens.where), -1).cpu().numpy()
    for row, columns in enumerate(tokens.where):
        new = columns >= tokens.late
        expected = (cache.seen[row] + np.arange(len(columns)))[new]
        got = rows[row, columns[new] - tokens.late]
        if not np.array_equal(got, expected):
            paused = "; in this row some columns were padding, which attention_mask (batch, past + new) should say"
            raise InputError(
                f"position_ids of row {row} are {got[:8].tolist()}..., expected {expected[:8].tolist()}...: positions are "
                "counted by the cache; leave position_ids out" + (paused if cache.seen[row] < cache.columns else "")
            )


def row_plan(policy: Policy, count: int, decoding: bool, row: RowState) -> list[Segment]:
    """What `count` new tokens of a row do."""
    if not count:
        return []
    return [policy.decode_segment(row)] if decoding else policy.plan(count, row)


def no_room(model: RewrittenModel, cache: Request, row: int, count: int, decoding: bool) -> Exception | None:
    """The reason why a row can't take `count` more tokens, or None."""
    limit, total = model.program.max_positions, cache.seen[row] + count
    if limit is not None and (reach := _reach(model, cache, row, count, decoding)) > limit:
        return InputError(
            f"row {row} would reach position {reach - 1}, but the model has {limit} positions; expected at most {limit} "
            "tokens at a time (a table of positions can't be extended)"
        )
    if model.policy.capacity is not None and total > model.policy.capacity:
        return CacheError(
            f"row {row} would hold {total} tokens, but the full cache's capacity (budget) is {model.policy.budget}; use a larger "
            "budget or a policy that evicts"
        )
    return None


def _reach(model: RewrittenModel, cache: Request, row: int, count: int, decoding: bool) -> int:
    """One more than the largest position that `count` new tokens of a row will have."""
    if not model.program.layout.contiguous:
        return cache.seen[row] + count
    if decoding and cache.settled[row] and not model.policy.renews_ranks_in_decoding:
        return cache.next_rotary[row] + count
    segments = row_plan(model.policy, count, decoding, cache.row(row))
    return max((during for during, _ in walk(segments, cache.length[row])), default=0)


# -- inputs of the graph ---------------------------------------------------------------------------------------------
def row_numbers(
    layout: CacheLayout, cache: Request, segments: Sequence[Segment | None], following: list[int]
) -> dict[str, list[int]]:
    """What the host tells the graph about each row. positions: that of its first new token in the text; following: the
    one that its key is rotated by (contiguous positions); valid: new tokens; recent: newest slots that are protected;
    and the policy's own numbers. None among `segments`: a row that does nothing."""
    numbers = {
        "positions": cache.seen,
        "valid": [s.length if s else 0 for s in segments],
        "recent": [s.recent if s else 0 for s in segments],
    }
    if layout.contiguous:
        numbers["following"] = following
    for name in layout.row_inputs:
        numbers[name] = [s.values.get(name, 0) if s else 0 for s in segments]
    return numbers


def row_inputs(
    rows: Mapping[str, Tensor], max_positions: int | None, column: Tensor | None = None
) -> dict[str, Tensor]:
    """Graph inputs that come of `row_numbers`, given as tensors (rows,). column: 0 to T - 1 where rows have T new
    tokens."""

    def count(begin: Tensor) -> Tensor:
        return begin[:, None] if column is None else begin[:, None] + column

    inputs = {**rows, "positions": count(rows["positions"])}
    inputs["position_ids"] = count(rows["following"]) if "following" in rows else inputs["positions"]
    if max_positions is not None:  # padding after a row's end may not index out of a table of positions
        inputs["position_ids"] = inputs["position_ids"].clamp(max=max_positions - 1)
    return inputs
