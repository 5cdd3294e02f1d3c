"""Threads share a model and forks of a cache: every answer is the one that a single thread gets."""

from __future__ import annotations

import copy
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvrewrite
from kvrewrite.cache.eviction_cache import EvictionCache
from tests.cache.test_cache import GREEDY, check_pages, tokens
from tests.runtime.test_decoding import static
from tests.support.products import covering
from tests.support.rewritten import captured, original, rewrite, rewritten

pytestmark = pytest.mark.xdist_group("llama")


@pytest.fixture(autouse=True)
def busy_threads() -> Iterator[None]:
    """Threads take turns after every few lines."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(jobs: list[Callable[[], Any]]) -> list[Any]:
    """The results of jobs that run side by side, one thread each."""
    found: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        start.wait()
        try:
            found[i] = jobs[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def answer(model: Any, text: Tensor, cache: EvictionCache | None = None, steps: int = 12) -> list[int]:
    cache = model.new_cache(1) if cache is None else cache
    ids = text.to(model.device)
    found: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=steps, **GREEDY
    )
    return found[0].tolist()  # type: ignore[no-any-return]


def on_a_fork(model: Any, text: Tensor, cache: EvictionCache, steps: int = 12) -> list[int]:
    return answer(model, text, cache.fork(), steps)


POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("streaming_llm", {"budget": 32}),
    ("h2o", {"budget": 40}),
    ("snapkv", {"budget": 40, "window": 8}),
    ("adakv", {"budget": 40, "window": 8}),
]


@pytest.mark.parametrize(("policy", "options"), POLICIES[1:3], ids=[p for p, _ in POLICIES[1:3]])
def test_caches_of_their_own_with_static_buffers(policy: str, options: dict[str, Any]) -> None:
    """Single tokens run from buffers of the model."""
    model, plain = static("llama", policy, **options), rewritten("llama", policy, **options)
    texts = [tokens(1, 60 + 7 * i, seed=i) for i in range(4)]
    expected = [answer(plain, text) for text in texts]
    for _ in range(2):
        assert at_once([partial(answer, model, text) for text in texts]) == expected
    assert [answer(model, text) for text in texts] == expected


@covering({"make": 1, "policy": 0, "options": 0}, prefer=lambda case: case["policy"] in ("h2o", "adakv"))
@pytest.mark.parametrize("make", [rewritten, static])
@pytest.mark.parametrize(("policy", "options"), POLICIES, ids=[p for p, _ in POLICIES])
def test_forks_of_one_document(policy: str, options: dict[str, Any], make: Any) -> None:
    """Forks share pages, and their pools grow while others are read; forks are also made in the threads."""
    model = make("llama", policy, **options)
    document = tokens(1, 100)
    texts = [torch.cat([document, tokens(1, 9 + i, seed=i)], 1) for i in range(4)]

    def read() -> EvictionCache:
        cache = model.new_cache(1)
        model(document, cache=cache, logits_to_keep=1)
        cache.end_prompt()
        return cache

    cache = read()
    expected = [answer(model, text, cache.fork()) for text in texts]
    for _ in range(2):
        cache = read()
        jobs = [partial(on_a_fork, model, text, cache) for text in texts[:2]]
        jobs += [partial(answer, model, text, cache.fork()) for text in texts[2:]]
        assert at_once(jobs) == expected
    del jobs
    gc.collect()
    check_pages(cache)


def test_reports_resets_and_garbage_on_the_side() -> None:
    """Others fork, reset, drop and look at caches of the same pools while one answers."""
    model = static("llama", "h2o", budget=40)
    document = tokens(1, 100)
    text = torch.cat([document, tokens(1, 9, seed=1)], 1)
    cache = model.prefill(document)
    expected = answer(model, text, cache.fork())
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            fork = cache.fork()
            answer(model, text, fork, steps=2)
            assert fork.memory().live > 0 and fork.seen == [text.shape[1] + 1]
            fork.positions()
            fork.reset()
            assert fork.memory().leased == fork.memory().live == 0 or fork.states

    def ask() -> Any:
        try:
            return [answer(model, text, cache.fork()) for _ in range(6)]
        finally:
            done.set()

    found = at_once([ask, disturb, disturb])
    assert found == [[expected] * 6, None, None]
    gc.collect()
    check_pages(cache)


@pytest.mark.thorough
@pytest.mark.parametrize("make", [rewritten, static])
def test_a_thousand_answers(make: Any) -> None:
    """Eight threads, each with 125 questions: by turns on a cache of its own and on a fork of one document."""
    model = make("llama", "h2o", budget=40)
    document = tokens(1, 60)
    cache = model.prefill(document)
    texts = [torch.cat([document, tokens(1, 3 + i, seed=i)], 1) for i in range(10)]
    alone = [answer(model, text, steps=5) for text in texts]
    forked = [answer(model, text, cache.fork(), steps=5) for text in texts]

    def many(first: int) -> list[list[int]]:
        found = []
        for i in range(first, first + 125):
            text = texts[i % len(texts)]
            found.append(answer(model, text, cache.fork() if i % 2 else None, steps=5))
        return found

    found = at_once([partial(many, 125 * n) for n in range(8)])
    for n, answers in enumerate(found):
        assert isinstance(answers, list), answers
        assert answers == [(forked if i % 2 else alone)[i % 10] for i in range(125 * n, 125 * n + 125)]
    gc.collect()
    check_pages(cache)


@pytest.mark.gpu
def test_captured_steps_in_threads() -> None:
    """Compiled with captured graphs on a GPU, which is the default of compile() there: caches of their own, and forks."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = rewrite(original("llama"), captured("llama"), "streaming_llm", None, budget=32)
    model.graph_module = model.program.graph = copy.deepcopy(model.graph_module)
    model.to("cuda").compile()
    texts = [tokens(1, 60 + 7 * i, seed=i) for i in range(4)]
    expected = [answer(model, text, steps=40) for text in texts]
    for _ in range(3):
        assert at_once([partial(answer, model, text, steps=40) for text in texts]) == expected
    document = tokens(1, 100).to("cuda")
    cache = model.prefill(document)
    asked = [torch.cat([document, tokens(1, 9 + i, seed=i).to("cuda")], 1) for i in range(4)]
    expected = [answer(model, text, cache.fork(), steps=40) for text in asked]
    for _ in range(3):
        assert at_once([partial(on_a_fork, model, text, cache, steps=40) for text in asked]) == expected


