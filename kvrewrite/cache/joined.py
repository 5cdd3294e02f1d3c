"""Requests that decode together: one row each, in one cache. They join and leave between steps.

A request computes its prompt in a cache of its own. `put` then moves what it holds, page by page and without a copy, to
a row here. A row without a request rests: it takes no tokens and holds no pages, so a step captured for eight rows
serves five.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.cache.history import History
from kvrewrite.cache.pages import Lease, PageStore
from kvrewrite.cache.policy_state import PolicyState
from kvrewrite.cache.request import OF_ROWS, exclusive
from kvrewrite.errors import CacheError, KVRewriteError
from kvrewrite.policies import Policy, Segment


class JoinedLease(Lease):
    """A lease whose rows come from others."""

    def put(self, row: int, other: Lease) -> None:
        """Takes the pages of another lease's only row, which has none then."""
        lens = self.lens
        width = max(self.pages.shape[-1], other.pages.shape[-1])
        self.pages = _widened(self.pages, width)
        self.pages[:, row] = _widened(other.pages, width)[:, 0]
        self.bound, self.counts = self.bound.copy(), self.counts.copy()  # plans refer to the old ones
        self.bound[:, row], self.counts[:, row] = other.bound[:, 0], other.counts[:, 0]
        lens[:, row] = other.lens[:, 0]
        other.pages = np.zeros_like(other.pages)
        other.bound, other.counts = np.zeros_like(other.bound), np.zeros_like(other.counts)
        other._lens.zero_()
        self._changed()
        other._write_table()

    def clear(self, row: int) -> None:
        """Returns a row's pages."""
        lens = self.lens
        self.store.release(self.pages[:, row])
        self.pages[:, row] = 0
        self.bound, self.counts = self.bound.copy(), self.counts.copy()
        self.bound[:, row] = self.counts[:, row] = 0
        lens[:, row] = 0
        self._changed()

    def widen(self, rows: int) -> None:
        """More rows, which hold nothing."""
        more, lens = rows - self.batch, self.lens

        def wider(x: np.ndarray) -> np.ndarray:
            return np.concatenate([x, np.zeros((x.shape[0], more, *x.shape[2:]), dtype=x.dtype)], axis=1)

        self.pages, self.bound, self.counts = wider(self.pages), wider(self.bound), wider(self.counts)
        self._lens = self._layer_last((len(self.layers), rows, self.kv_heads))
        self._lens[:, : self.batch] = lens
        self.batch = rows
        self._changed()

    def _changed(self) -> None:
        self.store.changes += 1
        self._write_table()


def _widened(pages: np.ndarray, width: int) -> np.ndarray:
    """With columns of zeros, up to `width`."""
    more = np.zeros((*pages.shape[:-1], width - pages.shape[-1]), dtype=pages.dtype)
    return np.concatenate([pages, more], axis=-1)


def _put_state(mine: PolicyState, row: int, other: PolicyState) -> None:
    if mine.per_token:
        tokens = other.value.shape[1]
        mine.hold(tokens)
        mine.value[row, tokens:] = 0
        mine.value[row, :tokens] = other.value[0]
    else:
        mine.hold(1)
        mine.value[row] = other.value[0] if len(other.value) else mine.fill


def _widen_state(state: PolicyState, rows: int) -> None:
    more = rows - state.batch
    state.batch = rows
    if state.per_token or len(state.value):
        fill = 0.0 if state.per_token else state.fill
        state.value = torch.cat([state.value, state.value.new_full((more, *state.value.shape[1:]), fill)])


