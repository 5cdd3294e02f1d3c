"""Timings of kernels/linear/small.py at the shapes of Llama-3.1-8B, bf16, beside cuBLAS. Needs a GPU.

    python -m benchmarks.small_linear [M ...]

Each time is that of one call in a CUDA graph of many, which run through enough copies of the weights that none is found in
L2. The first configuration of a shape is the one in use.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from kvrewrite.kernels.linear.small import (
    FMA_ROWS,
    Config,
    dot_config,
    fma_config,
    small_gated_linear,
    small_linear,
)

TOKENS = (1, 2, 8, 32)
# name -> (K, rows of each weight)
SHAPES: dict[str, tuple[int, tuple[int, ...]]] = {
    "q k v head": (4096, (4096, 1024, 1024, 1024)),
    "q k v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "down": (14336, (4096,)),
    "lm_head": (4096, (128256,)),
    "gate up": (4096, (14336, 14336)),
}
# What cross-compiles for sm_90 without spills: rows, width along K, warps, stages, unrolled steps, parts of K.
FMA = [
    Config(4, 512, 2, 1, 2), Config(8, 512, 2, 1), Config(2, 512, 2, 1, 4), Config(4, 1024, 4, 1), Config(2, 1024, 4, 1, 4),
    Config(4, 256, 1, 1), Config(8, 1024, 4, 1), Config(4, 1024, 4, 3), Config(4, 1024, 4, 4),
]  # fmt: skip
GATED_FMA = [
    Config(2, 512, 2, 1, 2), Config(4, 512, 2, 1), Config(1, 512, 2, 1, 4), Config(2, 1024, 4, 1), Config(1, 1024, 4, 1, 4),
    Config(2, 256, 1, 1), Config(2, 1024, 4, 3), Config(2, 1024, 4, 4),
]  # fmt: skip
DOT = {
    16: [
        Config(16, 256, 4, 4), Config(16, 512, 4, 3), Config(32, 256, 4, 3), Config(64, 128, 4, 4), Config(64, 128, 4, 6),
        Config(64, 128, 4, 4, split=2), Config(64, 128, 4, 4, split=4),
    ],
    32: [
        Config(32, 256, 4, 4), Config(64, 128, 4, 4), Config(64, 128, 4, 5), Config(64, 128, 4, 4, split=2),
        Config(64, 128, 4, 4, split=4), Config(128, 64, 4, 5), Config(128, 128, 4, 4, split=4),
    ],
    64: [
        Config(64, 128, 4, 4), Config(64, 128, 4, 4, split=2), Config(128, 64, 8, 4, split=2), Config(128, 64, 8, 4, split=8),
    ],
}  # fmt: skip
GATED_DOT = {
    16: [Config(16, 256, 4, 4), Config(64, 64, 4, 4), Config(64, 128, 4, 4)],
    32: [Config(32, 128, 4, 4), Config(64, 64, 4, 4), Config(64, 64, 4, 6)],
    64: [Config(64, 64, 4, 5), Config(32, 128, 4, 3)],
}
CACHED = 160 * 2**20  # bytes: more than three times the L2 of an H200


def rows(tokens: tuple[int, ...] = TOKENS, wide: bool = True) -> list[dict[str, Any]]:
    """One row for each (shape, tokens, configuration): microseconds, bytes of weights per second, relative error.

    wide: with all candidates; otherwise the configuration in use and cuBLAS.
    """
    found = [_copy()]
    for m in tokens:
        for name, (k, ns) in SHAPES.items():
            found.extend(_shape(name, m, k, ns, wide and name != "q k v"))
    return found


def _copy() -> dict[str, Any]:
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    us = _time([lambda: b.copy_(a)] * 4)
    return {"kernel": "copy", "shape": "1 GiB", "config": "", "us": round(us, 1), "rate": _rate(2**31, us), "error": ""}


def _shape(name: str, m: int, k: int, ns: tuple[int, ...], wide: bool) -> Iterator[dict[str, Any]]:
    """cuBLAS, then the kernel with each configuration."""
    torch.manual_seed(0)
    size = sum(ns) * k * 2
    copies = max(1, -(-CACHED // size))
    x = torch.randn(m, 1, k, device="cuda", dtype=torch.bfloat16)
    sets = [[torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5 for n in ns] for _ in range(copies)]
    gated = name == "gate up"
    shape, block_m = f"{name} M={m}", max(16, 1 << (m - 1).bit_length())
    wide_x = x.float()
    exact = [linear(wide_x, w.float()) for w in sets[0]]
    if gated:
        exact = [silu(exact[0]) * exact[1]]

    def row(kernel: str, config: str, call: Callable[[list[Tensor]], list[Tensor]]) -> dict[str, Any]:
        result = {"kernel": kernel, "shape": shape, "config": config}
        try:
            error = max(float((a - b).norm() / b.norm()) for a, b in zip(call(sets[0]), exact, strict=True))
            us = _time([lambda s=s: call(s) for s in sets] * max(1, 8 // copies))  # type: ignore[misc]
        except Exception as problem:  # a candidate that does not fit must not hide the others
            return {**result, "us": None, "rate": None, "error": f"{type(problem).__name__}: {str(problem)[:160]}"}
        return {**result, "us": round(us, 2), "rate": _rate(size, us), "error": f"{error:.1e}"}

    if gated:
        yield row("cuBLAS + silu * up", "", lambda ws: [silu(linear(x, ws[0])) * linear(x, ws[1])])
        used = fma_config(k, x.dtype, True) if m <= FMA_ROWS else dot_config(m, 2 * ns[0], x.dtype, True)
        others = GATED_FMA if m <= FMA_ROWS else GATED_DOT[block_m]
        for config in _candidates(used, others, wide):
            yield row(
                "small_gated_linear",
                _text(config),
                lambda ws, c=config: [small_gated_linear(x, *ws, "silu", config=c)],  # type: ignore[misc]
            )
        return
    yield row("cuBLAS", "", lambda ws: [linear(x, w) for w in ws])
    used = fma_config(k, x.dtype, False, m == len(ns) == 1) if m <= FMA_ROWS else dot_config(m, sum(ns), x.dtype, False)
    for config in _candidates(used, FMA if m <= FMA_ROWS else DOT[block_m], wide):
        yield row("small_linear", _text(config), lambda ws, c=config: small_linear(x, ws, config=c))  # type: ignore[misc]
    if name in ("o", "down"):
        exact = [e + 1 for e in exact]
        one = torch.ones(m, 1, ns[0], device="cuda", dtype=torch.bfloat16)
        yield row("cuBLAS + residual", "", lambda ws: [one + linear(x, ws[0])])
        yield row("small_linear + residual", _text(used), lambda ws: small_linear(x, ws, residual=one))


def _candidates(used: Config, others: list[Config], wide: bool) -> list[Config]:
    return list(dict.fromkeys([used, *(others if wide else [])]))


def _text(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config._asdict().items())


def _rate(size: int, us: float) -> str:
    return f"{size / us / 1e6:.3f} TB/s"


def _time(calls: list[Callable[[], Any]], replays: int = 15) -> float:
    """Microseconds of one call: the median over replays of a CUDA graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    graph.replay()
    for begin, end in marks:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks) * 1000 / len(calls)


if __name__ == "__main__":
    for line in rows(tuple(int(m) for m in sys.argv[1:]) or TOKENS):
        print(json.dumps(line))
