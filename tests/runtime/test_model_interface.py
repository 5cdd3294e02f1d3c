"""What callers ask a model of transformers besides `generate`: arguments, a loss, its size, pickling, other default dtypes."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

import kvrewrite
from kvrewrite.capture.captured import Captured
from kvrewrite.capture.frontend import capture
from kvrewrite.errors import ArgumentError, CacheError, InputError, KVRewriteError, UnsupportedModelError
from kvrewrite.passes.pipeline import canonical
from kvrewrite.runtime.arguments import HARMLESS
from tests.support.products import covering
from tests.support.rewritten import build, original, rewrite, rewritten


def ids(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def full() -> Any:
    return rewritten("llama", "full")


class TestArguments:
    @pytest.mark.parametrize(
        "name",
        ["videos", "past_key_value", "typo", "head_mask", "shift_labels", "cu_seq_lens_q", "max_length_k", "seq_idx",
         "mm_token_type_ids", "adapter_names"],
    )  # fmt: skip
    def test_unknown_ones_are_named(self, full: Any, name: str) -> None:
        """A TypeError, as Python's own; a cache is as it was."""
        cache = full.new_cache()
        with pytest.raises(TypeError, match=rf"got the argument '{name}'.*expected some of input_ids") as caught:
            full(ids(5), cache=cache, **{name: torch.ones(1, 5)})
        assert isinstance(caught.value, ArgumentError) and isinstance(caught.value, KVRewriteError)
        assert cache.seen == [0]

    def test_a_hint(self, full: Any) -> None:
        with pytest.raises(ArgumentError, match="did you mean 'past_key_values'"):
            full(ids(5), past_key_value=full.new_cache())

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("image_sizes", torch.ones(1, 2)), ("token_type_ids", torch.zeros(1, 5)), ("output_attentions", True),
            ("output_hidden_states", True), ("output_router_logits", True), ("is_causal", False),
        ],
    )  # fmt: skip
    def test_known_ones_that_would_change_the_result(self, full: Any, name: str, value: Any) -> None:
        with pytest.raises(InputError, match=f"{name} is not supported by a rewritten model: .*leave it out"):
            full(ids(5), **{name: value})

    @pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in HARMLESS.items() for v in values])
    def test_harmless_ones(self, full: Any, name: str, value: Any) -> None:
        assert torch.equal(full(ids(5), **{name: value}).logits, full(ids(5)).logits)

    def test_none_is_harmless(self, full: Any) -> None:
        """A caller that passes on what it may have been given."""
        out = full(ids(5), pixel_values=None, inputs_embeds=None, labels=None, num_items_in_batch=None, anything=None)
        assert torch.equal(out.logits, full(ids(5)).logits)

    def test_columns_that_are_counted(self, full: Any) -> None:
        """`cache_position` of older loops: the cache's own, or refused."""
        cache = full.new_cache()
        full(ids(5), cache=cache, cache_position=torch.arange(5))
        full(ids(1), cache=cache, cache_position=torch.tensor([5]))
        with pytest.raises(InputError, match=r"cache_position is .*expected 6 to 6: columns are counted by the cache"):
            full(ids(1), cache=cache, cache_position=torch.tensor([9]))

    def test_what_is_compiled_refuses_them_too(self) -> None:
        """Also in the step that was planned while the last one ran."""
        model = copy.deepcopy(rewritten("llama", "streaming_llm", budget=16))
        model.compile(static_decode=True, backend="eager")
        cache = model.new_cache()
        model(ids(9), cache=cache)
        model(ids(1), cache=cache)
        with pytest.raises(ArgumentError, match="'typo'"):
            model(ids(1), cache=cache, typo=1)
        with pytest.raises(InputError, match="output_attentions"):
            model(ids(1), cache=cache, output_attentions=True)

    def test_the_list_of_harmless_ones_has_no_arguments_of_its_own(self) -> None:
        assert not HARMLESS.keys() & inspect.signature(kvrewrite.RewrittenModel.forward).parameters.keys()


