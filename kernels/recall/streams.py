"""Work beside a GPU's own: what a memory looks up and copies while the device computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_SIDE: dict[torch.device, torch.cuda.Stream] = {}


def _side(device: torch.device) -> torch.cuda.Stream:
    if device not in _SIDE:
        _SIDE[device] = torch.cuda.Stream(device)
    return _SIDE[device]


@contextlib.contextmanager
def beside(device: torch.device, *read: Tensor, after: bool = True) -> Iterator[None]:
    """What a GPU is told inside runs beside its current stream; on a CPU it simply runs. read: tensors of that stream that
    are read inside; after: whether it begins once the current stream has done what it was told before."""
    if device.type != "cuda":
        yield
        return
    side = _side(device)
    if after:
        side.wait_stream(torch.cuda.current_stream(device))
    for tensor in read:
        tensor.record_stream(side)
    with torch.cuda.stream(side):
        yield


def join(device: torch.device) -> None:
    """What the current stream is told from now on waits for what was told beside it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_side(device))


def finish(device: torch.device) -> None:
    """Waits on the host for what was told beside the current stream, and for nothing else."""
    if device.type == "cuda":
        _side(device).synchronize()


def to_host(x: Tensor) -> Tensor:
    """A copy in host memory, which is there after `finish`."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
