"""Stores what is known about a graph's values as JSON data: dtypes, shapes and which sizes are the same.

Passes after loading need it: kernels are fused only if shapes are known to fit, and parts are compiled for sizes that
change. Without these facts a loaded graph would run, but slower than the one that was written.

A symbolic size is a name, "d0", "d1", ..., the same wherever a graph has the same expression. How it was computed is
lost: "d2" may once have been the product of the other two. Strides are not kept; nothing after loading needs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from kvrewrite.errors import ArtifactError
from kvrewrite.ir.fx import symbol
from kvrewrite.ir.schema import TensorFact

DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
_FIRST_HINT = 1_000_003  # torch wants an example per size: numbers that no real size has, all different


class FactWriter:
    """Encodes the facts of one graph's values, `node.meta["val"]`."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def __call__(self, value: Any) -> Any:
        """Returns the facts of a tensor {"dtype", "shape"}, of a size, or a list of them; None if nothing is known."""
        if isinstance(value, Tensor):
            return {"dtype": str(value.dtype).removeprefix("torch."), "shape": [self._size(d) for d in value.shape]}
        if isinstance(value, torch.SymInt) or type(value) is int:
            return self._size(value)
        if isinstance(value, (list, tuple)):
            return [self(v) for v in value]
        return None

    def _size(self, size: Any) -> int | str:
        expression = symbol(size)
        if isinstance(expression, int) or expression.is_Integer:
            return int(expression)
        return self._names.setdefault(str(expression), f"d{len(self._names)}")


class NamedSizes:
    """Named sizes in one fake mode, each a symbol of its own; do not ask for them while the mode is on. known: names
    that have a size already."""

    def __init__(self, mode: FakeTensorMode, known: Mapping[str, Any] | None = None):
        self._mode, self._sizes = mode, dict(known or {})

    def __getitem__(self, name: str) -> Any:
        if name not in self._sizes:
            moving: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            example = torch.empty(_FIRST_HINT + 2 * len(self._sizes), device="meta")
            self._sizes[name] = self._mode.from_tensor(example, symbolic_context=moving).shape[0]
        return self._sizes[name]

    def shape(self, sizes: Sequence[int | str]) -> list[Any]:
        """Replaces the names in a shape with sizes."""
        return [self[size] if isinstance(size, str) else size for size in sizes]


class FactReader:
    """Inverts `FactWriter` for one graph on `device`. Values are fake tensors; equal ones are the same object."""

    def __init__(self, device: torch.device):
        self._device = device
        self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self._sizes = NamedSizes(self._mode)
        self._tensors: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, fact: Any, where: str) -> Any:
        """Returns what `FactWriter` was given. fact: of a `schema.Node`. Raises ArtifactError that begins with
        `where`."""
        if isinstance(fact, TensorFact):
            return self._tensor(fact, where)
        if isinstance(fact, list):
            return [None if f is None else self(f, where) for f in fact]
        return self._size(fact)

    def _tensor(self, fact: TensorFact, where: str) -> Tensor:
        known = DTYPES.get(fact.dtype)
        if known is None:
            raise ArtifactError(f"{where}: there is no dtype {fact.dtype!r:.80}")
        key = (fact.dtype, *fact.shape)
        if key not in self._tensors:
            sizes = self._sizes.shape(fact.shape)
            try:
                with self._mode:
                    self._tensors[key] = torch.empty(sizes, dtype=known, device=self._device)
            except (RuntimeError, OverflowError) as error:
                raise ArtifactError(f"{where}: no tensor has the shape {fact.shape!r:.80}") from error
        return self._tensors[key]

    def _size(self, size: int | str) -> Any:
        return self._sizes[size] if isinstance(size, str) else size