class TestForms:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"input_ids": [[1, 2]]}, "input_ids is a list, expected .*torch.tensor"),
            ({"input_ids": ids(4)[0]}, r"shape \(4,\)"),
            ({"input_ids": ids(4)[:, :0]}, r"shape \(1, 0\), expected at least one token.*BOS"),
            ({"input_ids": ids(4), "attention_mask": [[1, 1, 1, 1]]}, "attention_mask is a list"),
            ({"input_ids": ids(4), "position_ids": [[0, 1, 2, 3]]}, "position_ids is a list"),
            ({"input_ids": ids(4), "logits_to_keep": -1}, "logits_to_keep is -1, expected 0"),
            ({"input_ids": ids(4), "logits_to_keep": torch.tensor([1])}, "logits_to_keep is a Tensor, expected an int"),
            ({"input_ids": ids(4), "labels": ids(5)}, r"labels: got shape \(1, 5\), expected .*\(1, 4\)"),
            ({"input_ids": ids(4), "labels": [1]}, "labels: got a list"),
            ({"input_ids": ids(4), "labels": ids(4), "logits_to_keep": 1}, "labels need the logits of all columns"),
        ],
    )
    def test_forward(self, full: Any, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            full(**arguments)

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([[1, 2]], "input_ids is a list"),
            (ids(4)[0], r"shape \(4,\)"),
            (ids(4)[:, :0], "at least one token"),
            (ids(4).float(), "dtype torch.float32"),
        ],
    )
    def test_generate(self, full: Any, prompt: Any, message: str) -> None:
        for arguments in ({"input_ids": prompt}, {"inputs": prompt}):
            with pytest.raises(InputError, match=message):
                full.generate(**arguments, max_new_tokens=2)
        with pytest.raises(InputError, match=message):
            full.generate(prompt, max_new_tokens=2)
        with pytest.raises(InputError, match=message):
            full.prefill(prompt)

    def test_labels_in_training(self, full: Any) -> None:
        model = copy.deepcopy(full).train()
        with pytest.raises(InputError, match=r"training mode.*without gradients"):
            model(ids(4), labels=ids(4))


class TestOwnGenerationConfig:
    @pytest.mark.parametrize("kind", ["static", "dynamic", "sliding_window"])
    def test_a_cache_implementation_is_left_out_with_a_word(self, kind: str) -> None:
        """What the files of a model say; what a caller passes is refused."""
        model = build("llama")
        model.generation_config = GenerationConfig(pad_token_id=0)
        model.generation_config.cache_implementation = kind
        with pytest.warns(UserWarning, match=f"cache_implementation='{kind}'.*left out"):
            small = kvrewrite.transform(model, "full")
        assert model.generation_config.cache_implementation == kind
        plain = rewritten("llama", "full")
        settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(small.generate(ids(9), **settings), plain.generate(ids(9), **settings))
        with pytest.raises(CacheError, match=r"cache_implementation='static'.*leave"):
            small.generate(ids(9), cache_implementation="static", **settings)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("output_attentions", True), ("output_hidden_states", True), ("prompt_lookup_num_tokens", 2)],
    )
    def test_other_things_that_nobody_passed(self, name: str, value: Any) -> None:
        model = build("llama")
        setattr(model.generation_config, name, value)
        with pytest.warns(UserWarning, match=f"{name}={value}.*left out"):
            small = kvrewrite.transform(model, "full")
        assert small.generate(ids(9), max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 11)


class TestSizes:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
    def test_as_the_original(self, name: str) -> None:
        small, model = rewritten(name, "full"), original(name)
        for more in ({}, {"exclude_embeddings": True}):
            assert small.num_parameters(**more) == model.num_parameters(**more)  # type: ignore[operator]
        bytes_of = model.get_memory_footprint(return_buffers=False)  # type: ignore[operator]
        assert small.get_memory_footprint(return_buffers=False) == bytes_of <= small.get_memory_footprint()
        table = small.get_input_embeddings().weight
        assert table.data_ptr() == model.get_input_embeddings().weight.data_ptr()  # type: ignore[operator]
        assert any(table is p for p in small.parameters())

    def test_nothing_is_trainable(self) -> None:
        assert kvrewrite.transform(build("llama"), "full").num_parameters(only_trainable=True) == 0

    def test_a_vocabulary_can_not_grow(self, full: Any) -> None:
        with pytest.raises(InputError, match="resize the original"):
            full.resize_token_embeddings(100)


