"""Pages of cache slots: the memory of caches, who has it, and how it is shared.

A `PageStore` owns the pages of one cache class (layers with equal shapes) and counts who refers to each; caches that
were forked from one another share it. A `Lease` is what one cache has of it: which pages hold the slots of each (layer,
row, kv head). A page with several references is copied before it is written to.

One thread at a time changes a store: caches hold their model's lock (kvrewrite/cache/request.py). A change can be
interrupted at any point; whoever comes next counts the references again from what the leases have (`PageStore.begin`).
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvrewrite.cache.slot_plan import ClassPlan, pages_of
from kvrewrite.ir.layout import PAGE, CacheClass, pool_shapes
from kvrewrite.kernels.quantized.scheme import Scheme

SLOT_EXTRA = 4 + 8  # bytes of a slot's score and positions


def to_device(values: Any, device: torch.device) -> Tensor:
    """Numbers of the host (array, list or CPU tensor) on a device, without waiting for what a GPU has still to do."""
    host = torch.from_numpy(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else torch.as_tensor(values)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class PageStore:
    """The pages of one cache class: a pool (pages, ...) for each entry of `pool_shapes`, as an attribute of that name.
    Page 0 is never leased: table entries that stand for no page point to it."""

    k_pages: Tensor
    v_pages: Tensor
    score_pages: Tensor
    pos_pages: Tensor

    def __init__(
        self,
        k_dim: int,
        v_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        scheme: Scheme | None = None,
        lasting: bool = False,
    ):
        self.device = device
        self.lasting = lasting  # whether it belongs to a model, and outlives the caches that lease from it
        self.shapes = pool_shapes(k_dim, v_dim, dtype, scheme)
        self.page_bytes = sum(math.prod(shape) * kind.itemsize for shape, kind in self.shapes.values())
        self.dense_bytes = (k_dim + v_dim) * dtype.itemsize  # a slot's key and value in full precision
        self.references = np.zeros(0, dtype=np.int32)
        self.several = 0  # pages that have more than one reference
        self.free: list[int] = []
        self.limit: int | None = None  # most pages that it may have, page 0 included; None: as many as memory has
        self.leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self.changes = 0  # grows whenever a page is leased, shared, returned or moved
        self.consistent = True  # False while a change is under way, and after one that was interrupted
        self.gone: deque[Lease] = deque()  # their caches were collected as garbage, at any point and in any thread
        self._moved: list[tuple[Lease, np.ndarray]] = []  # what `compact` has still to say to leases
        self._grow(1)

    @property
    def total(self) -> int:
        """Pages that exist, page 0 included."""
        return len(self.references)

    # -- changes that may be interrupted -------------------------------------------------------------------------
    def begin(self) -> None:
        """Begins a change: first repairs what an interrupted one left, and takes back the pages of caches that are
        gone."""
        if not self.consistent:
            self._repair()
        self.consistent = False
        while self.gone:
            self.gone[0].close()
            self.gone.popleft()

    def end(self) -> None:
        """The change is complete."""
        self.consistent = True

    def _repair(self) -> None:
        """Counts references again. What the interrupted cache's lease has may be wrong, but it is closed before it is
        used again, and what the others have is not touched by a step of another cache."""
        self.changes += 1
        self._tell_moved()
        references = np.zeros(self.total, dtype=np.int32)
        for lease in list(self.leases):
            lease._offered = {}
            np.add.at(references, lease.pages[lease.pages > 0], 1)
        self.references, self.several = references, int((references > 1).sum())
        self.free = [int(p) for p in np.flatnonzero(references == 0) if p]

    def _replace(self, pools: dict[str, Tensor], references: np.ndarray, moved: list[tuple[Lease, np.ndarray]]) -> None:
        """Puts other pools in the place of those that are there, all or none of them."""
        self.__dict__.update(pools, references=references, _moved=moved)

    def _tell_moved(self) -> None:
        for lease, pages in self._moved:
            lease.pages = pages
            lease._write_table()
        self._moved = []

    def _grow(self, total: int) -> None:
        """Grows to `total` pages, keeping what they hold."""
        self.changes += 1
        before, pools = self.total, {}
        for name, (shape, dtype) in self.shapes.items():
            pools[name] = torch.zeros(total, *shape, dtype=dtype, device=self.device)
            if before:
                pools[name][:before] = getattr(self, name)
        more = np.zeros(total - before, dtype=np.int32)
        self._replace(pools, np.concatenate([self.references, more]), [])
        self.free.extend(range(max(1, before), total))

    @property
    def is_shared(self) -> bool:
        """Whether some page has several references."""
        return self.several > 0

    @property
    def room(self) -> float:
        """How many pages can be leased."""
        return math.inf if self.limit is None else len(self.free) + self.limit - self.total

    def reserve(self, total: int) -> None:
        """Grows to `total` pages at once, so that pools need not move later."""
        if total > self.total:
            self._grow(total)

    def lease(self, count: int, reserve: int = 0) -> np.ndarray:
        """`count` pages, each with one reference; grows to at least `reserve` pages when there are not enough. Callers ask
        `room` before they begin a step."""
        if count > len(self.free):
            need = self.total + count - len(self.free)
            # At least an eighth more, so that decoding does not copy everything at every page.
            total = max(need, reserve, self.total + self.total // 8)
            self._grow(total if self.limit is None else max(need, min(total, self.limit)))
        self.changes += 1
        taken = [self.free.pop() for _ in range(count)]
        found = np.array(taken, dtype=np.int32)
        self.references[found] = 1
        return found

    def share(self, pages: np.ndarray) -> None:
        """One more reference to each of `pages` (zeros are no pages)."""
        self.changes += 1
        pages = pages[pages > 0]
        self._count(np.add, pages, np.unique(pages))

    def release(self, pages: np.ndarray) -> None:
        """One reference less to each of `pages`; those without any are free."""
        self.changes += 1
        pages = pages[pages > 0]
        which = np.unique(pages)
        self._count(np.subtract, pages, which)
        self.free.extend(which[self.references[which] == 0].tolist())

    def _count(self, change: np.ufunc, pages: np.ndarray, which: np.ndarray) -> None:
        """Adds or takes one reference for each of `pages`. which: each of them once."""
        before = int((self.references[which] > 1).sum())
        change.at(self.references, pages, 1)
        self.several += int((self.references[which] > 1).sum()) - before

    def compact(self, spare: int) -> None:
        """Gives back free pages beyond `spare`, if they are a quarter of all or more: a ragged eviction needs more
        pages while it runs than it leaves in use."""
        if len(self.free) - spare < self.total // 4 or not self.total:
            return
        self.changes += 1
        used = np.flatnonzero(self.references > 0)
        place = np.zeros(self.total, dtype=np.int32)
        place[used] = np.arange(1, len(used) + 1)
        total = 1 + len(used) + spare
        index, pools = to_device(used, self.device).long(), {}
        for name, (shape, dtype) in self.shapes.items():
            pools[name] = torch.zeros(total, *shape, dtype=dtype, device=self.device)
            pools[name][1 : 1 + len(used)] = getattr(self, name)[index]
        references = np.concatenate([[0], self.references[used], np.zeros(spare)]).astype(np.int32)
        moved = [(lease, place[lease.pages]) for lease in self.leases]
        self._replace(pools, references, moved)
        self.free = list(range(1 + len(used), total))
        self._tell_moved()

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies the content of pages."""
        src, dst = to_device(source, self.device).long(), to_device(target, self.device).long()
        for name in self.shapes:
            pool = getattr(self, name)
            pool[dst] = pool[src]


