"""What the host does for each token of `generate`: it waits for nothing, and plans a token behind the step before it."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from kvrewrite.errors import CacheError, InputError
from tests.runtime.test_decoding import same, static, tokens
from tests.support.rewritten import rewritten

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
LOCRET: dict[str, Any] = {"budget": 16, "chunk": 8, "stabilizers": 4, "local_tail": 3}
# What brings a value of a tensor to the host.
WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts, by method and place, how often this project's host code looks at a tensor. The reference kernels do not count:
    other code runs on a GPU."""
    found: Counter[str] = Counter()

    def count(name: str) -> None:
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            module = caller.f_globals.get("__name__", "")
            if module.startswith("kvrewrite.") and not module.startswith("kvrewrite.kernels"):
                found[f"{name} at {module}:{caller.f_lineno}"] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)

    for name in WAITS:
        count(name)
    return found


@pytest.mark.parametrize("kind", [rewritten, static])
@pytest.mark.parametrize(
    ("policy", "options"),
    [("h2o", {"budget": 16}), ("locret", LOCRET), ("adakv", {"budget": 16, "window": 6, "kernel": 3})],
)
def test_no_wait_a_token(kind: Any, policy: str, options: dict[str, Any], waits: Counter[str]) -> None:
    """Four more tokens look at no tensor more, with padded rows and a mask."""
    model = kind("llama", policy, **options)
    ids, mask = tokens()[:, :30], torch.ones(2, 30, dtype=torch.long)
    mask[1, :5] = 0
    counts = []
    model.generate(ids, attention_mask=mask, max_new_tokens=4, **GREEDY)  # makes the buffers
    for length in (4, 8):
        waits.clear()
        model.generate(ids, attention_mask=mask, max_new_tokens=length, **GREEDY)
        counts.append(Counter(waits))
    assert counts[0] == counts[1] and sum(counts[0].values()) > 0


@pytest.mark.parametrize(
    "settings",
    [
        {**GREEDY},
        {**GREEDY, "do_sample": True, "top_k": 20, "num_return_sequences": 2},
        {**GREEDY, "num_beams": 3},
        {**GREEDY, "repetition_penalty": 1.3, "return_dict_in_generate": True, "output_scores": True},
    ],
    ids=["greedy", "sampling", "beams", "processors"],
)
def test_generate_is_the_plain_one(settings: dict[str, Any]) -> None:
    """The same tokens as without static buffers, across a border of pages."""
    options = {"budget": 70, "chunk": 30}
    outs = []
    for model in (rewritten("llama", "streaming_llm", **options), static("llama", "streaming_llm", **options)):
        torch.manual_seed(1)
        mask = torch.ones(2, 60, dtype=torch.long)
        mask[0, :7] = 0
        out = model.generate(tokens()[:, :60], attention_mask=mask, max_new_tokens=20, **settings)
        outs.append(out if isinstance(out, Tensor) else out.sequences)
    assert torch.equal(*outs)


def planned(model: Any, cache: Any) -> bool:
    """Whether the next token of a cache is planned already."""
    return bool(model.decoder.has_planned(tokens(cache.batch_size)[:, :1], cache))


def test_tokens_are_planned_ahead() -> None:
    """All but the first of a request and those that need another page."""
    model = static("llama", "full", budget=500)
    cache = model.new_cache(2)
    ids = torch.cat([tokens()] * 2, 1)
    model(ids[:, :40], past_key_values=cache)
    ahead = []
    for t in range(40, 140):
        ahead.append(planned(model, cache))
        model(ids[:, t : t + 1], past_key_values=cache)
    assert [t + 40 for t, is_ahead in enumerate(ahead) if not is_ahead] == [40, 64, 128]


def test_plans_are_dropped() -> None:
    """Whatever happens to a cache between two tokens, the second is not run by the plan for another state."""
    options = {"budget": 16, "chunk": 8}
    plain, ours = rewritten("llama", "streaming_llm", **options), static("llama", "streaming_llm", **options)
    ids = tokens()
    caches = [m.new_cache(2) for m in (plain, ours)]

    def run(at: int, width: int = 1) -> None:
        part = ids[:, at : at + width]
        expected, got = [m(part, past_key_values=c).logits for m, c in zip((plain, ours), caches)]
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)

    run(0, 30)
    run(30)
    assert planned(ours, caches[1])
    for cache in caches:
        cache.reorder_cache(torch.tensor([1, 1]))
    assert not planned(ours, caches[1])
    run(31)
    forks = [cache.fork() for cache in caches]
    assert not planned(ours, caches[1])
    run(32)
    run(33)
    assert planned(ours, caches[1])
    caches[1].live_slots()
    assert not planned(ours, caches[1])
    run(34)
    run(35, 3)
    assert not planned(ours, caches[1])
    run(38)
    same(*caches)
    same(*forks)
    run(39)
    run(40)
    assert planned(ours, caches[1])
    caches[1].reset()
    assert not planned(ours, caches[1])


def test_a_planned_token_is_checked() -> None:
    """No room and wrong ids are refused as before; where there is no room nothing is planned."""
    model = static("llama", "full", budget=40)
    cache = model.new_cache(2)
    model(tokens()[:, :37], past_key_values=cache)
    model(tokens()[:, 37:38], past_key_values=cache)
    assert planned(model, cache)
    with pytest.raises(InputError, match="token ids reach"):
        model(torch.full((2, 1), 500), past_key_values=cache)
    model(tokens()[:, 38:39], past_key_values=cache)
    model(tokens()[:, 39:40], past_key_values=cache)
    assert not planned(model, cache)
    with pytest.raises(CacheError, match="would hold 41 tokens"):
        model(tokens()[:, 40:41], past_key_values=cache)
    assert cache.seen == [40, 40]
