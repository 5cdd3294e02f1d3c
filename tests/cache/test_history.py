"""What comes later is compared with what went through a cache: masks, texts, and rows that pause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvrewrite.cache.eviction_cache import CACHE_NAME, EvictionCache
from kvrewrite.errors import InputError
from tests.cache.test_cache import GREEDY, tokens
from tests.runtime.test_decoding import static
from tests.support.products import each
from tests.support.rewritten import logits, original, rewritten

pytestmark = pytest.mark.xdist_group("llama")


@pytest.fixture(scope="module")
def full() -> Any:
    return rewritten("llama", "full")


def ones(*parts: Tensor) -> Tensor:
    return torch.ones(parts[0].shape[0], sum(p.shape[1] for p in parts), dtype=torch.long)


# ------------------------------------------------------------------------------------------------ masks
def test_the_past_of_a_mask_is_what_went_in(full: Any) -> None:
    """Tokens that are in the cache can't be hidden, padding can't become real, and nothing is lost by asking for it."""
    prompt, new = tokens(2, 10), tokens(2, 3, seed=1)
    cache, mask = full.new_cache(2), ones(prompt)
    mask[1, :4] = 0
    full(prompt, attention_mask=mask, cache=cache)
    for row, column, message in (
        (0, 5, "is 0 for row 0 at column 5, expected 1: that token went into the cache"),
        (1, 2, "is 1 for row 1 at column 2, expected 0: that column was padding"),
    ):
        wrong = torch.cat([mask, ones(new)], 1)
        wrong[row, column] ^= 1
        for width in (3, 1):
            with pytest.raises(InputError, match=message):
                full(new[:, :width], attention_mask=wrong[:, : 10 + width], cache=cache)
    right = torch.cat([mask, ones(new)], 1)
    got = full(new, attention_mask=right, cache=cache).logits
    for row, begin in ((0, 0), (1, 4)):
        alone = torch.cat([prompt[row : row + 1, begin:], new[row : row + 1]], 1)
        torch.testing.assert_close(got[row], logits(original("llama"), alone)[0, -3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("policy", "options"),
    [("full", {}), ("streaming_llm", {"budget": 12, "chunk": 5}), ("h2o", {"budget": 12, "chunk": 5})],
)
def test_padding_anywhere(policy: str, options: dict[str, Any]) -> None:
    """A mask with holes: each row is its real tokens, whatever lies between them; logits come where the tokens are."""
    model = rewritten("llama", policy, **options)
    ids, mask = tokens(3, 30), torch.ones(3, 30, dtype=torch.long)
    mask[0, [2, 3, 9, 28]], mask[1, 10:25], mask[2, :7], mask[2, 29] = 0, 0, 0, 0
    cache = model.new_cache(3)
    got = model(ids, attention_mask=mask, cache=cache).logits
    last = model(ids, attention_mask=mask, logits_to_keep=6).logits
    for row in range(3):
        real = mask[row].bool()
        expected = model(ids[row : row + 1, real]).logits[0]
        torch.testing.assert_close(got[row, real], expected, rtol=0, atol=2e-5)
        assert not got[row, ~real].any()
        torch.testing.assert_close(last[row], got[row, -6:], rtol=0, atol=2e-5)
    assert cache.seen == mask.sum(1).tolist()


# ------------------------------------------------------------------------------------------------ ids
@pytest.mark.parametrize("make", [rewritten, static])
def test_a_text_must_go_on_from_what_is_held(make: Any) -> None:
    model = make("llama", "h2o", budget=16)
    prompt, more = tokens(2, 12), tokens(2, 7, seed=1)
    mask = ones(prompt)
    mask[1, :3] = 0
    cache = model.new_cache(2)
    first = model.generate(prompt, attention_mask=mask, cache=cache, max_new_tokens=6, **GREEDY)
    assert torch.equal(cache.history.ids(cache.columns), first[:, :17])
    text = torch.cat([first, more], 1)
    real = torch.cat([mask, ones(more, first[:, 12:])], 1)

    def ask(ids: Tensor, mask: Tensor | None = None, **rest: Any) -> Tensor:
        found: Tensor = model.generate(ids, attention_mask=mask, cache=cache.fork(), max_new_tokens=4, **GREEDY, **rest)
        return found

    expected = ask(text, real)
    for row, column in ((0, 2), (1, 5), (1, 16)):  # an edited message, another one, an answer that was tokenized again
        edited = text.clone()
        edited[row, column] = text[row, column] % 96 + 1
        message = (
            f"at column {column} row {row} has token {edited[row, column]}, and the cache was given {text[row, column]}"
        )
        with pytest.raises(InputError, match=message):
            ask(edited, real)
    padding = text.clone()
    padding[1, :3] = 50  # what lies under padding is nobody's token
    assert torch.equal(ask(padding, real)[:, 24:], expected[:, 24:])
    with pytest.raises(InputError, match="at column 0"):
        ask(torch.cat([more, more, more], 1), ones(more, more, more))  # longer than what is held
    with pytest.raises(InputError, match=r"differ .* at column 0 .* New ids alone need an attention_mask of 17"):
        ask(more, ones(more))
    for part in (text[:, :9], text[:, :17]):
        with pytest.raises(InputError, match=r"nothing is new.*whole text"):
            ask(part, real[:, : part.shape[1]])
    # New ids alone, with a mask over everything: the last token of the answer has not been fed back yet.
    alone = ask(text[:, 17:], real)
    assert torch.equal(alone[:, 7:], expected[:, 24:])
    assert cache.seen == [17, 14]


def test_ids_are_kept_by_all_that_changes_rows(full: Any) -> None:
    cache, ids = full.new_cache(2), tokens(2, 90)
    for at, width in ((0, 5), *((t, 1) for t in range(5, 85)), (85, 5)):
        full(ids[:, at : at + width], cache=cache)
    assert torch.equal(cache.history.ids(90), ids) and len(cache.history._pieces) < 70
    twin: EvictionCache = cache.fork()
    twin.reorder_cache(torch.tensor([1, 0]))
    full(ids[:, :3], cache=twin)
    assert torch.equal(twin.history.ids(93), torch.cat([ids.flip(0), ids[:, :3]], 1))
    assert torch.equal(cache.history.ids(90), ids)
    beams = full.new_cache(3)
    out = full.generate(ids[:1, :9], cache=beams, num_beams=3, num_return_sequences=3, max_new_tokens=8, **GREEDY)
    assert out.shape == (3, 17)
    held = [row.tolist() for row in beams.history.ids(beams.columns)]
    assert len({tuple(row[:9]) for row in held}) == 1 and beams.columns in (15, 16)


# ------------------------------------------------------------------------------------------------ rows that end
def ends_early(model: Any, prompt: Tensor, mask: Tensor, row: int, at: int) -> int:
    """The token that ends a row's answer after `at` tokens, and not before and not in others."""
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=16, **GREEDY)[:, prompt.shape[1] :]
    for t in range(at, 14):
        token = int(out[row, t])
        others = torch.cat([out[r] for r in range(len(out)) if r != row])
        if token not in others.tolist() and token not in out[row, :t].tolist():
            return token
    raise AssertionError("no such token")


