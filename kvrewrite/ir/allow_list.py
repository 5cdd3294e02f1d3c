"""Lists the ops that a saved graph may call.

The list is by namespace: the `kvrewrite` ops that `insert_cache` and policies write (`KVREWRITE`), the functional
`aten` overloads of base names that decoders use (`ATEN`), a few `prims`, transformers' grouped matmul, and Python's
arithmetic on sizes (`BUILTINS`). An op may be on the list only if its result depends only on its arguments and it
changes nothing else. Deliberately excluded are: ops that write to an argument or to `out=` (except kvrewrite's own
cache ops, whose mutation is declared); ops that read or write files (`from_file`, `save`) or draw from a device
generator (`rand*`, `bernoulli`, `dropout`); views by strides (`as_strided`, `_reshape_alias`, which does not even check
the end of the memory); uninitialized memory (`empty_strided`; `empty` is read as zeros); and all higher-order ops,
because they carry subgraphs.
"""

from __future__ import annotations

import importlib
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

import kvrewrite.ops  # noqa: F401  (registers the ops that graphs are made of)
from kvrewrite.errors import ArtifactError
from kvrewrite.ir import schema

ATEN = frozenset(
    """
    abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv alias all amax amin aminmax any arange argmax argmin
    argsort asin asinh atan atan2 atanh baddbmm bincount bitwise_and bitwise_left_shift bitwise_not
    bitwise_or bitwise_right_shift bitwise_xor bmm broadcast_tensors broadcast_to bucketize cat ceil celu chunk clamp
    clamp_max clamp_min clone column_stack complex concat constant_pad_nd contiguous conv1d convolution copy cos cosh
    count_nonzero cross cummax cummin cumprod cumsum detach detach_copy diag diag_embed diagonal diff div divide dot
    dstack einsum elu embedding empty empty_like eq equal erf erfc erfinv exp exp2 expand
    expand_as expand_copy expm1 eye fill flatten flip floor floor_divide fmax fmin fmod frac full full_like gather ge
    gelu glu greater greater_equal group_norm gt hardsigmoid hardswish hardtanh histc hstack hypot imag index
    index_add index_copy index_fill index_put index_reduce index_select isclose isfinite isin isinf isnan isneginf
    isposinf kthvalue layer_norm le leaky_relu lerp less less_equal lift_fresh_copy linalg_norm linalg_vector_norm
    linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logaddexp2 logcumsumexp logical_and
    logical_not logical_or logical_xor logit logspace logsumexp lt masked_fill masked_scatter masked_select matmul max
    maximum mean median min minimum mish mm moveaxis movedim mul multiply mv narrow narrow_copy native_group_norm
    native_layer_norm ne neg negative new_empty new_full new_ones new_zeros nonzero norm not_equal
    numpy_T one_hot ones ones_like outer pad permute permute_copy pixel_shuffle polar positive pow prelu prod ravel
    real reciprocal relu relu6 remainder repeat repeat_interleave reshape resolve_conj resolve_neg rms_norm roll rot90
    round rsqrt rsub scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select
    select_copy select_scatter selu sgn sigmoid sign signbit silu sin sinh slice slice_copy slice_scatter softmax
    softplus sort split split_copy split_with_sizes split_with_sizes_copy sqrt square squeeze squeeze_copy stack std
    std_mean sub subtract sum swapaxes swapdims sym_numel sym_size sym_storage_offset sym_stride t t_copy take
    take_along_dim tan tanh tensor_split threshold tile to topk transpose transpose_copy tril tril_indices triu
    triu_indices true_divide trunc type_as unbind unbind_copy unflatten unfold unfold_copy unsafe_chunk unsafe_split
    unsafe_split_with_sizes unsqueeze unsqueeze_copy upsample_nearest1d var var_mean vdot view view_as view_as_complex
    view_as_real view_copy vstack where xlogy zeros zeros_like
    _assert_async _assert_scalar _assert_tensor_metadata _conj _grouped_mm _local_scalar_dense _log_softmax
    _reshape_copy _safe_softmax _scaled_dot_product_attention_math _scaled_grouped_mm _scaled_mm _softmax
    _to_copy _unsafe_index _unsafe_index_put _unsafe_view _weight_int8pack_mm item
    sym_constrain_range sym_constrain_range_for_size
    """.split()  # noqa: SIM905 (300 quoted strings are unreadable)
)
# Our ops in saved graphs. Ops that lowering makes are not among them: a file that has those was not written by us.
KVREWRITE = frozenset(
    """
    attention block_column_mass cache_update cache_update_quantized cached_attention cached_past cached_scan
    cached_sum decayed_sum entering expected_attention gate joint_scores kept_above key_difference lag_scores
    latent_attention leverage linear_scan look_up newest_ranks newest_rows observe pool_window projected_norm ranks
    read_pages read_quantized recall recent_queries reconstruction rotate share_layers sink_gate slot_positions slot_rotary
    surprisal
    uniform with_past
    """.split()  # noqa: SIM905
)
PRIMS = frozenset({"broadcast_in_dim", "convert_element_type", "iota", "view_of"})
# Ops that other libraries register, and the module that registers them.
LIBRARY_OPS = {"transformers.grouped_mm_fallback.default": "transformers.integrations.moe"}
BUILTINS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            "abs",
            "add",
            "and_",
            "eq",
            "floordiv",
            "ge",
            "getitem",
            "gt",
            "le",
            "lt",
            "mod",
            "mul",
            "ne",
            "neg",
            "not_",
            "or_",
            "pow",
            "sub",
            "truediv",
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "sqrt", "trunc")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in (
            "sym_float",
            "sym_int",
            "sym_ite",
            "sym_max",
            "sym_min",
            "sym_not",
            "sym_sum",
        )
    },
    "torch._sym_sqrt": torch._sym_sqrt,  # type: ignore[attr-defined]
}


