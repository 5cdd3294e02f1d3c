"""Chunks of prompts at speed: on CUDA a whole chunk is one graph replay.

Queueing a chunk op by op takes the host a few milliseconds per layer, which is longer than a GPU needs for it where
budgets are small. What a chunk launches depends on the shapes of its inputs alone, so it is captured when a shape comes
for the second time: once the cache is full, all chunks of a prompt are alike. Chunks whose logits somebody wants (the
last one of a prompt) run as they are.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Set
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvrewrite.ir.layout import InputSpec
from kvrewrite.ir.program import Program
from kvrewrite.ops.dispatch import fused
from kvrewrite.policies import Policy
from kvrewrite.runtime import decode_graph
from kvrewrite.runtime.parts import Execution, record_graph

KEPT = 8  # shapes whose buffers and graphs are kept; the one that was not used for longest goes first


def why_not(program: Program, policy: Policy, device: torch.device) -> str | None:
    """The reason why chunks of this program are not captured, or None. What speaks against captured tokens does here,
    too."""
    if reason := decode_graph.why_not(program, policy, device):
        return reason
    if policy.repeats_prompt:
        return f"{policy.name} asks the device in every chunk whether a row repeats its prompt"
    if program.layout.quantize is not None:
        return "what is coded anew in a quantized cache is looked up on the host"
    sample = torch.empty(0, dtype=getattr(torch, program.dtype), device=device)
    if device.type == "cuda" and not fused("cache_update", sample):
        return f"there are no kernels for {program.dtype}, or they are off; the reference looks at results on the host"
    return None


class _Chunk:
    """Buffers for the inputs of one shape, and its graph once it is captured. The pools are the model's own and not
    kept alive: one that has to grow moves."""

    def __init__(self, given: Mapping[str, Tensor], pools: Mapping[str, Tensor]):
        own: dict[int, Tensor] = {}  # what is one tensor to the caller is one here: torch.compile guards that
        self.buffers = {name: own.setdefault(id(x), x.clone()) for name, x in given.items()}
        self.pools = {name: weakref.ref(pool) for name, pool in pools.items()}
        self.held: dict[str, weakref.ref[Tensor]] = {}  # tables that the buffers hold copies of
        self.graph: torch.cuda.CUDAGraph | None = None

    def belongs_to(self, pools: Mapping[str, Tensor]) -> bool:
        """Whether it reads and writes these pools."""
        return all(self.pools[name]() is pool for name, pool in pools.items())

    def fill(self, given: Mapping[str, Tensor], tables: Set[str]) -> None:
        """Copies a call's inputs; tables, which nobody writes to, only where they are others than the last call's."""
        for name, x in given.items():
            if name in tables:
                held = self.held.get(name)
                if held is not None and held() is x:
                    continue
            self.buffers[name].copy_(x)
            if name in tables:
                self.held[name] = weakref.ref(x)

    def give_back(self, given: Mapping[str, Tensor], specs: Mapping[str, InputSpec]) -> None:
        """Copies what the chunk has written, but for the pools, to where the caller has it."""
        for name, x in given.items():
            if specs[name].written:
                x.copy_(self.buffers[name])


class PrefillRunner:
    """Runs chunks without logits from buffers. execution: the program in compiled parts, which runs what logits are wanted of;
    capture: into CUDA graphs (otherwise chunks run from the same buffers, part by part); captures counts them."""

    def __init__(self, execution: Execution, capture: bool):
        self.execution, self.capture, self.captures = execution, capture, 0
        self._specs = execution.partition.inputs
        self._pools = {name for name, spec in self._specs.items() if spec.kind == "pool"}
        self._tables = {name for name, spec in self._specs.items() if spec.kind in ("rotary", "length_table")}
        self._chunks: OrderedDict[Any, _Chunk] = OrderedDict()
        # Chunks run one at a time and leave nothing in their memory: they share it.
        self._memory: torch.cuda.MemPool | None = None

    @cached_property
    def _sources(self) -> Set[str]:
        """Names of inputs that the program reads."""
        return self.execution.silent.sources

    def __call__(self, inputs: dict[str, Tensor], logits: bool) -> Tensor | None:
        """One chunk of every row. inputs: as `Execution` takes them."""
        if logits:
            return self.execution(inputs)
        self._from_buffers(inputs)
        return None

    def _from_buffers(self, inputs: Mapping[str, Tensor]) -> None:
        needed = self._sources & inputs.keys()
        given = {name: inputs[name] for name in sorted(needed - self._pools)}
        fixed = {name: inputs[name] for name in sorted(needed & self._pools)}
        first = {id(x): name for name, x in reversed(given.items())}
        shape = tuple((name, first[id(x)], x.shape, x.stride(), x.dtype) for name, x in given.items())
        known = self._chunks.pop(shape, None)
        if known is not None and not known.belongs_to(fixed):
            known = None
        chunk = known or _Chunk(given, fixed)
        self._chunks[shape] = chunk
        if len(self._chunks) > KEPT:
            self._chunks.popitem(last=False)
        chunk.fill(given, self._tables)
        if self.capture and known is not None:
            if chunk.graph is None:
                chunk.graph = self._captured({**fixed, **chunk.buffers})
            chunk.graph.replay()
        else:
            # From the buffers, too: whatever is compiled for them is there when they are captured.
            self.execution({**fixed, **chunk.buffers}, logits=False)
        chunk.give_back(given, self._specs)

    def _captured(self, inputs: dict[str, Tensor]) -> torch.cuda.CUDAGraph:
        if self._memory is None:
            self._memory = torch.cuda.MemPool()
        graph, _ = record_graph(lambda: self.execution(inputs, logits=False), self._memory.id)
        self.captures += 1
        return graph
