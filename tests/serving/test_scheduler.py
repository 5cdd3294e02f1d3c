"""Many requests at once: each has the answer that it has alone, whoever comes, goes, fails or is preempted beside it."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

for needed in ("starlette", "uvicorn", "pydantic", "prometheus_client", "jinja2"):
    pytest.importorskip(needed)

import kvrewrite  # noqa: E402
from kvrewrite import serving  # noqa: E402
from kvrewrite.cache.joined import JoinedRows  # noqa: E402
from kvrewrite.errors import InputError, OptionError  # noqa: E402
from kvrewrite.serving import scheduler as scheduling  # noqa: E402
from tests.support.load import Asked, alone, bodies, serve  # noqa: E402
from tests.support.serving_tools import Server, empty, shared_folder, shared_parts, until  # noqa: E402
from tests.support.tiny import TEXT  # noqa: E402

pytestmark = pytest.mark.xdist_group("serve")  # whose fixtures are made once

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def parts() -> Any:
    return shared_parts()


@pytest.fixture(scope="module")
def folder(parts: Any) -> Any:
    return shared_folder()


@pytest.fixture(scope="module")
def growing(folder: Any, parts: Any) -> Any:
    """A model whose answers need ever more pages: it evicts in the prompt alone."""
    kvrewrite.convert(folder / "model", folder / "growing", "snapkv", budget=40, window=8)
    return kvrewrite.load(folder / "growing"), parts[1]


@pytest.fixture
def engine(parts: Any) -> Iterator[serving.Engine]:
    made = serving.Engine(*parts, capacity=serving.Capacity(prompt_tokens=64))
    yield made
    made.close()


def asked(parts: Any, given: list[dict[str, Any]]) -> list[Asked]:
    return [Asked(body, alone(*parts, body)) for body in given]


def again(known: list[Asked], count: int, generator: random.Random, leaving: float) -> list[Asked]:
    """Requests out of those known, in random order; some of their clients leave."""
    found = []
    for _ in range(count):
        one = generator.choice(known)
        leaves = generator.randint(0, 5) if generator.random() < leaving else None
        found.append(Asked(one.body, one.alone, leaves))
    return found


def between_tokens(found: list[Asked]) -> np.ndarray:
    gaps = [np.diff(a.times) for a in found if len(a.times) > 1]
    return np.concatenate(gaps) if gaps else np.zeros(1)


# ------------------------------------------------------------------------------------------------------------ schedules
def test_requests_at_once_are_what_each_is_alone(parts: Any, engine: serving.Engine) -> None:
    """Greedy and sampled ones of mixed lengths, from several clients, a fifth of whom leave."""
    generator = random.Random(0)
    known = asked(parts, bodies(generator, 24, 200, len(parts[1])))
    found = again(known, 60, generator, 0.2)
    serve(engine, found, at_once=20)
    assert [a.body for a in found if not a.right] == []
    assert empty(engine) and engine.failed == 0
    assert engine.served + engine.cancelled == 60 and engine.served >= 40


@pytest.mark.thorough
@pytest.mark.parametrize("scope", ["head", "model"])
def test_prompts_that_are_read_twice(folder: Any, parts: Any, scope: str) -> None:
    """KVzip's repetitions go through in between the others' segments and tokens."""
    out = folder / f"kvzip-{scope}"
    kvrewrite.convert(folder / "model", out, "kvzip", budget=0.4, repeat_chunk=24, scope=scope, repeat_prompt="3,4")
    twice = kvrewrite.load(out), parts[1]
    generator, engine = random.Random(5), serving.Engine(*twice, capacity=serving.Capacity(prompt_tokens=64))
    try:
        found = again(asked(twice, bodies(generator, 8, 90, len(parts[1]))), 16, generator, 0.2)
        serve(engine, found, at_once=8)
        assert [a.body for a in found if not a.right] == []
        assert empty(engine) and engine.failed == 0
    finally:
        engine.close()


@pytest.mark.thorough
def test_ten_thousand_requests(parts: Any) -> None:
    """Their answers, the memory after them, and the time between two tokens (printed)."""
    psutil = pytest.importorskip("psutil")
    generator, process, sizes = random.Random(1), psutil.Process(), []
    known = asked(parts, bodies(generator, 150, 200, len(parts[1])))
    memory = 200 * 4 * engine_page(parts)
    engine = serving.Engine(*parts, capacity=serving.Capacity(max_requests=32, memory=memory, prompt_tokens=128))
    try:
        gaps = []
        for count in (1000, 3000, 3000, 3000):
            found = again(known, count, generator, 0.2)
            serve(engine, found, at_once=64, clients=7)
            assert [a.body for a in found if not a.right] == []
            assert empty(engine) and engine.failed == 0
            gaps.append(between_tokens(found))
            del found
            gc.collect()
            assert not [o for o in gc.get_objects() if isinstance(o, serving.Job)]
            sizes.append(process.memory_info().rss)
        p50, p99 = np.quantile(np.concatenate(gaps), [0.5, 0.99])
        print(
            f"10,000 requests: {engine.served} answered, {engine.cancelled} left; between tokens {1e3 * p50:.1f} ms, "
            f"p99 {1e3 * p99:.1f} ms; resident memory {[s >> 20 for s in sizes]} MiB"
        )
        # What the caches of the requests would come to is a hundred times that; malloc's fragments are allowed.
        assert sizes[-1] - sizes[0] < 48 << 20
    finally:
        engine.close()


def engine_page(parts: Any) -> int:
    """Bytes of one page for one head."""
    from kvrewrite.runtime.batch import Batch

    return max(store.page_bytes for store in Batch(parts[0]).stores)


def test_a_full_pool_preempts_the_youngest(growing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are admitted by what they need at first, and grow; whoever is preempted has the same answer later."""
    monkeypatch.setattr(scheduling, "AHEAD", 1)
    generator = random.Random(3)
    given = [{**body, "max_tokens": 40} for body in bodies(generator, 10, 60, len(growing[1]))]
    found = asked(growing, given)
    memory = 9 * 4 * engine_page(growing)  # two layers of two heads
    engine = serving.Engine(*growing, capacity=serving.Capacity(max_requests=8, memory=memory))
    try:
        serve(engine, found, at_once=10)
        assert [a.body for a in found if not a.right] == []
        assert engine.metrics.preempted._value.get() > 0
        assert empty(engine)
    finally:
        engine.close()


