"""Passes in TORCH_LOGS and TORCH_TRACE, which torch reads once, so in a process of its own."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from torch import fx, nn

from kvrewrite.ir.pass_log import PassLog, log
from tests.support.processes import environment

pytestmark = pytest.mark.xdist_group("pass log")

ROOT = Path(__file__).resolve().parents[2]
PASSES = ["capture", "normalize", "canonicalize", "carry_state", "lift_positions", "validate", "insert_cache"]
LOWERED = ["fold_heads"] + [
    f"prefill_{p}" for p in ("rank_all_layers", "fuse_reads", "rotate_both", "overlap", "fuse_gates", "erase_dead")
]
DECODE = [
    "nothing_repeats", "fuse_reads", "ignore_flags", "fuse_mass", "take_the_only_row", "keep_pages", "fuse_updates",
    "rotate_keys_in_attention", "fuse_linears", "fuse_norms", "erase_dead",
]  # fmt: skip
CODE = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, kvrewrite
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
small = kvrewrite.transform(LlamaForCausalLM(config), policy="streaming_llm", budget=16)
# The passes of `compile`, without a compiler.
small.compile(static_decode=True, backend="eager")
small.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=3, pad_token_id=0)
"""


@functools.cache
def logged() -> tuple[str, str, str]:
    """stderr of a transformation and of what `compile` does after it, and what torch's trace has."""
    with tempfile.TemporaryDirectory() as traced:
        env = environment(TORCH_LOGS="+kvrewrite", TORCH_TRACE=traced)
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        written = "".join(p.read_text() for p in Path(traced).iterdir())
    at = done.stderr.index("fold_heads:")
    return done.stderr[:at], done.stderr[at:], written


def check_counts(text: str) -> None:
    """Every pass is there once, with counts that follow from each other."""
    lines = re.findall(r"(\w+): (?:(\d+) -> )?(\d+) nodes(, [\d.]+ ms)?$", text, re.MULTILINE)
    assert [line[0] for line in lines] == PASSES
    assert [bool(line[3]) for line in lines] == [p != "capture" for p in PASSES]
    assert all(int(line[1]) == int(before[2]) for before, line in itertools.pairwise(lines) if line[1])


def test_graphs_in_torch_logs() -> None:
    text, _, _ = logged()
    check_counts(text)
    assert [p for p in PASSES if f"graph after {p}:" in text] == PASSES
    last = text[text.index("insert_cache:") :]
    listed = re.findall(r"[ \]]    (?:%\w+ : |return )", last)
    assert int(re.findall(r"insert_cache: (\d+) nodes", last)[0]) == len(listed)


def test_one_line_per_pass(caplog: pytest.LogCaptureFixture) -> None:
    """Graphs are logged only where they are asked for."""
    gm = fx.symbolic_trace(nn.Linear(2, 2))
    for level, found in ((logging.INFO, 0), (logging.DEBUG, 1)):
        caplog.clear()
        with caplog.at_level(level, log.name):
            PassLog().done("a_pass", gm)
        first, *graphs = [r.message for r in caplog.records if r.name == log.name]
        assert first.startswith(f"a_pass: {len(gm.graph.nodes)} nodes, ")
        assert len(graphs) == sum(m.startswith("graph after a_pass:") for m in graphs) == found


def test_trace() -> None:
    """Lowering for `compile`, too: each pass by name, once for every program that is made."""
    _, second, written = logged()
    lines = re.findall(
        r"(\w+): (?:(\d+) -> )?(\d+) (?:nodes|parts, \d+ distinct of \d+ nodes), [\d.]+ ms$", second, re.MULTILINE
    )
    decode = [f"decode_{p}" for p in DECODE]
    lowered = [line[0] for line in lines]
    assert lowered == [*LOWERED, "partition", *decode, "partition"]
    for before, line in itertools.pairwise(lines):
        assert not line[1] or line[1] == before[2]
    records = [
        json.loads(line[line.index("{") :]) for line in written.splitlines() if line.startswith("V") and "{" in line
    ]
    names = [r["artifact"]["name"] for r in records if r.get("artifact", {}).get("name", "").startswith("kvrewrite_")]
    assert names == [f"kvrewrite_{p}" for p in [*PASSES, *lowered]]
    assert "torch.ops.kvrewrite.cached_attention" in written and "torch.ops.kvrewrite.decode_attention" in written
