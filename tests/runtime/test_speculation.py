"""Drafts change how fast an answer comes, never which answer: greedy token by token, sampled in distribution."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

import kvrewrite
from kvrewrite.errors import CacheError, InputError, OptionError
from kvrewrite.runtime import acceptance
from kvrewrite.runtime.speculation import Speculator
from tests.cache.test_cache import GREEDY, check_pages, tokens
from tests.cache.test_rollback import held
from tests.support.rewritten import build, original, rewritten

pytestmark = pytest.mark.xdist_group("llama")
NEW = 25
DRAFTS: list[tuple[str, dict[str, Any]]] = [
    ("snapkv", {"budget": 40, "window": 8}),
    ("adakv", {"budget": 40, "window": 8}),
    ("expected_attention", {"budget": 40}),
    ("h2o", {"budget": 60}),
    ("keydiff", {"budget": 60, "chunk": 32}),
    ("streaming_llm", {"budget": 60, "chunk": 32, "positions": "original"}),
    ("full", {}),
]


def text(length: int = 110) -> Tensor:
    """A text that repeats itself, so that something can be looked up."""
    ids = tokens(1, length)
    ids[:, 60:90] = ids[:, 20:50]
    return ids


@pytest.fixture(scope="module")
def full() -> Any:
    return rewritten("llama", "full")


@pytest.fixture(scope="module")
def answer(full: Any) -> Tensor:
    out: Tensor = full.generate(text(), max_new_tokens=NEW, **GREEDY)
    return out


# -- greedy ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("policy", "options"), DRAFTS)
def test_the_same_tokens(full: Any, answer: Tensor, policy: str, options: dict[str, Any]) -> None:
    speculator = Speculator(full, rewritten("llama", policy, **options), tokens=3)
    assert torch.equal(speculator.generate(text(), max_new_tokens=NEW, **GREEDY), answer)
    last = speculator.last
    assert last.tokens == NEW and last.rounds + last.accepted == NEW - 1 and last.drafted <= 3 * last.rounds
    if policy == "full":  # which drafts what it would say itself
        assert last.acceptance == 1 and last.rounds == -(-(NEW - 1) // 4) and last.tokens_per_round == 4
    else:
        assert last.rounds < NEW - 1, "nothing was ever accepted"


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_tokens(full: Any, answer: Tensor, count: int) -> None:
    draft = rewritten("llama", "snapkv", budget=40, window=8)
    assert torch.equal(Speculator(full, draft, count).generate(text(), max_new_tokens=NEW, **GREEDY), answer)


def test_prompt_lookup(full: Any, answer: Tensor) -> None:
    speculator = Speculator(full, "prompt_lookup")
    assert torch.equal(speculator.generate(text(), max_new_tokens=NEW, **GREEDY), answer)
    assert speculator.last.drafted > 0
    assert torch.equal(full.generate(text(), draft="prompt_lookup", max_new_tokens=NEW, **GREEDY), answer)


def test_a_model_that_evicts_checks_itself(answer: Tensor) -> None:
    """`draft="self"`: with its own budget or another, the answer is the full cache's and not its own."""
    small = rewritten("llama", "snapkv", budget=40, window=8)
    assert not torch.equal(small.generate(text(), max_new_tokens=NEW, **GREEDY), answer)
    for options in ({"draft": "self"}, {"draft": "self", "draft_budget": 30}, {"draft": "prompt_lookup"}):
        assert torch.equal(small.generate(text(), max_new_tokens=NEW, **options, **GREEDY), answer)
    assert small.policy.budget == 40


def test_one_capture_two_programs(answer: Tensor) -> None:
    """Of an original, the model and its draft share the weights; a model with policy full makes its draft when asked."""
    speculator = kvrewrite.speculate(build("llama"), budget=40, window=8)
    assert torch.equal(speculator.generate(text(), max_new_tokens=NEW, **GREEDY), answer)
    weights = [{p.data_ptr() for p in m.parameters()} for m in (speculator.model, speculator.draft)]
    assert weights[1] <= weights[0]
    again = speculator.model.generate(
        text(), draft="self", draft_budget=50, draft_tokens=2, max_new_tokens=NEW, **GREEDY
    )
    assert torch.equal(again, answer)
    with pytest.raises(OptionError, match=r"needs a budget \(draft_budget="):
        speculator.model.generate(text(), draft="self", max_new_tokens=NEW, **GREEDY)


