"""Classifies position-based masks by their values at chosen positions of a text of any length.

A mask's effect on the first tokens does not show what it does far away: a window of 4096 looks causal on 2048 tokens.
So masks are compared at every distance up to the longest length, but at few positions: among the about 2 sqrt(n)
positions of `spread(n)`, two lie at each distance up to n - 1. The end of a window or chunk is also tested in several
parts of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

BLOCK = 32  # of the last tokens
FARTHEST = 1 << 17  # distance up to which masks are compared if a model states no longest length


class UnknownMask(Exception):
    """The reason why an evicted cache can't keep a mask."""


def spread(length: int) -> Tensor:
    """Returns ascending int64 positions: the first and last below `length`, and two at every distance up to length -
    1."""
    step = max(2, math.isqrt(length))
    last = range(max(0, length - BLOCK), length)
    return _sorted({*range(min(step, length)), *range(0, length, step), *last})


def spread_length(count: int) -> int:
    """Returns about the largest length for which `spread` has at most `count` positions; at least BLOCK."""
    return max(BLOCK, (max(0, count - BLOCK - 2) // 2) ** 2)


def _sorted(positions: Iterable[int]) -> Tensor:
    return torch.tensor(sorted(positions), dtype=torch.long)


def expected_mask(window: int, chunk: int, positions: Tensor) -> Tensor:
    """Returns the mask (n, n), queries by keys, of a window, a chunk or neither (causal) at `positions` (n,)."""
    q, kv = positions[:, None], positions
    seen = kv <= q
    if window:
        seen = seen & (q - kv < window)
    if chunk:
        seen = seen & (q // chunk == kv // chunk)
    return seen


def classify_mask(seen: Tensor, positions: Tensor) -> tuple[int, int]:
    """Returns (window, chunk) of a boolean mask (n, n), queries by keys, at ascending `positions` (n,) from 0; 0 and 0:
    causal.

    If a token does not see the first, `positions` must also have the one before it (`with_ends`).

    Raises UnknownMask if it is none of these.
    """
    if bool((seen & (positions > positions[:, None])).any()):
        raise UnknownMask("the attention is not causal: tokens see later ones (bidirectional or prefix attention)")
    if torch.equal(seen, expected_mask(0, 0, positions)):
        return 0, 0
    # The first query that does not see token 0 gives the size of the window or chunk.
    reach = int(positions[int((~seen[:, 0]).nonzero()[0])]) if not bool(seen[:, 0].all()) else int(positions[-1]) + 1
    for found in ((reach, 0), (0, reach)):
        if torch.equal(seen, expected_mask(*found, positions)):
            return found
    raise UnknownMask("the mask is neither causal nor a sliding window nor chunked")


def with_ends(positions: Tensor, seen_at: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Returns `positions` and those around the exact end of every window or chunk that ends before the last; and the
    mask there.

    seen_at: positions (n,) -> what is seen (heads or 1, n, n).
    """
    seen = seen_at(positions)
    gaps: dict[tuple[int, int], list[int]] = {}
    for head, first in enumerate(seen[:, :, 0]):
        if not bool(first.all()):
            at = max(1, int((~first).nonzero()[0]))
            gaps.setdefault((int(positions[at - 1]), int(positions[at])), []).append(head)
    ends: set[int] = set()
    for (low, high), heads in gaps.items():
        inside = _sorted({0, *range(low, high + 1)})
        first = seen_at(inside)[:, :, 0]
        ends.update(int(inside[int((~first[head]).nonzero()[0])]) for head in heads if not bool(first[head].all()))
    more = _around(ends, int(positions[-1]), len(positions) // 4)
    if not more:
        return positions, seen
    positions = _sorted({*positions.tolist(), *more})
    return positions, seen_at(positions)


def _around(ends: set[int], last: int, most: int) -> set[int]:
    """Returns about `most` positions up to `last` where windows and chunks of the sizes `ends` would end."""
    found: set[int] = set()
    queries = [last >> i for i in range(max(1, min(last.bit_length(), most // (7 * max(1, len(ends))))))]
    for end in ends:
        found.update(k * end + d for k in (1, 2) for d in (-1, 0, 1))
        for q in queries:
            found.update((q, q - end - 1, q - end, q - end + 1))  # a window's end
            found.update((q // end * end - 1, q // end * end))  # a chunk's
    return {n for n in found if 0 <= n <= last}


def first_difference(seen: Tensor, other: Tensor, positions: Tensor) -> tuple[int, int] | None:
    """Returns the nearest query and key at which two masks (..., n, n) differ; None if they are the same."""
    differs = (seen != other).reshape(-1, *seen.shape[-2:]).any(0)
    if not bool(differs.any()):
        return None
    q, kv = differs.nonzero().unbind(1)
    nearest = int((positions[q] - positions[kv]).abs().argmin())
    return int(positions[q[nearest]]), int(positions[kv[nearest]])


def described(window: int, chunk: int) -> str:
    """Describes a mask in words."""
    return f"a window of {window}" if window else f"chunks of {chunk}" if chunk else "causal"
