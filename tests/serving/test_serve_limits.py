"""What clients of `kvrewrite serve` can't do: take its time or memory for ever, keep it from ending, or have no answer."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import TEXT

for needed in ("starlette", "uvicorn", "pydantic", "prometheus_client", "jinja2"):
    pytest.importorskip(needed)

from kvrewrite import serving  # noqa: E402
from kvrewrite.errors import KVRewriteError, OptionError  # noqa: E402
from kvrewrite.serving.requests import BYTES_BESIDE, BYTES_PER_TOKEN, MAX_STOP_LENGTH  # noqa: E402
from kvrewrite.serving.text import StopFinder  # noqa: E402
from tests.support.serving_tools import Server, empty, head, idle, make_parts, until  # noqa: E402

pytestmark = pytest.mark.xdist_group("serve_limits")  # whose fixtures are made once

CHAT = [{"role": "user", "content": "The quick brown fox"}]
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
DEEP = 20_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def parts(folder: Path) -> Any:
    return make_parts(folder)


@pytest.fixture(scope="module")
def server(parts: Any) -> Any:
    running = Server(serving.Engine(*parts, max_new_tokens=64, max_prompt_tokens=400))
    yield running
    running.stop()


@contextlib.contextmanager
def serving_with(engine: serving.Engine, **limits: Any) -> Iterator[Server]:
    """A server of its own, ended in any case."""
    running = Server(engine, serving.Limits(**limits))
    try:
        yield running
    finally:
        running.server.should_exit = running.server.force_exit = True
        running.thread.join(20)
        engine.close()


@contextlib.contextmanager
def gate(model: Any, after: int = 0) -> Iterator[threading.Event]:
    """Passes through the model wait for an event, all but the first `after`; `passes` counts those that began."""
    go = threading.Event()
    go.passes = 0  # type: ignore[attr-defined]

    def wait(*_: Any) -> None:
        go.passes += 1  # type: ignore[attr-defined]
        if go.passes > after:  # type: ignore[attr-defined]
            assert go.wait(30)

    hook = model.graph_module.register_forward_pre_hook(wait)
    try:
        yield go
    finally:
        go.set()
        hook.remove()


def connect(server: Server, data: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    client.sendall(data)
    return client


def post(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return head(len(data)) + data


def received(client: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            data += part
    return data


# ------------------------------------------------------------------------------------------------------------ requests
def bodies_that_are_wrong() -> Iterator[tuple[str, bytes, str | None, str]]:
    """(path, body, field, message)"""
    yield COMPLETIONS, b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}", None, "recursion limit"
    yield COMPLETIONS, b'{"prompt": "a", "\\ud800": 1}', None, "hex escape"
    yield COMPLETIONS, b'{"prompt": "\\ud800"}', None, "hex escape"
    yield COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', None, "not JSON"
    yield COMPLETIONS, b"\xff\xfe{\x00}\x00", None, "not JSON"
    yield COMPLETIONS, b"[1]", None, "expected a JSON object"
    for path, body, field, message in (
        (COMPLETIONS, {"prompt": "a", "temperature": 1e-38}, "temperature", "at least 1e-08"),
        (COMPLETIONS, {"prompt": "a", "temperature": 1e-300}, "temperature", "at least 1e-08"),
        (COMPLETIONS, {"prompt": "a", "temperature": True}, "temperature", "valid number"),
        (COMPLETIONS, {"prompt": "a", "temperature": "1"}, "temperature", "valid number"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 1.5}, "max_tokens", "valid integer"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": True}, "max_tokens", "valid integer"),
        (COMPLETIONS, {"prompt": "a", "seed": 1 << 63}, "seed", "less than"),
        (COMPLETIONS, {"prompt": "a", "stream": 1}, "stream", "valid boolean"),
        (
            COMPLETIONS,
            {"prompt": "a", "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "boolean",
        ),
        (COMPLETIONS, {"prompt": "a", "model": 3}, "model", "valid string"),
        (COMPLETIONS, {"prompt": "a", "top_p": [[]]}, "top_p", "valid number"),
        (
            COMPLETIONS,
            {"prompt": "a", "stop": ["ok", "e" * (MAX_STOP_LENGTH + 1)]},
            "stop[1]",
            "at most 256 characters",
        ),
        (COMPLETIONS, {"prompt": "a", "stop": "e" * 1000}, "stop[0]", "at most 256 characters"),
        (COMPLETIONS, {"prompt": "a", "stop": ["e"] * 17}, "stop", "at most 16 items"),
        (COMPLETIONS, {"prompt": "a", "stop": {"a": 1}}, "stop", "valid list"),
        (COMPLETIONS, {"prompt": {"a": 1}}, "prompt", "one text or one list"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt[1]", "valid integer"),
        (COMPLETIONS, {"prompt": [1, -3]}, "prompt[1]", "greater than or equal to 0"),
        (COMPLETIONS, {"prompt": [1, 1 << 70]}, "prompt[1]", "less than"),
        (COMPLETIONS, {"prompt": [1, True]}, "prompt[1]", "valid integer"),
        (COMPLETIONS, {"prompt": []}, "prompt", "one text or one list"),
        (
            CHATS,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "missing",
        ),
        (
            CHATS,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "text",
        ),
        (CHATS, {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        (CHATS, {"messages": [{"role": 1, "content": "a"}]}, "messages[0].role", "valid string"),
        (CHATS, {"messages": [3]}, "messages[0]", "valid dictionary"),
        (CHATS, {"messages": "hello"}, "messages", "valid list"),
        (
            CHATS,
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls",
            "not supported",
        ),
        (CHATS, {"messages": CHAT, "chat_template_kwargs": []}, "chat_template_kwargs", "valid dictionary"),
        (CHATS, {"messages": CHAT, "chat_template_kwargs": {"self": 1}}, "messages", "the chat template refuses"),
    ):
        yield path, json.dumps(body).encode(), field, message


WRONG = list(bodies_that_are_wrong())


@pytest.mark.parametrize(("path", "body", "field", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_a_400_with_its_field(
    server: Server, path: str, body: bytes, field: str | None, message: str
) -> None:
    failed = server.engine.failed
    status, data = server.call(path, raw=body)
    assert (status, data["error"]["param"]) == (400, field)
    assert message in data["error"]["message"] and len(data["error"]["message"]) < 500
    if "template" not in message:
        assert server.engine.failed == failed  # no request of that kind takes the engine's time


def test_what_is_right_is_taken(server: Server) -> None:
    nothing = {"top_p": None, "seed": None, "stop": None, "stream_options": None, "max_tokens": 2, "temperature": 1e-8}
    assert server.call(COMPLETIONS, {"prompt": "a", **nothing})[0] == 200
    assert server.call(COMPLETIONS, {"prompt": ["a"], "temperature": 0, "top_p": 1, "max_tokens": 2})[0] == 200
    answered = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None, "annotations": []}
    parts = {"role": "user", "name": "x", "content": [{"type": "text", "text": "a", "cache_control": {}}]}
    assert server.call(CHATS, {"messages": [parts, answered, *CHAT], "max_tokens": 2})[0] == 200


def test_long_prompts_are_refused(server: Server) -> None:
    for path, body in (
        (COMPLETIONS, {"prompt": [1] * 401}),
        (COMPLETIONS, {"prompt": "zq " * 400}),
        (CHATS, {"messages": [{"role": "user", "content": "zq " * 400}]}),
    ):
        status, data = server.call(path, {**body, "max_tokens": 1})
        assert status == 400 and data["error"]["code"] == "context_length_exceeded"
        assert data["error"]["param"] == ("prompt" if path == COMPLETIONS else "messages")
        assert "at most 400 (--max-prompt-tokens)" in data["error"]["message"]
    assert server.call(COMPLETIONS, {"prompt": [1] * 400, "max_tokens": 1})[0] == 200
    most = BYTES_BESIDE + 400 * BYTES_PER_TOKEN
    with connect(server, head(most + 1)) as client:  # said before the body is there
        assert b"413" in client.recv(4096)
    with connect(server, head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")) as client:
        with contextlib.suppress(ConnectionError):
            for _ in range(most // 4096 + 2):
                client.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        assert b"413" in client.recv(4096)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_web_pages_of_others_cannot_ask(server: Server, kind: str | None) -> None:
    """What a browser sends without asking (a form, text) is no JSON; JSON by a rebound name has its page's Origin."""
    body = post({"prompt": "a", "max_tokens": 1})
    with connect(server) as client:
        client.sendall(
            re.sub(rb"Content-Type: [^\r]*\r\n", b"" if kind is None else f"Content-Type: {kind}\r\n".encode(), body)
        )
        assert b"415" in client.recv(4096)
    served = server.engine.served
    for origin, status in (
        ("http://evil.example:8000", 403), ("null", 403), ("http://[", 403), ("http://localhost:3000", 200),
        ("http://127.0.0.1:8000", 200), ("http://[::1]", 200),
    ):  # fmt: skip
        assert server.call(COMPLETIONS, {"prompt": "a", "max_tokens": 1}, Origin=origin)[0] == status
    assert server.engine.served == served + 3


