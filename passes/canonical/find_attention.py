"""Finds every attention in a captured graph and says what it computes. Only analyses: nothing is changed.

The search starts at anchors (sdpa, softmax, flex_attention, our own op) and walks to the two contractions around the
scores. What happens to the scores between them is not read off the ops: the chain is evaluated on chosen scores. Its
answers give the mask, bias, attention sinks, scale and softcap, or the reason why it is of no known kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import is_op, tensor_of
from kvrewrite.ir.site import NoSite
from kvrewrite.passes.canonical.find_fused import find_flex, find_own, find_sdpa
from kvrewrite.passes.canonical.find_softmax import find_softmax, softmax_dims
from kvrewrite.passes.canonical.operands import Attention, NoAttention, mentions, module_of
from kvrewrite.passes.canonical.probe import ProbeError

aten = torch.ops.aten

SOFTMAX = ("aten::softmax", "aten::_softmax", "aten::_safe_softmax", "aten::log_softmax", "aten::_log_softmax")


def find_attention(captured: Captured) -> Iterator[Attention | NoSite]:
    """Yields every attention of the graph in execution order, or the reason why it can't be rewritten.

    Requires: a normalized graph.
    """
    for node in list(captured.graph.graph.nodes):
        finder = _finder(captured, node)
        if finder is None:
            continue
        try:
            yield finder(captured, node)
        except (NoAttention, ProbeError) as error:
            yield NoSite(node.name, module_of(node), str(error))


def _finder(captured: Captured, node: fx.Node) -> Callable[[Captured, fx.Node], Attention] | None:
    if node.op != "call_function":
        return None
    if is_op(node, torch.ops.kvrewrite.attention.default):
        return find_own
    if is_op(node, aten.scaled_dot_product_attention.default):
        return find_sdpa
    if node.target is torch.ops.higher_order.flex_attention:
        return find_flex
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in SOFTMAX:
        value = tensor_of(node)
        if value is not None and any(mentions(captured, value.shape[d]) for d in softmax_dims(node)):
            return find_softmax
    return None
