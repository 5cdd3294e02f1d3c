"""In what ways policies evict: what stands for what, where a test's subject is the eviction and not whose scores decide."""

from __future__ import annotations

from typing import Any

from kvrewrite import policies

ASKED = (
    "evicts_ever",
    "whole_prompt",
    "repeats_prompt",
    "has_scores",
    "after_logits",
    "gates",
    "head_pattern",
    "recalls",
    "data_dependent",
    "shares_layers",
    "decode_eviction",
)


def eviction(policy: str, options: dict[str, Any]) -> tuple[str, ...]:
    """What decides when slots go and how many each head keeps; equal for policies that differ in their scores alone."""
    made = policies.make(policy, **options)
    return tuple(name for name in ASKED if getattr(made, name)) + ("interval",) * (getattr(made, "interval", 0) > 1)


def positions(policy: str, options: dict[str, Any]) -> str:
    """Which positions cached keys have."""
    return str(policies.make(policy, **options).positions)
