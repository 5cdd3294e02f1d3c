"""Evaluates a graph for chosen tokens of a long text without evaluating it for all of them.

A subgraph keeps positions apart if its result for one token, or one pair of tokens, depends only on these tokens and
their positions. Then it can be evaluated for chosen positions alone: arrays over the sequence hold only their entries.
`why_not` checks each op; `special` evaluates the ops to which positions matter. An axis over the sequence may have more
entries after it (columns of attention sinks), never before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import is_size, shape_of, symbol, tensor_of

POINTWISE = {
    "_to_copy",
    "to",
    "clone",
    "contiguous",
    "alias",
    "detach",
    "lift_fresh",
    "lift_fresh_copy",
    "masked_fill",
    "where",
    "floor_divide",
    "__and__",
    "__or__",
    "__xor__",
    "type_as",
    "scalar_tensor",
    "true_divide",
    "log_sigmoid",
}
FACTORIES = {
    "ones",
    "zeros",
    "full",
    "empty",
    "ones_like",
    "zeros_like",
    "full_like",
    "empty_like",
    "new_ones",
    "new_zeros",
    "new_full",
    "new_empty",
}
# Each axis of the result is one of the argument's, or new.
AXES = {
    "permute",
    "transpose",
    "t",
    "mT",
    "unsqueeze",
    "squeeze",
    "expand",
    "expand_as",
    "movedim",
    "swapaxes",
    "stack",
}
VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten"}
REDUCTIONS = {"sum", "any", "all", "amax", "amin", "mean"}


class Axes:
    """Which axes of a graph's values hold the sequence."""

    def __init__(self, captured: Captured):
        self.captured = captured
        inputs = [n for n in captured.graph.graph.nodes if n.op == "placeholder"]
        self.lengths = {symbol(shape_of(n)[1]) for n in inputs} | {captured.length_symbol}

    def axis(self, size: Any) -> int | None:
        """Returns the number of entries that an axis has besides the sequence; None if it does not hold the sequence.

        Raises ValueError if it holds the sequence in another way.
        """
        expr = symbol(size)
        free: set[Any] = getattr(expr, "free_symbols", set()) & self.lengths
        if not free:
            return None
        more = expr - next(iter(free))
        if isinstance(more, sympy.Integer) and more >= 0:
            return int(more)
        raise ValueError

    def axes(self, node: fx.Node) -> list[int | None]:
        return [self.axis(size) for size in shape_of(node)]

    def has_sequence(self, node: fx.Node, dim: int | None = None) -> bool:
        axes = self.axes(node)
        return any(a is not None for a in (axes if dim is None else axes[dim : dim + 1]))


