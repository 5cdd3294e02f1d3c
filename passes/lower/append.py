"""Lowering for single tokens that only join the cache: nothing goes, nothing is scored, the pools are read and not
written.

Requires a graph after `insert_cache` of a policy with `rates_prompts_only`, with original positions and slots in full
precision. Ensures the same logits up to rounding, and that the graph's results are (logits, the new tokens' keys of
each cache class, their values): (B, 1, vocabulary) and (layers, B, Hkv, 1, D). Writing them down is the caller's, for
all layers at once. What only scores needed is gone with the updates.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kvrewrite.ir.fx import arg, erase_dead, is_op, output_node, shape_of, tensor_of
from kvrewrite.ir.layout import CacheClass, InputMaker, dense_inputs, spec_of
from kvrewrite.passes.lower.decode import fuse_mass, take_the_only_row
from kvrewrite.passes.lower.match import calls, lowered, view_of

ops = torch.ops.kvrewrite
aten = torch.ops.aten


def lower_append(gm: fx.GraphModule, classes: list[CacheClass], dense: bool) -> fx.GraphModule:
    """A copy for one token per row. classes: of its caches. dense: attention is torch's own ops on inputs
    `k_slots_{c}` and `v_slots_{c}` (layers, B, Hkv, C, D), for Inductor to fuse; else it reads pages, by its kernel."""

    def return_newcomers(copy: fx.GraphModule) -> None:
        _return_newcomers(copy, classes)

    def attend_densely(copy: fx.GraphModule) -> None:
        _attend_densely(copy, classes)

    steps = [return_newcomers, attend_densely if dense else fuse_mass, take_the_only_row, erase_dead]
    return lowered(gm, "append_", steps)


def _class_and_layer(table: Any) -> tuple[int, int]:
    """The class and the layer in it of a page table's view."""
    source, layer = view_of(table)
    spec = spec_of(source)
    assert spec is not None and spec.cls is not None
    return spec.cls, layer


def _return_newcomers(gm: fx.GraphModule, classes: list[CacheClass]) -> None:
    """Updates make way for results."""
    found: dict[tuple[int, int], tuple[Any, Any]] = {}
    for node in calls(gm, ops.cache_update.default):
        found[_class_and_layer(arg(node, "table"))] = (arg(node, "k"), arg(node, "v"))
        gm.graph.erase_node(node)
    output = output_node(gm)
    results: list[Any] = [output.args[0]]
    with gm.graph.inserting_before(output):
        for which in range(2):
            for c, spec in enumerate(classes):
                each = [found[c, layer][which] for layer in range(len(spec.layers))]
                results.append(gm.graph.call_function(aten.stack.default, (each,)))
    output.args = (tuple(results),)
    erase_dead(gm)


def _attend_densely(gm: fx.GraphModule, classes: list[CacheClass]) -> None:
    """Attention of one token on the live slots and on itself, the query heads of a group side by side as rows of one
    product.

    What dead slots hold is finite: zeros, or what was alive once. So a weight of 0 is enough to leave it out."""
    add, inputs = InputMaker(gm), {}

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return gm.graph.call_function(target, args, kwargs)

    for node in calls(gm, ops.cached_attention.default):
        q, k, v, sinks = (arg(node, name) for name in ("q", "k", "v", "sinks"))
        scale, softcap = arg(node, "scale"), arg(node, "softcap")
        c, layer = _class_and_layer(arg(node, "table"))
        if c not in inputs:
            inputs[c] = [add(spec) for spec in dense_inputs(c, classes[c], tensor_of(v).dtype)]  # type: ignore[union-attr]
        *slots, live = inputs[c]
        out_dtype = tensor_of(q).dtype  # type: ignore[union-attr]
        _, heads, _, dim = shape_of(q)
        _, kv_heads, _, v_dim = shape_of(v)
        with gm.graph.inserting_before(node):
            k_cached, v_cached = (call(aten.select.int, x, 0, layer) for x in slots)
            rows = call(aten.reshape.default, q, [-1, kv_heads, heads // kv_heads, dim])
            far = call(aten.matmul.default, rows, call(aten.transpose.int, k_cached, 2, 3))
            own = call(aten.sum.dim_IntList, call(aten.mul.Tensor, _wide(call, rows), _wide(call, k)), [-1], True)
            near = [_capped(call, call(aten.mul.Scalar, _wide(call, x), scale), softcap) for x in (far, own)]
            hidden = call(aten.where.ScalarOther, live, near[0], float("-inf"))
            most = call(aten.maximum.default, call(aten.amax.default, hidden, [-1], True), near[1])
            extra = None
            if sinks is not None:
                extra = call(aten.reshape.default, _wide(call, sinks), [1, kv_heads, heads // kv_heads, 1])
                most = call(aten.maximum.default, most, extra)
            weights = call(aten.exp.default, call(aten.sub.Tensor, hidden, most))
            mine = call(aten.exp.default, call(aten.sub.Tensor, near[1], most))
            whole = call(aten.add.Tensor, call(aten.sum.dim_IntList, weights, [-1], True), mine)
            if extra is not None:
                whole = call(aten.add.Tensor, whole, call(aten.exp.default, call(aten.sub.Tensor, extra, most)))
            seen = call(aten.matmul.default, call(aten.to.dtype, weights, tensor_of(v).dtype), v_cached)  # type: ignore[union-attr]
            value = call(aten.add.Tensor, _wide(call, seen), call(aten.mul.Tensor, mine, _wide(call, v)))
            value = call(aten.to.dtype, call(aten.div.Tensor, value, whole), out_dtype)
            value = call(aten.reshape.default, value, [-1, heads, 1, v_dim])
        for user in list(node.users):
            assert is_op(user, operator.getitem)
            if user.args[1] == 0:
                user.replace_all_uses_with(value)
        gm.graph.eliminate_dead_code()


def _wide(call: Any, x: Any) -> Any:
    return call(aten.to.dtype, x, torch.float32)


def _capped(call: Any, logits: Any, softcap: Any) -> Any:
    if not softcap:
        return logits
    return call(aten.mul.Scalar, call(aten.tanh.default, call(aten.mul.Scalar, logits, 1 / softcap)), softcap)
