"""Vision-language models: exact beside the unmodified model with a budget for all, and with evictions what the language
model does with the embeddings that the unmodified model makes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import kvrewrite
from kvrewrite.errors import CacheError, InputError
from tests.support.products import few
from tests.support.seeing import IMAGE, MAKERS, Part, given, merged, original, small

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FAMILIES = few(
    ["llava", "smolvlm", "internvl", "vipllava", "idefics3", "mistral3"],
    rest=["vipllava", "idefics3", "mistral3"],
)
ROWS: list[list[Part]] = [[5, (2, 2), 3, (2, 2), 6], [3, (2, 2), 2]]  # two images and one, padded


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_beside_the_unmodified_model(name: str) -> None:
    """Logits of two padded rows with different numbers of images, and the answers."""
    model, full, inputs = original(name), small(name, "full"), given(name, ROWS)
    mask = inputs["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    want, got = model(**inputs, position_ids=places).logits, full(**inputs).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    assert not torch.allclose(full(**other).logits[real], want[real], rtol=1e-2, atol=1e-3)
    answers = model.generate(**inputs, max_new_tokens=8, **GREEDY)
    assert torch.equal(full.generate(**inputs, max_new_tokens=8, **GREEDY), answers)


@torch.no_grad()
@pytest.mark.parametrize(
    ("policy", "options"), [("h2o", {}), ("snapkv", {"window": 4}), ("adakv", {"window": 4}), ("kvzip", {})]
)
def test_evictions_are_those_of_the_embeddings(policy: str, options: dict[str, Any]) -> None:
    """To the bit; image tokens are evicted as others are."""
    less, inputs = small("llava", policy, budget=12, **options), given("llava", ROWS)
    mask, embeds = inputs["attention_mask"], merged("llava", given("llava", ROWS))
    caches = [less.new_cache(2) for _ in range(2)]
    assert torch.equal(
        less(**inputs, cache=caches[0]).logits, less(inputs_embeds=embeds, attention_mask=mask, cache=caches[1]).logits
    )
    assert caches[0].positions() == caches[1].positions()
    assert min(map(len, caches[0].positions()[1][0])) <= 12
    how = {"attention_mask": mask, "max_new_tokens": 8, **GREEDY}
    answers = less.generate(**inputs, max_new_tokens=8, **GREEDY)
    assert torch.equal(answers[:, mask.shape[1] :], less.generate(inputs_embeds=embeds, **how))


def test_beams_and_sequences() -> None:
    model, full, inputs = original("llava"), small("llava", "full"), given("llava", [[4, (2, 2), 3]])
    how = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, **GREEDY}
    assert torch.equal(full.generate(**inputs, **how), model.generate(**inputs, **how))


FIRST: list[Part] = [4, (2, 2), 5]
THEN: list[Part] = [3, (2, 2), 2]


class TestTurns:
    def turns(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The first turn, the second one, and both as one text."""
        first, second = given("llava", [FIRST]), given("llava", [THEN], seed=1)
        return first, second, {name: torch.cat([first[name], second[name]], int("pixel" not in name)) for name in first}

    @pytest.mark.parametrize("alone", [False, True])
    @pytest.mark.parametrize("policy", ["full", "h2o"])
    def test_an_image_in_a_later_turn(self, policy: str, alone: bool) -> None:
        """The whole text with all images, or the new ones alone with a mask over everything."""
        options = {} if policy == "full" else {"budget": 12}
        less = small("llava", policy, **options)
        first, second, both = self.turns()
        cache = less.prefill(**first)
        held = less.prefill(inputs_embeds=merged("llava", first))
        want = less.generate(inputs_embeds=merged("llava", both), cache=held, max_new_tokens=6, **GREEDY)
        inputs = {**second, "attention_mask": both["attention_mask"]} if alone else both
        got = less.generate(**inputs, cache=cache, max_new_tokens=6, **GREEDY)
        assert torch.equal(got[:, inputs["input_ids"].shape[1] :], want)
        if policy == "full":
            whole = original("llava").generate(**both, max_new_tokens=6, **GREEDY)
            assert torch.equal(want, whole[:, both["input_ids"].shape[1] :])

    def test_another_image_is_noticed(self) -> None:
        less = small("llava", "h2o", budget=12)
        first, _, both = self.turns()
        cache = less.prefill(**first)
        with pytest.raises(InputError, match="at column 4"):
            less.generate(**{**both, "pixel_values": both["pixel_values"].flip(0)}, cache=cache, max_new_tokens=2)


