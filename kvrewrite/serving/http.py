"""The ASGI application: OpenAI's API for an engine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvrewrite.serving.answers import Shape, as_request_error, stream
from kvrewrite.serving.documents import as_model, find_document, listed, no_document, no_model
from kvrewrite.serving.engine import Engine
from kvrewrite.serving.jobs import Event, Job
from kvrewrite.serving.limits import Limits
from kvrewrite.serving.mail import Mailbox, Post
from kvrewrite.serving.requests import BYTES_BESIDE, BYTES_PER_TOKEN, RequestError, read_json, read_request

LOCAL = {"localhost", "127.0.0.1", "::1"}


class Bodies:
    """Limits the request bodies that are being read. Each body has `seconds` to arrive, and all together may have
    `most` bytes; beyond that, the body that has been read for longest is dropped, so that slow clients do not block
    fast ones."""

    def __init__(self, body: int, most: int, seconds: float):
        self.body, self.most, self.seconds = body, most, seconds
        self.closed = False
        self._sizes: dict[asyncio.Timeout, int] = {}  # oldest first

    async def read(self, request: HTTPRequest) -> bytearray:
        """Returns the body of a request; raises RequestError if it is too long or too slow."""
        if int(request.headers.get("content-length", "0")) > self.body:
            raise self._too_long()
        data = bytearray()
        deadline = asyncio.timeout(0 if self.closed else self.seconds)
        try:
            async with deadline:
                self._sizes[deadline] = 0
                async for part in request.stream():
                    data += part
                    if len(data) > self.body:
                        raise self._too_long()
                    self._sizes[deadline] = len(data)
                    self._make_room()
        except TimeoutError as error:
            if self.closed:
                raise RequestError("the server is shutting down", status=503, code="shutting_down") from error
            raise RequestError(
                f"the body was not complete in time (after at most {self.seconds:g} s, less where the server is busy)",
                status=408,
            ) from error
        finally:
            self._sizes.pop(deadline, None)
        return data

    def _make_room(self) -> None:
        while sum(self._sizes.values()) > self.most:
            oldest = next(iter(self._sizes))
            del self._sizes[oldest]
            _end(oldest)

    def close(self) -> None:
        """Ends all reading; new bodies are refused."""
        self.closed = True
        for deadline in self._sizes:
            _end(deadline)

    def _too_long(self) -> RequestError:
        return RequestError(
            f"the body has more than {self.body} bytes ({BYTES_PER_TOKEN} for each token of --max-prompt-tokens, and "
            f"{BYTES_BESIDE})",
            status=413,
        )


def _end(deadline: asyncio.Timeout) -> None:
    if not deadline.expired():
        deadline.reschedule(0)  # a time in the past


class _Streaming(StreamingResponse):
    """A stream that ends its job when it ends, whether it was read completely or not."""

    def __init__(self, content: AsyncIterator[str], ended: Callable[[], None]):
        super().__init__(content, media_type="text/event-stream")
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


def make_app(engine: Engine, name: str, limits: Limits | None = None) -> Starlette:
    """Makes the ASGI application: /v1/chat/completions, /v1/completions, /v1/models, /v1/documents, /health and /metrics.
    name: the model's name.

    `app.state.bodies` holds the bodies being read (`Bodies`). Its lifespan closes the engine.
    """
    limits = limits or Limits()
    longest = BYTES_BESIDE + BYTES_PER_TOKEN * engine.max_prompt_tokens
    bodies = Bodies(longest, limits.bodies * longest, limits.body_seconds)
    posts: list[Post] = []

    def post() -> Post:
        if not posts:
            posts.append(Post(asyncio.get_running_loop()))
        return posts[0]

    entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "kvrewrite"}

    async def answer(http: HTTPRequest, chat: bool) -> Response:
        _check_origin(http)
        request = read_request(read_json(await bodies.read(http)), chat)
        document = find_document(request, name, engine.documents)
        mail = Mailbox(post(), limits.unread if request.stream else None)
        who = http.headers.get("authorization") or (http.client.host if http.client else "")
        job = Job(request, mail.put, client=f"{who} {request.user or ''}")
        mail.overflows = lambda: engine.cancel(job)
        cached = 0 if document is None else len(document.ids)
        shape = Shape(request, request.model or name, engine.token_text, cached)
        engine.submit(job, document)
        streams, gone = False, asyncio.create_task(_until_gone(http))
        try:
            events = await _next(mail, gone)
            if request.stream:
                streams = True
                return _Streaming(stream(request, mail, events, shape), lambda: engine.cancel(job))
            while not events[-1].last:
                events += await _next(mail, gone)
            return JSONResponse(shape.whole(events))
        finally:
            gone.cancel()
            if not streams:
                engine.cancel(job)

    async def chat_completions(request: HTTPRequest) -> Response:
        return await answer(request, chat=True)

    async def completions(request: HTTPRequest) -> Response:
        return await answer(request, chat=False)

    async def models(_: HTTPRequest) -> Response:
        return JSONResponse(listed([entry, *(as_model(d, entry) for d in engine.documents.values())]))

    async def model(request: HTTPRequest) -> Response:
        asked = request.path_params["id"]
        for found in (entry, *(as_model(d, entry) for d in engine.documents.values())):
            if found["id"] == asked:
                return JSONResponse(found)
        raise no_model(asked, name)

    async def documents(_: HTTPRequest) -> Response:
        return JSONResponse(listed([d.entry for d in engine.documents.values()]))

    async def document(request: HTTPRequest) -> Response:
        asked = request.path_params["id"]
        if asked not in engine.documents:
            raise no_document(asked, engine.documents)
        return JSONResponse(engine.documents[asked].entry)

    async def health(_: HTTPRequest) -> Response:
        ok = engine.alive and not engine.draining
        status = {
            "status": "ok" if ok else "stopping" if engine.alive else "stopped",
            "running": engine.running,
            "waiting": engine.waiting,
            "served": engine.served,
            "cancelled": engine.cancelled,
            "failed": engine.failed,
        }
        return JSONResponse(status, 200 if ok else 503)

    async def metrics(_: HTTPRequest) -> Response:
        return Response(engine.metrics.text(), media_type=engine.metrics.content_type)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = Starlette(
        lifespan=lifespan,
        exception_handlers={
            RequestError: _refused,
            HTTPException: _unknown,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{id:path}", model),
            Route("/v1/documents", documents),
            Route("/v1/documents/{id:path}", document),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
    )
    app.state.bodies = bodies
    return app


def _check_origin(request: HTTPRequest) -> None:
    """Refuses what a foreign web page can make a browser send: a form, or (by DNS rebinding) JSON."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(
            f"Content-Type is {kind!r:.60}, expected application/json", status=415, code="unsupported_media_type"
        )
    origin = request.headers.get("origin")
    if origin is not None and _host(origin) not in LOCAL:
        raise RequestError(
            f"a web page of {origin!r:.80} sent this; pages of this machine only are served. A proxy that is to serve "
            "others takes the Origin header away",
            status=403,
            code="foreign_origin",
        )


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).hostname
    except ValueError:  # a malformed address in brackets
        return None


# -------------------------------------------------------------------------------------------------------------- errors
def _refused(_: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    # Does not wait for the rest of a body that was too slow.
    headers = {"Connection": "close"} if error.status == 408 else None
    return JSONResponse(error.body(), error.status, headers)


def _unknown(_: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        RequestError(str(error.detail), status=error.status_code).body(), error.status_code, error.headers
    )


def _gone(_: HTTPRequest, error: Exception) -> Response:
    return Response(status_code=499)


def _failed(_: HTTPRequest, error: Exception) -> Response:
    return JSONResponse(RequestError(f"{type(error).__name__}: {error}", status=500).body(), 500)


async def _until_gone(http: HTTPRequest) -> None:
    """Returns when the client has gone; nothing else comes after a body."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _next(mail: Mailbox, gone: asyncio.Task[None]) -> list[Event]:
    """Returns the next events; raises an error among them, or ClientDisconnect if the client has gone."""
    coming = asyncio.ensure_future(mail.get())
    await asyncio.wait((coming, gone), return_when=asyncio.FIRST_COMPLETED)
    if not coming.done():
        coming.cancel()
        raise ClientDisconnect
    for event in coming.result():
        if event.error is not None:
            raise as_request_error(event.error) from event.error
    return coming.result()