@pytest.mark.parametrize("make", [pytest.param(rewritten, marks=pytest.mark.thorough), static])
def test_eight_threads_with_caches_of_every_kind(tmp_path: Path, make: Any) -> None:
    """Plain ones, pinned ones (whose steps are another graph over the same pools), forks, and loaded files."""
    model = make("llama", "h2o", budget=40)
    texts = [tokens(1, 60 + 5 * i, seed=i) for i in range(8)]
    model.prefill(texts[3][:, :50], pin=(4, 9)).save(tmp_path / "doc")

    def talk(i: int) -> tuple[list[int], Any]:
        if i % 4 == 3:
            cache = kvrewrite.load_cache(model, tmp_path / "doc")
            text = torch.cat([cache.ids(), texts[i][:, :9]], 1)
        else:
            cache, text = model.new_cache(1), texts[i]
        if i % 4 == 1:
            cache.pin(3, 8)
        made = answer(model, text, cache, 8)
        if i % 4 == 2:
            twin = cache.fork()
            twin.drop(0, 5)
            made = answer(model, torch.cat([twin.ids(), texts[0][:, :6]], 1), twin, 8)
            cache = twin
        return made, cache.positions()

    expected = [talk(i) for i in range(8)]
    for _ in range(2):
        assert at_once([partial(talk, i) for i in range(8)]) == expected
