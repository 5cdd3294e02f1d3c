"""Folded retaining heads: the same scores and the same kept sets as unfolded, or no folding at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from kvrewrite.capture.frontend import capture
from kvrewrite.ir.fx import get_attr, set_attr
from kvrewrite.passes.lower.fold_heads import fold_heads
from kvrewrite.passes.pipeline import canonical
from kvrewrite.policies.site import PREFIX
from tests.passes.test_fuse_linears import with_biases
from tests.support.rewritten import build, own, rewrite

aten, ops = torch.ops.aten, torch.ops.kvrewrite
LAYERS = 2
LOCRET: dict[str, Any] = {"budget": 20, "stabilizers": 4, "chunk": 16, "local_tail": 4}


class Scores(fx.Interpreter):
    """Runs a rewritten graph and notes the scores that each layer's cache_update got."""

    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm)
        self.seen: list[Tensor] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == ops.cache_update.default:
            self.seen.append(args[2].clone())
        return super().call_function(target, args, kwargs)


def pair(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """A rewritten family twice, with biases that are not zero."""
    if dtype == torch.float32:
        model, source = own(family)
        with_biases(model)
    else:
        model = with_biases(build(family)).to(dtype)
        source = capture(model)
        canonical(source)
    weights = None
    if dtype != torch.float32:
        shapes = rewrite(model, source, "locret", None, **LOCRET).graph_module
        names = [n.target for n in shapes.graph.nodes if n.op == "get_attr" and str(n.target).startswith(PREFIX)]
        generator = torch.Generator().manual_seed(7)
        weights = {}
        for name in names:
            shape = get_attr(shapes, name).shape
            weights[name.removeprefix(PREFIX)] = torch.randn(shape, generator=generator, dtype=dtype) / shape[-1] ** 0.5
        options = {"hidden_size": get_attr(shapes, names[0]).shape[0], **options}
    first, second = (rewrite(model, source, "locret", weights, **LOCRET, **options) for _ in range(2))
    return first, second


def run(model: Any, length: int = 60, steps: int = 5) -> tuple[list[Tensor], Any, Tensor]:
    """Scores by call, kept positions, last logits; of a padded batch, a prompt in chunks and single tokens."""
    generator = torch.Generator().manual_seed(1)
    text = torch.stack([torch.randperm(96, generator=generator)[: length + steps] + 1 for _ in range(2)])
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :7] = 0
    probe = Scores(model.graph_module)
    model.graph_module.forward = probe.run
    cache = model.new_cache(2)
    logits = model(text[:, :length], attention_mask=mask, past_key_values=cache).logits
    for token in text[:, length:].split(1, dim=1):
        logits = model(token, past_key_values=cache).logits
    return probe.seen, cache.positions(), logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gpt_neox"])
