"""Builds the model of a Hugging Face checkpoint on meta, without its weights.

Only this module and `parameter_sources.py` run transformers' modeling code. Their results, graph and recipes, need none
of it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kvrewrite.artifact.checkpoint import Checkpoint, some
from kvrewrite.errors import ArtifactError


class _EmptyOnMeta(TorchFunctionMode):
    """Makes `torch.empty`, with which parameters are created before initialization, allocate nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While open, new modules have their parameters on meta and their buffers with real values."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_on_meta(directory: str | Path, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """Builds the model of a checkpoint directory with parameters on meta and real buffers; returns it and its config.

    dtype: default: the config's, else that of the checkpoint's first floating tensor. Uses transformers' own classes
    only; models with code in the checkpoint are refused.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, initialization

    from kvrewrite.artifact.companions import auto_model

    checkpoint = Checkpoint.open(directory)
    config = _read_config(checkpoint, CONFIG_MAPPING, AutoConfig)
    if dtype is None:
        dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if dtype is None:
        stored = [t.dtype for t in checkpoint.tensors.values() if t.dtype.is_floating_point and t.dtype.itemsize > 1]
        dtype = stored[0] if stored else torch.float32
    try:
        with parameters_on_meta(), initialization.no_init_weights():
            model = auto_model(config).from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, ImportError) as error:
        raise ArtifactError(
            f"transformers has no causal language model for {checkpoint.directory} (model_type "
            f"{config.model_type!r}): {str(error).strip().splitlines()[0][:300]}"
        ) from error
    # Tying is part of the skipped initialization.
    model.tie_weights()
    _keep_in_fp32(model, dtype)
    if unknown := [n for n, b in _plain_buffers(model) if b.is_meta]:
        raise ArtifactError(
            f"{type(model).__name__} makes its buffers {some(unknown)} in a way that kvrewrite can't follow without "
            "loading the model; load it with from_pretrained and give kvrewrite.transform the model"
        )
    return model.eval(), config


def _read_config(checkpoint: Checkpoint, known: Any, auto: Any) -> Any:
    """Reads a checkpoint's transformers config without running code from it and without asking the user anything."""
    from huggingface_hub.errors import StrictDataclassError

    raw, where = checkpoint.config, checkpoint.directory / "config.json"
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        if raw.get("auto_map"):
            raise ArtifactError(
                f"{where}: model_type {kind!r} is not part of transformers; its code is in the checkpoint (auto_map), "
                "which kvrewrite does not run. Load the model yourself, if you trust it, and give it to transform"
            )
        raise ArtifactError(
            f"{where}: transformers does not know model_type {kind!r}; upgrade transformers, or load the model "
            "yourself and give it to kvrewrite.transform"
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise ArtifactError(
            f"{where}: the checkpoint is quantized ({method!s:.40}), which kvrewrite can't read; convert it to "
            "bfloat16 first (load it with dequantize=True in its quantization config, then save_pretrained)"
        )
    if (checkpoint.directory / "adapter_config.json").exists():
        raise ArtifactError(
            f"{checkpoint.directory} has an adapter of peft (adapter_config.json) beside the weights, which transformers "
            "would load and kvrewrite does not. Merge it first (merge_and_unload, then save_pretrained), or take the file "
            "away to convert the base model"
        )
    try:
        return auto.from_pretrained(str(checkpoint.directory), trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError, AttributeError, StrictDataclassError) as error:
        # transformers' checks of a config raise many types; all mean that config.json is wrong.
        raise ArtifactError(f"{where} is not a valid config of {kind!r}: {str(error).strip()[:400]}") from error


def _plain_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns the buffers that no checkpoint holds."""
    persistent = model.state_dict().keys()
    return [(n, b) for n, b in model.named_buffers() if n not in persistent]


def _keep_in_fp32(model: Any, dtype: torch.dtype) -> None:
    """Sets fp32 for what transformers loads in fp32 whatever the model's dtype: some routers, norms, stored buffers."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern = re.compile("|".join(f"(?:{glob.replace('*', '.*')})" for glob in plan))
    changed: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and pattern.search(f"{path}.{leaf}") and parameter.is_floating_point():
                wide = nn.Parameter(parameter.detach().to(torch.float32), requires_grad=parameter.requires_grad)
                module._parameters[leaf] = changed.setdefault(id(parameter), wide)
        for leaf, buffer in module._buffers.items():
            stored = buffer is not None and leaf not in module._non_persistent_buffers_set
            if stored and pattern.search(f"{path}.{leaf}") and buffer.is_floating_point():  # type: ignore[union-attr]
                module._buffers[leaf] = buffer.to(torch.float32)  # type: ignore[union-attr]
