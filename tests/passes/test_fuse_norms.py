"""Norms in the linears behind them, and what else a decode step takes together: which there are, and the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from kvrewrite.capture.frontend import capture
from kvrewrite.ir.fx import set_attr
from kvrewrite.ops.dispatch import kernels
from kvrewrite.passes.lower.decode import lower_decode
from kvrewrite.passes.lower.fuse_linears import fuse_linears
from kvrewrite.passes.lower.fuse_norms import fuse_norms
from kvrewrite.passes.lower.prompt import fold
from kvrewrite.passes.pipeline import canonical
from tests.passes.test_fuse_linears import count, trace, with_biases
from tests.support.rewritten import build, captured, original, rewrite

aten, ops = torch.ops.aten, torch.ops.kvrewrite
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = 2
LOCRET: dict[str, Any] = {"budget": 20, "stabilizers": 4, "chunk": 16, "local_tail": 4}

# family -> (norms that go into linears, norms that stay) in all; gathering for the logits keeps the last one here
FAMILIES = {"llama": (4, 1), "gemma2": (0, 9)}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        pytest.param("llama", torch.bfloat16, marks=pytest.mark.thorough),
        ("gemma2", torch.bfloat16),
    ],
)
def test_same_bits_as_before(family: str, dtype: torch.dtype) -> None:
    """Gains that differ from 1, in the order of roundings that the model has."""
    model = with_biases(build(family)).to(dtype)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    source = capture(model)
    canonical(source)
    before, after = (rewrite(model, source, "h2o", None, budget=16) for _ in range(2))
    gone, left = FAMILIES[family]
    fuse_linears(after.graph_module, singles=True)
    assert fuse_norms(after.graph_module) == gone
    assert count(after.graph_module, aten.rsqrt.default) == left
    (ours, kept), (theirs, kept_before) = trace(after, steps=2), trace(before, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and kept == kept_before
    assert fuse_norms(after.graph_module) == 0


def names(gm: fx.GraphModule) -> list[str]:
    """What a graph calls, besides views."""
    views = ("reshape", "transpose", "select", "getitem", "sym_size", "unsqueeze", "slice", "expand", "view")
    called = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    return [n.split(".")[1] for n in called if not any(v in n for v in views)]


def test_launches_of_a_layer() -> None:
    """With Locret seven, all of them ours; the last norm goes into the vocabulary's linear."""
    model = rewrite(original("llama"), captured("llama"), "locret", None, **LOCRET)
    found = names(lower_decode(fold(model.graph_module), keys_rotated=True))
    layer = ["decode_attention", "token_update", "linear_add", "norm_gated_linear", "linear_add", "norm_linears"]
    assert found[-len(layer) * LAYERS :] == layer * LAYERS and "rsqrt" not in found


def test_heads_with_budgets_of_their_own() -> None:
    """Their update is the kernel's, too: pages are dealt at the end of a prompt only."""
    model = rewrite(original("llama"), captured("llama"), "adakv", None, budget=16, window=6, kernel=3)
    gm = lower_decode(fold(model.graph_module), keys_rotated=False)
    updates = [n for n in gm.graph.nodes if n.target in (ops.cache_update.default, ops.token_update.default)]
    assert len(updates) == LAYERS
    for node in updates:
        assert node.target == ops.token_update.default or node.args[20:23] == (None, None, None)


def norm_graph(**changes: Any) -> fx.GraphModule:
    """linear(gain * x / sqrt(mean(x^2) + eps)), or something like it."""
    root, g = nn.Module(), fx.Graph()
    x = g.placeholder("x")
    x.meta["val"] = torch.empty(2, 1, 8)
    set_attr(root, "gain", nn.Parameter(torch.randn(changes.get("width", 8))))
    set_attr(root, "w", nn.Parameter(torch.randn(8, 8)))

    def call(target: Any, *args: Any) -> fx.Node:
        node = g.call_function(target, args)
        node.meta["val"] = torch.empty(2, 1, 8)
        return node

    squares = call(aten.pow.Tensor_Scalar, x, changes.get("power", 2))
    mean = call(aten.mean.dim, squares, changes.get("dims", [-1]), True)
    scale = call(aten.rsqrt.default, call(aten.add.Tensor, mean, 1e-5))
    other = call(aten.relu.default, x) if changes.get("other") else x
    normed = call(aten.mul.Tensor, call(aten.mul.Tensor, other, scale), g.get_attr("gain"))
    out = call(aten.linear.default, normed, g.get_attr("w"))
    g.output((out, normed) if changes.get("shown") else (out,))
    return fx.GraphModule(root, g)


@pytest.mark.parametrize(
    ("changes", "fused"),
    [({}, 1), ({"power": 3}, 0), ({"dims": [1]}, 0), ({"other": True}, 0), ({"shown": True}, 0), ({"width": 1}, 0)],
)
def test_what_is_a_norm(changes: dict[str, Any], fused: int) -> None:
    gm = norm_graph(**changes)
    x = torch.rand(2, 1, 8)
    expected = gm(x)
    fuse_linears(gm, singles=True)
    assert fuse_norms(gm) == fused
    assert all(torch.equal(a, b) for a, b in zip(gm(x), expected, strict=True))


def test_kernels_in_a_graph() -> None:
    """A lowered decode step with Locret's own ops, with all kernels, against their references."""
    x, gain, w = torch.randn(2, 1, 8, device=DEVICE), torch.rand(8, device=DEVICE), torch.randn(5, 8, device=DEVICE)
    expected = ops.norm_linears(x.double(), gain.double(), 1e-5, [w.double()], [None])
    expected.append(ops.norm_gated_linear(x.double(), gain.double(), 1e-5, w.double(), w.double(), "silu"))
    with kernels("fused"):
        got = ops.norm_linears(x, gain, 1e-5, [w], [None])
        got.append(ops.norm_gated_linear(x, gain, 1e-5, w, w, "silu"))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_what_attention_may_read_early() -> None:
    """Its cache, where nothing in the step has written to it: not what another layer has just cached."""
    model = rewrite(original("llama"), captured("llama"), "knorm", None, budget=16)
    folded = fold(model.graph_module)

    def early() -> list[Any]:
        gm = lower_decode(folded, keys_rotated=False)
        return [n.args[21] for n in gm.graph.nodes if n.target == ops.decode_attention.default]

    assert early() == [True, True]
    first, second = (n for n in folded.graph.nodes if n.target == ops.cached_attention.default)
    for i in (7, 8):  # table and lens, as a layer has them that keeps no keys of its own
        second.update_arg(i, first.args[i])
    assert early() == [True, False]
