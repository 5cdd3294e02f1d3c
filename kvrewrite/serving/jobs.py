"""What a request is while it is served: a job with one answer or several, and the events that tell its client of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.policies import Policy
from kvrewrite.runtime.batch import Running
from kvrewrite.serving.documents import Document
from kvrewrite.serving.requests import Request
from kvrewrite.serving.sampling import Logprobs, Sampler
from kvrewrite.serving.text import TextStream


@dataclass
class Event:
    """What a running request reports: new text of an answer (`index`), its end with a reason, or an error. last: no event
    comes after it. tokens, prompt_tokens: with an end. logprobs: of the tokens that the text comes of."""

    text: str = ""
    finish: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    error: BaseException | None = None
    index: int = 0
    last: bool = False
    count: int = 0  # tokens since the event before
    logprobs: list[Logprobs] = field(default_factory=list)


class Job:
    """A request in the engine; `emit` receives its events, in any thread, and must not block.

    cancelled: nobody waits for the answer any more. `Engine.cancel` sets it. client: whose turn it is in the queue.
    """

    def __init__(self, request: Request, emit: Callable[[Event], None], client: str = ""):
        self.request, self.emit, self.client = request, emit, client
        self.cancelled = threading.Event()
        self.arrived = time.monotonic()
        self.started = self.ended = False
        self.ids: list[int] = []
        self.most = 0
        self.policy: Policy
        self.document: Document | None = None  # what its prompt follows
        self.tables: tuple[int, ...] = ()  # which rotary frequencies it has, where RoPE depends on the length
        self.answers: list[Answer] = []

    @property
    def begun(self) -> EvictionCache | None:
        """The cache of its document."""
        return None if self.document is None else self.document.cache

    @property
    def cached(self) -> int:
        """Tokens of its document."""
        return 0 if self.document is None else len(self.document.ids)

    def report(self, error: BaseException) -> None:
        """Tells the client of an error, which ends the request."""
        self.emit(Event(error=error, last=True))


class Answer:
    """One answer of a job (`n` of them). grammar: what it has to follow, if anything. sampler: made when it begins, by the
    thread that runs the model: while that captures a step, no other thread may touch the device.

    tokens: those that the host knows; at: how many were chosen since it (again) began, those on their way included; got:
    how many of them the host has received. slot: where its newest token is.
    """

    sampler: Sampler

    def __init__(self, job: Job, index: int, text: TextStream, grammar: Any = None):
        self.job, self.index, self.text, self.most, self.grammar = job, index, text, job.most, grammar
        self.tokens: list[int] = []
        self.at = self.got = self.slot = self.order = 0
        self.running: Running | None = None
        self.ended = False
        self.failed_at: int | None = None  # the token in whose step something failed
        self.need = np.zeros(0)
        self.last = job.arrived
        self._pieces: list[str] = []
        self._logprobs: list[Logprobs] = []
        self._unsaid = 0

    def begin(self, model: Any) -> None:
        """It begins, or begins again."""
        self.at = self.got = 0
        if "sampler" in self.__dict__:
            self.sampler.restart()
        else:
            self.sampler = Sampler(model, self.job.request, self.job.ids, self.most, self.index)
            self.sampler.grammar = self.grammar

    @property
    def suspected(self) -> bool:
        """Whether it has to be alone in its next step."""
        return self.failed_at is not None and self.at >= self.failed_at

    def take(self, token: int, logprobs: Logprobs | None) -> str | None:
        """A new token. Returns why the answer ends with it, if it does."""
        self.tokens.append(token)
        self._unsaid += 1
        sampler, request = self.sampler, self.job.request
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if sampler.grammar is not None:
            sampler.grammar.take(token)
        if token not in request.stop_ids:
            piece = self.text.push(token)
            if piece and request.stream:
                self._say(Event(piece, index=self.index))
            elif piece:
                self._pieces.append(piece)
        if self.text.stopped or token in sampler.ends or (sampler.grammar is not None and sampler.grammar.complete):
            return "stop"
        return "length" if len(self.tokens) >= self.most else None

    def finish(self, reason: str, last: bool) -> None:
        """Tells the client of the end."""
        text = "".join(self._pieces) + self.text.end()
        event = Event(text, reason, len(self.job.ids), len(self.tokens), index=self.index, last=last)
        self._say(event)

    def _say(self, event: Event) -> None:
        event.logprobs, self._logprobs = self._logprobs, []
        event.count, self._unsaid = self._unsaid, 0
        self.job.emit(event)
