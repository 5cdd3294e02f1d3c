"""What callers say is to be pinned: spans of positions, or a mask over the ids that they pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.errors import InputError

Pin = tuple[int, int] | list[tuple[int, int]] | Tensor


def pin_spans(cache: EvictionCache, pin: Pin | None, ids: Any, mask: Any) -> None:
    """Pins what a call says. ids (B, T); mask: its attention mask, or None. Raises InputError, CacheError."""
    if pin is None:
        return
    if not isinstance(pin, Tensor):
        pairs = [pin] if isinstance(pin, tuple) else pin
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise InputError(f"pin is {pin!r}, expected (start, end), a list of such, or a bool tensor like input_ids")
        for start, end in pairs:
            cache.pin(start, end)
        return
    if pin.dtype != torch.bool or not isinstance(ids, Tensor) or pin.shape != ids.shape:
        raise InputError(f"pin is {pin.dtype} {tuple(pin.shape)}, expected bool, as large as input_ids")
    if len(ids) != cache.batch_size:
        raise InputError(
            f"a mask pins what {cache.batch_size} rows of the cache hold, and input_ids has {len(ids)} rows"
        )
    width = ids.shape[1]
    real = np.ones(tuple(ids.shape), dtype=bool) if mask is None else mask.to(torch.bool).cpu().numpy()
    before = np.zeros(len(ids), dtype=np.int64)
    if real.shape[1] > width:  # the ids are the new ones alone
        before = np.array(cache.seen, dtype=np.int64)
    place = before[:, None] + np.cumsum(real[:, real.shape[1] - width :], 1) - 1
    chosen = pin.cpu().numpy() & real[:, real.shape[1] - width :]
    for row in range(len(ids)):
        for run in _runs(place[row][chosen[row]]):
            cache.pin(*run, row=row)


def _runs(places: np.ndarray) -> list[tuple[int, int]]:
    """Positions in order as spans."""
    if not len(places):
        return []
    breaks = np.flatnonzero(np.diff(places) > 1)
    starts, ends = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(places) - 1]])
    return [(int(places[a]), int(places[b]) + 1) for a, b in zip(starts, ends)]
