"""What a vLLM engine deals out in pieces is computed as if each request were alone. Needs no vLLM."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kvrewrite.errors import CacheError
from kvrewrite.runtime.batch import Batch
from kvrewrite.vllm.labels import AXES, Label, answer_delta, prompt_positions, read
from kvrewrite.vllm.requests import Piece, Requests, bytes_at_most
from kvrewrite.vllm.versions import SUPPORTED, why_not
from tests.runtime.test_decoding import static
from tests.runtime.test_invariants import OPTIONS
from tests.support.rewritten import rewritten
from tests.support.zoo import VOCAB

BUDGET, LENGTH = 8, 48
CASES = [
    ("llama", "streaming_llm", {"chunk": 6}),
    ("llama", "h2o", {"chunk": 6, "positions": "original"}),
    ("llama", "tova", {"chunk": 5}),
    ("llama", "snapkv", {}),
    ("llama", "nacl", {}),
    ("llama", "locret", {"chunk": 6}),
    ("llama", "streaming_llm", {"chunk": 6, "budget": 0.5}),
    ("gemma3_text", "h2o", {"chunk": 6}),
    ("phi3", "streaming_llm", {"chunk": 6}),
]


def make(family: str, policy: str, options: dict[str, Any], build: Callable[..., Any] = rewritten) -> Any:
    return build(family, policy, **{"budget": BUDGET, **OPTIONS.get(policy, {}), **options})


@dataclass(eq=False)
class Asked:
    """A request of a client: its prompt, how many tokens it wants, and what it got."""

    number: int
    prompt: list[int]
    count: int
    tokens: list[int] = field(default_factory=list)
    computed: int = 0  # as the scheduler counts: tokens that it dealt out

    @property
    def text(self) -> list[int]:
        return self.prompt + self.tokens


def alone(model: Any, asked: Asked) -> list[int]:
    cache = model.new_cache(1, max_length=LENGTH)
    ids, found = torch.tensor([asked.prompt]), []
    for _ in range(asked.count):
        ids = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(ids))
    return found


def schedule(requests: Requests, wanted: list[Asked], generator: random.Random, most: int, tokens: int) -> None:
    """Deals out pieces as vLLM does: a budget of tokens per step, prompts cut anywhere, some requests preempted."""
    waiting, running = list(wanted), []
    while waiting or running:
        while waiting and len(running) < most:
            running.append(waiting.pop(0))
        left, pieces, served = tokens, [], []
        for asked in running:
            count = min(len(asked.text) - asked.computed, left, generator.randint(1, tokens))
            if not count:
                continue
            at = asked.computed
            prompt = len(asked.prompt) if at < len(asked.prompt) else None
            ids = torch.tensor(asked.text[at : at + count], dtype=torch.int32)
            pieces.append(Piece(asked.number, prompt, at, ids))
            served.append(asked)
            asked.computed, left = at + count, left - count
        logits = requests.step(pieces)
        assert logits.shape == (len(pieces), VOCAB)
        for asked, row in zip(served, logits):
            if asked.computed == len(asked.text):
                asked.tokens.append(int(row.argmax()))
            if len(asked.tokens) == asked.count:
                running.remove(asked)
                requests.end(asked.number)
        if running and generator.random() < 0.08:
            preempted = running.pop()
            preempted.computed = 0
            waiting.insert(0, preempted)


@functools.cache
def expected(family: str, policy: str, options: tuple[tuple[str, Any], ...]) -> tuple[list[Asked], list[list[int]]]:
    generator = random.Random(3)
    lengths = [(31, 5), (1, 6), (13, 1), (37, 4), (6, 7)]
    wanted = [Asked(i, [generator.randrange(2, VOCAB) for _ in range(n)], c) for i, (n, c) in enumerate(lengths)]
    model = make(family, policy, dict(options))
    return wanted, [alone(model, asked) for asked in wanted]


@pytest.mark.parametrize("family, policy, options", CASES)
def test_answers_do_not_depend_on_the_schedule(family: str, policy: str, options: dict[str, Any]) -> None:
    model = make(family, policy, options)
    asked, answers = expected(family, policy, tuple(options.items()))
    for seed, (most, tokens) in enumerate([(3, 7), (5, 32)]):
        requests = Requests(model, length=LENGTH)
        again = [Asked(a.number, a.prompt, a.count) for a in asked]
        schedule(requests, again, random.Random(seed), most, tokens)
        assert [a.tokens for a in again] == answers, (most, tokens)
        assert len(requests) == 0 and requests.batch.used == 0


def test_the_cut_matters_without_the_grid() -> None:
    """What the tests above rule out happens: the same prompt, cut elsewhere, has other logits."""
    model = make("llama", "h2o", {"chunk": 6, "positions": "original"})
    ids = torch.tensor([expected("llama", "h2o", (("chunk", 6), ("positions", "original")))[0][3].prompt])
    whole, cut = model.new_cache(1), model.new_cache(1)
    model(ids[:, :17], past_key_values=cut)
    one = model(ids, past_key_values=whole).logits[0, -1]
    assert not torch.allclose(one, model(ids[:, 17:], past_key_values=cut).logits[0, -1], atol=1e-3)


RAGGED = [
    ("llama", "adakv", {}),
    ("llama", "h2o", {"chunk": 6, "head_budgets": "adakv"}),
    ("llama", "attention_gate", {"chunk": 6}),
    ("llama", "fast_kvzip", {"chunk": 6}),
    ("gemma3_text", "adakv", {}),
]


@pytest.mark.parametrize("family, policy, options", CASES + RAGGED)
def test_memory_of_a_request(family: str, policy: str, options: dict[str, Any]) -> None:
    """As many requests as the memory is said to be for fit, however long their prompts are."""
    model = make(family, policy, options)
    size = bytes_at_most(Batch(model), LENGTH)
    requests = Requests(model, length=LENGTH, memory=3 * size)
    for lengths in ((LENGTH, 33, LENGTH), (1, 2, 1)):
        for number, n in enumerate(lengths):
            requests.step([Piece(number, n, 0, torch.arange(n) % VOCAB)])
        for at in range(LENGTH):
            due = [Piece(i, None, at, torch.tensor([at % VOCAB])) for i, n in enumerate(lengths) if n <= at]
            if due:
                requests.step(due)
    assert 0 < requests.batch.used <= 1


def test_a_request_that_leaves_early() -> None:
    """Aborted in its prompt, before it began, or in its answer; the others go on."""
    model = make("llama", "h2o", {"chunk": 6, "positions": "original"})
    (first, *_), (answer, *_) = expected("llama", "h2o", (("chunk", 6), ("positions", "original")))
    requests = Requests(model, length=LENGTH)
    prompt = torch.tensor(first.prompt)
    requests.step([Piece(7, 30, 0, torch.arange(13)), Piece(0, 31, 0, prompt[:20])])
    requests.end(7)
    requests.end(99)
    assert 7 not in requests and 0 in requests
    row = requests.step([Piece(8, 3, 0, torch.arange(3)), Piece(0, 31, 20, prompt[20:])])[1]
    requests.end(8)
    assert int(row.argmax()) == answer[0]


def test_a_piece_that_does_not_follow() -> None:
    model = make("llama", "streaming_llm", {"chunk": 6})
    requests = Requests(model, length=LENGTH)
    with pytest.raises(CacheError, match="nothing of it came before"):
        requests.step([Piece(0, 20, 5, torch.arange(5))])
    requests.step([Piece(0, 20, 0, torch.arange(5))])
    with pytest.raises(CacheError, match="position 6, but 5 tokens"):
        requests.step([Piece(0, 20, 6, torch.arange(5))])


def test_a_prompt_that_is_not_complete_has_no_logits() -> None:
    model = make("llama", "streaming_llm", {"chunk": 6})
    requests = Requests(model, length=LENGTH)
    assert not requests.step([Piece(0, 20, 0, torch.arange(19))]).any()
    assert requests.step([Piece(0, 20, 19, torch.arange(1))]).any()


def test_static_buffers() -> None:
    """Steps run from static buffers on the pools of the model: first a trial, then as many bytes as vLLM gives."""
    options = {"chunk": 6, "positions": "original"}
    asked, answers = expected("llama", "h2o", tuple(options.items()))
    model = make("llama", "h2o", options, static)
    Requests(model, length=LENGTH).try_out(3)
    requests = Requests(model, length=LENGTH, memory=5 * bytes_at_most(Batch(model), LENGTH))
    again = [Asked(a.number, a.prompt, a.count) for a in asked]
    schedule(requests, again, random.Random(1), 5, 20)
    assert [a.tokens for a in again] == answers
    assert model.decoder is not None and requests.batch.used == 0


@pytest.mark.parametrize("policy, options", [("h2o", {"chunk": 6, "positions": "original"}), ("snapkv", {})])
def test_a_trial_leaves_nothing(policy: str, options: dict[str, Any]) -> None:
    requests = Requests(make("llama", policy, options), length=LENGTH)
    requests.try_out(3)
    assert len(requests) == 0 and requests.batch.used == 0
    Requests(make("llama", policy, options), length=2).try_out(1)


# ---------------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("number", [0, 1, 5, 2**31 - 2])
@pytest.mark.parametrize("prompt", [1, 7, 2**20])
def test_labels_say_whose_a_token_is(number: int, prompt: int) -> None:
    positions = prompt_positions(number, prompt)
    assert positions.shape == (AXES, prompt) and positions.dtype == torch.int64
    for at in {0, prompt // 2, prompt - 1}:
        assert read(*positions[:2, at].tolist()) == Label(number, prompt, at)
    for at in (prompt, prompt + 300):
        counted = int(answer_delta(number) + torch.tensor(at, dtype=torch.int32).numpy())  # as vLLM counts on
        assert read(counted, counted) == Label(number, None, at)


def test_versions() -> None:
    for version in SUPPORTED:
        assert why_not(f"{version}.1") is None and why_not(f"{version}.0.dev3+cpu") is None
    for version in ("0.9.1", "0.23.0", "0.27.1", "0.33.0", "1.0.0"):
        assert f"vLLM {version}, but" in why_not(version)  # type: ignore[operator]