@each
@pytest.mark.parametrize("counted", [True, False], ids=["end is text", "end is padding"])
@pytest.mark.parametrize("make", [rewritten, static])
@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("full", {}),
        ("streaming_llm", {"budget": 16, "chunk": 8}),
        ("h2o", {"budget": 16}),
        ("snapkv", {"budget": 16, "window": 4}),
    ],
    ids=["full", "streaming_llm", "h2o", "snapkv"],
)  # fmt: skip
def test_batched_chat(policy: str, options: dict[str, Any], make: Any, counted: bool) -> None:
    """Prompts, answers and follow-ups of different lengths: every row as if it were alone. The mask may count the token that
    ended an answer as text, or not."""
    model = make("llama", policy, **options)
    prompt, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, :6], mask[2, :3] = 0, 0
    end = ends_early(model, prompt, mask, row=1, at=4)
    settings = {**GREEDY, "eos_token_id": end, "max_new_tokens": 16}
    cache = model.new_cache(3)
    first = model.generate(prompt, attention_mask=mask, cache=cache, **settings)
    answered = [first[r, 20:].tolist() for r in range(3)]
    length = answered[1].index(end) + 1
    assert 4 < length < 16 and not any(answered[1][length:])
    assert cache.seen == [20 + 15, 14 + length - 1, 17 + 15]
    follow, follow_mask = tokens(3, 9, seed=4), torch.ones(3, 9, dtype=torch.long)
    follow_mask[0, :4], follow_mask[1, :1] = 0, 0
    real = torch.ones(3, 16, dtype=torch.long)
    real[1, length if counted else length - 1 :] = 0
    text = torch.cat([first, follow], 1)
    whole = torch.cat([mask, real, follow_mask], 1)
    second = model.generate(text, attention_mask=whole, cache=cache, max_new_tokens=6, **GREEDY)[:, 45:]
    for row in range(3):
        alone, begin = model.new_cache(1), 20 - int(mask[row].sum())
        once = model.generate(prompt[row : row + 1, begin:], cache=alone, **settings)
        if not counted and row == 1:
            once = once[:, :-1]
        again = torch.cat([once, follow[row : row + 1, follow_mask[row].bool()]], 1)
        expected = model.generate(again, attention_mask=ones(again), cache=alone, max_new_tokens=6, **GREEDY)
        assert second[row].tolist() == expected[0, again.shape[1] :].tolist()
        assert {k: v[row] for k, v in cache.positions().items()} == {k: v[0] for k, v in alone.positions().items()}
        assert cache.seen[row] == alone.seen[0]


def test_rows_that_paused_and_no_mask(full: Any) -> None:
    """The caller does not say what was padding: refused, with what to say."""
    prompt = tokens(2, 20)
    end = ends_early(full, prompt, ones(prompt), row=1, at=4)
    cache = full.new_cache(2)
    first = full.generate(
        prompt, attention_mask=ones(prompt), cache=cache, **{**GREEDY, "eos_token_id": end, "max_new_tokens": 16}
    )
    text = torch.cat([first, tokens(2, 5, seed=1)], 1)
    if CACHE_NAME == "past_key_values":  # these versions of transformers give no positions: the mask's word counts
        full.generate(text, attention_mask=ones(text), cache=cache, max_new_tokens=3, **GREEDY)
        assert cache.seen == [text.shape[1] + 2] * 2
        return
    with pytest.raises(InputError, match=r"position_ids of row 1 .* padding, which attention_mask .* should say"):
        full.generate(text, attention_mask=ones(text), cache=cache, max_new_tokens=3, **GREEDY)