_BUILTIN_NAMES = {id(function): name for name, function in BUILTINS.items()}
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def op_name(target: Any) -> str:
    """Returns a graph file's name for the function that a node calls; raises ArtifactError if it is not allowed."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        resolve_op(name)
        return name
    if id(target) in _BUILTIN_NAMES:
        return _BUILTIN_NAMES[id(target)]
    shown = (
        str(target) if isinstance(target, torch._ops.OperatorBase) else getattr(target, "__qualname__", repr(target))
    )
    module = getattr(target, "__module__", None)
    raise ArtifactError(_not_allowed(f"{module}.{shown}" if module and not shown.startswith(module) else shown))


def _not_allowed(name: str) -> str:
    return (
        f"the op {name!r} is not on the list of ops that a saved graph may use (functional aten ops, kvrewrite's own, "
        "arithmetic on sizes). Files of kvrewrite never contain others; if your model needs it, ask for it to be added "
        "to kvrewrite/ir/allow_list.py"
    )


def resolve_op(name: Any) -> Callable[..., Any]:
    """Returns the function that a graph file calls `name`; raises ArtifactError if it is not on the allow-list."""
    if not isinstance(name, str) or len(name) > schema.MAX_STRING:
        raise ArtifactError(f"an op's name must be a string, got {type(name).__name__}")
    if name in BUILTINS:
        return BUILTINS[name]
    parts = name.split(".")
    if len(parts) != 3 or not all(NAME.match(p) for p in parts):
        raise ArtifactError(_not_allowed(name))
    namespace, base, overload = parts
    if namespace == "aten":
        allowed = base in ATEN
    elif namespace == "prims":
        allowed = base in PRIMS
    elif namespace == "kvrewrite":
        allowed = base in KVREWRITE and overload == "default"
    else:
        allowed = name in LIBRARY_OPS
    if not allowed:
        raise ArtifactError(_not_allowed(name))
    if name in LIBRARY_OPS:
        importlib.import_module(LIBRARY_OPS[name])
    try:
        packet = getattr(getattr(torch.ops, namespace), base)
        found = getattr(packet, overload) if overload in packet.overloads() else None
    except AttributeError:
        found = None
    if not isinstance(found, torch._ops.OpOverload):
        raise ArtifactError(f"the op {name!r} does not exist in this installation (torch {torch.__version__})")
    if namespace != "kvrewrite" and found._schema.is_mutable:
        raise ArtifactError(_not_allowed(name) + " (it writes to one of its arguments)")
    return found
