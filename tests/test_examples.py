"""Every example runs as it is; the README's policy works as it is printed."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvrewrite.policies import POLICIES
from tests.support.zoo import make

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


# A tenth of the tokens leaves the window, the model's longest text and many pages behind as well.
ARGUMENTS = {"long_decode": ["1000"]}


def test_there_are_examples():
    assert {p.stem for p in EXAMPLES} >= {"transform_and_generate", "custom_policy", "foreign_module"}


# How the shipped model and its data were made: long, and seldom changed.
MAKING = {"policy_training_data", "small_model_data", "train_small_model"}


# The first example stands for all in a process of its own; the others run in this one, which has imported everything.
ALONE = {"transform_and_generate"}


@pytest.mark.parametrize(
    "path",
    [p if p.stem in ALONE else pytest.param(p, marks=pytest.mark.thorough) for p in EXAMPLES],
    ids=[p.stem for p in EXAMPLES],
)
def test_example(path, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), *ARGUMENTS.get(path.stem, [])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check(done.stdout, done.stderr, tmp_path)


def check(stdout, stderr, folder):
    assert stdout.strip()
    assert "deprecated and will be removed" not in stderr  # by transformers; torch says so of its own use
    assert not list(folder.iterdir())  # and leaves nothing behind


@pytest.mark.parametrize("name", sorted({p.stem for p in EXAMPLES} - MAKING - ALONE))
def test_example_in_this_process(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path, policies = ROOT / "examples" / f"{name}.py", dict(POLICIES)
    monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS.get(name, [])])
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        torch._dynamo.reset()
        for added in POLICIES.keys() - policies.keys():
            POLICIES.pop(added)
    check(*capfd.readouterr(), tmp_path)


def test_policy_in_the_readme(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    block = next(b for b in blocks if "class LargestKeys" in b)
    names = {"model": make("llama"), "__name__": "builtins"}
    try:
        # Without this file's own `from __future__ import annotations`.
        exec(compile("import kvrewrite\n" + block, "README.md", "exec", dont_inherit=True), names)
        small = names["small"]
        cache = small.new_cache()
        small(torch.randint(0, 97, (1, 100)), past_key_values=cache)
        kept = cache.positions()[0][0][0]
        assert len(kept) == 48
        assert kept[-16:] == list(range(84, 100))
        small.save_pretrained(tmp_path / "out")
        assert type(names["kvrewrite"].load(tmp_path / "out").policy).__name__ == "LargestKeys"
    finally:
        POLICIES.pop("largest_keys", None)
