"""Checks policy weights (trained gates and retaining heads) against what a policy needs on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import PolicyWeightsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BASE_MODEL = "base_model"  # metadata key: the fingerprint of the model that the weights were trained for
UNLABELLED = "n_sink"  # metadata key: of how many first tokens nothing was learned
LISTED = 8  # names in a message


# ------------------------------------------------------------------------------------------------------------- reading


def first_kept(facts: Mapping[str, Any], asked: int) -> int:
    """How many first tokens a policy keeps that was asked for `asked`: at least those its weights (a model's facts) learned
    nothing of, which are the model's attention sinks."""
    told = (facts.get("policy_metadata") or {}).get(UNLABELLED, "")
    return max(asked, int(told) if told.isdigit() else 0)


def check_policy_weights(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Sequence[int]],
    metadata: Mapping[str, str] | None = None,
    *,
    policy: str | None = None,
    model: str | None = None,
    dtype: torch.dtype | None = None,
    what: str = "the policy weights",
) -> dict[str, Tensor]:
    """Policy weights that fit: exactly the names and shapes in `expected`, in any floating dtype; integers and booleans
    are refused.

    metadata: where it says for which `policy` or `base_model` the weights were trained, it must say these (model: a
    fingerprint of shapes). dtype: converts to it; default: as they are. PolicyWeightsError lists all that
    is wrong at once.
    """
    if expected and not tensors:
        raise PolicyWeightsError(
            f"got no policy weights, but {policy or 'the policy'} needs {len(expected)} tensors ({next(iter(expected))}, ...); "
            "give the file as policy_weights (--policy-weights): one that kvrewrite train or kvrewrite import-weights wrote"
        )
    problems: list[str] = []
    named = dict(metadata or {})
    if policy is not None and named.get("policy", policy) != policy:
        problems.append(f"they are for the policy {named['policy']!r}, not {policy!r}")
    if model is not None and named.get(BASE_MODEL, model) != model:
        problems.append(f"they were trained for another base model: {named[BASE_MODEL]:.200}; this one is {model:.200}")
    problems += _list("missing", [n for n in expected if n not in tensors])
    problems += _list("unexpected", [n for n in tensors if n not in expected])
    shapes, dtypes, values = [], [], []
    for name, shape in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tuple(tensor.shape) != tuple(shape):
            shapes.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        if not tensor.is_floating_point():
            dtypes.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected a floating dtype")
        elif not tensor.to(dtype or tensor.dtype).isfinite().all():
            values.append(name)
    problems += _list("wrong shape", shapes) + _list("wrong dtype", dtypes)
    problems += _list("infinite or not a number", values)
    if problems:
        raise PolicyWeightsError(
            f"{what} do not fit this model and policy; use those that were trained for both:\n  "
            + "\n  ".join(problems)
        )
    return {name: tensors[name].to(dtype or tensors[name].dtype) for name in expected}


def _list(label: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return [f"{label} ({len(items)}): {', '.join(items[:LISTED])}{more}"]
