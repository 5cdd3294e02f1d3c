"""`kvrewrite serve`, over loopback, with the openai client where it is installed and with plain HTTP."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import kvrewrite
from kvrewrite.cli import app as cli
from tests.support.tiny import TEXT

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("pydantic")
pytest.importorskip("prometheus_client")
pytest.importorskip("jinja2")

from kvrewrite import serving
from tests.support.serving_tools import Server, empty, head, idle, shared_parts, until

pytestmark = pytest.mark.xdist_group("serve")  # whose fixtures are made once

PROMPTS = [TEXT[3 * i : 3 * i + 40 + 17 * i] for i in range(8)]
CHAT = [{"role": "user", "content": "The quick brown fox"}]


@pytest.fixture(scope="module")
def parts() -> Any:
    return shared_parts()


@pytest.fixture(scope="module")
def server(parts: Any) -> Any:
    running = Server(serving.Engine(*parts, max_new_tokens=64))
    yield running
    running.stop()


def expected(parts: Any, prompt: Any, new: int, **settings: Any) -> str:
    """What `generate` makes of a prompt, alone."""
    model, tokenizer = parts
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"] if isinstance(prompt, str) else torch.tensor([prompt])
    out = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=new, pad_token_id=0, **settings)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_completions(parts: Any, server: Server) -> None:
    status, data = server.call("/v1/completions", {"model": "tiny", "prompt": TEXT[:90], "max_tokens": 24})
    ids = parts[1](TEXT[:90])["input_ids"]
    assert status == 200 and data["object"] == "text_completion" and data["model"] == "tiny"
    assert data["choices"][0]["text"] == expected(parts, TEXT[:90], 24)
    made = data["usage"]["completion_tokens"]
    assert data["usage"] == {"prompt_tokens": len(ids), "completion_tokens": made, "total_tokens": len(ids) + made}
    model = parts[0]
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=24, pad_token_id=0)
    assert made == out.shape[1] - len(ids)
    assert data["choices"][0]["finish_reason"] == ("stop" if out[0, -1] == 1 else "length")
    status, again = server.call("/v1/completions", {"prompt": [ids], "max_tokens": 24})
    assert again["choices"] == data["choices"]


def test_streams_are_the_whole_answer(server: Server) -> None:
    body = {"prompt": TEXT[5:70], "max_tokens": 20, "stream_options": {"include_usage": True}}
    _, whole = server.call("/v1/completions", {k: body[k] for k in ("prompt", "max_tokens")})
    *chunks, end, usage, done = server.events("/v1/completions", body)
    assert len(chunks) > 3 and done == "[DONE]"
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
    assert end["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]


def test_chat(parts: Any, server: Server) -> None:
    ids = parts[1].apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    _, data = server.call("/v1/chat/completions", {"messages": CHAT, "max_completion_tokens": 12})
    message = data["choices"][0]["message"]
    assert message == {"role": "assistant", "content": expected(parts, ids, 12)}
    as_parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    first, *chunks, _, done = server.events("/v1/chat/completions", {"messages": as_parts, "max_tokens": 12})
    assert first["choices"][0]["delta"]["role"] == "assistant" and done == "[DONE]"
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == message["content"]


def test_stop_strings_and_seeds(parts: Any, server: Server) -> None:
    text = expected(parts, TEXT[:60], 30)
    stop = text[len(text) // 2 :][:3]
    _, data = server.call("/v1/completions", {"prompt": TEXT[:60], "max_tokens": 30, "stop": ["never here", stop]})
    assert data["choices"][0] == {
        "index": 0, "logprobs": None, "finish_reason": "stop", "text": text[: text.index(stop)]
    }  # fmt: skip
    sampled = {"prompt": TEXT[:60], "max_tokens": 20, "temperature": 1.5, "seed": 3}
    texts = [server.call("/v1/completions", {**sampled, "seed": s})[1]["choices"][0]["text"] for s in (3, 3, 4)]
    torch.manual_seed(3)
    assert texts[0] == texts[1] == expected(parts, TEXT[:60], 20, do_sample=True, temperature=1.5)
    assert texts[2] != texts[0]


def test_eight_clients_get_what_each_gets_alone(parts: Any, server: Server) -> None:
    alone = [expected(parts, p, 8) for p in PROMPTS]
    assert len(set(alone)) > 4
    barrier = threading.Barrier(8)

    def ask(i: int) -> str:
        barrier.wait(30)
        body = {"prompt": PROMPTS[i], "max_tokens": 8}
        if i % 2:
            return "".join(c["choices"][0]["text"] for c in server.events("/v1/completions", body)[:-1])
        return server.call("/v1/completions", body)[1]["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


def test_memory_does_not_grow(parts: Any, server: Server) -> None:
    """The cache of every request gives its pages back, and nothing keeps it."""
    import gc

    for i in range(10):
        assert server.call("/v1/completions", {"prompt": PROMPTS[i % 8], "max_tokens": 2})[0] == 200
        assert empty(server.engine)
    gc.collect()
    alive = [o for o in gc.get_objects() if isinstance(o, kvrewrite.EvictionCache) and o.owner is parts[0].owner]
    assert len(alive) <= 2  # that of the rows which decode, and that of a frame which has just ended


@pytest.mark.slow
def test_memory_over_500_requests(parts: Any, server: Server) -> None:
    """From 8 clients at once with different prompts: each answer is the one that it gets alone, and from the 50th to the 500th
    request the process does not grow."""
    psutil = pytest.importorskip("psutil")
    process, sizes = psutil.Process(), []
    alone = [expected(parts, p, 4) for p in PROMPTS]

    def ask(i: int) -> bool:
        status, data = server.call("/v1/completions", {"prompt": PROMPTS[i % 8], "max_tokens": 4})
        return status == 200 and data["choices"][0]["text"] == alone[i % 8]

    with ThreadPoolExecutor(8) as pool:
        for begin, end in ((0, 50), (50, 500)):
            assert all(pool.map(ask, range(begin, end)))
            assert empty(server.engine)
            sizes.append(process.memory_info().rss)
    assert sizes[1] - sizes[0] < 4 << 20  # what a cache of each request would come to: 450 times 4 pages of 5 KB


def test_a_client_that_goes_away(server: Server) -> None:
    """Its request ends, its cache is given back, and the next one is served."""
    before = server.engine.cancelled
    for stream in (True, False):
        body = json.dumps({"prompt": TEXT, "max_tokens": 64, "temperature": 1, "seed": 1, "stream": stream}).encode()
        hook = server.engine.model.graph_module.register_forward_pre_hook(lambda *_: time.sleep(0.02))
        try:
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
                client.sendall(head(len(body)) + body)
                if stream:
                    assert b"200 OK" in client.recv(4096)
                else:
                    assert until(lambda: server.engine.running)
            assert idle(server.engine)
        finally:
            hook.remove()
    assert server.engine.cancelled == before + 2
    assert empty(server.engine)
    assert server.call("/v1/completions", {"prompt": "She sells", "max_tokens": 2})[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", {"max_tokens": 3}, 400, "prompt: it is missing"),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "send a request for each"),
        ("/v1/completions", {"prompt": "a", "best_of": 2}, 400, "best_of is not supported"),
        ("/v1/completions", {"prompt": "a", "n": 65}, 400, "at most 64 answers at once"),
        ("/v1/completions", {"prompt": "a", "logprobs": 21}, 400, "less than or equal to 20"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"5000": 1}}, 400, "logit_bias has the token ids [5000]"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "expected to be token ids"),
        ("/v1/completions", {"prompt": "a", "budget": 0}, 400, "budget is 0"),
        ("/v1/chat/completions", {"messages": CHAT, "top_logprobs": 2}, 400, "needs logprobs"),
        ("/v1/completions", {"prompt": "a", "temprature": 0.3}, 400, "'temprature' is not a parameter"),
        (
            "/v1/completions",
            {"prompt": "a", "temperature": 9},
            400,
            "temperature is 9: input should be less than or equal to 2",
        ),
        ("/v1/completions", {"prompt": "a", "max_tokens": 65}, 400, "at most 64"),
        (
            "/v1/completions",
            {"prompt": "a", "max_tokens": "3"},
            400,
            "max_tokens is '3': input should be a valid integer",
        ),
        (
            "/v1/completions",
            {"prompt": "a", "stop": [""]},
            400,
            "stop[0] is '': string should have at least 1 character",
        ),
        ("/v1/completions", {"prompt": [1, 5000]}, 400, "token ids reach from 1 to 5000"),
        ("/v1/completions", {"prompt": [1, 5000], "stream": True}, 400, "token ids reach from 1 to 5000"),
        ("/v1/completions", {"prompt": "a", "model": "gpt"}, 404, "has the model 'tiny', not 'gpt'"),
        ("/v1/chat/completions", {"messages": []}, 400, "at least 1 item"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 3}]}, 400, "content that is text"),
        ("/v1/chat/completions", {"messages": CHAT, "tools": [{}]}, 400, "tools is not supported"),
        (
            "/v1/chat/completions",
            {
                "messages": CHAT,
                "chat_template_kwargs": {"chat_template": "{% for i in range(9999) %}{% endfor %}", "x": 1},
            },
            400,
            "chat_template can't be set by a request",
        ),
        ("/v1/nothing", {}, 404, "Not Found"),
        ("/v1/completions", None, 405, "Method Not Allowed"),
    ],
)
def test_errors_are_those_of_the_api(server: Server, path: str, body: Any, status: int, message: str) -> None:
    got, data = server.call(path, body)
    assert (got, set(data), set(data["error"])) == (status, {"error"}, {"message", "type", "param", "code"})
    assert message in data["error"]["message"]


def test_a_body_that_is_not_json(server: Server) -> None:
    status, data = server.call("/v1/completions", raw=b"{")
    assert status == 400 and "not JSON" in data["error"]["message"]


def test_a_full_queue_is_said(parts: Any) -> None:
    """Nothing waits without end: the third of three at once is turned away where one may wait."""
    engine = serving.Engine(*parts, waiting=1)
    go = threading.Event()
    hook = parts[0].graph_module.register_forward_pre_hook(lambda *_: go.wait(30) and None)
    request = serving.read_request({"prompt": "a", "max_tokens": 1}, chat=False)
    ended: list[serving.Event] = []
    try:
        engine.submit(serving.Job(request, ended.append))
        assert until(lambda: engine.running)
        engine.submit(serving.Job(request, ended.append))
        with pytest.raises(serving.RequestError, match="1 requests are waiting") as refused:
            engine.submit(serving.Job(request, ended.append))
        assert refused.value.status == 429
        go.set()
        assert idle(engine)
    finally:
        go.set()
        hook.remove()
        engine.close()
    assert [e.finish for e in ended if e.finish] == ["length", "length"]
    with pytest.raises(serving.RequestError, match="shutting down"):
        engine.submit(serving.Job(request, ended.append))


def test_models_and_health(server: Server) -> None:
    _, listed = server.call("/v1/models")
    assert [m["id"] for m in listed["data"]] == ["tiny"]
    assert server.call("/v1/models/tiny")[1] == listed["data"][0]
    assert server.call("/v1/models/other")[0] == 404
    status, health = server.call("/health")
    assert (status, health["status"], health["waiting"]) == (200, "ok", 0)


def test_openai_client(parts: Any, server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    assert [m.id for m in client.models.list()] == ["tiny"]
    ids = parts[1].apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    text = expected(parts, ids, 10)
    done = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=10, temperature=0)
    assert done.choices[0].message.content == text and done.choices[0].finish_reason == "length"
    stream = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=10, temperature=0, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == text
    written = client.completions.create(model="tiny", prompt=TEXT[:50], max_tokens=10)
    assert written.choices[0].text == expected(parts, TEXT[:50], 10)
    with pytest.raises(openai.BadRequestError, match="best_of is not supported"):
        client.completions.create(model="tiny", prompt="a", best_of=3)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")


def test_text_is_held_back_only_where_it_may_change(parts: Any) -> None:
    tokenizer = parts[1]
    whole = "naïve – 日本語 ünd so weiter"
    ids = tokenizer(whole)["input_ids"]
    stream = serving.TextStream(tokenizer, ["so on"])
    pieces = [stream.push(i) for i in ids]
    assert all("\ufffd" not in p for p in pieces)
    assert "".join(pieces) + stream.end() == whole
    stream = serving.TextStream(tokenizer, ["so w", "zzz"])
    assert "".join(stream.push(i) for i in ids) + stream.end() == whole[: whole.index("so w")]
    assert stream.stopped


def test_command_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(cli.main, ["serve", str(tmp_path)])
    assert done.exit_code == 1 and "pip install 'kvrewrite[serve]'" in done.stderr
    monkeypatch.undo()
    done = CliRunner().invoke(cli.main, ["serve", str(tmp_path)])
    assert done.exit_code == 1 and "kvrewrite did not write it" in done.stderr