def test_where_it_ends(full: Any, answer: Tensor) -> None:
    """An end in the middle of what was drafted, a length, and a criterion of one's own; the cache has the same tokens."""
    draft = rewritten("llama", "full")
    speculator = Speculator(full, draft, tokens=4)
    for end in (1, 4, 5, 8):
        eos = int(answer[0, 110 + end])
        settings = {**GREEDY, "eos_token_id": eos, "max_new_tokens": NEW}
        expected = full.generate(text(), **settings)
        assert torch.equal(speculator.generate(text(), **settings), expected)
        settings = {**GREEDY, "max_new_tokens": end}
        assert torch.equal(speculator.generate(text(), **settings), answer[:, : 110 + end])

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] == 117)

    cache, alone = full.new_cache(1), full.new_cache(1)
    for own, model in ((cache, speculator), (alone, full)):
        out = model.generate(text(), cache=own, stopping_criteria=[Stop()], max_new_tokens=NEW, **GREEDY)
        assert torch.equal(out, answer[:, :117])
    assert cache.seen == alone.seen == [116] and cache.positions() == alone.positions()
    for a, b in zip(held(cache), held(alone), strict=True):
        torch.testing.assert_close(a, b)
    check_pages(cache)


def test_a_criterion_that_counts(full: Any, answer: Tensor) -> None:
    """It sees what `generate` would show it: no token that was rejected, and none twice."""

    class Third(StoppingCriteria):
        def __init__(self, token: int):
            self.token, self.shown = token, list[int]()

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            self.shown.append(int(input_ids[0, -1]))
            return torch.full((len(input_ids),), self.shown.count(self.token) == 3)

    for token in answer[0, 110:].unique().tolist():
        alone, with_draft = Third(token), Third(token)
        expected = full.generate(text(), stopping_criteria=[alone], max_new_tokens=NEW, **GREEDY)
        speculator = Speculator(full, rewritten("llama", "snapkv", budget=20, window=8), tokens=4)
        out = speculator.generate(text(), stopping_criteria=[with_draft], max_new_tokens=NEW, **GREEDY)
        assert torch.equal(out, expected) and with_draft.shown == alone.shown


def test_a_model_does_not_draft_for_embeddings(full: Any) -> None:
    given = full.get_input_embeddings()(text())
    speculator = Speculator(full, rewritten("llama", "snapkv", budget=20, window=8))
    with pytest.raises(InputError, match='use draft="prompt_lookup"'):
        speculator.generate(inputs_embeds=given, max_new_tokens=4, **GREEDY)
    cache = full.prefill(inputs_embeds=given[:, :100])
    with pytest.raises(InputError, match='use draft="prompt_lookup"'):
        speculator.generate(text(), cache=cache, max_new_tokens=4, **GREEDY)
    expected = full.generate(inputs_embeds=given, max_new_tokens=6, **GREEDY)
    lookup = Speculator(full, "prompt_lookup").generate(inputs_embeds=given, max_new_tokens=6, **GREEDY)
    assert torch.equal(lookup, expected)


def test_embeddings_after_the_small_model_has_had_some() -> None:
    """The view of a model with its full cache has views of its own."""
    small, ids = copy.deepcopy(rewritten("llama", "h2o", budget=16, chunk=4)), tokens(1, 60)
    given = small.get_input_embeddings()(ids)
    small(inputs_embeds=given)
    whole = kvrewrite.speculate(small, "prompt_lookup").model
    expected = original("llama")(ids).logits
    torch.testing.assert_close(whole(inputs_embeds=given).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2, "bad_words_ids": [[5]]}],
)
def test_processors_of_transformers(full: Any, settings: dict[str, Any]) -> None:
    given = {**GREEDY, **settings, "max_new_tokens": NEW}
    draft = rewritten("llama", "snapkv", budget=60, window=8)
    assert torch.equal(Speculator(full, draft, 3).generate(text(), **given), full.generate(text(), **given))


