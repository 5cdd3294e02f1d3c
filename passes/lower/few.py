"""Lowering for a few tokens of a cache that only appends, such as drafted tokens that are checked.

Requires a graph after `insert_cache` of a program that `why_not_few` has nothing against. Ensures the same logits up to
rounding, and the same keys, values and positions in the cache; scores of new slots are 0, and what only scores needed is
gone (policies look through all slots for them). So it is for caches from which nothing goes any more.
"""

from __future__ import annotations

import torch
from torch import fx

from kvrewrite.ir.fx import arg, erase_dead, named_args, op_args
from kvrewrite.passes.lower.match import calls, lowered, replace
from kvrewrite.passes.lower.prompt import lower_prefill

ops = torch.ops.kvrewrite


def why_not_few(gm: fx.GraphModule) -> str | None:
    """The reason why a graph's updates can't be appending only, or None."""
    for node in calls(gm, ops.cache_update.default):
        if arg(node, "drop") is not None:
            return "its policy decides which tokens enter the cache"
        if arg(node, "window") or arg(node, "chunk"):
            return "layers with a window lose what no later token sees"
    return None if calls(gm, ops.cache_update.default) else "its cache is not updated by cache_update"


def lower_few(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy for a few tokens per row."""
    return lower_prefill(lowered(gm, "few_", [_append, erase_dead]))


def _append(gm: fx.GraphModule) -> None:
    """Updates that only append."""
    fused = ops.append_slots.default
    for node in calls(gm, ops.cache_update.default):
        given = named_args(node)
        replace(node, fused, op_args(fused, **{a.name: given[a.name] for a in fused._schema.arguments}))
