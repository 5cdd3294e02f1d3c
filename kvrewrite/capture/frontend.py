"""Captures an unmodified decoder as a flat `torch.fx` graph.

The graph computes `logits = f(input_ids, position_ids)` without a cache, for any batch and length, and keeps the
parameters' names and storage. Models that use transformers' attention interface are traced with an attention function
that is one canonical op and a mask function that only records which mask is meant. All other models are traced as they
are, and `passes/canonical/find_attention.py` finds their attention in the graph.
"""

from __future__ import annotations

import torch
from torch import nn

from kvrewrite.capture.attention_interface import InterfaceCalls, is_transformers_model, transformers_tracing
from kvrewrite.capture.captured import Captured
from kvrewrite.capture.export import export_model
from kvrewrite.capture.side_effects import untouched
from kvrewrite.capture.third_party import check_layers, plain_4bit_layers, without_hooks
from kvrewrite.errors import CaptureError, UnsupportedModelError
from kvrewrite.ir.waits import told


def capture(model: nn.Module, *, max_length: int | None = None) -> Captured:
    """Captures a decoder as a flat graph.

    model: in train or eval mode (dropout is off during the trace), on any device, including `meta`. max_length: the
    length at which dynamic NTK frequencies are fixed; default: the model's `max_position_embeddings`.

    Raises CaptureError if torch.export can't trace the model, UnsupportedModelError if its attention can't be
    rewritten.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; kvrewrite rewrites decoders (causal language models)"
        )
    what = f"tracing {type(model).__name__} with torch.export"
    with untouched(model), without_hooks(model), plain_4bit_layers(model), told(what):
        check_layers(model)
        return _capture(model, max_length)


def _capture(model: nn.Module, max_length: int | None) -> Captured:
    if not is_transformers_model(model):
        return export_model(model, "trace", max_length)
    captured = _capture_interface(model, max_length)
    if captured is not None:
        return captured
    # Traces with the user's attention implementation; kernels that a graph can't show become sdpa.
    own = getattr(model.config, "_attn_implementation", None)
    with transformers_tracing(model, own if own in ("eager", "sdpa") else "sdpa"):
        return export_model(model, "trace", max_length)


def _capture_interface(model: nn.Module, max_length: int | None) -> Captured | None:
    """Captures through transformers' attention interface; None if the model does not use it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    calls = InterfaceCalls(model)
    name = "kvrewrite"
    AttentionInterface.register(name, calls.attention)
    AttentionMaskInterface.register(name, calls.mask)
    try:
        with transformers_tracing(model, name):
            captured = export_model(model, "interface", max_length, calls)
    except (CaptureError, UnsupportedModelError):
        if calls.modules:
            raise
        return None
    finally:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)
    captured.compared = calls.compared
    nodes = [n for n in captured.graph.graph.nodes if n.target is torch.ops.kvrewrite.attention.default]
    if len(nodes) != len(calls.modules):
        raise CaptureError(f"{len(calls.modules)} attention calls were traced, but {len(nodes)} are in the graph")
    for node, path in zip(nodes, calls.modules, strict=True):
        node.meta["kvrewrite_module"] = path
    return captured
