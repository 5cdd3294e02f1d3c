"""What holds on real pretrained weights. KVREWRITE_REAL_MODELS names a folder with `smollm2/` and `gemma3/` (any checkpoint
directories of these names) and `quote.jsonl` (examples/real_models/documents.py); without it these tests are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kvrewrite.tools.evaluation import documents
from kvrewrite.tools.evaluation.scored import run_scored
from kvrewrite.tools.subjects import FULL_CACHE, Arm, PolicySpec, Source

FOLDER = os.environ.get("KVREWRITE_REAL_MODELS")
TOKENS = 400
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(FOLDER is None, reason="KVREWRITE_REAL_MODELS names no folder of models"),
    pytest.mark.xdist_group("real"),  # a model is loaded once
]


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def source(request):
    directory = Path(str(FOLDER)) / request.param
    if not directory.is_dir():
        pytest.skip(f"{directory} is not there")
    return Source(directory, check="off")


@pytest.fixture(scope="module")
def passages(source):
    rows = [{"text": row["context"]} for row in documents.read_rows(Path(str(FOLDER)) / "quote.jsonl")[:4]]
    return documents.make_passages("quote", rows, tokens=TOKENS, samples=2, seed=0, tokenizer=source.tokenizer)


def test_the_full_cache_is_the_unmodified_model(source, passages):
    cell = run_scored(source.rewritten(FULL_CACHE), source.tokenizer, passages, "blind", 2, lambda n: None)
    for passage, nats in list(zip(passages, cell["nats"], strict=True))[::4]:
        ids = torch.tensor([passage.context + passage.question + passage.answer])
        with torch.no_grad():
            logits = source.base(ids).logits[0, -len(passage.answer) - 1 : -1]
        want = torch.nn.functional.cross_entropy(logits, ids[0, -len(passage.answer) :], reduction="sum")
        assert nats == pytest.approx(float(want), abs=2e-3)


def test_reading_the_context_again_beats_a_random_choice(source, passages):
    """A quarter kept, blind: KVzip's scores find what a question asks for; random slots do not."""
    found = {}
    for name in ("kvzip", "random"):
        model = source.rewritten(Arm(PolicySpec(name), 0.25))
        found[name] = run_scored(model, source.tokenizer, passages, "blind", 2, lambda n: None)["nll"]["mean"]
    assert found["kvzip"] < found["random"] - 0.5
