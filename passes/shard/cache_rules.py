"""How kvrewrite's own ops treat heads that are dealt out over the ranks.

Every head attends, is scored and is updated for itself, so these ops run on a rank's own heads as they are. What they
read and write of a cache is the rank's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvrewrite.ir.fx import arg, named_args, parameters
from kvrewrite.passes.shard.placement import LOCAL, Placement, Split, Want, even
from kvrewrite.passes.shard.rules import RULES, Answer, Call

ops = torch.ops.kvrewrite

# The dimension of each argument that counts heads; the results' are 1. Arguments that are not listed are whole.
_ATTENTION = {
    "q": 1,
    "k": 1,
    "v": 1,
    "sinks": 0,
    "alibi": 0,
    "hidden": 1,
    "table": 1,
    "lens": 1,
    "k_dense": 1,
    "v_dense": 1,
}
_UPDATE = {
    **dict.fromkeys(
        ("k", "v", "new_scores", "slot_scores", "keep", "table", "lens", "select", "drop", "next_table"), 1
    ),
    **dict.fromkeys(("k_tail", "v_tail", "qlens", "k_cached", "v_cached"), 1),
}
HEADS: dict[Any, dict[str, int]] = {
    ops.cached_attention.default: _ATTENTION,
    ops.observe.default: {"q": 1, "k": 1, "lse": 1, "k_dense": 1, "table": 1, "lens": 1, "alibi": 0, "hidden": 1},
    ops.cache_update.default: {n: d for n, d in _UPDATE.items() if n in parameters(ops.cache_update.default)},
    ops.cache_update_quantized.default: {
        n: d for n, d in _UPDATE.items() if n in parameters(ops.cache_update_quantized.default)
    },
    ops.read_pages.default: {"table": 1},
    ops.read_quantized.default: {"tail": 1, "table": 1, "qlens": 1},
    ops.rotate.default: {"x": 1, "positions": 1},
    ops.slot_rotary.default: {"table": 1, "lens": 1},
    ops.slot_positions.default: {"table": 1, "lens": 1},
    ops.newest_ranks.default: {"positions": 1},
    ops.ranks.default: {"scores": 1, "among": 1},
    ops.uniform.default: {"positions": 1},
    ops.pool_window.default: {"mass": 1},
    ops.key_difference.default: {"keys": 1, "positions": 1},
    ops.expected_attention.default: {"q": 1, "k": 1, "v": 1},
    ops.lag_scores.default: {"k": 1, "v": 1},
    ops.leverage.default: {"keys": 1, "sketch": 0},
    ops.block_column_mass.default: {"q": 1, "k": 1},
    ops.projected_norm.default: {"v": 1, "weight": 1},
    ops.kept_above.default: {"scores": 1, "places": 1, "keep": 1},
    ops.sink_gate.default: {"q": 2, "k": 2, "k_base": 0, "bias": 0},
}
RESULTS = {ops.cached_attention.default: 2, ops.cache_update.default: 0, ops.cache_update_quantized.default: 0}


def heads(call: Call) -> Answer | None:
    """Runs on a rank's own heads."""
    own, given = HEADS[call.target], named_args(call.node)
    anchors = ["table"] if "table" in own else list(own)
    if not any(call.split(given[name]) is not None for name in anchors):
        return None
    wants: dict[fx.Node, Placement] = {}
    for name, value in given.items():
        if not isinstance(value, fx.Node):
            continue
        want: Placement = LOCAL if call.place(value) == LOCAL else None
        if want is None and name in own and (shape := call.shape(value)) is not None:
            want = even(own[name], shape[own[name]], call.ranks)
            if want is None:
                return None
        if wants.setdefault(value, want) != want:  # one tensor in two roles
            return None
    count = RESULTS.get(call.target, 1)
    splits = [Split(1, (shape[1],)) for shape in _shapes(call, count)]
    out: Placement = None if not count else splits[0] if count == 1 else tuple(splits)
    return call.answer(wants.__getitem__, out, inherent=True)


def _shapes(call: Call, count: int) -> list[Any]:
    return [] if not count else [call.out_shape] if count == 1 else list(call.out_shape)


def update(call: Call) -> Answer | None:
    """Heads that compete for their layer's budget need those of all ranks."""
    found = heads(call)
    if found is not None:
        found.shared = arg(call.node, "floor") is not None
    return found


def share_layers(call: Call) -> Answer | None:
    """Every head of every layer competes."""
    given = named_args(call.node)
    wants: dict[fx.Node, Placement] = {}
    for name in ("scores", "places", "keep"):
        for x in given[name]:
            shape = call.shape(x)
            split = None if shape is None else even(1, shape[1], call.ranks)
            if split is None:
                return None
            wants[x] = split
    out = tuple(wants[x] for x in given["keep"])
    return call.answer(wants.get, out, inherent=True, shared=True)


def uniform(call: Call) -> Answer | None:
    """A head draws the numbers that it has among all heads."""
    found = heads(call)
    if found is not None:
        split = found.out
        found.args = (*found.args[:3], FirstHead(split.size // call.ranks))
    return found


class FirstHead(int):
    """Stands for the number of a rank's first head: that of the rank times this."""


for _target in HEADS:
    RULES[_target] = heads
RULES[ops.uniform.default] = uniform
RULES[ops.share_layers.default] = share_layers
for _target in (ops.cache_update.default, ops.cache_update_quantized.default):
    RULES[_target] = update
__all__ = ["HEADS", "FirstHead", "Want"]
