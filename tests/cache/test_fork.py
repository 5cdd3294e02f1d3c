"""One document, many questions: forks share pages until they write to them, and answer as if they were alone."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.errors import CacheError
from kvrewrite.tools.training.data import Encoder
from tests.cache.test_cache import GREEDY, check_pages, tokens
from tests.support.rewritten import rewritten

pytestmark = pytest.mark.xdist_group("llama")

# In each way that a cache is written to: appended, scores renewed, ranks renewed, pages dealt out anew, states.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("snapkv", {"budget": 90, "window": 8}),
    ("h2o", {"budget": 90}),
    ("streaming_llm", {"budget": 90, "chunk": 40}),
    ("locret", {"budget": 90, "chunk": 40, "stabilizers": 9, "local_tail": 5}),
    ("adakv", {"budget": 90, "window": 8}),
    ("h2o", {"budget": 90, "head_budgets": "adakv"}),
    ("attention_gate", {"chunk": 50}),
    ("sirllm", {"budget": 90, "chunk": 40}),
    ("nacl", {"budget": 90, "interval": 5}),
    ("kvzap", {"threshold": -0.2, "window": 9}),
    ("fast_kvzip", {"budget": 90, "interval": 4}),
    ("duo_attention", {"budget": 90, "heads": "10,01"}),
]


def ask(model: Any, cache: EvictionCache, seed: int) -> tuple[torch.Tensor, Any]:
    """Logits of a question of 9 tokens and 12 generated ones, and what is kept in the end."""
    ids = tokens(2, 9, seed)
    out = [model(ids, past_key_values=cache).logits]
    for t in range(12):
        out.append(model(tokens(2, 1, seed=100 * seed + t), past_key_values=cache).logits)
    return torch.cat(out, dim=1), cache.positions()


@pytest.mark.parametrize(("policy", "options"), CASES)
def test_forks_answer_as_if_alone(policy: str, options: dict[str, Any]) -> None:
    """Questions on forks, side by side, and the parent's own: each as on a cache that nobody shares."""
    model = rewritten("llama", policy, **options)
    document = tokens(2, 150)
    alone = []
    for seed in (1, 2, 3):
        cache = model.new_cache(2)
        model(document, past_key_values=cache)
        cache.end_prompt()
        alone.append(ask(model, cache, seed))
    parent = model.new_cache(2)
    model(document, past_key_values=parent)
    parent.end_prompt()
    before, kept = parent.memory(), parent.positions()
    forks = [parent.fork(), parent.fork()]
    for cache in forks:
        assert cache.positions() == kept and cache.seen == [150, 150]
        assert cache.memory().reserved - sum(s.value.nbytes for s in cache.states) == before.reserved - sum(
            s.value.nbytes for s in parent.states
        )
        assert cache.memory().shared == cache.memory().leased - sum(s.value.nbytes for s in cache.states)
    for seed, cache in zip((1, 2), forks):
        got, positions = ask(model, cache, seed)
        assert torch.equal(got, alone[seed - 1][0]) and positions == alone[seed - 1][1]
        check_pages(parent, *forks)
        assert parent.positions() == kept and parent.memory().live == before.live
    grandchild = forks[0].fork()
    check_pages(parent, *forks, grandchild)
    got, positions = ask(model, parent, 3)
    assert torch.equal(got, alone[2][0]) and positions == alone[2][1]
    check_pages(parent, *forks, grandchild)


def test_what_only_grows_stays_shared() -> None:
    """Without eviction a question copies the last page of each head and nothing else."""
    model = rewritten("llama", "full")
    parent = model.new_cache(1)
    model(tokens(1, 64 * 5 + 10), past_key_values=parent)
    child = parent.fork()
    model(tokens(1, 3, seed=1), past_key_values=child)
    heads = 2 * 2  # layers, kv heads
    page = parent.leases[0].store.page_bytes
    assert child.memory().leased == 6 * heads * page and child.memory().shared == 5 * heads * page
    check_pages(parent, child)


