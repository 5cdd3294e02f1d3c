"""Rows of a cache: one text for many rows, rows that share pages, copies of models, and where a cache was made."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvrewrite
from kvrewrite.errors import CacheError
from tests.cache.test_cache import GREEDY, check_pages, tokens
from tests.runtime.test_decoding import static
from tests.support.products import covering
from tests.support.rewritten import captured, original, rewrite, rewritten

pytestmark = pytest.mark.xdist_group("llama")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("h2o", {"budget": 70}),
    ("snapkv", {"budget": 70, "window": 8}),
    ("adakv", {"budget": 70, "window": 8}),
    ("locret", {"budget": 70, "chunk": 40, "stabilizers": 9, "local_tail": 5}),
    ("h2o", {"budget": 70, "quantize": "int8", "quantize_group": 4, "quantize_residual": 8}),
]
NAMES = [p + "-int8" * ("quantize" in o) for p, o in CASES]


def ones(ids: Tensor) -> Tensor:
    return torch.ones_like(ids)


# ------------------------------------------------------------------------------------------------ one text, many rows
@covering({("policy", "options"): 1, "make": 3})
@pytest.mark.parametrize("make", [rewritten, static])
@pytest.mark.parametrize(("policy", "options"), CASES, ids=NAMES)
def test_one_text_many_rows(policy: str, options: dict[str, Any], make: Any) -> None:
    """A batch of questions on a cache of one row, and samples of one question: each row as on a fork of its own."""
    model = make("llama", policy, **options)
    document = tokens(1, 150)
    cache = model.new_cache(1)
    model(document, cache=cache, logits_to_keep=1)
    cache.end_prompt()
    before, kept = cache.memory(), cache.positions()
    questions, mask = tokens(3, 9, seed=1), torch.ones(3, 159, dtype=torch.long)
    mask[1, 150:154] = 0  # a shorter question
    text = torch.cat([document.expand(3, -1), questions], 1)
    got = model.generate(text, attention_mask=mask, cache=cache, max_new_tokens=8, **GREEDY)
    for row in range(3):
        alone = text[row : row + 1, mask[row].bool()]
        expected = model.generate(alone, attention_mask=ones(alone), cache=cache.fork(), max_new_tokens=8, **GREEDY)
        assert got[row, 159:].tolist() == expected[0, alone.shape[1] :].tolist()
    assert cache.batch_size == 1 and cache.positions() == kept and cache.memory().live == before.live
    settings: dict[str, Any] = {**GREEDY, "do_sample": True, "max_new_tokens": 8, "num_return_sequences": 3}
    one = text[:1]
    outs = []
    for given in (cache, None):
        if policy != "full" and given is None:
            continue  # without the cache the question would be in the prompt
        torch.manual_seed(5)
        outs.append(model.generate(one, attention_mask=ones(one), cache=given, **settings))
    assert outs[0].shape == (3, 167) and torch.equal(outs[0], outs[-1])
    check_pages(cache)


@pytest.mark.parametrize("rows", [1, 2])
def test_beams_on_a_text_that_is_held(rows: int) -> None:
    model, document = rewritten("llama", "full"), tokens(rows, 70)
    cache = model.new_cache(rows)
    model(document, cache=cache, logits_to_keep=1)
    text = torch.cat([document, tokens(rows, 5, seed=1)], 1)
    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 7}
    got = model.generate(text, attention_mask=ones(text), cache=cache, **settings)
    expected = original("llama").generate(text, attention_mask=ones(text), **settings)  # type: ignore[operator]
    assert torch.equal(got, expected) and cache.seen == [70] * rows


@pytest.mark.parametrize(("policy", "options"), CASES, ids=NAMES)
def test_repeated_and_selected_rows(policy: str, options: dict[str, Any]) -> None:
    """transformers' own names for it: rows share pages until they write, and answer as their source would."""
    model, ids = rewritten("llama", policy, **options), tokens(2, 150)
    cache = model.new_cache(2)
    model(ids, cache=cache, logits_to_keep=1)
    cache.end_prompt()
    leased = cache.leases[0].leased
    many = cache.fork()
    many.batch_repeat_interleave(3)
    assert many.batch_size == 6 and many.seen == [150] * 6 and many.leases[0].leased == leased
    check_pages(cache, many)
    step = torch.cat([tokens(6, 4, seed=2)])
    got = model(step, cache=many).logits
    for row in range(6):
        twin = cache.fork()
        twin.batch_select_indices(torch.tensor([row // 3]))
        assert twin.batch_size == 1
        torch.testing.assert_close(got[row], model(step[row : row + 1], cache=twin).logits[0], rtol=0, atol=2e-5)
    del twin
    many.batch_select_indices(torch.tensor([False, True, False, False, True, True]))
    assert many.batch_size == 3 and torch.equal(many.history.ids(150), ids[[0, 1, 1]].long()[:, :150])
    check_pages(cache, many)
    with pytest.raises(CacheError, match=r"batch size 3, but the input has 2 rows.*batch_repeat_interleave"):
        model(tokens(2, 1), cache=many)
    with pytest.raises(CacheError, match="batch size 3, but the input has 4 rows"):
        model.generate(tokens(4, 160), cache=many.fork(), max_new_tokens=2, **GREEDY)


# ------------------------------------------------------------------------------------------------ memory
@pytest.mark.parametrize(("policy", "options"), CASES, ids=NAMES)
def test_shared_pages_count_once(policy: str, options: dict[str, Any]) -> None:
    model = rewritten("llama", policy, **options)
    cache = model.new_cache(3)
    model(tokens(3, 150), cache=cache, logits_to_keep=1)
    one = model.new_cache(1)
    model(tokens(3, 150)[1:2], cache=one, logits_to_keep=1)
    states = sum(s.value.nbytes for s in cache.states), sum(s.value.nbytes for s in one.states)
    apart = cache.memory()
    assert apart.shared == 0
    cache.reorder_cache(torch.tensor([1, 1, 1]))
    memory, alone = cache.memory(), one.memory()
    assert memory.leased - states[0] == alone.leased - states[1] == memory.shared
    assert memory.live <= memory.leased <= memory.reserved and memory.live < apart.live
    if not cache.states:
        assert memory.live == alone.live
    for t in range(3):
        model(tokens(3, 1, seed=t), cache=cache)  # the rows part
        memory = cache.memory()
        assert memory.live <= memory.leased <= memory.reserved


# ------------------------------------------------------------------------------------------------ copies of models
@pytest.mark.parametrize("make", [rewritten, static])
def test_a_copy_of_a_model_is_another_model(make: Any) -> None:
    """Its weights may change: caches of the original are refused, and neither disturbs the other."""
    model = make("llama", "h2o", budget=20)
    ids = tokens(1, 30)
    cache = model.prefill(ids)
    expected = model(tokens(1, 1), cache=cache.fork()).logits
    model(tokens(1, 1, seed=1), cache=cache)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    for call in (lambda: twin(tokens(1, 1), cache=cache), lambda: twin.generate(ids, cache=cache, **GREEDY)):
        with pytest.raises(CacheError, match="a copy of a model is another one"):
            call()
    other = twin.new_cache(1)
    with pytest.raises(CacheError, match="belongs to another model"):
        model(ids, cache=other)
    twin(ids, cache=other)
    again = model.new_cache(1)
    model(ids, cache=again)
    for t in range(5):  # in turn, where single tokens run from buffers of the model
        a, b = tokens(1, 1, seed=t), tokens(1, 1, seed=50 + t)
        twin(b, cache=other)
        got = model(a if t else tokens(1, 1), cache=again).logits
        if t == 0:
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_a_copy_of_a_compiled_model_is_compiled() -> None:
    model = rewrite(original("llama"), captured("llama"), "streaming_llm", None, budget=20)
    model.compile(static_decode=True, backend="eager")
    cache = model.prefill(tokens(1, 30))
    model(tokens(1, 1), cache=cache)
    twin = copy.deepcopy(model)
    assert twin.decoder is not None and twin.decoder is not model.decoder
    assert twin.decoder.model is twin and twin.shared_stores()[0] is not model.shared_stores()[0]
    other = twin.new_cache(1)
    twin(tokens(1, 30), cache=other)
    text = tokens(1, 8, seed=1)
    twin(tokens(1, 1), cache=other)
    for t in range(8):
        got = [m(text[:, t : t + 1], cache=c).logits for m, c in ((model, cache), (twin, other))]
        torch.testing.assert_close(*got, rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------------------ inference mode
@covering({("policy", "options"): 1, "make": 3})
@pytest.mark.parametrize("make", [rewritten, static])
@pytest.mark.parametrize(
    ("policy", "options"), [*CASES, ("sirllm", {"budget": 40, "chunk": 40})], ids=[*NAMES, "sirllm"]
)
def test_inference_mode_inside_and_outside(policy: str, options: dict[str, Any], make: Any) -> None:
    """A cache that was made in inference_mode goes on outside, and the other way round, turn by turn."""
    ids, results = tokens(1, 120), []
    for inside in ((True, False, True, False), (False, True, False, True), (False, False, False, False)):
        model, out = make("llama", policy, **options), []
        with torch.inference_mode(inside[0]):
            cache = model.new_cache(1)
        at = 0
        for turn, width in ((0, 90), (1, 1), (2, 1), (3, 20), (0, 1), (1, 1)):
            with torch.inference_mode(inside[turn]):
                out.append(model(ids[:, at : at + width], cache=cache, logits_to_keep=1).logits)
                fork = cache.fork()
            at += width
            cache = fork
        with torch.inference_mode(inside[1]):
            cache.reorder_cache(torch.tensor([0]))
            out.append(model(ids[:, :1], cache=cache).logits)
        results.append(torch.cat(out, 1).clone())
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[2])
    assert not any(x.is_inference() for lease in cache.leases for x in (lease.lens, lease.store.k_pages, lease.table))


@pytest.mark.parametrize("side", ["left", "right"])
def test_questions_alone_on_a_saved_text(tmp_path: Path, side: str) -> None:
    """New ids alone, of three lengths, padded on either side, on a loaded cache of one row with a pinned span."""
    model = rewritten("llama", "h2o", budget=70)
    model.prefill(tokens(1, 150), pin=(5, 9)).save(tmp_path / "a")
    cache = kvrewrite.load_cache(model, tmp_path / "a")
    lengths, questions = (9, 4, 7), tokens(3, 9, seed=1)
    mask = torch.ones(3, 159, dtype=torch.long)
    for row, n in enumerate(lengths):
        pads = slice(150, 159 - n) if side == "left" else slice(150 + n, 159)
        mask[row, pads] = 0
    rows = cache.fork()
    rows.batch_repeat_interleave(3)
    got = model(questions, attention_mask=mask, cache=rows).logits
    for row in range(3):
        alone, real = cache.fork(), mask[row, 150:].bool()
        expected = model(questions[row : row + 1, real], cache=alone).logits
        torch.testing.assert_close(got[row, real], expected[0], rtol=0, atol=1e-5)
        assert {layer: held[row] for layer, held in rows.positions().items()} == {
            layer: held[0] for layer, held in alone.positions().items()
        }
    assert rows.pins == [((5, 9),)] * 3
    made = model.generate(questions, attention_mask=mask, cache=cache, max_new_tokens=4, **GREEDY)
    assert made.shape == (3, 13) and cache.batch_size == 1 and cache.seen == [150]
    for row in range(3):
        alone = questions[row : row + 1, mask[row, 150:].bool()]
        whole = torch.ones(1, 150 + alone.shape[1], dtype=torch.long)
        expected = model.generate(alone, attention_mask=whole, cache=cache.fork(), max_new_tokens=4, **GREEDY)
        assert made[row, 9:].tolist() == expected[0, alone.shape[1] :].tolist()