def test_what_never_fits_is_refused_at_once(growing: Any) -> None:
    engine = serving.Engine(*growing, capacity=serving.Capacity(memory=3 * 4 * engine_page(growing)))
    server = Server(engine)
    try:
        status, data = server.call(COMPLETIONS, {"prompt": [5] * 20, "max_tokens": 200})
        assert (status, data["error"]["param"]) == (400, "prompt") and "pages" in data["error"]["message"]
        assert server.call(COMPLETIONS, {"prompt": [5] * 20, "max_tokens": 4})[0] == 200
    finally:
        server.stop()


def test_clients_take_turns() -> None:
    """Whoever sends a hundred requests does not keep out the next one."""
    waiting, order = scheduling.Waiting(), []
    request = serving.read_request({"prompt": "a"}, chat=False)
    for client, count in (("a", 4), ("b", 2), ("c", 1)):
        for _ in range(count):
            waiting.put(scheduling.Prompt(serving.Job(request, print, client), []))
    while (prompt := waiting.take(set(), lambda _: True)) is not None:
        order.append(prompt.job.client)
    assert order == ["a", "b", "c", "a", "b", "a", "a"]
    waiting.put(scheduling.Prompt(serving.Job(request, print, "a"), []))
    assert waiting.take({"a"}, lambda _: True) is None and waiting.take(set(), lambda _: False) is None
    assert waiting.take(set(), lambda _: True) is not None and not waiting


