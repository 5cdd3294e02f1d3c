"""The sum of few numbers over ranks, of which a decode step has two a layer, and the residual that is added to it.

NCCL takes longer to begin than to sum so little. Where two GPUs write each other's memory, one kernel does it
(kernels/collective/pair_sum.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_BYTES = 1 << 20  # more is bound by bytes, where NCCL is as fast
ALIGNED = 16  # bytes that a sum has whole multiples of, so that a step's other sums stay aligned
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Buffers(NamedTuple):
    """What the kernel of a group works with: `pair_sum` says what these are. handle: keeps the other GPU's memory mapped."""

    mine: Tensor
    theirs: Tensor
    state: Tensor
    handle: Any


_BUFFERS: dict[str, Buffers] = {}  # by the group's name


def reserve(group: Any, device: torch.device) -> None:
    """Makes the buffers of a group, by its name; both ranks call this. Until then, sums are the process group's own."""
    import torch.distributed._symmetric_memory as symmetric

    if group in _BUFFERS:
        return
    entries = 2 * MOST_BYTES // 4  # two that take turns, eight bytes for each word of four
    mine = symmetric.empty(entries, dtype=torch.int64, device=device).zero_()
    handle = symmetric.rendezvous(mine, group)
    theirs = handle.get_buffer(1 - handle.rank, (entries,), torch.int64)
    handle.barrier()  # nobody sends before all is zero
    torch.cuda.synchronize(device)
    _BUFFERS[group] = Buffers(mine, theirs, torch.zeros(2, dtype=torch.int32, device=device), handle)


def forget() -> None:
    """Drops all buffers: their groups are about to end, and a later group may have the name of one of them."""
    _BUFFERS.clear()


def _sum(x: Tensor, group: str, residual: Tensor | None) -> Tensor:
    buffers, size = _BUFFERS.get(group), x.numel() * x.element_size()
    if buffers is None or x.dtype not in DTYPES or not 0 < size <= MOST_BYTES or size % ALIGNED:
        comm = torch.ops._c10d_functional
        found: Tensor = comm.wait_tensor(comm.all_reduce(x.contiguous(), "sum", group))
        return found if residual is None else residual + found
    from kvrewrite.kernels.collective.pair_sum import pair_sum

    rest = None if residual is None else residual.contiguous()
    return pair_sum(x.contiguous(), buffers.mine, buffers.theirs, buffers.state, rest)


@torch.library.custom_op("kvrewrite::sum_ranks", mutates_args=())
def sum_ranks(x: Tensor, group: str) -> Tensor:
    """The sum of all ranks' x, of any shape; the same bits on each rank."""
    return _sum(x, group, None)


@sum_ranks.register_fake
def _(x, group):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("kvrewrite::sum_ranks_add", mutates_args=())
def sum_ranks_add(x: Tensor, group: str, residual: Tensor) -> Tensor:
    """residual + the sum of all ranks' x, which is rounded before: both of one shape and dtype."""
    return _sum(x, group, residual)


@sum_ranks_add.register_fake
def _(x, group, residual):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)
