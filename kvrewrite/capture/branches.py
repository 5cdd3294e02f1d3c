"""Checks branches on the number of tokens or rows: a trace takes one way, but a graph must hold for all calls.

torch records each comparison of sizes in the model's code. This module traces the model again with sizes for which a
comparison comes out differently. If the graph or its results are the same, the branch is harmless. If the model raises,
it does not support such texts. Otherwise it computes something else for them and is refused.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from kvrewrite.capture.explain_failure import DATA_DEPENDENT, causes, noted_place
from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import symbol

MOST_TRACES = 12
LONGEST = 1 << 20  # tokens; larger constants are not lengths
BATCHES = (2, 3, 4, 5, 8, 16, 64)

Trace = Callable[[int, int], Any]  # (rows, tokens) -> torch.export.ExportedProgram


def without_branches(program: Any, trace: Trace, rows: int, tokens: int) -> Any:
    """Returns `program`, traced by `trace(rows, tokens)`; or the same graph traced with more tokens, if a harmless
    branch would limit the first one to fewer. Raises UnsupportedModelError with the line of a branch that matters."""
    text = program_text(program)
    tried = {(rows, tokens)}
    longest = tokens, program
    todo = [(program, rows, tokens)]
    while todo:
        at, *seen = todo.pop()
        for guard, place in _comparisons(at):
            for size in _otherwise(at, guard, seen):
                if size in tried:
                    continue
                if len(tried) > MOST_TRACES:
                    raise UnsupportedModelError(
                        f"the model's forward decides by the length of the text in many places{place}"
                    )
                tried.add(size)
                other = _traced(trace, size, place)
                if other is None:
                    continue
                if not place and not getattr(_sizes(other)[2], "free_symbols", None):
                    continue  # torch, not the model, treats so few tokens as a constant
                if program_text(other) == text:
                    if size[1] > longest[0]:
                        longest = size[1], other
                elif not _same_results(program, other, *size):
                    raise UnsupportedModelError(_reason(size, (rows, tokens), place))
                todo.append((other, *size))
    return longest[1]


def why_not_longer(model: int | None, graph: int | None, trace: Trace, rows: int) -> str | None:
    """The reason why a graph for at most `graph` tokens is not the model, or None. model: the bound that the model's
    trace found, or None. A model that raises for texts several times that long has a bound of its own (the end of a
    table)."""
    if graph is None or (model is not None and graph >= model):
        return None
    if _traced(trace, (rows, 4 * graph), "") is None:
        return None
    return (
        f"the graph that was traced holds for texts of up to {graph} tokens only, and the model takes longer ones: an op in it "
        f"does something else from {graph + 1} tokens on (such as `topk(min(n, length))`), and a graph holds for all texts"
    )


def why_not_single(program: Any, trace: Trace, rows: int, tokens: int) -> str | None:
    """The reason why `program`, traced by `trace(rows, tokens)`, does not hold for one token or for one row, or None.

    torch treats a size of one as a constant from the start and never records a branch on it, so these sizes are traced
    separately. A size for which the model raises, or which can't be computed here, is no reason against the program.
    """
    for size in ((rows, 1), (1, tokens)):
        other = _traced(trace, size, "")
        if other is not None and _same_results(program, other, *size) is False:
            return _reason(size, (rows, tokens), "")
    return None


def _same_results(one: Any, other: Any, rows: int, tokens: int) -> bool | None:
    """Whether two different traces of a model (one pads by zero, say) give the same results for texts of this size;
    None if that can't be computed."""
    from kvrewrite.ir.evaluate import EvaluationError, Evaluator, StandIns, difference

    stand_ins = StandIns()
    ids = torch.arange(rows * tokens).reshape(rows, tokens) % 7
    given = iter((ids, torch.arange(tokens).repeat(rows, 1)))
    user = {name: next(given) for name in one.graph_signature.user_inputs if isinstance(name, str)}
    results = []
    for program in (one, other):
        inputs: dict[str, Any] = {}
        held = {**program.state_dict, **program.constants}
        for spec in program.graph_signature.input_specs:
            inputs[spec.arg.name] = (
                user.get(spec.arg.name) if spec.target is None else stand_ins(spec.target, held[spec.target])
            )
        try:
            results.append(Evaluator(program.graph, program.graph_module, stand_ins).result(inputs, writes=False))
        except EvaluationError:
            return None
    wanted, got = (torch.utils._pytree.tree_leaves(r) for r in results)
    return len(wanted) == len(got) and not any(difference(b, a, 1e-9, least=1.0) for a, b in zip(wanted, got))