def test_long_prompts_do_not_stall_streams(parts: Any) -> None:
    """While a prompt of 12 segments is computed, an answer goes on after each."""
    engine = serving.Engine(*parts, max_prompt_tokens=400, capacity=serving.Capacity(prompt_tokens=32))
    steps: list[str] = []
    advance, decode = engine.batch.advance_together, engine.batch.decode
    try:
        engine.batch.advance_together = lambda r: (steps.append("prompt"), advance(r))[1]  # type: ignore[method-assign]
        engine.batch.decode = lambda *a: (steps.append("token"), decode(*a))[1]  # type: ignore[method-assign]
        body = {"prompt": [7, 8, 9], "max_tokens": 40, "logit_bias": {"1": -100}}
        first, second = Asked(body, ""), Asked({"prompt": [5] * 384, "max_tokens": 2}, "")
        serve(engine, [first, second], at_once=2, clients=2)
        begin = steps.index("prompt", 1)
        prompts = [i for i, s in enumerate(steps) if s == "prompt" and i >= begin]
        assert all(b - a <= 2 for a, b in itertools.pairwise(prompts))  # at most one token between two segments,
        between = steps[prompts[0] : prompts[-1]]
        assert between.count("token") >= min(10, 40 - prompts[0])  # and no two segments without one
    finally:
        engine.close()


@pytest.mark.thorough
def test_a_compiled_model_is_warmed_up(parts: Any) -> None:
    """Nothing is left to be made when the first requests come; static buffers of 1, 2, 4, 8 rows give the lone answers."""
    found = asked(parts, bodies(random.Random(9), 12, 60, len(parts[1])))
    model = copy.deepcopy(parts[0])
    model.compile(static_decode=True, backend="eager")
    engine = serving.Engine(model, parts[1], capacity=serving.Capacity(max_requests=8, memory=1 << 22))
    try:
        engine.warm_up()
        assert engine.batch.used == 0
        made = dict(model.decoder._steps)
        assert set(made) == {1, 2, 4, 8}
        serve(engine, found, at_once=12)
        assert [a.body for a in found if not a.right] == []
        assert model.decoder._steps == made and empty(engine)
    finally:
        engine.close()


@pytest.mark.thorough
def test_steps_that_were_exported_serve_one_request_at_a_time(parts: Any) -> None:
    from kvrewrite.runtime.exported import export_steps

    model = copy.deepcopy(parts[0])
    given = bodies(random.Random(10), 8, 60, len(parts[1]))
    found = asked(parts, [b for b in given if len(b["prompt"]) > 1])  # one token is refused by `generate`, too
    with export_steps(model).attach(model):
        with pytest.raises(OptionError, match="--max-requests 1"):
            serving.Engine(model, parts[1])
        engine = serving.Engine(model, parts[1], capacity=serving.Capacity(max_requests=1))
        try:
            serve(engine, found, at_once=6)
            assert [a.body for a in found if not a.right] == [] and empty(engine)
        finally:
            engine.close()


def test_short_prompts_go_together(parts: Any) -> None:
    """Those of about one length, which wait at the same time; each has its lone answer."""
    generator, passes = random.Random(8), []
    given = [{"prompt": [generator.randrange(2, 290) for _ in range(20 + i % 3)], "max_tokens": 4} for i in range(12)]
    found = asked(parts, [*given, {"prompt": [7] * 90, "max_tokens": 4}])
    engine = serving.Engine(*parts)
    advance = engine.batch.advance_together
    engine.batch.advance_together = lambda r: (passes.append(len(r)), advance(r))[1]  # type: ignore[method-assign]
    try:
        hook = parts[0].graph_module.register_forward_pre_hook(lambda *_: time.sleep(0.02))
        serve(engine, found, at_once=20, clients=2)
        hook.remove()
        assert [a.body for a in found if not a.right] == []
        assert max(passes) > 2 and empty(engine)
    finally:
        engine.close()


# --------------------------------------------------------------------------------------------------------------- faults
class Poison:
    """Passes through a model fail where a row is given a certain token."""

    def __init__(self, model: Any, token: int):
        names = list(model.program.layout.input_names)
        at = names.index("input_ids")

        def check(_: Any, args: Any) -> None:
            if bool((args[at] == token).any()):
                raise RuntimeError("poisoned")

        self.hook = model.graph_module.register_forward_pre_hook(check)


