"""Computes a request's FLOPs and bytes from the model's and the policy's numbers alone; measures nothing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from kvrewrite.cache.slot_plan import prompt_slots, slots_decoded
from kvrewrite.ir.site import AttentionSite
from kvrewrite.kernels.latent.reference import expanding_is_cheaper
from kvrewrite.kernels.quantized.scheme import Scheme
from kvrewrite.policies import UNLIMITED, Policy, RowState, Segment, make


# ------------------------------------------------------------------------------------------ the model
@dataclass(frozen=True)
class Work:
    """One token's cost in linear layers: FLOPs of all but the output layer, of the output layer, weight bytes per
    step."""

    linear_flops: float
    head_flops: float
    weight_bytes: float


def linears(model: Any) -> list[Tensor]:
    """Returns the weights (out, in) of every linear layer except the output layer, as often as they are used."""
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            found.append(module.weight)
        elif isinstance(module, Conv1D):
            found.append(module.weight.t())
    return found


def work_of(model: Any) -> Work:
    """Returns the work of a transformers model. Counts only the experts that a token uses."""
    config = model.config.get_text_config(decoder=True)
    linear = sum(float(w.numel()) for w in linears(model))
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = getattr(config, "num_experts_per_tok", None)
    if experts and used:
        linear += sum(p.numel() for p in model.parameters() if p.dim() == 3 and p.shape[0] == experts) * used / experts
    head = float(config.vocab_size * config.hidden_size)
    return Work(2 * linear, 2 * head, (linear + head) * next(model.parameters()).element_size())


def sites_of(config: Any) -> list[AttentionSite]:
    """Returns the attention layers that a transformers configuration describes, for models that are not rewritten."""
    c = config.get_text_config(decoder=True)
    heads = c.num_attention_heads
    dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    v_dim = getattr(c, "v_head_dim", None) or dim
    if getattr(c, "qk_nope_head_dim", None):  # latent attention
        dim = c.qk_nope_head_dim + c.qk_rope_head_dim
    types = getattr(c, "layer_types", None) or ["full_attention"] * c.num_hidden_layers
    sites = []
    for i, kind in enumerate(types):
        window = int(getattr(c, "sliding_window", None) or 0) if kind == "sliding_attention" else 0
        chunk = int(getattr(c, "attention_chunk_size", None) or 0) if kind == "chunked_attention" else 0
        kv_heads = getattr(c, "num_key_value_heads", None) or heads
        sites.append(AttentionSite(i, "", heads, kv_heads, dim, v_dim, dim**-0.5, "config", window, chunk))
    return sites


# ------------------------------------------------------------------------------------------ the request
@functools.lru_cache(maxsize=4096)
def visible_pairs(tokens: int, cached: int, seen: int = 0, window: int = 0, chunk: int = 0) -> int:
    """Counts (query, key) pairs of `tokens` new tokens on `cached` slots and themselves, after `seen` tokens."""
    keys = cached + np.arange(1, tokens + 1, dtype=np.int64)
    if window:
        keys = np.minimum(keys, window)
    if chunk:
        keys = np.minimum(keys, (seen + np.arange(tokens)) % chunk + 1)
    return int(keys.sum())


@dataclass
class Attention:
    """Attention of one row's prompt. flops: per site; call: (tokens, cached slots) of each site's most expensive
    segment; held: slots per head that each site has at the end; read: slots and new tokens per head that each site
    reads in all segments together. If the heads of a site differ, held and read are means."""

    flops: list[float]
    call: list[tuple[int, int]]
    held: list[int]
    read: list[int]


def attention_of(sites: Sequence[AttentionSite], context: int, policy: Policy | None = None) -> Attention:
    """Returns the attention cost of a prompt of `context` tokens; policy: None: a full cache, the prompt in one
    call."""
    segments = [Segment(context, UNLIMITED)] if policy is None else policy.passes(context)
    owners = [s for s in sites if s.shares_kv_with is None]
    spans = [s.window or s.chunk for s in owners]
    slots = prompt_slots(policy or make("full"), segments, [s.kv_heads for s in owners], spans)
    of_layer = dict(zip((s.layer for s in owners), slots))
    out = Attention([], [], [], [])
    begins = np.cumsum([0, *(s.joins for s in segments)]).tolist()
    for site in sites:
        held = of_layer[site.layer if site.shares_kv_with is None else site.shares_kv_with]
        costs = [
            _attention_flops(site, segment.length, cached, seen)
            for segment, cached, seen in zip(segments, held, begins)
        ]
        dearest = max(range(len(costs)), key=costs.__getitem__)
        out.flops.append(sum(costs))
        out.call.append((segments[dearest].length, int(held[dearest].max())))
        out.held.append(round(held[-1].mean()))
        out.read.append(round(held[:-1].mean(1).sum()) + context)
    return out


def _attention_flops(site: AttentionSite, tokens: int, cached: np.ndarray, seen: int) -> float:
    """Returns the FLOPs of a segment of `tokens` tokens after `seen`. cached: slots per kv head."""
    alike = cached.max() == cached.min()
    heads = [int(cached[0])] if alike else cached.tolist()
    return sum(_head_flops(site, tokens, n, seen) for n in heads) / len(heads)


def _head_flops(site: AttentionSite, tokens: int, cached: int, seen: int) -> float:
    """Returns the same if every kv head has `cached` slots. A cache of latents runs absorbed or expanded, as
    `latent_attention` chooses; the projection of the latent, or its replacement, counts as the linear layer that it
    is."""
    pairs = visible_pairs(tokens, cached, seen, site.window, site.chunk)
    absorbed = 2.0 * (site.head_dim + site.v_head_dim) * site.heads * pairs
    if site.expanded is None:
        return absorbed
    heads, k, v = site.expanded
    rank, rotary = site.latent, site.latent_rotary
    if not expanding_is_cheaper(tokens, cached, k - rotary, v, rank, rotary):
        return absorbed
    return 2.0 * (k + v) * site.heads * pairs + 2.0 * heads * cached * rank * (k - rotary + v)


def decode_slots(
    attention: Attention, sites: Sequence[AttentionSite], step: int, context: int, policy: Policy | None
) -> list[int]:
    """Returns the slots per head that each site reads in the decode step after `step` others."""
    keep = UNLIMITED
    if policy is not None:
        held = max(attention.held, default=0) + step
        keep = policy.decode_segment(RowState(seen=context + step, generated=step, held=held)).keep
    spans = [site.window or site.chunk or UNLIMITED for site in sites]
    return [int(slots_decoded(held, step, keep, span)) + 1 for held, span in zip(attention.held, spans)]


def kv_bytes(
    sites: Sequence[AttentionSite], slots: Sequence[int], itemsize: int, policy: Policy | None = None
) -> float:
    """Returns the bytes of keys and values that a decode step of one row reads."""
    total = 0.0
    quantized = policy is not None and policy.quantize != "none"
    for site, held in zip(sites, slots, strict=True):
        dense = site.cached_channels * itemsize
        if quantized:
            assert policy is not None
            scheme = Scheme(policy.quantize, policy.quantize_group)
            packed = scheme.key_bytes(site.head_dim, itemsize) + scheme.value_bytes(site.v_head_dim, itemsize)
            tail = min(held, policy.quantize_residual)
            total += site.kv_heads * (tail * dense + (held - tail) * packed)
        else:
            total += site.kv_heads * held * dense
    return total


# ------------------------------------------------------------------------------------------ tables
@dataclass
class Cost:
    """Cost per row: a prompt of `context` tokens, and the first decode step after it. FLOPs and bytes."""

    context: int
    prefill_flops: float
    prefill_bytes: float
    decode_flops: float
    decode_bytes: float


def cost_of(model: nn.Module, sites: list[AttentionSite], policy: Policy | None, itemsize: int, context: int) -> Cost:
    """Returns FLOPs of linear layers and attention; bytes of weights and of keys and values. policy: None: a full
    cache, the prompt in one call.

    A prompt reads the weights once per segment and, in every segment, the keys and values that it attends to; it writes
    its own once. A decode step reads all weights and the cache. A policy's scores, its own weights, evictions and
    activations are not counted.
    """
    work, attention = work_of(model), attention_of(sites, context, policy)
    segments = 1 if policy is None else len(policy.passes(context))
    owners = [s for s in sites if s.shares_kv_with is None]
    written = context * sum(s.kv_heads * s.cached_channels for s in owners) * itemsize
    slots = decode_slots(attention, sites, 0, context, policy)
    attended = sum(2.0 * (s.head_dim + s.v_head_dim) * s.heads * n for s, n in zip(sites, slots, strict=True))
    return Cost(
        context=context,
        prefill_flops=context * work.linear_flops + work.head_flops + sum(attention.flops),
        prefill_bytes=segments * work.weight_bytes + kv_bytes(sites, attention.read, itemsize, policy) + written,
        decode_flops=work.linear_flops + work.head_flops + attended,
        decode_bytes=work.weight_bytes + kv_bytes(sites, slots, itemsize, policy),
    )


def contexts_up_to(longest: int) -> list[int]:
    """Returns the context lengths of a plot: powers of two from 256 on, and the longest."""
    lengths = [1 << i for i in range(8, 31) if 1 << i < longest]
    return [*lengths, longest]


def cost_table(
    model: nn.Module, sites: list[AttentionSite], policy: Policy | None, itemsize: int, longest: int
) -> list[dict[str, Any]]:
    """Returns costs by context length, with a full cache and with the policy."""
    rows = []
    for context in contexts_up_to(longest):
        full = cost_of(model, sites, None, itemsize, context)
        row: dict[str, Any] = {"context": context, "full": vars(full), "policy": None}
        if policy is not None:
            row["policy"] = vars(cost_of(model, sites, policy, itemsize, context))
        rows.append(row)
    return rows
