"""Which quantized caches the decode kernels take, and how they split a value's channels. (Ops ask without loading
Triton.)"""

from __future__ import annotations

import math
from typing import NamedTuple

from kvrewrite.kernels import limits
from kvrewrite.kernels.quantized.scheme import Scheme

LEAST_GROUP = 16  # slots of a key group: what tensor cores take
MOST_GROUP = 64  # slots of a page
MOST_PARTS = 16


class Split(NamedTuple):
    """How the channels of a value are taken: `halves` (2 where a byte has two codes) of `parts` parts of `width`
    channels, each with one scale."""

    halves: int
    parts: int
    width: int


def split(scheme: Scheme, dv: int) -> Split:
    """Parts as wide as groups of channels allow, but at least four (one a warp) where they can have 16 channels."""
    halves = dv // scheme.code_width(dv)
    half = dv // halves
    width = math.gcd(scheme.value_group(dv), half)
    while width > 16 and width % 2 == 0 and half // width < 3:
        width //= 2
    return Split(halves, half // width, width)


def why_not(scheme: Scheme, d: int, dv: int, group: int = 1) -> str | None:
    """The reason why there is no kernel for these head dims and query heads per kv head, or None."""
    if not LEAST_GROUP <= scheme.group <= MOST_GROUP or MOST_GROUP % scheme.group:
        return f"it takes key groups of 16, 32 or 64 slots, not of {scheme.group}"
    if why := limits.why_not(d, dv, group, 1, False):
        return why
    parts = split(scheme, dv).parts
    if parts > MOST_PARTS:
        return f"it takes values in up to {MOST_PARTS} parts, not in {parts} (head dim {dv})"
    return None
