"""An HTTP server with OpenAI's API around one rewritten model: `kvrewrite serve DIR`.

Requests run one after another, in the order in which they came, in one thread that owns the model and the tokenizer; others
wait in a bounded queue. So an answer does not depend on who else asks, and at most one cache is alive: its pages go back
when the request ends, also when its client has gone. There is no continuous batching and no reuse of prefixes. The tokens
are made by transformers' own `generate`, so what generation_config.json says holds here, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import queue
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from kvrewrite.errors import KVRewriteError, OptionError
from kvrewrite.model import CACHE_NAME

MAX_BODY = 16 << 20  # bytes of a request
MAX_STOPS = 16
POLL = 0.1  # seconds between looks at whether the client is still there

# Fields of a request that change nothing in an answer.
_HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}
# Fields that would change it and are not done here: refused unless they have a value that asks for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (None, 1), "best_of": (None, 1), "echo": (None, False), "suffix": (None, ""), "logprobs": (None, False),
    "top_logprobs": (None, 0), "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "logit_bias": (None, {}),
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []), "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]), "audio": (None,), "prediction": (None,),
    "reasoning_effort": (None,), "verbosity": (None,), "web_search_options": (None,),
}  # fmt: skip
_COMMON = {"model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "stream",
           "stream_options"}  # fmt: skip


class RequestError(Exception):
    """What a client did wrong (or the server can't do), as OpenAI's API reports it."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        kind = {404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


# ------------------------------------------------------------------------------------------------------------- requests
@dataclass
class Request:
    """One request, checked. prompt: text, token ids, or chat messages."""

    prompt: Any
    chat: bool
    max_tokens: int | None
    sampling: dict[str, Any]
    seed: int | None
    stops: list[str]
    stream: bool
    usage: bool  # in the stream, too
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


def _number(body: dict[str, Any], name: str, low: float, high: float, kind: type = float) -> Any:
    value = body.get(name)
    if value is None:
        return None
    valid = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not valid or not low <= value <= high:
        expected = f"an integer from {low} to {high}" if kind is int else f"a number from {low:g} to {high:g}"
        raise RequestError(f"{name} is {value!r:.40}, expected {expected}", param=name)
    return kind(value)


def read_request(body: Any, chat: bool) -> Request:
    """A request's JSON body as a Request; raises RequestError."""
    if not isinstance(body, dict):
        raise RequestError("the body is not a JSON object")
    own = {"messages", "max_completion_tokens", "chat_template_kwargs"} if chat else {"prompt"}
    for name, value in body.items():
        if name in _COMMON or name in own or name in _HARMLESS:
            continue
        if name not in _NOTHING:
            raise RequestError(f"{name!r:.60} is not a parameter of this endpoint", param=str(name)[:60])
        if not any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in _NOTHING[name]):
            raise RequestError(f"{name} is not supported by this server; leave it out", param=name, code="unsupported")
    sampling: dict[str, Any] = {}
    temperature = _number(body, "temperature", 0, 2)
    if temperature is not None:
        sampling = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling["temperature"] = temperature
    for name, low, high, kind in (
        ("top_p", 0, 1, float), ("top_k", 0, 1 << 20, int), ("min_p", 0, 1, float), ("repetition_penalty", 1e-3, 100, float),
    ):  # fmt: skip
        value = _number(body, name, low, high, kind)
        if value is not None and (name == "repetition_penalty" or sampling.get("do_sample", True)):
            sampling[name] = value
    if sampling.get("top_p") == 0:  # only the likeliest token
        sampling = {**{k: v for k, v in sampling.items() if k == "repetition_penalty"}, "do_sample": False}
    stops = body.get("stop")
    stops = [stops] if isinstance(stops, str) else (stops or [])
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise RequestError(f"stop: expected a text, or a list of at most {MAX_STOPS} texts", param="stop")
    stream, options = body.get("stream") or False, body.get("stream_options") or {}
    if not isinstance(stream, bool) or not isinstance(options, dict):
        raise RequestError("stream: expected true or false; stream_options: an object", param="stream")
    limit = _number(body, "max_tokens", 1, 1 << 30, int)
    if chat:
        limit = _number(body, "max_completion_tokens", 1, 1 << 30, int) or limit
    seed = _number(body, "seed", -(1 << 63), (1 << 63) - 1, int)
    prompt = _messages(body) if chat else _prompt(body)
    return Request(prompt, chat, limit, sampling, seed, stops, stream, bool(options.get("include_usage")))


def _prompt(body: dict[str, Any]) -> Any:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    is_ids = isinstance(prompt, list) and all(type(n) is int for n in prompt)
    if not (isinstance(prompt, str) or is_ids) or not prompt:
        raise RequestError(
            "prompt: expected one text or one list of token ids; send a request for each", param="prompt"
        )
    return prompt


