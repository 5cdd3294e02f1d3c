"""Runs a policy's code on tensors without data, and traces it into a graph.

A first run, with sizes that are numbers, says what the code reads and does (`Run`). Only code that does something new is
traced, with sizes that are symbols: tracing with symbols takes long, and layers and further rewrites do the same. Symbols
may be any number from 0, and code that branches on one is refused, because a graph serves all lengths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from kvrewrite.errors import ArtifactError, OptionError
from kvrewrite.ir.fx import get_attr, parameters, set_args, symbol, tensor_of
from kvrewrite.ir.serialize import op_name
from kvrewrite.ir.value_facts import NamedSizes

aten = torch.ops.aten
END = 2**63 - 1  # where a slice of everything ends
TOLD = torch.ops.kvrewrite.uniform.default  # is told its site's number, as `layer`
# What Python's operators are called, and what the same is called in captured graphs.
SPELLINGS: dict[Any, Any] = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__and__.Scalar: aten.bitwise_and.Scalar,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.__xor__.Scalar: aten.bitwise_xor.Scalar,
}


class Values:
    """Tensors without data that stand for what nodes give. symbolic: with sizes that are symbols, else with numbers."""

    def __init__(self, gm: fx.GraphModule, symbolic: bool):
        self.shapes: ShapeEnv | None = None
        if symbolic:
            self.shapes = ShapeEnv(
                specialize_zero_one=False,
                duck_shape=False,
                allow_scalar_outputs=False,
                allow_dynamic_output_shape_ops=False,
            )
        self._mode = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)
        self._mode.cache_enabled = (
            not symbolic
        )  # keeping results costs more than computing them where sizes are symbols
        self._names = NamedSizes(self._mode)
        self._numbers: dict[Any, int] = {}
        self._gm, self._values = gm, dict[fx.Node, Any]()
        self._device = next(n.meta["val"].device for n in gm.graph.nodes if n.op == "placeholder")

    def __call__(self, node: fx.Node) -> Any:
        """The value of a node; the same at every call."""
        if node not in self._values:
            known = self._known(node)
            if known is None:
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self)
                with self._mode, self.quiet(), enable_python_dispatcher():
                    self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            else:
                sizes = [self._size(size) for size in known.shape]
                with self._mode:
                    self._values[node] = torch.empty(sizes, dtype=known.dtype, device=self._device)
        return self._values[node]

    def _known(self, node: fx.Node) -> Tensor | None:
        return get_attr(self._gm, str(node.target)) if node.op == "get_attr" else tensor_of(node)

    def moving(self, node: fx.Node) -> list[bool]:
        """Which of the sizes that a node has are symbols."""
        known = self._known(node)
        return [] if known is None else [not isinstance(symbol(size), int) for size in known.shape]

    def _size(self, size: Any) -> Any:
        found = symbol(size)
        if isinstance(found, int) or found.is_Integer:
            return int(found)
        if self.shapes is None:
            for part in found.free_symbols:
                self._numbers.setdefault(part, 5003 + 2 * len(self._numbers))
            return int(found.xreplace(self._numbers))
        own = {part: self._names[str(part)] for part in found.free_symbols}
        example = int(found.xreplace({part: size.node.hint for part, size in own.items()}))
        return self.shapes.create_symintnode(found.xreplace({p: symbol(s) for p, s in own.items()}), hint=example)

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """While it is on, nobody notes what is asked about symbols."""
        return self.shapes.suppress_guards() if self.shapes else contextlib.nullcontext()


class Run(TorchDispatchMode):
    """Notes what code does: equal notes, equal graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Any] = []
        self.on = True
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no id comes twice

    def name(self, value: Any) -> Any:
        """A tensor by the order in which tensors came; what else there is as it is."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._alive)
            self._alive.append(value)
        return f"tensor {self._numbers[id(value)]}"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.on:
            told = args[: parameters(func)["layer"][0]] if func is TOLD else args
            self.notes.append((func, repr(tree_map(self.name, (told, kwargs, found)))))
        return found


def trace(function: Callable[..., list[Any]], values: Sequence[Tensor], policy: str) -> fx.Graph:
    """The graph of `function`, whose ops a saved graph may have. Raises OptionError."""
    with torch.no_grad():
        make = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True, pre_dispatch=True)
        body = make(*values).graph
    for node in body.nodes:
        node.meta = {}  # it may live long
        if node.op == "get_attr":
            raise OptionError(
                f"policy {policy}: its code makes a tensor of constants; use numbers, torch.full or torch.arange"
            )
        if node.op == "call_function":
            node.target = SPELLINGS.get(node.target, node.target)
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise OptionError(
                    f"policy {policy}: {node.target} draws random numbers, which differ between chunks and batches; use "
                    "site.ops.uniform, which hashes positions"
                )
            try:
                op_name(node.target)
            except ArtifactError as error:
                raise OptionError(f"policy {policy}: {error}") from error
    return body


def inline(body: fx.Graph, inputs: Sequence[fx.Node], before: fx.Node, layer: int) -> list[Any]:
    """Copies a trace to where `before` is; returns what it returned."""
    graph = before.graph
    env: dict[fx.Node, Any] = dict(zip((n for n in body.nodes if n.op == "placeholder"), inputs, strict=True))
    found: list[Any] = []
    with graph.inserting_before(before):
        for inner in body.nodes:
            if inner.op == "output":
                found = list(fx.node.map_arg(inner.args[0], env.__getitem__))  # type: ignore[arg-type]
            elif _takes_all(inner):
                env[inner] = env[inner.args[0]]  # type: ignore[index]
            elif inner.op != "placeholder":
                env[inner] = graph.node_copy(inner, env.__getitem__)
                if inner.target is TOLD:
                    set_args(env[inner], layer=layer)
    return found


def _takes_all(node: fx.Node) -> bool:
    """Whether `node` is a slice of everything, as x[:, 0] has it in its first dimension."""
    return node.target is aten.slice.Tensor and (*node.args[2:], *(0, END, 1)[len(node.args) - 2 :]) == (0, END, 1)


class _OpsAskQuietly(TorchFunctionMode):
    """What torch asks of sizes inside an op is no matter of the policy's."""

    def __init__(self, values: Values):
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self._values.quiet():
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def running(values: Values, policy: str) -> Iterator[None]:
    """Policy code runs on these values; OptionError where it asks what no tensor without data can answer."""
    guards = values.shapes.guards if values.shapes else []
    known = len(guards)
    try:
        with _OpsAskQuietly(values) if values.shapes else contextlib.nullcontext(), enable_python_dispatcher():
            yield
    except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as error:
        raise OptionError(
            f"policy {policy}: its code depends on the numbers in a tensor, and it runs once for all texts; use tensor "
            f"operations (torch.where, masked_fill) instead of if, int() and indexing by a mask: {error}"
        ) from error
    if len(guards) > known:
        asked = ", ".join(str(g.expr) for g in guards[known:])
        raise OptionError(
            f"policy {policy}: its code depends on how many rows, tokens or slots there are ({asked}), and it runs once for all "
            "texts; use tensor operations instead of if, min and max"
        )
