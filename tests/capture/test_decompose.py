"""Composite ops taken apart one by one give the graph that torch.export's own decomposition gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvrewrite.capture.export
from kvrewrite.capture.captured import Captured
from kvrewrite.capture.decompose import decompose
from kvrewrite.capture.frontend import capture
from kvrewrite.capture.functionalize import functionalize
from kvrewrite.ir.fx import fingerprint, mutates
from kvrewrite.passes.pipeline import canonical
from tests.support.rewritten import build


def shapes(captured: Captured) -> list[str]:
    """Shape and dtype of what every node is known to produce."""
    values = [n.meta.get("val") for n in captured.graph.graph.nodes]
    return [f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else str(v) for v in values]


# Two frontends: transformers' (thorough: longrope with chunks), and nn.MultiheadAttention.
@pytest.mark.parametrize("name", ["gpt2", pytest.param("phi3", marks=pytest.mark.thorough), "TorchMHA"])
def test_same_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ops in the same order after canonicalization, with the same shapes, modules and inputs."""
    model, found = build(name), []
    for own in (False, True):
        if not own:
            monkeypatch.setattr(kvrewrite.capture.export, "decompose", lambda program: program.run_decompositions({}))
        else:
            monkeypatch.setattr(kvrewrite.capture.export, "decompose", decompose)
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


class WritesInput(nn.Module):
    """An op that writes to its input, through a view."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(x.shape[0], -1)
        y.add_(1)
        return y


class WritesViews(nn.Module):
    """Writes to fresh memory, and what was made of it before is read behind them."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        first, turned, same = y[:, 0], y.transpose(1, 2), y.detach()
        first.add_(x[:, 1])  # y, turned and same change with it
        turned[:, 1:].mul_(same.transpose(1, 2)[:, 1:] + 1)
        y.select(2, 0).unsqueeze(1).copy_(x[:, None, :, 3])
        z = torch.zeros_like(y).permute(2, 0, 1)
        z[x[0, :, 0].argsort() % 8] = turned.permute(1, 0, 2)[:1]
        y += z.permute(1, 2, 0)  # first is another value now
        halves = y.chunk(2, -1)
        y.div_(1 + first.abs().sum())
        return torch.cat([*halves, y, same, turned.transpose(1, 2), first[:, None].expand_as(y)], -1)


class WritesDiagonal(nn.Module):
    """A write through a view of a kind that is not known, behind one that is."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 1:].add_(1)
        y.diagonal(0, 1, 2).mul_(3)
        return y + x


class WritesRounded(nn.Module):
    """A write that rounds: the functional op has another dtype."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.mul_(torch.full_like(x, 1 / 3, dtype=torch.float64))
        return y


def writes(program: Any) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if mutates(n)}


def test_writes_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """In-place ops on fresh memory become functional without the long way; views made before a write see it."""
    long = exported(WritesViews(), torch.randn(2, 6, 8)).run_decompositions({})
    program = exported(WritesViews(), torch.randn(2, 6, 8))
    assert len(writes(program)) > 4
    monkeypatch.setattr(type(program), "run_decompositions", None)
    made = decompose(program)
    assert not writes(made) and not any("detach" in str(n.target) for n in made.graph.nodes)
    x = torch.randn(3, 5, 8)
    assert torch.equal(made.module()(x), WritesViews()(x)) and torch.equal(made.module()(x), long.module()(x))


@pytest.mark.parametrize("module", [WritesInput, WritesDiagonal, WritesRounded])
def test_other_writes_take_the_long_way(module: type[nn.Module]) -> None:
    """Where a write is not known the graph stays as it was, and torch.export makes it functional."""
    program = exported(module(), torch.randn(2, 6, 8))
    before, names = fingerprint(program.graph), [n.name for n in program.graph.nodes]
    assert not functionalize(program.graph_module)
    assert fingerprint(program.graph) == before and [n.name for n in program.graph.nodes] == names
    made = decompose(program)
    assert writes(made) <= {"aten.copy_.default"}  # what it says about its input
    x = torch.randn(3, 5, 8)
    assert torch.equal(made.module()(x.clone()), module()(x.clone()))
