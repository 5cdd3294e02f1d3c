"""What clients are answered: OpenAI's JSON, whole or as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from kvrewrite.errors import InputError
from kvrewrite.serving.jobs import Event
from kvrewrite.serving.mail import Mailbox
from kvrewrite.serving.requests import Request, RequestError
from kvrewrite.serving.sampling import Logprobs

MARK = "<text of the chunk>"  # stands for a text; nothing else in a chunk has it


def as_request_error(error: BaseException) -> RequestError:
    """An error of a request as its client is told."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InputError):
        return RequestError(str(error), param="prompt")
    if isinstance(error, ValueError):
        return RequestError(str(error))
    return RequestError(f"{type(error).__name__}: {error}", status=500)


async def stream(request: Request, mail: Mailbox, events: list[Event], shape: Shape) -> AsyncIterator[str]:
    """Yields server-sent events, `events` first. What has come in the meantime is one chunk."""
    if request.chat:
        for index in range(request.n):
            yield _sse(shape.chunk(index, role="assistant"))
    tokens = prompt_tokens = 0
    while True:
        for event in _merged(events):
            if event.error is not None:
                yield _sse(as_request_error(event.error).body())
                return
            if event.logprobs:
                yield _sse(shape.chunk(event.index, event.text, logprobs=event.logprobs))
            elif event.text:
                yield shape.text_event(event.index, event.text)
            if event.finish is not None:
                tokens, prompt_tokens = tokens + event.tokens, event.prompt_tokens
                yield _sse(shape.chunk(event.index, finish=event.finish))
        if events[-1].last:
            break
        events = await mail.get()
    if request.usage:
        yield _sse(shape.usage_chunk(prompt_tokens, tokens))
    yield "data: [DONE]\n\n"


def _merged(events: list[Event]) -> list[Event]:
    """One event for each answer, and errors."""
    if len(events) == 1:
        return events
    found: dict[int, Event] = {}
    for event in events:
        if event.error is not None:
            return [*found.values(), event]
        before = found.get(event.index)
        if before is not None:
            event.text = before.text + event.text
            event.logprobs = before.logprobs + event.logprobs
        found[event.index] = event
    return list(found.values())


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class Shape:
    """Formats answers as in OpenAI's API. token_text: the text of one token; cached: prompt tokens of a document."""

    def __init__(self, request: Request, model: str, token_text: Callable[[int], str], cached: int = 0):
        self.request, self._token_text, self._cached = request, token_text, cached
        kind = "chat.completion" if request.chat else "text_completion"
        prefix = "chatcmpl" if request.chat else "cmpl"
        self.head = {"id": f"{prefix}-{request.id}", "object": kind, "created": request.created, "model": model}
        self._chunk_head = {**self.head, "object": "chat.completion.chunk"} if request.chat else self.head
        self._around: dict[int, tuple[str, str]] = {}
        self._offsets = [0] * request.n  # of the next token in each answer's text

    def usage(self, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """The numbers of tokens."""
        used = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
        return used if not self._cached else {**used, "prompt_tokens_details": {"cached_tokens": self._cached}}

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The complete answer. events: the end of each of its answers."""
        choices = []
        for event in sorted(events, key=lambda e: e.index):
            choice = {
                "index": event.index,
                "logprobs": self._logprobs(event.index, event.logprobs),
                "finish_reason": event.finish,
            }
            if self.request.chat:
                choice["message"] = {"role": "assistant", "content": event.text}
            else:
                choice["text"] = event.text
            choices.append(choice)
        usage = self.usage(events[0].prompt_tokens, sum(e.tokens for e in events))
        return {**self.head, "choices": choices, "usage": usage}

    def chunk(
        self,
        index: int,
        text: str = "",
        finish: str | None = None,
        role: str | None = None,
        logprobs: Sequence[Logprobs] = (),
    ) -> dict[str, Any]:
        """A piece of an answer."""
        choice: dict[str, Any] = {
            "index": index,
            "logprobs": self._logprobs(index, logprobs) if logprobs else None,
            "finish_reason": finish,
        }
        if self.request.chat:
            choice["delta"] = {"role": role, "content": ""} if role else ({"content": text} if text else {})
        else:
            choice["text"] = text
        return {**self._chunk_head, "choices": [choice]}

    def text_event(self, index: int, text: str) -> str:
        """`chunk` with nothing but text as a server-sent event: what there are most of, so it is put together of pieces."""
        if index not in self._around:
            begin, end = _sse(self.chunk(index, MARK)).split(json.dumps(MARK))
            self._around[index] = begin, end
        begin, end = self._around[index]
        return f"{begin}{json.dumps(text, ensure_ascii=False)}{end}"

    def usage_chunk(self, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """What a stream may end with."""
        return {**self._chunk_head, "choices": [], "usage": self.usage(prompt_tokens, tokens)}

    # -- log probabilities -----------------------------------------------------------------------------------------
    def _logprobs(self, index: int, tokens: Sequence[Logprobs]) -> dict[str, Any] | None:
        most = self.request.logprobs
        if most is None:
            return None
        if self.request.chat:
            content = [
                {**self._entry(t.token, t.value), "top_logprobs": [self._entry(*top) for top in t.top[:most]]}
                for t in tokens
            ]
            return {"content": content, "refusal": None}
        texts, offsets = [self._token_text(t.token) for t in tokens], []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [t.value for t in tokens],
            "top_logprobs": [{self._token_text(i): v for i, v in t.top[:most]} for t in tokens],
            "text_offset": offsets,
        }

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        text = self._token_text(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}
