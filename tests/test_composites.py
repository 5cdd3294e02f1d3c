"""Composite ops taken apart one by one give the graph that torch.export's own decomposition gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvrewrite.capture
from kvrewrite.capture import Captured, capture
from kvrewrite.composites import decompose
from kvrewrite.graph import fingerprint
from kvrewrite.passes.pipeline import canonical
from tests.rewritten import build


def shapes(captured: Captured) -> list[str]:
    """Shape and dtype of what every node is known to produce."""
    values = [n.meta.get("val") for n in captured.graph.graph.nodes]
    return [f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else str(v) for v in values]


# Two frontends: longrope with chunks, and nn.MultiheadAttention.
@pytest.mark.parametrize("name", ["phi3", "TorchMHA"])
def test_same_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ops in the same order after canonicalization, with the same shapes, modules and inputs."""
    model, found = build(name), []
    for own in (False, True):
        if not own:
            monkeypatch.setattr(kvrewrite.capture, "decompose", lambda program: program.run_decompositions({}))
        else:
            monkeypatch.setattr(kvrewrite.capture, "decompose", decompose)
        captured = capture(model)
        sites = canonical(captured)
        names = [n.target for n in captured.graph.graph.nodes if n.op == "placeholder"]
        found.append((fingerprint(captured.graph.graph), sites, names, shapes(captured), captured.max_positions))
    assert found[0] == found[1]


class Composite(nn.Module):
    """Composite ops whose result depends on sizes, strides and dtypes; the same op twice with other strides."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        y = x.reshape(b, s, 2, 4).transpose(1, 2)
        first, second = torch.chunk(y.contiguous().reshape(b, 2 * s, 4), 2, dim=-1)
        z = y.reshape(b, 2 * s, 4) + torch.cat([second, first], -1).to(torch.float32).expand_as(y.flatten(1, 2))
        return z.unflatten(1, (2, s)).movedim(1, 2).flatten(2).to(torch.float64)


def exported(module: nn.Module, x: Tensor) -> Any:
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes=({0: auto, 1: auto},), strict=False)


def test_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """At other sizes than those of the trace, and without the long way; no composite that may alias is left."""
    program = exported(Composite(), torch.randn(2, 6, 8))
    monkeypatch.setattr(type(program), "run_decompositions", None)
    made = decompose(program)
    targets = {str(n.target) for n in made.graph.nodes if n.op == "call_function"}
    assert not targets & {"aten.reshape.default", "aten.contiguous.default", "aten.to.dtype", "aten.flatten.using_ints"}
    x = torch.randn(3, 5, 8)
    assert torch.equal(made.module()(x), Composite()(x))


class Writes(nn.Module):
    """An op that writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(x.shape[0], -1)
        y.add_(1)
        return y


def test_writes_take_the_long_way() -> None:
    """Graphs that write to tensors are made functional by torch.export."""
    made = decompose(exported(Writes(), torch.randn(2, 6, 8)))
    written = [
        str(n.target) for n in made.graph.nodes if getattr(n.target, "_schema", None) and n.target._schema.is_mutable
    ]
    assert set(written) <= {"aten.copy_.default"}  # what it says about its input
