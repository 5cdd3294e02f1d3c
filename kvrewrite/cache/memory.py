"""What a cache holds, in bytes: for people, `print(cache.memory())` is one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvrewrite.cache.pages import SLOT_EXTRA, Lease
from kvrewrite.ir.layout import PAGE

if TYPE_CHECKING:
    from kvrewrite.cache.eviction_cache import EvictionCache


@dataclass
class MemoryReport:
    """Bytes of a cache, those of pages that its rows share counted once. live: slots that hold a token; leased: pages
    in use; reserved: what the pools hold; shared: the part of leased that forks of this cache (or rows of it) have,
    too. Besides these, text: the ids of what went in, 4 bytes per token, which later calls are compared with;
    checkpoints: pages that its checkpoints have and it has no more; full: what an ordinary cache of the same tokens
    takes. Reports are equal without these three. As text it is one line: what is held, and a full cache's bytes."""

    live: int
    leased: int
    reserved: int
    shared: int = 0
    text: int = field(default=0, compare=False)
    checkpoints: int = field(default=0, compare=False)
    full: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{human(self.live)} live, {human(self.leased)} leased; a full cache would take {human(self.full)}"


def human(size: float) -> str:
    """Formats bytes for people: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def report(cache: EvictionCache) -> MemoryReport:
    """Counts what a cache holds; its stores must be up to date."""
    found = MemoryReport(0, 0, 0, text=cache.history.nbytes, checkpoints=_checkpoint_bytes(cache))
    for lease in cache.leases:
        found.live += _live_bytes(cache, lease)
        found.leased += lease.leased * lease.store.page_bytes
        found.reserved += lease.store.total * lease.store.page_bytes
        found.shared += lease.shared * lease.store.page_bytes
        found.full += _full_bytes(cache, lease)
    for spec, state in zip(cache.layout.states, cache.states):
        size = state.value.numel() * state.value.element_size()
        live = state.live(cache.seen)
        found.live, found.leased, found.reserved = found.live + live, found.leased + size, found.reserved + size
        found.full += size if spec.carried else 0
    return found


def _full_bytes(cache: EvictionCache, lease: Lease) -> int:
    """Bytes of every token's keys and values; in layers with a window, those that it shows."""
    tokens = sum(min(seen, window or seen) for window in lease.windows.tolist() for seen in cache.seen)
    return int(tokens) * lease.kv_heads * lease.store.dense_bytes


def _checkpoint_bytes(cache: EvictionCache) -> int:
    total = 0
    for i, lease in enumerate(cache.leases):
        others = [checkpoint.leases[i].held for checkpoint in cache.checkpoints]
        if others:
            total += len(np.setdiff1d(np.concatenate(others), lease.held)) * lease.store.page_bytes
    return total


def _live_bytes(cache: EvictionCache, lease: Lease) -> int:
    """Bytes of the slots that hold a token: a part of a page, or in a quantized cache's tail."""
    in_pages, tail = lease.lens.cpu().numpy().astype(np.int64), 0
    if cache.layout.quantize:
        held = {s.input: s.value for s in cache.states}
        quantized = [held[f"state_qlens_{layer}"].cpu().numpy().astype(np.int64) for layer in lease.layers]
        # Nothing before the first token.
        quantized = [n if n.size else np.zeros_like(in_pages[0]) for n in quantized]
        tail = int((in_pages - np.stack(quantized)).sum())
        in_pages = np.stack(quantized)
    slots = lease.slots_in_pages(in_pages)
    return slots * lease.store.page_bytes // PAGE + tail * (lease.store.dense_bytes + SLOT_EXTRA)
