"""Where the numbers of a tensor lie when several processes (ranks) run one graph together.

A tensor is whole on every rank, or its ranks hold blocks of one dimension (`Split`), or it is `LOCAL`: every rank has its
own, and nothing but the ops of the cache may read it (pools of pages).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from torch import fx

from kvrewrite.ir.parallel import blocks_of

LOCAL: Final = "local"
Placement = Any  # Split, LOCAL, None (whole), or a tuple of them for an op with several results
VIEWS = ("aten.t.default", "aten.transpose.int", "aten.permute.default")
CASTS = ("aten.to.dtype", "aten._to_copy.default", "aten.alias.default", "aten.detach.default")


@dataclass(frozen=True)
class Split:
    """A dimension that is dealt out. It consists of `parts`, one after the other; each is cut into equal blocks, and a rank
    holds its block of every part. One part: the usual case. Several: what was fused (q, k and v of one linear)."""

    dim: int
    parts: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size of the whole dimension."""
        return sum(self.parts)

    def at(self, dim: int) -> Split:
        """The same of another dimension."""
        return Split(dim, self.parts)

    def fits(self, ranks: int) -> bool:
        """Whether every part can be cut into so many blocks."""
        return all(part and part % ranks == 0 for part in self.parts)

    def blocks(self, rank: int, ranks: int) -> list[tuple[int, int]]:
        """(start in the whole dimension, length) of what a rank holds."""
        return blocks_of(self.parts, rank, ranks)


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Arguments of a call with `function` of each that is no list, tuple or dict; a `Want` is one."""
    if isinstance(value, (list, tuple)) and not isinstance(value, Want):
        return type(value)(mapped(v, function) for v in value)
    return {k: mapped(v, function) for k, v in value.items()} if isinstance(value, dict) else function(value)


def even(dim: int, size: Any, ranks: int) -> Split | None:
    """A dimension of one part, None where it can't be cut."""
    return Split(dim, (int(size),)) if type(size) is int and size and size % ranks == 0 else None


class Want(NamedTuple):
    """An argument as an op takes it: a node, and how its tensor must lie."""

    node: fx.Node
    split: Placement


def regroup(split: Split, old: Sequence[Any], new: Sequence[Any], ranks: int) -> Split | None:
    """How a tensor of shape `old` lies after a view as `new`; None where its blocks do not stay blocks."""
    if not all(type(n) is int for n in (*old, *new)) or 0 in old or 0 in new:
        return None
    group = _group(split.dim, old, new)
    if group is None:
        return None
    (first, _), (at, end) = group
    if any(n > 1 for n in old[first : split.dim]):  # something stands outside of what is dealt out
        return None
    lead = next((d for d in range(at, end) if new[d] > 1), None)
    if lead is None:
        return None
    size, inner = new[lead], math.prod(new[lead + 1 : end])
    whole = math.prod(old[split.dim : group[0][1]])
    if len(split.parts) == 1:
        return even(lead, size, ranks)
    unit = whole // split.size  # numbers of the group for each index of the dimension
    runs = [part * unit for part in split.parts]
    if all(run % inner == 0 for run in runs):  # several parts along one dimension
        found = Split(lead, tuple(run // inner for run in runs))
        if found.fits(ranks):
            return found
    following = next((d for d in range(lead + 1, end) if new[d] > 1), None)
    if size == len(runs) and len(set(runs)) == 1 and following is not None:  # one part for each index
        return even(following, new[following], ranks)
    return None


def _group(dim: int, old: Sequence[int], new: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The smallest runs of dimensions [first, end), of `old` around `dim` and of `new`, that hold the same numbers."""
    i = j = 0
    while i < len(old):
        first, at = i, j
        left, right = old[i], 1
        i += 1
        while left != right:
            if left < right:
                if i == len(old):
                    return None
                left, i = left * old[i], i + 1
            else:
                if j == len(new):
                    return None
                right, j = right * new[j], j + 1
        if first <= dim < i:
            return (first, i), (at, j)
    return None


def attribute_of(node: fx.Node, split: Split, rank_of: Callable[[fx.Node], int]) -> tuple[fx.Node, Split] | None:
    """Where `node` is an attribute of the graph, seen transposed or cast: the attribute, and how that must lie so that
    the node lies as `split`. rank_of: how many dimensions a node's tensor has."""
    dim = split.dim
    while node.op == "call_function":
        name = str(node.target)
        args: Any = node.args
        if name not in (*VIEWS, *CASTS):
            return None
        if name == "aten.t.default":
            dim = 1 - dim
        elif name == "aten.transpose.int":
            a, b = (d % rank_of(node) for d in args[1:3])
            dim = {a: b, b: a}.get(dim, dim)
        elif name == "aten.permute.default":
            dim = args[1][dim] % len(args[1])
        node = args[0]
    return (node, split.at(dim)) if node.op == "get_attr" else None
