"""Where a chunked prefill of Llama-3.1-8B's shape with Locret spends its time, bf16, batch 1. Needs a GPU.

    python -m benchmarks.prefill [--layers 8] [--tokens 131072] [--budget 16384 6000] [--chunk 3072] [--repeat 3]
        [--without overlap gated rotate capture]

For each budget: seconds of a prefill (from a synchronized device to a synchronized device) and how long the host needs to queue
it; then, from a profile of one more, each kernel's time a layer and chunk in the chunks with a full cache, and the share of the
time in which the GPU runs nothing. The profiler slows the host, so that share is an upper bound. --without: seconds also without
each of these lowerings, or without CUDA graphs of chunks (capture), in turns. With fewer than 32 layers what is done once a chunk
(embedding, logits, planning) weighs more than in the whole model.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
import unittest.mock
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from kvrewrite.passes.lower import prompt
from kvrewrite.tools.benchmark.shapes import ShapeSource
from kvrewrite.tools.subjects import Arm, PolicySpec

CAPTURE = "capture"
LOWERINGS = {
    "overlap": "_overlap",
    "gated": "_fuse_gates",
    "rotate": "_rotate_both",
}  # in kvrewrite/passes/lower/prompt.py


def _nothing(gm: Any) -> None:
    """In a lowering's place."""


def build(source: ShapeSource, arm: Arm, without: str | None) -> Any:
    """The compiled model, but for one lowering, or without graphs of chunks."""
    model = source.rewritten(arm)
    with contextlib.ExitStack() as stack:
        if without in LOWERINGS:
            stack.enter_context(unittest.mock.patch.object(prompt, LOWERINGS[without], _nothing))
        model.compile()
    if without == CAPTURE:
        model.executor.prompt = model.executor.prompt.execution
    return model


def prefill(model: Any, ids: Tensor) -> tuple[float, float, Tensor]:
    """Seconds until all is done, seconds until all is queued, and the logits."""
    cache = model.new_cache(ids.shape[0], max_length=ids.shape[1] + 128)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    queued = time.perf_counter() - begin
    torch.cuda.synchronize()
    return time.perf_counter() - begin, queued, logits


def launches(model: Any, ids: Tensor) -> list[tuple[str, float, float]]:
    """(name, begin, end) in us of everything that a prefill ran on the GPU, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        prefill(model, ids)
    cuda = torch.autograd.DeviceType.CUDA
    found = [(e.name, e.time_range.start, e.time_range.end) for e in profile.events() if e.device_type == cuda]
    return sorted(found, key=lambda e: e[1])


def report(found: list[tuple[str, float, float]], layers: int, first_chunk: int) -> None:
    """Kernels from the first_chunk-th chunk on, up to the last whole one, by name."""
    attention = [i for i, (name, _, _) in enumerate(found) if name.startswith("_attend")]
    per_chunk = layers if len(attention) % layers == 0 else layers - 1  # without logits the last layer may have none
    at = found[attention[first_chunk * per_chunk]][1]
    until = found[attention[-layers - per_chunk]][1]  # the last chunk and the tail have other sizes
    window = [e for e in found if at <= e[1] < until]
    chunks = sum(name.startswith("_attend") for name, _, _ in window) / per_chunk
    busy, reached = 0.0, at
    for _, begin, end in window:
        busy += max(0.0, min(end, until) - max(begin, reached))
        reached = max(reached, end)
    gaps = sorted((b[1] - a[2] for a, b in itertools.pairwise(window)), reverse=True)
    print(
        f"  {chunks:.1f} chunks: {(until - at) / chunks / 1e3:.3f} ms a chunk, nothing runs for {1 - busy / (until - at):.2%}; "
        f"{len(window) / chunks:.0f} launches a chunk; longest gaps {', '.join(f'{g:.0f}' for g in gaps[:8])} us, "
        f"median {statistics.median(gaps):.2f}"
    )
    count: Counter[str] = Counter()
    took: Counter[str] = Counter()
    for name, begin, end in window:
        count[name] += 1
        took[name] += end - begin  # type: ignore[assignment]
    for name, us in took.most_common(32):
        times = f"{count[name] / chunks:6.1f} a chunk x {us / count[name]:7.2f}"
        print(f"  {us / chunks / layers:8.2f} us a layer and chunk, {times}  {name[:100]}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--budget", type=int, nargs="+", default=[16384, 6000])
    parser.add_argument("--chunk", type=int, default=3072)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--without", nargs="*", default=[], choices=[*LOWERINGS, CAPTURE], help="what to leave out, each alone"
    )
    given = parser.parse_args()
    source = ShapeSource("llama-3.1-8b", device="cuda")
    source.hf_config.num_hidden_layers = given.layers
    generator = torch.Generator(device="cuda").manual_seed(0)
    ids = torch.randint(1, 128000, (1, given.tokens), generator=generator, device="cuda")
    for budget in given.budget:
        models, runs = {}, {}
        for without in (None, *given.without):
            begin = time.perf_counter()
            model = build(source, Arm(PolicySpec("locret", {"chunk": given.chunk}), budget), without)
            prefill(model, ids[:, : 3 * given.chunk + 128])
            prefill(model, ids)
            models[without], runs[without] = model, []
            print(f"budget {budget}, {given.layers} layers: cold {time.perf_counter() - begin:.1f} s", flush=True)
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(given.repeat):
            for without, model in models.items():
                runs[without].append(prefill(model, ids))
        print(f"  peak {(torch.cuda.max_memory_allocated() - base) / 2**30:.2f} GiB over weights and pools")
        for without, found in runs.items():
            same = all(torch.equal(run[2], runs[None][0][2]) for run in found)
            print(
                f"  {f'without {without}' if without else 'all'}: {', '.join(f'{r[0]:.4f}' for r in found)} s, queued after "
                f"{', '.join(f'{r[1]:.4f}' for r in found)} s; same bits: {same}",
                flush=True,
            )
        report(launches(models[None], ids), given.layers, max(1, -(-budget // given.chunk)) + 2)
        del models, model


if __name__ == "__main__":
    main()