def test_what_fails_fails_alone(parts: Any, engine: serving.Engine, capfd: pytest.CaptureFixture[str]) -> None:
    """A request in whose prompt, or at whose tenth token, the model raises: the others in its steps begin again."""
    given = [b for b in bodies(random.Random(5), 24, 60, len(parts[1])) if "temperature" not in b][:8]
    given = [{**b, "max_tokens": 16, "logit_bias": {"299": -100, "298": -100}} for b in given]
    lone = [Asked(b, "") for b in given]
    for one in lone:
        serve(engine, [one], 1)
        one.alone = one.text
    found = [Asked(one.body, one.alone) for one in lone if 299 not in one.body["prompt"]]
    in_prompt = Asked({"prompt": [3, 299, 4], "max_tokens": 4}, "")
    # Greedy but for its tenth token, which a schema-less way makes the poison: a bias that wins.
    decoding = Asked({"prompt": [3, 4, 5], "max_tokens": 8, "logit_bias": {"299": 100}}, "")
    poison = Poison(parts[0], 299)
    try:
        serve(engine, [*found[:4], in_prompt, decoding, *found[4:]], at_once=20)
    finally:
        poison.hook.remove()
    assert "poisoned" in str(in_prompt.error) and "poisoned" in str(decoding.error)
    assert [a.body for a in found if not a.right] == []
    assert engine.alive and engine.failed == 2 and empty(engine)


def test_logits_that_are_not_finite_end_their_request_alone(parts: Any, engine: serving.Engine) -> None:
    found = asked(parts, bodies(random.Random(7), 6, 60, len(parts[1])))
    wrong = [Asked({"prompt": [9, 8], "max_tokens": 12, **more}, "") for more in ({}, {"temperature": 1.0, "seed": 1})]
    decode = engine.batch.decode

    def broken(requests: Any, tokens: Any) -> torch.Tensor:
        logits = decode(requests, tokens).clone()
        for row, request in enumerate(requests):
            if request.seen == 5 and request in suspects():
                logits[row, 3] = torch.nan
        return logits

    def suspects() -> set[Any]:
        jobs = list(engine._jobs)
        return {a.running for job in jobs if job.ids == [9, 8] for a in job.answers}

    engine.batch.decode = broken  # type: ignore[method-assign]
    serve(engine, [*found, *wrong], at_once=8)
    assert all("not finite" in str(one.error) for one in wrong)
    assert [a.body for a in found if not a.right] == []
    assert empty(engine)


# ------------------------------------------------------------------------------------------------------------- prefixes
def test_beginnings_that_prompts_share_are_computed_once(parts: Any, engine: serving.Engine) -> None:
    """From the third prompt with it on; each answer is the lone one."""
    generator = random.Random(4)
    system = [generator.randrange(2, len(parts[1])) for _ in range(96)]  # three chunks
    given = [
        {"prompt": system + [generator.randrange(2, len(parts[1])) for _ in range(n)], "max_tokens": 8}
        for n in (5, 40, 1, 33, 70)
    ]
    found = asked(parts, given)
    for one in found:
        serve(engine, [one], 1)
    assert [a.body for a in found if not a.right] == []
    assert engine.scheduler.prefixes.hits == 3 and engine.scheduler.prefixes.tokens == 3 * 96
    text = engine.metrics.text().decode()
    assert "kvrewrite_prefix_hits_total 3.0" in text and "kvrewrite_prefix_tokens_total 288.0" in text
    found = asked(parts, given)
    serve(engine, found, at_once=5)
    assert [a.body for a in found if not a.right] == [] and engine.scheduler.prefixes.hits == 8
    assert engine.batch.used > 0 and empty(engine)


