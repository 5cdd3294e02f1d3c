"""Runs a graph on the CPU in float64 with stand-in weights, to prove what a rewrite computes by computing it.

`Probe` evaluates a small part of a graph. `Evaluator` runs whole graphs of any size: a product of two thin random
matrices, which is never multiplied out, stands in for a large weight. So an 8B checkpoint, on meta or on a GPU, costs
no more than its activations. Small parameters are the model's own, slightly changed, so that a value that is zero or
one today hides nothing; buffers are the model's own.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from kvrewrite.ir.fx import ancestors, get_attr, is_op, mutates, tensor_of

aten = torch.ops.aten

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
TOLERANCE = 1e-6  # relative to the reference's largest number; everything is computed in float64
FAILURES = (RuntimeError, TypeError, ValueError, IndexError)  # of ops on invalid arguments
RANK = 8  # of the stand-in for a large weight
# Products of rows with their groups' weights: torch's op, and transformers' substitute for weights of other dtypes.
GROUPED = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
LARGE = 1 << 16  # weights with at least so many elements get a stand-in
# Memory that will be written to; uninitialized in the model, zeros here.
EMPTY = (aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default)


def widen(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that an evaluation uses where the model uses `dtype`."""
    if dtype in FLOATS:
        return torch.float64
    return torch.complex128 if dtype == torch.complex64 else dtype


