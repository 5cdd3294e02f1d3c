"""Finds the checkpoint tensors that each parameter is made from: recipes, recorded from transformers' own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvrewrite.artifact.checkpoint import Checkpoint, Reader, some
from kvrewrite.artifact.recipes import Recipe, follow
from kvrewrite.errors import ArtifactError


class _Recorded(Tensor):
    """A tensor without values that knows the recipe it was made with.

    transformers converts checkpoints with ordinary tensor ops. Running its conversion on these tensors gives the
    recipes, so nothing here needs to know how transformers describes the conversion of each architecture.
    """

    recipe: Recipe
    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor, recipe: Recipe) -> _Recorded:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, plain.shape, strides=plain.stride(), dtype=plain.dtype, device=torch.device("meta")
        )
        made.plain, made.recipe = plain, recipe
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"_Recorded({list(self.shape)}, {self.recipe})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}

        def unwrap(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(unwrap(v) for v in value)
            return value.plain if isinstance(value, _Recorded) else value

        result = func(*unwrap(args), **{k: unwrap(v) for k, v in kwargs.items()})
        recipes = _record(func, args, kwargs, result)
        if isinstance(result, Tensor):
            return cls(result, recipes[0])
        return [cls(r, recipe) for r, recipe in zip(result, recipes, strict=True)]


def _record(func: Any, args: Any, kwargs: Any, result: Any) -> list[Recipe]:
    """Returns the recipes of a tensor op's results."""
    aten = torch.ops.aten
    packet = func.overloadpacket
    first = args[0]
    # A cast is no step: the final dtype is in the recipe, and these ops only move values.
    if packet in (aten.alias, aten.detach, aten.clone, aten._to_copy, aten.contiguous, aten.lift_fresh):
        return [first.recipe]
    if packet in (aten.stack, aten.cat):
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        kind = "stack" if packet is aten.stack else "cat"
        return [{kind: [t.recipe for t in first], "dim": dim % result.dim()}]
    if packet is aten.transpose:
        return [{"transpose": first.recipe, "dims": [d % first.dim() for d in args[1:3]]}]
    if packet is aten.t:
        return [{"transpose": first.recipe, "dims": [0, 1]} if first.dim() == 2 else first.recipe]
    if packet is aten.permute:
        return [_permutation(first.recipe, [d % first.dim() for d in args[1]])]
    if packet in (aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.squeeze, aten.unsqueeze):
        return [{"reshape": first.recipe, "shape": list(result.shape)}]
    if packet in (aten.split, aten.split_with_sizes, aten.chunk):
        dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % first.dim()
        recipes, start = [], 0
        for part in result:
            recipes.append({"narrow": first.recipe, "dim": dim, "start": start, "length": part.shape[dim]})
            start += part.shape[dim]
        return recipes
    if packet is aten.unbind:
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % first.dim()
        return [_selected(first.recipe, dim, i, part) for i, part in enumerate(result)]
    if packet is aten.select:
        return [_selected(first.recipe, args[1] % first.dim(), args[2] % first.shape[args[1]], result)]
    if packet is aten.slice and (len(args) < 5 or args[4] == 1):
        dim = (args[1] if len(args) > 1 else 0) % first.dim()
        start = min(max((args[2] or 0) if len(args) > 2 else 0, -first.shape[dim]), first.shape[dim]) % (
            first.shape[dim] + 1
        )
        return [{"narrow": first.recipe, "dim": dim, "start": start, "length": result.shape[dim]}]
    raise ArtifactError(
        f"the checkpoint is converted with {func}, which kvrewrite can't repeat; load the model with from_pretrained and "
        "give it to kvrewrite.transform"
    )


def _selected(recipe: Recipe, dim: int, index: int, result: Tensor) -> Recipe:
    return {
        "reshape": {"narrow": recipe, "dim": dim, "start": index, "length": 1},
        "shape": list(result.shape),
    }


def _permutation(recipe: Recipe, order: list[int]) -> Recipe:
    """Returns a permutation of dimensions as swaps of two."""
    now = list(range(len(order)))
    for i, wanted in enumerate(order):
        j = now.index(wanted)
        if i != j:
            recipe = {"transpose": recipe, "dims": [i, j]}
            now[i], now[j] = now[j], now[i]
    return recipe


