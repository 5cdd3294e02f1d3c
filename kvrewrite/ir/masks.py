"""Which tokens a mask by position lets through, told from its values at chosen positions of a text of any length.

What a mask does to the first tokens does not say what it does far away: a window of 4096 looks causal on 2048 tokens. So masks
are compared at every distance up to the longest length, on few positions: of `spread(n)`, about 2 sqrt(n) positions, two lie at
each distance up to n - 1. Where a window or chunk ends is looked at from several places in the text besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

BLOCK = 32  # of the last tokens
FARTHEST = 1 << 17  # tokens up to which masks are compared where a model says no longest length


class UnknownMask(Exception):
    """Why a mask is none that an evicted cache can keep."""


def spread(length: int) -> Tensor:
    """Positions below `length`, ascending, int64: the first and the last ones, and two at every distance from 0 to length - 1."""
    step = max(2, math.isqrt(length))
    last = range(max(0, length - BLOCK), length)
    return _sorted({*range(min(step, length)), *range(0, length, step), *last})


def spread_length(count: int) -> int:
    """A length for which `spread` has at most `count` positions, about the largest; BLOCK at least."""
    return max(BLOCK, (max(0, count - BLOCK - 2) // 2) ** 2)


def _sorted(positions: Iterable[int]) -> Tensor:
    return torch.tensor(sorted(positions), dtype=torch.long)


def expected_mask(window: int, chunk: int, positions: Tensor) -> Tensor:
    """The mask (n, n), queries by keys, of a window or chunk, or of neither (causal), at `positions` (n,)."""
    q, kv = positions[:, None], positions
    seen = kv <= q
    if window:
        seen = seen & (q - kv < window)
    if chunk:
        seen = seen & (q // chunk == kv // chunk)
    return seen


def classify_mask(seen: Tensor, positions: Tensor) -> tuple[int, int]:
    """(window, chunk) of a boolean mask (n, n) of queries by keys at `positions` (n,), which ascend from 0; 0 and 0: causal.

    Where a token does not see the first, `positions` must have the one before it, too (`with_ends`).

    Raises UnknownMask where it is neither.
    """
    if bool((seen & (positions > positions[:, None])).any()):
        raise UnknownMask("the attention is not causal: tokens see later ones (bidirectional or prefix attention)")
    if torch.equal(seen, expected_mask(0, 0, positions)):
        return 0, 0
    # The first query that does not see token 0 is as far as a window or chunk reaches.
    reach = int(positions[int((~seen[:, 0]).nonzero()[0])]) if not bool(seen[:, 0].all()) else int(positions[-1]) + 1
    for found in ((reach, 0), (0, reach)):
        if torch.equal(seen, expected_mask(*found, positions)):
            return found
    raise UnknownMask("the mask is neither causal nor a sliding window nor chunked")


def with_ends(positions: Tensor, seen_at: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """`positions`, and those around the exact end of every window or chunk that ends before the last; and the mask there.

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
    """About `most` positions up to `last` at which windows and chunks of the sizes `ends` would end, in all parts of the text."""
    found: set[int] = set()
    queries = [last >> i for i in range(max(1, min(last.bit_length(), most // (7 * max(1, len(ends))))))]
    for end in ends:
        found.update(k * end + d for k in (1, 2) for d in (-1, 0, 1))
        for q in queries:
            found.update((q, q - end - 1, q - end, q - end + 1))  # a window's end
            found.update((q // end * end - 1, q // end * end))  # a chunk's
    return {n for n in found if 0 <= n <= last}


def first_difference(seen: Tensor, other: Tensor, positions: Tensor) -> tuple[int, int] | None:
    """The query and key nearest to each other for which two masks (..., n, n) differ; None where they are the same."""
    differs = (seen != other).reshape(-1, *seen.shape[-2:]).any(0)
    if not bool(differs.any()):
        return None
    q, kv = differs.nonzero().unbind(1)
    nearest = int((positions[q] - positions[kv]).abs().argmin())
    return int(positions[q[nearest]]), int(positions[kv[nearest]])


def described(window: int, chunk: int) -> str:
    """A mask in words."""
    return f"a window of {window}" if window else f"chunks of {chunk}" if chunk else "causal"
