"""Measures policies and freshly trained heads on real models, cells of `kvrewrite eval` in processes that share one GPU.

    python -m benchmarks.real_models REAL OUT --seconds 370
    python -m benchmarks.real_models REAL OUT --device cpu --workers 1 --seconds 250 --models smollm2 --documents 2 --tokens 200 \
        --policies random --texts 6 --text-tokens 96 --steps 20

REAL has directories of models by name, quote.jsonl, lm.jsonl and train.jsonl (examples/real_models/documents.py). A process
for each model trains heads while the others measure (benchmarks/train_heads.py); cells of heads are measured once these are
there. OUT gets a line for every cell, and at the end MODEL.json, which `kvrewrite report` reads. Run again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.collected_heads import train, weights_of
from benchmarks.real_jobs import Job, jobs
from benchmarks.train_heads import COLLECTED
from kvrewrite.errors import KVRewriteError
from kvrewrite.tools.evaluation.cells import BASELINE, FORMAT, compare
from kvrewrite.tools.evaluation.documents import make_passages, read_rows
from kvrewrite.tools.evaluation.run import cell_of
from kvrewrite.tools.evaluation.scored import against, run_scored, summary
from kvrewrite.tools.evaluation.settings import Settings, describe
from kvrewrite.tools.subjects import FULL_CACHE, Arm, PolicySpec, Source, versions, write_json

AWARE = 0.25  # of the documents
LAST = 25.0  # seconds: what has less time left is not begun


# ------------------------------------------------------------------------------------------------------------- measuring
def settings_of(given: argparse.Namespace, model: str, mode: str = "blind") -> Settings:
    """What `kvrewrite eval` would be told; aware cells are of fewer documents."""
    samples = max(1, int(given.documents * (AWARE if mode == "aware" else 1)))
    data = tuple((task, given.real / f"{task}.jsonl") for task in ("quote", "lm"))
    return Settings(
        given.real / model,
        tasks=("quote", "lm"),
        tokens=(given.tokens,),
        samples=samples,
        batch_size=given.rows_together,
        device=given.device,
        data=data,
        check="off",
    )


def spec_of(given: argparse.Namespace, job: Job) -> PolicySpec:
    """A job's policy."""
    heads = None if job.heads is None else weights_of(given.out, job.model, job.heads)
    return PolicySpec(job.policy, dict(job.options), heads)


