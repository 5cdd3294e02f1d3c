"""Which quantized caches the decode kernels take, and the tiles they take them in. (Ops ask without loading Triton.)"""

from __future__ import annotations

from typing import NamedTuple

from kvrewrite.kernels import limits
from kvrewrite.kernels.quantized.scheme import Scheme

LEAST_GROUP = 16  # slots of a key group: what tensor cores take
MOST_GROUP = 64  # slots of a page
MOST_VALUE_GROUPS = 32
LEAST_ROWS, MOST_ROWS = 16, 64  # of a tensor core's product; of one worker's


class Tiles(NamedTuple):
    """What the attention kernel takes at a time.

    A row is a query head with one group of a value's channels: rows of a head differ in the scales of values.
    """

    groups: int  # of a value's channels
    heads: int  # query heads, a power of two
    rows: int  # heads times the next power of two of the groups, at least 16
    word: int  # bytes of codes that are loaded as one number, 1 or 2
    halves: int  # codes in a byte


def tiles(scheme: Scheme, d: int, dv: int, group: int) -> Tiles:
    """For keys of d channels, values of dv, and so many query heads a kv head."""
    groups = dv // scheme.value_group(dv)
    padded = _power_of_two(groups)
    heads = min(_power_of_two(group), max(1, MOST_ROWS // padded))
    rows = max(LEAST_ROWS, heads * padded)
    word = 1 if scheme.code_width(d) % 2 or scheme.code_width(dv) % 2 else 2
    return Tiles(groups, heads, rows, word, 2 if scheme.kind == "int4" else 1)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def why_not(scheme: Scheme, d: int, dv: int, group: int = 1) -> str | None:
    """The reason why there is no kernel for these head dims and query heads per kv head, or None."""
    if not LEAST_GROUP <= scheme.group <= MOST_GROUP or MOST_GROUP % scheme.group:
        return f"it takes key groups of 16, 32 or 64 slots, not of {scheme.group}"
    if why := limits.why_not(d, dv, group, 1, False):
        return why
    groups = dv // scheme.value_group(dv)
    if groups > MOST_VALUE_GROUPS:
        return f"it takes values in up to {MOST_VALUE_GROUPS} groups of channels, not in {groups} (head dim {dv})"
    return None