def test_turns_padding_and_streams(full: Any) -> None:
    """A cache that is kept, given the whole text or the new ids alone; a row with padding; what a streamer is told."""

    class Streamer:
        def __init__(self) -> None:
            self.told: list[int] = []

        def put(self, value: Tensor) -> None:
            self.told += value.reshape(-1).tolist()

        def end(self) -> None:
            self.told.append(-1)

    speculator = Speculator(full, rewritten("llama", "snapkv", budget=40, window=8), 3)
    mask = torch.ones(1, 110, dtype=torch.long)
    mask[:, :7] = 0
    cache, alone, streamer = full.new_cache(1), full.new_cache(1), Streamer()
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 9, **GREEDY}
    first = speculator.generate(text(), cache=cache, streamer=streamer, **given)
    assert torch.equal(first, full.generate(text(), cache=alone, **given))
    assert streamer.told == [*first[0].tolist(), -1]
    more = torch.cat([first, tokens(1, 6, seed=3)], 1)
    whole = torch.cat([mask, torch.ones(1, 15, dtype=torch.long)], 1)
    second = speculator.generate(more, cache=cache, attention_mask=whole, max_new_tokens=9, **GREEDY)
    assert torch.equal(second, full.generate(more, cache=alone, attention_mask=whole, max_new_tokens=9, **GREEDY))
    new = torch.cat([second[:, -1:], tokens(1, 5, seed=4)], 1)
    whole = torch.cat([whole, torch.ones(1, cache.columns + 6 - whole.shape[1], dtype=torch.long)], 1)
    third = speculator.generate(new, cache=cache, attention_mask=whole, max_new_tokens=9, **GREEDY)
    assert torch.equal(third, full.generate(new, cache=alone, attention_mask=whole, max_new_tokens=9, **GREEDY))
    assert cache.seen == alone.seen


@pytest.mark.thorough
def test_static_steps_and_compiled_parts(full: Any, answer: Tensor) -> None:
    """The draft runs from static buffers, the model's passes through compiled parts."""
    pair = [copy.deepcopy(m) for m in (full, rewritten("llama", "snapkv", budget=40, window=8))]
    for model in pair:
        model.compile(static_decode=True, backend="eager")
    assert torch.equal(Speculator(*pair, tokens=3).generate(text(), max_new_tokens=NEW, **GREEDY), answer)


# -- transformers' own loops -------------------------------------------------------------------------------------------
def test_assisted_decoding_of_transformers(full: Any, answer: Tensor) -> None:
    """Its prompt lookup, and an assistant on either side, which is cropped between calls."""
    settings: dict[str, Any] = {"max_new_tokens": NEW, **GREEDY}
    assert torch.equal(full.generate(text(), prompt_lookup_num_tokens=3, **settings), answer)
    snap = rewritten("llama", "snapkv", budget=40, window=8)
    assert torch.equal(full.generate(text(), assistant_model=rewritten("llama", "full"), **settings), answer)
    assert torch.equal(full.generate(text(), assistant_model=original("llama"), **settings), answer)
    assert torch.equal(full.generate(text(), assistant_model=snap, **settings), answer)
    with pytest.raises(ValueError, match="not supported with stateful models"):  # it runs drafts with the prompt
        snap.generate(text(), prompt_lookup_num_tokens=3, **settings)


def test_assisted_decoding_of_what_evicts_is_refused() -> None:
    """Rejected tokens would have to be taken out of the cache, and what they evicted put back."""
    small, ids = rewritten("llama", "h2o", budget=40), text()
    for wrong in ({"assistant_model": original("llama")}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="not supported with stateful models, such as RewrittenModel"):
            small.generate(ids, max_new_tokens=8, **GREEDY, **wrong)
    model: Any = original("llama")
    with pytest.raises(CacheError, match="assisted decoding"):
        model.generate(ids, max_new_tokens=8, **GREEDY, assistant_model=small)


# -- sampling ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("drawn", [True, False])
def test_sampled_as_the_model_alone(drawn: bool) -> None:
    """Over many rounds the first two tokens have the model's distribution, whatever the draft's is (5 words)."""
    torch.manual_seed(0)
    words, rounds = 5, 4000
    logits = torch.randn(3, words) * 1.5  # what the model says after any token, for places 0 to 2
    q = (torch.randn(2, words) * 1.5).softmax(-1)
    seen = torch.zeros(words, words)
    for _ in range(rounds):
        drafted = torch.multinomial(q, 1)[:, 0] if drawn else torch.tensor([1, 3])
        accepted, token = acceptance.sampled(drafted, q if drawn else None, logits)
        n = int(accepted)
        out = [*drafted[:n].tolist(), int(token)]
        second = out[1] if len(out) > 1 else int(torch.multinomial(logits[1].softmax(-1), 1))
        seen[out[0], second] += 1
    p = logits.softmax(-1)
    expected = p[0][:, None] * p[1]
    sigma = (expected * (1 - expected) / rounds).sqrt()
    assert ((seen / rounds - expected).abs() < 4.5 * sigma).all()
    kept = (torch.minimum(p[0], q[0]).sum() if drawn else p[0, 1]).item()  # what may stay of a first token
    assert 0 < kept < 1


