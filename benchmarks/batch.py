"""A step of many requests that joined one by one, beside one of rows that were together from the start. Needs a GPU.

    python -m benchmarks.batch

Llama-3.1-8B's shape, random weights, bf16, h2o with 2048 slots, 64 prompts of 2560 tokens; medians of synchronized steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from kvrewrite.runtime.batch import Batch
from kvrewrite.tools.benchmark.shapes import ShapeSource
from kvrewrite.tools.subjects import Arm, PolicySpec

ROWS, PROMPT, STEPS = 64, 2560, 48


def median_ms(step: Callable[[], Any]) -> float:
    """Of STEPS calls, after four that are not counted."""
    times = []
    for i in range(STEPS + 4):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if i >= 4:
            times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def main() -> None:
    model = ShapeSource("llama-3.1-8b", device="cuda").rewritten(Arm(PolicySpec("h2o"), 2048))
    model.compile()
    ids = torch.randint(1, 128000, (ROWS, PROMPT), generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    batch = Batch(model, memory=40 << 30)
    requests = [batch.start(row, max_length=PROMPT + 3 * STEPS) for row in ids]
    for request in requests:
        while batch.advance(request) is None:
            pass
    print(f"joined one by one: {median_ms(lambda: batch.decode(requests, [1] * ROWS)):.2f} ms")
    some = requests[::2]
    print(f"half of them rest: {median_ms(lambda: batch.decode(some, [1] * len(some))):.2f} ms")
    for request in requests:
        batch.end(request)
    cache = model.new_cache(ROWS, max_length=PROMPT + 3 * STEPS)
    model(ids, past_key_values=cache, logits_to_keep=1)
    token = torch.ones(ROWS, 1, dtype=torch.int64, device="cuda")
    print(f"together from the start: {median_ms(lambda: model(token, past_key_values=cache, generated=True)):.2f} ms")


if __name__ == "__main__":
    main()
