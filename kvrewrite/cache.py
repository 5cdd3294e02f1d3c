"""`EvictionCache`: the state of one request (or batch of requests), over pools of fixed-size pages.

Nothing of a request lives in the model, so requests can be interleaved at will. A slot holds one token of one kv head:
its key, its value, a score (fp32) and two positions (int32: in the text, and the one its key is rotated by). Pages are
leased from a pool per cache class (layers with equal shapes) and returned as soon as eviction leaves them empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvrewrite.errors import CacheError
from kvrewrite.policies.base import UNLIMITED

PAGE = 64  # slots a page
SLOT_EXTRA = 4 + 8  # bytes of a slot's score and positions


@dataclass
class MemoryReport:
    """Bytes of a cache. live: slots that hold a token; leased: pages in use; reserved: what the pools hold."""

    live: int
    leased: int
    reserved: int


class _Pool:
    """Pages of one cache class, and who has them."""

    k_pages: Tensor  # (pages, PAGE, Dk)
    v_pages: Tensor  # (pages, PAGE, Dv)
    score_pages: Tensor  # (pages, PAGE) fp32
    pos_pages: Tensor  # (pages, PAGE, 2) int32: position in the text, position that the key is rotated by

    def __init__(self, spec: dict[str, Any], batch: int, device: torch.device, dtype: torch.dtype):
        self.kv_heads, self.k_dim, self.v_dim = spec["kv_heads"], spec["k_dim"], spec["v_dim"]
        self.layers: list[int] = spec["layers"]
        self.windows: list[int] = spec["windows"]
        self.device, self.dtype, self.batch = device, dtype, batch
        n = len(self.layers)
        # Most live slots that any head of (layer, row) can have; pages are leased for that many.
        self.bound = [[0] * batch for _ in range(n)]
        self.pages: list[list[list[list[int]]]] = [
            [[[] for _ in range(self.kv_heads)] for _ in range(batch)] for _ in range(n)
        ]
        self.free: list[int] = []
        # A layer's view of this begins at a constant offset. Inductor loses the offset of a mutated view when it is symbolic
        # (torch 2.13, measured: with dynamic shapes every layer wrote layer 0's lengths).
        self.lens = torch.zeros(batch, self.kv_heads, n, dtype=torch.int32, device=device).permute(2, 0, 1)
        self.table = torch.zeros(n, batch, self.kv_heads, 1, dtype=torch.int32, device=device)
        self.changed = False
        self._allocate(1)  # page 0 is never leased

    @property
    def total(self) -> int:
        return int(self.k_pages.shape[0])

    def _allocate(self, total: int) -> None:
        """Grows the pools to `total` pages, keeping what they hold."""
        before = self.total if hasattr(self, "k_pages") else 0
        shapes = {
            "k_pages": ((PAGE, self.k_dim), self.dtype),
            "v_pages": ((PAGE, self.v_dim), self.dtype),
            "score_pages": ((PAGE,), torch.float32),
            "pos_pages": ((PAGE, 2), torch.int32),
        }
        for name, (shape, dtype) in shapes.items():
            new = torch.zeros(total, *shape, dtype=dtype, device=self.device)
            if before:
                new[:before] = getattr(self, name)
            setattr(self, name, new)
        self.free.extend(range(max(1, before), total))

    def lease(self, bounds: list[list[int]], reserve: int) -> None:
        """Leases and returns pages so that each (layer, row) can hold `bounds` slots in every head.

        reserve: slots a head that the pool should have room for when it must grow anyway.
        """
        missing = 0
        for i, row_bounds in enumerate(bounds):
            for b, bound in enumerate(row_bounds):
                need = -(-bound // PAGE)
                have = len(self.pages[i][b][0])
                missing += max(0, need - have) * self.kv_heads
                for head in self.pages[i][b]:
                    if len(head) > need:
                        self.free.extend(head[need:])
                        del head[need:]
                        self.changed = True
        if missing > len(self.free):
            limits = [min(reserve, w) if w else reserve for w in self.windows]
            wanted = 1 + sum(-(-max(r, x) // PAGE) for r, row in zip(limits, bounds) for x in row) * self.kv_heads
            self._allocate(max(self.total + missing - len(self.free), wanted))
        for i, row_bounds in enumerate(bounds):
            for b, bound in enumerate(row_bounds):
                need = -(-bound // PAGE)
                for head in self.pages[i][b]:
                    while len(head) < need:
                        head.append(self.free.pop())
                        self.changed = True
        self.bound = [list(r) for r in bounds]
        if self.changed:
            self._write_table()

    def _write_table(self) -> None:
        width = max(1, max(len(h) for layer in self.pages for row in layer for h in row))
        rows = [[[head + [0] * (width - len(head)) for head in row] for row in layer] for layer in self.pages]
        self.table = torch.tensor(rows, dtype=torch.int32).to(self.device)
        self.changed = False

    @property
    def slot_bytes(self) -> int:
        return (self.k_dim + self.v_dim) * self.dtype.itemsize + SLOT_EXTRA

    def inputs(self, index: int) -> dict[str, Tensor]:
        names = ("k_pages", "v_pages", "score_pages", "pos_pages", "table", "lens")
        return {f"{name}_{index}": getattr(self, name) for name in names}


class EvictionCache(Cache):
    """A bounded cache for a rewritten model. Make one with `model.new_cache(batch_size)`.

    Passed as `past_key_values`; transformers' `generate` makes one by itself. `max_length` (tokens of prompt and answer)
    chooses between short and long rotary frequencies where a model has both.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, model: Any, batch_size: int, *, max_length: int | None = None):
        super().__init__(layers=[])
        if batch_size < 1:
            raise CacheError(f"batch_size is {batch_size}, expected at least 1")
        self.owner_id: int = model.program_id
        self.layout: dict[str, Any] = model.program.layout
        self._rows = batch_size
        self.device, self.dtype = torch.device(model.device), model.dtype
        self.max_length = max_length
        self._model_tables = model.length_tables(max_length)
        self._make_rotary = model.make_rotary
        self._max_positions: int = model.program.max_positions or UNLIMITED
        self._reset()

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """Rows of this cache."""
        return self._rows

    def _reset(self) -> None:
        self.seen = [0] * self.batch_size  # tokens of each row so far
        self.length = [0] * self.batch_size  # most live slots of a layer without a window
        self.next_rotary = [0] * self.batch_size  # contiguous positions: that of the row's next token
        self.settled = [False] * self.batch_size  # contiguous positions: ranks are those that the row decodes with
        self.columns = 0  # columns of the caller's ids and masks so far, padding included
        self.pools = [_Pool(spec, self.batch_size, self.device, self.dtype) for spec in self.layout["classes"]]
        self._rotary: list[tuple[Tensor, Tensor]] = []
        self._rotary_length = 0

    def reset(self) -> None:
        """Forgets everything and returns the memory."""
        self._reset()

    # -- what the runtime needs for a step -----------------------------------------------------------------------
    def prepare(self, valid: list[int], keep: list[int], reserve: int) -> dict[str, Tensor]:
        """Leases pages for one step and gives its cache inputs. valid, keep: new tokens and budget of each row."""
        after: list[list[list[int]]] = []
        out: dict[str, Tensor] = {}
        for index, pool in enumerate(self.pools):
            bounds = []
            for window, bound in zip(pool.windows, pool.bound):
                bounds.append(
                    [b if not n else min(b + n, k, window or UNLIMITED) for b, n, k in zip(bound, valid, keep)]
                )
            after.append(bounds)
            during = [[max(x, y) for x, y in zip(r, s)] for r, s in zip(pool.bound, bounds)]
            pool.lease(during, reserve)
            out.update(pool.inputs(index))
            shape = (len(pool.layers), self.batch_size, pool.kv_heads)
            budget = torch.tensor(keep, dtype=torch.int32).to(self.device)
            out[f"keep_{index}"] = budget[None, :, None].expand(shape)
        self._after = after
        return out

    def commit(self, valid: list[int], keep: list[int]) -> None:
        """Records a finished step and returns the pages that it emptied."""
        for pool, bounds in zip(self.pools, self._after):
            pool.lease(bounds, 0)
        for row, (n, k) in enumerate(zip(valid, keep)):
            if n:
                self.seen[row] += n
                self.length[row] = min(self.length[row] + n, k)
                self.next_rotary[row] += n

    def rotary(self, length: int) -> list[tuple[Tensor, Tensor]]:
        """cos and sin of each rotation for contiguous positions below `length`."""
        if length > self._rotary_length:
            self._rotary_length = max(length, min(2 * self._rotary_length, self._max_positions))
            self._rotary = self._make_rotary(self._rotary_length, self._model_tables)
        return self._rotary

    @property
    def length_tables(self) -> dict[str, Tensor]:
        """Rotary frequencies chosen for this cache's `max_length`."""
        return self._model_tables

    # -- reports -------------------------------------------------------------------------------------------------
    def memory(self) -> MemoryReport:
        """Bytes that hold tokens, that are leased, and that the pools have reserved."""
        live = leased = reserved = 0
        for pool in self.pools:
            live += int(pool.lens.sum()) * pool.slot_bytes
            leased += (pool.total - 1 - len(pool.free)) * PAGE * pool.slot_bytes
            reserved += pool.total * PAGE * pool.slot_bytes
        return MemoryReport(live, leased, reserved)

    def live_slots(self) -> dict[int, Tensor]:
        """Live slots of each layer that owns a cache: layer -> (B, Hkv) int32."""
        found = {layer: pool.lens[i] for pool in self.pools for i, layer in enumerate(pool.layers)}
        return dict(sorted(found.items()))

    def positions(self) -> dict[int, list[list[list[int]]]]:
        """Positions in the text that are kept: layer -> row -> kv head -> sorted positions."""
        found = {}
        for pool in self.pools:
            for i, layer in enumerate(pool.layers):
                dense = torch.ops.kvrewrite.read_pages(pool.pos_pages, pool.table[i])[..., 0]
                found[layer] = [
                    [sorted(dense[b, h, : pool.lens[i, b, h]].tolist()) for h in range(pool.kv_heads)]
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
        raise CacheError("an EvictionCache works with a model that kvrewrite made; this one is an ordinary model")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Evicted tokens can't come back, so nothing can be cropped."""
        raise CacheError(
            "an EvictionCache can't be cropped (assisted decoding and prompt lookup need that): evicted tokens are gone"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues from what row beam_idx[i] holds."""
        source = beam_idx.tolist()
        for pool in self.pools:
            old_table, old_lens = pool.table.clone(), pool.lens.clone()
            old_pages = {n: getattr(pool, n).clone() for n in ("k_pages", "v_pages", "score_pages", "pos_pages")}
            pool.lease([[bound[s] for s in source] for bound in pool.bound], 0)
            width = min(pool.table.shape[-1], old_table.shape[-1])
            target, origin = pool.table[..., :width].long(), old_table[:, source][..., :width].long()
            for name, pages in old_pages.items():
                getattr(pool, name)[target] = pages[origin]
            pool.lens.copy_(old_lens[:, source])
        for name in ("seen", "length", "next_rotary", "settled"):
            values = getattr(self, name)
            setattr(self, name, [values[s] for s in source])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported: make the cache with the final batch size."""
        raise CacheError("an EvictionCache can't grow its batch; make one with new_cache(batch_size)")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not supported: make the cache with the final batch size."""
        raise CacheError("an EvictionCache can't change its batch; make one with new_cache(batch_size)")

    @property
    def is_initialized(self) -> bool:
        """Whether tokens have gone through."""
        return self.columns > 0

    @property
    def is_sliding(self) -> list[bool]:
        """For code that asks per layer; no layer of it is transformers' own."""
        return []
