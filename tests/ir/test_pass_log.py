"""Passes in TORCH_LOGS and TORCH_TRACE, which torch reads once, so each in a process of its own."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PASSES = ["capture", "normalize", "canonicalize", "carry_state", "lift_positions", "validate", "insert_cache"]
LOWERED = ["fold_heads"] + [
    f"prefill_{p}" for p in ("rank_all_layers", "fuse_reads", "turn_both", "overlap", "fuse_gates", "erase_dead")
]
DECODE = [
    "fuse_reads", "ignore_flags", "fuse_mass", "take_the_only_row", "keep_pages", "fuse_updates", "turn_keys_in_attention",
    "fuse_linears", "fuse_norms", "erase_dead",
]  # fmt: skip
CODE = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, kvrewrite
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
small = kvrewrite.transform(LlamaForCausalLM(config), policy="streaming_llm", budget=16)
"""
# The passes behind `compile`, without a compiler.
COMPILED = (
    CODE
    + """
small.compile(static_decode=True, backend="eager")
small.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=3, pad_token_id=0)
"""
)


def logged(code: str = CODE, **settings: str) -> str:
    """stderr of a transformation under these environment variables."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    clean = {k: v for k, v in os.environ.items() if k not in ("TORCH_LOGS", "TORCH_TRACE")}
    env = {**clean, "PYTHONPATH": paths, **settings}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def check_counts(text: str) -> None:
    """Every pass is there once, with counts that follow from each other."""
    lines = re.findall(r"(\w+): (?:(\d+) -> )?(\d+) nodes(, [\d.]+ ms)?$", text, re.MULTILINE)
    assert [line[0] for line in lines] == PASSES
    assert [bool(line[3]) for line in lines] == [p != "capture" for p in PASSES]
    assert all(int(line[1]) == int(before[2]) for before, line in itertools.pairwise(lines) if line[1])


def test_graphs_in_torch_logs() -> None:
    text = logged(TORCH_LOGS="+kvrewrite")
    check_counts(text)
    assert [p for p in PASSES if f"graph after {p}:" in text] == PASSES
    last = text[text.index("insert_cache:") :]
    listed = re.findall(r"[ \]]    (?:%\w+ : |return )", last)
    assert int(re.findall(r"insert_cache: (\d+) nodes", last)[0]) == len(listed)


def test_trace(tmp_path: Path) -> None:
    """Lowering for `compile`, too: each pass by name, once for every program that is made."""
    text = logged(COMPILED, TORCH_LOGS="kvrewrite", TORCH_TRACE=str(tmp_path))
    first, second = text[: text.index("fold_heads:")], text[text.index("fold_heads:") :]
    check_counts(first)
    assert "graph after" not in text
    lines = re.findall(
        r"(\w+): (?:(\d+) -> )?(\d+) (?:nodes|parts, \d+ distinct of \d+ nodes), [\d.]+ ms$", second, re.MULTILINE
    )
    decode = [f"decode_{p}" for p in DECODE]
    lowered = [line[0] for line in lines]
    assert lowered == [*LOWERED, "partition", *decode, "partition"]
    for before, line in itertools.pairwise(lines):
        assert not line[1] or line[1] == before[2]
    written = "".join(p.read_text() for p in tmp_path.iterdir())
    records = [
        json.loads(line[line.index("{") :]) for line in written.splitlines() if line.startswith("V") and "{" in line
    ]
    names = [r["artifact"]["name"] for r in records if r.get("artifact", {}).get("name", "").startswith("kvrewrite_")]
    assert names == [f"kvrewrite_{p}" for p in [*PASSES, *lowered]]
    assert "torch.ops.kvrewrite.cached_attention" in written and "torch.ops.kvrewrite.decode_attention" in written
