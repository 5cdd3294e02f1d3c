"""Finds attention that a model writes out: a softmax between two matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import ancestors, dependents, is_op, output_node, shape_of, tensor_of
from kvrewrite.passes.canonical.apart import why_not
from kvrewrite.passes.canonical.biases import (
    Bias,
    Fit,
    check_known,
    classify,
    classify_everywhere,
    fit,
    once,
    shared_probe,
)
from kvrewrite.passes.canonical.contractions import CONTRACTIONS, Contraction, contraction, groups_last
from kvrewrite.passes.canonical.learned import Live, Values, find_live, other_values, with_learned
from kvrewrite.passes.canonical.operands import (
    SMALL_BATCH,
    SMALL_LENGTH,
    Attention,
    NoAttention,
    Operand,
    Unrepeated,
    is_length,
    module_of,
    ratio_of,
    repeats,
)
from kvrewrite.passes.canonical.probe import (
    Probe,
    depends_on_data,
    is_projection,
    only_shape,
    subgraph_text,
    value_inputs,
)

aten = torch.ops.aten


def softmax_dims(node: fx.Node) -> list[int]:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
    return [int(dim)]  # type: ignore[arg-type]


def find_softmax(captured: Captured, node: fx.Node) -> Attention:
    shape = shape_of(node)
    dim = softmax_dims(node)[0] % len(shape)
    if dim != len(shape) - 1:
        raise NoAttention("a softmax over the sequence that is not over its last dim")
    if "log" in node.target._schema.name:  # type: ignore[union-attr]
        raise NoAttention("a log-softmax over the sequence")
    if len(shape) < 3 or not is_length(captured, shape[-2]):
        raise NoAttention("a softmax over the sequence that is not an attention of every token")
    source = node.args[0]
    assert isinstance(source, fx.Node)
    scores = _scores_before(captured, source)
    qk = contraction(scores)
    av_node, weights = _values_after(captured, node)
    qk, av = groups_last(captured, qk, contraction(av_node, left=weights))
    # From here on every use of the scores must end in the product with the values.
    if output_node(captured.graph) in dependents([scores], stop=lambda n: n is av_node):
        raise NoAttention("its scores or weights are used for something else too, so they can't be replaced")
    lead = _scores_lead(captured, scores, qk)
    heads = ratio_of(captured, lead)
    _check_weights(captured, node, weights, heads)
    bias, found, sinks, live = _fold_chain(captured, source, scores, heads)
    *before, features, keys = av.right.order
    kv = qk.right, Operand(av.right.node, (*before, keys, features))
    kv_heads = _operand_heads(captured, kv[0])
    if _operand_heads(captured, kv[1]) != kv_heads:
        kv_heads = heads  # one is repeated in the graph, the other broadcast: both are expanded
    groups = 1
    unrepeated: Unrepeated = (None, None)
    if kv_heads == heads:
        groups, unrepeated = repeats(captured, *kv, heads)
    return Attention(
        anchor=node,
        replaced=av_node,
        module=module_of(av_node),
        source="softmax",
        q=qk.left,
        k=kv[0],
        v=kv[1],
        heads=heads,
        kv_heads=kv_heads // groups,
        scale=found.scale,
        softcap=found.softcap,
        window=bias.window,
        chunk=bias.chunk,
        by_head=bias.by_head,
        groups=groups,
        sinks=sinks,
        slopes=with_learned(bias.slopes, live, heads),
        slopes_node=live.slopes,
        factors=live.factors,
        unrepeated=unrepeated,
        out_order=av.out_order,
    )


def _is_scores(captured: Captured, node: fx.Node) -> bool:
    """Whether `node` is a contraction whose result has two dims of the length."""
    if not is_op(node, *CONTRACTIONS):
        return False
    return sum(is_length(captured, size) for size in shape_of(node)) == 2


def _scores_before(captured: Captured, source: fx.Node) -> fx.Node:
    """Returns the product of queries and keys that `source`, a softmax's input, is made from."""
    stop = lambda n: _is_scores(captured, n) or only_shape(n) or is_projection(n)  # noqa: E731
    found = [n for n in ancestors([source], stop=stop) if _is_scores(captured, n)]
    dependent = [n for n in found if depends_on_data(n)]
    if not dependent:
        raise NoAttention(
            "a softmax over the sequence whose scores are no product of queries and keys: tokens are pooled or gated by it "
            "(compressed keys and values)"
        )
    if len(dependent) > 1:
        raise NoAttention("its scores are the sum of several products (disentangled or relative-position attention)")
    return dependent[0]


