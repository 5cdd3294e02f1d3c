"""A whole decode step of Llama-3.1-8B's shape with Locret, bf16, batch 1: what it launches and what that takes. Needs a GPU.

    python -m benchmarks.decode_step [--layers 8] [--slots 16384] [--policy locret] [--ahead 0 1024 4096] [--trace FILE]

Prints medians with kernels that begin while the one in front ends (PDL) and without, whether both give the same bits, the error
against the uncompiled model, and the launches of one step by name. With PDL a kernel's time contains its wait for the one in
front, so times by name are those without.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from kvrewrite.kernels import launch
from kvrewrite.kernels.linear import small
from kvrewrite.passes.lower.prompt import lower_prefill
from kvrewrite.runtime.parts import Execution
from kvrewrite.tools.benchmark.shapes import ShapeSource
from kvrewrite.tools.subjects import Arm, PolicySpec

STEPS = 40


def set_pdl(model: Any, wanted: bool) -> None:
    """Kernels that are captured from now on overlap, or don't."""
    launch._WANTED = wanted
    launch.overlapping.cache_clear()
    model.decoder.release()
    model.decoder._steps.clear()


def prepare(layers: int, slots: int, arm: Arm, batch: int) -> tuple[Any, Any]:
    """The compiled model, and a cache with a prompt that fills its budget. The prompt runs uncompiled: that is not measured."""
    source = ShapeSource("llama-3.1-8b", device="cuda")
    source.hf_config.num_hidden_layers = layers
    model = source.rewritten(arm)
    model.compile()
    model.executor.prompt = Execution(lower_prefill(model.graph_module), None)
    cache = model.new_cache(batch)
    generator = torch.Generator(device="cuda").manual_seed(0)
    prompt = torch.randint(1, 128000, (batch, slots + 1024), generator=generator, device="cuda")
    model(prompt, past_key_values=cache, logits_to_keep=1)
    return model, cache


def run(model: Any, cache: Any, tokens: Tensor) -> list[Tensor]:
    """Logits of given single tokens (B, T)."""
    return [model(t, past_key_values=cache).logits for t in tokens.split(1, dim=1)]


def timed(model: Any, cache: Any, tokens: Tensor) -> dict[str, float]:
    """Milliseconds a step: all of them one behind the other, and each with a pause behind it."""
    run(model, cache, tokens[:, :4])
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run(model, cache, tokens)
    torch.cuda.synchronize()
    together = (time.perf_counter() - begin) / tokens.shape[1] * 1e3
    alone, issued = [], []
    for token in tokens.split(1, dim=1):
        begin = time.perf_counter()
        model(token, past_key_values=cache)
        issued.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        alone.append(time.perf_counter() - begin)
    return {"queued": together, "alone": statistics.median(alone) * 1e3, "host": statistics.median(issued) * 1e3}


def launches(model: Any, cache: Any, token: Tensor, trace: str | None) -> list[tuple[str, float, float]]:
    """(name, begin, end) in us of everything that one step ran on the GPU, in order."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    model(token, past_key_values=cache)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        model(token, past_key_values=cache)
        torch.cuda.synchronize()
    if trace:
        profile.export_chrome_trace(trace)
    found = [
        (e.name, e.time_range.start, e.time_range.end)
        for e in profile.events()
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith("ProfilerStep")
    ]
    return sorted(found, key=lambda e: e[1])


def report(name: str, found: list[tuple[str, float, float]], names: bool) -> None:
    span = max(e for _, _, e in found) - min(b for _, b, _ in found)
    busy, reached = 0.0, 0.0
    for _, begin, end in found:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    print(
        f"{name}: {len(found)} launches, from first to last {span:.0f} us, of that nothing runs for {span - busy:.0f} us"
    )
    if not names:
        return
    count: Counter[str] = Counter()
    took: Counter[str] = Counter()
    for kernel, begin, end in found:
        count[kernel] += 1
        took[kernel] += end - begin  # type: ignore[assignment]
    for kernel, us in took.most_common():
        print(f"  {us:8.1f} us {count[kernel]:4d} x {us / count[kernel]:7.2f}  {kernel[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--slots", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--policy", default="locret")
    parser.add_argument(
        "--ahead", type=int, nargs="*", default=[], help="other bytes of each row to fetch ahead, to compare"
    )
    parser.add_argument("--trace", help="a Chrome trace of the step with PDL")
    given = parser.parse_args()
    model, cache = prepare(given.layers, given.slots, Arm(PolicySpec(given.policy), given.slots), given.batch)
    generator = torch.Generator(device="cuda").manual_seed(1)
    tokens = torch.randint(1, 128000, (given.batch, STEPS), generator=generator, device="cuda")
    logits: dict[bool, list[Tensor]] = {}
    for pdl in (False, True):
        set_pdl(model, pdl)
        logits[pdl] = run(model, cache.fork(), tokens[:, :16])
        fork = cache.fork()
        times = timed(model, fork, tokens)
        text = ", ".join(f"{k} {v:.3f} ms" for k, v in times.items())
        print(f"PDL {'on' if pdl else 'off'}, {given.layers} layers: {text}")
        report(
            f"PDL {'on' if pdl else 'off'}", launches(model, fork, tokens[:, :1], given.trace if pdl else None), not pdl
        )
    same = all(torch.equal(a, b) for a, b in zip(logits[False], logits[True], strict=True))
    print(f"same bits with and without PDL: {same}")
    for small.AHEAD in given.ahead:
        set_pdl(model, True)
        text = ", ".join(f"{k} {v:.3f} ms" for k, v in timed(model, cache.fork(), tokens).items())
        print(f"PDL on, {small.AHEAD} bytes of each row ahead: {text}")
    model.uncompile()
    expected = run(model, cache.fork(), tokens[:, :4])
    error = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(logits[True], expected))
    print(f"relative error of logits against the uncompiled model: {error:.1e}")


if __name__ == "__main__":
    main()
