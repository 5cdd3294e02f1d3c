"""Writes nodes of a graph as readable Python: for people to read, not the code that runs.

A tensor that is used once is written where it is used, names say what a tensor is for (q, k, v, scores), parameters are
relative to their module, and every line shows its shape. Nothing that computes is left out, except arguments of
kvrewrite's ops that mean that something is absent (None, a window of 0). No read moves past a write that came after it.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from kvrewrite.ir.fx import is_size, mutates, symbol, tensor_of
from kvrewrite.tools.inspection.lines import WIDTH, Line

aten = torch.ops.aten
END = 2**63 - 1  # of a slice: to the end

# Operator precedence, as in Python's grammar.
COMPARISON, SUM, PRODUCT, UNARY, POWER, ATOM = range(6)
BINARY: dict[str, tuple[str, int]] = {
    "add": ("+", SUM),
    "sub": ("-", SUM),
    "mul": ("*", PRODUCT),
    "div": ("/", PRODUCT),
    "matmul": ("@", PRODUCT),
    "mm": ("@", PRODUCT),
    "bmm": ("@", PRODUCT),
    "floordiv": ("//", PRODUCT),
    "floor_divide": ("//", PRODUCT),
    "truediv": ("/", PRODUCT),
    "mod": ("%", PRODUCT),
    "remainder": ("%", PRODUCT),
}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# Called as methods of their first argument, with the rest unchanged.
METHODS = {
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "mean",
    "sum",
    "amax",
    "amin",
    "clamp",
    "clamp_min",
    "clamp_max",
    "gather",
    "index_select",
    "masked_fill",
    "contiguous",
    "flatten",
    "softmax",
    "argmax",
    "cumsum",
    "t",
    "repeat_interleave",
}
SIZED = {"reshape": "reshape", "view": "view", "_unsafe_view": "view", "expand": "expand", "repeat": "repeat"}
FUNCTIONS = {"linear": "F.linear", "silu": "F.silu", "gelu": "F.gelu", "embedding": "F.embedding"}
NONE_IS_ZERO = {"softcap", "window", "chunk", "sinks"}  # where 0 means that there is none, as in the ops' docstrings
DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "float8_e4m3fn": "fp8",
}


def op_name(node: fx.Node) -> str:
    """Returns the op that a node calls, without overload and "aten": "linear", "kvrewrite.cached_attention"."""
    if isinstance(node.target, torch._ops.OpOverload):
        space, name = node.target._schema.name.split("::")
        return name if space == "aten" else f"{space}.{name}"
    return getattr(node.target, "__name__", str(node.target))


class Sizes:
    """Symbolic sizes by their names in kvrewrite's docstrings: B rows, T new tokens."""

    def __init__(self, gm: fx.GraphModule):
        self.names: dict[Any, str] = {}
        for node in gm.graph.nodes:
            value = tensor_of(node)
            if node.op == "placeholder" and node.target in ("input_ids", "inputs_embeds") and value is not None:
                for size, name in zip(value.shape[:2], "BT"):
                    if not isinstance(symbol(size), int):
                        self.names.setdefault(symbol(size), name)

    def text(self, size: Any) -> str:
        """Formats a size, or an expression of sizes."""
        expression = str(symbol(size))
        for known, name in self.names.items():
            expression = re.sub(rf"\b{re.escape(str(known))}\b", name, expression)
        return expression

    def shape(self, value: torch.Tensor) -> str:
        """Formats a shape as a Python tuple."""
        sizes = [self.text(s) for s in value.shape]
        return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"


def dtype_text(dtype: torch.dtype) -> str:
    """Abbreviates a dtype."""
    name = str(dtype).removeprefix("torch.")
    return DTYPES.get(name, name)


