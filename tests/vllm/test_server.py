"""vLLM's server over HTTP, its engine in a process of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import kvrewrite
from tests.support import processes
from tests.vllm.conftest import SETTINGS
from tests.vllm.test_engine import NEW, prompts

pytestmark = pytest.mark.xdist_group("vllm")
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 100, "kv_cache_memory_bytes": 40_000_000}


@pytest.fixture
def environment(tmp_path: Path, vllm: Any) -> dict[str, str]:
    """For processes that begin with the ops that the wheel does not have on a CPU."""
    (tmp_path / "sitecustomize.py").write_text("import tests.vllm.cpu_ops")
    return processes.environment(tmp_path, **SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})


@pytest.fixture(scope="module")
def expected(directory: Callable[[str], Path]) -> list[list[int]]:
    model = kvrewrite.load(directory("h2o"))
    ids = [torch.tensor([p]) for p in prompts()]
    answers = [model.generate(i, max_new_tokens=NEW, eos_token_id=-1, do_sample=False) for i in ids]
    return [a[0, i.shape[1] :].tolist() for a, i in zip(answers, ids)]


@contextmanager
def server(directory: Path, environment: dict[str, str]) -> Iterator[str]:
    """`vllm serve`; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(directory), f"--port={port}", *flags]
    process = subprocess.Popen([*command, "--host=127.0.0.1", "--served-model-name=small"], env=environment)
    try:
        for _ in range(240):
            time.sleep(1)
            assert process.poll() is None, "the server ended"
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                continue
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_the_server(directory: Any, expected: list[list[int]], environment: dict[str, str]) -> None:
    """Clients at once, one that goes away, one that asks for what is refused, and the metrics."""
    with server(directory("h2o"), environment) as address:
        asked = {"model": "small", "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}

        def ask(prompt: list[int], **more: Any) -> httpx.Response:
            return httpx.post(f"{address}/v1/completions", json={**asked, "prompt": prompt, **more}, timeout=120)

        def leave() -> None:
            gone = {**asked, "prompt": prompts()[5], "stream": True, "max_tokens": 50}
            with httpx.stream("POST", f"{address}/v1/completions", json=gone, timeout=120) as reply:
                next(reply.iter_lines())

        with ThreadPoolExecutor(9) as clients:
            goes = clients.submit(leave)
            answers = [c.result() for c in [clients.submit(ask, p) for p in prompts()]]
            goes.result()
        assert [a.json()["choices"][0]["token_ids"] for a in answers] == expected
        refused = ask(prompts()[1], prompt_logprobs=1)
        assert refused.status_code == 400 and "prompt_logprobs" in refused.text
        assert ask(prompts()[0] * 2).status_code == 400  # longer than --max-model-len
        metrics = httpx.get(f"{address}/metrics").text
        assert 'vllm:num_requests_running{engine="0",model_name="small"} 0.0' in metrics