def test_same_scores(family: str) -> None:
    """Separate and fused projections, with and without biases; q/k norms come behind what the head reads."""
    plain, folded = pair(family)
    found = fold_heads(folded.graph_module)
    assert [f.weight for f in found] == [f"folded.{i}.weight" for i in range(LAYERS)]
    biased = family in ("qwen2", "gpt_neox")
    assert [f.bias for f in found] == [f"folded.{i}.bias" if biased else None for i in range(LAYERS)]
    assert [f.unused for f in found] == [
        (f"policy_weights.model.layers.{i}.self_attn.fc1.weight",) for i in range(LAYERS)
    ]
    gm = folded.graph_module
    assert all(isinstance(get_attr(gm, n), nn.Parameter) for f in found for n in (f.weight, *f.unused))
    targets = {n.target for n in gm.graph.nodes}
    assert not targets & {n for f in found for n in f.unused}
    (before, kept_before, logits_before), (after, kept_after, logits_after) = run(plain), run(folded)
    assert len(before) == len(after) > LAYERS
    for a, b in zip(before, after, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-5
    assert kept_before == kept_after
    torch.testing.assert_close(logits_after, logits_before, rtol=1e-5, atol=1e-5)
    assert fold_heads(gm) == []


def test_same_scores_in_fp64() -> None:
    """Scores are stored in fp32, so the head's own output is compared here."""
    plain, folded = pair("qwen2", torch.float64)
    assert len(fold_heads(folded.graph_module)) == LAYERS
    weight = get_attr(folded.graph_module, "folded.0.weight")
    assert weight.dtype == torch.float64
    h = torch.randn(3, weight.shape[1], dtype=torch.float64)
    q, k, v = (f"model.layers.0.self_attn.{n}_proj" for n in "qkv")
    side_by_side = [
        nn.functional.linear(h, *(get_attr(plain.graph_module, f"{n}.{p}") for p in ("weight", "bias")))
        for n in (q, k, v)
    ]
    w1 = get_attr(plain.graph_module, PREFIX + "model.layers.0.self_attn.fc1.weight")
    expected = nn.functional.linear(torch.cat(side_by_side, -1), w1)
    got = nn.functional.linear(h, weight, get_attr(folded.graph_module, "folded.0.bias"))
    assert float(((got - expected).norm() / expected.norm()).detach()) < 1e-12
    (before, kept_before, _), (after, kept_after, _) = run(plain), run(folded)
    assert kept_before == kept_after
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7, atol=1e-12)  # one fp32 rounding of numbers 1e-16 apart


def test_other_projections_stay() -> None:
    """gpt2's Conv1D is no linear."""
    _, model = pair("gpt2", positions="original")
    assert fold_heads(model.graph_module) == []
    assert not hasattr(model.graph_module, "folded")


def graph(*, one_input: bool = True, norm: bool = False, width: int = 4, policy: bool = True) -> fx.GraphModule:
    """linear(cat([reshape(linear(h, W)), reshape(linear(g, V))], -1), fc1)."""
    root, g = nn.Module(), fx.Graph()
    h, other = g.placeholder("h"), g.placeholder("other")
    head = PREFIX + "fc1.weight" if policy else "fc1.weight"
    shapes = {"a.weight": (4, 6), "b.weight": (4, 6), head: (5, 8)}
    for name, shape in shapes.items():
        set_attr(root, name, nn.Parameter(torch.randn(shape)))
    rows, parts = g.call_function(aten.sym_size.int, (h, 0)), []
    for name, x in (("a.weight", h), ("b.weight", h if one_input else other)):
        y = g.call_function(aten.linear.default, (x, g.get_attr(name)))
        if norm:
            y = g.call_function(aten.silu.default, (y,))
        parts.append(g.call_function(aten.reshape.default, (y, [rows, -1, width])))
    joined = g.call_function(aten.cat.default, (parts, -1))
    g.output(g.call_function(aten.linear.default, (joined, g.get_attr(head))))
    return fx.GraphModule(root, g)


@pytest.mark.parametrize(
    "options", [{"one_input": False}, {"norm": True}, {"policy": False}, {"width": 4}], ids=lambda o: next(iter(o))
)
def test_what_does_not_fold(options: dict[str, Any]) -> None:
    """Different inputs; something in between; weights of the model itself; reshapes that may regroup channels."""
    gm = graph(**options)
    before = [n.name for n in gm.graph.nodes]
    assert fold_heads(gm) == []
    assert [n.name for n in gm.graph.nodes] == before


def test_the_small_graph_folds() -> None:
    """What the refusals above differ from."""
    gm = graph(width=-1)
    for node in gm.graph.nodes:
        if node.target == aten.reshape.default:
            node.args = (node.args[0], [node.args[1][0], 3, -1])
    gm.recompile()
    h = torch.randn(2, 3, 6)
    expected = gm(h, h)
    (fold,) = fold_heads(gm)
    torch.testing.assert_close(gm(h, h), expected)
    assert fold.weight == "folded.0.weight" and fold.bias is None and get_attr(gm, fold.weight).shape == (5, 6)
    assert not any(n.target == aten.cat.default for n in gm.graph.nodes)