def _values_after(captured: Captured, softmax: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Returns the product of weights and values after `softmax`, and the operand that holds the weights."""
    reached = dependents([softmax], stop=lambda n: is_op(n, *CONTRACTIONS))

    def is_weights(n: fx.Node) -> bool:
        return n in reached and sum(is_length(captured, size) for size in shape_of(n)) >= 2

    found = sorted(n for n in reached if is_op(n, *CONTRACTIONS) and any(is_weights(i) for i in n.all_input_nodes))
    if len(found) != 1:
        raise NoAttention(f"{len(found)} products use its weights; expected one, with the values")
    weights = [n for n in found[0].all_input_nodes if n in reached]
    if len(weights) != 1:
        raise NoAttention("both operands of the product with the values depend on the weights")
    others = [n for n in found[0].all_input_nodes if n not in reached]
    if not any(is_length(captured, size) for n in others for size in shape_of(n)):
        raise NoAttention("its weights are mixed between heads before the product with the values (talking heads)")
    return found[0], weights[0]


def _scores_lead(captured: Captured, scores: fx.Node, qk: Contraction) -> tuple[Any, ...]:
    shape = shape_of(scores)
    ordered = [shape[qk.out_order.index(i)] for i in range(len(shape))]
    if not all(is_length(captured, size) for size in ordered[-2:]):
        got = tuple(map(str, shape))
        raise NoAttention(f"its scores have the shape {got}; expected (batch, heads, length, length)")
    return tuple(ordered[:-2])


def _operand_heads(captured: Captured, operand: Operand) -> int:
    """Returns an operand's heads before it is broadcast; its missing dims must be the last ones before the length."""
    shape = shape_of(operand.node)
    lead = tuple(1 if d < 0 else shape[d] for d in operand.order[:-2])
    return ratio_of(captured, lead)


def _check_weights(captured: Captured, softmax: fx.Node, weights: fx.Node, heads: int) -> None:
    """Refuses models that change the weights between the softmax and the product with the values."""
    probe = Probe(captured, SMALL_BATCH, SMALL_LENGTH)
    given = probe.random(softmax)
    expected = given[..., :SMALL_LENGTH]
    behind = ancestors([weights], stop=lambda n: n is softmax or only_shape(n))
    others = other_values(captured, behind, 1)
    for values in ({}, others) if others else ({},):  # with the present parameters, and with others
        got = Probe(captured, SMALL_BATCH, SMALL_LENGTH, {softmax: given, **values})(weights)
        if got.numel() != expected.numel() or not torch.equal(got.reshape(expected.shape), expected):
            raise NoAttention("its weights are changed between the softmax and the product with the values")


def _fold_chain(
    captured: Captured, source: fx.Node, scores: fx.Node, heads: int
) -> tuple[Bias, Fit, fx.Node | None, Live]:
    """Reads off the chain from the scores to `source`, the softmax's input: bias, fit, attention sinks, live parts."""
    behind = ancestors([source], stop=lambda n: n is scores or only_shape(n)) - {scores}
    baddbmm = is_op(scores, aten.baddbmm.default)
    added = scores.args[0] if baddbmm else None
    if isinstance(added, fx.Node):
        behind |= value_inputs([added])
    check_known(captured, behind)

    live = Live()

    def chain_at(
        batch: int, length: int, given: Values | None = None, positions: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        shared = shared_probe(captured, batch, length, live.given if given is None else given, positions)
        outer = {n for n in behind if n not in dependents([scores])}
        known = {n: shared(n) for n in outer if any(u not in outer for u in n.users)}

        def chain(x: Tensor) -> Tensor:
            if baddbmm:
                assert isinstance(added, fx.Node)
                beta, alpha = float(scores.kwargs.get("beta", 1)), float(scores.kwargs.get("alpha", 1))  # type: ignore[arg-type]
                x = beta * shared(added) + alpha * x
            out: Tensor = Probe(captured, batch, length, {**known, scores: x}, positions=positions)(source)
            return out.reshape(batch, heads, length, out.shape[-1])

        return chain

    live = find_live(captured, {n for n in behind if n not in dependents([scores])}, scores, chain_at, heads)

    def added_at(length: int, positions: Tensor | None) -> Tensor:
        shape = Probe(captured, 1, length).shape(scores)
        return chain_at(1, length, None, positions)(torch.zeros(shape, dtype=torch.float64))

    def classified() -> tuple[Bias, Bias, Fit]:
        shape = Probe(captured, SMALL_BATCH, SMALL_LENGTH).shape(scores)
        bias = classify_everywhere(captured, behind, heads, added_at, why_not(captured, behind) is None)
        small = chain_at(SMALL_BATCH, SMALL_LENGTH)
        few = classify(small(torch.zeros(shape, dtype=torch.float64)))
        return bias, few, fit(small, shape, SMALL_LENGTH)

    roots = [source, added] if isinstance(added, fx.Node) else [source]
    # Layers with a learned factor have it set to one in the chain, so their factors may differ.
    factors = [f"{n.name} {value.tolist()}" for n, value in live.given.items()]
    scaling = dict(scores.kwargs) if baddbmm else ""
    what = f"{heads} {factors} {scaling} {subgraph_text(captured, roots, [scores.name])}"
    bias, few, found = once(captured, what, classified)
    sinks = None
    if few.sinks is not None:
        sinks = _holder(shared_probe(captured, SMALL_BATCH, SMALL_LENGTH, live.given), behind, few.sinks)
        if sinks is None:
            raise NoAttention("the scores have an extra column that does not come from one parameter per head")
    return bias, found, sinks, live


def _holder(probe: Probe, nodes: set[fx.Node], values: Tensor) -> fx.Node | None:
    """Returns the earliest of `nodes` that holds `values`, one number per head, in any shape."""
    for node in sorted(nodes):
        value = tensor_of(node)
        if value is None or not value.is_floating_point() or depends_on_data(node):
            continue
        if math.prod(probe.shape(node)) != values.numel():
            continue
        if torch.allclose(probe(node).flatten().to(values.dtype), values, rtol=1e-6, atol=1e-9):
            return node
    return None
