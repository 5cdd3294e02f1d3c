"""Fused linear layers: which there are in each family, and the same bits on the CPU as the graph that was fused."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from kvrewrite.ir.fx import set_attr
from kvrewrite.ops.linear import ACTIVATIONS, MAX_WEIGHTS, gated_linear, linear_add, linears
from kvrewrite.passes.lower.fold_heads import fold_heads
from kvrewrite.passes.lower.fuse_linears import fuse_linears
from tests.support.rewritten import captured, original, own, rewrite

aten, ops = torch.ops.aten, torch.ops.kvrewrite
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = 2
LOCRET: dict[str, Any] = {"budget": 20, "stabilizers": 4, "chunk": 16, "local_tail": 4}


def count(gm: fx.GraphModule, target: Any) -> int:
    return sum(n.target == target for n in gm.graph.nodes)


def sizes(gm: fx.GraphModule) -> list[int]:
    """How many weights each group has."""
    return [len(n.args[1]) for n in gm.graph.nodes if n.target == ops.linears.default]  # type: ignore[arg-type]


def with_biases(model: nn.Module) -> nn.Module:
    """transformers starts biases at zero, which would hide that one is lost."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def trace(model: Any, length: int = 41, steps: int = 6) -> tuple[list[Tensor], list[Any]]:
    """Logits of a prompt and of single tokens, and what was kept."""
    generator = torch.Generator().manual_seed(0)
    text = torch.stack([torch.randperm(96, generator=generator)[: length + steps] + 1 for _ in range(2)])
    cache, logits = model.new_cache(2), []
    for part in [text[:, :length], *text[:, length:].split(1, dim=1)]:
        logits.append(model(part, past_key_values=cache).logits)
    return logits, cache.positions()