def _messages(body: dict[str, Any]) -> list[dict[str, str]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise RequestError("messages: expected a list of {role, content}, at least one", param="messages")
    found = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list):
            texts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
            content = "".join(map(str, texts)) if len(texts) == len(content) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise RequestError(
                f"messages[{i}]: expected a role and content that is text (no images, audio or tool calls)",
                param=f"messages[{i}]",
            )
        found.append({"role": role, "content": content})
    kwargs = body.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RequestError("chat_template_kwargs: expected an object", param="chat_template_kwargs")
    return [{"messages": found, "kwargs": kwargs or {}}]  # type: ignore[dict-item]


# -------------------------------------------------------------------------------------------------------------- engine
@dataclass
class Event:
    """What a running request reports: new text, its end with a reason, or an error."""

    text: str = ""
    finish: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    error: Exception | None = None


class Job:
    """A request on its way through the engine; events are delivered to `emit` in the engine's thread."""

    def __init__(self, request: Request, emit: Callable[[Event], None]):
        self.request, self.emit = request, emit
        self.cancelled = threading.Event()


class TextStream:
    """Text of tokens as they come: only what later tokens and stop strings can't change any more.

    stopped: whether one of `stops` was found; its text, and what comes behind, is left out.
    """

    def __init__(self, tokenizer: Any, stops: list[str]):
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._begin = self._read = 0  # tokens before `begin` have no influence on the text behind `read`
        self._held = ""
        self.stopped = False

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is settled now."""
        if self.stopped:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._begin : self._read])
        now = self._decode(self._ids[self._begin :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""  # the middle of a character, or a special token
        self._begin, self._read = self._read, len(self._ids)
        return self._settle(now[len(before) :])

    def _settle(self, text: str) -> str:
        held = self._held + text
        found = [at for s in self._stops if (at := held.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        keep = max((n for s in self._stops for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        self._held = held[len(held) - keep :] if keep else ""
        return held[: len(held) - keep]

    def end(self) -> str:
        """The text that was held back."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._begin : self._read])
        return self._settle(self._decode(self._ids[self._begin :])[len(before) :]) + self._held


class _Sink(BaseStreamer):
    """Takes the tokens of `generate`, the prompt first."""

    def __init__(self, job: Job, text: TextStream):
        self.job, self.text, self.tokens, self._prompt = job, text, 0, True

    def put(self, value: torch.Tensor) -> None:
        """New tokens."""
        if self._prompt:
            self._prompt = False
            return
        for token in value.reshape(-1).tolist():
            self.tokens += 1
            piece = self.text.push(token)
            if piece:
                self.job.emit(Event(piece))

    def end(self) -> None:
        """The rest is given by the engine, which knows why it ended."""


class _Ends(StoppingCriteria):
    """Ends generation where a stop string was found or nobody waits for the answer."""

    def __init__(self, job: Job, text: TextStream, closing: threading.Event):
        self.job, self.text, self.closing = job, text, closing

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        ends = self.text.stopped or self.job.cancelled.is_set() or self.closing.is_set()
        return torch.full((input_ids.shape[0],), ends, device=input_ids.device)


