"""Writes the README.md of a converted model directory."""

from __future__ import annotations

from typing import Any

from kvrewrite.analysis.memory import MemoryPlan
from kvrewrite.cache.memory import human
from kvrewrite.ir.program import Program

_TEXT = """---
library_name: kvrewrite
tags: [kv-cache, {policy}]
---
# {title}, with {policy} eviction by kvrewrite

```python
import kvrewrite
model = kvrewrite.load("PATH")
```

or `kvrewrite generate PATH --prompt "..."`. **Stock transformers opens this directory as the unmodified model**: the base
weights are untouched, and eviction lives in `graph.json`, `policy.safetensors` and `constants.safetensors`.

Policy: `{policy}` with {options}.

{memory}Proved when it was converted: {proof}.

## What was rewritten

| layer | module | heads | kv heads | head dim | mask | RoPE | inserted |
|---|---|---|---|---|---|---|---|
{sites}
"""


def _carried(plan: MemoryPlan) -> list[str]:
    """Says what the other layers of a hybrid model hold."""
    if not plan.carried:
        return []
    return [f"Of each, {human(plan.carried)} are what layers without attention carry, at any length.", ""]


def proof_text(proof: dict[str, Any] | None) -> str:
    """Describes what was proved about a rewrite (`passes/canonical/validate.py`)."""
    if proof is None:
        return "nothing (check=off)"
    parts = []
    if proof["sites"]:
        longest = max(proof["lengths"], default=0)
        parts.append(
            f"{proof['sites']} attention sites ({proof['distinct']} distinct) give what they replaced, on up to {longest} tokens"
        )
    if proof["masks"]:
        parts.append(f"each mask is the one that was recognized, at every distance up to {proof['masks']} tokens")
    if proof["rest"]:
        parts.append(f"nothing but attention mixes tokens, tried with up to {max(proof['rest'])} tokens")
    if proof["whole"]:
        parts.append("the whole gives the original's logits: in uneven chunks, token by token, and padded")
    return "; ".join(parts) or "the sites are the model's own calls of transformers' attention interface"


def model_card(program: Program, name: str, plans: list[MemoryPlan]) -> str:
    """Returns the model card: how to load the model, what was rewritten, what it saves."""
    sites = []
    for s in program.sites:
        mask = s.mask + (f" {s.window or s.chunk}" if s.window or s.chunk else "")
        sites.append(
            f"| {s.layer} | {s.module} | {s.heads} | {s.kv_heads} | {s.head_dim} | {mask} | {'yes' if s.rope else 'no'} | "
            f"{', '.join(s.inserted)} |"
        )
    memory = ""
    if plans:
        rows = [f"| {p.context} | {human(p.full)} | {human(p.evicted)} | {human(p.peak)} |" for p in plans]
        memory = "\n".join(
            [
                f"## Cache memory (estimate, batch {plans[0].batch})",
                "",
                "| context | full cache | evicted | peak in prefill |",
                "|---|---|---|---|",
                *rows,
                "",
                *_carried(plans[0]),
                "",
            ]
        )
    options = ", ".join(f"`{k}={v}`" for k, v in program.policy["options"].items())
    return _TEXT.format(
        title=name or "A model",
        policy=program.policy["name"],
        options=options,
        memory=memory,
        proof=proof_text(program.proof),
        sites="\n".join(sites),
    )