def parameter_sources(model: nn.Module, config: Any, checkpoint: Checkpoint) -> dict[str, Recipe]:
    """Returns the recipe of every parameter and persistent buffer of a model from a checkpoint.

    Runs transformers' own conversion of the checkpoint on tensors without values (renamed keys, base-model prefixes,
    merged experts), so `model` may be on meta and only headers are read. One exception: if the checkpoint has two
    versions of a tied parameter, both are read, and if they differ the model's tie is cut, as transformers does. Raises
    ArtifactError that lists all parameters that are missing, have another shape or can't be converted, and all unused
    tensors.
    """
    values = {
        k: _Recorded(torch.empty(i.shape, dtype=i.dtype, device="meta"), {"key": k})
        for k, i in checkpoint.tensors.items()
    }
    found, info = _convert(model, values)
    _untie(model, found, checkpoint)
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    recipes: dict[str, Recipe] = {}
    missing, mismatched = [], []
    for name, tensor in state.items():
        source = next((n for n in (name, *groups[id(tensor)]) if n in found), None)
        if source is None:
            missing.append(name)
        elif found[source].shape != tensor.shape:
            mismatched.append(
                f"{name}: {list(found[source].shape)} in the checkpoint, {list(tensor.shape)} in the model"
            )
        else:
            dtype = str(tensor.dtype).removeprefix("torch.")
            recipes[name] = {**found[source].recipe, "shape": list(tensor.shape), "dtype": dtype}
    info.missing_keys, info.unexpected_keys = set(missing), set(info.unexpected_keys)
    model._adjust_missing_and_unexpected_keys(info)  # type: ignore[operator]
    problems = [f"can't convert {name}: {_last_line(text)}" for name, text in sorted(info.conversion_errors.items())]
    problems += [f"missing: {some(missing, 20)}"] if missing else []
    problems += [f"wrong shape: {line}" for line in mismatched]
    problems += [f"unexpected: {some(sorted(info.unexpected_keys), 20)}"] if info.unexpected_keys else []
    if problems:
        raise ArtifactError(
            f"the weights in {checkpoint.directory} are not those of {type(model).__name__} with its config.json; copy "
            "both again from where they come from:\n  " + "\n  ".join(problems)
        )
    return recipes


def _last_line(text: str) -> str:
    """Returns the exception in a traceback that transformers turned into text."""
    lines = [line for line in str(text).splitlines() if "Error" in line]
    return (lines[0] if lines else str(text)).strip()[:300]


def _convert(model: Any, values: dict[str, _Recorded]) -> tuple[dict[str, _Recorded], Any]:
    """Runs transformers' conversion without touching the model; returns what it would have set, and its report."""
    from transformers import conversion_mapping, core_model_loading
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    found: dict[str, _Recorded] = {}

    def keep(model: Any, target_name: str, param_value: Tensor, *_: Any, **__: Any) -> None:
        if not isinstance(param_value, _Recorded):
            raise ArtifactError(
                f"{target_name} is made by transformers in a way that kvrewrite can't follow; load the model with "
                "from_pretrained and give it to kvrewrite.transform"
            )
        found[target_name] = param_value

    mapping: Any = conversion_mapping.get_model_conversion_mapping(model)
    load_config = LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=mapping)
    setter, conversions = core_model_loading.set_param_for_module, getattr(model, "_weight_conversions", None)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would say "Loading weights", but none are loaded
    core_model_loading.set_param_for_module = keep
    try:
        info, _ = core_model_loading.convert_and_load_state_dict_in_model(model, dict(values), load_config, None)
    finally:
        core_model_loading.set_param_for_module = setter
        if bars:
            logging.enable_progress_bar()
        if conversions is None:
            vars(model).pop("_weight_conversions", None)
        else:
            model._weight_conversions = conversions
    return found, info


def _untie(model: nn.Module, found: Mapping[str, _Recorded], checkpoint: Checkpoint) -> None:
    """Cuts the tie of parameters of which the checkpoint has two different versions, as transformers does."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        present = [n for n in names if n in found]
        if len(present) < 2:
            continue
        with checkpoint.reader() as reader:
            first = _materialize(present[0], found[present[0]], reader)
            for name in present[1:]:
                if found[name].recipe == found[present[0]].recipe:
                    continue
                if torch.equal(first, _materialize(name, found[name], reader)):
                    continue
                path, _, leaf = name.rpartition(".")
                module = model.get_submodule(path)
                own = module._parameters[leaf]
                assert own is not None
                module._parameters[leaf] = nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad)


def _materialize(name: str, recorded: _Recorded, reader: Reader) -> Tensor:
    out = torch.empty(recorded.shape, dtype=recorded.dtype)
    follow(name, recorded.recipe, reader, out)
    return out