def test_sampling_with_warpers(full: Any) -> None:
    """A draft equal to the model is always accepted; with top_k=1 sampling is greedy; a seed gives the same text."""
    draft = rewritten("llama", "full")
    speculator = Speculator(full, draft, tokens=3)
    settings: dict[str, Any] = {**GREEDY, "max_new_tokens": NEW, "do_sample": True, "temperature": 0.8}
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(speculator.generate(text(), **settings))
        assert speculator.last.acceptance > 0.99
    assert torch.equal(*found)
    greedy = full.generate(text(), max_new_tokens=NEW, **GREEDY)
    small = Speculator(full, rewritten("llama", "snapkv", budget=40, window=8), 3)
    for each in (small, Speculator(full, "prompt_lookup")):
        assert torch.equal(each.generate(text(), **{**settings, "top_k": 1}), greedy)


# -- refused -----------------------------------------------------------------------------------------------------------
def test_what_a_draft_can_not_do(full: Any) -> None:
    class Own(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores

    draft = rewritten("llama", "snapkv", budget=40, window=8)
    speculator = Speculator(full, draft)
    settings: dict[str, Any] = {"max_new_tokens": 4, **GREEDY}
    with pytest.raises(InputError, match=r"one text at a time.* got 2 rows"):
        speculator.generate(tokens(2, 50), **settings)
    for name, value in (("num_beams", 2), ("num_return_sequences", 2), ("output_scores", True)):
        with pytest.raises(InputError, match=f"{name}={value} does not go together"):
            speculator.generate(text(), **settings, **{name: value})
    with pytest.raises(InputError, match="processor Own may remember"):
        speculator.generate(text(), logits_processor=[Own()], **settings)
    with pytest.raises(CacheError, match=r"h2o can't be helped by a draft.*it evicts while it generates"):
        Speculator(rewritten("llama", "h2o", budget=40), draft).generate(text(), **settings)
    with pytest.raises(CacheError, match=r"streaming_llm can't draft.*ranks cached keys anew"):
        Speculator(full, rewritten("llama", "streaming_llm", budget=40, chunk=16)).generate(text(), **settings)
    with pytest.raises(OptionError, match="tokens is 0"):
        Speculator(full, draft, 0)
    with pytest.raises(OptionError, match="draft is 'medusa'"):
        full.generate(text(), draft="medusa", **settings)
    with pytest.raises(OptionError, match="loaded from a directory"):
        full.generate(text(), draft="self", draft_budget=40, **settings)
    with pytest.raises(OptionError, match='those of draft="self"'):
        full.generate(text(), draft="prompt_lookup", draft_budget=4, **settings)
    with pytest.raises(OptionError, match="evicts by snapkv and drafts by that"):
        draft.generate(text(), draft="self", draft_policy="h2o", **settings)
    with pytest.raises(OptionError, match=r"attention_gate has no full cache.*the text decides"):
        rewritten("llama", "attention_gate", chunk=16).generate(text(), draft="self", **settings)
    other: Any = SimpleNamespace(program=SimpleNamespace(vocab_size=5))
    with pytest.raises(OptionError, match=r"vocabulary of .* tokens and the model one of"):
        Speculator(full, other)


# -- layers with a window ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "draft"), [("mistral", "prompt_lookup"), ("gemma2", "snapkv")])
def test_windows_shorter_than_the_text(family: str, draft: str) -> None:
    """Rejected tokens bring back what has just left a window of 8 tokens: it is held until the answer is there."""
    windowed = rewritten(family, "full")
    cache, alone, ids = windowed.new_cache(1), windowed.new_cache(1), text()
    expected = windowed.generate(ids, cache=alone, max_new_tokens=NEW, **GREEDY)
    speculator = Speculator(
        windowed, draft if draft == "prompt_lookup" else rewritten(family, draft, budget=12, window=4), 3
    )
    out = speculator.generate(ids, cache=cache, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(out, expected) and speculator.last.accepted < speculator.last.drafted
    assert cache.windows_from is None
    more = tokens(1, 1, seed=5)  # the windows take what they left
    assert cache.columns == alone.columns
    torch.testing.assert_close(windowed(more, cache=cache).logits, windowed(more, cache=alone).logits)
    windowed(more, cache=cache), windowed(more, cache=alone)
    assert [lease.bound.tolist() for lease in cache.leases] == [lease.bound.tolist() for lease in alone.leases]
    assert cache.positions() == alone.positions()
    check_pages(cache)
