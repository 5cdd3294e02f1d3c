"""Chooses a policy and a budget for people who give the memory that a cache may take, and says why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvrewrite import policies
from kvrewrite.analysis.memory import MemoryPlan, plan_memory
from kvrewrite.cache.memory import human
from kvrewrite.errors import OptionError
from kvrewrite.ir.layout import PAGE
from kvrewrite.ir.site import AttentionSite
from kvrewrite.policies import Policy
from kvrewrite.policies.default import DEFAULT

# Accuracy in % of DEFAULT at shares of the cache: with the question known, and asked later. The small model, 4096 tokens, six
# tasks (docs/measuring.md has the same row; tests/analysis/test_choose.py compares).
MEASURED = {0.5: (94, 94), 0.25: (88, 83), 0.125: (81, 70), 0.05: (69, 61)}
MEASURED_FULL = 98
# A real model at a quarter of the cache: tokens of quotes that are right, in %, question in the prompt and asked later
# (SmolLM2-135M, docs/results/real_models.md; the same test compares).
REAL = {"full": (73.7, 75.3), "kvzip": (74.0, 75.0), "adakv": (60.6, 45.5), DEFAULT: (40.6, 42.0)}


@dataclass(frozen=True)
class Choice:
    """What `choose` chose. why: sentences for people."""

    policy: Policy
    plan: MemoryPlan
    why: tuple[str, ...]


@dataclass(frozen=True)
class MemoryGoal:
    """What a cache may take: memory bytes at its peak, for `batch` prompts of `context` tokens."""

    memory: int
    context: int
    batch: int = 1


def choose(
    sites: Iterable[AttentionSite],
    itemsize: int,
    goal: MemoryGoal,
    make: Callable[[int], Policy] | None = None,
) -> Choice:
    """Returns the full cache if it fits into the goal's memory, else the policy with the largest budget that fits.

    sites, itemsize: the model's attention sites, and bytes of a number in its cache. make: gives
    the policy with a budget, where the caller has chosen one; then its budget alone is found.
    Raises OptionError if not even one page a head fits.
    """
    owners = list(sites)
    context = goal.context

    def plan(policy: Policy) -> MemoryPlan:
        return plan_memory(owners, policy, itemsize, context, goal.batch)

    rows = f" in each of {goal.batch} rows" if goal.batch > 1 else ""
    asked = f"{context:,} tokens{rows} in {human(goal.memory)}"
    if make is None:
        full = policies.make("full")
        whole = plan(full)
        if whole.peak <= goal.memory:
            fits = f"{asked}: the full cache fits, with {human(whole.peak)} at its peak, so nothing is evicted"
            return Choice(full, whole, (fits,))
    given = make or (lambda budget: policies.make(DEFAULT, budget=budget))
    pages = _most(lambda n: plan(given(n * PAGE)).peak <= goal.memory, -(-context // PAGE))
    if pages == 0:
        least = plan(given(PAGE))
        raise OptionError(
            f"{asked}: even {PAGE} slots per head take {human(least.peak)}. Give more memory, a smaller batch, or "
            "quantize=int8 (docs/guide/quantized_caches.md)"
        )
    policy = given(pages * PAGE)
    found = plan(policy)
    share = min(1.0, pages * PAGE / context)
    why = [
        f"{asked}: a full cache takes {human(found.full)}, and does not fit"
        if found.full > goal.memory
        else f"{asked}: a full cache takes {human(found.full)}",
        f"{policy.name} with {pages * PAGE:,} slots per head ({share:.0%} of the text) takes {human(found.evicted)}, and "
        f"{human(found.peak)} at its peak",
    ]
    if make is None:
        why.append("it needs no training, reads prompts in chunks, and stays within its budget while it generates")
        why.append(_real())
        why.append(_quality(share))
    return Choice(policy, found, tuple(why))


def _most(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where all below one that fits do; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _quality(share: float) -> str:
    """What was measured at this share of the cache, or at the next smaller one."""
    below = [s for s in MEASURED if s <= share + 1e-9]
    if not below:
        least = min(MEASURED)
        return f"so little was not measured (at {least:.0%}: {_at(least)}): expect that facts are lost"
    return f"measured at {max(below):.3g} of the cache: {_at(max(below))}. Measure yours: kvrewrite eval"


def _real() -> str:
    """What a real model loses at a quarter of the cache, and what loses less."""
    shown = {name: f"{aware:.0f}% and {blind:.0f}%" for name, (aware, blind) in REAL.items()}
    return (
        f"quotes from documents, SmolLM2-135M, a quarter of the cache, question in the prompt and asked later: {shown[DEFAULT]} "
        f"of the tokens right, full cache {shown['full']}; adakv {shown['adakv']}, kvzip, which needs the full cache until the "
        f"prompt is read, {shown['kvzip']} (docs/results/real_models.md)"
    )


def _at(share: float) -> str:
    aware, blind = MEASURED[share]
    return (
        f"{aware}% right with the question in the prompt, {blind}% with the question asked later, {MEASURED_FULL}% with the full "
        "cache (small model, six tasks, docs/measuring.md)"
    )
