"""How the ops of a graph treat a dimension that is dealt out over the ranks: one rule for each kind of op.

A rule gets a call and says how it wants its arguments (`Want`), what its result looks like, and which numbers among its
arguments are sizes of the dealt dimension. It answers None where it can't: then the op runs on whole tensors, on every
rank, which is always right. An op without a rule does so, too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvrewrite.ir.fx import arg, parameters
from kvrewrite.passes.shard.placement import LOCAL, Placement, Split, Want, mapped

aten = torch.ops.aten


@dataclass
class Answer:
    """args, kwargs: the call's, with a `Want` in the place of each node. out: how the result lies. inherent: whether it
    lies so whatever its arguments did. reduce: whether each rank has a part of the sum, to which `bias` comes once.
    constant: the number that it is, where it is one."""

    args: Any
    kwargs: Any
    out: Placement
    inherent: bool = False
    reduce: bool = False
    bias: Any = None
    constant: int | None = None
    shared: bool = False


class Call:
    """A node with what is known of its arguments. shapes: of whole tensors, by node."""

    def __init__(self, node: fx.Node, ranks: int, places: Mapping[fx.Node, Placement], shapes: Mapping[fx.Node, Any]):
        self.node, self.ranks = node, ranks
        self._places, self._shapes = places, shapes

    @property
    def target(self) -> Any:
        return self.node.target

    @property
    def args(self) -> Any:
        return self.node.args

    def place(self, x: Any) -> Placement:
        return self._places.get(x) if isinstance(x, fx.Node) else None

    def split(self, x: Any) -> Split | None:
        """How an argument lies, where it is dealt out."""
        found = self.place(x)
        return found if isinstance(found, Split) else None

    def shape(self, x: Any) -> tuple[Any, ...] | None:
        """The shape of the whole tensor."""
        return self._shapes.get(x) if isinstance(x, fx.Node) else None

    def rank(self, x: Any) -> int:
        shape = self.shape(x)
        assert shape is not None
        return len(shape)

    @property
    def out_shape(self) -> tuple[Any, ...]:
        found: tuple[Any, ...] = self._shapes[self.node]
        return found

    def dim(self, name: str, x: Any) -> int:
        """An argument that is a dimension of `x`, counted from the front."""
        found: int = arg(self.node, name) % max(1, self.rank(x))
        return found

    def answer(self, want: Callable[[fx.Node], Placement], out: Placement, **more: Any) -> Answer:
        """Every node among the arguments as `want` says."""

        def wanted(value: Any) -> Any:
            return Want(value, want(value)) if isinstance(value, fx.Node) else value

        return Answer(mapped(self.args, wanted), mapped(dict(self.node.kwargs), wanted), out, **more)

    def as_it_is(self, out: Placement) -> Answer:
        """Takes its arguments as they lie."""
        return self.answer(self.place, out)

    def with_args(self, out: Placement, **changed: Any) -> Answer:
        """Takes its arguments as they lie, some of them changed."""
        found = self.as_it_is(out)
        args = list(found.args)
        for name, value in changed.items():
            at = parameters(self.target)[name][0]
            if at < len(args):
                args[at] = value
            else:
                found.kwargs[name] = value
        found.args = tuple(args)
        return found

    def whole(self) -> Answer:
        """Runs on whole tensors."""
        return self.answer(lambda n: None, None)


Rule = Callable[[Call], Answer | None]
RULES: dict[Any, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for aten ops."""

    def put(function: Rule) -> Rule:
        for name in names:
            packet, _, overload = name.partition(".")
            RULES[getattr(getattr(aten, packet), overload)] = function
        return function

    return put


def answer(call: Call) -> Answer:
    """What is right for a call."""
    found: Answer | None = None
    if any(isinstance(call.place(n), (Split, tuple)) or call.place(n) == LOCAL for n in call.node.all_input_nodes):
        if call.target in RULES:
            found = RULES[call.target](call)
        elif torch.Tag.pointwise in getattr(call.target, "tags", ()):
            found = pointwise(call)
    return found or call.whole()


