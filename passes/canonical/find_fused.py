"""Finds attention that is one op: our own, scaled_dot_product_attention and flex_attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import get_attr, shape_of, tensor_of
from kvrewrite.passes.canonical.apart import why_not
from kvrewrite.passes.canonical.biases import Bias, check_known, classify, classify_everywhere, fit, once, shared_probe
from kvrewrite.passes.canonical.learned import Live, Values, find_live, with_learned
from kvrewrite.passes.canonical.operands import (
    SMALL_BATCH,
    SMALL_LENGTH,
    Attention,
    NoAttention,
    Operand,
    Unrepeated,
    check_operands,
    mentions,
    module_of,
    repeats,
)
from kvrewrite.passes.canonical.probe import FAILURES, ProbeError, run_op, subgraph_text, value_inputs


def find_own(captured: Captured, node: fx.Node) -> Attention:
    args: Any = node.args
    q, k, v, sinks, alibi, scale, softcap, window, chunk = args
    return Attention(
        anchor=node,
        replaced=node,
        module=module_of(node),
        source="interface",
        q=_plain(q),
        k=_plain(k),
        v=_plain(v),
        heads=int(shape_of(q)[1]),
        kv_heads=int(shape_of(k)[1]),
        scale=float(scale),
        softcap=float(softcap),
        window=int(window),
        chunk=int(chunk),
        sinks=sinks if isinstance(sinks, fx.Node) else None,
        slopes_node=(alibi, False) if isinstance(alibi, fx.Node) else None,
        out_order=(0, 1, 2, 3),
    )


def _plain(node: fx.Node) -> Operand:
    return Operand(node, tuple(range(len(shape_of(node)))))


def find_sdpa(captured: Captured, node: fx.Node) -> Attention:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v = given["query"], given["key"], given["value"]
    mask = given.get("attn_mask")
    if given.get("dropout_p"):
        raise NoAttention(f"it applies dropout ({given['dropout_p']}) in eval mode, so its result is random")
    if mask is None and not given.get("is_causal"):
        raise NoAttention("the attention is not causal (no mask and is_causal=False)")
    heads, kv_heads = check_operands(captured, q, k, v)
    window = chunk = 0
    slopes = slopes_node = by_head = None
    if mask is not None:
        behind = value_inputs([mask])
        check_known(captured, behind)

        def added_at(batch: int, length: int, values: Values | None = None, positions: Tensor | None = None) -> Tensor:
            added: Tensor = shared_probe(captured, batch, length, values, positions)(mask)
            if added.dtype == torch.bool:
                added = torch.zeros(added.shape, dtype=torch.float64).masked_fill(~added, -math.inf)
            if given.get("is_causal"):
                added = added + torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)
            if added.dim() == 3 and len(shape_of(q)) == 3 and added.shape[0] not in (1, batch):
                added = added.reshape(batch, heads, *added.shape[1:])
            while added.dim() < 4:
                added = added[None]
            return added.expand(added.shape[0], added.shape[1], length, length)

        live = find_live(captured, behind, None, lambda b, s, values: lambda x: x + added_at(b, s, values), heads)
        heads_of_mask = shape_of(mask)[-3] if len(shape_of(mask)) > 2 else 1
        planes = heads_of_mask if isinstance(heads_of_mask, int) else heads

        def classified() -> Bias:
            far = why_not(captured, behind) is None
            classify(added_at(SMALL_BATCH, SMALL_LENGTH))
            return classify_everywhere(captured, behind, planes, lambda n, at: added_at(1, n, None, at), far)

        bias = once(captured, f"{heads} {given.get('is_causal')} {subgraph_text(captured, [mask])}", classified)
        window, chunk, by_head, slopes_node = bias.window, bias.chunk, bias.by_head, live.slopes
        slopes = with_learned(bias.slopes, live, heads)
    scale = given.get("scale")
    groups = 1
    unrepeated: Unrepeated = (None, None)
    kv_op = _plain(k), _plain(v)
    if heads == kv_heads:
        groups, unrepeated = repeats(captured, *kv_op, heads)
    rank = len(shape_of(q))
    return Attention(
        anchor=node,
        replaced=node,
        module=module_of(node),
        source="sdpa",
        q=_plain(q),
        k=kv_op[0],
        v=kv_op[1],
        heads=heads,
        kv_heads=kv_heads // groups,
        scale=float(scale) if scale is not None else float(int(shape_of(q)[-1]) ** -0.5),
        window=window,
        chunk=chunk,
        by_head=by_head,
        groups=groups,
        slopes=slopes,
        slopes_node=slopes_node,
        unrepeated=unrepeated,
        out_order=tuple(range(rank)),
    )


def find_flex(captured: Captured, node: fx.Node) -> Attention:
    args: Any = node.args
    q, k, v, score_mod, block_mask, scale = args[:6]
    score_buffers: Any = args[7] if len(args) > 7 else ()
    mask_buffers: Any = args[8] if len(args) > 8 else ()
    mask_mod = block_mask[-1]
    heads, kv_heads = check_operands(captured, q, k, v)
    out = [u for u in node.users if u.args[1:] == (0,)]
    if len(out) != 1 or len(node.users) != 1:
        raise NoAttention("flex_attention's log-sum-exp is used by the model")
    buffers = [b for b in (*score_buffers, *mask_buffers) if isinstance(b, fx.Node)]
    behind = value_inputs(buffers)
    check_known(captured, behind)
    graphs = [get_attr(captured.graph, str(g.target)) for g in (score_mod, mask_mod)]
    inner = {n for g in graphs for n in g.graph.nodes}

    live = Live()

    def chain_at(
        batch: int, length: int, given: Values | None = None, positions: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        probe = shared_probe(captured, batch, length, live.given if given is None else given, positions)
        tokens = torch.arange(length) if positions is None else positions
        index = [
            at.reshape([-1 if i == d else 1 for i in range(4)])
            for d, at in enumerate((torch.arange(batch), torch.arange(heads), tokens, tokens))
        ]
        read = [[probe(b) if isinstance(b, fx.Node) else b for b in bs] for bs in (score_buffers, mask_buffers)]

        def chain(scores: Tensor) -> Tensor:
            logits = _run_subgraph(graphs[0], [scores * scale, *index, *read[0]])
            keep = _run_subgraph(graphs[1], [*index, *read[1]])
            return torch.where(keep, logits.expand(batch, heads, length, length), -math.inf)

        return chain

    live = find_live(captured, behind, None, chain_at, heads)
    # The functions read their buffers at the indices of tokens.
    whole = [b.name for b in buffers if tensor_of(b) is not None and any(mentions(captured, s) for s in shape_of(b))]
    far = not any(why_not(captured, nodes) for nodes in (behind, {n for n in inner if n.op == "call_function"}))

    def added_at(length: int, positions: Tensor | None) -> Tensor:
        return chain_at(1, length, None, positions)(torch.zeros(1, heads, length, length, dtype=torch.float64))

    bias = classify_everywhere(captured, behind | inner, heads, added_at, far and not whole)
    small = (SMALL_BATCH, heads, SMALL_LENGTH, SMALL_LENGTH)
    classify(chain_at(SMALL_BATCH, SMALL_LENGTH)(torch.zeros(small, dtype=torch.float64)))
    found = fit(chain_at(SMALL_BATCH, SMALL_LENGTH), small, SMALL_LENGTH)
    groups, unrepeated = repeats(captured, _plain(k), _plain(v), heads) if heads == kv_heads else (1, (None, None))
    return Attention(
        anchor=node,
        replaced=out[0],
        module=module_of(node),
        source="flex_attention",
        q=_plain(q),
        k=_plain(k),
        v=_plain(v),
        heads=heads,
        kv_heads=kv_heads // groups,
        scale=found.scale,
        softcap=found.softcap,
        window=bias.window,
        chunk=bias.chunk,
        by_head=bias.by_head,
        groups=groups,
        slopes=with_learned(bias.slopes, live, heads),
        slopes_node=live.slopes,
        factors=live.factors,
        unrepeated=unrepeated,
        out_order=(0, 1, 2, 3),
    )


def _run_subgraph(gm: fx.GraphModule, inputs: list[Any]) -> Tensor:
    """Evaluates a score or mask function on whole tensors of indices instead of single ones."""
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = get_attr(gm, str(node.target))
        elif node.op == "output":
            result = fx.node.map_arg(node.args[0], lambda n: values[n])
            return result[0] if isinstance(result, (tuple, list)) else result
        else:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
            try:
                values[node] = run_op(node, args, kwargs)
            except FAILURES as error:
                raise ProbeError(f"a score or mask function could not be evaluated: {error}") from error
    raise ProbeError("a score or mask function has no output")
