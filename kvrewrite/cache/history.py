"""What went through a cache, column by column: the ids, and which of them were real tokens of which row. Tokens that came as
embeddings have a signature (`kvrewrite/cache/signature.py`) in the place of an id.

Masks and texts that come with later calls are compared with it: a cache can't take back what it holds. The ids stay on the
device where they came from, and are only looked at when a text is handed in that should begin with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvrewrite.errors import InputError

PIECES = 64  # pieces of ids that are kept apart


class History:
    """The columns of one cache. rows: its batch size."""

    def __init__(self, rows: int):
        self.rows = rows
        self._real = np.ones((rows, 0), dtype=bool)  # columns after these are real tokens of every row
        self._pieces: list[Tensor] = []  # (rows, columns) int32 each: half of what the caller's take
        self._kept = 0  # columns of the pieces
        self._text: Tensor | None = (
            None  # what `generate` has so far, (rows, columns), for the columns after the pieces
        )
        self._begins = 0  # the column at which it begins

    @classmethod
    def of(cls, ids: Tensor, real: np.ndarray) -> History:
        """That of columns which went in before: ids (rows, columns) int32, real (rows, columns) bool."""
        made = cls(len(ids))
        made._pieces, made._kept, made._real = [ids], ids.shape[1], real
        return made

    def real(self, columns: int) -> np.ndarray:
        """Which of the first `columns` columns are real tokens: (rows, columns) bool."""
        rest = np.ones((self.rows, max(0, columns - self._real.shape[1])), dtype=bool)
        return np.concatenate([self._real[:, :columns], rest], axis=1)

    def ids(self, columns: int) -> Tensor:
        """The ids of the first `columns` columns, (rows, columns) int64."""
        pieces = list(self._pieces)
        if self._text is not None and columns > self._kept:
            pieces.append(self._text[:, self._kept - self._begins : columns - self._begins].int())
        device = pieces[0].device if pieces else torch.device("cpu")
        whole = (
            torch.cat([piece.to(device) for piece in pieces], 1)
            if pieces
            else torch.zeros(self.rows, 0, dtype=torch.int32)
        )
        return whole[:, :columns].long()

    @property
    def nbytes(self) -> int:
        """Bytes of the ids that are kept."""
        return sum(piece.nbytes for piece in self._pieces)

    def follow(self, text: Tensor, columns: int) -> None:
        """`generate` is about to feed the last column of `text`, (rows, columns) ids, as column number `columns`. Keeping its
        text costs nothing at a token; keeping the token would."""
        begins = columns + 1 - text.shape[1]
        if begins <= self._kept:
            self._text, self._begins = text, begins

    def add(self, ids: Tensor, real: np.ndarray | None, columns: int, generated: bool) -> None:
        """Records a finished step: `ids` (rows, T) came after `columns` columns. real: (rows, columns + T) bool, None where all
        T are real tokens of every row; generated: whether they are the end of the text that is followed."""
        after = columns + ids.shape[1]
        followed = self._text is not None and self._begins + self._text.shape[1] == after
        if not (generated and followed):
            if self._text is not None:
                self._pieces = [self.ids(columns).int()]
            if len(self._pieces) >= PIECES:
                self._pieces = [torch.cat(self._pieces, 1)]
            self._pieces.append(ids.detach().to(torch.int32, copy=True))
            self._text, self._kept = None, after
        if real is not None:
            self._real = real

    def select(self, source: list[int], columns: int) -> None:
        """Row i becomes a copy of row source[i], for as many rows as `source` has."""
        self._pieces, self._text, self._kept = [self.ids(columns)[source].int()], None, columns
        self._real, self.rows = self._real[source], len(source)

    def crop(self, columns: int) -> None:
        """Forgets all but the first `columns` columns."""
        self._pieces, self._text, self._kept = [self.ids(columns).int()], None, columns
        self._real = self._real[:, :columns]

    def fork(self) -> History:
        """A copy that goes on by itself."""
        twin = History(self.rows)
        twin.__dict__.update(self.__dict__, _pieces=list(self._pieces))
        return twin

    # -- what calls hand in --------------------------------------------------------------------------------------
    def late(self, mask: np.ndarray, columns: int) -> int:
        """The first column of the past that has not gone in for some row although `mask` (rows, columns) bool counts it as
        real: what a row that paused has still to be given. `columns` where there is none.

        Raises InputError where a mask differs from what went in otherwise.
        """
        real = self.real(columns)
        for row, (asked, held) in enumerate(zip(mask, real)):
            hidden = np.flatnonzero(held & ~asked)
            if len(hidden):
                raise InputError(
                    f"attention_mask is 0 for row {row} at column {hidden[0]}, expected 1: that token went into the cache as a "
                    "real one and can't be hidden now. Say what is padding in the call that it comes in (a mask (batch, past + "
                    "new), or (batch, new) for the new columns alone), or begin with an empty cache"
                )
            end = int(np.flatnonzero(held)[-1]) if held.any() else -1
            between = np.flatnonzero(asked[: max(end, 0)] & ~held[: max(end, 0)])
            if len(between):
                raise InputError(
                    f"attention_mask is 1 for row {row} at column {between[0]}, expected 0: that column was padding when it came "
                    "in, and tokens after it are in the cache. Pass the mask of that call, with the new columns after it"
                )
        late = np.flatnonzero((mask & ~real).any(0))
        return int(late[0]) if len(late) else columns

    def first_difference(
        self, ids: Tensor, columns: int, sign: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[int, int] | None:
        """Where the text `ids` (rows or a multiple of them, T) first differs from what the first `columns` columns hold:
        a row of it and a column; None where it does not, as far as both go. Both may have signatures; sign: makes them of
        ids."""
        both = min(columns, ids.shape[1])
        copies = ids.shape[0] // self.rows
        given, held = ids[:, :both], self.ids(both).to(ids.device).repeat_interleave(copies, 0)
        if sign is not None and bool((either := (given < 0) != (held < 0)).any()):
            signed = sign(torch.where(given < 0, held, given).clamp(min=0))
            given, held = (torch.where(either & (side >= 0), signed, side) for side in (given, held))
        differs = given != held
        differs &= torch.from_numpy(self.real(both)).to(ids.device).repeat_interleave(copies, 0)
        if not bool(differs.any()):
            return None
        column = int(differs.any(0).int().argmax())
        return int(differs[:, column].int().argmax()), column

    def check_text(
        self,
        ids: Tensor,
        columns: int,
        tokenizer: Any = None,
        sign: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Raises InputError unless the text `ids` (rows or a multiple of them, T), handed in as a whole, begins with what the
        first `columns` columns hold and has more. tokenizer: says what tokens mean, for the error; sign: see
        `first_difference`."""
        found = self.first_difference(ids, columns, sign)
        if found is not None:
            row, column = found
            held = int(self.ids(column + 1)[row // (ids.shape[0] // self.rows), column])
            got = int(ids[row, column])
            names = [_name(n, tokenizer) for n in (got, held)]
            word = "token " if got >= 0 else ""
            raise InputError(
                f"input_ids differ from the text that the cache holds: at column {column} row {row} has {word}{names[0]}, and "
                f"the cache was given {names[1]}. Pass the ids that generate returned, with the new ones after them (a text that "
                'is tokenized again may have other ids). Or pass on_mismatch="recompute" at every turn, which goes back to '
                "the last turn that agrees. Or reset() the cache, or fork() it before the texts part. New ids alone need an "
                f"attention_mask of {columns} + {ids.shape[1]} columns"
            )
        if ids.shape[1] <= columns:
            raise InputError(
                f"input_ids have {ids.shape[1]} columns, and the cache has seen {columns}: nothing is new. Pass the whole text, "
                f"what the cache has seen and then what is new, or the new ids alone with an attention_mask of {columns} + "
                f"{ids.shape[1]} columns"
            )


def _name(token: int, tokenizer: Any) -> str:
    """A token of a text, in words."""
    if token < 0:
        return f"an embedding (signature {token})"
    return str(token) if tokenizer is None else f"{token} ({tokenizer.decode([token])!r})"
