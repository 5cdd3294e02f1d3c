"""Models that several processes run together (gloo on the CPU): the tokens, sets and logits of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kvrewrite
from kvrewrite.errors import ArtifactError, OptionError
from tests.support.ranks import run_ranks
from tests.support.tiny import TEXT, make_checkpoint

IDS = torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(3))
POLICIES = {"h2o": {"budget": 16}, "tova": {"budget": 16, "chunk": 16}, "streaming_llm": {"budget": 16, "chunk": 16}}


def answers(model: Any) -> dict[str, Any]:
    """What a model makes of a text: plain data."""
    fixed = {"max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0}
    cache = model.new_cache(2)
    greedy = model.generate(IDS, cache=cache, do_sample=False, **fixed)
    sampled = model.generate(IDS, do_sample=True, **fixed)
    logits = model(IDS).logits
    kept = {layer: [list(map(list, row)) for row in rows] for layer, rows in cache.positions().items()}
    weights = sum(p.nbytes for p in model.parameters())
    found = {"greedy": greedy.tolist(), "sampled": sampled.tolist(), "kept": kept, "weights": weights}
    return {**found, "logits": logits.tolist(), "leased": cache.memory().leased}


def in_ranks(rank: int, directories: dict[str, str]) -> dict[str, Any]:
    found = {}
    for policy, directory in directories.items():
        model = kvrewrite.load(directory, tp_plan="auto", tp_size=2)
        torch.manual_seed(rank)  # rank 0's counts
        found[policy] = answers(model)
    with pytest.raises(OptionError, match="tp_size is 3, but there are 2"):
        kvrewrite.load(directory, tp_size=3)
    with pytest.raises(ArtifactError, match="can't be saved"):
        model.save_pretrained("nowhere")
    with pytest.raises(OptionError, match="same ids"):
        model.generate(IDS[:, rank:], max_new_tokens=1, pad_token_id=0)
    return found


def test_two_processes(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    directories = {policy: str(tmp_path / policy) for policy in POLICIES}
    for policy, options in POLICIES.items():
        kvrewrite.convert(base, directories[policy], policy, check="off", **options)
    parts = run_ranks(2, in_ranks, directories)
    for policy, directory in directories.items():
        torch.manual_seed(0)
        whole = answers(kvrewrite.load(directory))
        for part in parts:
            own = part[policy]
            assert own["greedy"] == whole["greedy"] and own["sampled"] == whole["sampled"]
            torch.testing.assert_close(torch.tensor(own["logits"]), torch.tensor(whole["logits"]), atol=2e-6, rtol=1e-5)
            assert own["leased"] * 2 == whole["leased"]
            assert own["weights"] < 0.55 * whole["weights"]  # norms are on both
        assert parts[0][policy]["logits"] == parts[1][policy]["logits"]  # bit by bit
        for layer, rows in whole["kept"].items():
            for row, heads in enumerate(rows):
                assert [head for part in parts for head in part[policy]["kept"][layer][row]] == heads


@pytest.mark.thorough
def test_command(tmp_path: Path) -> None:
    kvrewrite.convert(make_checkpoint(tmp_path / "base"), tmp_path / "out", "h2o", budget=16, check="off")
    asked = ["-m", "kvrewrite", "generate", str(tmp_path / "out"), "--prompt", TEXT, "--max-new-tokens", "8"]
    asked += ["--sample", "--seed", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [
        [sys.executable, *asked],
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *asked],
    ]
    alone, together = (
        subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280) for command in commands
    )
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout and alone.stdout


def test_alone(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    kvrewrite.convert(make_checkpoint(tmp_path / "base"), directory, "h2o", budget=16, check="off")
    with pytest.raises(OptionError, match="torchrun"):
        kvrewrite.load(directory, tp_plan="auto")
    with pytest.raises(OptionError, match='expected "auto"'):
        kvrewrite.load(directory, tp_plan="colwise")
    assert kvrewrite.load(directory, tp_size=1).program.parallel is None
