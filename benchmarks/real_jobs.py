"""The cells that benchmarks/real_models.py measures, those that matter most first."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from kvrewrite.tools.evaluation.cells import BASELINE

FREE = ["h2o", "sirllm", "kvzip", "random", "compactor", "snapkv", "observed_attention", "keydiff", "adakv"]
MORE = ["streaming_llm", "nacl", "tova", "expected_attention", "leverage", "lagkv", "finch", "pyramidkv", "knorm"]
CELLS = [(mode, budget) for mode in ("blind", "aware") for budget in (0.25, 0.125, 0.5)]


class Job(NamedTuple):
    """A cell: heads is what trains them (None: a policy without), options those of the policy."""

    model: str
    task: str
    mode: str
    budget: float | None
    policy: str
    options: tuple[tuple[str, Any], ...] = ()
    heads: str | None = None

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options)
        named = f"{self.policy}:{options}" if options else self.policy
        return " ".join(map(str, (*self[:4], named, *([f"({self.heads})"] if self.heads else []))))


def trained(kind: str, window: int = 32, scope: str = "model") -> dict[str, Any]:
    """A job's policy, options and heads: KVzap as top-k, by default over all heads of all layers."""
    return {"policy": "kvzap", "options": (("threshold", None), ("scope", scope), ("window", window)), "heads": kind}


def locret(budgets: str) -> dict[str, Any]:
    """A job's policy, options and heads: Locret's, with a budget of its own for each head or shared by a layer's."""
    return {"policy": "locret", "options": (("head_budgets", budgets),), "heads": "locret"}


def jobs(given: argparse.Namespace) -> Iterator[Job]:
    """The cells that are asked for."""
    for job in every(given):
        wanted = given.only is None or re.search(given.only, str(job))
        if wanted and not (given.skip and re.search(given.skip, str(job))):
            yield job


def every(given: argparse.Namespace) -> Iterator[Job]:
    """All cells."""
    kinds = [kind for kind in given.kinds if kind != "locret"]
    free = given.policies or FREE
    for model in given.models:
        for kind in kinds:
            yield Job(model, "quote", "blind", 0.25, **trained(kind))
        for budgets in ("equal", "adakv") if "locret" in given.kinds else ():
            yield Job(model, "quote", "blind", 0.25, **locret(budgets))
        yield Job(model, "quote", BASELINE, None, "full")
        for policy in free[:4]:
            yield Job(model, "quote", "blind", 0.25, policy)
    for model in given.models:
        yield from of_heads(model, kinds[:1])
        yield Job(model, "lm", BASELINE, None, "full")
    for model in given.models:
        for policy in free[4:]:
            yield Job(model, "quote", "blind", 0.25, policy)
    for model in given.models:
        for policy in free[:4]:
            yield Job(model, "lm", "blind", 0.25, policy)
    for model in given.models:
        for mode, budget in CELLS[1:]:
            for policy in free:
                yield Job(model, "quote", mode, budget, policy)
            for kind in kinds[:1]:
                yield Job(model, "quote", mode, budget, **trained(kind))
    for mode, budget in CELLS if not given.policies else ():
        for model in given.models:
            for policy in MORE:
                yield Job(model, "quote", mode, budget, policy)


def of_heads(model: str, kinds: list[str]) -> Iterator[Job]:
    """What else is asked of trained heads: larger windows, no budget shared between layers, beside KVzip with none, and what
    follows a text."""
    for kind in kinds:
        for window in (32, 128):
            yield Job(model, "lm", "blind", 0.25, **trained(kind, window))
        yield Job(model, "quote", "blind", 0.25, **trained(kind, 128))
        yield Job(model, "quote", "blind", 0.25, **trained(kind, scope="head"))
        yield Job(model, "quote", "blind", 0.25, "kvzip", (("scope", "head"),))
        for window in (256, 512):
            yield Job(model, "lm", "blind", 0.25, **trained(kind, window))
            yield Job(model, "quote", "blind", 0.25, **trained(kind, window))
