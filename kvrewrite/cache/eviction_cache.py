"""`EvictionCache`: a `Request` as a cache of transformers, with reports of what it holds."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvrewrite.cache import rollback
from kvrewrite.cache.memory import MemoryReport, report
from kvrewrite.cache.request import OF_ROWS, Request, exclusive
from kvrewrite.cache.spans import check_span, drop, joined, lost, without
from kvrewrite.errors import CacheError
from kvrewrite.policies.segments import UNLIMITED

CHECKPOINTS = 4  # that a cache remembers
# transformers calls the cache `cache` from 5.24 on, and `past_key_values` before.
CACHE_NAME = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"


class EvictionCache(Request, Cache):
    """A bounded cache for a rewritten model. Make one with `model.new_cache(batch_size)`.

    Passed as `cache` (or `past_key_values`, its older name); transformers' `generate` makes one by itself. `max_length`
    (tokens of prompt and answer) chooses between short and long rotary frequencies where a model has both.
    """

    is_compileable = False

    def __init__(self, model: Any, batch_size: int, *, max_length: int | None = None, **given: Any):
        Cache.__init__(self, layers=[])  # not that of a class between (`type_for` in kvrewrite/dynamo/caches.py)
        Request.__init__(self, model, batch_size, max_length=max_length, **given)

    # -- copies --------------------------------------------------------------------------------------------------
    @exclusive
    def fork(self) -> Self:
        """An independent copy that shares this cache's pages until one of the two writes to them (copy on write).

        So a document is compressed once and asked many times: `cache = model.prefill(document)`, then
        `model.generate(..., cache=cache.fork())` for every question.
        """
        self.check_finished()
        self._touch()
        twin: Self = object.__new__(type(self))
        # Should what follows fail, it must not return this cache's pages.
        twin.__dict__.update(self.__dict__, leases=[])
        for name in OF_ROWS:
            setattr(twin, name, list(getattr(self, name)))
        twin.leases = [lease.fork() for lease in self.leases]
        twin.history, twin.ended = self.history.fork(), None
        twin.checkpoints, twin.marking = list(self.checkpoints), False
        twin.pins = list(self.pins)
        twin.states = [state.fork() for state in self.states]
        for lease in self.leases:
            lease.store.end()
        return twin

    __copy__ = fork

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same as `fork`: what people do with a cache of transformers to use a prefix again."""
        return self.fork()

    # -- spans ---------------------------------------------------------------------------------------------------
    @exclusive
    def pin(self, start: int, end: int, row: int | None = None) -> None:
        """Keeps the tokens at positions [start, end) of a row's text (None: of every row's), also those that are still to
        come, whatever the policy says. They count within the budget; a step that could not keep them is refused before
        it begins. Layers with a window lose them as they lose all that no later token can see.

        Positions count a row's tokens from 0, without padding. Raises CacheError where some of them are gone already.
        """
        check_span(start, end)
        self._check_spans_possible("pinned")
        self.check_finished()
        rows = self._rows_of(row)
        for r in rows:
            if gone := lost(self, r, start, end):
                raise CacheError(
                    f"row {r}: {gone} of the tokens {start} to {end - 1} are no longer held by every head, so they can't be "
                    "pinned; pin a span before what evicts it (pin= of prefill and generate), or on a fork made before"
                )
        pins = self.pins or [()] * self.batch_size
        self.pins = [joined([*spans, (start, end)]) if r in rows else spans for r, spans in enumerate(pins)]
        self._changes += 1

    @exclusive
    def unpin(self, start: int = 0, end: int = UNLIMITED, row: int | None = None) -> None:
        """Leaves [start, end) of a row's text (None: of every row's) to the policy again."""
        check_span(start, end)
        rows = self._rows_of(row)
        pins = [without(spans, start, end) if r in rows else spans for r, spans in enumerate(self.pins)]
        self.pins = pins if any(pins) else []
        self._changes += 1

    @exclusive
    def drop(self, start: int, end: int, row: int | None = None) -> None:
        """Takes the tokens at positions [start, end) of a row's text (None: of every row's) out of the cache, pinned ones,
        too, and returns the pages that this empties. What follows keeps its positions; contiguous ranks close the gap at
        the next prompt, or token, that makes them again.

        The text itself stays: later texts begin with the same ids. What a policy, or a layer without attention, carries
        besides slots stays as it is. Raises CacheError for tokens that have not been seen yet.
        """
        check_span(start, end)
        self._check_spans_possible("dropped")
        rows = self._rows_of(row)
        if any(end > self.seen[r] for r in rows):
            raise CacheError(
                f"got the span {start} to {end}, but rows {rows} have {[self.seen[r] for r in rows]} tokens; expected a "
                "span that has been seen"
            )
        self.begin_step()
        drop(self, start, end, rows)
        self._changes += 1
        free = [lease.bound[lease.windows == 0] for lease in self.leases]
        for r in rows:
            held = [int(bound[:, r].max(initial=0)) for bound in free]
            self.length[r] = max(held) if any(map(len, free)) else self.length[r]
        self.ranks_held = False
        self.firm = self.columns  # positions have gaps now
        self.end_step()
        self.unpin(start, end, row)

    def _check_spans_possible(self, what: str) -> None:
        """Raises CacheError where tokens that have left the pages are not gone."""
        if self._policy.recalls:
            raise CacheError(
                f"{self._policy.name} keeps every token, in pages or in its memory, so none can be {what}; use a policy "
                "that evicts"
            )

    def _rows_of(self, row: int | None) -> list[int]:
        if row is None:
            return list(range(self.batch_size))
        if not isinstance(row, int) or not 0 <= row < self.batch_size:
            raise CacheError(f"row is {row!r}, expected a number from 0 to {self.batch_size - 1}, or None for all")
        return [row]

    # -- turns ---------------------------------------------------------------------------------------------------
    @exclusive
    def checkpoint(self) -> None:
        """Remembers what is held now, to come back to it (`roll_back`). The newest `CHECKPOINTS` are kept; they share
        pages with this cache until it writes to them."""
        twin = self.fork()
        twin.checkpoints = []
        kept = [c for c in self.checkpoints if c.columns < self.columns]
        self.checkpoints = [*kept, twin][-CHECKPOINTS:]

    @exclusive
    def roll_back(self, columns: int) -> None:
        """Becomes what it was at its newest checkpoint with at most `columns` columns, or empty where there is none.
        Also after a step that was interrupted."""
        kept = [c for c in self.checkpoints if c.columns <= columns]
        if not kept:
            self.reset()
            return
        self._unfinished = True
        twin = kept[-1].fork()
        self._touch()
        for lease in self.leases:
            lease.close()
            lease.store.end()
        changes = self._changes
        self.__dict__.update(twin.__dict__, checkpoints=kept, _changes=changes + 1)
        twin.leases = []  # they are this cache's now
        self._unfinished = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Not picklable: pages belong to a store that forks share."""
        raise CacheError("an EvictionCache can't be pickled; cache.save(path) writes it to a file")

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Writes what this cache holds to a file, which `kvrewrite.load_cache(model, path)` reads, also on another
        machine: pages as they are, the text's ids, counters, and what model and policy they belong to (docs/caches.md).

        The file appears whole or not at all. force: replaces a file that is there. Raises CacheError, ArtifactError.
        """
        self._save(self, path, force=force)

    @exclusive
    def select(self, source: list[int]) -> None:
        """Row i goes on from what row source[i] holds, for as many rows as `source` has."""
        if not source or not all(0 <= s < self.batch_size for s in source):
            raise CacheError(f"got rows {source}, expected at least one, and numbers below {self.batch_size}")
        self.begin_step()
        self._changes += 1
        for lease in self.leases:
            lease.select(source)
        self._shares = [shares[:, source] for shares in self._shares]
        for state in self.states:
            state.select(source)
        for name in OF_ROWS:
            values = getattr(self, name)
            setattr(self, name, [values[s] for s in source])
        self.history.select(source, self.columns)
        self.turns, self.firm = [], self.columns
        self.checkpoints, self.pins = [], [self.pins[s] for s in source] if self.pins else []
        self._rows, self.ended = len(source), None
        self.end_step()

    # -- reports -------------------------------------------------------------------------------------------------
    @exclusive
    def memory(self) -> MemoryReport:
        """What the cache holds in bytes, and what a full cache of the same tokens would take. Printed, it is one line."""
        self._return_gone()
        return report(self)

    def _return_gone(self) -> None:
        """So that reports do not count pages of caches that are gone. Repairs are left to the next step."""
        for lease in self.leases:
            if lease.store.consistent:
                lease.store.begin()
                lease.store.end()

    @exclusive
    def ids(self) -> Tensor:
        """The ids that went in, column by column, padding included: (B, columns) int64, on the CPU. A text that is
        handed to `generate` begins with them."""
        return self.history.ids(self.columns).cpu()

    @exclusive
    def live_slots(self) -> dict[int, Tensor]:
        """Live slots of each layer that owns a cache: layer -> (B, Hkv) int32."""
        found = {layer: lease.lens[i] for lease in self.leases for i, layer in enumerate(lease.layers)}
        return dict(sorted(found.items()))

    @exclusive
    def positions(self) -> dict[int, list[list[list[int]]]]:
        """Positions in the text that are kept: layer -> row -> kv head -> sorted positions."""
        found = {}
        for lease in self.leases:
            for i, layer in enumerate(lease.layers):
                dense = torch.ops.kvrewrite.read_pages(lease.store.pos_pages, lease.table[i])[..., 0].cpu()
                lens = lease.lens[i].cpu()
                found[layer] = [
                    [sorted(dense[b, h, : lens[b, h]].tolist()) for h in range(lease.kv_heads)]
                    for b in range(self.batch_size)
                ]
        return dict(sorted(found.items()))

    def __repr__(self) -> str:
        memory = self.memory()
        return (
            f"EvictionCache(batch_size={self.batch_size}, seen={self.seen}, live={memory.live} B, leased={memory.leased} "
            f"B, reserved={memory.reserved} B)"
        )

    # -- transformers' Cache -------------------------------------------------------------------------------------
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` that went through, evicted or not: what `generate` slices its ids by."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Sizes for mask code that wants them; the rewritten model builds no masks."""
        return self.columns + query_length, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No limit in columns: eviction bounds the memory."""
        return -1

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not for ordinary models."""
        raise CacheError(
            "an EvictionCache works with a model that kvrewrite made; this one is an ordinary model. Pass it to "
            "kvrewrite.transform first"
        )

    @exclusive
    def crop(self, columns: int) -> None:
        """Takes the newest -columns columns back, in place (a negative number, as in transformers): the cache is then what it
        would be had it never seen them. Raises CacheError where that is not so, with the reason; a `fork()` or `checkpoint()`
        made before goes back then.
        """
        left = self.columns + columns
        why = rollback.why_not(self, left) if columns else None
        if columns > 0 or left < 0:
            why = f"got crop({columns}), expected a number from {-self.columns} to 0: crop(-3) takes three columns back"
        if why is not None:
            raise CacheError(
                f"the cache can't be cropped to {left} columns, which drafts (assisted decoding, prompt lookup) "
                f"need: {why}. Make a fork() or a checkpoint() before, and go back to that"
            )
        if columns:
            self.begin_step()
            self._changes += 1
            rollback.take_back(self, left)
            self.end_step()

    @exclusive
    def append_only(self) -> None:
        """From here on nothing is evicted: tokens are only added, so that all of them can be taken back (`crop`). For good,
        because what a policy sums up (H2O's scores) would have taken in what was cropped; forks made before, and `reset`,
        go on evicting. Layers with a window keep what is outside it, too."""
        if self._policy.recalls:
            raise CacheError(
                f"{self._policy.name} loses nothing as it is, and what leaves the cache has to enter its memory"
            )
        self.check_finished()
        self.only_appends = True
        if self.why_never is None:
            self.keep_windows(True)
        self._changes += 1

    @property
    def is_croppable(self) -> bool:
        """Whether generated tokens can be taken back."""
        if self.other_rows is not None or self.why_never is not None:
            return False
        return self.only_appends or self._policy.rates_prompts_only

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues from what row beam_idx[i] holds."""
        source = beam_idx.tolist()
        if len(source) != self.batch_size:
            raise CacheError(
                f"reorder_cache: got rows {source}, expected {self.batch_size} numbers below {self.batch_size}"
            )
        self.select(source)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Row i becomes `repeats` rows, which share its pages until they write to them. On a fork, where the rows that
        there are should remain: `rows = cache.fork(); rows.batch_repeat_interleave(3)`."""
        if not isinstance(repeats, int) or repeats < 1:
            raise CacheError(f"batch_repeat_interleave: repeats is {repeats!r}, expected a whole number from 1 on")
        self.select([row for row in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices`, int64 or bool, in that order."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.select(indices.tolist())

    @property
    def is_initialized(self) -> bool:
        """Whether tokens have gone through."""
        return self.columns > 0

    @property
    def is_sliding(self) -> list[bool]:
        """For code that asks per layer; no layer of it is transformers' own."""
        return []

    @property
    def is_linear(self) -> list[bool]:
        """It holds keys and values, no recurrent state. (transformers takes an empty list for one without any.)"""
        return [False]
