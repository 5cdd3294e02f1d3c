"""Measures what policies cost and save: policies x budgets x modes on tasks, on the same samples for all.

Modes: "aware": context and question are one prompt and are compressed together. "blind": the context is compressed
before its question is known (`model.prefill`), then the question is asked on the compressed cache. The full cache is
the baseline and runs once, because the modes make no difference to it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kvrewrite import policies
from kvrewrite.errors import KVRewriteError, OptionError
from kvrewrite.tools.evaluation import asked, documents, intervals, kept, ruler
from kvrewrite.tools.evaluation.ask import Answers, Question, ask_aware, ask_blind, encode, question_first
from kvrewrite.tools.evaluation.cells import (
    BASELINE,
    FORMAT,
    cell_key,
    compare,
    is_scored,
    means,
    reads_file,
)
from kvrewrite.tools.evaluation.scored import run_scored
from kvrewrite.tools.evaluation.settings import Settings, Warn, describe, earlier, plan
from kvrewrite.tools.subjects import (
    CONVERTED,
    Arm,
    Source,
    file_hash,
    versions,
    write_json,
)

SEED_STEP = 1_000_003  # sample i of a task has seed `seed * SEED_STEP + i`

Progress = Callable[[str, int, int], None]


def _quiet(*_: Any) -> None:
    """Reports no progress and no warnings."""


# ----------------------------------------------------------------------------------------------------- what is to be
# run


# ---------------------------------------------------------------------------------------------------------------
# sources
def task_module() -> Any:
    """Returns the module of tasks: TASKS, make(task, tokens=, seed=, tokenizer=) and score(sample, text)."""
    from kvrewrite.tools.evaluation import tasks

    return tasks


def check_tasks(names: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Returns the tasks to run, all if none is named; raises OptionError with the likely spelling for unknown ones."""
    known = list(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise OptionError(f"unknown task {name!r}{hint}; there are: {', '.join(known)}")
    return tuple(dict.fromkeys(names)) or tuple(task_module().TASKS)


def module_of(task: str) -> Any:
    """Returns the module that makes and scores a task's samples; see `task_module`."""
    if task == asked.TASK:
        return asked
    return ruler if task.startswith(ruler.PREFIX) else task_module()


def known_tasks() -> list[str]:
    """Returns the names of all tasks; the first, kvrewrite's own, run where none is named."""
    return [*task_module().TASKS, *ruler.TASKS, *asked.TASKS, *documents.TASKS]


def make_questions(task: str, settings: Settings, tokens: int, tokenizer: Any) -> list[Any]:
    """Makes the samples of a task: the same for every policy, budget and mode."""
    if is_scored(task):
        rows = documents.read_rows(dict(settings.data)[task])
        chosen = {"tokens": tokens, "samples": settings.samples, "seed": settings.seed}
        return documents.make_passages(task, rows, **chosen, tokenizer=tokenizer)
    module = module_of(task)
    limit = getattr(module.TASKS[task], "max_new_tokens", 0)
    given = {"data": dict(settings.data)[task]} if reads_file(task) else {}
    questions = []
    for i in range(settings.samples):
        try:
            sample = module.make(task, tokens=tokens, seed=settings.seed * SEED_STEP + i, tokenizer=tokenizer, **given)
        except ValueError as error:
            raise OptionError(f"{task} at {tokens} tokens: {error}") from error
        questions.append(encode(sample, tokenizer, getattr(sample, "limit", limit), one_line=module is task_module()))
    return questions


def check_data(settings: Settings, tasks: Sequence[str]) -> None:
    """Raises OptionError where a task lacks its file, or a file its task."""
    files = dict(settings.data)
    for task in files:
        if task not in tasks or not reads_file(task):
            reading = ", ".join([*documents.TASKS, *asked.TASKS, *ruler.WITH_DATA])
            raise OptionError(f"--data {task}=...: expected one of {reading}, named by --task, too")
    for task in tasks:
        if reads_file(task) and task not in files:
            raise OptionError(f"{task} needs your documents: --data {task}=FILE (docs/measuring.md)")


# -----------------------------------------------------------------------------------------------------------------
# cells


def cell_of(arm: Arm, mode: str, task: str, tokens: int) -> dict[str, Any]:
    """Returns a cell that has not run yet."""
    return {
        "policy": arm.spec.name,
        "label": arm.spec.label,
        "options": dict(arm.spec.options),
        "weights": file_hash(arm.spec.weights),
        "budget": arm.budget,
        "mode": mode,
        "task": task,
        "tokens": tokens,
    }


def run_cell(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    mode: str,
    batch_size: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Returns scores and memory of one cell; reports how many questions are answered."""
    started, first = time.perf_counter(), question_first(model.policy, mode)
    answers = Answers([])
    if mode == "aware":
        steps = ask_aware(model, tokenizer, questions, batch_size, question_first=first)
    else:
        steps = ask_blind(model, tokenizer, questions, batch_size)
    for done, found in steps:
        progress(done)
        answers = found
    scores = [float(module_of(q.sample.task).score(q.sample, text)) for q, text in zip(questions, answers.texts)]
    return {
        "status": "ok",
        "resolved": {"name": model.policy.name, **model.policy.options()},
        "accuracy": dataclasses.asdict(intervals.interval(scores)),
        "scores": scores,
        "answers": answers.texts,
        "memory": {point: held.means() for point, held in answers.held.items() if held.rows},
        "seconds": round(time.perf_counter() - started, 3),
    }


# ---------------------------------------------------------------------------------------------------------------
# results


def evaluate(
    settings: Settings,
    *,
    out: Path | None = None,
    resume: bool = False,
    progress: Progress = _quiet,
    warn: Warn = _quiet,
) -> dict[str, Any]:
    """Runs every cell and returns the results as data; see `describe` and `run_cell` for their content.

    out: written after every cell, so that an interrupted run keeps its results. resume: continues from `out` if the
    important settings (`FIXED`) are the same; refused cells are tried again. A cell that cannot run has status
    "refused" and the reason. Raises OptionError for unknown names before anything is loaded.
    """
    tasks = check_tasks(settings.tasks, known_tasks())
    check_data(settings, tasks)
    for spec in settings.policies:
        spec.check()
    settings = dataclasses.replace(settings, tasks=tasks)
    source = Source(settings.model, device=settings.device, dtype=settings.dtype, check=settings.check)
    _ = source.tokenizer  # a directory without one is refused once, not per cell
    described = describe(settings, source)
    before = earlier(out, described, warn) if resume and out is not None and out.exists() else {"cells": []}
    there = {cell_key(c): c for c in before["cells"] if c["status"] == "ok"}
    planned = plan(settings)
    _warn_of(settings, source, planned, warn)

    results: dict[str, Any] = {
        "kind": "kvrewrite eval",
        "format": FORMAT,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "settings": described,
        "complete": False,
        "means": [],
        "cells": [],
    }
    cells: list[dict[str, Any]] = results["cells"]
    jobs = [
        (arm, mode, tokens, task)
        for arm, mode in planned
        for tokens in settings.tokens
        for task in tasks
        # A text that goes on has no question: the same in both modes.
        if not (mode == "aware" and task in ("lm", documents.PERPLEXITY) and "blind" in settings.modes)
    ]
    total = len(jobs) * settings.samples
    runner = _Runner(settings, source, progress, total, warn)
    heat: dict[str, Any] = before.get("kept") or {"pieces": [], "rows": []}
    if settings.record_kept:
        results["kept"] = heat
    try:
        for arm, mode, tokens, task in jobs:
            cell = cell_of(arm, mode, task, tokens)
            known = there.get(cell_key(cell))
            cells.append(known or {**cell, **runner.run(arm, mode, task, tokens)})
            runner.done += settings.samples
            if settings.record_kept and cells[-1]["status"] == "ok" and not arm.is_baseline:
                runner.record(arm, task, tokens, heat)
            compare(cells)
            if out is not None and known is None:
                write_json(out, results)
        results["complete"] = True
    finally:
        results["means"] = means(cells)
        results["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        if out is not None and cells:
            write_json(out, results)
    progress("done", total, total)
    return results


class _Runner:
    """Runs cells one by one; keeps the samples, and the model while the arm stays the same."""

    def __init__(self, settings: Settings, source: Source, progress: Progress, total: int, warn: Warn):
        self.settings, self.source, self.progress, self.total = settings, source, progress, total
        self.warn = warn
        self.done = 0
        self.samples: dict[tuple[str, int], list[Any]] = {}
        self.arm: Arm | None = None
        self.model: Any = None
        self.refusal: str | None = None
        self.first_text: tuple[int, ...] | None = None

    def run(self, arm: Arm, mode: str, task: str, tokens: int) -> dict[str, Any]:
        """Returns a cell's results, or the reason why it was refused."""
        name = "full cache" if mode == BASELINE else f"{arm}, {mode}"
        try:
            if (task, tokens) not in self.samples:
                self.progress(f"{task}: samples", self.done, self.total)
                self.samples[task, tokens] = make_questions(task, self.settings, tokens, self.source.tokenizer)
            if arm is not self.arm:
                self._rewrite(arm)
            if self.refusal is not None:
                return {"status": "refused", "reason": self.refusal}
            one_by_one = functools.partial(run_scored, one_by_one=True)
            run = one_by_one if task == documents.PERPLEXITY else run_scored if is_scored(task) else run_cell
            return run(
                self.model,
                self.source.tokenizer,
                self.samples[task, tokens],
                "blind" if mode == BASELINE else mode,
                self.settings.batch_size,
                lambda n: self.progress(f"{name}: {task}", self.done + n, self.total),
            )
        except KVRewriteError as error:
            return {"status": "refused", "reason": str(error)}
        except torch.OutOfMemoryError:
            return {"status": "refused", "reason": "out of memory; try a smaller --batch-size"}
        except RuntimeError as error:  # of a kernel, say: the cells after it still run
            self.warn(f"{name}, {task}: {type(error).__name__}: {error}")
            return {"status": "refused", "reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}

    def record(self, arm: Arm, task: str, tokens: int, heat: dict[str, Any]) -> None:
        """Adds what an arm keeps of the first text to `heat`, once."""
        if any((row["label"], row["budget"]) == (arm.spec.label, arm.budget) for row in heat["rows"]):
            return
        if self.first_text is None:
            if (task, tokens) not in self.samples:
                self.samples[task, tokens] = make_questions(task, self.settings, tokens, self.source.tokenizer)
            self.first_text = self.samples[task, tokens][0].context
            heat["pieces"] = kept.pieces(self.source.tokenizer, self.first_text)
        if arm is not self.arm:
            self._rewrite(arm)
        if self.model is not None:
            found = kept.record(self.model, self.first_text)
            heat["rows"].append({"label": arm.spec.label, "budget": arm.budget, "heads": found})

    def _rewrite(self, arm: Arm) -> None:
        self.progress(f"{arm}: rewriting", self.done, self.total)
        self.arm, self.model, self.refusal = arm, None, None
        try:
            self.model = self.source.rewritten(arm)
        except KVRewriteError as error:
            self.refusal = str(error)


def _warn_of(settings: Settings, source: Source, planned: list[tuple[Arm, str]], warn: Warn) -> None:
    """Warns about what one should know before reading the numbers."""
    names = {arm.spec.name for arm, mode in planned if mode == "blind"}
    blind = [n for n in sorted(names) if n != CONVERTED and policies.POLICIES[n].needs_question]
    if blind:
        warn(
            f"{', '.join(blind)}: made to see the question; in blind mode what is kept depends on the end of the context "
            "instead"
        )
    longest = source.config.get("max_position_embeddings")
    if longest and max(settings.tokens) > longest:
        warn(f"--tokens {max(settings.tokens)}: the model was made for {longest} tokens")
