"""Inserts a policy: its scoring subgraph as ordinary nodes at every site, its weights as ordinary parameters.

Requires the canonical graph with positions lifted. Ensures that every site that owns its keys and values has a `Scores`,
and that each policy weight is an attribute `policy_weights.<name>` of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import placeholder, set_attr
from kvrewrite.passes.canonical.find_rope import Rope, find_rope
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.policies.site import PREFIX, SiteHook


def attach_weights(gm: fx.GraphModule, tensors: Mapping[str, Tensor]) -> list[str]:
    """Puts policy weights into the graph as parameters; returns their attribute names."""
    names = []
    for name, tensor in tensors.items():
        set_attr(gm, PREFIX + name, torch.nn.Parameter(tensor, requires_grad=False))
        names.append(PREFIX + name)
    return names


def unrotated_query(hook: SiteHook, max_positions: int | None) -> fx.Node:
    """Adds the queries without their rotation, (B, H, T, D); as they are where the model has none."""
    site, position_ids = hook.site, placeholder(hook.gm, "position_ids")
    found = find_rope(hook.gm, hook.q, site.heads, position_ids, max_positions)
    if isinstance(found, Rope):
        order = list(found.layout)
        if order == [0, 1, 2, 3]:
            return found.pre
        return hook.call(torch.ops.aten.permute.default, found.pre, order)
    if found.rotated:
        raise UnsupportedModelError(
            f"layer {site.layer} ({site.module}): the queries' rotation was not understood "
            f"({found.reason}), and this policy needs queries without it"
        )
    return hook.q


def insert_policy(hook: SiteHook, policy: Policy) -> Scores:
    """Adds the policy's scoring nodes at one site that already reads its cache."""
    scores = policy.score(hook)
    hook.site.inserted.append(policy.name)
    return scores
