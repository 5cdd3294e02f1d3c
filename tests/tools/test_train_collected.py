"""Heads that learn from what was kept of one pass over the texts: the same scores and labels, and they rank unseen text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvrewrite
from kvrewrite.assets import small_model
from kvrewrite.errors import OptionError, TrainingError
from kvrewrite.tools.training.collected import Collector, regress
from kvrewrite.tools.training.head_stack import stacked
from kvrewrite.tools.training.heads_graph import head_graphs
from kvrewrite.tools.training.kvzap import KVzapOptions, KVzapTask
from kvrewrite.tools.training.locret import LocretOptions, LocretTask
from kvrewrite.tools.training.trainer import FitOptions
from tests.support.rewritten import build
from tests.tools.test_train_reconstruction import agreement, batch, needs_trainer, texts


def rows_of(ids: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"input_ids": row, "labels": list(row)} for row in ids]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["kvzap", "locret"])
def test_what_is_kept_gives_the_scores_and_labels_of_the_texts(family: str, kind: str) -> None:
    """Of each head that has labels, of as many tokens as there is room for; layers that hide the text keep nothing."""
    task: Any
    if kind == "kvzap":
        task = KVzapTask(build(family), KVzapOptions(hidden_size=8, n_sink=2))
    else:
        task = LocretTask(build(family), LocretOptions(hidden_size=8, label="reconstruction", n_sink=2))
    ids = [torch.randperm(96, generator=torch.Generator().manual_seed(n))[:n].tolist() for n in (40, 23)]
    every, few = Collector(task, 64, seed=0), Collector(task, 7, seed=0)
    for collector in (every, few):
        collector.add(rows_of(ids))
    whole, part = every.examples(), few.examples()
    scores, labels = task.observe(**batch(ids))
    for n, (head, score, label) in enumerate(zip(head_graphs(task.__dict__["graph"]), scores, labels, strict=True)):
        counted = (label > -torch.inf).all(1)
        assert len(whole.labels[n]) == counted.sum()
        torch.testing.assert_close(whole.labels[n], label.transpose(1, 2)[counted], rtol=0, atol=0)
        made = head(whole.reads[n][None])[0].T
        torch.testing.assert_close(made, score.transpose(1, 2)[counted], rtol=1e-5, atol=1e-6)
        assert len(part.labels[n]) == counted.sum(1).clamp(max=7).sum()
        assert set(map(tuple, part.labels[n].tolist())) <= set(map(tuple, whole.labels[n].tolist()))
    assert len(whole.labels[-1]) == 38 + 21


@pytest.mark.parametrize("kind", ["kvzap", "linear", "locret"])
def test_heads_run_as_one(kind: str) -> None:
    """Scores and gradients of stacked heads are those of each by itself, and what was trained is theirs afterwards."""
    task: Any
    if kind == "locret":
        task = LocretTask(build("llama"), LocretOptions(hidden_size=8, label="reconstruction"))
    else:
        task = KVzapTask(build("llama"), KVzapOptions(hidden_size=8 if kind == "kvzap" else 0))
    heads = head_graphs(task.__dict__["graph"])
    (stack,) = stacked(heads, list(range(len(heads))))
    assert stack.heads == list(range(len(heads))) and len(heads) > 1
    width = task.look(**batch([[1, 2, 3]]))[2][0].shape[-1]
    reads = torch.randn(len(heads), 5, width, generator=torch.Generator().manual_seed(0))
    apart = torch.stack([head(read[None])[0] for head, read in zip(heads, reads, strict=True)])
    together = stack.scores(stack.heads, reads)
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(stack.scores([1], reads[1:2]), apart[1:2])
    apart.square().sum().backward()
    together.square().sum().backward()
    for weight, own in zip(stack.weights.values(), zip(*stack.own, strict=True), strict=True):
        torch.testing.assert_close(weight.grad, torch.stack([p.grad for p in own]))
        weight.data += 1
    stack.write_back()
    torch.testing.assert_close(heads[1](reads[1:2])[0], stack.scores([1], reads[1:2])[0])
    assert not torch.allclose(stack.scores([1], reads[1:2])[0], apart[1])


def test_heads_of_other_shapes_are_not_stacked() -> None:
    """They differ by more than the values of their weights."""
    ours, other = (KVzapTask(build("llama"), KVzapOptions(hidden_size=n)) for n in (8, 16))
    graphs = [head_graphs(task.__dict__["graph"])[0] for task in (ours, other)]
    assert [stack.heads for stack in stacked(graphs, [0, 1])] == [[0], [1]]


@needs_trainer
def test_heads_learn_from_what_is_kept() -> None:
    """They rank unseen text like the teacher, and the loss on the texts that were put aside says so."""
    ids = texts(24)
    task = KVzapTask(
        AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32), KVzapOptions(hidden_size=32)
    )
    with torch.no_grad():
        before = agreement(*task.observe(**batch(ids[:4])))
    options = FitOptions(
        steps=60,
        warmup=5,
        batch_size=4,
        collect=20,
        collect_tokens=64,
        rows=512,
        clip_value=0,
        log_every=59,
        quiet=True,
    )
    log = regress(task, rows_of(ids[4:]), options).log
    with torch.no_grad():
        after = agreement(*task.observe(**batch(ids[:4])))
    assert [entry["step"] for entry in log] == [59, 60]
    assert after > 0.25 > abs(before), (before, after)
    aside = task.observe(**batch(ids[4:5]))[1]
    constant = sum(label[label > -torch.inf].var() for label in aside) / len(aside)
    assert 0 < log[-1]["held"] < constant, (log, constant)


def test_what_can_not_learn_from_kept_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no neighbours"):
        regress(LocretTask(build("llama"), LocretOptions(hidden_size=8)), [], FitOptions(collect=2, warmup=1))
    with pytest.raises(OptionError, match="at least 2 texts"):
        FitOptions(collect=1)
    with pytest.raises(OptionError, match="no checkpoints"):
        FitOptions(collect=4, checkpoints=tmp_path)
    task = KVzapTask(build("llama"), KVzapOptions(hidden_size=8))
    short = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    with pytest.raises(TrainingError, match="no token has a label"):
        regress(task, short, FitOptions(collect=4, steps=2, warmup=1, quiet=True))


@needs_trainer
@pytest.mark.parametrize("policy", ["kvzap", "locret"])
def test_the_command_collects(tmp_path: Path, policy: str) -> None:
    """From a file of texts to weights that convert."""
    data, out = tmp_path / "texts.jsonl", tmp_path / "w.safetensors"
    data.write_text(
        "\n".join(json.dumps({"text": f"Box {n} is red. The key lies in box {n + 1}. " * 4}) for n in range(3))
    )
    options = {"hidden_size": 8, "label": "reconstruction", "smoothing": 0.0}
    fitting = FitOptions(steps=3, warmup=1, batch_size=2, collect=5, rows=16, quiet=True)
    train = kvrewrite.tools.training.train  # type: ignore[attr-defined]
    done = train(small_model(), policy, [data], out, options=options, fitting=fitting)
    assert done.fitted.log[-1]["step"] == 3 and done.written == [out]
    base = AutoModelForCausalLM.from_pretrained(small_model())
    made = kvrewrite.transform(base, policy, policy_weights=out, budget=0.5, check="off")
    assert made.policy.hidden_size == 8
    with pytest.raises(OptionError, match="leave --labels"):
        train(small_model(), policy, [data], out, options=options, fitting=fitting, labels=tmp_path / "l", force=True)
    with pytest.raises(OptionError, match="leave collect out"):
        train(small_model(), "attention_gate", [data], out, fitting=fitting, force=True)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("kvzap", {"threshold": None, "scope": "model", "window": 4, "budget": 0.5}),
        ("kvzap", {"threshold": 100.0, "window": 4}),
        ("locret", {"chunk": 16, "stabilizers": 4, "local_tail": 2, "budget": 0.5}),
    ],
)
def test_tokens_that_heads_learned_nothing_of_stay(tmp_path: Path, policy: str, options: dict[str, Any]) -> None:
    """The first tokens have no labels of a repetition, so what heads say of them means nothing; they are the model's sinks."""
    task: Any
    if policy == "kvzap":
        task = KVzapTask(build("llama"), KVzapOptions(hidden_size=8, n_sink=3))
    else:
        task = LocretTask(build("llama"), LocretOptions(hidden_size=8, label="reconstruction", n_sink=3))
    for head in task.heads:
        torch.nn.init.normal_(head, std=0.2)
    (file,) = task.save(tmp_path / "w.safetensors", {})
    model = kvrewrite.transform(build("llama"), policy, policy_weights=file, check="off", **options)
    assert model.policy.n_sink == 3
    cache = model.new_cache()
    model(torch.randperm(96, generator=torch.Generator().manual_seed(5))[None, :32], past_key_values=cache)
    for rows in cache.positions().values():
        for head in rows[0]:
            assert {0, 1, 2} <= set(head) and len(head) < 32
