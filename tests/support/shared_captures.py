"""A model that was captured before in this process is not traced again.

Most tests need a rewritten model and are not about its capture; torch.export takes three quarters of a capture's time. So
`share` keeps what the first capture of a model gave, and gives a copy with the parameters and buffers of the next model
that is equal: classes of all its modules, their attributes, configuration, shapes and types of parameters, and values of
buffers. Models with anything else (hooks, code of the test's own, quantized weights, attributes that are no plain data) are
traced each time, and so are all models in tests/capture, whose subject it is.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from kvrewrite.capture import frontend
from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import get_attr, set_attr

OWN = ("_parameters", "_buffers", "_modules")
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
FUNCTIONS = (type, types.FunctionType, types.BuiltinFunctionType)
LIBRARIES = ("torch.", "transformers.", "tests.support.foreign")

Tracer = Callable[[nn.Module, int | None], Captured]


class NotPlainError(Exception):
    """The model has something that no other model could be compared by."""


def described(value: Any) -> Any:
    """A value that is equal for equal attributes of two modules."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(described, value))
    if isinstance(value, dict):
        return type(value), tuple((described(k), described(v)) for k, v in value.items())
    if isinstance(value, (set, frozenset)):
        return type(value), tuple(sorted(map(repr, map(described, value))))
    if hasattr(value, "to_json_string"):  # a configuration
        hidden = {k: v for k, v in vars(value).items() if k in ("_attn_implementation_internal", "dtype")}
        return type(value), value.to_json_string(use_diff=False), described(hidden)
    if isinstance(value, functools.partial):
        return functools.partial, described(value.func), described(value.args), described(value.keywords)
    if isinstance(value, FUNCTIONS) and (value.__module__ or "").startswith(LIBRARIES):
        return value
    raise NotPlainError(type(value).__name__)


def tensors(named: Iterable[tuple[str, Tensor]], values: bool) -> Iterator[Any]:
    numbers: dict[int, int] = {}
    for name, x in named:
        if type(x) not in (Tensor, nn.Parameter, FakeTensor) or x.layout is not torch.strided:
            raise NotPlainError(type(x).__name__)
        same_as = numbers.setdefault(id(x), len(numbers))  # tied weights
        seen = values and x.device.type == "cpu" and not isinstance(x, FakeTensor)
        data = x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if seen and x.numel() else b""
        yield name, same_as, type(x), tuple(x.shape), x.stride(), x.dtype, str(x.device), x.requires_grad, data


def key_of(model: nn.Module, max_length: int | None) -> Any:
    """What the graph of a model depends on; raises NotPlainError."""
    modules = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not type(module).__module__.startswith(LIBRARIES):
            raise NotPlainError(type(module).__name__)
        attributes = tuple((k, described(v)) for k, v in vars(module).items() if k not in OWN and counts(k, v))
        modules.append((name, type(module), attributes))
    parameters = tuple(tensors(model.named_parameters(remove_duplicate=False), values=False))
    buffers = tuple(tensors(model.named_buffers(remove_duplicate=False), values=True))
    return tuple(modules), parameters, buffers, max_length, torch.get_default_dtype()


def counts(name: str, value: Any) -> bool:
    """Whether an attribute counts; hooks do not if there are none, nor does the `generate` that the backend gives to a model."""
    no_hooks = isinstance(value, dict) and not value and name.endswith(("_hooks", "_kwargs", "_always_called"))
    return not no_hooks and not (
        name == "generate" and getattr(value, "__module__", None) == "kvrewrite.dynamo.modules"
    )


def copied(source: Captured, state: dict[str, Tensor]) -> Captured:
    """A copy of what a capture gave, whose graph has the parameters and buffers of `state`; constants are cloned."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(source.graph.graph, {}))
    gm = fx.GraphModule(source.graph, graph, class_name=type(source.graph).__name__)
    for node in graph.find_nodes(op="get_attr"):
        if node.target in state:
            set_attr(gm, node.target, state[node.target])
        elif isinstance(constant := get_attr(gm, node.target), Tensor):
            set_attr(gm, node.target, constant.clone())
    mutable = {f.name: copy.copy(getattr(source, f.name)) for f in dataclasses.fields(source) if f.name != "graph"}
    return dataclasses.replace(source, graph=gm, **mutable)


def nothing(x: Tensor) -> Tensor:
    """What stands for a parameter or buffer that is not there."""
    empty = torch.empty(0, dtype=x.dtype)
    return nn.Parameter(empty, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else empty


def share(trace: Tracer) -> Tracer:
    """A tracer that traces each model once."""
    known: dict[Any, Captured] = {}

    def shared(model: nn.Module, max_length: int | None) -> Captured:
        try:
            key = key_of(model, max_length)
        except NotPlainError:
            return trace(model, max_length)
        state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        if key not in known:
            first = trace(model, max_length)
            # Without the model's tensors, which should go when their model goes.
            known[key] = copied(first, {name: nothing(x) for name, x in state.items()})
            return first
        return copied(known[key], state)

    return shared


@contextmanager
def traced_each_time() -> Iterator[None]:
    """While open, every capture is a trace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontend, "_capture", TRACE)
        yield


TRACE: Tracer = frontend._capture
