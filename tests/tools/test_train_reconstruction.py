"""KVzip as a teacher: labels are the policy's scores, and what learns from them ranks unseen text like it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvrewrite
from kvrewrite.assets import small_model
from kvrewrite.errors import OptionError, TrainingError
from kvrewrite.tools.training.kvzap import KVzapOptions, KVzapTask
from kvrewrite.tools.training.locret import LocretOptions, LocretTask
from kvrewrite.tools.training.reconstruction import LEAST, repeat
from kvrewrite.tools.training.trainer import IGNORED, FitOptions, collate
from tests.support.rewritten import build, rewritten

needs_trainer = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("accelerate", "datasets")), reason="needs kvrewrite[train]"
)
LENGTH = 96


def batch(rows: list[list[int]]) -> dict[str, Tensor]:
    return collate([{"input_ids": ids, "labels": [IGNORED] * len(ids)} for ids in rows])


def test_texts_stand_before_their_repetition() -> None:
    ids, real = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]).bool()
    found = repeat(ids, real, 2)
    assert found.ids[0].tolist() == [1, 2, 3, 4, 5, 3, 4, 5] and found.ids[1, :4].tolist() == [6, 7, 8, 8]
    assert found.text.sum(1).tolist() == [5, 3] and found.again.sum(1).tolist() == [3, 1]
    assert found.queries[0].tolist() == [5, 6, 7] and found.queries[1, 0] == 3
    assert found.counts.tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_labels_are_the_policys_scores(family: str) -> None:
    """Of each slot that stays, whatever else stands in the batch; with grouped heads, soft caps and windows."""
    rows = [torch.randperm(96, generator=torch.Generator().manual_seed(n))[:n].tolist() for n in (40, 23)]
    task = LocretTask(build(family), LocretOptions(hidden_size=8, label="reconstruction", n_sink=2))
    labels = task.observe(**batch(rows))[1]
    policy = rewritten(family, "kvzip", budget=12, n_sink=2)
    for row, ids in enumerate(rows):
        cache = policy.prefill(torch.tensor([ids]))
        compared = 0
        for lease in cache.leases:
            for i, layer in enumerate(lease.layers):
                site = policy.sites[layer]
                label = labels[[s.layer for s in task.owners].index(layer)][row]
                assert bool((label[:, :2] == -torch.inf).all()) and bool((label[:, len(ids) :] == -torch.inf).all())
                if site.window or site.chunk:
                    continue
                assert bool((label[:, 2 : len(ids)] > -torch.inf).all())
                scores = torch.ops.kvrewrite.read_pages(lease.store.score_pages, lease.table[i])[0]
                places = torch.ops.kvrewrite.read_pages(lease.store.pos_pages, lease.table[i])[0, ..., 0].long()
                for h, live in enumerate(lease.lens[i][0].tolist()):
                    kept = places[h, :live]
                    kept, held = kept[kept >= 2], scores[h, :live][kept >= 2]
                    expected = held.clamp(min=LEAST).log()
                    torch.testing.assert_close(label[h, kept], expected, rtol=0, atol=1e-4)
                    compared += len(kept)
        assert compared >= 12


def ranks(x: Tensor) -> Tensor:
    return x.argsort(-1).argsort(-1).double()


def agreement(scores: list[Tensor], labels: list[Tensor]) -> float:
    """Spearman's rank correlation, the mean over layers, rows and heads."""
    found = []
    for score, label in zip(scores, labels, strict=True):
        for s, x in zip(score.flatten(0, 1), label.flatten(0, 1), strict=True):
            counted = x > -torch.inf
            both = torch.stack([ranks(s[counted]), ranks(x[counted])])
            found.append(float(torch.corrcoef(both)[0, 1]))
    return sum(found) / len(found)


def texts(count: int) -> list[list[int]]:
    """Pieces of this repository's pages, in the small model's tokens."""
    pages = sorted((Path(kvrewrite.__file__).parents[1] / "docs").glob("*.md"))
    ids = AutoTokenizer.from_pretrained(small_model())(" ".join(p.read_text() for p in pages[:8]))["input_ids"]
    assert len(ids) >= count * LENGTH
    return [ids[n * LENGTH : (n + 1) * LENGTH] for n in range(count)]


