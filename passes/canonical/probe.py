"""Evaluates parts of a graph on small concrete tensors.

Passes ask what a subgraph computes instead of how it is written: a mask is what it lets through, a bias is the numbers
that it adds, whatever ops produced them. Everything is computed on the CPU in float64, so that a fit can be exact and
the model's own dtype and device do not matter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.evaluate import EMPTY, FAILURES, run_op, widen
from kvrewrite.ir.fx import ancestors, concretize, get_attr, is_op, is_size, shape_of, tensor_of
from kvrewrite.passes.canonical.apart import Axes, special

aten = torch.ops.aten

WEIGHT_OPS = (aten.linear.default, aten.addmm.default, aten.embedding.default, aten.convolution.default)
PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default)
MOST_HASHED = 1 << 24  # most elements of a table that is identified by its values
# Only the shape and dtype of their first argument count.
SHAPE_ONLY = (
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
)
MASKED = -9999.0  # logits this far below a token's own are a mask: finfo.min, -inf, and the -1e4 of older models
UNDERFLOW = -200.0  # a weight of exp(-200) adds nothing to one, even in float64


def seen_in(relative: Tensor) -> Tensor:
    """Returns which logits (..., S, S), each relative to its query's own token, are not masked.

    If all later tokens get the same small number, such as -1000, that number is the mask.
    """
    later = relative[..., torch.ones(relative.shape[-2:], dtype=torch.bool).triu(1)]
    highest = float(later.max()) if later.numel() else -math.inf
    return relative > (highest if MASKED < highest <= UNDERFLOW else MASKED)


class ProbeError(Exception):
    """A subgraph could not be evaluated."""


def symbols(captured: Captured, batch: int, length: int) -> dict[Any, int]:
    """Returns numbers for every symbol in the inputs' shapes.

    An input that the graph does not use may have its own symbols; they get the same numbers.
    """
    found: dict[Any, int] = {}
    for node in captured.graph.graph.nodes:
        if node.op == "placeholder":
            for size, number in zip(shape_of(node), (batch, length), strict=True):
                if isinstance(size, torch.SymInt):
                    found[size.node.expr] = number
    return found


def only_shape(node: fx.Node) -> bool:
    """Whether `node` depends only on its inputs' shapes, not on their values."""
    if is_size(node):
        return True
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
    return name.removeprefix("aten::") in SHAPE_ONLY


