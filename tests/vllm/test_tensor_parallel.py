"""`tensor_parallel_size=2` under vLLM itself, on the CPU: the tokens of one worker, half the cache in each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import environment
from tests.vllm.conftest import SETTINGS

RUN = """
import json, random, sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    sizes = {"max_model_len": 256, "max_num_seqs": 4, "kv_cache_memory_bytes": 40_000_000}
    llm = LLM(sys.argv[1], tensor_parallel_size=int(sys.argv[2]), **sizes)
    numbers = random.Random(1)
    prompts = [{"prompt_token_ids": [numbers.randrange(3, 2048) for _ in range(n)]} for n in (170, 10, 130, 64, 33)]
    out = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in out]))
"""


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["h2o", "tova"])
def test_two_workers(policy: str, vllm: Any, directory: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import tests.vllm.cpu_ops")  # workers are processes of their own
    (tmp_path / "run.py").write_text(RUN)
    tokens = []
    for workers in ("1", "2"):
        more = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(workers) - 1)}
        command = [sys.executable, str(tmp_path / "run.py"), str(directory(policy)), workers]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment(tmp_path, **SETTINGS | more), timeout=280
        )
        found = [line for line in done.stdout.splitlines() if line.startswith("TOKENS")]
        assert found, done.stdout[-2000:] + done.stderr[-2000:]
        tokens.append(json.loads(found[0].removeprefix("TOKENS")))
    assert tokens[0] == tokens[1]
