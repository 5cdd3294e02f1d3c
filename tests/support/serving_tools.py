"""A server of `kvrewrite serve` on the loopback interface, for tests."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import kvrewrite
from kvrewrite import serving
from tests.runtime.test_pipelines import TEMPLATE
from tests.support.tiny import make_checkpoint


def until(condition: Callable[[], Any], seconds: float = 20) -> bool:
    """Waits for something to be so, for a bounded time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def idle(engine: serving.Engine) -> bool:
    """Waits until nothing runs or waits."""
    return until(lambda: not engine.running and not engine.waiting)


def empty(engine: serving.Engine) -> bool:
    """Whether an idle engine has all its pages back, those of kept prefixes aside."""
    assert idle(engine)
    engine.scheduler.prefixes.clear()
    return engine.batch.used == 0


def head(length: int, path: str = "/v1/completions") -> bytes:
    """A request's head, for a body of so many bytes."""
    lines = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}")
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def make_parts(folder: Path) -> tuple[Any, Any]:
    """A model and a tokenizer that has a chat template; the directory that both come from is `folder` / "out"."""
    path = make_checkpoint(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    kvrewrite.convert(path, path.parent / "out", "streaming_llm", budget=16, chunk=32)
    return kvrewrite.load(path.parent / "out"), tokenizer


@functools.cache
def shared_folder() -> Path:
    """Where `make_parts` was called once for all tests of a process."""
    return Path(tempfile.mkdtemp(prefix="kvrewrite-serving-"))


@functools.cache
def shared_parts() -> tuple[Any, Any]:
    """The model and the tokenizer of `shared_folder`."""
    atexit.register(shutil.rmtree, shared_folder(), ignore_errors=True)
    return make_parts(shared_folder())


class Server:
    """A server on a free port of the loopback interface, in this process, so that its engine can be looked into."""

    def __init__(self, engine: serving.Engine, limits: serving.Limits | None = None):
        self.engine = engine
        self.server = serving.make_server(engine, "tiny", port=0, log_level="critical", limits=limits)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        assert until(lambda: self.server.started), "the server did not start"
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive() and not self.engine.alive

    def call(self, path: str, body: Any = None, raw: bytes | None = None, **headers: str) -> tuple[int, Any]:
        data = raw if raw is not None else (None if body is None else json.dumps(body).encode())
        headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        data = json.dumps({**body, "stream": True}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            lines = [line.decode().strip() for line in response]
        data = [line.removeprefix("data: ") for line in lines if line]
        return [d if d == "[DONE]" else json.loads(d) for d in data]
