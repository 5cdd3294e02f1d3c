"""What benchmarks/gate_lora.py measures: answers after a compressed context, token by token, and training rows of quotes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.gate_lora import answers, encoded
from kvrewrite.assets import small_model
from kvrewrite.tools.evaluation.ask import Held
from kvrewrite.tools.evaluation.documents import Passage
from kvrewrite.tools.training.trainer import IGNORED
from tests.support.rewritten import original, rewritten
from tests.support.zoo import VOCAB


def passages() -> list[Passage]:
    """Two contexts with two questions each, of unequal lengths."""
    numbers = torch.randint(3, VOCAB, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    taken = iter(numbers)
    contexts = [tuple(itertools.islice(taken, n)) for n in (40, 33)]
    sizes = ((0, 5, 4), (0, 3, 6), (1, 4, 2), (1, 6, 3))
    return [
        Passage(d, contexts[d], tuple(itertools.islice(taken, q)), tuple(itertools.islice(taken, a)))
        for d, q, a in sizes
    ]


@torch.no_grad()
def test_the_full_cache_scores_as_the_unmodified_model() -> None:
    held = Held()
    found = answers(rewritten("llama", "full"), passages(), held)
    for (nats, hits, count), passage in zip(found, passages(), strict=True):
        text = passage.context + passage.question + passage.answer
        logits = original("llama")(torch.tensor([text])).logits[0, -1 - len(passage.answer) : -1].float()
        wanted = torch.tensor(passage.answer)
        logp = logits.log_softmax(-1).gather(-1, wanted[:, None]).sum()
        assert math.isclose(nats, -float(logp), rel_tol=1e-4)
        assert (hits, count) == (int((logits.argmax(-1) == wanted).sum()), len(passage.answer))
    assert (held.rows, held.tokens) == (2, 73), "contexts are measured before their questions"


@torch.no_grad()
def test_eviction_shows() -> None:
    whole = answers(rewritten("llama", "full"), passages(), Held())
    cut = answers(rewritten("llama", "streaming_llm", budget=8, start=2, chunk=8), passages(), held := Held())
    assert all(abs(a[0] - b[0]) > 1e-3 for a, b in zip(whole, cut, strict=True))
    assert held.means()["slots"] == 8 * sum(map(len, held.means()["heads"].values()))


def test_training_rows_have_the_answers_as_labels() -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    text = " ".join(f"word{chr(97 + n % 26)}{chr(97 + n // 26)} river" for n in range(120))
    (row,) = encoded([{"text": text}], 4000, 0, tokenizer)
    runs = [[t for _, t in group] for kept, group in itertools.groupby(
        zip(row["labels"], row["input_ids"]), key=lambda pair: pair[0] != IGNORED) if kept]  # fmt: skip
    assert len(runs) == 4 and len(row["labels"]) == len(row["input_ids"])
    for run in runs:
        assert tokenizer.decode(run).strip().rstrip('"') in text
    assert encoded([{"text": "too short for a quote"}], 4000, 0, tokenizer) == []


pytestmark = pytest.mark.xdist_group("gate_lora")
