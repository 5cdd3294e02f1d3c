"""Handles what other libraries add to a model: accelerate's hooks, peft's adapters, quantized layers.

None of these libraries is imported here. What only moves tensors is removed for the capture; what is part of the
function is captured with it; anything else is refused with what to do instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvrewrite.errors import UnsupportedModelError

# Adapters that only change layers; others also change the model's inputs or when they act.
ADAPTERS_IN_LAYERS = {"LORA", "IA3", "LOHA", "LOKR"}
# Hooks of accelerate that only move tensors.
_MOVING_HOOKS = {"ModelHook", "AlignDevicesHook", "CpuOffload", "UserCpuOffloadHook"}
# Modules that a graph can't show, by the beginning of their full name.
_OPAQUE = {
    "bitsandbytes.nn.modules.Linear8bitLt": "which columns it multiplies in 16 bits is chosen by all tokens of a call, so a "
    "token would depend on its chunk",
    # If possible, Linear4bit is replaced: plain_4bit_layers.
    "bitsandbytes.": "of bitsandbytes only Linear4bit is known, and this one is no such layer, is not quantized yet, or is "
    "packed for a CPU",
    "torch.ao.nn.quantized.": "torch.ao packs its weights into an object that is no tensor",
    "auto_gptq.": "its kernels are not ops of torch",
    "gptqmodel.": "its kernels are not ops of torch",
    "awq.": "its kernels are not ops of torch",
}


def _is(model: object, package: str, name: str) -> bool:
    """Whether `model` is an instance of a class of a library that may not be installed."""
    return any(c.__module__.startswith(package) and c.__name__ == name for c in type(model).__mro__)


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the transformers model inside a `peft.PeftModel` (its layers contain the adapters), or the model
    itself."""
    if not _is(model, "peft.", "PeftModel"):
        return model
    wrapped: Any = model
    for name in wrapped.active_adapters:
        config = wrapped.peft_config[name]
        kind = getattr(config.peft_type, "value", str(config.peft_type))
        if getattr(config, "alora_invocation_tokens", None) is not None:
            raise UnsupportedModelError(
                f"the adapter {name!r} is an activated LoRA (alora_invocation_tokens), which acts on a part of the text only, "
                "and a rewritten model has no such part; switch it off or use an adapter that acts on the whole text"
            )
        if kind not in ADAPTERS_IN_LAYERS:
            raise UnsupportedModelError(
                f"the adapter {name!r} is of type {kind}, which changes the model's input or is not known to kvrewrite; known "
                f"are {', '.join(sorted(ADAPTERS_IN_LAYERS))}. If it can be merged, transform model.merge_and_unload()"
            )
    inner: nn.Module = wrapped.get_base_model()
    return inner


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer holds a peft adapter."""
    return any(_is(m, "peft.", "BaseTunerLayer") for m in model.modules())


def adapter_state(layer: Any) -> tuple[Any, ...]:
    """Returns what a graph fixes about a layer with peft adapters, besides parameters: which are active or merged,
    their scales, and the modules that hold their weights."""
    active = tuple(layer.active_adapters)
    scaling = getattr(layer, "scaling", {})
    held = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    modules = tuple(h[name] for h in held if isinstance(h, nn.ModuleDict) for name in active if name in h)
    return (
        ("disabled", bool(layer.disable_adapters)),
        ("active", active),
        ("merged", tuple(layer.merged_adapters)),
        ("scaled", tuple(scaling.get(name) for name in active)),
        ("weights", modules),
    )


class AdapterWatch:
    """Detects adapters that were switched, merged, scaled or replaced after the rewrite. The graph has them as they
    were; and merging changes the shared weights, so that an adapter would act twice."""

    def __init__(self, model: nn.Module):
        layers = [(name, m) for name, m in model.named_modules() if _is(m, "peft.", "BaseTunerLayer")]
        self.layers: list[tuple[str, Any, tuple[Any, ...]]] = [(name, m, adapter_state(m)) for name, m in layers]

    def check(self) -> None:
        """Raises UnsupportedModelError if the adapters have changed."""
        for name, layer, before in self.layers:
            for (what, was), (_, now) in zip(before, adapter_state(layer)):
                if now == was:
                    continue
                change = "replaced" if what == "weights" else f"{what}: {now}, and {was} when it was rewritten"
                raise UnsupportedModelError(
                    f"the adapters of {name} in the original have changed ({change}), and a rewritten model has them as they "
                    "were. Bring them back (unmerge_adapter(), set_adapter(), the end of disable_adapter()), or transform the "
                    "model as it is now"
                )


def quantized_weights(model: nn.Module) -> str | None:
    """Returns the name of a weight that is quantized by torchao or bitsandbytes, or the method of transformers'
    quantizer; None if there is none."""
    method = getattr(model, "quantization_method", None)
    if method is not None:
        return str(getattr(method, "value", method))
    return next((n for n, p in model.named_parameters() if _is_quantized(p)), None)


def _is_quantized(parameter: nn.Parameter) -> bool:
    return is_traceable_wrapper_subclass(parameter) or _is(parameter, "bitsandbytes.", "Params4bit")


class _Linear4bit(nn.Module):
    """Computes a bitsandbytes `Linear4bit` from tensors alone: the weight (codes, two per byte), the largest magnitude
    of each block and, if these are quantized too (double quantization), what they are made from."""

    def __init__(self, layer: Any):
        super().__init__()
        state = layer.weight.quant_state
        # An alias: on some CPUs bitsandbytes later gives the layer's own parameter other data.
        self.weight = nn.Parameter(layer.weight.detach().as_subclass(Tensor), requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("absmax", state.absmax)
        self.form = (state.blocksize, state.quant_type, list(state.shape), state.dtype)
        self.compute_dtype: torch.dtype | None = layer.compute_dtype  # None: the input's dtype
        self.inner: tuple[int, torch.dtype] | None = None
        if state.nested:
            self.inner = (state.state2.blocksize, state.state2.dtype)
            self.register_buffer("inner_absmax", state.state2.absmax)
            self.register_buffer("code", state.state2.code)
            self.register_buffer("offset", state.offset)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) to (..., out), computed in the layer's dtype."""
        ops, absmax = torch.ops.bitsandbytes, self.absmax
        if self.inner is not None:
            absmax = (ops.dequantize_blockwise(absmax, self.inner_absmax, self.code, *self.inner) + self.offset).float()
        given = x if self.compute_dtype is None else x.to(self.compute_dtype)
        weight = ops.dequantize_4bit(self.weight.view(-1, 1), absmax, *self.form).to(given.dtype)
        bias = None if self.bias is None else self.bias.to(given.dtype)
        return nn.functional.linear(given, weight, bias).to(x.dtype)


