"""Remembers, while a model is traced, what each op makes of which shapes: the layers of a decoder ask the same again and again.

Fake tensors with symbolic sizes cost milliseconds per op, nearly all of it symbolic arithmetic on sizes and strides. Torch's own
cache of fake results costs more than it saves there. This one remembers ops whose result is one tensor that is new, or a view of
one argument, and follows from the arguments' metadata alone; everything else goes the usual way.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from kvrewrite.capture.attention_interface import replaced

# Their results follow from data, or are not the same twice.
OTHERS = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
PLAIN = (int, float, bool, str, torch.dtype, torch.device, torch.memory_format, torch.layout, type(None))
NEW = -1  # the result is a view of no argument


class _Known(NamedTuple):
    """The metadata of a result."""

    shape: Sequence[Any]
    stride: Sequence[Any]
    offset: Any
    dtype: torch.dtype
    device: torch.device


class _NotKnowable(Exception):
    """A call's result does not follow from what a key can hold."""


@functools.cache
def _base(op: Any) -> int | None:
    """The number of the argument that an op's result is a view of, `NEW`, or None for ops that are not remembered."""
    if not isinstance(op, torch._ops.OpOverload) or op.namespace not in ("aten", "prims"):
        return None
    schema = op._schema
    composite = op.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd
    )  # may return its argument
    if composite or OTHERS & set(op.tags) or [str(r.type) for r in schema.returns] != ["Tensor"]:
        return None
    aliased = {i: a.alias_info for i, a in enumerate(schema.arguments) if a.alias_info is not None}
    if any(alias.is_write for alias in aliased.values()):
        return None
    if schema.returns[0].alias_info is None:
        return NEW
    return next(iter(aliased)) if len(aliased) == 1 else None


def _number(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _key(value: Any, mode: FakeTensorMode) -> Any:
    """What stands for an argument; raises _NotKnowable."""
    kind = type(value)
    if kind is FakeTensor:
        if value.fake_mode is not mode or value.constant is not None or value.layout is not torch.strided:
            raise _NotKnowable
        if (
            not value.dim()
        ):  # it may stand for a number of Python, which promotes other dtypes; nothing here would say so
            raise _NotKnowable
        sizes = tuple(map(_number, value.shape)), tuple(map(_number, value.stride())), _number(value.storage_offset())
        return value.dtype, value.fake_device, *sizes, value.requires_grad, value.is_conj(), value.is_neg()
    if kind in (torch.SymInt, torch.SymFloat, torch.SymBool):
        return kind, value.node.expr
    if kind in PLAIN:
        return kind, value  # with its type, as 1 == True
    if kind in (list, tuple):
        return kind, *(_key(item, mode) for item in value)
    raise _NotKnowable


def _is_knowable(out: Any, base: int, args: Sequence[Any]) -> bool:
    """Whether a result can be made again of its metadata."""
    if type(out) is not FakeTensor or out.constant is not None or out.layout is not torch.strided or out.requires_grad:
        return False
    if out.is_conj() or out.is_neg() or any(out is x for x in args):
        return False
    if base != NEW:
        return type(args[base]) is FakeTensor and args[base].dtype == out.dtype
    memory, offset = out.untyped_storage()._cdata, out.storage_offset()
    if not isinstance(offset, int) or offset != 0:
        return False
    return not any(isinstance(x, Tensor) and x.untyped_storage()._cdata == memory for x in args)


def _made(mode: FakeTensorMode, known: _Known, base: Tensor | None) -> FakeTensor:
    """A fake tensor with known metadata; base: what it is a view of."""
    assert mode.shape_env is not None
    with in_kernel_invocation_manager(mode), mode.shape_env.suppress_guards():
        if base is None:
            made = torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta")
        else:
            made = torch.ops.aten.as_strided.default(base, known.shape, known.stride, known.offset)
    return FakeTensor(mode, made, known.device)


@contextlib.contextmanager
def known_shapes() -> Iterator[None]:
    """While open, fake tensors of symbolic sizes are computed once for equal calls."""
    compute: Callable[..., Any] = FakeTensorMode._dispatch_impl
    modes: dict[FakeTensorMode, dict[Any, _Known]] = {}

    def dispatch(
        mode: FakeTensorMode, op: Any, types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        base = _base(op)
        if base is None or mode.shape_env is None or mode.propagate_real_tensors:
            return compute(mode, op, types, args, kwargs)
        try:
            options = tuple((name, _key(value, mode)) for name, value in kwargs.items())
            modes_on = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            key = op, _key(tuple(args), mode), options, torch.get_default_dtype(), modes_on
        except _NotKnowable:
            return compute(mode, op, types, args, kwargs)
        all_known = modes.setdefault(mode, {})
        known = all_known.get(key)
        if known is not None:
            return _made(mode, known, None if base == NEW else args[base])
        out = compute(mode, op, types, args, kwargs)
        if _is_knowable(out, base, args):
            all_known[key] = _Known(out.shape, out.stride(), out.storage_offset(), out.dtype, out.fake_device)
        return out

    with replaced(FakeTensorMode, "_dispatch_impl", dispatch):
        yield
