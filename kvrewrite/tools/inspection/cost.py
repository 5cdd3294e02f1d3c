"""What a request costs by the model's and the policy's numbers alone: FLOPs and bytes, no times, nothing measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from kvrewrite.ir.site import AttentionSite
from kvrewrite.policies import Policy
from kvrewrite.tools.benchmark.roofline import attention_of, decode_slots, kv_bytes, work_of


@dataclass
class Cost:
    """Of one row: a prompt of `context` tokens, and the first decode step behind it. FLOPs and bytes."""

    context: int
    prefill_flops: float
    prefill_bytes: float
    decode_flops: float
    decode_bytes: float


def cost_of(model: nn.Module, sites: list[AttentionSite], policy: Policy | None, itemsize: int, context: int) -> Cost:
    """FLOPs of linear layers and attention; bytes of weights and of keys and values. policy: None: a full cache, the
    prompt at once.

    A prompt reads the weights once a segment and, in every segment, the keys and values that it attends to; it writes its
    own once. A decode step reads all weights and the cache. Scores of a policy, its own weights, evictions and
    activations are not counted.
    """
    work, attention = work_of(model), attention_of(sites, context, policy)
    segments = 1 if policy is None else len(policy.plan(context))
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
    """Context lengths of a plot: powers of two from 256 on, and the longest."""
    lengths = [1 << i for i in range(8, 31) if 1 << i < longest]
    return [*lengths, longest]


def cost_table(
    model: nn.Module, sites: list[AttentionSite], policy: Policy | None, itemsize: int, longest: int
) -> list[dict[str, Any]]:
    """Costs by context length, with a full cache and with the policy."""
    rows = []
    for context in contexts_up_to(longest):
        full = cost_of(model, sites, None, itemsize, context)
        row: dict[str, Any] = {"context": context, "full": vars(full), "policy": None}
        if policy is not None:
            row["policy"] = vars(cost_of(model, sites, policy, itemsize, context))
        rows.append(row)
    return rows
