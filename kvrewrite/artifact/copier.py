"""Copies a checkpoint's tensors to a GPU with several threads."""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from kvrewrite.artifact.checkpoint import Block, Reader
from kvrewrite.errors import ArtifactError

COPIERS = 4  # threads that copy tensors to a GPU
STAGED = 16 << 20  # bytes of each of a thread's two pinned buffers


class Copier:
    """Copies tensors of a checkpoint to a device. For a GPU, several threads read the file into pinned buffers: one
    thread would alternate between reading and sending, and mapped files are read page by page.

    Tensors on a GPU are only filled when the context ends, which raises any error.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = ThreadPoolExecutor(COPIERS) if device.type == "cuda" else None
        self._pending: list[Future[None]] = []
        self._threads = threading.local()

    def __enter__(self) -> Copier:
        return self

    def __call__(self, reader: Reader, key: str, dtype: torch.dtype, block: Block | None = None) -> Tensor:
        """Returns the tensor `key`, or a block of it, in `dtype`."""
        if self._pool is None:
            # A block is a view of the mapped file.
            return reader(key, block).to(device=self._device, dtype=dtype).contiguous()
        info = reader.checkpoint.tensors[key]
        shape, first = list(info.shape), 0
        if block is not None:
            shape[block.dim] = block.length
            first = block.start * info.dtype.itemsize * math.prod(info.shape[1:])
        target = torch.empty(shape, dtype=dtype, device=self._device)
        stream = torch.cuda.current_stream(self._device)
        in_one = block is None or block.dim == 0
        if in_one and info.dtype == dtype and target.nbytes >= STAGED:
            path = reader.checkpoint.directory / info.file
            self._pending.append(self._pool.submit(self._fill, target, path, info.start + first, stream))
        else:
            self._pending.append(self._pool.submit(self._fill, target, reader(key, block), 0, stream))
        return target

    def _fill(self, target: Tensor, source: Tensor | Path, start: int, made_on: torch.cuda.Stream) -> None:
        stream = torch.cuda.Stream(target.device)
        stream.wait_stream(made_on)  # its memory may come from a freed tensor that kernels on that stream still read
        with torch.cuda.stream(stream):
            if isinstance(source, Tensor):
                target.copy_(source.to(target.dtype))  # blocks, because the source is not pinned
            else:
                self._stage(target.view(-1).view(torch.uint8), source, start, stream)
        stream.synchronize()

    def _stage(self, target: Tensor, path: Path, start: int, stream: torch.cuda.Stream) -> None:
        """Sends the bytes from `start` on through this thread's two buffers: one is filled while the other is sent."""
        if not hasattr(self._threads, "buffers"):
            self._threads.buffers = [torch.empty(STAGED, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        sent: list[torch.cuda.Event | None] = [None, None]
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                for turn, at in enumerate(range(0, target.numel(), STAGED)):
                    piece, before = target[at : at + STAGED], sent[turn % 2]
                    if before is not None:
                        before.synchronize()
                    buffer = self._threads.buffers[turn % 2][: piece.numel()]
                    left = memoryview(buffer.numpy())
                    while left:
                        count = file.readinto(left)
                        if not count:
                            raise ArtifactError(
                                f"{path} ended {len(left)} bytes early while it was read; copy it again"
                            )
                        left = left[count:]
                    piece.copy_(buffer, non_blocking=True)
                    sent[turn % 2] = stream.record_event()
        except OSError as error:
            raise ArtifactError(f"{path} can't be read: {error.strerror}") from error

    def __exit__(self, *error: object) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=True, cancel_futures=error[0] is not None)
        if error[0] is None:
            for copied in self._pending:
                copied.result()