def _name(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return node.target._schema.name.removeprefix("aten::")


def _is_pointwise(node: fx.Node) -> bool:
    if _name(node) in POINTWISE:
        return True
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def why_not(captured: Captured, nodes: Iterable[fx.Node]) -> str | None:
    """The reason why `nodes` and their inputs can't be evaluated for chosen positions alone, or None."""
    axes = Axes(captured)
    for node in sorted(nodes):
        if node.op == "get_attr" or is_size(node) or (node.op == "placeholder" and node.target == "position_ids"):
            continue
        if isinstance(node.meta.get("val"), (torch.SymFloat, torch.SymBool)):
            continue
        try:
            apart = node.op == "call_function" and tensor_of(node) is not None and _is_apart(axes, node)
        except ValueError:
            apart = False
        if not apart:
            return f"{node.name} ({_name(node) or node.target}) may give tokens what follows from others"
    return None


def _is_apart(axes: Axes, node: fx.Node) -> bool:
    """Whether the op of `node` keeps positions apart. Raises ValueError if an axis holds the sequence otherwise."""
    name = _name(node)
    own = axes.axes(node)
    read = [n for n in node.all_input_nodes if tensor_of(n) is not None]
    if name in FACTORIES:
        return all(a in (None, 0) or name.endswith("_like") for a in own)
    for n in read:
        axes.axes(n)
    source: Any = read[0] if read else None
    if name == "arange":
        return _arange_start(axes, node) is not None
    if _is_pointwise(node) or name in AXES:
        return True
    if name in VIEWS:
        return _marked(axes, source) == _marked(axes, node)
    if name == "repeat":
        before = [1] * (len(own) - len(shape_of(source))) + list(shape_of(source))
        return all(
            a is None or symbol(b) in (1, symbol(s)) for a, b, s in zip(own, before, shape_of(node), strict=True)
        )
    if name == "repeat_interleave":
        dim = _dim(node, source, _argument(node, 2, "dim", None))
        return not axes.has_sequence(source, dim) and not axes.has_sequence(node, dim)
    if name == "select":
        return not axes.has_sequence(source, _dim(node, source, _argument(node, 1, "dim", 0)))
    if name == "slice":
        return _slice_start(axes, node) is not None
    if name in ("tril", "triu"):
        return own[-2:] in ([0, 0], [None, None])
    if name == "cat":
        return _cat_adds_columns(axes, node)
    if name == "constant_pad_nd":
        return _pad_adds_columns(axes, node)
    if name == "index":
        indices: Any = node.args[1]
        return all(
            i is None or (not axes.has_sequence(source, d) and tensor_of(i).dtype != torch.bool)  # type: ignore[union-attr]
            for d, i in enumerate(indices)
        )
    if name == "embedding":
        return not axes.has_sequence(source)
    if name == "index_select":
        return not axes.has_sequence(source, _dim(node, source, node.args[1]))
    if name == "gather":
        dim = _dim(node, source, node.args[1])
        index: Any = node.args[2]
        sizes = [[symbol(s) for d, s in enumerate(shape_of(n)) if d != dim] for n in (source, index)]
        return not axes.has_sequence(source, dim) and sizes[0] == sizes[1]
    if name == "cumsum":
        return not axes.has_sequence(source, _dim(node, source, node.args[1])) or _is_uniform(source)
    if name in REDUCTIONS:
        dims = _argument(node, 1, "dim", None)
        dims = [dims] if isinstance(dims, int) else dims
        return bool(dims) and not any(axes.has_sequence(source, _dim(node, source, d)) for d in dims)
    return False


def _dim(node: fx.Node, source: fx.Node, dim: Any) -> int | None:
    return None if dim is None else int(dim) % max(1, len(shape_of(source)))


def _marked(axes: Axes, node: fx.Node) -> list[tuple[Any, Any]]:
    """Returns the axes over the sequence, each with its stride in elements."""
    found = []
    step: Any = sympy.Integer(1)
    for size in reversed(shape_of(node)):
        if axes.axis(size) is not None:
            found.append((symbol(size), sympy.expand(step)))
        step = step * symbol(size)
    return found


def _arange_start(axes: Axes, node: fx.Node) -> Any:
    """Returns the start of an arange with step 1 and one entry per token, or of constant size; None for others."""
    numbers = [n.meta["val"] if isinstance(n, fx.Node) else n for n in node.args]
    start, end, step = [*numbers, 1][:3] if len(numbers) > 1 else (0, numbers[0], 1)
    more = axes.axis(shape_of(node)[0])
    if more is None:
        return start
    length = symbol(end) - symbol(start)
    return start if more == 0 and step == 1 and symbol(shape_of(node)[0]) == length else None


def _slice_start(axes: Axes, node: fx.Node) -> Any:
    """Returns the start of a slice that takes a constant part of a constant axis, one entry per token from there on, or
    the whole sequence; None for others."""
    source: Any = node.args[0]
    dim = _dim(node, source, _argument(node, 1, "dim", 0))
    assert dim is not None
    start, step = _argument(node, 2, "start", None) or 0, _argument(node, 4, "step", 1)
    start = start.meta["val"] if isinstance(start, fx.Node) else start
    before, after = axes.axis(shape_of(source)[dim]), axes.axis(shape_of(node)[dim])
    if before is None:
        return start if after is None or (after == 0 and step == 1) else None
    return start if after is not None and symbol(start) == 0 and step == 1 and after <= before else None


def _cat_adds_columns(axes: Axes, node: fx.Node) -> bool:
    """Whether no tensor has the sequence on the concatenated axis, or only the first has it."""
    parts: Any = node.args[0]
    dim = _dim(node, node, _argument(node, 1, "dim", 0))
    return not any(axes.has_sequence(part, dim) for part in parts[1:])


def _pad_adds_columns(axes: Axes, node: fx.Node) -> bool:
    """Whether a padding adds nothing before the sequence and removes nothing of it."""
    source, pad = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(pad, (list, tuple))
    rank = len(shape_of(source))
    sides = [(rank - 1 - i // 2, pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    return all(
        isinstance(before, int)
        and isinstance(after, int)
        and (not axes.has_sequence(source, d) or (before == 0 <= after))
        for d, before, after in sides
    )


def _is_uniform(node: fx.Node) -> bool:
    """Whether all entries of `node` are the same number, judging by the ops that make it."""
    name = _name(node)
    if name in FACTORIES:
        return "empty" not in name
    made = _is_pointwise(node) or name in AXES - {"stack"} or name in VIEWS or name == "slice"
    read = [n for n in node.all_input_nodes if tensor_of(n) is not None]
    return made and bool(read) and all(_is_uniform(n) for n in read)


def special(axes: Axes, node: fx.Node, args: tuple[Any, ...], dtype: torch.dtype, positions: Tensor) -> Tensor | None:
    """Returns the value of an op to which positions matter, None for others. args: the values of its arguments at
    `positions` (n,); sizes among them are those of the whole text. dtype: the result's."""
    name = _name(node)
    if name == "arange" and axes.has_sequence(node):
        return (positions + (args[0] if len(args) > 1 else 0)).to(dtype)
    if name == "slice":
        dim = int(_argument(node, 1, "dim", 0)) % args[0].dim()
        more = axes.axis(shape_of(node)[dim])
        if more is None:
            return None
        if axes.has_sequence(node.args[0], dim):  # type: ignore[arg-type]
            return args[0].narrow(dim, 0, len(positions) + more)  # type: ignore[no-any-return]
        start = (args[2] if len(args) > 2 else None) or 0
        return args[0].index_select(dim, positions + (start + args[0].shape[dim] if start < 0 else start))  # type: ignore[no-any-return]
    if name == "cumsum":
        dim = int(args[1]) % max(1, args[0].dim())
        if not axes.has_sequence(node, dim):
            return None
        counts = (positions + 1).reshape([-1 if d == dim else 1 for d in range(args[0].dim())])
        return (args[0] * counts).to(dtype)  # type: ignore[no-any-return]
    if name in ("tril", "triu") and axes.has_sequence(node, len(shape_of(node)) - 1):
        diagonal = _argument(node, 1, "diagonal", 0) if len(args) < 2 else args[1]
        ahead = positions - positions[:, None]  # how far a key is ahead of the query
        kept = ahead <= diagonal if name == "tril" else ahead >= diagonal
        return torch.where(kept, args[0], torch.zeros((), dtype=args[0].dtype))
    return None