# ---------------------------------------------------------------------------------------------------------------- text
class Letters:
    """A tokenizer whose tokens are characters, which counts what it decodes. Token 0 is a special one without text."""

    decoded = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.decoded += len(ids)
        return "".join(chr(i) for i in ids if i)


def by_definition(text: str, stops: list[str]) -> str:
    """Text up to the stop string that ends first; of those that end there, up to the longest."""
    for end in range(len(text) + 1):
        if found := [s for s in stops if text[:end].endswith(s)]:
            return text[: end - max(map(len, found))]
    return text


def test_stop_strings_by_their_definition() -> None:
    """Random texts over two letters, where stop strings overlap themselves and each other; however the text is cut."""
    rng = random.Random(0)
    stopped = 0
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randint(0, 14)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        stream = serving.TextStream(Letters(), stops)
        pieces = [stream.push(ord(c)) for c in text]
        assert "".join(pieces) + stream.end() == by_definition(text, stops)
        stopped += stream.stopped
        finder, at, found = StopFinder(stops), 0, None
        while at < len(text) and found is None:
            piece = text[at : at + rng.randint(1, 4)]
            found = finder.feed(piece)
            begin, at = at, at + len(piece)
        assert (found is not None) == stream.stopped
        if found is not None:
            assert text[: begin + found[0] - found[1]] == by_definition(text, stops)
    assert 1000 < stopped < 2900  # both happen