@contextlib.contextmanager
def plain_4bit_layers(model: nn.Module) -> Iterator[None]:
    """Replaces bitsandbytes' 4-bit layers with modules that a graph can show, with the same weights, and restores them
    afterwards. Layers that are not quantized yet, or whose weight is packed for a CPU, are left for `check_layers` to
    refuse."""
    undo: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                state = getattr(getattr(layer, "weight", None), "quant_state", None)
                ready = state is not None and not getattr(state, "packing_format_for_cpu", False)
                if ready and _is(layer, "bitsandbytes.", "Linear4bit"):
                    undo.append((parent, name, layer))
                    setattr(parent, name, _Linear4bit(layer))
        yield
    finally:
        for parent, name, layer in undo:
            setattr(parent, name, layer)


def _check_compressed_tensors(model: nn.Module) -> None:
    """Refuses models that compute with weights as compressed-tensors (llm-compressor) stores them: its layers unpack
    them in Python at every call."""
    method = getattr(model, "quantization_method", None)
    if str(getattr(method, "value", method)) != "compressed-tensors":
        return
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(config, "dequantize", None) is True or getattr(config, "run_compressed", None) is False:
        return
    raise UnsupportedModelError(
        "the model's weights are as compressed-tensors stores them and are unpacked in its layers at every call, which can't be "
        "captured. Load it with from_pretrained(..., quantization_config=CompressedTensorsConfig(run_compressed=False)), which "
        "newer versions of transformers call dequantize=True: the same function with plain weights"
    )


def check_layers(model: nn.Module) -> None:
    """Refuses modules that a graph can't show, and models on several devices."""
    _check_compressed_tensors(model)
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            full = f"{cls.__module__}.{cls.__name__}"
            reason = next((r for prefix, r in _OPAQUE.items() if full.startswith(prefix)), None)
            if reason is not None:
                raise UnsupportedModelError(
                    f"{name} is a {full}, which can't be captured: {reason}. Quantize the weights "
                    "with torchao (quantize_), or transform model.dequantize()"
                )
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the model's parameters lie on {', '.join(devices)}, which only kvrewrite.transform takes. Load it on one device "
            "(device_map={'': 'cuda:0'}, or without device_map), or convert its directory, for which no weights are loaded "
            "(kvrewrite convert), and load the result with kvrewrite.load(directory, device=...)"
        )


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Removes accelerate's hooks from the forwards of a dispatched model, and restores them afterwards.

    These hooks move inputs and weights, which the graph must not contain. A hook that does anything else is refused,
    and so are weights that are only present during a call.
    """
    undo: list[tuple[nn.Module, Any]] = []
    try:
        for name, module in model.named_modules():
            hook = getattr(module, "_hf_hook", None)
            if hook is None or "_old_forward" not in module.__dict__:
                continue
            for part in getattr(hook, "hooks", None) or (hook,):
                kind = type(part).__name__
                if kind not in _MOVING_HOOKS:
                    raise UnsupportedModelError(
                        f"{name or 'the model'} has the hook {kind}, which may change what it computes; remove it "
                        "(accelerate.hooks.remove_hook_from_module) before transforming, or merge what it does"
                    )
                if getattr(part, "offload", False) and any(p.is_meta for p in module.parameters(recurse=False)):
                    raise UnsupportedModelError(
                        f"the weights of {name or 'the model'} are offloaded by accelerate and are not there between calls. "
                        "Load the model without offloading, or convert its directory, for which no weights are loaded "
                        "(kvrewrite convert)"
                    )
            undo.append((module, module.__dict__.get("forward")))
            module.forward = module.__dict__["_old_forward"]
        yield
    finally:
        for module, forward in undo:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward
