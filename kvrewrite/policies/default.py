"""The policy of a caller who names none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvrewrite.policies.registry import make

if TYPE_CHECKING:
    from kvrewrite.policies.base import Policy

# Needs no training, takes prompts in chunks, stays within its budget while it generates, and is the best of such policies
# where the question comes later (docs/measuring.md). Its budget is a number of slots, so that short texts lose nothing.
DEFAULT = "keydiff"


def default_policy(options: dict[str, Any]) -> tuple[Policy, str]:
    """The policy of a caller who names none, and a sentence that says what it does. options: its options."""
    policy = make(DEFAULT, **options)
    kept = (
        f"{policy.budget:.0%} of the text" if isinstance(policy.budget, float) else f"{policy.budget} tokens per head"
    )
    return policy, (
        f"no policy was named, so {policy.name} keeps {kept}: {policy.summary}. `kvrewrite policies` lists the others; full "
        "evicts nothing"
    )
