"""`kvrewrite train` as a user calls it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvrewrite.artifact.policy_weights import read_policy_weights
from kvrewrite.cli.app import main
from tests.support.tiny import make_checkpoint

pytestmark = [
    pytest.mark.xdist_group("train_cli"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(n) is None for n in ("accelerate", "datasets")), reason="needs kvrewrite[train]"
    ),
]
SHORT = ["--steps", "4", "--warmup", "1", "-o", "hidden_size=8", "-o", "lr=0.01", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    lines = [{"prompt": f"The quick brown fox {i} jumps over the lazy", "answer": " dog. She sells"} for i in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of a run that nothing stopped, with labels of its own."""
    path = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    assert run("train", model, "-p", "locret", "-d", data, *SHORT, "--batch-size", 2, "--out", path).exit_code == 0
    return path


def test_trained_converted_and_run(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "heads.safetensors"
    plot = ["--plot", tmp_path / "loss.png"] if importlib.util.find_spec("matplotlib") else []
    made = run("train", model, "-p", "locret", "-d", data, "--out", out, *SHORT, "--max-tokens", 8, "--json", *plot)
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout)
    assert said["steps"] == 4 and said["written"][0] == str(out) and len(said["log"]) == 1
    assert said["texts"]["read"] >= 4 and said["texts"]["cut"] > 0
    assert not plot or (tmp_path / "loss.png").stat().st_size > 1000
    _, metadata = read_policy_weights(out)
    assert metadata["policy"] == "locret" and metadata["base_model_name"] == "tiny" and len(metadata["data"]) == 64
    assert json.loads(metadata["training"])["fitting"]["steps"] == 4 and len(metadata["base_model_hash"]) == 64
    options = ["-o", "budget=24", "-o", "chunk=8", "-o", "stabilizers=4", "-o", "local_tail=2"]
    made = run("convert", model, "-p", "locret", "--policy-weights", out, *options, "--out", tmp_path / "converted")
    assert made.exit_code == 0, made.output
    again = run("train", model, "-p", "locret", "-d", data, "--out", out, *SHORT)
    assert again.exit_code == 1 and "exists; choose another name" in again.stderr
    again = run(
        "train", tmp_path / "converted", "-p", "locret", "-d", data, "--out", tmp_path / "x.safetensors", *SHORT
    )
    assert again.exit_code == 1 and "train on the original" in again.stderr


def test_stopped_and_resumed(model: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    common = ["train", model, "-p", "locret", "-d", data, *SHORT, "--batch-size", 2]
    folder = ["--checkpoints", tmp_path / "checkpoints", "--save-every", 2]
    assert run(*common, "--out", tmp_path / "first.safetensors", *folder).exit_code == 0
    last = tmp_path / "checkpoints" / "checkpoint-4"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    made = run(*common, "--out", tmp_path / "rest.safetensors", *folder, "--resume", "--json")
    assert made.exit_code == 0 and json.loads(made.stdout)["resumed_at"] == 2
    other = [*common, "--out", tmp_path / "other.safetensors", *folder]
    for extra, words in (
        (["--resume", "--weight-decay", 0.5], "weight_decay"),
        (["--resume", "--max-tokens", 9], "max_tokens was"),
        ([], "has checkpoints already"),
    ):
        made = run(*other, *extra)
        assert made.exit_code == 1 and words in made.stderr
    expected, rest = (read_policy_weights(path)[0] for path in (whole, tmp_path / "rest.safetensors"))
    assert all((expected[name] == rest[name]).all() for name in expected)


def test_labels_once(model: Path, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made by the first run, read by the next, and the same heads as with labels of its own; refused where they don't fit."""
    common = ["train", model, "-p", "locret", "-d", data, *SHORT, "--batch-size", 2]
    file = ["--labels", tmp_path / "labels.safetensors"]
    assert run(*common, "--out", tmp_path / "first.safetensors", *file).exit_code == 0
    monkeypatch.setattr(
        "kvrewrite.tools.training.locret.causal_importance", None
    )  # from here on they are in the file or nowhere
    assert run(*common, "--out", tmp_path / "second.safetensors", *file).exit_code == 0
    paths = whole, tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    own, first, second = (read_policy_weights(path)[0] for path in paths)
    assert all((first[name] == second[name]).all() and (own[name] == first[name]).all() for name in own)
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("fox 3", "fox 4"))
    no = ["--out", tmp_path / "no.safetensors"]
    for arguments, words in (
        ([*common, *file, "-o", "label=log_probability"], "label is logit, expected log_probability"),
        (["train", model, "-p", "locret", "-d", other, *SHORT, *file], "of another run: data is"),
        (["train", model, "-p", "attention_gate", "-d", data, *file], "attention_gate is trained without labels"),
    ):
        made = run(*arguments, *no)
        assert made.exit_code == 1 and words in made.stderr, made.output
    assert not no[1].exists()


def test_wrong_usage(model: Path, data: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "x.safetensors"]
    for arguments, status, words in (
        ([model, "-p", "locret", "-d", data, *out, "--resume"], 2, "--resume needs --checkpoints"),
        ([model, "-p", "h2o", "-d", data, *out], 2, "h2o"),
        ([model, "-p", "locret", "-d", data, *out, "-o", "width=3"], 1, "no option 'width'"),
        ([model, "-p", "locret", "-d", data, *out, "-o", "lr=fast"], 1, "lr is 'fast', expected a number"),
        ([model, "-p", "locret", "-d", data, "--out", tmp_path / "x.bin"], 1, "should end in .safetensors"),
        ([model, "-p", "locret", "-d", tmp_path / "none.jsonl", *out], 1, "does not exist"),
        ([tmp_path, "-p", "locret", "-d", data, *out], 1, "no config.json"),
        ([model, "-p", "attention_gate", "-d", data, *out, "-o", "mode=pretrain"], 1, "expected text"),
    ):
        made = run("train", *arguments)
        assert made.exit_code == status and words in made.stderr, (arguments, made.output)
    assert not (tmp_path / "x.safetensors").exists()
