"""Turns 16-bit models to float32, in place: there a comparison says something that rounding would hide in 16 bits."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel

NARROW = (torch.bfloat16, torch.float16)


def widen_weights(module: nn.Module) -> None:
    """Turns 16-bit parameters and buffers to float32."""
    module._apply(lambda tensor: tensor.float() if tensor.dtype in NARROW else tensor)


def widen(model: RewrittenModel) -> None:
    """Turns a rewritten model to float32: weights, casts in its graphs, what its caches hold. It must have no cache yet."""
    program, layout = model.program, model.program.layout
    for graph in (program.graph.graph, *(rotary.graph for rotary in layout.rotary)):
        for node in graph.nodes:
            node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _wide)
    program.graph.recompile()
    widen_weights(program.graph)
    for rotary in layout.rotary:
        rotary.dtype = _wide(rotary.dtype)
    for state in layout.states:
        state.dtype = _name(_wide(getattr(torch, state.dtype)))
    layout.inputs = [dataclasses.replace(spec, dtype=_wide(spec.dtype)) for spec in layout.inputs]
    program.dtype = _name(_wide(getattr(torch, program.dtype)))


def _wide(value: Any) -> Any:
    """float32 for a 16-bit dtype; anything else stays."""
    return torch.float32 if isinstance(value, torch.dtype) and value in NARROW else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
