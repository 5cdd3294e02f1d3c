"""Values of a graph from a file: fake tensors whose sizes are numbers or named symbols, and how two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from kvrewrite.errors import ArtifactError
from kvrewrite.ir.fx import symbol
from kvrewrite.ir.value_facts import NamedSizes

# Sizes for estimating memory and for checking numbers: about those of a short call, and of a long one.
SMALL, LARGE = 8, 4096
MAX_NUMBER = 1 << 62
MAX_EXPRESSION = 400  # terms of a size's formula; real ones have about ten
Symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Sizes:
    """Makes fake tensors on one device whose sizes are numbers or named symbols; equal ones are the same object."""

    def __init__(self, device: torch.device):
        self.device = device
        self.shape_env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=False)
        self.mode.cache_enabled = False  # this class already shares equal calls, and filling torch's cache takes longer
        self._sizes = NamedSizes(self.mode)
        self._tensors: dict[tuple[Any, ...], Tensor] = {}
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def size(self, name: str) -> Any:
        """Returns the size of this name."""
        return self._sizes[name]

    def tensor(self, dtype: torch.dtype, shape: Sequence[int | str]) -> Tensor:
        """Returns a contiguous tensor."""
        key = (dtype, *shape)
        if key not in self._made:
            sizes = self._sizes.shape(shape)
            with self.mode:
                self._made[key] = self.same(torch.empty(sizes, dtype=dtype, device=self.device))
        return self._made[key]

    def same(self, tensor: Tensor) -> Tensor:
        """Returns the first tensor equal to this one."""
        if tensor.layout != torch.strided:
            raise ArtifactError(f"it makes a tensor of layout {tensor.layout}, expected a strided one")
        key = (
            tensor.dtype,
            tensor.device,
            tuple(symbol(s) for s in tensor.shape),
            tuple(symbol(s) for s in tensor.stride()),
        )
        return self._tensors.setdefault(key, tensor)


def check_number(value: Any) -> None:
    """Raises ArtifactError for numbers and sizes that no real graph has, or that take too long to compute."""
    if isinstance(value, Symbolic):
        expression = value.node.expr
        parts = sympy.preorder_traversal(expression)
        if sum(1 for _, _ in zip(range(MAX_EXPRESSION), parts)) == MAX_EXPRESSION:
            raise ArtifactError("its size is computed in too many steps")
        if isinstance(value, torch.SymBool):
            return
        value = size_at(value, LARGE)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not -MAX_NUMBER < value <= (1 << 63):
        raise ArtifactError(f"the number {str(value)[:24]} is too large")


def size_at(size: Any, every: int) -> int:
    """Returns a size with the same number for every symbol."""
    if not isinstance(size, Symbolic):
        return size  # type: ignore[no-any-return]
    expression = size.node.expr
    try:
        found = expression.xreplace({s: sympy.Integer(every) for s in expression.free_symbols})
        return int(found)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ArtifactError(f"its size {str(expression)[:80]} can't be computed: {error}") from error


def disagreement(told: Any, value: Any) -> str | None:
    """How a fact of the file differs from a value; None if it does not. Their symbols have different names."""
    if isinstance(told, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(told) != len(value):
            return f"{len(told)} results, and it gives {shown(value)}"
        return next((wrong for t, v in zip(told, value) if t is not None and (wrong := disagreement(t, v))), None)
    if isinstance(told, Tensor):
        fits = isinstance(value, Tensor) and told.dtype == value.dtype and told.dim() == value.dim()
        if fits and not any(disagreement(a, b) for a, b in zip(told.shape, value.shape)):
            return None
        return f"{shown(told)}, and it gives {shown(value)}"
    sizes = isinstance(value, (int, torch.SymInt)) and isinstance(told, torch.SymInt) == isinstance(value, torch.SymInt)
    if sizes and (isinstance(told, torch.SymInt) or told == value):
        return None
    return f"{shown(told)}, and it gives {shown(value)}"


def shown(value: Any) -> str:
    """A value as messages name it: a tensor by dtype and shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(symbol(s)) for s in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(shown, value[:4]))}{', ...' if len(value) > 4 else ''})"
    return f"{value!s:.80}"


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are the same expressions."""
    return len(a) == len(b) and all(symbol(x) == symbol(y) for x, y in zip(a, b))
