"""Runs a rewritten program in parts, each compiled by torch.compile: layers that compute the same are compiled once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from kvrewrite.ir.fx import get_attr, set_attr
from kvrewrite.ir.layout import Devices
from kvrewrite.passes.insert.devices import DEVICE
from kvrewrite.passes.lower.partition import Partition, partition, without_result

T = TypeVar("T")


@contextlib.contextmanager
def dynamic_sizes() -> Iterator[None]:
    """For torch.compile: sizes that happen to be equal (rows, kv heads, layers) are not one size to it, and there may
    be as many graphs as there are combinations of one and several (rows, tokens, logits, pages)."""
    from torch.fx.experimental import _config as symbolic

    limits = torch._dynamo.config.patch(recompile_limit=32)
    with symbolic.patch(use_duck_shape=False), limits:  # type: ignore[attr-defined]
        yield


# What brings a number to the host while it runs; the last are experts in other dtypes than bf16.
HOST_READS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "transformers.grouped_mm_fallback.default")


def why_not_captured(gm: fx.GraphModule) -> str | None:
    """The reason why a graph can't be captured as a CUDA graph, judging by its ops, or None."""
    found = {str(n.target) for n in gm.graph.nodes if n.op == "call_function"} & set(HOST_READS)
    if not found:
        return None
    name = min(found)
    why = " (experts multiply so in other dtypes than bfloat16)" if "grouped_mm" in name else ""
    return f"{name.removesuffix('.default')} looks at results on the host{why}"


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def record_graph(run: Callable[[], T], memory: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """What `run` launches on the current GPU as a CUDA graph, and what it returned. memory: the id of a pool to take
    memory from.

    On a stream of that GPU: torch's own default belongs to the GPU that was current at the first capture of the
    process, and capturing there makes that one current.
    """
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(torch.cuda.current_device())
    with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
        result = run()
    return graph, result


class Execution:
    """A program in parts. Called with the program's inputs by name; returns the logits.

    compiler: makes a callable of a part's graph (`torch.compile` with its options), once for each distinct graph; None
    runs them as they are. rows_move: whether numbers of rows and tokens are no constants to it. Values are dropped
    after their last reader.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        compiler: Callable[[fx.GraphModule], Callable[..., Any]] | None,
        rows_move: bool = True,
    ):
        self.partition: Partition = partition(gm, rows_move)
        self._gm, self._compiler = gm, compiler
        self._calls = {graph: self._compiled(graph) for graph in self.partition.distinct}
        self._marks = compiler is not None

    def _compiled(self, graph: fx.GraphModule) -> Callable[..., Any]:
        return graph if self._compiler is None else self._compiler(graph)

    @functools.cached_property
    def _attributes(self) -> dict[str, Tensor]:
        """Parameters and buffers that parts read. Looked up once: it takes longer than one would think."""
        return {name: get_attr(self._gm, name) for name in self.partition.attributes}

    @functools.cached_property
    def silent(self) -> Partition:
        """The same program without logits."""
        found = without_result(self.partition)
        last = found.parts[-1].graph
        self._calls[last] = self._compiled(last)
        return found

    def __call__(
        self, inputs: dict[str, Tensor], logits: bool = True, layers: dict[str, Sequence[Tensor]] | None = None
    ) -> Tensor | None:
        """inputs: what the layout of the program names. logits: whether they are wanted; without them the result is
        None, and nothing is computed that only they need. layers: what each layer has of inputs that all share, where
        that is there already."""
        program = self.partition if logits else self.silent
        values: dict[str, Any] = {**inputs, **self._attributes}
        copies = {} if layers is not None else self._views(inputs)
        layers = copies if layers is None else layers
        for name, (source, layer) in program.views.items():
            values[name] = layers[source][layer]
        context = dynamic_sizes() if self._marks else contextlib.nullcontext()
        with context:
            for part in program.parts:
                arguments = [values[name] for name in part.inputs]
                if self._marks:
                    mark_moving(arguments, part.moving)
                made = self._calls[part.graph](*arguments)
                values.update(zip(part.outputs, made))
                del arguments, made
                for name in part.last_use:
                    del values[name]
        if self._marks:
            for source, written in copies.items():
                if program.inputs[source].written:
                    inputs[source].copy_(torch.stack(list(written)))
        return None if program.result is None else values[program.result]

    def _views(self, inputs: dict[str, Tensor]) -> dict[str, Sequence[Tensor]]:
        """Each layer's part of the inputs that all layers share.

        torch.compile gets copies (they are small): it guards the base of a view, and Inductor (2.13) takes the sizes of
        a view that is written to for constants. What is written to is copied back.
        """
        sources = dict.fromkeys(source for source, _ in self.partition.views.values())
        if not self._marks:
            return {source: inputs[source].unbind(0) for source in sources}
        copies: dict[str, Sequence[Tensor]] = {}
        for source in sources:
            views = inputs[source].unbind(0)
            own = [torch.empty_like(x) for x in views]
            torch._foreach_copy_(own, views)  # one launch on a GPU, not one per layer
            copies[source] = own
        return copies


class Staged(fx.Interpreter):
    """Runs a program whose layers lie on several devices (`passes/insert/devices.py`), each node with its device as the
    current one: Triton launches there.

    devices: of the program's layout; attributes that it names (tables, policy weights) are moved there first.
    """

    def __init__(self, gm: fx.GraphModule, devices: Devices):
        for name, device in devices.attributes.items():
            value = get_attr(gm, name)
            moved = value.to(device)
            if isinstance(value, nn.Parameter):
                moved = nn.Parameter(moved.detach(), requires_grad=False)
            set_attr(gm, name, moved)
        super().__init__(gm)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The logits; inputs in the graph's order."""
        if not torch.cuda.is_available():
            out: Tensor = self.run(*inputs)
            return out
        before = torch.cuda.current_device()
        try:
            out = self.run(*inputs)
        finally:
            torch.cuda.set_device(before)
        return out

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node on its device."""
        device = n.meta.get(DEVICE, "")
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        return super().run_node(n)


def mark_moving(arguments: Sequence[Any], moving: Sequence[tuple[int, ...]]) -> None:
    """Tells torch.compile which sizes will differ in other calls. Size 1 is a case of its own to it."""
    for argument, dims in zip(arguments, moving):
        for dim in dims:
            if dim < argument.dim() and argument.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(argument, dim)
