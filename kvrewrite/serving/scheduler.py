"""Continuous batching: which request's prompt goes on, and who decodes, in every round.

Requests wait in a queue that is fair among clients. A round computes a bounded number of prompt tokens, so that long
prompts don't stall streams, and then one token of every answer at once. It launches that step before it looks at the tokens of
the one before: text, stop strings and clients are dealt with while the device is at work. Where pages run short, kept
prefixes go first, then the youngest request; it is computed again later, its own tokens given to it, not drawn again.
What fails, fails alone.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.cache.pages import to_device
from kvrewrite.errors import KVRewriteError, PoolFull
from kvrewrite.runtime.batch import Batch, Running, first_segments, side_by_side
from kvrewrite.serving.jobs import Answer, Job
from kvrewrite.serving.limits import Capacity
from kvrewrite.serving.metrics import Metrics
from kvrewrite.serving.prefixes import Plan, Prefixes
from kvrewrite.serving.requests import RequestError
from kvrewrite.serving.sampling import Chosen, choose

SIMILAR = 0.75  # segments whose lengths differ by less go through the model together
AHEAD = 256  # tokens of an answer that there should be pages for when it begins; some end early


class Prompt:
    """A prompt that waits or is being computed, for one answer or several. need: pages of each pool."""

    def __init__(self, job: Job, answers: list[Answer]):
        self.job, self.answers = job, answers
        self.running: Running | None = None
        self.plan: Plan | None = None
        self.keep_at: int | None = None
        self.order = 0
        self.alone = False  # a pass with it and others failed
        self.first = 0  # tokens of its first segment
        self.need = self.steady = np.zeros(0)


class Waiting:
    """Prompts that wait: clients in turn, each one's in order of arrival. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: OrderedDict[str, deque[Prompt]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._clients)

    def put(self, prompt: Prompt, *, first: bool = False) -> None:
        """Adds a prompt; first: one that ran before, which goes on before all others."""
        with self._lock:
            queue = self._clients.setdefault(prompt.job.client, deque())
            if first:
                queue.appendleft(prompt)
                self._clients.move_to_end(prompt.job.client, last=False)
            else:
                queue.append(prompt)

    def take(self, busy: set[str], fits: Callable[[Prompt], bool]) -> Prompt | None:
        """The next prompt of a client that is not busy. Whoever does not fit is waited for, and not overtaken."""
        with self._lock:
            client = next((c for c in self._clients if c not in busy), None)
            if client is None or not fits(self._clients[client][0]):
                return None
            prompt = self._clients[client].popleft()
            self._clients.move_to_end(client)
            if not self._clients[client]:
                del self._clients[client]
            return prompt

    def jobs(self) -> set[Job]:
        """Those that wait."""
        with self._lock:
            return {prompt.job for queue in self._clients.values() for prompt in queue}

    def remove(self, job: Job) -> bool:
        """Takes a job's prompts out; whether there was one."""
        with self._lock:
            queue = self._clients.get(job.client)
            if queue is None:
                return False
            kept = deque(p for p in queue if p.job is not job)
            found = len(kept) < len(queue)
            self._clients[job.client] = kept
            if not kept:
                del self._clients[job.client]
            return found