def _reason(size: tuple[int, int], usual: tuple[int, int], place: str) -> str:
    what, few, many = ("tokens", size[1], usual[1]) if size[1] != usual[1] else ("rows", size[0], usual[0])
    return (
        f"the model computes something else for {few} {what} than for {many}{place}. A graph holds for all calls, and with a "
        f"cache a text comes in calls of any number of tokens, down to one: its forward must not decide by the number of {what}"
    )


def _traced(trace: Trace, size: tuple[int, int], place: str) -> Any | None:
    """Traces the program for `size`; None if the model raises for it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it prints what a model raises, which is no fault here
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        return trace(*size)
    except UnsupportedModelError:
        raise
    except Exception as error:  # torch.export raises many types
        if any(isinstance(cause, DATA_DEPENDENT) for cause in causes(error)):
            raise UnsupportedModelError(
                f"the model goes another way for {size[1]} tokens in {size[0]} rows{place}, and that way can't be traced: it "
                "decides by the values in a tensor"
            ) from error
        return None
    finally:
        log.setLevel(level)


def _sizes(program: Any) -> tuple[Any, Any, Any]:
    """Returns a program's shape environment and its numbers of rows and tokens: symbols or ints."""
    name = program.graph_signature.user_inputs[0]
    ids: Tensor = next(n for n in program.graph.nodes if n.name == name).meta["val"]
    node: Any = getattr(ids.shape[1], "node", None)
    return (node.shape_env if node is not None else None), symbol(ids.shape[0]), symbol(ids.shape[1])


def _comparisons(program: Any) -> list[tuple[Any, str]]:
    """Returns the comparisons of rows and tokens in the model's own code, with their lines, and the texts' least
    length."""
    environment, rows, tokens = _sizes(program)
    if environment is None:
        return []
    found = []
    for guard in environment.guards:
        place = noted_place(guard.sloc.framework_loc)
        symbols: set[Any] = getattr(guard.expr, "free_symbols", set())
        if place and symbols and symbols <= {rows, tokens}:
            found.append((guard.expr, place))
    bounds = environment.var_to_range.get(tokens)
    if bounds is not None and isinstance(bounds.lower, sympy.Integer) and int(bounds.lower) > 2:
        found.append((sympy.Ge(tokens, bounds.lower), ""))
    return found


def _otherwise(program: Any, expression: Any, seen: list[int]) -> list[tuple[int, int]]:
    """Returns sizes (rows, tokens), nearest to the trace's from below and above, for which a true expression is
    false."""
    _, rows, tokens = _sizes(program)
    constants = {abs(int(n)) for n in expression.atoms(sympy.Integer) if abs(int(n)) <= LONGEST}
    near = {c * k + d for c in constants for k in (1, 2) for d in (-1, 0, 1)} | set(range(2, 25))
    found = []
    if tokens in expression.free_symbols:
        lengths = sorted(n for n in near if n >= 2)
        broken = [n for n in lengths if not _holds(expression, {rows: seen[0], tokens: n})]
        found += [
            (seen[0], n) for n in [n for n in broken if n < seen[1]][-1:] + [n for n in broken if n > seen[1]][:1]
        ]
    if rows in expression.free_symbols:
        batches = sorted({*BATCHES, *(n for n in near if 2 <= n <= 1024)})
        found += [(n, seen[1]) for n in batches if not _holds(expression, {rows: n, tokens: seen[1]})][:1]
    return found


def _holds(expression: Any, sizes: dict[Any, int]) -> bool:
    return bool(expression.subs(sizes))


def program_text(program: Any) -> str:
    """Returns a program as text, equal for programs that compute the same results from the same values in any order."""
    constants = []
    for name, value in program.constants.items():
        if isinstance(value, Tensor) and value.device.type != "meta" and type(value) is torch.Tensor:
            constants.append(f"{name} {value.dtype} {value.tolist()}")
        else:
            constants.append(f"{name} {type(value).__name__} {getattr(value, 'shape', '')}")
    return "\n".join([_digest(program.graph_module), *constants])


def _digest(module: fx.GraphModule) -> str:
    """Returns a hash of what a graph computes, from the hashes of its inputs, constants and calls."""
    known: dict[fx.Node, str] = {}
    inputs = 0
    for node in module.graph.nodes:
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        if node.op == "placeholder":
            target, inputs = str(inputs), inputs + 1
        elif node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), fx.GraphModule):
            target = _digest(getattr(module, str(node.target)))
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])  # type: ignore[arg-type, return-value]
        known[node] = hashlib.sha256(f"{node.op} {target} {arguments}".encode()).hexdigest()
        if node.op == "output":
            return known[node]
    raise ValueError("a graph without an output")
