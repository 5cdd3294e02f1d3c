"""Runs requests: one thread owns the model and the tokenizer and serves a queue."""

from __future__ import annotations

import inspect
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from kvrewrite.errors import KVRewriteError
from kvrewrite.runtime.model import CACHE_NAME
from kvrewrite.serving.requests import Request, RequestError
from kvrewrite.serving.text import TextStream

JOIN_SECONDS = 5.0  # how long `close` waits for the thread, which can't be interrupted during a forward


@dataclass
class Event:
    """What a running request reports: new text, its end with a reason, or an error."""

    text: str = ""
    finish: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    error: BaseException | None = None


class Job:
    """A request in the engine; `emit` receives its events, in any thread, and must not block.

    cancelled: nobody waits for the answer any more. `Engine.cancel` sets it.
    """

    def __init__(self, request: Request, emit: Callable[[Event], None]):
        self.request, self.emit = request, emit
        self.cancelled = threading.Event()

    def check(self) -> None:
        """Called before every forward: raises _Abandoned if nobody waits for the answer."""
        if self.cancelled.is_set():
            raise _Abandoned


class _Abandoned(Exception):
    """Nobody waits for the answer."""


class _Sink(BaseStreamer):
    """Receives the tokens of `generate`, the prompt first."""

    def __init__(self, job: Job, text: TextStream):
        self.job, self.text, self.tokens, self._prompt = job, text, 0, True

    def put(self, value: torch.Tensor) -> None:
        """Receives new tokens."""
        if self._prompt:
            self._prompt = False
            return
        for token in value.reshape(-1).tolist():
            self.tokens += 1
            piece = self.text.push(token)
            if piece:
                self.job.emit(Event(piece))

    def end(self) -> None:
        """Does nothing: the engine sends the rest, because it knows why generation ended."""


class _Ends(StoppingCriteria):
    """Ends generation after a stop string, or if nobody waits for the answer."""

    def __init__(self, job: Job, text: TextStream):
        self.job, self.text = job, text

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        ends = self.text.stopped or self.job.cancelled.is_set()
        return torch.full((input_ids.shape[0],), ends, device=input_ids.device)


class Engine:
    """Runs one thread that owns a rewritten model and its tokenizer, with a queue of requests.

    max_new_tokens: the most that a request may ask for, and the default (chat).
    max_prompt_tokens: the longest prompt. waiting: requests that may wait; more are refused.
    Whatever happens in a request, its client gets an answer and the thread continues.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 1024,
        max_prompt_tokens: int = 32768,
        waiting: int = 64,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.max_prompt_tokens, self.max_waiting = max_new_tokens, max_prompt_tokens, waiting
        self.served, self.cancelled, self.failed = 0, 0, 0
        self.leased_after = 0  # bytes of pages that the last request's cache still held when it was reset; should be 0
        self._changed = threading.Condition()  # guards the next five
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._draining = self._stopped = False
        self._thread = threading.Thread(target=self._work, name="kvrewrite-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread serves requests."""
        return self._thread.is_alive() and not self._stopped

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining or self._stopped

    @property
    def running(self) -> bool:
        """Whether a request is being served."""
        return self._current is not None

    @property
    def waiting(self) -> int:
        """Returns the number of waiting requests."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queues a request; raises RequestError if the queue is full, the request too large or the server ending."""
        request = job.request
        if request.max_tokens is not None and request.max_tokens > self.max_new_tokens:
            raise RequestError(
                f"max_tokens is {request.max_tokens}, but this server makes at most {self.max_new_tokens} "
                "(--max-new-tokens)",
                param="max_tokens",
            )
        if isinstance(request.prompt, list) and not request.chat:
            self._check_length(len(request.prompt), request)
        with self._changed:
            if not self.alive or self._draining:
                raise _shutting_down()
            if len(self._waiting) >= self.max_waiting:
                raise RequestError(
                    f"{self.max_waiting} requests are waiting already; try again later", status=429, code="queue_full"
                )
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Cancels a job that nobody waits for: a waiting one leaves the queue, a running one ends at its next token or,
        during its prompt, at the next chunk. Does nothing to one that has ended."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self.cancelled += 1

    def drain(self) -> None:
        """Refuses new requests from now on; those accepted are served."""
        self._draining = True

    def stop(self) -> None:
        """Answers all running and waiting requests with an error; the thread ends at the next token or chunk. Does not
        wait."""
        with self._changed:
            self._stopped = True
            ended = [*([self._current] if self._current else []), *self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for job in ended:
            if not job.cancelled.is_set():
                job.emit(Event(error=_shutting_down()))
                job.cancelled.set()

    def close(self) -> None:
        """Calls `stop` and waits a while for the thread."""
        self.stop()
        self._thread.join(JOIN_SECONDS)

    # -- the thread ----------------------------------------------------------------------------------------------
    def _take(self) -> Job | None:
        """Returns the next request; None if the engine stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._waiting)
            if self._stopped:
                return None
            self._current = self._waiting.popleft()
            return self._current

    def _work(self) -> None:
        try:
            while (job := self._take()) is not None:
                try:
                    self._run(job)
                except _Abandoned:
                    self.cancelled += 1
                except BaseException as error:  # also SystemExit and panics of extensions: others wait for this thread
                    self.failed += 1
                    if not isinstance(error, (RequestError, KVRewriteError)):
                        traceback.print_exc()  # tells whoever runs the server; the client is told too
                    job.emit(Event(error=error))
                finally:
                    self._current = None
        finally:
            self.stop()  # nobody waits for a thread that has ended

    def _check_length(self, tokens: int, request: Request) -> None:
        if tokens > self.max_prompt_tokens:
            raise RequestError(
                f"the prompt has {tokens} tokens, but this server takes at most {self.max_prompt_tokens} "
                "(--max-prompt-tokens)",
                param="messages" if request.chat else "prompt",
                code="context_length_exceeded",
            )

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

        # The client sets a template's variables, but not the template or how it is applied: a template could keep the
        # only thread busy for ever.
        own = inspect.signature(self.tokenizer.apply_chat_template).parameters
        if taken := sorted(n for n in request.template if n in own):
            raise RequestError(
                f"chat_template_kwargs: {', '.join(taken)} can't be set by a request; expected variables of the model's chat "
                "template, such as enable_thinking",
                param="chat_template_kwargs",
            )
        try:
            found = self.tokenizer.apply_chat_template(
                request.prompt, add_generation_prompt=True, return_dict=True, **request.template
            )
        # What templates raise for roles and variables that they do not expect.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        ids = found["input_ids"]
        return ids

    def _run(self, job: Job) -> None:
        request, model = job.request, self.model
        ids = self._tokens(request)
        if not ids:
            raise RequestError("the prompt has no tokens", param="prompt")
        self._check_length(len(ids), request)
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
        cache.before_chunk = job.check
        try:
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=most,
                **{CACHE_NAME: cache},
                pad_token_id=pad,
                streamer=sink,
                **request.sampling,
                stopping_criteria=StoppingCriteriaList([_Ends(job, text)]),
            )
        finally:
            cache.reset()
            self.leased_after = cache.memory().leased
        job.check()
        self.served += 1
        rest = text.end()
        reason = "length" if sink.tokens >= most and not text.stopped else "stop"
        job.emit(Event(rest, reason, prompt_tokens=len(ids), tokens=sink.tokens))


def _shutting_down() -> RequestError:
    return RequestError("the server is shutting down", status=503, code="shutting_down")