class TestDirectories:
    def test_convert_save_and_load(self, tmp_path: Path) -> None:
        """The vision tower's weights are the checkpoint's, opened by transformers' class."""
        model, inputs = original("llava"), given("llava", ROWS)
        model.save_pretrained(tmp_path / "model")
        kvrewrite.convert(tmp_path / "model", tmp_path / "converted", "h2o", budget=64)
        small("llava", "h2o", budget=64).save_pretrained(tmp_path / "saved")
        kvrewrite.load(tmp_path / "saved").save_pretrained(tmp_path / "again")
        want = model.generate(**inputs, max_new_tokens=5, **GREEDY)
        for name in ("converted", "again", "saved"):
            opened = kvrewrite.load(tmp_path / name)
            assert torch.equal(opened.generate(**inputs, max_new_tokens=5, **GREEDY), want), name
        assert kvrewrite.verify(tmp_path / "converted").ok

    def test_copies(self) -> None:
        """A copy's tower has a copy of the weights, and the copy's table."""
        source = MAKERS["llava"]().eval()  # transformers puts hooks that can't be pickled on modules that have run
        made = kvrewrite.transform(source, "h2o", budget=12)
        inputs = given("llava", ROWS)
        want = made(**inputs).logits
        held = {p.data_ptr() for p in source.parameters()}
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(twin(**inputs).logits, want)
            assert twin.tower.stub.get_input_embeddings().weight is twin.get_input_embeddings().weight
            assert not held & {p.data_ptr() for p in twin.parameters()}

    def test_weights_are_shared_with_the_original(self) -> None:
        held = {p.data_ptr() for p in original("llava").parameters()}
        assert {p.data_ptr() for p in small("llava", "full").parameters()} == held


@pytest.mark.parametrize("name", few(["paligemma", "gemma3"], rest=["gemma3"]))
def test_image_tokens_that_see_each_other_are_refused(name: str) -> None:
    inputs = given(name, [[3, (2, 2), 4]])
    with pytest.raises(InputError, match="image tokens see each other in both directions"):
        small(name, "full").generate(**inputs, max_new_tokens=2)
    text = given(name, [[9]])
    want = original(name).generate(**text, max_new_tokens=4, **GREEDY)
    assert torch.equal(small(name, "full").generate(**text, max_new_tokens=4, **GREEDY), want)


def test_features_of_further_layers_are_refused() -> None:
    """Qwen3-VL adds what the tower's layers found to the language model's."""
    with pytest.raises(InputError, match="deepstack_visual_embeds"):
        small("qwen3_vl", "full").generate(**given("qwen3_vl", [[3, (2, 2), 4]]), max_new_tokens=2)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
def test_pinned_text_leaves_a_budget_for_images(policy: str) -> None:
    """All text stays in every head, and images compete for the rest of the budget; generated tokens for what text leaves, too."""
    less = small("llava", policy, budget=18, **({"window": 2} if policy == "snapkv" else {}))
    inputs = given("llava", [[5, (2, 2), 3, (2, 2), 6]])
    image = inputs["input_ids"] == IMAGE
    cache = less.prefill(**inputs, pin=~image)
    text, places = set((~image[0]).nonzero().flatten().tolist()), cache.positions()
    for layer in places.values():
        for held in layer[0]:
            assert text <= set(held) and len(held) == 18
    answer = less.generate(**inputs, pin=~image, max_new_tokens=4, **GREEDY)
    with pytest.raises(CacheError, match="pin less"):
        less.generate(**given("llava", [[19, (2, 2)]]), pin=(0, 19), max_new_tokens=2)
    assert answer.shape[1] == image.shape[1] + 4
