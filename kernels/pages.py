"""Reading and writing paged caches in plain torch.

A pool is (pages, PAGE, ...); a table (B, Hkv, P) int32 names the pages of each row and kv head in order. Slot s of a head
lies in page table[s // PAGE] at s % PAGE. Page 0 is never leased: table entries of pages that a head does not have point
to it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def read(pool: Tensor, table: Tensor) -> Tensor:
    """The slots of every head in order: (B, Hkv, P * PAGE, ...), a copy."""
    b, hkv, count = table.shape
    return pool.index_select(0, table.flatten()).view(b, hkv, count * pool.shape[1], *pool.shape[2:])


def write(pool: Tensor, table: Tensor, slots: Tensor, values: Tensor, mask: Tensor) -> None:
    """Writes values (B, Hkv, N, ...) to slots (B, Hkv, N) where mask is true, in place; no host synchronization.

    Values that are masked out go to page 0, which nothing reads. The caller guarantees that slots lie in leased pages.
    """
    put(pool, address(table, slots, mask, pool.shape[1]), values)


def address(table: Tensor, slots: Tensor, mask: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Where slots (B, Hkv, N) lie in pools with pages of `page` slots, for `put`: the page, and the place in it."""
    slots = slots.long().masked_fill(~mask, 0)
    number = slots // page
    pages = torch.gather(table.long(), 2, number.clamp(max=table.shape[2] - 1)).masked_fill(~mask, 0)
    return pages, slots - number * page


def put(pool: Tensor, where: tuple[Tensor, Tensor], values: Tensor) -> None:
    """Writes values (B, Hkv, N, ...) to an `address`, in place."""
    pool[where] = values.to(pool.dtype)
