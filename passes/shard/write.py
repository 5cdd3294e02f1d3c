"""Carries out a plan on a graph: takes blocks where a rank needs them, and puts in the ranks' conversations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.ir.fx import fake_value
from kvrewrite.passes.shard.cache_rules import FirstHead
from kvrewrite.passes.shard.placement import Split, Want, mapped
from kvrewrite.passes.shard.plan import Plan
from kvrewrite.passes.shard.rules import Answer

aten = torch.ops.aten
comm = torch.ops._c10d_functional
REDUCE, GATHER, WAIT = comm.all_reduce.default, comm.all_gather_into_tensor.default, comm.wait_tensor.default
ADDLESS: dict[Any, Any] = {aten.addmm.default: aten.mm.default}  # a product without its bias


class Writer:
    """Makes a graph the one of a rank. group: the name of the process group."""

    def __init__(self, gm: fx.GraphModule, plan: Plan, rank: int, ranks: int, group: str):
        self.gm, self.plan, self.rank, self.ranks, self.group = gm, plan, rank, ranks, group
        self._made: dict[tuple[fx.Node, Split | None], fx.Node] = {}
        self._instead: dict[fx.Node, Any] = {}  # what readers get in the place of a node: its sum over ranks, a number

    def run(self) -> None:
        """Writes everything, in place."""
        for node in list(self.gm.graph.nodes):
            place = self.plan.places.get(node)
            if node.op == "call_function" or node.op == "output":
                self._write(node, self.plan.answers[node])
            elif isinstance(place, Split):
                _cut_value(node, place, self.ranks)
        self.gm.graph.lint()
        self.gm.recompile()

    def _write(self, node: fx.Node, found: Answer) -> None:
        def given(value: Any) -> Any:
            if isinstance(value, FirstHead):
                return int(value) * self.rank
            return self._convert(value, node) if isinstance(value, Want) else value

        node.args, node.kwargs = mapped(tuple(found.args), given), mapped(found.kwargs, given)
        if found.constant is not None:
            self._instead[node] = found.constant
        elif found.reduce:
            self._reduce(node, found)
        elif isinstance(found.out, Split):
            _cut_value(node, found.out, self.ranks)
        elif isinstance(found.out, tuple):
            node.meta.pop("val", None)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        node = self.gm.graph.call_function(target, args)
        if all(n.meta.get("val") is not None for n in node.all_input_nodes):
            node.meta["val"] = fake_value(node)
        return node

    # -- sums --------------------------------------------------------------------------------------------------------
    def _reduce(self, node: fx.Node, found: Answer) -> None:
        """The sum of all ranks' parts, and the bias."""
        if node in self.plan.tables:
            self._own_tokens(node)
        node.target = ADDLESS.get(node.target, node.target) if found.bias is not None else node.target
        following = node.next
        with self.gm.graph.inserting_before(following):
            total = node
            if node in self.plan.tables:
                total = self._call(aten.masked_fill.Scalar, node, node.meta.pop("kvrewrite_elsewhere"), 0)
            total = self._call(WAIT, self._call(REDUCE, total, "sum", self.group))
            if found.bias is not None:
                total = self._call(aten.add.Tensor, total, self._convert(found.bias, following))
        self._instead[node] = total

    def _own_tokens(self, node: fx.Node) -> None:
        """Tokens of other ranks look up row 0, which then counts as zero."""
        (start, count) = Split(0, (self.plan.tables[node],)).blocks(self.rank, self.ranks)[0]
        ids = node.args[1]
        with self.gm.graph.inserting_before(node):
            own = self._call(aten.sub.Tensor, ids, start)
            before = self._call(aten.lt.Scalar, own, 0)
            elsewhere = self._call(aten.logical_or.default, before, self._call(aten.ge.Scalar, own, count))
            node.args = (node.args[0], self._call(aten.masked_fill.Scalar, own, elsewhere, 0))
            node.meta["kvrewrite_elsewhere"] = self._call(aten.unsqueeze.default, elsewhere, -1)
        node.kwargs = {}

    # -- from one placement to another -------------------------------------------------------------------------------
    def _convert(self, want: Want, before: fx.Node) -> Any:
        """The node as it is wanted, made right before its first reader."""
        node, split = want
        have = self.plan.places.get(node)
        if have == split or not isinstance(have, (Split, type(None))):
            return self._instead.get(node, node)
        whole = self._gather(node, have, before) if have is not None else self._instead.get(node, node)
        return whole if split is None else self._take(whole, node, split, before)

    def _take(self, whole: fx.Node, node: fx.Node, split: Split, before: fx.Node) -> fx.Node:
        """A rank's blocks of a whole tensor."""
        if (node, split) not in self._made:
            with self.gm.graph.inserting_before(before):
                pieces = [
                    self._call(aten.slice.Tensor, whole, split.dim, start, start + length)
                    for start, length in split.blocks(self.rank, self.ranks)
                ]
                made = pieces[0] if len(pieces) == 1 else self._call(aten.cat.default, pieces, split.dim)
            self._made[node, split] = made
        return self._made[node, split]

    def _gather(self, node: fx.Node, split: Split, before: fx.Node) -> fx.Node:
        """The whole tensor, on every rank."""
        if (node, None) not in self._made:
            with self.gm.graph.inserting_before(before):
                at, pieces = 0, []
                for part in split.parts:
                    own = node
                    if len(split.parts) > 1:
                        end = at + part // self.ranks
                        own = self._call(aten.slice.Tensor, node, split.dim, at, end)
                        at = end
                    pieces.append(self._gather_part(own, split.dim))
                made = pieces[0] if len(pieces) == 1 else self._call(aten.cat.default, pieces, split.dim)
            self._made[node, None] = made
        return self._made[node, None]

    def _gather_part(self, node: fx.Node, dim: int) -> fx.Node:
        """Blocks are put together along the first dimension, so theirs becomes that."""
        own = self._call(aten.transpose.int, node, 0, dim) if dim else node
        own = self._call(aten.clone.default, own)
        own.kwargs = {"memory_format": torch.contiguous_format}
        found = self._call(WAIT, self._call(GATHER, own, self.ranks, self.group))
        return self._call(aten.transpose.int, found, 0, dim) if dim else found


def _cut_value(node: fx.Node, split: Split, ranks: int) -> None:
    """What is known of a node's tensor, for a rank."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        sizes = list(value.shape)
        sizes[split.dim] = split.size // ranks
        node.meta["val"] = value.new_empty(sizes)


__all__ = ["GATHER", "REDUCE", "WAIT", "Writer"]
