"""Calls an op of a graph from a file on fake values; refuses what torch would not end on or could not compute."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from kvrewrite.errors import ArtifactError
from kvrewrite.ir.fake_values import Sizes, Symbolic, shown

MAX_POWER = 16
MAX_RESULTS = 65_536  # of one call
# Ops whose result torch can't predict without computing it.
UNKNOWN = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedOperatorException,
)


class Unpredictable(Exception):
    """The result's shape depends on data."""


def call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Sizes) -> Any:
    """What an op, or Python's arithmetic on sizes, gives. Raises ArtifactError, and Unpredictable where torch can't say."""
    if not isinstance(function, torch._ops.OpOverload):
        return _arithmetic(function, args)
    _refuse_tensors(function, args, kwargs)
    _refuse_many_results(function, args, kwargs)
    try:
        # The Python dispatcher: without it torch 2.11 treats sizes as numbers in composite ops (matmul).
        with sizes.mode, sizes.shape_env.suppress_guards(), enable_python_dispatcher():
            return function(*args, **kwargs)
    except UNKNOWN as error:
        raise Unpredictable from error
    except Exception as error:  # torch raises many types; all are the graph's fault
        lines = str(error).strip().splitlines()
        raise ArtifactError(
            f"it can't be computed: {type(error).__name__}: {lines[0][:300] if lines else ''}; the file is damaged"
        ) from error


def _refuse_tensors(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a tensor in place of a list or number: torch would iterate over its elements, which may not end."""
    given = {a.name: v for a, v in zip(op._schema.arguments, args)} | kwargs
    for argument in op._schema.arguments:
        value, kind = given.get(argument.name), str(argument.type)
        parts = value if isinstance(value, (list, tuple)) else [value]
        if not any(isinstance(part, Tensor) for part in parts):
            continue
        is_list = isinstance(value, (list, tuple))
        wanted = "List[" in kind if is_list else "List[" not in kind
        if not wanted or ("Tensor" not in kind and kind not in ("number", "Optional[number]")):
            raise ArtifactError(f"{argument.name} is {shown(value)}; expected {kind}")


def _refuse_many_results(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses ops that split a tensor into its rows: they would do so for the example of a size too, which is large."""
    given = {a.name: v for a, v in zip(op._schema.arguments, args)} | kwargs
    whole = given.get("self")
    if not any("List[Tensor]" in str(r.type) for r in op._schema.returns) or not isinstance(whole, Tensor):
        return
    if isinstance(given.get("split_sizes", given.get("indices", given.get("sizes"))), (list, tuple)):
        return  # as many as the list has
    dim, each = given.get("dim", 0), given.get("split_size", 1)
    count = given.get("chunks", given.get("sections"))
    if (
        count is None
        and isinstance(dim, int)
        and -whole.dim() <= dim < whole.dim()
        and isinstance(each, int)
        and each > 0
    ):
        size = whole.shape[dim]
        count = -(-size // each) if isinstance(size, int) else size
    if not isinstance(count, int) or count > MAX_RESULTS:
        raise ArtifactError(f"it gives {shown(count)} results; expected a number up to {MAX_RESULTS}")


def _arithmetic(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Calls Python's arithmetic on sizes."""
    if function is operator.getitem:
        results, index = args
        if not isinstance(results, (list, tuple)) or type(index) is not int or not 0 <= index < len(results):
            raise ArtifactError(f"there is no result {index!r:.40} of {shown(results)}")
        return results[index]
    operands = args[0] if function is torch.sym_sum and isinstance(args[0], (list, tuple)) else args
    if not all(isinstance(a, (bool, int, float, *Symbolic)) for a in operands):
        raise ArtifactError(f"it computes with {', '.join(shown(a) for a in operands)[:200]}; expected sizes")
    if function is operator.pow and not (isinstance(args[1], (int, float)) and abs(args[1]) <= MAX_POWER):
        raise ArtifactError(f"the exponent {shown(args[1])} is too large; expected a number up to {MAX_POWER}")
    exact: dict[Any, Any] = {operator.not_: torch.sym_not}
    if any(isinstance(a, Symbolic) for a in operands):
        function = exact.get(function, function)
    try:
        return function(*args)
    except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"it can't be computed: {type(error).__name__}: {str(error)[:200]}") from error