class Scheduler:
    """Drives a `Batch`. ended: told of every job that has ended, with its error or None."""

    def __init__(
        self,
        batch: Batch,
        metrics: Metrics,
        capacity: Capacity,
        ended: Callable[[Job, BaseException | None], None],
    ):
        self.batch, self.metrics, self.capacity = batch, metrics, capacity
        self.waiting, self.prefixes, self._ended = Waiting(), Prefixes(batch, capacity.prefixes), ended
        self._open: deque[Prompt] = deque()  # prompts that are being computed, one a client
        self._rows: list[Answer] = []  # those that decode
        self._ids: Tensor | None = None  # the newest token of each, at Answer.slot
        self._pending: list[tuple[list[Answer], Chosen]] = []  # tokens on their way to the host
        self._orders, self._full = 0, False
        self.cancels = False  # whether to look for jobs that were cancelled
        self._limits = np.array(batch.room)

    # -- jobs ------------------------------------------------------------------------------------------------------
    def submit(self, job: Job) -> None:
        """A job waits for its turn. Any thread may say so."""
        prompt = Prompt(job, job.answers)
        self._measure(prompt)
        self.waiting.put(prompt)

    def _measure(self, prompt: Prompt) -> None:
        job = prompt.job
        total = len(job.ids) + min(prompt.answers[0].most, AHEAD)
        begin, steady = self.batch.pages_needed(len(job.ids), total, job.policy, job.begun)
        prompt.steady = np.asarray(steady) * len(prompt.answers)
        plan = job.policy.plan(len(job.ids)) if job.begun is None else first_segments(job.begun, len(job.ids))
        prompt.first = plan[0].length
        prompt.need = np.asarray(begin) + prompt.steady - np.asarray(steady)
        for answer in prompt.answers:
            answer.need = np.asarray(steady)

    @property
    def busy(self) -> bool:
        """Whether a round has something to do."""
        return bool(self._open or self._rows or self._pending or self.waiting)

    def tick(self) -> None:
        """One round."""
        self._drop_cancelled()
        self._advance_prompts()
        rows, logits = self._step()
        self._receive()
        if logits is not None:
            self._choose(rows, logits)

    def close(self) -> None:
        """Gives everything back."""
        for prompt in list(self._open):
            self._leave(prompt)
        for answer in list(self._rows):
            self._release(answer)
        self._pending.clear()
        self.prefixes.clear()

    def _drop_cancelled(self) -> None:
        if not self.cancels:
            return
        self.cancels = False
        for job in {a.job for a in self._rows} | {p.job for p in self._open} | self.waiting.jobs():
            if job.cancelled.is_set():
                self._end_job(job, None)

    def _end_job(self, job: Job, error: BaseException | None) -> None:
        """All of a job's answers end, complete or not."""
        if job.ended:
            return
        job.ended = True
        self.waiting.remove(job)
        for prompt in [p for p in self._open if p.job is job]:
            self._leave(prompt)
        for answer in job.answers:
            answer.ended = True
            self._release(answer)
        self._ended(job, error)

    def _leave(self, prompt: Prompt) -> None:
        """A prompt is no longer computed."""
        if prompt in self._open:
            self._open.remove(prompt)
        if prompt.running is not None and not prompt.running.ended:
            self.batch.end(prompt.running)
        prompt.running = None

    def _release(self, answer: Answer) -> None:
        """An answer decodes no longer."""
        if answer in self._rows:
            self._rows.remove(answer)
        if answer.running is not None and not answer.running.ended:
            self.batch.end(answer.running)
        answer.running, self._full = None, False

    # -- prompts ---------------------------------------------------------------------------------------------------
    def _fits(self, prompt: Prompt) -> bool:
        rows = len(self._rows) + sum(len(p.answers) for p in self._open)
        if not rows:
            return True
        if self._full or rows + len(prompt.answers) > self.capacity.max_requests:
            return False
        needs = [p.need for p in self._open] + [a.need for a in self._rows]
        return bool((sum(needs) + prompt.need <= self._limits).all())

    def _advance_prompts(self) -> None:
        left = self.capacity.prompt_tokens
        while left > 0 and (some := self._next_prompts(left)):
            left -= self._advance(some)

    def _next_prompts(self, left: int) -> list[Prompt]:
        """Whose segments come next: those of the client whose turn it is, with others of about that length."""
        while new := self.waiting.take({p.job.client for p in self._open}, self._fits):
            self._begin(new)
        if not self._open:
            return []
        first = self._open.popleft()
        self._open.append(first)  # the next one is another client's
        assert first.running is not None
        length = first.running.next_segment
        most = min(side_by_side(length), max(1, left // length))
        if most == 1 or first.alone:
            return [first]

        def goes_with(prompt: Prompt) -> bool:
            other = prompt.running.next_segment if prompt.running is not None else prompt.first
            similar = SIMILAR * length <= other <= length / SIMILAR
            return similar and not prompt.alone and prompt.job.tables == first.job.tables

        while len(self._open) < most and (new := self.waiting.take(set(), lambda p: goes_with(p) and self._fits(p))):
            self._begin(new)
        return [first, *(p for p in self._open if p is not first and goes_with(p))][:most]

    def _begin(self, prompt: Prompt) -> None:
        job = prompt.job
        job.started = True
        if job.cancelled.is_set():
            self._end_job(job, None)
            return
        if not prompt.answers[0].tokens:
            self.metrics.prompt_tokens.inc(len(job.ids) - job.cached)
        self._orders += 1
        prompt.order = self._orders
        length = len(job.ids) + job.most
        try:
            for answer in prompt.answers:
                answer.begin(self.batch.model)
            if job.begun is not None:
                prompt.running = self.batch.start(job.ids, max_length=length, document=job.begun)
            else:
                prefix = self._find_prefix(prompt, length)
                prompt.running = self.batch.start(job.ids, max_length=length, budget=job.request.budget, prefix=prefix)
        except BaseException as error:
            self._end_job(job, error)
            return
        self._open.append(prompt)

    def _find_prefix(self, prompt: Prompt, length: int) -> EvictionCache | None:
        """What is kept of a prompt's beginning, and what will be."""
        job = prompt.job
        prompt.plan = Plan(self.batch, job.ids, job.policy, length)
        prefix = self.prefixes.find(prompt.plan)
        if prefix is not None:
            self.metrics.prefix_hits.inc()
            self.metrics.prefix_tokens.inc(prefix.seen[0])
        prompt.keep_at = self.prefixes.wanted(prompt.plan)
        return prefix

    def _advance(self, prompts: list[Prompt]) -> int:
        """The next segment of each of these; how many tokens they had."""
        for prompt in prompts:
            if prompt.job.cancelled.is_set():
                self._end_job(prompt.job, None)
        while prompts := [p for p in prompts if p.running is not None]:
            runnings = [p.running for p in prompts if p.running is not None]
            tokens = sum(r.next_segment for r in runnings)
            try:
                found = self.batch.advance_together(runnings)
            except PoolFull as error:
                if not self._make_room():
                    self._end_job(prompts[0].job, error)
            except BaseException as error:  # also SystemExit and panics of extensions: others wait for this thread
                self._prompts_failed(prompts, error)
            else:
                for prompt, logits in zip(prompts, found):
                    self._advanced(prompt, logits)
                return tokens
        return 1

    def _advanced(self, prompt: Prompt, logits: Tensor | None) -> None:
        running, plan, at = prompt.running, prompt.plan, prompt.keep_at
        assert running is not None
        if plan is not None and at is not None and running.seen == plan.ends[at] and running.cache is not None:
            self.prefixes.keep(plan.keys[at], running)
        if logits is not None:
            self._open.remove(prompt)
            self._first(prompt, running, logits)

    def _prompts_failed(self, prompts: list[Prompt], error: BaseException) -> None:
        """A pass failed. Whoever was alone in it is to blame; of several each begins again, alone."""
        if len(prompts) == 1:
            self._end_job(prompts[0].job, error)
            return
        for prompt in prompts:
            self._leave(prompt)
            prompt.alone = True
            self.waiting.put(prompt, first=True)

    def _first(self, prompt: Prompt, running: Running, logits: Tensor) -> None:
        """The first tokens of the answers to a prompt."""
        runnings = [running, *(self.batch.fork(running) for _ in prompt.answers[1:])]
        for answer, own in zip(prompt.answers, runnings):
            answer.running, answer.order = own, prompt.order
        self._choose(prompt.answers, logits.expand(len(prompt.answers), -1))
        self._rows += prompt.answers

    # -- pages -----------------------------------------------------------------------------------------------------
    def _make_room(self) -> bool:
        """Where pages are short, a prefix goes, then the youngest request. Returns whether anything has gone."""
        if self.prefixes.drop():
            return True
        before = len(self._rows)
        self._receive()  # so that all tokens are known
        if len(self._rows) < before:
            return True
        admitted: list[Prompt | Answer] = [*self._open, *self._rows]
        if len(admitted) <= 1:
            return False
        self._preempt(max(admitted, key=lambda x: x.order))
        return True

    def _preempt(self, youngest: Prompt | Answer) -> None:
        """Ends it for now; it is the next one to begin again."""
        self.metrics.preempted.inc()
        if isinstance(youngest, Prompt):
            self._leave(youngest)
            again = youngest
        else:
            self._release(youngest)
            again = self._again(youngest)
        self._full = True  # until somebody has ended
        self.waiting.put(again, first=True)

    def _again(self, answer: Answer) -> Prompt:
        prompt = Prompt(answer.job, [answer])
        self._measure(prompt)
        return prompt

    # -- one token of each -----------------------------------------------------------------------------------------
    def _step(self) -> tuple[list[Answer], Tensor | None]:
        """Launches one token of every answer that goes on. Returns whose logits these are."""
        rows: list[Answer] = []
        found: list[Tensor] = []
        for group in self._groups():
            logits = self._decode(group)
            if logits is not None:
                rows += group
                found.append(logits)
        if not rows:
            return [], None
        self.metrics.steps.inc()
        return rows, found[0] if len(found) == 1 else torch.cat(found)

    def _groups(self) -> list[list[Answer]]:
        """Answers that go through a step together: all with the same rotary frequencies, but for those in whose last step
        something failed."""
        together: dict[Any, list[Answer]] = {}
        for answer in self._rows:
            if answer.at < answer.most:
                together.setdefault(answer if answer.suspected else answer.job.tables, []).append(answer)
        return list(together.values())

    def _decode(self, group: list[Answer]) -> Tensor | None:
        """Logits of one token of these; takes those out of the list that have left. None: nobody is left."""
        while True:
            group[:] = [a for a in group if a.running is not None]
            if not group:
                return None
            assert self._ids is not None
            slots = [a.slot for a in group]
            ids = self._ids if slots == list(range(len(self._ids))) else _rows_of(self._ids, slots)
            try:
                return self.batch.decode([a.running for a in group if a.running is not None], ids)
            except PoolFull as error:
                if not self._make_room():
                    self._end_job(group[0].job, error)
            except BaseException as error:  # also SystemExit and panics of extensions: others wait for this thread
                if not self._blocked(group):
                    self._failed(group, error)

    def _blocked(self, group: list[Answer]) -> bool:
        """Ends those that can't have another token: positions, or a full cache. Returns whether there was one."""
        blocked = [a for a in group if a.running is not None and a.running.no_room() is not None]
        self._receive()
        for answer in blocked:
            if not answer.ended:
                self._finish(answer, "length")
        return bool(blocked)

    def _failed(self, group: list[Answer], error: BaseException) -> None:
        """A step failed, and all that were in its cache have to begin again. Whoever was alone in it is to blame; of
        several each will be alone at this token."""
        self._receive()
        again = [a for a in self._rows if a in group or (a.running is not None and a.running.ended)]
        for answer in again:
            if group == [answer]:
                self._end_job(answer.job, error)
                continue
            failed_at = answer.at if answer in group else None
            self._release(answer)
            self.waiting.put(self._again(answer), first=True)
            answer.failed_at = failed_at

    def _choose(self, rows: list[Answer], logits: Tensor) -> None:
        """Chooses a token for each row whose answer is still there; it is on its way to the host then."""
        going = [i for i, a in enumerate(rows) if a.running is not None]
        if not going:
            return
        if len(going) < len(rows):
            rows, logits = [rows[i] for i in going], _rows_of(logits, going)
        forced = {i: a.tokens[a.at] for i, a in enumerate(rows) if a.at < len(a.tokens)}
        chosen = choose(logits, [a.sampler for a in rows], forced)
        taken = set(map(id, rows))
        rest = [a for a in self._rows if id(a) not in taken]
        if rest and self._ids is not None:
            self._ids = torch.cat([_rows_of(self._ids, [a.slot for a in rest]), chosen.ids])
        else:
            self._ids = chosen.ids
        for slot, answer in enumerate([*rest, *rows]):
            answer.slot = slot
        for answer in rows:
            answer.at += 1
            if answer.failed_at is not None and answer.at > answer.failed_at:
                answer.failed_at = None
        self._pending.append((rows, chosen))

    # -- tokens ----------------------------------------------------------------------------------------------------
    def _receive(self) -> None:
        """Takes the tokens that were chosen: text, ends."""
        pending, self._pending = self._pending, []
        for rows, chosen in pending:
            ids, finite, logprobs = chosen.wait()
            now = time.monotonic()
            for i, answer in enumerate(rows):
                if answer.ended:
                    continue
                if not finite[i]:
                    self._end_job(answer.job, KVRewriteError("the model's logits are not finite (NaN or infinity)"))
                    continue
                answer.got += 1
                if answer.got <= len(answer.tokens):
                    continue  # it had this one before it was preempted
                self.metrics.token(now - answer.last, first=not answer.tokens)
                answer.last = now
                if reason := answer.take(ids[i], logprobs.get(i)):
                    self._finish(answer, reason)

    def _finish(self, answer: Answer, reason: str) -> None:
        answer.ended = True
        self._release(answer)
        job = answer.job
        last = all(a.ended for a in job.answers)
        if last:  # before the client knows, so that what it does next can't undo it
            job.ended = True
            self._ended(job, None)
        answer.finish(reason, last)


def _rows_of(values: Tensor, rows: list[int]) -> Tensor:
    """Some rows of what is on the device. Indexing by a list would wait for all that a GPU has still to do: prompts that are
    computed one after the other would each wait for the one before."""
    return values.index_select(0, to_device(rows, values.device))


def fatal(error: BaseException, device: torch.device) -> bool:
    """Whether a device can't be used any more after an error."""
    if device.type != "cuda" or isinstance(error, (KVRewriteError, RequestError)):
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