def value_inputs(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Returns the nodes whose values `roots` depend on (without those of which only the shape matters)."""
    return ancestors(roots, stop=only_shape)


def depends_on_data(root: fx.Node) -> bool:
    """Whether the value of `root` depends on the values of `input_ids`."""
    return any(n.op == "placeholder" and n.target == "input_ids" for n in value_inputs([root]))


class Probe:
    """Evaluates nodes of one graph for one batch size and length; every node at most once.

    positions: ascending, int64 (n,): evaluates only the tokens at these positions, of a text that ends with the last of
    them. `length` is n then, and arrays over the sequence have n entries. Allowed only if `apart.why_not` returns None
    for the nodes. overrides: values that are given instead of computed. cut: nodes whose value is random instead of
    computed. Parameters and buffers are used as they are, or drawn at random if they have no data (device `meta`).
    """

    def __init__(
        self,
        captured: Captured,
        batch: int,
        length: int,
        overrides: Mapping[fx.Node, Any] | None = None,
        cut: Callable[[fx.Node], bool] = lambda _: False,
        seed: int = 0,
        positions: Tensor | None = None,
    ):
        self.captured = captured
        self.batch, self.length = batch, length
        self.positions = positions
        self.axes = Axes(captured) if positions is not None else None
        # Numbers for sizes of arrays, and for sizes in arithmetic.
        self.sizes = symbols(captured, batch, length)
        self.numbers = self.sizes if positions is None else symbols(captured, batch, int(positions[-1]) + 1)
        self.values: dict[fx.Node, Any] = dict(overrides or {})
        self.cut = cut
        self.generator = torch.Generator().manual_seed(seed)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Returns the concrete shape of what `node` produces."""
        return concretize(shape_of(node), self.sizes)

    def random(self, node: fx.Node) -> Tensor:
        """Returns a random tensor like the one that `node` produces."""
        return torch.randn(self.shape(node), generator=self.generator, dtype=torch.float64)

    @torch.no_grad()
    def __call__(self, root: fx.Node) -> Any:
        """Returns the value of `root`. Raises ProbeError if an op on the way can't run."""
        todo = [root]
        while todo:
            node = todo[-1]
            if node in self.values:
                todo.pop()
                continue
            if node.op == "call_function" and not is_size(node) and not self.cut(node):
                missing = [n for n in node.all_input_nodes if n not in self.values]
                if missing:
                    todo.extend(missing)
                    continue
            self.values[node] = self._evaluate(node)
            todo.pop()
        return self.values[root]

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if node.target == "position_ids":
                positions = torch.arange(self.length) if self.positions is None else self.positions
                return positions.repeat(self.batch, 1)
            shape = (self.batch, self.length)
            return torch.randint(self.captured.vocab_size or 2, shape, generator=self.generator)
        if node.op == "get_attr":
            return self._attribute(node)
        if is_size(node):
            return concretize([node.meta["val"]], self.numbers)[0]
        if self.cut(node):
            return self.random(node)
        if is_op(node, *EMPTY):
            return torch.zeros(self.shape(node), dtype=widen(node.meta["val"].dtype))
        given = tuple(self._sizes_of_arrays(a) if isinstance(a, (list, tuple)) else a for a in node.args)
        args, kwargs = fx.node.map_aggregate((given, dict(node.kwargs)), self._argument)  # type: ignore[misc]
        try:
            if self.axes is not None and self.positions is not None and (value := tensor_of(node)) is not None:
                made = special(self.axes, node, args, widen(value.dtype), self.positions)
                if made is not None:
                    return made
            out = run_op(node, args, kwargs)
        except FAILURES as error:
            raise ProbeError(f"{node.name} could not be evaluated: {str(error).splitlines()[0]}") from error
        # These have torch's default dtype because they name none.
        return out.to(widen(out.dtype)) if isinstance(out, Tensor) else out

    def _sizes_of_arrays(self, value: Any) -> Any:
        """Replaces sizes in a list argument of an op with the sizes of an array."""
        return fx.node.map_arg(value, lambda n: concretize([n.meta["val"]], self.sizes)[0] if is_size(n) else n)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.values[value]
        if isinstance(value, torch.dtype):
            return widen(value)
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def _attribute(self, node: fx.Node) -> Any:
        value = get_attr(self.captured.graph, str(node.target))
        if not isinstance(value, Tensor):
            return value
        if value.device.type == "meta":
            if not value.is_floating_point():
                raise ProbeError(f"{node.target} has no data (it is on the meta device)")
            return torch.randn(value.shape, generator=self.generator, dtype=torch.float64)
        return value.detach().to("cpu", widen(value.dtype))


def subgraph_text(
    captured: Captured, roots: Iterable[fx.Node], starts: Iterable[str] = (), parameters: bool = True
) -> str:
    """Returns text that is the same for subgraphs that compute the same, from nodes named in `starts` to `roots`.

    Tables count by their values. parameters: whether parameters count by their values too, or only by their shapes.
    """
    names = set(starts)
    roots = list(roots)
    order = sorted(ancestors(roots, stop=lambda n: n.name in names))
    number = {n: i for i, n in enumerate(order)}
    lines = [f"{[number[n] for n in roots]}"]
    for node in order:
        if node.name in names:
            lines.append(f"start {tuple(map(str, shape_of(node)))}")
        elif node.op == "get_attr":
            lines.append(_attribute_text(captured, node, parameters))
        elif node.op == "placeholder":
            lines.append(f"input {node.target}")
        else:
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")  # type: ignore[arg-type, return-value]
            lines.append(f"{node.target} {arguments}")
    return "\n".join(lines)


def _attribute_text(captured: Captured, node: fx.Node, parameters: bool) -> str:
    value = get_attr(captured.graph, str(node.target))
    if not isinstance(value, Tensor):
        return str(node.target)
    kind = f"{type(value).__name__} {tuple(value.shape)} {value.dtype}"
    if isinstance(value, torch.nn.Parameter) and not parameters:
        return kind
    if value.is_meta or value.numel() > MOST_HASHED:
        return f"{kind} {node.target}"
    raw = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return f"{kind} {hashlib.sha256(raw.numpy().tobytes()).hexdigest()}"


def is_projection(node: fx.Node) -> bool:
    """Whether `node` multiplies data by weights: a probe of the nodes after it may start there from random numbers."""
    value = tensor_of(node)
    if value is None or not value.is_floating_point():
        return False
    if is_op(node, *WEIGHT_OPS):
        return True
    return is_op(node, *PRODUCTS) and any(
        all(a.op == "get_attr" or is_op(a, aten.permute.default, aten.t.default, aten.transpose.int) for a in chain)
        for chain in (ancestors([n]) for n in node.all_input_nodes)
    )


def integers_in(captured: Captured, nodes: Iterable[fx.Node]) -> set[int]:
    """Returns the integers in the arguments of `nodes` or in the tiny constants that they read."""
    found: set[int] = set()

    def visit(value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            found.add(abs(value))
        elif isinstance(value, float) and abs(value) <= 4096 and value == int(value):  # larger ones fill masks
            found.add(abs(int(value)))
        return value

    for node in nodes:
        fx.node.map_aggregate((node.args, dict(node.kwargs)), visit)
        if node.op == "get_attr":
            value = get_attr(captured.graph, str(node.target))
            if isinstance(value, Tensor) and value.numel() <= 8 and value.device.type != "meta":
                for number in value.flatten().tolist():
                    visit(number)
    return found


def refuse(layer: int, module: str, reason: str) -> UnsupportedModelError:
    """Returns the error for an attention that can't be rewritten."""
    return UnsupportedModelError(f"layer {layer} ({module or 'the model itself'}): {reason}")