def test_a_fork_that_goes_returns_its_pages() -> None:
    model = rewritten("llama", "h2o", budget=100)
    parent = model.new_cache(1)
    model(tokens(1, 150), past_key_values=parent)
    free = len(parent.leases[0].store.free)
    child = parent.fork()
    for t in range(5):
        model(tokens(1, 1, seed=t), past_key_values=child)
    assert parent.memory().shared == 0
    del child
    gc.collect()
    check_pages(parent)
    assert len(parent.leases[0].store.free) >= free
    twin = parent.fork()
    parent.reset()
    assert twin.memory().leased > 0 and parent.memory().leased == 0
    check_pages(twin)
    model(tokens(1, 3), past_key_values=twin)


def test_copies_are_forks() -> None:
    model = rewritten("llama", "h2o", budget=100)
    parent = model.new_cache(1)
    model(tokens(1, 150), past_key_values=parent)
    kept = parent.positions()
    for duplicate in (copy.copy, copy.deepcopy):
        copied = duplicate(parent)
        assert copied.memory().shared == copied.memory().leased
        model(tokens(1, 3), past_key_values=copied)
        assert parent.positions() == kept != copied.positions()
        check_pages(parent, copied)
        del copied
        gc.collect()
    with pytest.raises(CacheError, match="can't be pickled"):
        pickle.dumps(parent)


def test_prefill_and_generate() -> None:
    """`prefill` once, then `generate` with the whole text and a fork."""
    model = rewritten("llama", "keydiff", budget=40, chunk=16)
    document, question = tokens(1, 90), tokens(1, 7, seed=1)
    cache = model.prefill(document)
    text = torch.cat([document, question], dim=1)
    answers = [model.generate(text, past_key_values=cache.fork(), max_new_tokens=6, **GREEDY) for _ in range(2)]
    assert torch.equal(*answers) and answers[0].shape == (1, 103)
    assert cache.seen == [90]


@pytest.mark.parametrize("policy", ["snapkv", "adakv", "pyramidkv", "nacl", "tova", "locret_q"])
def test_a_missing_question_is_said(policy: str) -> None:
    options: dict[str, Any] = {"budget": 40} if policy != "locret_q" else {"budget": 40, "stabilizers": 3, "start": 4}
    model = rewritten("llama", policy, **options)
    with pytest.warns(UserWarning, match=f"{policy} keeps what the end of the prompt asks for"):
        model.prefill(tokens(1, 60))


def test_prompt_order() -> None:
    context, question = tokens(1, 20), tokens(1, 5, seed=1)
    plain = rewritten("llama", "h2o", budget=12)
    assert plain.prompt_ids(context, question).tolist() == [[*context[0].tolist(), *question[0].tolist()]]
    first = rewritten("llama", "locret_q", budget=40, stabilizers=3, start=4)
    q, c = question[0].tolist(), context[0].tolist()
    assert first.prompt_ids(context, question).tolist() == [[*q, *c, *q]]

    class Tokens:
        eos_token_id = None

        def __init__(self, bos: int):
            self.bos_token_id = bos

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": {"c": c, "q": q, "a": [7]}[text]}

    # Behind a BOS token, where evaluation and training put it.
    for bos, expected in ((c[0], [c[0], *q, *c[1:], *q]), (c[1], [*q, *c, *q])):
        assert first.prompt_ids(context, question, bos_token_id=bos).tolist() == [expected]
        assert plain.prompt_ids(context, question, bos_token_id=bos).tolist() == [[*c, *q]]
        row = Encoder(Tokens(bos), "answer", 100, question_first=True)(
            {"context": "c", "question": "q", "answer": "a"}, 0
        )
        assert row["input_ids"] == [*expected, 7]
    rows = torch.cat([context, context.flip(1)])  # each row by itself
    found = first.prompt_ids(rows, question.expand(2, -1), bos_token_id=c[0]).tolist()
    assert found == [[c[0], *q, *c[1:], *q], [*q, *c[::-1], *q]]