class JoinedRows(EvictionCache):
    """Rows of requests that decode together. rows: how many at first, all of which rest; stores: the pools that its
    requests lease from."""

    lease_type = JoinedLease
    other_rows = "rows of a serving batch are at columns of their own"
    leases: list[JoinedLease]  # type: ignore[assignment]

    def __init__(self, model: Any, rows: int, *, max_length: int | None, stores: list[PageStore]):
        super().__init__(model, rows, max_length=max_length, stores=stores)
        self.resting = [True] * rows
        self._policies: list[Policy] = [self._policy] * rows

    def _policy_of(self, row: int) -> Policy:
        return self._policies[row]

    def next_token(self, row: int) -> Segment | None:
        """What one more token of a row does; None: the row rests."""
        return None if self.resting[row] else super().next_token(row)

    def no_room(self, row: int, count: int, decoding: bool) -> KVRewriteError | None:
        """The reason why a row can't take `count` more tokens, or None."""
        return None if self.resting[row] else super().no_room(row, count, decoding)

    def record(self, ids: Tensor, real: np.ndarray | None, generated: bool) -> None:
        """Ends a step. Rows are at columns of their own, so texts are not compared here."""
        self.end_step()

    # -- rows come and go ------------------------------------------------------------------------------------------
    @exclusive
    def put(self, row: int, request: EvictionCache) -> None:
        """A request of one row goes on in a row that rests; its own cache is empty then. Raises CacheError where the two
        can't go together."""
        if request.batch_size != 1 or self.seen[row]:
            raise CacheError(
                f"row {row} holds {self.seen[row]} tokens and the request has {request.batch_size} rows; expected none, and one"
            )
        if request.pins:
            raise CacheError("a request with pinned spans can't decode together with others; unpin() them")
        empty = not any(self.seen)
        for flag in ("keys_rotated", "ranks_held"):
            if empty:
                setattr(self, flag, getattr(request, flag))
            elif getattr(self, flag) != getattr(request, flag):
                raise CacheError(
                    f"the request's keys lie otherwise than those of the rows here ({flag}); rotate them first"
                )
        request.begin_step()
        self.begin_step()
        self._changes += 1
        for mine, other in zip(self.leases, request.leases):
            mine.put(row, other)
        for state, theirs in zip(self.states, request.states):
            _put_state(state, row, theirs)
        for name in OF_ROWS:
            getattr(self, name)[row] = getattr(request, name)[0]
        self._shares = [
            self._replaced(shares, row, other[:, 0]) for shares, other in zip(self._shares, request._shares)
        ]
        self._loose |= request._loose
        self._unmeasured = max(self._unmeasured, request._unmeasured)
        self.max_length = max(self.max_length or 0, request.max_length or 0) or None
        self._policies[row], self.resting[row] = request._policy, False
        self.end_step()
        request.end_step()
        request.reset()

    @exclusive
    def clear(self, row: int) -> None:
        """The request of a row has ended: its pages are free and the row rests."""
        self.begin_step()
        self._changes += 1
        for lease in self.leases:
            lease.clear(row)
        for name in OF_ROWS:
            values = getattr(self, name)
            values[row] = type(values[row])(0)
        self._shares = [self._replaced(shares, row, -1) for shares in self._shares]
        self._policies[row], self.resting[row] = self._policy, True
        self.end_step()

    @exclusive
    def rest(self, resting: list[bool]) -> None:
        """Which rows take no token from now on; rows without a request have to."""
        if resting != self.resting:
            self._changes += 1  # what was planned ahead was for others
            self.resting = list(resting)

    @exclusive
    def narrow(self, source: list[int]) -> None:
        """Only these rows stay, in this order."""
        self.select(source)
        self._policies = [self._policies[row] for row in source]
        self.resting = [self.resting[row] for row in source]

    @exclusive
    def widen(self, rows: int) -> None:
        """More rows, which rest."""
        more = rows - self.batch_size
        self.begin_step()
        self._changes += 1
        for lease in self.leases:
            lease.widen(rows)
        for state in self.states:
            _widen_state(state, rows)
        for name in OF_ROWS:
            values = getattr(self, name)
            values.extend([type(values[0])(0)] * more)
        self._shares = [
            np.concatenate([shares, np.full((shares.shape[0], more, shares.shape[2]), -1, dtype=shares.dtype)], axis=1)
            for shares in self._shares
        ]
        self._policies.extend([self._policy] * more)
        self.resting.extend([True] * more)
        self._rows, self.history = rows, History(rows)
        self.end_step()

    @staticmethod
    def _replaced(shares: np.ndarray, row: int, value: Any) -> np.ndarray:
        """A copy with another row: the arrays themselves are never changed in place."""
        shares = shares.copy()
        shares[:, row] = value
        return shares
