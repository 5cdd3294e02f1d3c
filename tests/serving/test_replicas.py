"""Replicas under Ray Serve (examples/ray_serve.py): one is killed while it answers. Needs Ray, which is not in the test extra."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvrewrite
from kvrewrite.artifact.companions import read_tokenizer
from tests.support.tiny import make_checkpoint

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
pytestmark = pytest.mark.thorough

PORT = 18732
PROMPTS = ["A cache keeps what matters.", "Some tokens are read often,", "others never again.", "Which ones go?"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    kvrewrite.convert(make_checkpoint(tmp_path / "base"), tmp_path / "out", "h2o", budget=16, check="off")
    return tmp_path / "out"


@pytest.fixture
def replicas(directory: Path) -> Iterator[Any]:
    from ray import serve

    from examples.ray_serve import Settings, application

    root = str(Path(__file__).resolve().parents[2])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    serve.start(http_options={"port": PORT})
    serve.run(application(Settings(model=str(directory), name="tiny", replicas=2, cpus_per_replica=0.5)))
    yield serve
    serve.shutdown()
    ray.shutdown()


def ask(prompt: str, tokens: int) -> str:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        text: str = json.loads(answer.read())["choices"][0]["text"]
        return text


def workers() -> set[int]:
    """Processes of replicas, by the title that Ray gives them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if path.read_bytes().startswith(b"ray::ServeReplica"):
                found.add(int(path.parent.name))
    return found


def test_a_replica_that_is_killed(directory: Path, replicas: Any) -> None:
    """The other one's answers arrive and are right, those of the killed one fail and nothing hangs; it is replaced."""
    model, tokenizer = kvrewrite.load(directory), read_tokenizer(directory)
    expected = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected[prompt] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    before = workers()
    killed = min(before)
    assert len(before) == 2
    answers: list[str | None] = []

    def many(prompt: str) -> None:
        for _ in range(12):
            try:
                text = ask(prompt, 60)
            except OSError:  # the connection of the killed one
                answers.append(None)
            else:
                assert text == expected[prompt], (prompt, text)
                answers.append(text)

    failures: list[BaseException] = []
    previous, threading.excepthook = threading.excepthook, lambda args: failures.append(args.exc_value)  # type: ignore[arg-type]
    try:
        threads = [threading.Thread(target=many, args=(prompt,)) for prompt in PROMPTS]
        for thread in threads:
            thread.start()
        while len(answers) < 6:
            time.sleep(0.05)
        os.kill(killed, signal.SIGKILL)
        for thread in threads:
            thread.join(240)
    finally:
        threading.excepthook = previous
    assert not failures and not any(thread.is_alive() for thread in threads)
    lost = answers.count(None)
    assert len(answers) == 48 and lost <= len(PROMPTS) * 2, f"{lost} of {len(answers)} answers were lost"
    end = time.time() + 60
    while len(now := workers() - {killed}) < 2:
        assert time.time() < end, f"no replacement: {now}"
        time.sleep(1)
    assert before - {killed} <= now
    assert all(ask(prompt, 60) == expected[prompt] for prompt in PROMPTS)
