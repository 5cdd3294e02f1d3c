"""Steps as exported programs: run in the place of the model's own graph, with the same results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvrewrite.errors import ArtifactError, InputError
from kvrewrite.runtime.exported import export_steps, load_steps
from tests.support.rewritten import rewritten

pytestmark = pytest.mark.xdist_group("exporting")  # whose fixtures are made once

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(length))


def generate(model: Any, prompt: Tensor) -> Tensor:
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)


@pytest.fixture(scope="module")
def streaming() -> Any:
    model = rewritten("llama", "streaming_llm", budget=96, chunk=64)
    return model, export_steps(model, batch_size=2)


def test_other_lengths_and_rows_than_exported(streaming: Any) -> None:
    model, steps = streaming
    for rows, length in ((2, 40), (3, 200), (4, 131)):
        expected = generate(model, ids(rows, length))
        with steps.attach(model):
            assert torch.equal(generate(model, ids(rows, length)), expected)


def test_the_cache_is_what_it_would_be(streaming: Any) -> None:
    model, steps = streaming
    prompt = ids(2, 150)
    expected = model.prefill(prompt)
    with steps.attach(model):
        found = model.prefill(prompt)
        model(ids(2, 1), past_key_values=found)
    model(ids(2, 1), past_key_values=expected)
    assert found.positions() == expected.positions()
    for a, b in zip(found.leases, expected.leases):
        assert torch.equal(a.store.k_pages, b.store.k_pages)


def test_what_was_not_exported_is_an_error(streaming: Any) -> None:
    model, steps = streaming
    with steps.attach(model):
        with pytest.raises(InputError, match=r"can't take input_ids of shape \(1, 40\)"):
            model(ids(1, 40), logits_to_keep=1)
        with pytest.raises(InputError, match=r"can't take logit_index .*logits of the last column only"):
            model(ids(2, 40))
    assert model(ids(1, 40)).logits.shape == (1, 40, 97)
    with pytest.raises(InputError, match="the steps are of"), steps.attach(rewritten("llama", "full")):
        pass
    with pytest.raises(InputError, match="export its steps"):
        torch.export.export(model, (ids(1, 40),))
    with pytest.raises(InputError, match="batch_size is '2', expected a whole number"):
        export_steps(model, batch_size="2")
    with pytest.raises(InputError, match="model is a Linear, expected a rewritten model"):
        export_steps(torch.nn.Linear(1, 1))


def test_saved_programs_need_trust_and_their_hashes(streaming: Any, tmp_path: Path) -> None:
    model, steps = streaming
    with pytest.raises(ArtifactError, match=r"has no steps\.json"):
        load_steps(tmp_path, trust_compiled=True)
    steps.save(tmp_path)
    with pytest.raises(ArtifactError, match="trust_compiled=True"):
        load_steps(tmp_path)
    loaded = load_steps(tmp_path, trust_compiled=True)
    expected = generate(model, ids(3, 90))
    with loaded.attach(model):
        assert torch.equal(generate(model, ids(3, 90)), expected)
    with (tmp_path / "decode.pt2").open("r+b") as file:
        file.seek(100)
        file.write(b"\0\1\2")
    with pytest.raises(ArtifactError, match=r"decode\.pt2 is missing, damaged or was edited"):
        load_steps(tmp_path, trust_compiled=True)


@pytest.mark.parametrize(
    ("policy", "options"), [("h2o", {"budget": 80, "recent_tokens": 8}), ("snapkv", {"budget": 70})]
)
def test_other_policies_with_one_row(policy: str, options: dict[str, Any]) -> None:
    model = rewritten("llama", policy, **options)
    steps = export_steps(model)
    for length in (100, 233):
        expected = generate(model, ids(1, length))
        with steps.attach(model):
            assert torch.equal(generate(model, ids(1, length)), expected)