def run_op(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Runs a node's op on these arguments on the CPU. Raises what the op raises.

    Some ops count in integers on a GPU but only in floating point on the CPU (`histc`). Those run in float64, which
    holds integers below 2^53 exactly, and their results are cast to the node's own integer dtypes.
    """
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except NotImplementedError as missing:
        try:
            return _run_in_floats(node, args, kwargs)
        except FAILURES:
            raise missing from None


def _run_in_floats(node: fx.Node, args: Any, kwargs: Any) -> Any:
    values, spec = tree_flatten((args, kwargs))
    args, kwargs = tree_unflatten([_as_floats(x) if isinstance(x, Tensor) else x for x in values], spec)
    found, form = tree_flatten(node.target(*args, **kwargs))  # type: ignore[operator]
    own, _ = tree_flatten(node.meta.get("val"))
    if len(own) != len(found) or not all(isinstance(like, Tensor) for like in own):
        raise TypeError("the dtypes that its results have in the model are not known")
    return tree_unflatten([x.to(widen(like.dtype)) for x, like in zip(found, own)], form)


def _as_floats(value: Tensor) -> Tensor:
    if value.is_floating_point() or value.is_complex():
        return value
    wide = value.to(torch.float64)
    if not torch.equal(wide.to(value.dtype), value):
        raise ValueError("its integers are larger than float64 holds exactly")
    return wide


def difference(got: Any, want: Any, tolerance: float = TOLERANCE, least: float = 1e-9) -> str:
    """Says how `got` differs from `want`; "" if the difference is at most `tolerance` times the larger of `least` and
    the largest number in `want`."""
    if not isinstance(got, Tensor) or not isinstance(want, Tensor) or got.shape != want.shape:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (got, want)]
        return f"it gives {shapes[0]} where the model gives {shapes[1]}"
    if not want.numel():
        return ""
    if not bool(torch.isfinite(want).all()):
        return "the model's own result is not finite"
    if want.dtype == torch.bool or not (want.is_floating_point() or want.is_complex()):
        return "" if torch.equal(got, want) else "its integers differ"
    size, off = float(want.abs().max()), float((got - want).abs().max())
    if off <= tolerance * max(size, least):  # NaN fails this comparison
        return ""
    return f"it is off by {off:.2g} (the largest number is {size:.2g})"


class EvaluationError(Exception):
    """A node of a graph could not be computed."""

    def __init__(self, node: fx.Node, reason: str):
        super().__init__(f"{node.name} ({node.target}) could not be computed: {reason}")
        self.node = node


class ThinProduct:
    """A weight (..., a, b) as left (..., a, RANK) @ right (..., RANK, b); multiplied out only if nothing else works."""

    def __init__(self, left: Tensor, right: Tensor):
        self.left, self.right = left, right

    def dense(self) -> Tensor:
        """Returns the weight itself."""
        return self.left @ self.right

    def transposed(self) -> ThinProduct:
        """Returns the weight with its last two dims exchanged."""
        return ThinProduct(self.right.mT, self.left.mT)


class StandIns:
    """The values that evaluations use for a model's parameters and buffers; the same for every graph of the model.

    seed: chooses the random numbers.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self._known: dict[int, tuple[Any, Any]] = {}

    def __call__(self, name: str, value: Any) -> Any:
        """Returns the stand-in for the attribute `name` of a graph; value: the attribute."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._known:
            # Keeps the value too, so that its id is not reused.
            self._known[id(value)] = (value, self._make(name, value))
        return self._known[id(value)][1]

    def _make(self, name: str, value: Tensor) -> Any:
        blank = value.is_meta or isinstance(value, FakeTensor)
        known = value.dtype in (*FLOATS, torch.float64) or value.is_complex()  # not the dtypes of packed weights
        if not known or not (isinstance(value, nn.Parameter) or blank):
            return value.detach().to("cpu", widen(value.dtype))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + zlib.crc32(name.encode()))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        if value.dim() >= 2 and value.numel() >= LARGE:
            *lead, a, b = value.shape
            return ThinProduct(random(*lead, a, RANK) * b**-0.5, random(*lead, RANK, b) * RANK**-0.5)
        noise = random(*value.shape)
        if blank:
            made = noise * value.shape[-1] ** -0.5 if value.dim() >= 2 else 1 + 0.1 * noise
        else:
            own = value.detach().to("cpu", widen(value.dtype))
            size = float(own.abs().square().mean().sqrt()) if own.numel() else 0.0
            made = own + noise * (0.1 * size if size else 0.3)
        return made.to(widen(value.dtype))


# Nodes to compute, in order, each with those that nobody reads after it.
_Plan = list[tuple[fx.Node, list[fx.Node]]]


class Evaluator:
    """Computes nodes of one graph. root: the module that holds what its `get_attr` nodes read."""

    def __init__(self, graph: fx.Graph, root: nn.Module, stand_ins: Callable[[str, Any], Any]):
        self.root, self.stand_ins = root, stand_ins
        self.nodes = list(graph.nodes)
        self.output: Any = next(n for n in reversed(self.nodes) if n.op == "output").args[0]
        self._plans: dict[tuple[tuple[fx.Node, ...], frozenset[fx.Node]], _Plan] = {}
        self._calls: dict[fx.Node, _Call] = {}

    @torch.no_grad()
    def __call__(
        self,
        inputs: Mapping[str, Any],
        wanted: Iterable[fx.Node],
        given: Mapping[fx.Node, Any] | None = None,
    ) -> dict[fx.Node, Any]:
        """Returns the values of `wanted`. inputs: by placeholder; given: values of nodes that are not computed.

        Raises EvaluationError with the node if an op fails.
        """
        values: dict[fx.Node, Any] = dict(given or {})
        wanted = list(wanted)
        for node, unread in self._plan(tuple(wanted), frozenset(values)):
            values[node] = self._compute(node, values, inputs)
            for used in unread:
                values.pop(used, None)
        return {n: values[n] for n in wanted}

    def _plan(self, wanted: tuple[fx.Node, ...], held: frozenset[fx.Node]) -> _Plan:
        """The nodes to compute for `wanted` where `held` have values. A proof asks for the same again and again."""
        known = self._plans.get((wanted, held))
        if known is not None:
            return known
        needed = ancestors(wanted, stop=lambda n: n in held)
        left = {n: sum(u in needed for u in n.users) for n in needed}
        keep = held.union(wanted)
        plan: _Plan = []
        for node in self.nodes:
            if node not in needed or node.op == "output" or node in held:
                continue
            unread = []
            for used in node.all_input_nodes:
                left[used] -= 1
                if left[used] <= 0 and used not in keep:
                    unread.append(used)
            plan.append((node, unread))
        self._plans[wanted, held] = plan
        return plan

    def result(
        self, inputs: Mapping[str, Any], given: Mapping[fx.Node, Any] | None = None, *, writes: bool = True
    ) -> Any:
        """Returns what the graph returns. writes: runs all ops that write to their arguments; otherwise only those
        whose memory is read for the result."""
        wanted = _nodes_in(self.output)
        written = self._written if writes else _read_again(wanted, self._written)
        found = self(inputs, [*wanted, *written], given)
        return fx.node.map_aggregate(self.output, lambda n: found[n] if isinstance(n, fx.Node) else n)

    @functools.cached_property
    def _written(self) -> list[fx.Node]:
        """The nodes that write to their arguments."""
        return [n for n in self.nodes if mutates(n)]

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any], inputs: Mapping[str, Any]) -> Any:
        if node.op == "placeholder":
            return inputs[str(node.target)]
        if node.op == "get_attr":
            return self.stand_ins(str(node.target), get_attr(self.root, str(node.target)))
        call = self._calls.get(node)
        if call is None:
            call = self._calls[node] = _prepared(node)
        if call.flat:
            args: Any = tuple(values[a] if isinstance(a, fx.Node) else a for a in call.args)
            kwargs: Any = {name: values[a] if isinstance(a, fx.Node) else a for name, a in call.kwargs.items()}
        else:
            args, kwargs = fx.node.map_arg((call.args, call.kwargs), values.__getitem__)  # type: ignore[misc]
        if call.grouped and (found := _grouped_product(args)) is not None:
            return found
        if any(isinstance(a, ThinProduct) for a in args):
            found = _thin(node, args, kwargs)
            if found is not None:
                return found
        if any(isinstance(a, (ThinProduct, list, tuple)) for a in args):
            args = fx.node.map_aggregate(args, lambda a: a.dense() if isinstance(a, ThinProduct) else a)
        try:
            out = run_op(node, args, kwargs)
        except FAILURES as error:
            try:
                out = _in_own_dtypes(node, args, kwargs)
            except FAILURES:
                raise EvaluationError(node, str(error).splitlines()[0]) from error
        if call.empty:
            out = out.zero_()
        return fx.node.map_aggregate(out, _widened) if isinstance(out, (tuple, list)) else _widened(out)


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_aggregate(value, lambda a: found.append(a) if isinstance(a, fx.Node) else None)
    return found


def _read_again(wanted: list[fx.Node], written: list[fx.Node]) -> list[fx.Node]:
    """Returns those of the ops `written` that write to memory that `wanted` depends on."""
    needed, found = ancestors(wanted), []
    more = True
    while more:
        more = False
        for node in written:
            if node not in found and any(n in needed for n in _memory(node)):
                found.append(node)
                needed |= ancestors([node])
                more = True
    return found


def _memory(node: fx.Node) -> set[fx.Node]:
    """Returns the nodes whose memory an op writes to: its arguments, and what these are views of."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    todo = [a for a, s in zip(node.args, schema) if s.alias_info is not None and s.alias_info.is_write]
    found: set[fx.Node] = set()
    while todo:
        at = todo.pop()
        if isinstance(at, fx.Node) and at not in found:
            found.add(at)
            results = at.target._schema.returns if isinstance(at.target, torch._ops.OpOverload) else ()
            if any(r.alias_info is not None for r in results):  # a view
                todo += at.all_input_nodes[:1]
    return found


class _Call(NamedTuple):
    """What is known of a node's call before there are values. args, kwargs: with the dtypes and the device of evaluations."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    flat: bool  # no argument is a list
    grouped: bool
    empty: bool


def _prepared(node: fx.Node) -> _Call:
    args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), _argument)  # type: ignore[misc]
    flat = not any(isinstance(a, (list, tuple, dict, slice)) for a in (*args, *kwargs.values()))
    return _Call(args, kwargs, flat, str(node.target) in GROUPED, is_op(node, *EMPTY))


def _argument(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return widen(value)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _widened(value: Any) -> Any:
    """Widens a result to the dtype that evaluations use: ops without a tensor argument have torch's default dtype."""
    if isinstance(value, Tensor) and (wide := widen(value.dtype)) is not value.dtype:
        return value.to(wide)
    return value


def _in_own_dtypes(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Runs an op that has no float64 kernel on arguments in the model's dtypes."""
    values, spec = tree_flatten((args, kwargs))
    sources, _ = tree_flatten((tuple(node.args), dict(node.kwargs)))
    if len(values) != len(sources):
        raise TypeError("its arguments are nested in another way than the node's")
    given = []
    for value, source in zip(values, sources):
        own = tensor_of(source)
        if isinstance(value, Tensor) and own is not None:
            value = value.to(own.dtype)
        given.append(source if isinstance(source, torch.dtype) else value)
    args, kwargs = tree_unflatten(given, spec)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _thin(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an op on thin products without multiplying them out; None if it is not one that can."""
    target = node.target
    if kwargs and target is not aten._to_copy.default:
        return None
    if target is aten.embedding.default and not isinstance(args[1], ThinProduct):
        return torch.embedding(args[0].left, args[1]) @ args[0].right
    if target is aten.linear.default and not isinstance(args[0], ThinProduct):
        out = (args[0] @ args[1].right.mT) @ args[1].left.mT
        return out if len(args) < 3 or args[2] is None else out + args[2]
    if target in (aten.mm.default, aten.matmul.default, aten.bmm.default) and not isinstance(args[0], ThinProduct):
        return (args[0] @ args[1].left) @ args[1].right
    if target is aten.addmm.default and not isinstance(args[1], ThinProduct):
        return args[0] + (args[1] @ args[2].left) @ args[2].right
    if target is aten._to_copy.default or target in (aten.clone.default, aten.detach.default, aten.alias.default):
        return args[0]
    rank = args[0].left.dim() if isinstance(args[0], ThinProduct) else 0
    if rank and target is aten.t.default:
        return args[0].transposed()
    if rank and target is aten.transpose.int and {d % rank for d in args[1:3]} == {rank - 2, rank - 1}:
        return args[0].transposed()
    if rank and target is aten.permute.default:
        order = [d % rank for d in args[1]]
        if order == list(range(rank)):
            return args[0]
        if order == [*range(rank - 2), rank - 1, rank - 2]:
            return args[0].transposed()
    return None


def _grouped_product(args: tuple[Any, ...]) -> Tensor | None:
    """Returns the result of an op of GROUPED in float64 (torch computes at most 32 bits); None for other arguments."""
    if len(args) != 3 or not all(isinstance(args[i], Tensor) for i in (0, 2)) or args[0].dim() != 2:
        return None
    x, weights, ends = args
    if isinstance(weights, ThinProduct):
        return _grouped(_grouped(x, weights.left, ends), weights.right, ends)
    return _grouped(x, weights, ends) if weights.dim() == 3 else None


def _grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiplies x (T, a), rows sorted by group, with each row's group weight (G, a, b); ends (G,): last row + 1."""
    out = x.new_zeros(x.shape[0], weights.shape[-1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        out[start:end] = x[start:end] @ weights[group]
        start = end
    return out
