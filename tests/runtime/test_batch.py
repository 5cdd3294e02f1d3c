"""A request in a batch has the tokens and keeps the slots that it has alone, whatever the schedule and whoever is beside it."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kvrewrite.errors import CacheError, InputError, OptionError, PoolFull
from kvrewrite.runtime.batch import Batch, Running
from tests.runtime.test_invariants import BUDGET, OPTIONS, POLICIES
from tests.support.products import covering
from tests.support.rewritten import ours, rewritten
from tests.support.zoo import VOCAB

FAMILIES = ["llama", "gemma3_text", "phi3", "gpt2"]
CASES = [(name, positions) for name, positions in POLICIES if name != "full"]
CASES += [(p.name, "original" if p().positions == "original" else "contiguous") for p in ours() if p.name not in dict(POLICIES)]
NO_ROTATION = {"gpt2"}
ONLY_LLAMA = {"duo_attention", "fast_kvzip", "kvzap", "trim_kv", "attention_gate", "expected_attention", "locret_q"}


def distinct(count: int, generator: random.Random) -> list[int]:
    """Ids without a repetition as far as there are enough: equal keys would be ties, which rounding decides."""
    ids = list(range(2, VOCAB))
    generator.shuffle(ids)
    return (ids * (1 + count // len(ids)))[:count]


def make(family: str, policy: str, positions: str, **options: Any) -> Any:
    given = dict(OPTIONS.get(policy, {}), positions=positions, **options)
    if policy not in ("full", "kvzap", "duo_attention", "attention_gate"):
        given.setdefault("budget", BUDGET)
    return rewritten(family, policy, **given)


@dataclass(eq=False)
class Wanted:
    """What is asked of a request, and what came of it."""

    prompt: list[int]
    count: int
    budget: int | None = None
    tokens: list[int] = field(default_factory=list)
    running: Running | None = None
    replayed: int = 0
    kept: dict[int, list[list[int]]] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.count and self.running is None


def alone(model: Any, wanted: Wanted) -> Wanted:
    """The same request with nobody beside it: one call for the prompt, one for each token."""
    found = Wanted(wanted.prompt, wanted.count, wanted.budget)
    if wanted.budget is not None:
        batch = Batch(model)
        run(batch, [found], random.Random(0), most=1)
        return found
    cache = model.new_cache(1, max_length=len(wanted.prompt) + wanted.count)
    ids = torch.tensor([wanted.prompt])
    for _ in range(wanted.count):
        ids = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        found.tokens.append(int(ids))
    found.kept = {layer: rows[0] for layer, rows in cache.positions().items()}
    return found


def run(batch: Batch, requests: list[Wanted], generator: random.Random, most: int, preempt: float = 0.0) -> int:
    """Drives a batch by a random schedule until all have their tokens. Returns how often one was preempted."""
    waiting, active, preempted = list(requests), [], 0

    def stop(wanted: Wanted) -> None:
        assert wanted.running is not None
        batch.end(wanted.running)
        wanted.running = None
        active.remove(wanted)

    def feed(wanted: Wanted, row: torch.Tensor) -> None:
        """Takes the next token, or the one that it had before it was preempted."""
        if wanted.replayed == len(wanted.tokens):
            wanted.tokens.append(int(row.argmax()))
        wanted.replayed += 1
        if len(wanted.tokens) == wanted.count and wanted.replayed == wanted.count:
            wanted.kept = wanted.running.positions()  # type: ignore[union-attr]
            stop(wanted)

    while waiting or active:
        if waiting and len(active) < most and (not active or generator.random() < 0.5):
            wanted = waiting.pop(0)
            length = len(wanted.prompt) + wanted.count
            wanted.running = batch.start(wanted.prompt, max_length=length, budget=wanted.budget)
            wanted.replayed = 0
            active.append(wanted)
        try:
            for wanted in [w for w in active if w.running.prompt_left]:
                if generator.random() < 0.6 and (row := batch.advance(wanted.running)) is not None:
                    feed(wanted, row)
            ready = [w for w in active if not w.running.prompt_left and generator.random() < 0.8]
            generator.shuffle(ready)
            if ready:
                logits = batch.decode([w.running for w in ready], [w.tokens[w.replayed - 1] for w in ready])
                for wanted, row in zip(ready, logits):
                    feed(wanted, row)
            full = False
        except PoolFull:
            full = True
        if active and (full or generator.random() < preempt):
            wanted = generator.choice(active) if not full else active[-1]
            stop(wanted)
            waiting.insert(0, wanted)
            preempted += 1
    return preempted


@functools.cache
def asked(family: str, policy: str, positions: str) -> tuple[list[Wanted], list[Wanted]]:
    """Requests, and each alone."""
    model, generator = make(family, policy, positions), random.Random(5)
    requests = [Wanted(distinct(n, generator), c) for n, c in ((21, 6), (1, 9), (13, 1), (30, 8), (12, 5), (17, 12), (25, 3))]
    return requests, [alone(model, w) for w in requests]


@covering({"family": 1, ("policy", "positions"): 1})
@pytest.mark.parametrize("policy, positions", CASES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_request_is_the_one_that_it_is_alone(family: str, policy: str, positions: str, seed: int) -> None:
    """Tokens and kept slots, over random schedules with joins, leaves and preemptions."""
    if (positions == "contiguous" and family in NO_ROTATION) or (policy in ONLY_LLAMA and family != "llama"):
        pytest.skip("the compiler refuses this pair")
    model, (requests, expected) = make(family, policy, positions), asked(family, policy, positions)
    found = [Wanted(w.prompt, w.count) for w in requests]
    batch = Batch(model)
    run(batch, found, random.Random(seed), most=5, preempt=0.05)
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f.tokens == e.tokens, i
        assert f.kept == e.kept, i
    assert batch.used == 0
