"""Driven by transformers' own generate: what users of ordinary models do with it works, or is refused clearly."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
)

from kvrewrite.errors import CacheError, InputError
from tests.support.rewritten import original, rewritten
from tests.support.tiny import make_checkpoint

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (rows, length), generator=generator)


def padded(prompt: Tensor, row: int, count: int) -> Tensor:
    mask = torch.ones_like(prompt)
    mask[row, :count] = 0
    return mask


@pytest.fixture(scope="module")
def full() -> Any:
    return rewritten("llama", "full")


def test_greedy_with_left_padding_is_the_originals(full: Any) -> None:
    prompt = ids(2, 20)
    mask = padded(prompt, 1, 7)
    expected = original("llama").generate(prompt, attention_mask=mask, max_new_tokens=12, **GREEDY)  # type: ignore[operator]
    assert torch.equal(full.generate(prompt, attention_mask=mask, max_new_tokens=12, **GREEDY), expected)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 12}, {"num_return_sequences": 2}])
@pytest.mark.parametrize("policy", ["full", "h2o"])
def test_padding_on_the_right_or_in_between(policy: str, settings: dict[str, Any]) -> None:
    """Each row's answer is the one that it has alone, and so are further turns."""
    model = rewritten("llama", policy, **({} if policy == "full" else {"budget": 16}))
    if "num_return_sequences" in settings:
        settings = {**settings, "num_beams": 2}
    prompt, mask = ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, 13:], mask[1, 4:9], mask[1, 18:], mask[2, :6] = 0, 0, 0, 0
    made = model.generate(prompt, attention_mask=mask, max_new_tokens=6, **GREEDY, **settings)
    each = settings.get("num_return_sequences", 1)
    for row in range(3):
        alone = prompt[row : row + 1, mask[row].bool()]
        expected = model.generate(alone, max_new_tokens=6, **GREEDY, **settings)
        assert made[row * each : row * each + each, 20:].tolist() == expected[:, alone.shape[1] :].tolist()


def test_rows_without_a_last_token(full: Any) -> None:
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 9:] = 0
    with pytest.raises(
        InputError, match="row 1 has 11 columns of padding on the right, and prefill_chunk_size=15 cuts"
    ):
        full.generate(ids(2, 20), attention_mask=mask, prefill_chunk_size=15, max_new_tokens=2, **GREEDY)
    mask[1] = 0
    with pytest.raises(InputError, match="row 1 has no token among the 20 new columns"):
        full.generate(ids(2, 20), attention_mask=mask, max_new_tokens=2, **GREEDY)
    cache = full.prefill(ids(2, 20))
    longer = torch.cat([torch.ones(2, 20, dtype=torch.long), mask[:, :5]], 1)
    with pytest.raises(InputError, match="row 1 has no token among the 5 new columns"):
        full.generate(ids(2, 5), attention_mask=longer, cache=cache, max_new_tokens=2, **GREEDY)
    assert cache.columns == 20


def test_nothing_stands_in_the_way_of_generate(full: Any) -> None:
    """What a model keeps has no name of a method of transformers' (5.17 has a `_prefill`)."""
    assert [n for n in vars(full) if hasattr(GenerationMixin, n) or n == "_prefill"] == []


def test_beam_search_is_the_originals(full: Any) -> None:
    prompt = ids(2, 11)
    settings = {
        **GREEDY,
        "num_beams": 3,
        "num_return_sequences": 2,
        "max_new_tokens": 9,
        "attention_mask": prompt * 0 + 1,
    }
    expected = original("llama").generate(prompt, **settings)  # type: ignore[operator]
    assert torch.equal(full.generate(prompt, **settings), expected)


def test_sampling_is_the_originals_with_the_same_seed(full: Any) -> None:
    prompt = ids(1, 9)
    settings = {
        **GREEDY,
        "do_sample": True,
        "top_k": 20,
        "temperature": 0.8,
        "num_return_sequences": 3,
        "max_new_tokens": 8,
    }
    settings["attention_mask"] = prompt * 0 + 1
    outs = []
    for model in (original("llama"), full):
        torch.manual_seed(3)
        outs.append(model.generate(prompt, **settings))  # type: ignore[operator]
    assert torch.equal(*outs)