# family -> (groups, gates, adds, linears that are left) per layer, and those left besides (lm_head)
FAMILIES: dict[str, tuple[int, int, int, int]] = {
    "llama": (1, 1, 2, 0),
    "qwen2": (1, 1, 2, 0),
    "qwen3": (1, 1, 2, 0),
    "phi3": (0, 0, 2, 2),
    "gemma2": (1, 1, 0, 2),
    "mixtral": (1, 0, 1, 1),
    "gpt2": (0, 0, 0, 0),
    "gpt_neox": (0, 0, 1, 3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_as_before(family: str) -> None:
    model, source = own(family)
    with_biases(model)
    before, after = (rewrite(model, source, "h2o", None, budget=16) for _ in range(2))
    all_linears = count(before.graph_module, aten.linear.default)
    groups, gates, adds, left = FAMILIES[family]
    fused = fuse_linears(after.graph_module)
    gm = after.graph_module
    assert fused == all_linears - count(gm, aten.linear.default)
    assert sizes(gm) == [3] * groups * LAYERS
    assert count(gm, ops.gated_linear.default) == gates * LAYERS
    assert count(gm, ops.linear_add.default) == adds * LAYERS
    assert count(gm, aten.linear.default) == left * LAYERS + 1
    (ours, kept), (theirs, kept_before) = trace(after), trace(before)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and kept == kept_before
    assert fuse_linears(gm) == 0


def test_singles() -> None:
    """With `singles` nothing is left."""
    before, after = (rewrite(original("llama"), captured("llama"), "h2o", None, budget=16) for _ in range(2))
    fuse_linears(after.graph_module, singles=True)
    assert count(after.graph_module, aten.linear.default) == 0 and sizes(after.graph_module) == [3, 3, 1]
    expected = trace(before)
    got = trace(after)
    assert got[1] == expected[1] and all(torch.equal(a, b) for a, b in zip(got[0], expected[0], strict=True))


def test_folded_heads_go_along() -> None:
    """A folded retaining head is the fourth linear of the hidden states, its parameter's node moved in front of them."""
    model = rewrite(original("llama"), captured("llama"), "locret", None, **LOCRET)
    plain = rewrite(original("llama"), captured("llama"), "locret", None, **LOCRET)
    for each in (model, plain):
        fold_heads(each.graph_module)
    fuse_linears(model.graph_module)
    assert sizes(model.graph_module) == [4] * LAYERS
    (ours, kept), (theirs, kept_before) = trace(model), trace(plain)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and kept == kept_before


# ---------------------------------------------------------------------------------------------------------- small graphs
class Builder:
    """A graph with one input x (2, 3, 8) and weights (8, 8) made on demand."""

    def __init__(self) -> None:
        self.root, self.graph = nn.Module(), fx.Graph()
        self.x = self.value(self.graph.placeholder("x"), torch.empty(2, 3, 8))

    def value(self, node: fx.Node, val: Tensor) -> fx.Node:
        node.meta["val"] = val
        return node

    def weight(self, name: str, value: Tensor | None = None) -> fx.Node:
        if not hasattr(self.root, name):
            set_attr(self.root, name, nn.Parameter(torch.randn(8, 8) if value is None else value))
        return self.graph.get_attr(name)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.value(self.graph.call_function(target, args, kwargs), torch.empty(2, 3, 8))

    def linear(self, x: fx.Node, name: str, value: Tensor | None = None) -> fx.Node:
        return self.call(aten.linear.default, x, self.weight(name, value))

    def done(self, *outputs: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The graph and a copy of it."""
        self.graph.output(outputs)
        gm = fx.GraphModule(self.root, self.graph)
        return gm, copy.deepcopy(gm)


def check(gm: fx.GraphModule, before: fx.GraphModule, expected: int) -> None:
    assert fuse_linears(gm) == expected
    x = torch.randn(2, 3, 8)
    assert all(torch.equal(a, b) for a, b in zip(gm(x), before(x), strict=True))


def test_more_than_one_launch_takes() -> None:
    b = Builder()
    gm, before = b.done(*(b.linear(b.x, f"w{i}") for i in range(MAX_WEIGHTS + 3)))
    check(gm, before, MAX_WEIGHTS + 3)
    assert sizes(gm) == [MAX_WEIGHTS, 3]


def test_a_chain_is_not_a_group() -> None:
    """Linears of different inputs stay, and so does a weight that is computed or transposed."""
    b = Builder()
    first = b.linear(b.x, "w0")
    second = b.linear(first, "w1")
    computed = b.call(aten.linear.default, b.x, b.call(aten.mul.Tensor, b.weight("w2"), 2.0))
    transposed = b.linear(b.x, "w3", torch.randn(8, 8).T)
    check(*b.done(second, computed, transposed), 0)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gate(name: str, swapped: bool) -> None:
    b = Builder()
    target = aten.silu.default if name == "silu" else aten.gelu.default
    kwargs = {"approximate": "tanh"} if name == "gelu_tanh" else {}
    active, up = b.call(target, b.linear(b.x, "gate"), **kwargs), b.linear(b.x, "up")
    gm, before = b.done(b.call(aten.mul.Tensor, *((up, active) if swapped else (active, up))))
    check(gm, before, 2)
    assert count(gm, ops.gated_linear.default) == 1


def test_what_is_read_elsewhere_is_no_gate() -> None:
    b = Builder()
    gate, up = b.linear(b.x, "gate"), b.linear(b.x, "up")
    gm, before = b.done(b.call(aten.mul.Tensor, b.call(aten.silu.default, gate), up), gate)
    check(gm, before, 2)
    assert count(gm, ops.gated_linear.default) == 0 and sizes(gm) == [2]


def test_sums() -> None:
    """Of two linears the later one takes the other as its residual; a sum with itself, a scaled or a broadcast one stays."""
    b = Builder()
    doubled = b.linear(b.x, "w0")
    doubled = b.call(aten.add.Tensor, doubled, doubled)
    scaled = b.call(aten.add.Tensor, doubled, b.linear(doubled, "w1"), alpha=2)
    row = b.value(b.weight("w2", torch.randn(8)), torch.empty(8))
    broadcast = b.call(aten.add.Tensor, b.linear(scaled, "w3"), row)
    first, second = b.linear(broadcast, "w4"), b.linear(b.call(aten.silu.default, broadcast), "w5")
    gm, before = b.done(b.call(aten.add.Tensor, first, second))
    check(gm, before, 1)
    (node,) = (n for n in gm.graph.nodes if n.target == ops.linear_add.default)
    assert node.args[1].target == "w5" and node.args[3].target == aten.linear.default


def test_an_input_that_is_written_to_stays() -> None:
    """x is a view of a state that an op mutates between its two readers."""
    graph, root = fx.Graph(), nn.Module()
    names = ("q", "k", "v", "k_state", "v_state", "positions", "valid")
    inputs = {n: graph.placeholder(n) for n in names}
    x = graph.call_function(aten.select.int, (inputs["k_state"], 1, 0))
    for name in ("w0", "w1"):
        set_attr(root, name, nn.Parameter(torch.randn(8, 8)))
    first = graph.call_function(aten.linear.default, (x, graph.get_attr("w0")))
    graph.call_function(ops.gate.default, (*inputs.values(), 2))
    second = graph.call_function(aten.linear.default, (x, graph.get_attr("w1")))
    graph.output((first, second))
    assert fuse_linears(fx.GraphModule(root, graph)) == 0


# ---------------------------------------------------------------------------------------------------------- the ops
def test_ops() -> None:
    x, ws = torch.randn(2, 1, 8, device=DEVICE), [torch.randn(n, 8, device=DEVICE) for n in (5, 3)]
    biases = [None, torch.randn(3, device=DEVICE)]
    residual = torch.randn(2, 1, 5, device=DEVICE)
    torch.library.opcheck(linears, (x, ws, biases))
    torch.library.opcheck(linear_add, (x, ws[0], None, residual))
    torch.library.opcheck(linear_add, (x, ws[1], biases[1], residual[..., :3]))
    for name in ACTIVATIONS:
        torch.library.opcheck(gated_linear, (x, ws[0], ws[0] * 2, name))
    assert [o.shape for o in linears(x, ws, biases)] == [(2, 1, 5), (2, 1, 3)]


def test_the_fused_graph_exports() -> None:
    """Lists of tensors and of optional ones pass torch.export, with dynamic sizes."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            a, b = ops.linears(x, [self.w, self.w], [None, self.b])
            return operator.add(a, b)

    model, rows = Model(), torch.export.Dim("rows", min=1)
    exported = torch.export.export(model, (torch.randn(3, 8),), dynamic_shapes=({0: rows},)).module()
    x = torch.randn(7, 8)
    assert torch.equal(exported(x), model(x))