class Worker:
    """A process that measures: each model is loaded and captured once, and each text made into tokens once."""

    def __init__(self, given: argparse.Namespace, number: int):
        self.given, self.number = given, number
        self.sources: dict[str, Source] = {}
        self.passages: dict[tuple[str, str, int], list[Any]] = {}

    def run(self, job: Job) -> dict[str, Any]:
        """A cell, as `kvrewrite eval` has it, with the job that it is of."""
        given, spec = self.given, spec_of(self.given, job)
        arm = FULL_CACHE if job.policy == "full" else Arm(spec, job.budget)
        settings = settings_of(given, job.model, job.mode)
        cell = {**cell_of(arm, job.mode, job.task, given.tokens), "job": job, "samples": settings.samples}
        if job.heads is not None:
            cell["label"] += f" ({job.heads})"
        if job.model not in self.sources:
            self.sources[job.model] = Source(settings.model, device=given.device, check="off")
        source = self.sources[job.model]
        mode = "aware" if job.mode == "aware" else "blind"
        try:
            passages = self.passages_of(job, settings, source)
            model = source.rewritten(arm)
            return {**cell, **run_scored(model, source.tokenizer, passages, mode, settings.batch_size, skip)}
        except (KVRewriteError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            return {**cell, "status": "refused", "reason": reason}

    def passages_of(self, job: Job, settings: Settings, source: Source) -> list[Any]:
        """What a job asks."""
        key = (job.model, job.task, settings.samples)
        if key not in self.passages:
            rows = read_rows(dict(settings.data)[job.task])
            if self.given.cut:
                rows = [cut(row, self.given.cut) for row in rows]
            chosen = {"tokens": self.given.tokens, "samples": settings.samples, "seed": 0}
            self.passages[key] = make_passages(job.task, rows, **chosen, tokenizer=source.tokenizer)
        return self.passages[key]

    def take(self) -> Job | None:
        """The first cell that nobody has and whose heads are there; None: there is none now."""
        for number, job in enumerate(jobs(self.given)):
            ready = job.heads is None or weights_of(self.given.out, job.model, job.heads).exists()
            if ready and claim(self.given.out / "claims" / str(number)):
                return job
        return None

    def work(self, end: float) -> None:
        """Takes cells until `end` (of `time.time`)."""
        while time.time() < end - LAST:
            job = self.take()
            if job is None:
                time.sleep(1)
                continue
            cell = self.run(job)
            with (self.given.out / f"cells_{self.number}.jsonl").open("a") as file:
                file.write(json.dumps(cell) + "\n")
            print(told(cell, cells_of(self.given)), flush=True)


def told(cell: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """What a cell found; of trained heads also how much less it is than each other policy's, answer by answer."""
    model, task, mode, budget, _, _, heads = cell["job"]
    name = f"{model} {task} {mode} {budget} {cell['label']}"
    if cell["status"] != "ok":
        return f"{name}: {cell['reason']}"
    lines = [f"{name}: {interval(cell['nll'])} nats, right {interval(cell['accuracy'])}, {cell['seconds']} s"]
    for other in others if heads is not None else ():
        same = other["status"] == "ok" and list(other["job"][:4]) == [model, task, mode, budget]
        if same and other["documents"] == cell["documents"] and other["label"] != cell["label"]:
            lines.append(f"    nats more than {other['label']}: {interval(against(cell, other)['nll'])}")
    return "\n".join(lines)


def interval(value: dict[str, Any]) -> str:
    """As text."""
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def skip(_: int) -> None:
    """Progress that nobody looks at."""


def cut(row: dict[str, Any], most: int) -> dict[str, Any]:
    """A row as a short text, to try the script."""
    if "continuation" in row:
        return {"context": row["context"][-most:], "continuation": row["continuation"][:most]}
    return {"text": row["context"][:most]}


def claim(path: Path) -> bool:
    """Whether this process is the first to ask for it."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def cells_of(given: argparse.Namespace) -> list[dict[str, Any]]:
    """All cells that were measured."""
    return [
        json.loads(line) for path in sorted(given.out.glob("cells_*.jsonl")) for line in path.read_text().splitlines()
    ]


def write_results(given: argparse.Namespace) -> None:
    """MODEL.json (all documents) and MODEL_aware.json, in the form of `kvrewrite eval`."""
    for model in given.models:
        for aware in (False, True):
            settings = settings_of(given, model, "aware" if aware else "blind")
            every = [c for c in cells_of(given) if c["job"][0] == model]
            cells = [c for c in every if (c["mode"] == "aware") == aware]
            if not cells:
                continue
            if aware:
                cells += [first(c, settings.samples) for c in every if c["mode"] == BASELINE and c["task"] == "quote"]
            cells.sort(key=lambda c: c["mode"] != BASELINE)
            compare(cells)
            results = {
                "kind": "kvrewrite eval",
                "format": FORMAT,
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": versions(),
                "settings": describe(settings, Source(settings.model, device=given.device)),
                "complete": False,
                "means": [],
                "cells": cells,
            }
            write_json(given.out / f"{model}{'_aware' if aware else ''}.json", results)


def first(cell: dict[str, Any], documents: int) -> dict[str, Any]:
    """The full cache's cell of the first documents alone."""
    if cell["status"] != "ok":
        return cell
    answers = zip(cell["nats"], cell["hits"], cell["counts"], cell["documents"], strict=True)
    chosen = [answer for answer in answers if answer[3] < documents]
    return {**cell, **summary([answer[:3] for answer in chosen], [answer[3] for answer in chosen])}


def measure(given: argparse.Namespace, number: int, end: float) -> None:
    """One worker's process."""
    torch.set_num_threads(given.threads)
    Worker(given, number).work(end)


def main() -> None:
    """Starts the processes, ends them in time, and writes what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("real", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--kinds", nargs="*", default=["mlp", "wide"], choices=list(COLLECTED))
    parser.add_argument("--policies", nargs="*", help="instead of those without training; the first four come first")
    parser.add_argument("--only", help="a pattern of cells: `smollm2 quote blind 0.25 snapkv` is how one is written")
    parser.add_argument("--skip", help="a pattern of cells that are left out")
    parser.add_argument("--seconds", type=float, default=370.0, help="in all")
    parser.add_argument("--workers", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--documents", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--cut", type=int, default=0, help="characters of a document, to try the script")
    parser.add_argument("--rows-together", type=int, default=20, help="documents that are compressed at once")
    parser.add_argument("--texts", type=int, default=1400, help="most that heads learn from")
    parser.add_argument("--read-seconds", type=float, default=70.0, help="most time for reading them")
    parser.add_argument("--judged", type=int, default=12, help="further texts, on which heads are judged")
    parser.add_argument("--text-tokens", type=int, default=2000)
    parser.add_argument("--kept-tokens", type=int, default=300, help="of each text")
    parser.add_argument("--batch", type=int, default=8, help="texts that are read at once")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=8192, help="tokens of a step")
    given = parser.parse_args()
    end = time.time() + given.seconds
    (given.out / "claims").mkdir(parents=True, exist_ok=True)
    done = [json.dumps(c["job"]) for c in cells_of(given) if c["status"] == "ok"]
    for number, job in enumerate(jobs(given)):  # what an earlier run began and did not end is free again
        claimed = given.out / "claims" / str(number)
        claimed.unlink(missing_ok=True)
        if json.dumps(job) in done:
            claimed.touch()
    start = multiprocessing.get_context("spawn")
    trained = {job.model for job in jobs(given) if job.heads is not None}
    processes = [start.Process(target=train, args=(given, model)) for model in given.models if model in trained]
    processes += [start.Process(target=measure, args=(given, number, end)) for number in range(given.workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, end - time.time()))
    for process in processes:
        if process.is_alive():
            process.kill()
    write_results(given)


if __name__ == "__main__":
    main()
