"""Models whose rotation has several axes (M-RoPE): tokens after an image do not turn by their index, and answers go on from
there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvrewrite
from kvrewrite.errors import CacheError, InputError
from kvrewrite.passes.lower.prompt import fold
from kvrewrite.runtime.decode_graph import DecodeRunner
from kvrewrite.runtime.executor import Executor
from kvrewrite.runtime.parts import Execution
from tests.support.products import few
from tests.support.seeing import END, START, VIDEO, Part, given, original, rewriter, small

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FAMILIES = few(["qwen2_vl", "qwen2_5_vl"], rest=["qwen2_5_vl"])
ROWS: list[list[Part]] = [[5, (2, 3), 3, (1, 4), 6], [3, (4, 2), 2], [9]]
FIRST: list[Part] = [4, (2, 3), 5]
THEN: list[Part] = [3, (3, 2), 2]


def turns() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The first turn, the second one, and both as one text."""
    first, second = given("qwen2_vl", [FIRST]), given("qwen2_vl", [THEN], seed=1)
    rows = ("pixel_values", "image_grid_thw")
    return first, second, {name: torch.cat([first[name], second[name]], int(name not in rows)) for name in first}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_beside_the_unmodified_model(name: str) -> None:
    """Padded rows with two images, one, and none; the answers, and that the positions matter."""
    model, full, inputs = original(name), small(name, "full"), given(name, ROWS)
    real = inputs["attention_mask"].bool()
    got, want = full(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
    text = full(inputs_embeds=full.tower(inputs["input_ids"], None, images(inputs)).embeds, attention_mask=real).logits
    assert not torch.allclose(text[real], want[real], rtol=1e-2, atol=1e-3)
    answers = model.generate(**inputs, max_new_tokens=12, **GREEDY)
    assert torch.equal(full.generate(**inputs, max_new_tokens=12, **GREEDY), answers)


def images(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}


@torch.no_grad()
def test_evicted_caches_turn_as_the_unmodified_model() -> None:
    """The original on the whole text with a mask that hides what was evicted before each token, at its own positions."""
    model, less = original("qwen2_vl"), small("qwen2_vl", "streaming_llm", budget=10, start=2, positions="original")
    inputs = given("qwen2_vl", [[5, (2, 3), 4]])
    cache = less.new_cache()
    logits, seen = [less(**inputs, cache=cache).logits[:, -1]], []
    text = inputs["input_ids"]
    for _ in range(6):
        seen.append(cache.positions()[1][0][0])
        text = torch.cat([text, logits[-1].argmax(-1)[:, None]], 1)
        logits.append(less(text[:, -1:], cache=cache).logits[:, -1])
    length, total = inputs["input_ids"].shape[1], text.shape[1]
    assert min(map(len, seen)) < length
    mask = torch.ones(total, total).tril()
    for step, held in enumerate(seen):
        mask[length + step, :] = 0
        mask[length + step, [*held, length + step]] = 1
    marks = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, total - length))
    places, _ = model.model.get_rope_index(text, marks, inputs["image_grid_thw"])
    hidden = torch.where(mask.bool(), 0.0, float("-inf"))[None, None]
    want = model(**{**inputs, "input_ids": text, "attention_mask": hidden}, position_ids=places).logits
    torch.testing.assert_close(torch.cat(logits), want[0, length - 1 :], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("alone", [False, True])
def test_an_image_in_a_later_turn(alone: bool) -> None:
    """Also after an answer, and with ids alone in the end."""
    model, full = original("qwen2_vl"), small("qwen2_vl", "full")
    first, second, both = turns()
    cache = full.prefill(**first)
    inputs = {**second, "attention_mask": both["attention_mask"]} if alone else both
    want = model.generate(**both, max_new_tokens=6, **GREEDY)
    got = full.generate(**inputs, cache=cache, max_new_tokens=6, **GREEDY)
    length = both["input_ids"].shape[1]
    assert torch.equal(got[:, -6:], want[:, length:])
    more = torch.randint(3, 80, (1, 5), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([want[:, : length + 5], more], 1)
    marks = torch.nn.functional.pad(both["mm_token_type_ids"], (0, 10))
    whole = {**both, "input_ids": ids, "mm_token_type_ids": marks, "attention_mask": torch.ones_like(ids)}
    logits = full(more, cache=cache).logits
    torch.testing.assert_close(logits, model(**whole).logits[:, -5:], rtol=1e-4, atol=1e-5)


def static(model: Any) -> Any:
    """A model that decodes from static buffers, lowered as for a GPU, without torch.compile."""
    folded = fold(model.graph_module)
    model.executor = Executor(Execution(folded, None), DecodeRunner(model, folded, None, capture=False))
    return model


@torch.no_grad()
def test_a_cache_knows_where_it_goes_on(tmp_path: Path) -> None:
    """Forks, files, several answers, beams and static buffers."""
    model, full = original("qwen2_vl"), small("qwen2_vl", "full")
    first, _, _ = turns()
    ids, question = first["input_ids"], torch.tensor([[5, 6, 7]])
    whole = {
        **first,
        "input_ids": torch.cat([ids, question], 1),
        "attention_mask": torch.ones(1, ids.shape[1] + 3).long(),
    }
    whole["mm_token_type_ids"] = torch.nn.functional.pad(first["mm_token_type_ids"], (0, 3))
    want = model.generate(**whole, max_new_tokens=6, **GREEDY)[:, -6:]
    cache = full.prefill(**first)
    cache.save(tmp_path / "image.kvcache")
    read = kvrewrite.load_cache(full, tmp_path / "image.kvcache")
    for held in (cache.fork(), read):
        got = full.generate(question, attention_mask=whole["attention_mask"], cache=held, max_new_tokens=6, **GREEDY)
        assert torch.equal(got[:, 3:], want)
    how = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, **GREEDY}
    assert torch.equal(full.generate(**whole, **how), model.generate(**whole, **how))
    still = static(rewriter("qwen2_vl").rewrite("full"))
    assert torch.equal(still.generate(**whole, max_new_tokens=6, **GREEDY)[:, -6:], want)
    assert torch.equal(
        still.generate(whole["input_ids"], max_new_tokens=3, **GREEDY),
        full.generate(whole["input_ids"], max_new_tokens=3, **GREEDY),
    )


def test_an_image_is_not_taken_back_in_part() -> None:
    full = small("qwen2_vl", "full")
    cache = full.prefill(**turns()[0])
    with pytest.raises(CacheError):
        cache.crop(-3)


class TestRefusals:
    def test_ranks_and_repetitions(self) -> None:
        first, _, _ = turns()
        with pytest.raises(InputError, match="positions=original"):
            small("qwen2_vl", "streaming_llm", budget=10, positions="contiguous").generate(**first, max_new_tokens=2)
        with pytest.raises(InputError, match="kvzip reads a prompt again"):
            small("qwen2_vl", "kvzip", budget=10).generate(**first, max_new_tokens=2)

    def test_positions_without_images(self) -> None:
        full, (first, _, _) = small("qwen2_vl", "full"), turns()
        places: Tensor = torch.zeros(1, first["input_ids"].shape[1], 3, dtype=torch.int64)
        with pytest.raises(InputError, match="rope_positions without inputs_embeds"):
            full(first["input_ids"], rope_positions=places)
        embeds = full.embed(first["input_ids"])
        with pytest.raises(InputError, match=r"rope_positions is torch\.int64"):
            full(inputs_embeds=embeds, rope_positions=places[..., :2])
        with pytest.raises(InputError, match="its rotation has one axis"):
            llava = small("llava", "full")
            llava(inputs_embeds=llava.embed(first["input_ids"]), rope_positions=places)


def test_a_video() -> None:
    ids = torch.tensor([[5, 6, 7, START, *[VIDEO] * 8, END, 9, 10]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(32, 3 * 2 * 7 * 7, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "mm_token_type_ids": (ids == VIDEO).long() * 2,
    }
    want = original("qwen2_vl").generate(**inputs, max_new_tokens=8, **GREEDY)
    assert torch.equal(small("qwen2_vl", "full").generate(**inputs, max_new_tokens=8, **GREEDY), want)
