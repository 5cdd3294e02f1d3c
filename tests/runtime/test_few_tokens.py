"""A few tokens from the buffers of a decode step: as the same tokens op by op, and refused to what may lose slots."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from kvrewrite.runtime import few_graph
from kvrewrite.runtime.speculation import Speculator, full_cache
from tests.cache.test_cache import GREEDY, tokens
from tests.cache.test_rollback import counters, held
from tests.support.rewritten import rewritten

pytestmark = pytest.mark.xdist_group("llama")
CASES: list[Any] = [
    ("h2o", {"budget": 40}),
    *(
        pytest.param(*case, marks=pytest.mark.thorough)
        for case in (("full", {}), ("adakv", {"budget": 40, "window": 8}), ("keydiff", {"budget": 40, "chunk": 16}))
    ),
]


def static(policy: str, **options: Any) -> Any:
    """A copy whose tokens run from static buffers; its parts run as they are, which takes torch.compile no time."""
    model = copy.deepcopy(rewritten("llama", policy, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda part, **_: part)
        model.compile(static_decode=True)
    return model


@pytest.mark.parametrize(("policy", "options"), CASES)
def test_as_op_by_op(policy: str, options: dict[str, Any]) -> None:
    """Rounds of several and of single tokens, of which some are taken back: the same logits and the same cache."""
    plain, fast = rewritten("llama", policy, **options), static(policy, **options)
    caches = []
    for model in (plain, fast):
        cache = model.new_cache(2)
        model(tokens(2, 90), cache=cache, logits_to_keep=1)
        cache.end_prompt()
        cache.append_only()
        caches.append(cache)
    for seed, (count, back, keep) in enumerate([(3, 2, 0), (1, 0, 1), (8, 5, 2), (2, 0, 0), (5, 5, 1), (9, 1, 3)]):
        new = tokens(2, count, seed=seed)
        found = [
            model(new, cache=cache, generated=True, logits_to_keep=keep).logits
            for model, cache in zip((plain, fast), caches, strict=True)
        ]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        for cache in caches:
            cache.crop(-back)
    assert counters(caches[0]) == counters(caches[1])
    for a, b in zip(*map(held, caches), strict=True):
        if a.dtype != torch.float32 or a.dim() > 1:  # scores don't matter any more
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    step = fast.decoder._steps[2]
    assert sorted(step.few) == [2, 4, 8], "they ran in another way"


def test_what_goes_another_way() -> None:
    """Prompts, padded rows, and caches that may still lose slots."""
    fast = static("h2o", budget=40)
    cache = fast.new_cache(2)
    fast(tokens(2, 90), cache=cache)
    fast(tokens(2, 4), cache=cache, generated=True)  # evicts
    cache.append_only()
    fast(tokens(2, 4), cache=cache)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    fast(tokens(2, 3), attention_mask=mask, cache=cache, generated=True)
    assert not any(step.few for step in fast.decoder._steps.values())
    program, policy, graph = fast.program, fast.policy, fast.graph_module
    assert few_graph.why_not(program, policy, graph) is None
    windowed = rewritten("mistral", "full")
    why = few_graph.why_not(windowed.program, windowed.policy, windowed.graph_module)
    assert why == "layers with a window lose what no later token sees"
    ranks = rewritten("llama", "streaming_llm", budget=40)
    assert "contiguous" in str(few_graph.why_not(ranks.program, ranks.policy, ranks.graph_module))


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["snapkv", "adakv"])
def test_a_model_that_evicts_checks_itself(policy: str) -> None:
    """Drafts by the small cache, checks by the view with the full one: each from buffers of its own."""
    ids = tokens(1, 110)
    expected = rewritten("llama", "full").generate(ids, max_new_tokens=12, **GREEDY)
    small = static(policy, budget=40, window=8)
    whole = full_cache(small)
    speculator = Speculator(whole, small, 3)
    assert torch.equal(speculator.generate(ids, max_new_tokens=12, **GREEDY), expected)
    assert whole.decoder._steps[1].few


@pytest.mark.thorough
def test_windows_that_keep_everything() -> None:
    """The view whose windows take nothing has passes of a few tokens; the model itself has none."""
    windowed = copy.deepcopy(rewritten("gemma2", "full"))
    ids = tokens(1, 90)
    expected = windowed.generate(ids, max_new_tokens=12, **GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda part, **_: part)
        windowed.compile(static_decode=True)
        speculator = Speculator(windowed, rewritten("gemma2", "snapkv", budget=12, window=4), 3)
        assert torch.equal(speculator.generate(ids, max_new_tokens=12, **GREEDY), expected)
    assert windowed.decoder.few is None and windowed.keeping_windows().decoder._steps[1].few
