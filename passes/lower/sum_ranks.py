"""Lowering for decode steps of several ranks: their sums by one kernel each, where ranks write each other's memory.

Requires a graph after `passes/shard`; ensures the same sums, with the residual that follows one in the same op. Whether ranks can
do it is asked in kvrewrite/runtime/parallel.py.
"""

from __future__ import annotations

import torch
from torch import fx

from kvrewrite.ir.fx import arg, erase_dead, is_op, same_size, tensor_of
from kvrewrite.passes.lower.match import calls, lowered, replace

comm = torch.ops._c10d_functional
ops = torch.ops.kvrewrite


def sum_directly(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose sums over ranks are `sum_ranks` or `sum_ranks_add`."""
    return lowered(gm, "", [_sum_ranks, _add_residuals, erase_dead])


def _sum_ranks(gm: fx.GraphModule) -> None:
    for wait in calls(gm, comm.wait_tensor.default):
        reduce = wait.args[0]
        if isinstance(reduce, fx.Node) and is_op(reduce, comm.all_reduce.default) and reduce.args[1] == "sum":
            replace(wait, ops.sum_ranks.default, (reduce.args[0], reduce.args[2]))


def _add_residuals(gm: fx.GraphModule) -> None:
    for total in calls(gm, ops.sum_ranks.default):
        user = next(iter(total.users), None)
        if len(total.users) != 1 or user is None or not is_op(user, torch.ops.aten.add.Tensor) or user.kwargs:
            continue
        left, right = user.args
        residual = right if left is total else left
        if not isinstance(residual, fx.Node) or residual is total or not _alike(residual, total):
            continue
        replace(user, ops.sum_ranks_add.default, (arg(total, "x"), arg(total, "group"), residual))


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = tensor_of(a), tensor_of(b)
    if x is None or y is None or x.dtype != y.dtype or x.dim() != y.dim():
        return False
    return all(same_size(i, j) for i, j in zip(x.shape, y.shape, strict=True))
