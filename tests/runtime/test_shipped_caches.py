"""What torch.compile leaves in its cache folders serves a process that has copies of them elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, torch, kvrewrite
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = kvrewrite.transform(LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).eval(), "h2o", budget=16)
model.compile()
ids = torch.randint(1, 90, (1, 40), generator=torch.Generator().manual_seed(0))
answer = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
found = torch._dynamo.utils.counters["inductor"]
print(json.dumps([answer.tolist(), found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]]))
"""


def answer(folder: Path) -> Any:
    """The tokens, and how often Inductor found a graph in its cache and did not, of a process with caches in `folder`."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **caches}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.thorough
def test_shipped_caches_are_found(tmp_path: Path) -> None:
    """Nothing is compiled again, and the answer is the same."""
    first, hits, misses = answer(tmp_path / "made")
    assert not hits and misses
    shutil.move(tmp_path / "made", tmp_path / "shipped")
    assert answer(tmp_path / "shipped") == [first, misses, 0]