# ------------------------------------------------------------------------------------------------ element by element
@rule(
    "clone.default",
    "contiguous.default",
    "alias.default",
    "detach.default",
    "to.dtype",
    "to.dtype_layout",
    "_to_copy.default",
    "type_as.default",
    "lift_fresh_copy.default",
    "masked_fill.Scalar",
    "masked_fill.Tensor",
    "where.self",
    "where.ScalarOther",
    "where.ScalarSelf",
    "where.Scalar",
    "zeros_like.default",
    "ones_like.default",
    "full_like.default",
    "empty_like.default",
    "softplus.default",
    "gelu.default",
    "silu.default",
    "nan_to_num.default",
)
def pointwise(call: Call) -> Answer | None:
    """Every number of the result is made of the numbers at its place, after broadcasting."""
    rank = len(call.out_shape)
    tensors = [n for n in call.node.all_input_nodes if call.shape(n) is not None]
    found = next((x for x in tensors if call.split(x) is not None), None)
    if found is None:
        return None
    split = call.split(found)
    assert split is not None
    split = split.at(split.dim + rank - call.rank(found))

    def want(x: fx.Node) -> Placement:
        shape = call.shape(x)
        at = split.dim - rank + len(shape) if shape is not None else -1
        return split.at(at) if shape is not None and at >= 0 and shape[at] == split.size else None

    return call.answer(want, split)


def along(call: Call, x: Any, dims: Any, keepdim: bool) -> Answer | None:
    """Takes dimensions together (or sorts along them), each of the others for itself."""
    split = call.split(x)
    if split is None or dims is None:
        return None
    rank = call.rank(x)
    gone = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if not gone or split.dim in gone:
        return None
    out = split if keepdim else split.at(split.dim - sum(d < split.dim for d in gone))
    return call.answer(lambda n: split if n is x else None, out)


@rule(
    "sum.dim_IntList",
    "mean.dim",
    "amax.default",
    "amin.default",
    "var.dim",
    "var.correction",
    "logsumexp.default",
    "linalg_vector_norm.default",
    "norm.ScalarOpt_dim",
    "any.dim",
    "all.dim",
    "argmax.default",
    "argmin.default",
)
def reduction(call: Call) -> Answer | None:
    """Sums, means and norms of dimensions."""
    return along(call, call.args[0], arg(call.node, "dim"), bool(arg(call.node, "keepdim")))


@rule("softmax.int", "_softmax.default", "log_softmax.int", "_log_softmax.default", "cumsum.default", "cumprod.default")
def running(call: Call) -> Answer | None:
    """Along one dimension; the shape stays."""
    return along(call, call.args[0], arg(call.node, "dim"), True)


@rule("rms_norm.default", "layer_norm.default")
def norm(call: Call) -> Answer | None:
    """Over the last dimensions."""
    x, count = call.args[0], len(arg(call.node, "normalized_shape"))
    return along(call, x, list(range(-count, 0)), True)


# ------------------------------------------------------------------------------------------------ products
@rule("bmm.default", "matmul.default")
def batched(call: Call) -> Answer | None:
    """Products of matrices, for each index of the dimensions in front."""
    a, b = call.args[:2]
    split = call.split(a) or call.split(b)
    rank = call.rank(a)
    if split is None or rank != call.rank(b) or rank < 3 or split.dim >= rank - 2:
        return None
    sizes = [(call.shape(x) or ())[split.dim] for x in (a, b)]
    wants = {x: split if n == split.size else None for x, n in zip((a, b), sizes)}
    return call.answer(wants.__getitem__, split)


def result(call: Call) -> Answer:
    """One of several results."""
    source, index = call.args
    found = call.place(source)
    out = found[index] if isinstance(found, tuple) and type(index) is int else None
    return Answer((Want(source, found), index), {}, out)


RULES[operator.getitem] = result
