"""Rotations of several axes (M-RoPE): each part of a head is turned by another position of a token, such as the time, row and
column of a piece of an image. Text has the same number in all of them."""

from __future__ import annotations

import torch
from torch import fx

import kvrewrite.ops  # noqa: F401  (registers the ops that graphs are made of)
from kvrewrite.ir.fx import SIZE_OPS, is_op, placeholder, shape_of

aten = torch.ops.aten
AXES = 3
UPDATES = (torch.ops.kvrewrite.cache_update.default, torch.ops.kvrewrite.cache_update_quantized.default)
MOST = AXES + 1  # some models have the token's own position before those of the axes


def axes_node(gm: fx.GraphModule) -> fx.Node | None:
    """The node that gives each axis a text's positions: (3 or 4, B, T), from `position_ids` (B, T) alone. None where there
    is none, or where positions are read elsewhere, too (but for updates of caches, which note them for ranks)."""
    given = placeholder(gm, "position_ids")
    users = [] if given is None else [user for user in given.users if not is_op(user, *SIZE_OPS, *UPDATES)]
    if len(users) != 1 or not is_op(users[0], aten.unsqueeze.default) or len(users[0].users) != 1:
        return None
    (found,) = users[0].users
    if not is_op(found, aten.expand.default) or len(shape_of(found)) != 3 or shape_of(found)[0] not in (AXES, MOST):
        return None
    return found