class Lease:
    """The pages that one cache has in a store: (layer, row, kv head) -> pages in slot order."""

    def __init__(self, spec: CacheClass, batch: int, store: PageStore):
        self.store, self.batch = store, batch
        store.leases.add(self)
        self.kv_heads: int = spec.kv_heads
        self.layers: list[int] = spec.layers
        self.windows = np.array(spec.windows, dtype=np.int64)  # most slots that a layer ever needs, 0: no limit
        shape = (len(self.layers), batch, self.kv_heads)
        # Most slots that a head can hold; pages are leased for that many.
        self.bound = np.zeros(shape, dtype=np.int64)
        self.counts = np.zeros(shape, dtype=np.int64)
        self.pages = np.zeros((*shape, 1), dtype=np.int32)
        self._offered: dict[tuple[int, int], np.ndarray] = {}
        # A layer's view of this begins at a constant offset. Inductor loses the offset of a mutated view when it is
        # symbolic (torch 2.13, measured: with dynamic shapes every layer wrote layer 0's lengths).
        self._lens = self._layer_last(shape)
        self.fetch_lens: Callable[[], None] | None = None  # brings lengths back from a decoding graph's own buffers
        self.table = torch.zeros(*shape, 1, dtype=torch.int32, device=store.device)

    def _layer_last(self, shape: tuple[int, ...]) -> Tensor:
        rest = torch.zeros(*shape[1:], shape[0], dtype=torch.int32, device=self.store.device)
        return rest.movedim(-1, 0)

    @property
    def lens(self) -> Tensor:
        """Live slots (layers, rows, kv heads) int32."""
        if self.fetch_lens is not None:
            self.fetch_lens()
        return self._lens

    def resize(self, bound: np.ndarray, reserve: int) -> None:
        """Leases and returns pages so that every head can hold `bound` (layers, rows, kv heads) slots.

        reserve: slots per head that the store should have room for when it must grow anyway.
        """
        self.bound = bound
        need = pages_of(bound)
        if np.array_equal(need, self.counts):
            return
        width = max(1, int(need.max()))
        if width > self.pages.shape[-1]:
            more = np.zeros((*self.pages.shape[:-1], width - self.pages.shape[-1]), dtype=np.int32)
            self.pages = np.concatenate([self.pages, more], axis=-1)
        column = np.arange(self.pages.shape[-1])
        surplus = (column >= need[..., None]) & (column < self.counts[..., None])
        if surplus.any():
            self.store.release(self.pages[surplus])
            self.pages[surplus] = 0
        missing = (column >= self.counts[..., None]) & (column < need[..., None])
        if missing.any():
            self.pages[missing] = self.store.lease(int(missing.sum()), self.wanted(need, reserve))
        self.counts = need
        self._write_table()

    def pages_wanted(self, part: ClassPlan) -> int:
        """Pages that a step needs besides those that are leased, at most: for new slots, for copies of shared pages, and
        to be dealt out."""
        more = int(np.maximum(pages_of(part.during) - self.counts, 0).sum())
        if self.store.is_shared:
            more += int(self.shared_from(part.first_written).sum())
        if part.deals.any():
            more += int(np.where(part.deals, pages_of(part.dealt_slots) + self.kv_heads, 0).sum())
        return more

    def wanted(self, need: np.ndarray, reserve: int) -> int:
        """Pages that the store should have once every head may hold `reserve` slots."""
        limit = np.where(self.windows > 0, np.minimum(self.windows, reserve), reserve)[:, None, None]
        return 1 + int(np.maximum(need, pages_of(limit)).sum())

    def _write_table(self) -> None:
        width = max(1, int(self.counts.max()))
        self.pages = self.pages[..., :width].copy()
        self.table = to_device(self.pages.copy(), self.store.device)

    def shared_from(self, first_slot: np.ndarray) -> np.ndarray:
        """Which pages (layers, rows, kv heads, W) that hold slots from `first_slot` (layers, rows, kv heads) on are
        shared."""
        column = np.arange(self.pages.shape[-1])
        touched = (column >= (first_slot // PAGE)[..., None]) & (column < self.counts[..., None])
        found: np.ndarray = touched & (self.store.references[self.pages] > 1)
        return found

    def unshare(self, first_slot: np.ndarray) -> None:
        """Copies the shared pages that hold slots from `first_slot` (layers, rows, kv heads) on, before they are
        written."""
        shared = self.shared_from(first_slot)
        if not shared.any():
            return
        old = self.pages[shared]
        new = self.store.lease(len(old))
        self.store.copy(old, new)
        self.store.release(old)
        self.pages[shared] = new
        self._write_table()

    # -- ragged evictions: the device decides which head gets how many pages -------------------------------------
    def offer(self, rows: np.ndarray, slots: np.ndarray, most: int) -> tuple[Tensor, Tensor]:
        """Pages for evictions whose lengths only the device knows.

        rows (rows,) bool; slots (layers, rows): most slots that all heads of a layer can hold together afterwards;
        most: those that one head can.
        Returns `spare` (layers, rows, W) int32, the pages in the order in which they will be dealt to heads, -1 after
        the last and in rows that are not offered any; and the table to be filled in, (layers, rows, kv heads, W').
        """
        need = np.where(rows, pages_of(slots) + self.kv_heads, 0)  # each head's last page may be nearly empty
        width = max(int(need.max()), self.pages.shape[-1])
        spare = np.full((*need.shape, width), -1, dtype=np.int32)
        for layer, row in zip(*np.nonzero(need)):
            held = self.pages[layer, row]
            own = held[(held > 0) & (self.store.references[held] == 1)][: need[layer, row]]
            fresh = self.store.lease(int(need[layer, row]) - len(own))
            offered = np.concatenate([own, fresh])
            self._offered[int(layer), int(row)] = offered
            spare[layer, row, : len(offered)] = offered
        n, batch = need.shape
        table = self._layer_last((n, batch, self.kv_heads, max(-(-most // PAGE), self.pages.shape[-1])))
        return to_device(spare, self.store.device), table

    def take_dealt(self, table: Tensor) -> None:
        """Takes what the device dealt out and returns the rest. table: as `offer` gave it, filled in."""
        lens = self.lens.cpu().numpy().astype(np.int64)
        width = table.shape[-1]
        pages = np.zeros((*self.pages.shape[:-1], width), dtype=np.int32)
        pages[..., : self.pages.shape[-1]] = self.pages
        for (layer, row), offered in self._offered.items():
            old = self.pages[layer, row]
            need = pages_of(lens[layer, row])
            pages[layer, row] = 0
            at = 0
            for head, n in enumerate(need):
                pages[layer, row, head, :n] = offered[at : at + n]
                at += int(n)
            self.counts[layer, row], self.bound[layer, row] = need, lens[layer, row]
            gone = np.setdiff1d(np.concatenate([old[old > 0], offered]), offered[:at])
            self.store.release(gone)
        self.pages, self._offered = pages, {}
        self._write_table()

    # -- copies --------------------------------------------------------------------------------------------------
    def fill(self, pages: np.ndarray, bound: np.ndarray, lens: Tensor) -> None:
        """Takes pages that were leased for it and hold its slots. pages (layers, rows, kv heads, W); bound, lens
        (layers, rows, kv heads)."""
        self.pages, self.bound, self.counts = pages, bound, pages_of(bound)
        self._lens.copy_(lens)
        self._write_table()

    def fork(self) -> Lease:
        """Another lease on the same pages."""
        self.lens  # noqa: B018 (fetched before anything is copied)
        twin: Lease = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        for name in ("bound", "counts", "pages"):
            setattr(twin, name, getattr(self, name).copy())
        twin._offered = {}
        twin._lens, twin.fetch_lens = self._layer_last(tuple(self.lens.shape)), None
        twin._lens.copy_(self.lens)
        twin.table = self.table.clone()
        self.store.share(self.pages)
        self.store.leases.add(twin)
        return twin

    def select(self, source: list[int]) -> None:
        """Row i becomes a copy of row source[i], for as many rows as `source` has; pages are shared."""
        old, lens = self.pages, self.lens[:, source]
        self.bound, self.counts = self.bound[:, source], self.counts[:, source]
        self.pages = old[:, source].copy()
        self.store.share(self.pages)
        self.store.release(old)
        if len(source) == self.batch:
            self._lens.copy_(lens.clone())
        else:
            self.batch, self._lens = len(source), self._layer_last(tuple(lens.shape)).copy_(lens)
        self._write_table()

    def close(self) -> None:
        """Returns all pages, once: a reset may have been interrupted."""
        if self in self.store.leases:
            self.store.release(self.pages)
            self.store.leases.discard(self)

    def abandon(self) -> None:
        """The cache was collected as garbage: whoever changes the store next returns the pages, because this may be in
        the middle of a change of another cache. A store that nobody else uses goes as well."""
        if self.store.lasting or len(self.store.leases) - len(self.store.gone) > 1:
            self.store.gone.append(self)
        else:
            self.store.gone.clear()  # they refer to the store

    @property
    def held(self) -> np.ndarray:
        """The pages leased, each once, also where rows share it."""
        return np.unique(self.pages[self.pages > 0])

    @property
    def leased(self) -> int:
        """Pages leased, each counted once."""
        return len(self.held)

    @property
    def shared(self) -> int:
        """Leased pages that another cache or row has, too."""
        return int((self.store.references[self.held] > 1).sum())

    def slots_in_pages(self, lens: np.ndarray) -> int:
        """How many slots hold a token where heads have `lens` (layers, rows, kv heads) of them, those of shared pages
        once."""
        first = np.arange(self.pages.shape[-1]) * PAGE
        filled = np.clip(lens[..., None] - first, 0, PAGE)
        most = np.zeros(self.store.total, dtype=np.int64)
        np.maximum.at(most, self.pages, filled)
        return int(most[1:].sum())