@pytest.mark.parametrize(
    "policy, options, shares",
    [
        pytest.param("h2o", {"budget": 16, "chunk": 32}, True, marks=pytest.mark.thorough),
        ("streaming_llm", {"budget": 0.25, "chunk": 32}, False),  # a part of the whole prompt's length
        pytest.param(
            "streaming_llm", {"budget": 16, "chunk": 32, "layer_budgets": "pyramid"}, True, marks=pytest.mark.thorough
        ),
        pytest.param("snapkv", {"budget": 16, "window": 8}, False, marks=pytest.mark.thorough),  # the prompt as a whole
    ],
)
def test_only_what_depends_on_the_beginning_alone_is_shared(
    folder: Any, parts: Any, policy: str, options: dict[str, Any], shares: bool
) -> None:
    out = folder / f"{policy}-{len(options)}-{options['budget']}"
    kvrewrite.convert(folder / "model", out, policy, **options)
    model = kvrewrite.load(out), parts[1]
    engine = serving.Engine(*model)
    generator = random.Random(4)
    system = [generator.randrange(2, len(parts[1])) for _ in range(100)]
    try:
        found = asked(model, [{"prompt": system + [n] * n, "max_tokens": 6} for n in (5, 9, 5, 60)])
        for one in found:
            serve(engine, [one], 1)
        assert [a.body for a in found if not a.right] == []
        assert (engine.scheduler.prefixes.hits > 0) == shares
    finally:
        engine.close()


def test_prefixes_go_first_where_pages_are_short(parts: Any) -> None:
    generator = random.Random(6)
    beginnings = [[generator.randrange(2, len(parts[1])) for _ in range(64)] for _ in range(6)]
    given = [{"prompt": [*b, n], "max_tokens": 4} for n in (3, 4, 5) for b in beginnings]
    found = asked(parts, given)
    memory = 6 * 4 * engine_page(parts)
    engine = serving.Engine(*parts, capacity=serving.Capacity(memory=memory))
    try:
        for one in found:
            serve(engine, [one], 1)
        assert [a.body for a in found if not a.right] == []
        assert engine.metrics.preempted._value.get() == 0 and len(engine.scheduler.prefixes) < 6
    finally:
        engine.close()


# ----------------------------------------------------------------------------------------------------------- parameters
@pytest.fixture(scope="module")
def server(parts: Any) -> Iterator[Server]:
    running = Server(serving.Engine(*parts, max_new_tokens=64))
    yield running
    running.stop()


def test_several_answers(server: Server) -> None:
    """n: the first is the lone one with that seed, the others are drawn otherwise; usage counts all."""
    body = {"prompt": TEXT[:60], "max_tokens": 12, "temperature": 1.2, "seed": 5}
    _, lone = server.call(COMPLETIONS, body)
    _, data = server.call(COMPLETIONS, {**body, "n": 3})
    texts = [c["text"] for c in data["choices"]]
    assert [c["index"] for c in data["choices"]] == [0, 1, 2]
    assert texts[0] == lone["choices"][0]["text"] and len(set(texts)) == 3
    assert data["usage"]["completion_tokens"] >= 3 and data["usage"]["prompt_tokens"] == lone["usage"]["prompt_tokens"]
    events = server.events(COMPLETIONS, {**body, "n": 3, "stream_options": {"include_usage": True}})
    streamed = ["", "", ""]
    for event in events[:-2]:
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert streamed == texts and events[-2]["usage"] == data["usage"] and events[-1] == "[DONE]"
    _, greedy = server.call(COMPLETIONS, {"prompt": TEXT[:60], "max_tokens": 6, "n": 2})
    assert greedy["choices"][0]["text"] == greedy["choices"][1]["text"]


