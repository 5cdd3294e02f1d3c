"""Fixes inverse frequencies that depend on the length while a model is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def fixed_rotary(
    model: nn.Module, max_length: int | None
) -> Iterator[list[tuple[nn.Module, str, int, Tensor, Tensor]]]:
    """Removes the length-dependent choice of frequencies from rotary embeddings during the trace.

    transformers chooses longrope's and dynamic NTK's frequencies by the largest position of each call. A graph can't do
    that, and it makes whole and chunked prefill disagree. Here the frequencies become data: yields
    (module, buffer name, threshold, short, long) for each such table.
    """
    tables: list[tuple[nn.Module, str, int, Tensor, Tensor]] = []
    undo: list[tuple[nn.Module, Any, str, Tensor]] = []
    try:
        for module in model.modules():
            rope_type = getattr(module, "rope_type", None)
            kinds: dict[Any, Any] = rope_type if isinstance(rope_type, dict) else {None: rope_type}
            if not any(isinstance(k, str) and ("dynamic" in k or k == "longrope") for k in kinds.values()):
                continue
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            config: Any = module.config
            for layer_type, kind in kinds.items():
                if not ("dynamic" in kind or kind == "longrope"):
                    continue
                prefix = f"{layer_type}_" if layer_type else ""
                name = f"{prefix}inv_freq"
                parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
                limit = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
                kwargs = {"layer_type": layer_type} if layer_type else {}
                current: Tensor = getattr(module, name)
                device = current.device if current.device.type != "meta" else torch.device("cpu")
                init = ROPE_INIT_FUNCTIONS[kind]
                short, _ = init(config, device, seq_len=1, **kwargs)
                length = max(max_length or config.max_position_embeddings, limit + 1)
                long, _ = init(config, device, seq_len=limit + 1 if kind == "longrope" else length, **kwargs)
                tables.append((module, name, limit, short.float(), long.float()))
                undo.append((module, rope_type, name, current))
            module.rope_type = (
                dict.fromkeys(rope_type, "default") if isinstance(rope_type, dict) else "default"  # type: ignore[assignment]
            )
        yield tables
    finally:
        for module, rope_type, _name, _current in undo:
            module.rope_type = rope_type
