"""Serves requests: one thread owns the model and runs rounds of the scheduler, another one makes ids of prompts."""

from __future__ import annotations

import contextlib
import copy
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kvrewrite.errors import InputError, KVRewriteError, OptionError, PoolFull
from kvrewrite.runtime.batch import Batch, Running, rows_for
from kvrewrite.runtime.call import check_ids
from kvrewrite.runtime.exported import Steps
from kvrewrite.serving.documents import Document, load_documents
from kvrewrite.serving.grammar import Grammars
from kvrewrite.serving.jobs import Answer, Job
from kvrewrite.serving.limits import Capacity
from kvrewrite.serving.metrics import Metrics
from kvrewrite.serving.prompts import check_length, encode
from kvrewrite.serving.requests import RequestError
from kvrewrite.serving.sampling import check_generation_config
from kvrewrite.serving.scheduler import Scheduler, fatal
from kvrewrite.serving.text import TextStream

JOIN_SECONDS = 5.0  # how long `close` waits for the thread, which can't be interrupted during a forward


class Engine:
    """Owns a rewritten model and its tokenizer and answers many requests at once.

    max_new_tokens: the most that a request may ask for, and the default (chat). max_prompt_tokens: the longest prompt.
    waiting: requests that may wait; more are refused. capacity: what there is for those that run. Whatever happens in a
    request, its client gets an answer and the others go on. documents: a folder of saved caches that requests may go on
    from.

    Raises OptionError for a model that can't serve many requests at once.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 1024,
        max_prompt_tokens: int = 32768,
        waiting: int = 128,
        capacity: Capacity | None = None,
        documents: str | Path | None = None,
    ):
        check_generation_config(model.generation_config)
        if model.program.parallel is not None:
            raise OptionError(
                "this is one rank's part of a model, whose processes have to make the same steps; kvrewrite serve has one "
                "process. Serve it with vllm serve --tensor-parallel-size (docs/vllm.md)"
            )
        capacity = capacity or Capacity()
        _check_steps(model, capacity.max_requests)
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.max_prompt_tokens = max_new_tokens, max_prompt_tokens
        self.max_waiting, self.max_requests = waiting, capacity.max_requests
        self.metrics = Metrics()
        self.batch = Batch(model, memory=capacity.memory)
        self.documents = {} if documents is None else load_documents(self.batch, documents)
        self.scheduler = Scheduler(self.batch, self.metrics, capacity, self._ended)
        self.served, self.cancelled, self.failed = 0, 0, 0
        self._changed = threading.Condition()  # guards the next three
        self._jobs: dict[Job, None] = {}  # accepted, and not ended
        self._draining = self._stopped = False
        # Of its own: a tokenizer is not for two threads at once.
        self._encoder, self._encodes = ThreadPoolExecutor(1, "kvrewrite-prompts"), copy.deepcopy(tokenizer)
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self._grammars = Grammars(self._encodes, model.program.vocab_size, ends)
        for name, what, value in (
            ("requests_running", "Requests that are being served", lambda: self.running),
            ("requests_waiting", "Requests that wait", lambda: self.waiting),
            ("pages_used_share", "Share of the cache's pages that is in use", lambda: self.batch.used),
            ("prefixes", "Beginnings of prompts that are kept", lambda: len(self.scheduler.prefixes)),
        ):
            self.metrics.gauge(name, what, value)
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
    def running(self) -> int:
        """How many requests are being served."""
        return sum(job.started for job in list(self._jobs))

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return sum(not job.started for job in list(self._jobs))

    def warm_up(self) -> None:
        """Compiles and captures what requests will need, before the first one comes: a prompt, and a token of 1, 2, 4, ...
        answers (`rows_for`)."""
        longest = self.max_prompt_tokens + self.max_new_tokens
        limit = self.model.program.max_positions
        longest = longest if limit is None else min(longest, limit)
        batch, chunk = self.batch, self.model.policy.chunk or 512

        def begin(tokens: int) -> Running:
            running = batch.start([0] * max(1, min(tokens, longest - 2)), max_length=longest)
            while batch.advance(running) is None:
                pass
            return running

        with contextlib.suppress(InputError, PoolFull):  # there is memory for shorter prompts only
            batch.end(begin(2 * chunk + 1))
        rows = [begin(2)]
        spare, size = batch.fork(rows[0]), 1
        with contextlib.suppress(PoolFull):  # there is memory for fewer answers
            while True:
                batch.decode(rows, [0] * len(rows))
                if size >= self.max_requests:
                    break
                size = min(rows_for(size + 1), self.max_requests)
                rows += [batch.fork(spare) for _ in range(size - len(rows))]
        for request in [*rows, spare]:
            batch.end(request)

    def token_text(self, token: int) -> str:
        """The text of one token."""
        text: str = self.tokenizer.decode([token])
        return text

    def submit(self, job: Job, document: Document | None = None) -> None:
        """Accepts a request, about a document or none; raises RequestError if the queue is full, the request too large or
        the server ending."""
        request, job.document = job.request, document
        if request.max_tokens is not None and request.max_tokens > self.max_new_tokens:
            raise RequestError(
                f"max_tokens is {request.max_tokens}, but this server makes at most {self.max_new_tokens} "
                "(--max-new-tokens)",
                param="max_tokens",
            )
        if request.n > self.max_requests:
            raise RequestError(
                f"n is {request.n}, but this server runs at most {self.max_requests} answers at once (--max-requests)",
                param="n",
            )
        if isinstance(request.prompt, list) and not request.chat:
            check_length(len(request.prompt), self.max_prompt_tokens, request)
        try:
            job.policy = self.batch.policy(request.budget)
        except OptionError as error:
            raise RequestError(str(error), param="budget") from error
        with self._changed:
            if not self.alive or self._draining:
                raise _shutting_down()
            if self.waiting >= self.max_waiting:
                raise RequestError(
                    f"{self.max_waiting} requests are waiting already; try again later", status=429, code="queue_full"
                )
            self._jobs[job] = None
        self._encoder.submit(self._prepare, job)

    def cancel(self, job: Job) -> None:
        """Cancels a job that nobody waits for: a waiting one leaves the queue, a running one ends at its next token or,
        during its prompt, at the next segment. Does nothing to one that has ended."""
        job.cancelled.set()
        with self._changed:
            if not job.started and self.scheduler.waiting.remove(job):
                self._end(job, None)
            self.scheduler.cancels = True
            self._changed.notify()

    def drain(self) -> None:
        """Refuses new requests from now on; those accepted are served."""
        self._draining = True

    def stop(self) -> None:
        """Answers all running and waiting requests with an error; the thread ends at the next token or segment. Does not
        wait."""
        with self._changed:
            self._stopped = True
            jobs = list(self._jobs)
            self._changed.notify_all()
        self._encoder.shutdown(wait=False, cancel_futures=True)
        for job in jobs:
            if not job.cancelled.is_set():
                job.cancelled.set()
                job.report(_shutting_down())

    def close(self) -> None:
        """Calls `stop` and waits a while for the thread."""
        self.stop()
        self._thread.join(JOIN_SECONDS)

    # -- the thread that makes ids -----------------------------------------------------------------------------------
    def _prepare(self, job: Job) -> None:
        """A job's ids and samplers; it waits for its turn then."""
        try:
            self._check(job)
            self.scheduler.submit(job)
        except BaseException as error:
            with self._changed:
                self._end(job, error)
            return
        with self._changed:
            if job.cancelled.is_set() and self.scheduler.waiting.remove(job):
                self._end(job, None)
            self._changed.notify()

    def _check(self, job: Job) -> None:
        request, model = job.request, self.model
        document = job.document
        ids = encode(self._encodes, request, follows=document is not None)
        if not ids:
            raise RequestError("the prompt has no tokens", param="prompt")
        check_length(len(ids), self.max_prompt_tokens, request)
        if wrong := [i for i in request.logit_bias if not 0 <= i < model.program.vocab_size]:
            raise RequestError(
                f"logit_bias has the token ids {wrong[:8]}, expected 0 to {model.program.vocab_size - 1}",
                param="logit_bias",
            )
        check_ids(torch.tensor([ids]), model.program.vocab_size, decoding=False)
        default = self.max_new_tokens if request.chat else min(16, self.max_new_tokens)  # 16 is OpenAI's
        job.most = request.max_tokens or default
        tables = model.length_tables(len(ids) + job.most)
        if document is not None:  # it has the rotary frequencies that it was computed with
            ids, tables = [*document.ids, *ids], document.cache.length_tables
        job.ids, job.tables = ids, tuple(map(id, tables.values()))
        self.batch.check_fits(len(ids), len(ids) + job.most, job.policy, job.begun)
        for index in range(request.n):
            grammar = None if request.schema is None else self._grammars.make(request.schema)
            job.answers.append(Answer(job, index, TextStream(self.tokenizer, request.stops), grammar))

    # -- the thread that runs the model ------------------------------------------------------------------------------
    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self.scheduler.busy)
                    if self._stopped:
                        return
                self.scheduler.tick()
        finally:
            self.stop()  # nobody waits for a thread that has ended
            self.scheduler.close()

    def _ended(self, job: Job, error: BaseException | None) -> None:
        """Called by the scheduler."""
        with self._changed:
            self._end(job, error)
        if error is not None and fatal(error, self.model.device):
            raise KVRewriteError("the device can't be used any more") from error

    def _end(self, job: Job, error: BaseException | None) -> None:
        """A job has ended, with an error or without; holds the lock."""
        if self._jobs.pop(job, job) is job:
            return
        job.ended = True
        if error is not None:
            self.failed += 1
            self.metrics.failed.inc()
            if not isinstance(error, (RequestError, KVRewriteError)):
                traceback.print_exception(error)  # tells whoever runs the server; the client is told too
            job.report(error)
        elif job.cancelled.is_set():
            self.cancelled += 1
            self.metrics.cancelled.inc()
        else:
            self.served += 1
            self.metrics.finished.inc()


def _check_steps(model: Any, max_requests: int) -> None:
    """Raises OptionError where a model runs steps that were compiled for another number of rows."""
    steps = None if model.executor is None else model.executor.prompt
    if isinstance(steps, Steps) and (steps.batch_size > 1 or max_requests > 1):
        raise OptionError(
            f"the model runs steps that were compiled ahead for {'one row' if steps.batch_size == 1 else 'several rows'}, and a "
            "server of many requests has prompts of one row and tokens of several: give --max-requests 1 with steps for one "
            "row, or --compile instead of --trust-compiled"
        )


def _shutting_down() -> RequestError:
    return RequestError("the server is shutting down", status=503, code="shutting_down")