def test_log_probabilities(parts: Any, server: Server) -> None:
    model, tokenizer = parts
    ids = tokenizer(TEXT[:60], return_tensors="pt")["input_ids"]
    logits = model(ids).logits[0, -1].float().log_softmax(-1)
    body = {"prompt": TEXT[:60], "max_tokens": 4}
    found = server.call(COMPLETIONS, {**body, "logprobs": 3})[1]["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) <= 4
    assert found["token_logprobs"][0] == pytest.approx(float(logits.max()), abs=1e-5)
    top = logits.topk(3)
    wanted = {tokenizer.decode([int(i)]): float(v) for v, i in zip(top.values, top.indices)}
    assert found["top_logprobs"][0] == pytest.approx(wanted, abs=1e-5)
    assert found["text_offset"][0] == 0
    chat = {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    content = server.call("/v1/chat/completions", chat)[1]["choices"][0]["logprobs"]["content"]
    assert all(len(c["top_logprobs"]) == 2 and bytes(c["bytes"]).decode() == c["token"] for c in content)
    chunks = [e for e in server.events("/v1/chat/completions", chat) if e != "[DONE]"]
    streamed = [c for e in chunks if e["choices"][0]["logprobs"] for c in e["choices"][0]["logprobs"]["content"]]
    assert [c["token"] for c in streamed] == [c["token"] for c in content]


def test_biases_and_penalties(parts: Any, server: Server) -> None:
    tokenizer = parts[1]
    body = {"prompt": TEXT[:60], "max_tokens": 6, "ignore_eos": True}
    _, data = server.call(COMPLETIONS, {**body, "logit_bias": {"40": 100}, "logprobs": 0})
    assert data["choices"][0]["logprobs"]["tokens"] == [tokenizer.decode([40])] * 6
    assert data["usage"]["completion_tokens"] == 6
    most = {"logit_bias": {"40": 100, "41": 99.5}, "presence_penalty": 2.0, "logprobs": 0}
    _, data = server.call(COMPLETIONS, {**body, **most})
    assert data["choices"][0]["logprobs"]["tokens"][:2] == [tokenizer.decode([40]), tokenizer.decode([41])]
    most = {"logit_bias": {"40": 100, "41": 97.5}, "frequency_penalty": 1.0, "logprobs": 0}
    _, data = server.call(COMPLETIONS, {**body, **most})
    tokens = [tokenizer.decode([i]) for i in (40, 40, 40, 41)]
    assert data["choices"][0]["logprobs"]["tokens"][:4] == tokens


def test_stop_ids(parts: Any, server: Server) -> None:
    _, data = server.call(
        COMPLETIONS, {"prompt": "fox", "max_tokens": 9, "logit_bias": {"40": 100}, "stop_token_ids": [40]}
    )
    assert data["choices"][0]["finish_reason"] == "stop" and data["choices"][0]["text"] == ""
    assert data["usage"]["completion_tokens"] == 1
    assert server.call(COMPLETIONS, {"prompt": "fox", "stop_token_ids": [-1]})[0] == 400


def test_a_budget_of_its_own(parts: Any, server: Server) -> None:
    from kvrewrite.runtime.batch import Batch

    batch, ids = Batch(parts[0]), parts[1](TEXT[:120])["input_ids"]
    request = batch.start(ids, max_length=len(ids) + 12, budget=8)
    while (row := batch.advance(request)) is None:
        pass
    tokens = [int(row.argmax())]
    while len(tokens) < 12:
        tokens.append(int(batch.decode([request], tokens[-1:]).argmax()))
    body = {"prompt": TEXT[:120], "max_tokens": 12, "ignore_eos": True}
    _, data = server.call(COMPLETIONS, {**body, "budget": 8})
    assert data["choices"][0]["text"] == parts[1].decode(tokens, skip_special_tokens=True)
    assert data["choices"][0]["text"] != server.call(COMPLETIONS, body)[1]["choices"][0]["text"]
    status, data = server.call(COMPLETIONS, {**body, "budget": 2})
    assert (status, data["error"]["param"]) == (400, "budget")


def test_schemas_need_xgrammar(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said with the field's name and what to install; a schema that is none, too."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    asked_for = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 40, "response_format": asked_for}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, data = server.call("/v1/chat/completions", body)
    assert (status, data["error"]["param"]) == (400, "response_format")
    assert "pip install xgrammar" in data["error"]["message"]
    status, data = server.call("/v1/chat/completions", {**body, "response_format": {"type": "json_schema"}})
    assert status == 400 and "json_schema is missing" in data["error"]["message"]


def test_answers_follow_a_schema(server: Server) -> None:
    pytest.importorskip("xgrammar")
    import json

    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    asked_for = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 64, "response_format": asked_for}
    for more in ({}, {"temperature": 1.5, "seed": 3}):
        _, data = server.call("/v1/chat/completions", {**body, **more})
        if data["choices"][0]["finish_reason"] == "stop":
            assert set(json.loads(data["choices"][0]["message"]["content"])) == {"a"}
        else:  # white space without end is allowed
            assert data["choices"][0]["message"]["content"].lstrip().startswith("{")


def test_answers_end_where_there_is_no_position_left(
    parts: Any, engine: serving.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what they have, as where they are as long as they may be; the others go on."""
    own = JoinedRows.no_room

    def no_room(self: JoinedRows, row: int, count: int, decoding: bool) -> Any:
        return InputError("no position") if self.seen[row] == 24 else own(self, row, count, decoding)

    others = asked(parts, [{"prompt": [5] * 30, "max_tokens": 12}, {"prompt": [9] * 3, "max_tokens": 12}])
    full = asked(parts, [{"prompt": [4] * 20, "max_tokens": 12, "repetition_penalty": 1.3}])
    (short,) = asked(parts, [{"prompt": [4] * 20, "max_tokens": 5, "repetition_penalty": 1.3}])
    monkeypatch.setattr(JoinedRows, "no_room", no_room)
    serve(engine, [*others, *full], at_once=3)
    assert [a.body for a in others if not a.right] == [] and empty(engine)
    assert (full[0].text, full[0].finish) == (short.alone, "length")


def test_metrics(server: Server) -> None:
    assert server.call(COMPLETIONS, {"prompt": "fox", "max_tokens": 3})[0] == 200
    import urllib.request

    with urllib.request.urlopen(f"{server.url}/metrics", timeout=20) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        text = response.read().decode()
    for name in (
        "requests_running", "requests_waiting", "requests_finished_total", "requests_failed_total", "pages_used_share",
        "requests_cancelled_total", "requests_preempted_total", "prompt_tokens_total", "generation_tokens_total",
        "prefix_hits_total", "time_to_first_token_seconds_bucket", "time_between_tokens_seconds_bucket",
    ):  # fmt: skip
        assert f"\nkvrewrite_{name}" in text, name


def test_models_that_cannot_be_served_are_refused_at_the_start(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(parts[0]), "on_one_device", False)
    with pytest.raises(OptionError, match="one device"):
        serving.Engine(*parts)
    monkeypatch.undo()
    monkeypatch.setattr(parts[0].program, "parallel", object())
    with pytest.raises(OptionError, match="one rank's part"):
        serving.Engine(*parts)
    monkeypatch.undo()
    monkeypatch.setattr(parts[0].generation_config, "num_beams", 4)
    with pytest.raises(OptionError, match="num_beams=4"):
        serving.Engine(*parts)


# -------------------------------------------------------------------------------------------------------------- clients
def test_the_openai_client_at_once(parts: Any, server: Server) -> None:
    """Streams and whole answers of eight threads, each the lone one."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    prompts = [TEXT[3 * i : 3 * i + 30 + 11 * i] for i in range(12)]
    lone = [alone(*parts, {"prompt": p, "max_tokens": 12}) for p in prompts]

    def ask(i: int) -> str:
        given = {"model": "tiny", "prompt": prompts[i], "max_tokens": 12, "temperature": 0}
        if i % 3:
            return "".join(c.choices[0].text for c in client.completions.create(**given, stream=True))
        return client.completions.create(**given).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(12))) == lone


def test_a_client_that_reads_nothing_of_its_stream(parts: Any) -> None:
    """Its answer ends once too much is unread; the others have theirs."""
    engine = serving.Engine(*parts, max_new_tokens=256)
    server = Server(engine, serving.Limits(unread=40))
    hook = parts[0].graph_module.register_forward_pre_hook(lambda *_: time.sleep(0.005))
    from tests.serving.test_serve_limits import connect, post

    try:
        with connect(
            server, post({"prompt": "fox", "max_tokens": 200, "logit_bias": {"40": 100}, "stream": True})
        ) as client:
            assert b"200 OK" in client.recv(4096)
            (connection,) = (c for c in server.server.server_state.connections)
            connection.flow.pause_writing()  # as where the client's window is full
            other = {"prompt": TEXT[:50], "max_tokens": 12}
            assert server.call(COMPLETIONS, other)[1]["choices"][0]["text"] == alone(*parts, other)
            assert until(lambda: engine.cancelled == 1)
            connection.flow.resume_writing()
            data = b""
            while b"unread" not in data:
                data += client.recv(65536)
    finally:
        hook.remove()
        server.stop()