def test_the_time_of_stop_strings_is_linear() -> None:
    """The quadratic search took 0.3 s for every token with such a string: 10 minutes."""
    stream = serving.TextStream(Letters(), ["e" * 100_000 + "x", "e" * 99_999 + "y"])
    begin = time.monotonic()
    assert "".join(stream.push(ord("e")) for _ in range(2000)) + stream.end() == "e" * 2000
    assert time.monotonic() - begin < 10


def test_the_time_of_runs_without_text_is_linear() -> None:
    tokenizer = Letters()
    stream = serving.TextStream(tokenizer, ["stop"])
    assert stream.push(ord("a")) == "a"
    assert not any(stream.push(0) for _ in range(4000))
    assert tokenizer.decoded < 12 * 4000  # decoded at every token: 8 million
    rest = "".join(stream.push(ord(c)) for c in "bc stop d")
    assert rest + stream.end() == "bc " and stream.stopped


# ------------------------------------------------------------------------------------------------------- clients that go
def test_a_client_that_goes_in_its_prompt_ends_it(parts: Any, server: Server) -> None:
    """The prompt has 12 chunks; its client goes in the second, so there is no third."""
    cancelled = server.engine.cancelled
    with gate(parts[0], after=1) as go:
        with connect(server, post({"prompt": [5] * 384, "max_tokens": 4})):
            assert until(lambda: go.passes == 2)
            (job,) = server.engine._jobs
        assert until(job.cancelled.is_set)
        go.set()
        assert idle(server.engine) and go.passes == 2
    assert server.engine.cancelled == cancelled + 1 and empty(server.engine)
    assert server.call(COMPLETIONS, {"prompt": "She sells", "max_tokens": 2})[0] == 200


def test_clients_that_have_gone_leave_the_queue(parts: Any) -> None:
    engine = serving.Engine(*parts, waiting=2)
    with gate(parts[0]) as go, serving_with(engine) as server, ThreadPoolExecutor(2) as pool:
        body = {"prompt": "a", "max_tokens": 1}
        first = pool.submit(server.call, COMPLETIONS, body)
        assert until(lambda: go.passes == 1)
        gone = [connect(server, post({**body, "stream": stream})) for stream in (False, True)]
        assert until(lambda: engine.waiting == 2)
        assert server.call(COMPLETIONS, body)[0] == 429
        for client in gone:
            client.close()
        assert until(lambda: engine.waiting == 0) and engine.running
        honest = pool.submit(server.call, COMPLETIONS, body)
        assert until(lambda: engine.waiting == 1)
        go.set()
        assert first.result(20)[0] == honest.result(20)[0] == 200
    assert (engine.served, engine.cancelled) == (2, 2)


