"""Runs a function in several processes that torch.distributed joins over gloo."""

from __future__ import annotations

import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing

from kvrewrite.runtime.parallel import leave

SECONDS = 240  # a machine of two cores that others use, too


def run_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns in each process, started as torchrun starts it. Raises what one raises."""
    # A process that uses a GPU must not come from one that has looked for GPUs.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["torch", "transformers", "tests.support.rewritten"])  # imported once for all
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    workers = [
        context.Process(target=_work, args=(rank, ranks, port, function, args, results), daemon=True)
        for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    found: dict[int, Any] = {}
    try:
        for _ in workers:
            rank, value, error = _next(results, workers)
            if error is not None:
                raise AssertionError(f"rank {rank}:\n{error}")
            found[rank] = value
    finally:
        for worker in workers:
            worker.join(5 if len(found) < ranks else SECONDS)
            if worker.is_alive():
                worker.kill()
    return [found[rank] for rank in range(ranks)]


def _next(results: Any, workers: list[Any]) -> Any:
    """The next result. Raises AssertionError where it can't come: a process has died, or time is up."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            return results.get(timeout=1)
        except queue.Empty:
            ended = [worker.exitcode for worker in workers]
            late = time.monotonic() > end
            if late or any(code for code in ended):
                raise AssertionError(f"no result after {SECONDS} s" if late else f"exit statuses {ended}") from None


def _work(rank: int, ranks: int, port: int, function: Any, args: Any, results: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    try:
        value, error = function(rank, *args), None
        if torch.distributed.is_initialized():
            leave()
    except BaseException:
        value, error = None, traceback.format_exc()
    results.put((rank, value, error))
