"""Logits where they are asked for only."""

from __future__ import annotations

import torch
from torch import fx

from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import output_node, shape_of

aten = torch.ops.aten
_LOCAL = {
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.tanh.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.alias.default,
    aten.clone.default,
    aten.add.Tensor,
    aten.add.Scalar,
}


def logits_at(gm: fx.GraphModule, logit_index: fx.Node, vocab_size: int, whole: bool = False) -> None:
    """Makes the graph return logits only at `logit_index` (B, K): (B, K, vocabulary).

    The hidden states are gathered before the vocabulary projection if only local ops come after it: at 128K vocabulary
    entries the logits of a whole chunk would be larger than its cache. whole: something else needs all of them, so they
    are gathered at the end.
    """
    output = output_node(gm)
    node: fx.Node = output.args[0]  # type: ignore[assignment]
    head = node
    while head.target in _LOCAL and isinstance(head.args[0], fx.Node) and len(head.all_input_nodes) == 1:
        head = head.args[0]
    early = head.target is aten.linear.default and not whole
    at, user = (head.args[0], head) if early else (node, output)
    if not isinstance(at, fx.Node):
        raise UnsupportedModelError("the graph's output does not depend on its input")
    width = int(shape_of(at)[-1])
    with gm.graph.inserting_before(user):
        index = gm.graph.call_function(aten.unsqueeze.default, (logit_index, 2))
        index = gm.graph.call_function(aten.expand.default, (index, [-1, -1, width]))
        picked = gm.graph.call_function(aten.gather.default, (at, 1, index))
    user.replace_input_with(at, picked)