# ------------------------------------------------------------------------------------------------------------- signals
def test_a_signal_leaves_a_grace(parts: Any) -> None:
    """Requests that are there are served; what is half sent ends at once; new ones are refused."""
    engine = serving.Engine(*parts)
    with gate(parts[0]) as go, serving_with(engine, grace_seconds=30) as server, ThreadPoolExecutor(2) as pool:
        body = {"prompt": "a", "max_tokens": 2}
        answers = [pool.submit(server.call, COMPLETIONS, body)]
        assert until(lambda: go.passes == 1)
        answers.append(pool.submit(server.call, COMPLETIONS, body))
        assert until(lambda: engine.waiting == 1)
        half_head, half_body = connect(server, head(100)[:-4]), connect(server, head(100) + b'{"prompt"')
        assert until(lambda: len(server.server.bodies._sizes) == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        assert received(half_head) == b"" and b"503" in received(half_body)
        assert engine.running and engine.waiting == 1
        with pytest.raises(serving.RequestError, match="shutting down"):
            engine.submit(serving.Job(serving.read_request(body, chat=False), lambda event: None))
        go.set()
        assert [a.result(20)[0] for a in answers] == [200, 200]
        server.thread.join(10)  # far less than the grace
        assert not server.thread.is_alive() and not engine.alive


def test_the_grace_ends(parts: Any) -> None:
    """Then every client gets an error, though the model is in the middle of a pass that does not end."""
    engine = serving.Engine(*parts)
    with (
        gate(parts[0], after=5) as go,
        serving_with(engine, grace_seconds=0.3) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        body = {"prompt": TEXT[:60], "max_tokens": 30}
        stream = pool.submit(server.events, COMPLETIONS, body)
        assert until(lambda: go.passes == 6)
        waits = pool.submit(server.call, COMPLETIONS, body)
        assert until(lambda: engine.waiting == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        *_, last = stream.result(20)
        assert last["error"]["code"] == "shutting_down"
        status, data = waits.result(20)
        assert (status, data["error"]["code"]) == (503, "shutting_down")
        go.set()


def test_a_second_signal_ends_at_once(parts: Any) -> None:
    engine = serving.Engine(*parts)
    with gate(parts[0]) as go, serving_with(engine, grace_seconds=60) as server:
        client = connect(server, post({"prompt": "a"}))
        assert until(lambda: engine.running)
        server.server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.3)
        assert server.thread.is_alive()
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(10)
        assert not server.thread.is_alive()
        go.set()
        client.close()


def test_the_process_ends(parts: Any, folder: Path) -> None:
    """A process of its own, with signals: a half-sent request does not keep it alive."""
    code = "from kvrewrite.cli.app import main; main()"
    args = ["serve", str(folder / "out"), "--port", "0", "--grace-seconds", "1", "--name", "tiny", "--memory", "4MiB"]
    with subprocess.Popen([sys.executable, "-c", code, *args], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            port = None
            for line in process.stderr:
                if found := re.search(r"running on http://127.0.0.1:(\d+)", line):
                    port = int(found[1])
                    break
            assert port is not None
            clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(2)]
            clients[0].sendall(head(50)[:-4])
            clients[1].sendall(head(50) + b"{")
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == -signal.SIGTERM
        finally:
            process.kill()


# --------------------------------------------------------------------------------------------------------- connections
def test_idle_connections_do_not_keep_others_out(parts: Any) -> None:
    engine = serving.Engine(*parts, waiting=4, capacity=serving.Capacity(max_requests=4))
    with serving_with(engine, connections=24, head_seconds=60) as server:
        clients = [connect(server, b"GET /" if i % 2 else b"") for i in range(60)]
        assert server.call("/health")[0] == 200
        assert server.call(COMPLETIONS, {"prompt": "a", "max_tokens": 1})[0] == 200
        assert until(lambda: len(server.server.server_state.connections) <= 24)
        assert received(clients[0]) == b""  # the oldest gave way
        for client in clients:
            client.close()


def test_requests_that_are_served_do_not_give_way(parts: Any) -> None:
    """But those who only connect do."""
    engine = serving.Engine(*parts, waiting=4, capacity=serving.Capacity(max_requests=4))
    with gate(parts[0]) as go, serving_with(engine, connections=24) as server, ThreadPoolExecutor(5) as pool:
        body = {"prompt": "a", "max_tokens": 1}
        answers = [pool.submit(server.call, COMPLETIONS, body)]
        assert until(lambda: go.passes == 1)
        answers += [pool.submit(server.call, COMPLETIONS, body) for _ in range(4)]
        assert until(lambda: engine.waiting == 4)
        clients = [connect(server) for _ in range(40)]
        assert server.call("/health")[1]["waiting"] == 4
        go.set()
        assert [a.result(20)[0] for a in answers] == [200] * 5
        for client in clients:
            client.close()


def test_connections_that_do_not_go_on_are_closed(parts: Any) -> None:
    limits = {"head_seconds": 0.4, "body_seconds": 0.4}
    with serving_with(serving.Engine(*parts), **limits) as server:
        nothing, half_head, half_body = connect(server), connect(server, b"GET /hea"), connect(server, head(90) + b"{")
        assert received(nothing) == received(half_head) == b""
        assert b"408" in received(half_body)
        # After an answer the head of the next request has as long.
        again = connect(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        again.sendall(b"GET /")  # the beginning of another request
        answers = received(again)
        assert answers.count(b"HTTP/1.1") == 1 and b"200 OK" in answers


def test_clients_that_take_nothing_of_their_answers_are_dropped(parts: Any) -> None:
    with serving_with(serving.Engine(*parts), stall_seconds=0.4) as server:
        server.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(20)
            client.connect(("127.0.0.1", server.port))
            with contextlib.suppress(ConnectionError):
                for _ in range(40):
                    client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n" * 25)
            connections = server.server.server_state.connections
            assert until(lambda: [c.stage() for c in connections] == ["stalled"])
            assert until(lambda: not connections, 5)  # uvicorn's own limit, between requests, is 10 s


def test_unfinished_bodies_give_way(parts: Any) -> None:
    """Of more bytes than all bodies may have together, the oldest body goes; a fast one is served."""
    engine = serving.Engine(*parts, max_prompt_tokens=64)
    most = BYTES_BESIDE + 64 * BYTES_PER_TOKEN
    with serving_with(engine, bodies=2, body_seconds=60) as server:
        clients = []
        for held in (1, 2, 2, 2, 2):
            clients.append(connect(server, head(most) + b" " * (most - 1)))
            expected = [most - 1] * held
            assert until(lambda expected=expected: list(server.server.bodies._sizes.values()) == expected)
        assert all(b"408" in received(client) for client in clients[:3])
        assert server.call(COMPLETIONS, {"prompt": "a", "max_tokens": 1})[0] == 200
        for client in clients:
            client.close()


def test_limits_that_leave_no_room(parts: Any) -> None:
    engine = serving.Engine(*parts, waiting=32, capacity=serving.Capacity(max_requests=32))
    try:
        with pytest.raises(OptionError, match="expected at least 80"):
            serving.make_server(engine, "tiny", limits=serving.Limits(connections=70))
    finally:
        engine.close()


# --------------------------------------------------------------------------------------------------------------- faults
class Panic(BaseException):
    """As extensions in Rust raise."""


@pytest.mark.parametrize("error", [SystemExit(3), Panic("boom"), RuntimeError("boom"), KeyboardInterrupt()])
def test_whatever_is_raised_the_client_is_answered(
    parts: Any, server: Server, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def advance(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(server.engine.batch, "advance_together", advance)
    status, data = server.call(COMPLETIONS, {"prompt": "a"})
    assert (
        status == 500 and type(error).__name__ in data["error"]["message"] and data["error"]["type"] == "server_error"
    )
    assert "error" in server.call(COMPLETIONS, {"prompt": "a", "stream": True})[1]
    monkeypatch.undo()
    assert server.call(COMPLETIONS, {"prompt": "a", "max_tokens": 1})[0] == 200
    assert server.engine.alive


def test_an_engine_that_ends_answers_and_ends_the_server(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the engine's own loop: who waits gets an error, and the process does not stay without a thread."""
    engine = serving.Engine(*parts)
    go = threading.Event()

    def tick() -> None:
        assert go.wait(20)
        raise ValueError

    monkeypatch.setattr(engine.scheduler, "tick", tick)
    ended: list[serving.Event] = []
    request = serving.read_request({"prompt": "a"}, chat=False)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    for _ in range(2):
        engine.submit(serving.Job(request, ended.append))
    go.set()
    assert until(lambda: not engine.alive)
    errors = [e.error for e in ended]
    assert len(ended) == 2 and all(isinstance(e, serving.RequestError) and e.status == 503 for e in errors)
    with pytest.raises(serving.RequestError, match="shutting down"):
        engine.submit(serving.Job(request, ended.append))
    raised: list[BaseException] = []

    def serve() -> None:
        try:
            serving.serve(engine, "tiny", port=0, log_level="critical")
        except KVRewriteError as error:
            raised.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and "has ended" in str(raised[0])
