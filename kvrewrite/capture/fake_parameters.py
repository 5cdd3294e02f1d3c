"""Captures models whose parameters are on meta or on several devices.

The trace sees fake parameters on the CPU; the model's own parameters then replace them in the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvrewrite.capture.third_party import quantized_weights, without_hooks
from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import get_attr, set_attr

if TYPE_CHECKING:
    from kvrewrite.capture.captured import Captured


@contextlib.contextmanager
def _stand_ins(model: nn.Module, wanted: Callable[[nn.Parameter], bool]) -> Iterator[dict[int, nn.Parameter]]:
    """While open, the wanted parameters are fake ones on the CPU; yields {id of the fake: real parameter}."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    real: dict[int, nn.Parameter] = {}
    stands_for: dict[int, nn.Parameter] = {}
    undo: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None or not wanted(parameter):
                    continue
                if id(parameter) not in stands_for:
                    with fake:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                        stand_in = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    stands_for[id(parameter)] = stand_in
                    real[id(stand_in)] = parameter
                undo.append((module, leaf, parameter))
        for module, leaf, parameter in undo:
            module._parameters[leaf] = stands_for[id(parameter)]
        yield real
    finally:
        for module, leaf, parameter in undo:
            module._parameters[leaf] = parameter


def _put_back(captured: Captured, model: nn.Module, real: dict[int, nn.Parameter]) -> Captured:
    """Replaces the graph's fake parameters with the model's."""
    originals = dict(model.named_parameters(remove_duplicate=False))
    for node in captured.graph.graph.nodes:
        if node.op == "get_attr" and node.target in originals:
            set_attr(captured.graph, node.target, originals[node.target])
        elif node.op == "get_attr" and id(get_attr(captured.graph, node.target)) in real:
            set_attr(captured.graph, node.target, real[id(get_attr(captured.graph, node.target))])
    return captured


def capture_on_meta(model: nn.Module, **options: Any) -> Captured:
    """Captures a model from `build_on_meta`: the graph's parameters are on meta; buffers and literals are real.

    Tracing on meta would give a different graph: transformers' code branches on the device type (routers count in
    integers except on the CPU), and literals would lose their values.
    """
    from kvrewrite.capture.frontend import capture

    with _stand_ins(model, lambda parameter: parameter.is_meta) as real:
        captured = capture(model, **options)
    return _put_back(captured, model, real)


def capture_on_devices(model: nn.Module, **options: Any) -> Captured:
    """Captures a model whose parameters lie on several devices and records these in `Captured.devices`.

    Buffers are copied to the CPU for the trace. In the graph they are constants, which `passes/insert/devices.py` moves
    to the devices that read them.
    """
    from kvrewrite.capture.frontend import capture

    if (what := quantized_weights(model)) is not None:
        raise UnsupportedModelError(
            f"the model's weights are quantized ({what}) and lie on {', '.join(devices_of(model))}; load it on one device"
        )
    undo: list[tuple[nn.Module, str, torch.Tensor]] = []
    with without_hooks(model):
        if missing := [n for n, p in model.named_parameters() if p.is_meta]:
            raise UnsupportedModelError(
                f"the model's parameters lie on {', '.join(devices_of(model))}, and {missing[0]} has no values (meta). Load all "
                "of them, or convert its directory, for which no weights are loaded (kvrewrite convert)"
            )
        try:
            for module in model.modules():
                for leaf, buffer in module._buffers.items():
                    if buffer is not None and buffer.device.type != "cpu":
                        undo.append((module, leaf, buffer))
            for module, leaf, buffer in undo:
                module._buffers[leaf] = buffer.cpu()
            with _stand_ins(model, lambda parameter: True) as real:
                captured = capture(model, **options)
        finally:
            for module, leaf, buffer in undo:
                module._buffers[leaf] = buffer
    captured.devices = {name: str(p.device) for name, p in model.named_parameters(remove_duplicate=False)}
    return _put_back(captured, model, real)


def devices_of(model: nn.Module) -> list[str]:
    """Returns the devices of a model's parameters."""
    return sorted({str(p.device) for p in model.parameters()})
