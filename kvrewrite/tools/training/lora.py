"""Adds LoRA (Hu et al., arXiv 2106.09685) by peft beside gates: before the model is captured, saved in peft's format.

A captured graph has no modules that an adapter could be attached to, so adapters come first. The graph then holds their
parameters like the model's own, and training changes them in place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kvrewrite.errors import OptionError

ALL_LINEAR = "all-linear"  # peft's word for every linear layer but the vocabulary's


def require_peft() -> None:
    """Raises OptionError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise OptionError("LoRA needs peft: pip install 'peft>=0.18' (or: pip install 'kvrewrite[train]')")


def add_lora(
    model: nn.Module, *, rank: int = 8, alpha: float | None = None, targets: str | Sequence[str] = ALL_LINEAR
) -> Any:
    """Wraps a transformers model, in place, in a peft model with trainable LoRA adapters; everything else is frozen.

    alpha: the adapters' scale times their rank, default 2 * rank. targets: names of linear modules ("q_proj"), or
    "all-linear". There is no dropout, because capture switches it off. Capture the result's `get_base_model()`.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise OptionError(f"LoRA's rank is {rank}, expected at least 1")
    if hasattr(model, "peft_config"):
        raise OptionError("the model has an adapter already; merge it first (peft: merge_and_unload)")
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        raise OptionError(f"LoRA could not be added to {targets}: {str(error).strip()[:300]}") from error


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the trained parameters of the adapters."""
    return [p for n, p in model.named_parameters() if p.requires_grad and ".lora_" in f".{n}"]


def save_adapter(model: Any, out: str | Path) -> None:
    """Writes the adapters in peft's format: adapter_config.json and adapter_model.safetensors in the folder `out`."""
    model.save_pretrained(str(out), safe_serialization=True)


def merge_lora(model: Any, out: str | Path, tokenizer: Any = None) -> None:
    """Adds the adapters to the weights and writes a plain transformers model directory for `kvrewrite convert`.

    The adapters are gone from `model` afterwards. 16-bit weights round the sum, so that logits differ from those in
    training by as much; in fp32 they agree.
    """
    merged = model.merge_and_unload()
    merged.save_pretrained(str(out), safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(out))
