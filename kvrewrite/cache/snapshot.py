"""What a cache holds as plain numbers and tensors, and a cache made of them again.

Pages are numbered from 1 on without gaps, each once, also where rows share it. `restore` trusts nothing: a file may come
from anybody, and kernels index memory with what it says. It checks every shape, every page, and the range of every position
and count, before a page is leased. What keys and values say is the file's own affair, but they must be finite: pages are
used again by others.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from msgspec import Meta, Struct
from torch import Tensor

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.cache.history import History
from kvrewrite.cache.pages import Lease, PageStore, to_device
from kvrewrite.cache.policy_state import PolicyState
from kvrewrite.cache.request import PER_ROW
from kvrewrite.cache.signature import HIGHEST
from kvrewrite.cache.slot_plan import pages_of
from kvrewrite.errors import ArtifactError, PoolFull
from kvrewrite.ir.layout import PAGE, PIN_SPANS, CacheLayout
from kvrewrite.policies.segments import UNLIMITED

Count = Annotated[int, Meta(ge=0, le=UNLIMITED)]
Counts = Annotated[list[Count], Meta(max_length=1 << 20)]
Flags = Annotated[list[bool], Meta(max_length=1 << 20)]
PER_CLASS = {"table": torch.int32, "lens": torch.int32, "bound": torch.int64, "shares": torch.int64}


class Numbers(Struct, forbid_unknown_fields=True):
    """What a cache counts. The lists have an entry for each row; their names are those of `Request`."""

    rows: Annotated[int, Meta(ge=1, le=1 << 20)]
    columns: Annotated[int, Meta(ge=1, le=UNLIMITED)]
    max_length: Annotated[int, Meta(ge=1, le=UNLIMITED)] | None
    seen: Counts
    generated: Counts
    length: Counts
    next_rotary: Counts
    ranks_frozen: Flags
    prompted: Flags
    first_prompt: Counts
    keys_rotated: bool
    ranks_held: bool
    loose: bool
    unmeasured: Count
    only_appends: bool = False
    rope_deltas: list[Annotated[int, Meta(ge=-UNLIMITED, le=UNLIMITED)]] = []
    keeps_windows: bool = False
    pins: Annotated[
        list[Annotated[list[tuple[Count, Count]], Meta(max_length=PIN_SPANS)]], Meta(max_length=1 << 20)
    ] = []


# -- out ---------------------------------------------------------------------------------------------------------------
def take(cache: EvictionCache) -> tuple[Numbers, dict[str, Tensor]]:
    """A cache's numbers, and its tensors on the CPU. The caller holds the model's lock, and the cache is finished."""
    tensors = {
        "ids": cache.history.ids(cache.columns).int().cpu(),
        "real": torch.from_numpy(cache.history.real(cache.columns)),
    }
    for c, (lease, shares) in enumerate(zip(cache.leases, cache._shares)):
        lens = lease.lens  # fetches it, and the states, from the buffers of a decoding graph
        held = lease.held
        place = np.zeros(lease.store.total, dtype=np.int32)
        place[held] = np.arange(1, len(held) + 1)
        arrays = {"table": place[lease.pages], "bound": lease.bound, "shares": shares}
        for name, array in arrays.items():
            tensors[f"{name}_{c}"] = torch.from_numpy(np.ascontiguousarray(array)).to(PER_CLASS[name])
        tensors[f"lens_{c}"] = lens.cpu()
        index = to_device(held, lease.store.device).long()
        tensors |= {f"{name}_{c}": getattr(lease.store, name)[index].cpu() for name in lease.store.shapes}
    longest = max(cache.seen)
    for state in cache.states:
        tensors[state.input] = (state.value[:, :longest] if state.per_token else state.value).cpu()
    numbers = Numbers(
        rows=cache.batch_size,
        columns=cache.columns,
        max_length=table_length(cache.layout, cache.max_length),
        loose=cache._loose,
        unmeasured=cache._unmeasured,
        only_appends=cache.only_appends,
        keeps_windows=cache.windows_from is not None,
        keys_rotated=cache.keys_rotated,
        ranks_held=cache.ranks_held,
        pins=[list(spans) for spans in cache.pins],
        rope_deltas=list(cache.rope_deltas) if any(cache.rope_deltas) else [],
        **{name: list(getattr(cache, name)) for name in PER_ROW},
    )
    return numbers, tensors


def table_length(layout: CacheLayout, max_length: int | None) -> int | None:
    """A length that chooses the same rotary frequencies as `max_length`; None where any does, or the long ones are
    chosen. (Otherwise it is a hint how much memory an answer will take, which a file should not give.)"""
    short = [int(t.threshold) for t in layout.length_tables if max_length is not None and max_length <= t.threshold]
    return min(max_length, *short) if short and max_length is not None else None


# -- in ----------------------------------------------------------------------------------------------------------------
def restore(
    model: Any,
    numbers: Numbers,
    tensors: Mapping[str, Tensor],
    what: str,
    stores: list[PageStore] | None = None,
) -> EvictionCache:
    """A cache of `model` with these contents, on its devices. what: the file, for errors; stores: see `EvictionCache`.
    Raises ArtifactError where they are not what a cache of this model can hold, and PoolFull where a pool with a limit is
    too small."""
    layout: CacheLayout = model.program.layout
    checks = _Checks(layout, numbers, what)
    checks.numbers(model.program.max_positions, renews=model.policy.renews_ranks_in_decoding)
    cache = EvictionCache(model, numbers.rows, max_length=numbers.max_length, stores=stores)
    expected = {"ids", "real", *(state.input for state in cache.states)}
    for c, lease in enumerate(cache.leases):
        expected |= {f"{name}_{c}" for name in (*PER_CLASS, *lease.store.shapes)}
    checks.that(tensors.keys() == expected, f"it has other tensors than {', '.join(sorted(expected))}")
    ids, real = checks.text(tensors["ids"], tensors["real"], model.program.vocab_size)
    # Copies of what is looked at, so that it is what is used, whatever happens to the file meanwhile.
    copied = {
        name: tensor.clone() if name.startswith((*PER_CLASS, "pos_pages")) else tensor
        for name, tensor in tensors.items()
    }
    for c, lease in enumerate(cache.leases):
        checks.pages(c, lease, copied)
    for state in cache.states:
        checks.state(state, copied[state.input])
    if layout.quantize is not None:
        for c, lease in enumerate(cache.leases):
            checks.tails(c, lease, copied)
    for c, lease in enumerate(cache.leases):
        _put(lease, c, copied)
    cache._shares = [copied[f"shares_{c}"].numpy() for c in range(len(cache.leases))]
    for state in cache.states:
        state.value = copied[state.input].to(state.value.device, copy=True)
    for name in PER_ROW:
        setattr(cache, name, list(getattr(numbers, name)))
    cache.keys_rotated, cache.ranks_held = numbers.keys_rotated, numbers.ranks_held
    cache._loose, cache._unmeasured = numbers.loose, numbers.unmeasured
    cache.pins = [tuple(spans) for spans in numbers.pins]
    cache.rope_deltas = list(numbers.rope_deltas) or [0] * numbers.rows
    cache.columns, cache.history = numbers.columns, History.of(ids, real)
    cache.only_appends |= numbers.only_appends
    cache.keep_windows(numbers.keeps_windows)
    cache.firm = cache.columns  # how what was read came about is not known
    return cache


def _put(lease: Lease, c: int, tensors: Mapping[str, Tensor]) -> None:
    """Leases pages and fills them with what was checked."""
    store, table = lease.store, tensors[f"table_{c}"].numpy()
    count = len(tensors[f"pos_pages_{c}"])
    store.begin()
    if count > store.room:
        store.end()
        raise PoolFull(f"the cache has {count} pages, and the pool has room for {store.room:.0f}; give it more memory")
    own = store.lease(count)
    store.share(np.repeat(own, np.bincount(table.ravel(), minlength=count + 1)[1:] - 1))  # rows that have it, too
    index = to_device(own, store.device).long()
    for name in store.shapes:
        getattr(store, name)[index] = tensors[f"{name}_{c}"].to(store.device)
    lease.fill(np.concatenate([[0], own]).astype(np.int32)[table], tensors[f"bound_{c}"].numpy(), tensors[f"lens_{c}"])
    store.end()


class _Checks:
    """What must hold of a snapshot before anything is done with it."""

    def __init__(self, layout: CacheLayout, numbers: Numbers, what: str):
        self.layout, self.n, self.what = layout, numbers, what
        self.seen = np.array(numbers.seen, dtype=np.int64)
        self.ranks = self.seen  # every row's rotary positions lie below

    def that(self, holds: Any, problem: str) -> None:
        """Raises ArtifactError unless it holds."""
        if not bool(holds):
            raise ArtifactError(f"{self.what} is damaged or was not written by kvrewrite: {problem}")

    def numbers(self, max_positions: int | None, renews: bool) -> None:
        """The counters, and how they go together."""
        n, limit = self.n, max_positions or UNLIMITED
        for name in PER_ROW:
            self.that(len(getattr(n, name)) == n.rows, f"{name} does not have {n.rows} entries")
        self.that(len(n.pins) in (0, n.rows), f"pins does not have {n.rows} entries")
        self.that(len(n.rope_deltas) in (0, n.rows), f"rope_deltas does not have {n.rows} entries")
        for spans in n.pins:
            fine = all(a < b for a, b in spans) and all(a[1] < b[0] for a, b in itertools.pairwise(spans))
            self.that(fine, "pins are not spans in order")
        self.that(max(n.seen) <= n.columns, "a row has more tokens than there are columns")
        self.that(self.layout.contiguous or max(n.seen) <= limit, f"a row has more than {limit} tokens")
        for name in ("generated", "length", "next_rotary", "first_prompt"):
            self.that((np.array(getattr(n, name)) <= self.seen).all(), f"{name} is more than the row's tokens")
        self.that(self.layout.contiguous or not (n.keys_rotated or n.ranks_held), "it has ranks of another model")
        self.that(n.max_length == table_length(self.layout, n.max_length), "max_length is not one that matters")
        if self.layout.contiguous and not renews:
            self.ranks = np.array(n.next_rotary, dtype=np.int64)

    def shaped(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """A tensor's shape (-1: any size) and dtype."""
        fits = tensor.dim() == len(shape) and all(e in (-1, got) for e, got in zip(shape, tensor.shape))
        self.that(
            fits and tensor.dtype == dtype,
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}",
        )

    def finite(self, name: str, tensor: Tensor) -> None:
        """Floating-point numbers are numbers."""
        self.that(not tensor.is_floating_point() or torch.isfinite(tensor).all(), f"{name} is not finite")

    def text(self, ids: Tensor, real: Tensor, vocab_size: int) -> tuple[Tensor, np.ndarray]:
        """ids, and which of them are tokens of their rows."""
        shape = (self.n.rows, self.n.columns)
        self.shaped("ids", ids, shape, torch.int32)
        self.shaped("real", real, shape, torch.bool)
        ids, held = ids.clone(), real.clone().numpy()
        known = ((ids >= 0) & (ids < vocab_size)) | (ids <= HIGHEST)
        self.that(known.all(), f"ids are not below {vocab_size}, and no signatures of embeddings")
        self.that((held.sum(1) == self.seen).all(), "rows have not seen as many tokens as they have")
        return ids, held

    def pages(self, c: int, lease: Lease, tensors: Mapping[str, Tensor]) -> None:
        """The page table and the pages of a class."""
        heads, n = tuple(lease.bound.shape), len(tensors[f"pos_pages_{c}"])
        for name, dtype in PER_CLASS.items():
            shape = (*heads, -1) if name == "table" else heads
            self.shaped(f"{name}_{c}", tensors[f"{name}_{c}"], shape, dtype)
        for name, (shape, dtype) in lease.store.shapes.items():
            pool = tensors[f"{name}_{c}"]
            self.shaped(f"{name}_{c}", pool, (n, *shape), dtype)
            if name != "score_pages":
                self.finite(f"{name}_{c}", pool)
            if pool.dtype == torch.uint8 and self.layout.quantize and self.layout.quantize.kind == "fp8":
                self.that(((pool & 0x7F) != 0x7F).all(), f"{name}_{c} has codes of no number")
        table, lens, bound, shares = (tensors[f"{name}_{c}"].numpy().astype(np.int64) for name in PER_CLASS)
        seen = self.seen[None, :, None]
        self.that((lens >= 0).all() and (lens <= bound).all() and (bound <= seen).all(), f"lens_{c} or bound_{c}")
        self.that((shares >= -1).all() and (shares <= UNLIMITED).all(), f"shares_{c} is out of range")
        free = bound[lease.windows == 0].max(axis=(0, 2), initial=0)
        self.that((free <= np.array(self.n.length)).all(), "length is less than what a head holds")
        counts, column = pages_of(bound), np.arange(table.shape[-1])
        self.that(table.shape[-1] == max(1, int(counts.max())), f"table_{c} is not as wide as its longest head")
        there = column < counts[..., None]
        self.that(
            ((table > 0) == there).all() and table.max(initial=0) <= n, f"table_{c} names pages that are not there"
        )
        # Rows may share a page, where it is the same piece of the same head.
        places = np.broadcast_to(np.arange(table[:, 0].size).reshape(table[:, :1].shape), table.shape)[there]
        order = np.unique(np.stack([table[there], places]), axis=1)
        self.that(np.array_equal(order[0], np.arange(1, n + 1)), f"table_{c} does not name each page once")
        self._positions(c, tensors[f"pos_pages_{c}"].numpy(), table, lens)

    def _positions(self, c: int, pages: np.ndarray, table: np.ndarray, lens: np.ndarray) -> None:
        """Every live slot's position in the text, no two alike, and the one its key is rotated by."""
        pages = np.concatenate([np.zeros((1, PAGE, 2), np.int32), pages])
        for layer, row in np.ndindex(table.shape[:2]):
            slots = pages[table[layer, row]].reshape(table.shape[2], -1, 2)  # (heads, slots, 2)
            live = np.arange(slots.shape[1]) < lens[layer, row][:, None]
            found, rank = slots[..., 0][live], slots[..., 1][live]
            below = max(int(self.ranks[row]), int(self.seen[row]) if self.n.ranks_held else 0)
            self.that(
                (found >= 0).all() and (found < self.seen[row]).all(), f"pos_pages_{c}: a position is not in the text"
            )
            self.that((rank >= 0).all() and (rank < below).all(), f"pos_pages_{c}: a rotary position is out of range")
            heads = np.nonzero(live)[0].astype(np.int64) * (UNLIMITED + 1) + found
            self.that(len(np.unique(heads)) == len(heads), f"pos_pages_{c}: a head holds a position twice")

    def state(self, state: PolicyState, value: Tensor) -> None:
        """What a policy, or a layer without attention, remembers."""
        lead = (self.n.rows, max(self.n.seen)) if state.per_token else (self.n.rows,)
        self.shaped(state.input, value, (*lead, *state.shape), state.dtype)
        if state.fill == state.fill:  # one that begins as nan may be nan
            self.finite(state.input, value)
        counted = state.input.startswith("state_qlens_") and self.layout.quantize is not None
        self.that(counted or value.is_floating_point(), f"{state.input} holds integers, which files may not give")

    def tails(self, c: int, lease: Lease, tensors: Mapping[str, Tensor]) -> None:
        """How many slots of a quantized cache lie in its pages, and how many in its tails."""
        quantize = self.layout.quantize
        assert quantize is not None
        for i, layer in enumerate(lease.layers):
            lens, coded = tensors[f"lens_{c}"][i], tensors[f"state_qlens_{layer}"]
            most = quantize.residual + quantize.group
            fits = (coded >= 0) & (coded <= lens) & (lens - coded <= most)
            self.that(fits.all(), f"state_qlens_{layer} does not fit what is held")