@pytest.mark.parametrize(
    ("name", "policy", "options"),
    [
        ("llama", "streaming_llm", {"budget": 16, "positions": "contiguous"}),
        ("gemma3_text", "streaming_llm", {"budget": 16, "positions": "contiguous"}),
        ("llama", "h2o", {"budget": 16, "quantize": "int8", "quantize_group": 8, "quantize_residual": 8}),
        ("llama", "attention_gate", {}),
        ("NanoGPT", "nacl", {"budget": 16}),
    ],
)
def test_pickle_and_torch_save(name: str, policy: str, options: dict[str, Any]) -> None:
    """As processes are given a model, and as people save one: the same logits and kept sets, and a model of its own."""
    small, text = rewritten(name, policy, **options), ids(30)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    before = small.new_cache()
    expected = small(text, cache=before).logits
    for other in (pickle.loads(pickle.dumps(small)), torch.load(file, weights_only=False)):
        cache = other.new_cache()
        assert torch.equal(other(text, cache=cache).logits, expected)
        assert cache.positions() == before.positions()
        assert other.training is small.training and other.config.to_dict() == small.config.to_dict()
        with pytest.raises(CacheError, match="another model"):
            other(ids(1), cache=before)


def test_a_compiled_model_is_pickled_without_what_was_compiled() -> None:
    small = copy.deepcopy(rewritten("llama", "streaming_llm", budget=16))
    small.compile(static_decode=True, backend="eager")
    expected = small(ids(20)).logits
    other = pickle.loads(pickle.dumps(small))
    assert other.decoder is None and small.decoder is not None
    torch.testing.assert_close(other(ids(20)).logits, expected, rtol=0, atol=1e-5)


@functools.cache
def in_dtype(dtype: torch.dtype) -> tuple[torch.nn.Module, Captured]:
    model = build("llama").to(dtype)
    found = capture(model)
    canonical(found)
    return model, found


@covering({"policy": 1, "dtype": 1})
@pytest.mark.parametrize("policy", ["h2o", "expected_attention", "streaming_llm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_default_dtype(policy: str, dtype: torch.dtype) -> None:
    """torch.set_default_dtype(float64) is nothing to the rewrite of a model in any dtype."""
    (model, found), text, before = in_dtype(dtype), ids(30), torch.get_default_dtype()
    usual = rewrite(model, found, policy, None, budget=16)
    try:
        torch.set_default_dtype(torch.float64)
        small = kvrewrite.transform(model, policy, budget=16)
        assert torch.get_default_dtype() == torch.float64
        sites = kvrewrite.inspect(model) if policy == "h2o" else small.sites
        cache, other = small.new_cache(), usual.new_cache()
        got, expected = small(text, cache=cache).logits, usual(text, cache=other).logits
    finally:
        torch.set_default_dtype(before)
    assert len(sites) == 2 and got.dtype == dtype
    assert torch.equal(got, expected) and cache.positions() == other.positions()


def test_trainer_evaluates(tmp_path: Path) -> None:
    """The original's eval_loss, also where it gathers logits; training is refused."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids(20, seed=i)[0], "attention_mask": torch.ones(20, dtype=torch.long)} for i in range(5)]
    data: Any = [{**row, "labels": row["input_ids"].clone()} for row in rows]
    small = rewritten("llama", "full")

    def trainer(model: Any, only_loss: bool) -> Trainer:
        settings = TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, prediction_loss_only=only_loss,
            disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model=model, args=settings, eval_dataset=data, train_dataset=data)

    expected = trainer(copy.deepcopy(original("llama")), True).evaluate()["eval_loss"]
    for only_loss in (True, False):
        assert trainer(small, only_loss).evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="without gradients"):
        trainer(copy.deepcopy(small), True).train()


def test_embeddings_that_are_no_table() -> None:
    small = copy.deepcopy(rewritten("llama", "full"))
    node = next(n for n in small.graph_module.graph.nodes if n.target is torch.ops.aten.embedding.default)
    node.target = torch.ops.aten.index_select.default
    with pytest.raises(UnsupportedModelError, match="one table"):
        small.get_input_embeddings()