def test_logits_processors_and_stopping_criteria(full: Any) -> None:
    class Only(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores = scores.clone()
            scores[:, 42] = 1e9
            return scores

    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 13)

    out = full.generate(
        ids(1, 10),
        attention_mask=torch.ones(1, 10, dtype=torch.long),
        max_new_tokens=50,
        logits_processor=LogitsProcessorList([Only()]),
        stopping_criteria=StoppingCriteriaList([AfterThree()]),
        **GREEDY,
    )
    assert out[0, 10:].tolist() == [42, 42, 42]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache(full: Any, name: str) -> None:
    """Whatever this version of transformers calls it, and without its warning."""
    cache = full.new_cache(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        out = full.generate(ids(1, 12), **{name: cache}, max_new_tokens=3, **GREEDY)
        full(out[:, -1:], **{name: cache})
    assert cache.seen == [15]
    with pytest.raises(InputError, match="both cache and past_key_values"):
        full.generate(ids(1, 12), cache=cache, past_key_values=cache, **GREEDY)


def test_prompts_chunked_by_generate(full: Any) -> None:
    prompt = ids(1, 23)
    settings = {**GREEDY, "max_new_tokens": 6, "attention_mask": prompt * 0 + 1}
    assert torch.equal(full.generate(prompt, prefill_chunk_size=5, **settings), full.generate(prompt, **settings))


@pytest.mark.parametrize("policy", ["full", "streaming_llm", "h2o"])
def test_turns_on_one_cache(policy: str) -> None:
    """Each turn sees what the cache kept of the ones before; with everything kept that is the whole conversation."""
    model = rewritten("llama", policy, **({} if policy == "full" else {"budget": 16}))
    cache = model.new_cache(1)
    first = model.generate(ids(1, 12), past_key_values=cache, max_new_tokens=5, **GREEDY)
    assert cache.seen == [16]  # the last token of an answer has not been fed back yet
    text = torch.cat([first, ids(1, 7, seed=1)], 1)
    second = model.generate(text, attention_mask=text * 0 + 1, past_key_values=cache, max_new_tokens=5, **GREEDY)
    assert cache.seen == [text.shape[1] + 4]
    if policy == "full":
        whole = original("llama").generate(text, attention_mask=text * 0 + 1, max_new_tokens=5, **GREEDY)  # type: ignore[operator]
        assert torch.equal(second, whole)
    else:
        assert max(int(n.max()) for n in cache.live_slots().values()) == 16


def test_pipeline_and_streamer(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import kvrewrite

    path = make_checkpoint(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path)
    small = kvrewrite.transform(model, "full")
    texts = ["The quick brown fox", "She sells"]
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = pipeline("text-generation", model=model, tokenizer=tokenizer)(texts, batch_size=2, **settings)
    assert pipeline("text-generation", model=small, tokenizer=tokenizer)(texts, batch_size=2, **settings) == expected
    tokens = tokenizer(texts[:1], return_tensors="pt", return_token_type_ids=False)
    printed = io.StringIO()
    with redirect_stdout(printed):
        out = small.generate(**tokens, streamer=TextStreamer(tokenizer), **settings)
    assert tokenizer.decode(out[0]).strip() == printed.getvalue().strip()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 2}, "not supported with stateful models"),
    ],
)
def test_what_generate_can_not_do_here(full: Any, settings: dict[str, Any], message: str) -> None:
    model = rewritten("llama", "h2o", budget=16) if "prompt_lookup_num_tokens" in settings else full
    with pytest.raises((CacheError, ValueError), match=message):
        model.generate(ids(1, 8), max_new_tokens=4, **GREEDY, **settings)


class TestBadInput:
    """Each error names what was got and what was expected."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"input_ids": torch.tensor([[1, 97]])}, "reach from 1 to 97, expected 0 to 96"),
            ({"input_ids": torch.tensor([[-1, 3]])}, "reach from -1 to 3"),
            ({"input_ids": torch.tensor([1, 3])}, r"shape \(2,\)"),
            ({"input_ids": torch.tensor([[1.0, 3.0]])}, "dtype torch.float32"),
            ({}, "got nothing"),
            ({"input_ids": ids(1, 4), "attention_mask": torch.ones(1, 9)}, r"shape \(1, 9\), expected \(1, 4\)"),
            ({"input_ids": ids(1, 4), "position_ids": torch.tensor([[3, 4, 5, 6]])}, "leave position_ids out"),
            ({"input_ids": ids(1, 4), "output_attentions": True}, "output_attentions is not supported"),
        ],
    )
    def test_inputs(self, full: Any, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            full(**arguments)

    def test_nothing_is_lost_by_a_refused_call(self, full: Any) -> None:
        cache = full.new_cache(1)
        full(ids(1, 6), past_key_values=cache)
        before = cache.positions()
        with pytest.raises(InputError):
            full(torch.tensor([[500]]), past_key_values=cache)
        assert cache.positions() == before and cache.seen == [6]

    def test_capacity_of_full(self) -> None:
        model = rewritten("llama", "full", budget=10)
        cache = model.new_cache(1)
        model(ids(1, 9), past_key_values=cache)
        model(ids(1, 1), past_key_values=cache)
        with pytest.raises(CacheError, match="would hold 11 tokens"):
            model(ids(1, 1), past_key_values=cache)

    def test_learned_positions_end(self) -> None:
        model = rewritten("NanoGPT", "full")
        limit = model.program.max_positions
        assert limit is not None
        with pytest.raises(InputError, match=f"has {limit} positions"):
            model(ids(1, limit + 1))
        assert model(ids(1, limit)).logits.shape[1] == limit

    def test_dtype_is_part_of_the_graph(self, full: Any) -> None:
        with pytest.raises(InputError, match=r"can't become torch\.bfloat16"):
            full.to(torch.bfloat16)
