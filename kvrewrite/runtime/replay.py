"""What passes from static buffers are made of: numbers that the host sends for each row, and a graph to replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvrewrite.ir.waits import told
from kvrewrite.runtime.parts import record_graph

RING = 16  # host buffers of row numbers; a copy from one is long done when its turn comes again, and is waited for


class RowNumbers:
    """Numbers that the host has for each row, sent to the device in one copy per step."""

    def __init__(self, names: list[str], batch: int, device: torch.device):
        self.names = names
        pinned = device.type == "cuda"
        self.host = [torch.zeros(len(names), batch, dtype=torch.int64, pin_memory=pinned) for _ in range(RING)]
        self.numbers = [host.numpy() for host in self.host]
        self.sent = [torch.cuda.Event() if pinned else None for _ in range(RING)]
        self.device = torch.zeros(len(names), batch, dtype=torch.int64, device=device)
        self.next = 0

    def send(self, values: dict[str, list[int]]) -> None:
        at, self.next = self.next, (self.next + 1) % RING
        event = self.sent[at]
        if event is not None:
            event.synchronize()
        for i, name in enumerate(self.names):
            self.numbers[at][i] = values[name]
        self.device.copy_(self.host[at], non_blocking=True)
        if event is not None:
            event.record()


class Replay:
    """A pass from static buffers whose logits `run` returns; as one CUDA graph once it is captured."""

    def __init__(self, run: Callable[[], Tensor]):
        self.run = run
        self.graph: Any = None
        self.ran = False  # without one
        self.logits: Tensor | None = None

    def capture(self, rows: RowNumbers) -> None:
        """Warm-up and capture with no row at work, so that no cache is touched."""
        rows.device.zero_()
        with told(f"compiling and capturing a pass of {rows.device.shape[1]} rows from static buffers"):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.run()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            self.graph, self.logits = record_graph(self.run)

    def __call__(self) -> Tensor:
        if self.graph is None and self.ran:
            return self.run()
        if self.graph is None:
            self.ran = True
            with told("compiling a pass from static buffers"):
                return self.run()
        self.graph.replay()
        assert self.logits is not None
        return self.logits.clone()
