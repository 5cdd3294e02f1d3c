"""Caches whose rows go through the graph side by side, in one pass: their inputs joined, and what it wrote given back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvrewrite.ir.layout import InputSpec

Given = Mapping[str, Tensor]
FILL = {"spare": -1}  # what stands after the last entry of a row, where that is not 0


def _rows_of(spec: InputSpec) -> int | None:
    """The dimension of the rows, of inputs that every cache has of its own."""
    return {"layers": 1, "rows": 0, "state": 0}.get(spec.kind)


def join(specs: Iterable[InputSpec], caches: Sequence[Given]) -> dict[str, Tensor]:
    """The inputs of several caches as those of one with all their rows. Pools are the same for all; tables of cos and sin,
    and whatever else is no cache's own, are not touched."""
    joined = {}
    for spec in specs:
        if spec.name not in caches[0]:
            continue
        found, rows = [given[spec.name] for given in caches], _rows_of(spec)
        if spec.kind == "pool":
            joined[spec.name] = found[-1]  # what the last one has leased may have made them grow
        elif rows is not None:
            found = [_widened(x, [max(sizes) for sizes in zip(*(y.shape for y in found))], rows, spec) for x in found]
            if spec.kind == "layers" and spec.written:
                # A layer's view begins at a constant offset, as in a lease.
                joined[spec.name] = torch.cat([x.movedim(0, -1) for x in found]).movedim(-1, 0)
            else:
                joined[spec.name] = torch.cat(found, rows)
    return joined


def _widened(x: Tensor, sizes: Sequence[int], rows: int, spec: InputSpec) -> Tensor:
    more = [0 if d == rows else size - x.shape[d] for d, size in enumerate(sizes)]
    if not any(more):
        return x
    return pad(x, [n for extra in reversed(more) for n in (0, extra)], value=FILL.get(spec.part, 0))


def give_back(specs: Iterable[InputSpec], caches: Sequence[Given], joined: Given) -> None:
    """Copies what a pass has written to the rows of each cache to where that has it. (Pools are written in place.)"""
    for spec in specs:
        rows = _rows_of(spec)
        if not spec.written or rows is None or spec.name not in joined:
            continue
        begin = 0
        for given in caches:
            own = given[spec.name]
            count = own.shape[rows]
            part = joined[spec.name].narrow(rows, begin, count)
            own.copy_(part[tuple(slice(0, size) for size in own.shape)])
            begin += count