def learned(task: Any, rows: list[list[int]], spoil: bool = False) -> float:
    """The agreement on the first four texts after a few steps on the others; spoil: labels of other tokens."""
    held, rest = batch(rows[:4]), [batch(rows[n : n + 4]) for n in range(4, len(rows), 4)]
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0)) if spoil else torch.arange(LENGTH)
    task.prepare(**rest[0])
    optimizer = torch.optim.AdamW(task.parameter_groups()[0]["params"], lr=task.options.lr)
    for _ in range(2):
        for one in rest:
            optimizer.zero_grad()
            scores, labels = task.observe(**one)
            task.loss(scores, [label[:, :, order] for label in labels]).total.backward()
            optimizer.step()
    with torch.no_grad():
        return agreement(*task.observe(**held))


@pytest.mark.parametrize("kind", ["linear", *(pytest.param(k, marks=pytest.mark.thorough) for k in ("mlp", "locret"))])
def test_a_student_ranks_unseen_text_like_the_teacher(kind: str) -> None:
    """And one that learns the labels of other tokens does not."""
    rows, found = texts(44 if kind == "locret" else 32), []
    for spoil in (False, True):
        model = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)
        if kind == "locret":
            options = LocretOptions(hidden_size=64, lr=5e-3, label="reconstruction", smoothing=0.0)
            found.append(learned(LocretTask(model, options), rows, spoil))
        else:
            options = KVzapOptions(hidden_size=0 if kind == "linear" else 64)
            found.append(learned(KVzapTask(model, options), rows, spoil))
    right, wrong = found
    assert right > 0.2 > 0.1 > wrong, found


@needs_trainer
@pytest.mark.parametrize("hidden_size", [pytest.param(0, marks=pytest.mark.thorough), 8])
def test_trained_and_used(tmp_path: Path, hidden_size: int) -> None:
    """The command's way from texts of both kinds to a cache of a quarter, over all layers."""
    data = tmp_path / "texts.jsonl"
    lines = [{"context": "The key is in the red box. " * 4, "turns": [["Where? ", "In the red box."]]}] * 3
    data.write_text("\n".join(map(json.dumps, lines)))
    fitting = FitOptions(steps=2, warmup=1, batch_size=2, quiet=True)
    done = kvrewrite.tools.training.train(  # type: ignore[attr-defined]
        small_model(),
        "kvzap",
        [data],
        tmp_path / "w.safetensors",
        options={"hidden_size": hidden_size},
        fitting=fitting,
    )
    assert done.written == [tmp_path / "w.safetensors"] and done.fitted.log[-1]["step"] == 2
    base = AutoModelForCausalLM.from_pretrained(small_model())
    small = kvrewrite.transform(
        base,
        "kvzap",
        policy_weights=tmp_path / "w.safetensors",
        threshold=None,
        budget=20,
        window=4,
        scope="model",
        check="off",
    )
    cache = small.prefill(torch.randint(5, 1000, (1, 80), generator=torch.Generator().manual_seed(0)))
    held = [len(head) for rows in cache.positions().values() for head in rows[0]]
    assert sum(held) == 20 * len(held) and len(set(held)) > 1


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match="label is 'reconstructions', expected one of logit, log_probability, reconstruction"
    ):
        LocretOptions(label="reconstructions")
    with pytest.raises(OptionError, match="n_sink is -1"):
        KVzapOptions(n_sink=-1)
    with pytest.raises(OptionError, match="hidden_size is -1, expected at least 0"):
        KVzapOptions(hidden_size=-1)
    task = KVzapTask(build("llama"), KVzapOptions(hidden_size=0))
    with pytest.raises(OptionError, match="labels of a repetition are not kept in a file"):
        task.use_labels(tmp_path / "labels", None, {})
    short = LocretTask(build("gpt2"), LocretOptions(hidden_size=8, label="reconstruction"))
    assert short.longest == (256 + 4) // 2
    with pytest.raises(TrainingError, match=r"texts of 131 tokens are longer than the model takes in training \(130"):
        short.observe(**batch([list(range(1, 90)) + list(range(1, 43))]))
