"""What a call gives a rewritten model, row by row, checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvrewrite.cache.request import Request
from kvrewrite.errors import InputError


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