class Renderer:
    """Writes some nodes of a graph as statements.

    roles: preferred names of nodes; inside: nodes that are written; anything else that they read is an input and only
    has a name. parameter: the name and shape of what a get_attr node reads. old: nodes that were there before.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inside: Iterable[fx.Node],
        roles: Mapping[fx.Node, str],
        parameter: Callable[[fx.Node], str],
        *,
        sizes: Sizes,
        old: set[fx.Node] | None = None,
        notes: Mapping[str, str] | None = None,
        values: Mapping[fx.Node, torch.Tensor] | None = None,
    ):
        chosen = set(inside)
        self.gm, self.roles, self.parameter, self.old = gm, roles, parameter, old
        self.sizes, self.notes, self.values = sizes, notes or {}, values or {}
        self.order = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.nodes = sorted(chosen, key=self.order.__getitem__)
        self.inside = chosen
        self.names: dict[fx.Node, str] = {}
        self.inputs: list[fx.Node] = []
        self.taken: dict[str, fx.Node] = {}
        self.writes = [self.order[n] for n in self.nodes if mutates(n)]
        self.inlined: dict[fx.Node, tuple[str, int]] = {}
        self.lines: list[Line] = []
        self._parts: dict[fx.Node, list[fx.Node]] = {}

    # -- which nodes have a line
    def _has_line(self, node: fx.Node) -> bool:
        users = [u for u in node.users if u in self.inside]
        if node in self.roles and not self.roles[node].startswith("~"):
            return True
        if len(users) != 1 or mutates(node) or users[0].all_input_nodes.count(node) != 1:
            return True
        user = users[0]
        used = sum(1 for a in _flat(user) if a is node)
        if used != 1 or len(node.users) != 1:
            return True
        # Writing it at its user must not move it past a write.
        return any(self.order[node] < w < self.order[user] for w in self.writes)

    def run(self) -> list[Line]:
        """Returns the statements in order."""
        for node in self.nodes:
            if node.op == "get_attr" or (
                is_size(node) and node.target is aten.sym_size.int and node.meta.get("val") is not None
            ):
                continue  # written by name wherever it is read
            if node.target is operator.getitem and self._unpacked(node.args[0]):
                continue
            text, level = self.expression(node)
            self._parts[node] = [
                node,
                *(p for i in node.all_input_nodes for p in self._parts.get(i, []) if i in self.inlined),
            ]
            if not self._has_line(node) and len(text) <= WIDTH:
                self.inlined[node] = (text, level)
                continue
            self._line(node, text)
        return self.lines

    def _unpacked(self, node: Any) -> bool:
        """Whether a node's results are written as `a, b = ...`."""
        return (
            isinstance(node, fx.Node)
            and node in self.inside
            and bool(node.users)
            and all(u.target is operator.getitem for u in node.users)
        )

    def _line(self, node: fx.Node, text: str) -> None:
        results: list[str] = []
        value = self._value(node)
        if self._unpacked(node):
            items = {int(u.args[1]): u for u in node.users}  # type: ignore[call-overload, arg-type]
            returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
            for i in range(max(max(items) + 1, len(returns))):
                used = i in items and (items[i] in self.roles or any(u in self.inside for u in items[i].users))
                results.append(self._name(items[i]) if used else "_")
            value = self._value(items[0]) if 0 in items else None
        elif not mutates(node) or any(u in self.inside for u in node.users):
            results.append(self._name(node))
        parts = self._parts[node]
        weights = [i for p in reversed(parts) for i in p.all_input_nodes if i.op == "get_attr"]
        self.lines.append(
            Line(
                names=results,
                code=f"{', '.join(results)} = {text}" if results else text,
                op=op_name(node),
                nodes=[p.name for p in sorted(parts, key=self.order.__getitem__)],
                shape=None if value is None else self.sizes.shape(value),
                dtype=None if value is None else dtype_text(value.dtype),
                parameters={
                    self.parameter(w): self.sizes.shape(v) for w in weights if (v := self._value(w)) is not None
                },
                note=self.notes.get(op_name(node), ""),
                new=self.old is not None and any(p not in self.old for p in parts),
            )
        )

    def _value(self, node: fx.Node) -> torch.Tensor | None:
        value = tensor_of(node)
        return value if value is not None else self.values.get(node)

    # -- names
    def _name(self, node: fx.Node) -> str:
        """Names a node's value: by its role; reuses the name if the value before isn't needed any more."""
        if node in self.names:
            return self.names[node]
        wanted = self.roles.get(node, "").removeprefix("~") or _named_after(node)
        name, count = wanted, 1
        while name in self.taken and not self._free(name, node):
            count += 1
            name = f"{wanted}_{count}"
        self.taken[name] = node
        self.names[node] = name
        return name

    def _free(self, name: str, node: fx.Node) -> bool:
        """Whether `name` can be reassigned at `node`: no later statement needs its present value."""
        holder = self.taken[name]
        return self._needed_until(holder) <= self.order[node]

    def _needed_until(self, node: fx.Node) -> int:
        """Returns the position of the last statement that uses a node's name."""
        last = -1
        for user in node.users:
            if user in self.inside:
                at = self._needed_until(user) if user in self.inlined else self.order[user]
                last = max(last, at, self.order[user])
        return last

    def _input(self, node: fx.Node) -> str:
        """Names a node that is not written: an input."""
        if node not in self.names:
            self.inputs.append(node)
            wanted = self.roles.get(node, "").removeprefix("~") or _plain(
                str(node.target) if node.op == "placeholder" else node.name
            )
            name, count = wanted, 1
            while name in self.taken:
                count += 1
                name = f"{wanted}_{count}"
            self.taken[name] = node
            self.names[node] = name
        return self.names[node]

    # -- expressions
    def operand(self, value: Any, level: int = SUM) -> str:
        """Formats an argument, in parentheses if its precedence is below `level`."""
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return self.parameter(value)
            if is_size(value) and (value.target is aten.sym_size.int or value not in self.inside):
                return self.sizes.text(value.meta["val"])
            if value in self.inlined:
                text, own = self.inlined[value]
                return f"({text})" if own < level else text
            return (
                self.names[value]
                if value in self.names
                else self._name(value)
                if value in self.inside
                else self._input(value)
            )
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.operand(v) for v in value)}]"
        if isinstance(value, float):
            return repr(value)
        if isinstance(value, slice):
            return self._span(value.start, value.stop, value.step)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0 and level > UNARY:
            return f"({value})"
        return str(value) if not isinstance(value, str) else repr(value)

    def _span(self, start: Any, stop: Any, step: Any) -> str:
        low = "" if start in (None, 0) else self.operand(start)
        high = "" if stop is None or (isinstance(stop, int) and stop >= END) else self.operand(stop)
        return f"{low}:{high}" + ("" if step in (None, 1) else f":{self.operand(step)}")

    def expression(self, node: fx.Node) -> tuple[str, int]:
        """Returns what a node computes, and its precedence."""
        name, args, kwargs = op_name(node), list(node.args), dict(node.kwargs)
        if node.op == "placeholder":
            return self._input(node), ATOM
        overload = getattr(node.target, "_overloadname", "")
        if name in BINARY and len(args) == 2 and not kwargs and "Mode" not in overload and "mode" not in overload:
            sign, level = BINARY[name]
            return f"{self.operand(args[0], level)} {sign} {self.operand(args[1], level + 1)}", level
        if name in COMPARE and len(args) == 2:
            return f"{self.operand(args[0])} {COMPARE[name]} {self.operand(args[1])}", COMPARISON
        if name == "neg":
            return f"-{self.operand(args[0], UNARY)}", UNARY
        if name == "pow" and len(args) == 2:
            return f"{self.operand(args[0], ATOM)} ** {self.operand(args[1], UNARY)}", POWER
        if name == "getitem":
            return f"{self.operand(args[0], ATOM)}[{self.operand(args[1])}]", ATOM
        if name == "sym_size":
            return f"{self.operand(args[0], ATOM)}.shape[{self.operand(args[1])}]", ATOM
        if name in ("slice", "select"):
            return self._index(node, name, args), ATOM
        if name in SIZED and len(args) == 2 and isinstance(args[1], (list, tuple)) and not kwargs:
            return f"{self.operand(args[0], ATOM)}.{SIZED[name]}({', '.join(self.operand(s) for s in args[1])})", ATOM
        if name in ("_to_copy", "to") and (dtype := _only_dtype(args, kwargs)) is not None:
            return f"{self.operand(args[0], ATOM)}.to({dtype})", ATOM
        if name in ("clone", "alias", "detach", "contiguous"):
            return f"{self.operand(args[0], ATOM)}.{name}()", ATOM
        written = [self.operand(a) for a in args]
        if isinstance(node.target, torch._ops.OpOverload) and "." in name:
            written = self._named(node, args)
        written += [f"{k}={self.operand(v)}" for k, v in kwargs.items()]
        if "." in name:
            return f"{name}({', '.join(written)})", ATOM
        if name == "index" and isinstance(args[1], (list, tuple)):
            return (
                f"{self.operand(args[0], ATOM)}[{', '.join(':' if i is None else self.operand(i) for i in args[1])}]",
                ATOM,
            )
        if name in FUNCTIONS or (hasattr(torch, name) and name not in METHODS):
            return f"{FUNCTIONS.get(name, f'torch.{name}')}({', '.join(written)})", ATOM
        if hasattr(torch.Tensor, name) and args and isinstance(args[0], fx.Node):
            return f"{self.operand(args[0], ATOM)}.{name}({', '.join(written[1:])})", ATOM
        return f"aten.{name}({', '.join(written)})", ATOM

    def _named(self, node: fx.Node, args: list[Any]) -> list[str]:
        """Formats arguments of a kvrewrite op: the first three by position, the others by name, without None."""
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        written: list[str] = []
        by_name = False
        for i, (value, argument) in enumerate(zip(args, schema)):
            by_name |= i > 2 or value is None or not isinstance(value, fx.Node)
            if value is not None and not (argument.name in NONE_IS_ZERO and value == 0):
                text = self.operand(value)
                written.append(f"{argument.name}={text}" if by_name else text)
        return written

    def _index(self, node: fx.Node, name: str, args: list[Any]) -> str:
        """Formats a slice or a select as an index."""
        source, dim = args[0], args[1] if len(args) > 1 else 0
        rest = [*args[2:], *[None] * (3 - len(args[2:]))]
        inner = self._span(*rest) if name == "slice" else self.operand(rest[0])
        value = self._value(source) if isinstance(source, fx.Node) else None
        base = self.operand(source, ATOM)
        if value is not None and dim in (-1, value.dim() - 1) and dim != 0:
            return f"{base}[..., {inner}]"
        if dim < 0:
            return f"{base}[..., {inner}{', :' * (-1 - dim)}]"
        return f"{base}[{':, ' * dim}{inner}]"


