"""The sum of few numbers over ranks, of which a decode step has two a layer.

NCCL takes longer to begin than to sum so little. Where two GPUs read each other's memory, one kernel does it: each rank
puts its part into a buffer that the other one sees, and reads both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOST_BYTES = 1 << 20  # more is bound by bytes, where NCCL is as fast
ALIGNED = 16  # bytes that the kernel reads at once
DTYPES = (torch.bfloat16, torch.float32)  # those that torch's kernel sums
_BUFFERS: dict[str, Tensor] = {}  # group -> what its ranks see of this one


def reserve(group: Any, device: torch.device) -> None:
    """Makes the buffer of a group, by its name; every rank calls this. Until then, `sum_ranks` takes the process group's
    own sum."""
    import torch.distributed._symmetric_memory as symmetric

    if group in _BUFFERS:
        return
    buffer = symmetric.empty(MOST_BYTES, dtype=torch.uint8, device=device)
    symmetric.rendezvous(buffer, group)
    _BUFFERS[group] = buffer


def forget() -> None:
    """Drops all buffers: their groups are about to end, and a later group may have the name of one of them."""
    _BUFFERS.clear()


@torch.library.custom_op("kvrewrite::sum_ranks", mutates_args=())
def sum_ranks(x: Tensor, group: str) -> Tensor:
    """The sum of all ranks' x, of any shape; the same bits on each rank."""
    buffer, size = _BUFFERS.get(group), x.numel() * x.element_size()
    if buffer is None or x.dtype not in DTYPES or not 0 < size <= MOST_BYTES or size % ALIGNED:
        comm = torch.ops._c10d_functional
        found: Tensor = comm.wait_tensor(comm.all_reduce(x.contiguous(), "sum", group))
        return found
    x = x.contiguous()
    seen = buffer[:size].view(x.dtype).view(x.shape)
    found = torch.ops.symm_mem.one_shot_all_reduce_copy(seen, x, "sum", group)
    return found


@sum_ranks.register_fake
def _(x, group):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)
