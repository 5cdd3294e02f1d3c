"""Lowering for decode steps of several ranks: their sums by one kernel each, where ranks read each other's memory.

Requires a graph after `passes/shard`; ensures the same sums. Whether ranks can do it is asked in kvrewrite/runtime/parallel.py.
"""

from __future__ import annotations

import torch
from torch import fx

from kvrewrite.ir.fx import erase_dead, is_op
from kvrewrite.passes.lower.match import calls, lowered, replace

comm = torch.ops._c10d_functional


def sum_directly(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose sums over ranks are `sum_ranks`."""
    return lowered(gm, "", [_sum_ranks, erase_dead])


def _sum_ranks(gm: fx.GraphModule) -> None:
    for wait in calls(gm, comm.wait_tensor.default):
        reduce = wait.args[0]
        if isinstance(reduce, fx.Node) and is_op(reduce, comm.all_reduce.default) and reduce.args[1] == "sum":
            replace(wait, torch.ops.kvrewrite.sum_ranks.default, (reduce.args[0], reduce.args[2]))
