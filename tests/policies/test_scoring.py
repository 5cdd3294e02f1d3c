"""Log-likelihoods and losses: what a forward pass measures under eviction, and a word where that is the full cache's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.rewritten import original, rewritten


def ids(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def model(policy: str, **options: Any) -> Any:
    """One that has said nothing yet."""
    found = copy.deepcopy(rewritten("llama", policy, **options))
    found._told_scores = False  # other tests have the same model
    return found


def perplexity(logits: Tensor, text: Tensor) -> float:
    return float(F.cross_entropy(logits[0, :-1].detach(), text[0, 1:]).exp())


def warned(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found if "full cache" in str(w.message)]


@pytest.mark.parametrize(
    ("policy", "options", "recipe"),
    [
        ("streaming_llm", {"budget": 16}, "chunk=1"),
        ("h2o", {"budget": 16}, "chunk=1"),
        ("kvzap", {"threshold": 0.0, "window": 6}, "chunk=1"),
        ("snapkv", {"budget": 16, "window": 4}, r"score what follows a context on the cache that model\.prefill"),
    ],
)
def test_a_single_pass_says_that_it_scores_the_full_cache(policy: str, options: dict[str, Any], recipe: str) -> None:
    """Once, without a cache (as lm-eval calls it) or with labels; what it says is so."""
    text, small = ids(60), model(policy, **options)
    with pytest.warns(UserWarning, match=rf"{policy} evicts after the logits .*full cache.*{recipe}"):
        logits = small(text).logits
    torch.testing.assert_close(logits, original("llama")(text).logits, rtol=0, atol=1e-4)
    assert warned(lambda: small(text)) == []
    labelled = model(policy, **options)
    cache = labelled.new_cache()
    assert len(warned(lambda: labelled(text, labels=text, cache=cache))) == 1


@pytest.mark.parametrize(
    ("policy", "options", "length"),
    [
        ("full", {}, 60),
        ("h2o", {"budget": 16}, 12),
        ("h2o", {"budget": 16, "chunk": 8}, 60),
        ("attention_gate", {}, 60),
    ],
)
def test_nothing_is_said_where_it_is_not_so(policy: str, options: dict[str, Any], length: int) -> None:
    small = model(policy, **options)
    assert warned(lambda: small(ids(length))) == []


def test_prompts_say_nothing() -> None:
    """Nobody scores a text by the logits of its last column, or of a prompt that goes on."""
    small, text = model("h2o", budget=16), ids(60)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}

    def use() -> None:
        small(text, logits_to_keep=1)
        small.prefill(text)
        small(text, cache=small.new_cache())
        small.generate(text, **settings)

    assert warned(use) == []


@pytest.mark.parametrize(("policy", "options"), [("streaming_llm", {}), ("h2o", {}), ("tova", {}), ("keydiff", {})])
def test_chunks_of_one_token_score_under_eviction(policy: str, options: dict[str, Any]) -> None:
    """The perplexity of one pass with chunk=1 is that of feeding the text token by token, and not the full cache's."""
    text = ids(80)
    small = model(policy, budget=16, chunk=1, **options)
    once = small(text).logits
    cache = small.new_cache()
    steps = torch.cat([small(text[:, at : at + 1], cache=cache).logits for at in range(text.shape[1])], 1)
    torch.testing.assert_close(once, steps, rtol=0, atol=1e-5)
    full = perplexity(original("llama")(text).logits, text)
    assert abs(perplexity(once, text) / full - 1) > 1e-3


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "expected_attention"])
def test_a_continuation_is_scored_on_the_compressed_context(policy: str) -> None:
    """The recipe for policies that evict once: what is fed after `prefill` reads what the eviction left."""
    context, more = ids(80), ids(12, seed=1)
    small = model(policy, budget=16, **({"window": 4} if policy == "snapkv" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = small.prefill(context)
        whole = original("llama")(torch.cat([context, more], 1)).logits[:, -12:]
        got = small(more, cache=cache.fork()).logits
    steps = cache.fork()
    first = small(more[:, :1], cache=steps).logits
    torch.testing.assert_close(got[:, :1], first, rtol=0, atol=1e-5)
    assert (got - whole).abs().max() > 1e-2


def test_loss_is_the_originals() -> None:
    """The mean over labels, -100 left out, divided by what Trainer says if it does."""
    text, labels = ids(40, 2), ids(40, 2)
    labels[:, :7] = -100
    full = rewritten("llama", "full")
    for more in ({}, {"num_items_in_batch": 11}, {"num_items_in_batch": torch.tensor(11)}):
        expected = original("llama")(text, labels=labels, **more).loss
        torch.testing.assert_close(full(text, labels=labels, **more).loss, expected.detach(), rtol=0, atol=1e-5)
    out = full(text, labels=labels)
    assert next(iter(out)) == "loss"
    assert torch.equal(full(text, labels=labels, return_dict=False)[0], out.loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_counts_as_it_does_alone(side: str) -> None:
    text, mask = ids(30, 2), torch.ones(2, 30, dtype=torch.long)
    pads = slice(0, 9) if side == "left" else slice(21, 30)
    real = slice(9, 30) if side == "left" else slice(0, 21)
    mask[1, pads] = 0
    full = rewritten("llama", "full")
    alone = full(text[:1], labels=text[:1]).loss * 29 + full(text[1:, real], labels=text[1:, real]).loss * 20
    together = full(text, attention_mask=mask, labels=text).loss
    torch.testing.assert_close(together, alone / 49, rtol=0, atol=1e-5)
