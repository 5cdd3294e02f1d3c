"""How a prompt's time, a decode step and memory grow with the length of the text, at Llama-3.1-8B's shape. Needs a GPU.

    python -m benchmarks.growth [--layers 32] [--budget 16384] [--chunk 3072] [--json FILE]
        [--tokens 16384 32768 65536 131072 262144 524288]

Locret, random bf16 weights, batch 1. A line each: seconds of the fourth prompt of a length (the first may compile and make the
pools grow, the second and third are captured), microseconds a token of it, the median of 16 single synchronized decode steps
behind it, and the peak of allocated memory over the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from kvrewrite.tools.benchmark.shapes import ShapeSource
from kvrewrite.tools.subjects import Arm, PolicySpec

STEPS, COLD = 16, 8


def seconds(call: Any) -> float:
    """From a synchronized device to a synchronized device."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(model: Any, length: int, base: int) -> dict[str, Any]:
    """One length."""
    ids = torch.randint(1, 128000, (1, length), device="cuda")
    prompts: list[float] = []
    for _ in range(4):
        cache = None  # its pages are free for the next one, so that pools need not grow
        cache = model.new_cache(1, max_length=length + 64)
        torch.cuda.reset_peak_memory_stats()
        prompts.append(seconds(lambda cache=cache: model(ids, past_key_values=cache, logits_to_keep=1)))
    peak = torch.cuda.max_memory_allocated() - base
    token = ids[:, :1]
    steps = [seconds(lambda: model(token, past_key_values=cache)) for _ in range(COLD + STEPS)][COLD:]
    return {
        "tokens": length, "prefill_s": prompts[-1], "us_a_token": 1e6 * prompts[-1] / length,
        "decode_ms": 1e3 * statistics.median(steps), "peak_gib": peak / 2**30,
    }  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << n for n in range(14, 20)])
    parser.add_argument("--budget", type=int, default=16384)
    parser.add_argument("--chunk", type=int, default=3072)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    given = parser.parse_args()
    torch.manual_seed(0)
    source = ShapeSource("llama-3.1-8b", device="cuda")
    source.hf_config.num_hidden_layers = given.layers
    model: Any = source.rewritten(Arm(PolicySpec("locret", {"chunk": given.chunk}), given.budget))
    base = torch.cuda.memory_allocated()
    model.compile()
    rows = []
    for length in given.tokens:
        rows.append(measure(model, length, base))
        print(json.dumps(rows[-1]), flush=True)
        if given.json:
            found = {
                "device": torch.cuda.get_device_name(),
                "layers": given.layers,
                "budget": given.budget,
                "rows": rows,
            }
            given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
