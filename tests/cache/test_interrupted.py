"""A step that is interrupted anywhere: its cache is refused until it is reset, or is as it was before or after the step. Pages
and other caches are as if nothing had happened."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kvrewrite
from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.errors import CacheError
from tests.cache.test_cache import check_pages, tokens
from tests.runtime.test_decoding import static
from tests.support.products import covering
from tests.support.rewritten import rewritten

pytestmark = pytest.mark.xdist_group("llama")
HOME = Path(kvrewrite.__file__).parent
FILES = {str(p) for folder in ("cache", "runtime") for p in (HOME / folder).glob("*.py")}
assert {str(HOME / "cache/pages.py"), str(HOME / "runtime/model.py")} < FILES


class Stop(KeyboardInterrupt):
    """What is raised, so that nothing else is taken for it."""


def at_line(run: Callable[[], Any], point: int) -> int:
    """Runs something and raises at line number `point` of those that run in FILES; returns how many there are."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        # What is raised in a destructor is swallowed; pages are then returned by the next repair.
        if frame.f_code.co_filename not in FILES or frame.f_code.co_name in ("__del__", "abandon"):
            return None
        if event == "line":
            count += 1
            if count - 1 == point:
                raise Stop
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def at_op(run: Callable[[], Any], point: int) -> int:
    """The same with the ops of torch that it runs, behind which it stops."""
    count = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal count
            out = func(*args, **(kwargs or {}))
            count += 1
            if count - 1 == point:
                raise Stop
            return out

    with Counting():
        run()
    return count


CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("full", {}, rewritten),
    ("adakv", {"budget": 40, "window": 8}, rewritten),  # pages are dealt out, and the pool shrinks
    ("sirllm", {"budget": 40, "chunk": 40}, rewritten),
    ("h2o", {"budget": 48, "quantize": "int8", "quantize_group": 4, "quantize_residual": 8}, rewritten),
    ("streaming_llm", {"budget": 48, "chunk": 40}, static),
    ("locret", {"budget": 48, "chunk": 40, "stabilizers": 9, "local_tail": 5}, static),
    ("h2o", {"budget": 48, "head_budgets": "adakv"}, static),
]
POINTS = 5


@covering({("policy", "options", "make"): 1, ("interrupt", "width"): 2})
@pytest.mark.parametrize(
    ("interrupt", "width"), [(at_line, 1), (at_line, 40), (at_op, 40)], ids=["token", "prompt", "op"]
)
@pytest.mark.parametrize(("policy", "options", "make"), CASES, ids=[f"{p}-{m.__name__}" for p, _, m in CASES])
def test_interrupted_steps(
    small_heap: None, policy: str, options: dict[str, Any], make: Any, width: int, interrupt: Any
) -> None:
    model = make("llama", policy, **options)
    document, new, more = tokens(2, 72), tokens(2, width, seed=1), tokens(2, 1, seed=2)

    def step(cache: EvictionCache, ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, cache=cache, logits_to_keep=1).logits
        return logits

    def read(cache: EvictionCache) -> EvictionCache:
        step(cache, document)
        step(cache, tokens(2, 1, seed=3))
        return cache

    parent, twin = read(model.new_cache(2)), read(model.new_cache(2))
    bystander = parent.fork()  # takes part in every round, one token each, as its twin does
    fork = parent.fork()
    expected = [step(fork, new), step(fork, more)]
    kept, store, unfinished = parent.positions(), parent.leases[0].store, 0
    fork = parent.fork()
    total = interrupt(lambda: step(fork, new), -1)
    for point in range(0, total, max(1, total // POINTS)):
        victim = parent.fork()
        with contextlib.suppress(Stop):  # not all runs are equally long
            interrupt(partial(step, victim, new), point)
        token = tokens(2, 1, seed=100 + point)
        torch.testing.assert_close(step(bystander, token), step(twin, token), rtol=0, atol=2e-6)
        if victim._unfinished:
            unfinished += 1
            with pytest.raises(CacheError, match=r"was interrupted .* reset\(\)"):
                step(victim, new)
            with pytest.raises(CacheError, match="was interrupted"):
                victim.fork()
            with pytest.raises(CacheError, match="was interrupted"):
                victim.reorder_cache(torch.tensor([1, 0]))
            victim.reset()
            read(victim)
        if victim.seen == [73, 73]:  # before the step
            torch.testing.assert_close(step(victim, new), expected[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(step(victim, more), expected[1], rtol=0, atol=2e-6)
        assert victim.seen == [74 + width] * 2 and parent.positions() == kept
        gc.collect()
        check_pages(*(c for c in (parent, bystander, twin, victim, fork) if c.leases[0].store is store))
    assert unfinished > POINTS // 2 and bystander.positions() == twin.positions()


def test_interrupted_rearrangements(small_heap: None) -> None:
    """The same of what changes rows, and of forks and resets."""
    model = rewritten("llama", "sirllm", budget=60, chunk=40)
    parent = model.new_cache(2)
    model(tokens(2, 100), cache=parent)
    kept = parent.positions()
    changes: list[tuple[Callable[[EvictionCache], Any], int]] = [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), 2),
        (lambda cache: cache.batch_repeat_interleave(3), 6),
        (lambda cache: cache.reset(), 2),
    ]
    for change, rows in changes:
        victim = parent.fork()
        total = at_line(partial(change, victim), -1)
        for point in range(0, total, max(1, total // POINTS)):
            victim = parent.fork()
            with contextlib.suppress(Stop):
                at_line(partial(change, victim), point)
            assert victim._unfinished or victim.positions() == kept or victim.batch_size == rows
            assert parent.positions() == kept
            if victim._unfinished:
                with pytest.raises(CacheError, match="was interrupted"):
                    model(tokens(victim.batch_size, 1), cache=victim)
            victim.reset()
            check_pages(parent)
            del victim
    total = at_line(parent.fork, -1)
    for point in range(0, total, max(1, total // POINTS)):
        with contextlib.suppress(Stop):
            at_line(parent.fork, point)
        gc.collect()
        twin = parent.fork()
        assert twin.positions() == parent.positions() == kept
        check_pages(parent, twin)