def _only_dtype(args: list[Any], kwargs: dict[str, Any]) -> torch.dtype | None:
    """Returns the dtype of a cast that changes nothing else."""
    found = [a for a in [*args[1:], *kwargs.values()] if a is not None and a is not False]
    return found[0] if len(found) == 1 and isinstance(found[0], torch.dtype) else None


def _flat(node: fx.Node) -> list[Any]:
    """Returns all argument leaves of a node."""
    out: list[Any] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: out.append(n) or n)  # type: ignore[func-returns-value, arg-type]
    return out


NAMES = {
    "getitem": "part",
    "slice": "part",
    "split_with_sizes": "parts",
    "split": "parts",
    "add": "total",
    "sub": "rest",
    "cat": "joined",
    "where": "chosen",
    "observe": "observed",
    "lt": "below",
    "gt": "above",
    "reshape": "t",
    "view": "t",
    "transpose": "t",
    "expand": "t",
    "unsqueeze": "t",
    "permute": "t",
    "mul": "product",
    "_to_copy": "cast",
    "to": "cast",
}


def _named_after(node: fx.Node) -> str:
    """Names a node by what it does, if nothing says what it is for."""
    name = op_name(node).split(".")[-1]
    return NAMES.get(name) or _plain(name)


def _plain(text: str) -> str:
    """Turns text into a name."""
    name = re.sub(r"\W+", "_", text).strip("_").removesuffix("_default") or "x"
    return f"{name}_" if keyword.iskeyword(name) or name[0].isdigit() else name