class Engine:
    """One thread that owns a rewritten model and its tokenizer, and a queue of requests before it.

    max_new_tokens: the most that a request may ask for, and what it gets where it asks for nothing (chat). waiting: requests
    that may wait; more are refused.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int = 1024, waiting: int = 64):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self._queue: queue.Queue[Job | None] = queue.Queue(waiting)
        self._closing = threading.Event()
        self.served, self.cancelled, self.failed, self.running = 0, 0, 0, False
        self.leased_after = 0  # bytes of pages that the last request's cache still had when it was reset; 0 is right
        self._thread = threading.Thread(target=self._work, name="kvrewrite-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive() and not self._closing.is_set()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._queue.qsize()

    def submit(self, job: Job) -> None:
        """Puts a request into the queue; raises RequestError where it is full or the server is ending."""
        if not self.alive:
            raise RequestError("the server is shutting down", status=503, code="shutting_down")
        asked = job.request.max_tokens
        if asked is not None and asked > self.max_new_tokens:
            raise RequestError(
                f"max_tokens is {asked}, but this server makes at most {self.max_new_tokens} (--max-new-tokens)",
                param="max_tokens",
            )
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise RequestError(
                f"{self._queue.maxsize} requests are waiting already; try again later", status=429, code="queue_full"
            ) from None

    def close(self) -> None:
        """Ends the running request at its next token, drops those that wait, and the thread."""
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(60)

    def _work(self) -> None:
        while not self._closing.is_set():
            job = self._queue.get()
            if job is None:
                break
            if job.cancelled.is_set():
                self.cancelled += 1
                continue
            self.running = True
            try:
                self._run(job)
            except (RequestError, KVRewriteError) as error:
                self.failed += 1
                job.emit(Event(error=error))
            except Exception as error:  # the server goes on; the client is told, and so is whoever runs the server
                self.failed += 1
                traceback.print_exc()
                job.emit(Event(error=error))
            finally:
                self.running = False
        while not self._queue.empty():
            job = self._queue.get_nowait()
            if job is not None:
                job.emit(Event(error=RequestError("the server is shutting down", status=503, code="shutting_down")))

    def _tokens(self, request: Request) -> list[int]:
        if not request.chat:
            if isinstance(request.prompt, list):
                return request.prompt
            ids: list[int] = self.tokenizer(request.prompt)["input_ids"]
            return ids
        if not self.tokenizer.chat_template:
            raise RequestError(
                "this model's tokenizer has no chat template; use /v1/completions", code="no_chat_template"
            )
        from jinja2 import TemplateError

        chat = request.prompt[0]
        # Variables of the template are the client's; the template itself, and how it is applied, are not: a template can keep
        # the only thread busy for ever.
        own = inspect.signature(self.tokenizer.apply_chat_template).parameters
        if taken := sorted(n for n in chat["kwargs"] if n in own):
            raise RequestError(
                f"chat_template_kwargs: {', '.join(taken)} can't be set by a request; expected variables of the model's chat "
                "template, such as enable_thinking",
                param="chat_template_kwargs",
            )
        try:
            found = self.tokenizer.apply_chat_template(
                chat["messages"], add_generation_prompt=True, return_dict=True, **chat["kwargs"]
            )
        except (TemplateError, TypeError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        ids = found["input_ids"]
        return ids

    def _run(self, job: Job) -> None:
        request, model = job.request, self.model
        ids = self._tokens(request)
        if not ids:
            raise RequestError("the prompt has no tokens", param="prompt")
        default = self.max_new_tokens if request.chat else min(16, self.max_new_tokens)  # 16 is OpenAI's
        most = request.max_tokens or default
        text = TextStream(self.tokenizer, request.stops)
        sink = _Sink(job, text)
        if request.seed is None:
            torch.seed()
        else:
            torch.manual_seed(request.seed)
        tokens = torch.tensor([ids], device=model.device)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        cache = model.new_cache(1, max_length=len(ids) + most)
        try:
            model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=most, **{CACHE_NAME: cache},
                pad_token_id=pad, streamer=sink, **request.sampling,
                stopping_criteria=StoppingCriteriaList([_Ends(job, text, self._closing)]),
            )  # fmt: skip
        finally:
            cache.reset()
            self.leased_after = cache.memory().leased
        if job.cancelled.is_set():
            self.cancelled += 1
            return
        if self._closing.is_set():
            raise RequestError("the server is shutting down", status=503, code="shutting_down")
        self.served += 1
        rest = text.end()
        reason = "length" if sink.tokens >= most and not text.stopped else "stop"
        job.emit(Event(rest, reason, prompt_tokens=len(ids), tokens=sink.tokens))


# ---------------------------------------------------------------------------------------------------------------- HTTP
def make_app(engine: Engine, name: str) -> Any:
    """The ASGI application: /v1/chat/completions, /v1/completions, /v1/models and /health. name: what the model is called."""
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse, StreamingResponse
        from starlette.routing import Route
    except ImportError as error:
        raise OptionError("serving needs starlette and uvicorn: pip install 'kvrewrite[serve]'") from error

    class Streaming(StreamingResponse):
        """A stream whose request ends with it, whether it was read or not."""

        job: Job

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                self.job.cancelled.set()

    started = int(time.time())
    entry = {"id": name, "object": "model", "created": started, "owned_by": "kvrewrite"}

    def refused(_: Any, error: Any) -> Any:
        return JSONResponse(error.body(), status_code=error.status)

    def unknown(_: Any, error: Any) -> Any:
        return JSONResponse(RequestError(str(error.detail), status=error.status_code).body(), error.status_code)

    async def body_of(request: Any) -> Any:
        data = b""
        async for part in request.stream():
            data += part
            if len(data) > MAX_BODY:
                raise RequestError(f"the body has more than {MAX_BODY} bytes", status=413)
        try:
            return json.loads(data)
        except ValueError as error:
            raise RequestError(f"the body is not JSON: {error}") from error

    async def answer(http: Any, chat: bool) -> Any:
        body = await body_of(http)
        request = read_request(body, chat)
        if body.get("model") not in (None, name):
            raise RequestError(
                f"this server has the model {name!r}, not {body['model']!r:.80}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        job = Job(request, lambda event: _deliver(loop, events, event))
        shape = _Shape(request, name)
        engine.submit(job)
        streams = False
        try:
            first = await _next(events, http.is_disconnected)
            if first.error is not None:
                raise _as_request_error(first.error)
            if request.stream:
                response = Streaming(_stream(request, events, first, shape), media_type="text/event-stream")
                response.job, streams = job, True
                return response
            text = first.text
            event = first
            while event.finish is None:
                event = await _next(events, http.is_disconnected)
                if event.error is not None:
                    raise _as_request_error(event.error)
                text += event.text
            return JSONResponse(shape.whole(text, event))
        finally:
            if not streams:
                job.cancelled.set()  # without effect on one that has ended

    async def chat_completions(request: Any) -> Any:
        return await answer(request, chat=True)

    async def completions(request: Any) -> Any:
        return await answer(request, chat=False)

    async def models(_: Any) -> Any:
        return JSONResponse({"object": "list", "data": [entry]})

    async def model(request: Any) -> Any:
        if request.path_params["id"] != name:
            raise RequestError(f"this server has the model {name!r}", status=404, param="model", code="model_not_found")
        return JSONResponse(entry)

    async def health(_: Any) -> Any:
        status = {
            "status": "ok" if engine.alive else "stopped", "running": engine.running, "waiting": engine.waiting,
            "served": engine.served, "cancelled": engine.cancelled, "failed": engine.failed,
        }  # fmt: skip
        return JSONResponse(status, 200 if engine.alive else 503)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    return Starlette(
        lifespan=lifespan,
        exception_handlers={RequestError: refused, HTTPException: unknown, ClientDisconnect: _gone},
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{id:path}", model),
            Route("/health", health),
        ],
    )


def _gone(_: Any, error: Any) -> Any:
    from starlette.responses import Response

    return Response(status_code=499)


def _deliver(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(events.put_nowait, event)


async def _next(events: asyncio.Queue[Event], disconnected: Callable[[], Awaitable[bool]]) -> Event:
    """The next event; ends with ClientDisconnect where the client has gone."""
    from starlette.requests import ClientDisconnect

    while True:
        try:
            return await asyncio.wait_for(events.get(), POLL)
        except TimeoutError:
            if await disconnected():
                raise ClientDisconnect from None


def _as_request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, (KVRewriteError, ValueError)):
        return RequestError(str(error))
    return RequestError(f"{type(error).__name__}: {error}", status=500)


async def _stream(request: Request, events: asyncio.Queue[Event], event: Event, shape: _Shape) -> AsyncIterator[str]:
    """Server-sent events, `event` first."""
    if request.chat:
        yield _sse(shape.chunk(role="assistant"))
    while True:
        if event.error is not None:
            yield _sse(_as_request_error(event.error).body())
            return
        if event.text:
            yield _sse(shape.chunk(event.text))
        if event.finish is not None:
            break
        event = await events.get()
    yield _sse(shape.chunk(finish=event.finish))
    if request.usage:
        yield _sse(shape.usage_chunk(event))
    yield "data: [DONE]\n\n"


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class _Shape:
    """Answers as OpenAI's API has them."""

    def __init__(self, request: Request, model: str):
        self.request = request
        kind = "chat.completion" if request.chat else "text_completion"
        prefix = "chatcmpl" if request.chat else "cmpl"
        self.head = {"id": f"{prefix}-{request.id}", "object": kind, "created": request.created, "model": model}

    @staticmethod
    def usage(event: Event) -> dict[str, int]:
        total = event.prompt_tokens + event.tokens
        return {"prompt_tokens": event.prompt_tokens, "completion_tokens": event.tokens, "total_tokens": total}

    def whole(self, text: str, event: Event) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": event.finish}
        if self.request.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return {**self.head, "choices": [choice], "usage": self.usage(event)}

    def _chunk_head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.request.chat else "text_completion"
        return {**self.head, "object": kind}

    def chunk(self, text: str = "", finish: str | None = None, role: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self.request.chat:
            delta = {"role": role, "content": ""} if role else ({"content": text} if text else {})
            choice["delta"] = delta
        else:
            choice["text"] = text
        return {**self._chunk_head(), "choices": [choice]}

    def usage_chunk(self, event: Event) -> dict[str, Any]:
        return {**self._chunk_head(), "choices": [], "usage": self.usage(event)}


def serve(engine: Engine, name: str, *, host: str = "127.0.0.1", port: int = 8000, log_level: str = "info") -> None:
    """Serves until it is interrupted."""
    app = make_app(engine, name)
    try:
        import uvicorn
    except ImportError as error:
        raise OptionError("serving needs uvicorn: pip install 'kvrewrite[serve]'") from error
    uvicorn.run(app, host=host, port=port, log_level=log_level)
