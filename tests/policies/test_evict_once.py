"""Policies that evict once need a row's first prompt whole: pieces of one are refused, further prompts are added as ever."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from kvrewrite.cache.eviction_cache import CACHE_NAME
from kvrewrite.errors import CacheError, InputError
from tests.support.products import few
from tests.support.rewritten import build, ours, rewritten

OPTIONS: dict[str, dict[str, Any]] = {p: {"window": 4} for p in ("snapkv", "adakv", "criticalkv")}
# Those whose kind the others stand for are thorough.
LIKE_OTHERS = ("compactor", "criticalkv", "finch", "lagkv", "leverage", "non_causal_attn")
NAMES = [p.name for p in ours() if p.whole_prompt]
ONCE = few(NAMES, rest=LIKE_OTHERS)
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 4}


def ids(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def small(policy: str) -> Any:
    return rewritten("llama", policy, budget=48, **OPTIONS.get(policy, {}))


def held(cache: Any) -> int:
    return max(int(lens.max()) for lens in cache.live_slots().values())


def test_every_policy_that_evicts_once_is_here() -> None:
    assert {"snapkv", "pyramidkv", "adakv", "expected_attention", "nacl"} <= {p.name for p in ours() if p.whole_prompt}


@pytest.mark.parametrize("policy", ONCE)
def test_pieces_of_a_prompt_are_refused(policy: str) -> None:
    """By `generate`, before anything has run, and in a loop of calls, whether or not the first piece is beyond the budget."""
    model, cache = small(policy), small(policy).new_cache()
    with pytest.raises(CacheError, match=r"prefill_chunk_size=100 would cut the prompt of 300 tokens.*Leave"):
        model.generate(ids(300), cache=cache, prefill_chunk_size=100, **GREEDY)
    assert cache.seen == [0]
    for piece in (100, 30):
        cache = model.new_cache()
        with pytest.raises(CacheError, match=rf"after {piece}, before any token.*in one call.*prefill.*end_prompt"):
            for at in range(0, 300, piece):
                model(ids(300)[:, at : at + piece], cache=cache)
        assert cache.seen == [piece]


@pytest.mark.parametrize(
    "policy", ["snapkv", *(pytest.param(p, marks=pytest.mark.thorough) for p in NAMES if p != "snapkv")]
)
def test_the_backend_refuses_them_too(policy: str) -> None:
    if policy in ("pyramidkv", "adakv", "kvzip"):
        pytest.skip("a DynamicCache can't hold what they keep")
    options = {"policy": policy, "budget": 48, "inductor": False, **OPTIONS.get(policy, {})}
    model = torch.compile(build("shallow_llama"), backend="kvrewrite", options=options)  # type: ignore[call-overload]
    with pytest.raises(CacheError, match="before any token was generated"):
        model.generate(ids(300), prefill_chunk_size=100, **GREEDY)


@pytest.mark.parametrize("policy", ONCE)
def test_pieces_within_the_budget_are_the_whole(policy: str) -> None:
    """Nothing goes, so nothing is wrong."""
    model, whole, pieces = small(policy), small(policy).new_cache(), small(policy).new_cache()
    expected = model(ids(40), cache=whole).logits
    got = [model(ids(40)[:, at : at + 20], cache=pieces).logits for at in (0, 20)]
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-5)
    assert pieces.positions() == whole.positions()


@pytest.mark.parametrize("policy", ONCE)
def test_further_prompts_are_added(policy: str) -> None:
    """After `prefill`, on forks, after an answer of a single token or more, and where the caller says so."""
    model = small(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where the policy wants the question in the prompt
        first = model.prefill(ids(100))
    one, said, longer = model.new_cache(), model.new_cache(), model.new_cache()
    text = model.generate(ids(100), cache=one, **{**GREEDY, "max_new_tokens": 1})
    model(ids(100), cache=said)
    said.end_prompt()
    answered = model.generate(ids(100), cache=longer, **GREEDY)
    before = held(said)
    for cache in (first.fork(), first, said):
        for seed in (1, 2):
            model(ids(30, seed=seed), cache=cache)
        assert held(cache) == before + 60 and cache.seen == [160]
    for cache, turn in ((one, text), (longer, answered)):
        question = torch.cat([turn, ids(30, seed=1)], 1)
        if (
            CACHE_NAME == "past_key_values"
        ):  # in these versions transformers' chunks begin at position 0 whatever is cached
            with pytest.raises(InputError, match="positions are counted by the cache"):
                model.generate(question, cache=cache, prefill_chunk_size=10, **GREEDY)
            continue
        model.generate(question, cache=cache, prefill_chunk_size=10, **GREEDY)
        assert cache.seen == [question.shape[1] + 3]


def test_rows_by_themselves() -> None:
    """A row whose prompt is complete takes more; one whose first prompt comes later may still be cut by nobody."""
    model, cache = small("snapkv"), small("snapkv").new_cache(2)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1] = 0
    model(ids(60, 2), attention_mask=mask, cache=cache)
    cache.end_prompt()
    model(ids(30, 2, 1), cache=cache)
    with pytest.raises(CacheError, match="row 1 gets 30 more tokens of a prompt after 30"):
        model(ids(30, 2, 2), cache=cache)


def test_other_policies_take_pieces() -> None:
    """h2o evicts after each of them: its budget holds."""
    model = rewritten("llama", "h2o", budget=48)
    cache = model.new_cache()
    model.generate(ids(300), cache=cache, prefill_chunk_size=100, **GREEDY)
    assert held(cache) == 48
