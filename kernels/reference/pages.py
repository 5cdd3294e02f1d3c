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
    dense = pool[table.long()]
    return dense.reshape(*table.shape[:2], table.shape[2] * pool.shape[1], *pool.shape[2:])


def write(pool: Tensor, table: Tensor, slots: Tensor, values: Tensor, mask: Tensor) -> None:
    """Writes values (B, Hkv, N, ...) to slots (B, Hkv, N) where mask is true, in place; no host synchronization.

    Values that are masked out go to page 0, which nothing reads. The caller guarantees that slots lie in leased pages.
    """
    page = pool.shape[1]
    slots = torch.where(mask, slots, 0).long()
    pages = torch.gather(table.long(), 2, (slots // page).clamp(max=table.shape[2] - 1))
    pages = torch.where(mask, pages, 0)
    pool[pages, slots % page] = values.to(pool.dtype)
