"""Times what follows a chunk on a GPU: ranks, gathering and rotating, choosing who stays, moving; Llama-3.1-8B's shapes.

python -m benchmarks.evict [ranks] [gather] [select]
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvrewrite.kernels import pages
from kvrewrite.kernels.groups import KeyRotation
from kvrewrite.kernels.rotary import gather, ranks
from kvrewrite.kernels.update import reference, select
from tests.support.flat import flat

HKV, D, PAGE = 8, 128, 64


def time_us(run: Callable[[int], Any], turns: int = 8, replays: int = 5) -> float:
    """Median over replays of a CUDA graph of `turns` calls, which get their number (to use other buffers each)."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(turns):
            run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(turns):
            run(i)
    times = []
    for _ in range(replays + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / turns)
    return sorted(times[1:])[replays // 2]


def cache(
    slots: int, spread: int, capacity: int | None = None, seed: int = 0, scores: str = "plain"
) -> dict[str, Tensor]:
    """A layer's cache of HKV heads with `slots` live slots, at positions spread over [0, spread), in shuffled slots."""
    g = torch.Generator(device="cuda").manual_seed(seed)
    width = -(-(capacity or slots) // PAGE)
    total = 1 + HKV * width
    options: dict[str, Any] = {"device": "cuda", "generator": g}
    table = (torch.randperm(total - 1, **options) + 1).to(torch.int32).reshape(1, HKV, width)
    found = {
        "k_pages": torch.randn(total, PAGE, D, **options).bfloat16(),
        "v_pages": torch.randn(total, PAGE, D, **options).bfloat16(),
        "score_pages": draw(scores, (total, PAGE), g),
        "pos_pages": torch.zeros(total, PAGE, 2, dtype=torch.int32, device="cuda"),
        "table": table,
        "lens": torch.full((1, HKV), slots, dtype=torch.int32, device="cuda"),
    }
    pos = torch.stack([torch.randperm(max(spread, 1), **options)[:slots] for _ in range(HKV)])[None].to(torch.int32)
    if slots:
        where = torch.arange(slots, device="cuda").expand(1, HKV, slots)
        pages.write(
            found["pos_pages"], table, where, torch.stack([pos, pos], -1), torch.ones_like(where, dtype=torch.bool)
        )
    return found


def draw(kind: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    x = torch.randn(shape, device="cuda", generator=g)
    if kind == "half":
        return x.bfloat16().float()
    if kind == "zeros":
        return torch.where(x > 0.3, (2 * x).exp(), 0.0)
    return x


def row(kernel: str, shape: str, config: Any, run: Callable[[], tuple[float, str, Any]]) -> dict[str, Any]:
    """One measurement; what fails is reported and does not end the others."""
    try:
        us, rate, error = run()
        return {
            "kernel": kernel,
            "shape": shape,
            "config": str(config),
            "us": round(us, 2),
            "rate": rate,
            "error": error,
        }
    except Exception as e:
        text = f"{type(e).__name__}: {str(e)[:200]} {traceback.format_exc().splitlines()[-2].strip()}"
        return {"kernel": kernel, "shape": shape, "config": str(config), "us": None, "rate": None, "error": text}


def rank_rows() -> list[dict[str, Any]]:
    at = cache(16384, 131072)
    following, renew = torch.tensor([16384], device="cuda"), torch.tensor([True], device="cuda")
    places = pages.read(at["pos_pages"], at["table"])[..., 0]
    want = torch.argsort(torch.argsort(places, dim=-1), dim=-1)
    shape, found = "8 heads x 16384 slots, positions < 131072", []
    for config in ((512, 4096, 8), (256, 4096, 8), (512, 4096, 16), (512, 8192, 16), (512, 2048, 8), (1024, 4096, 8)):

        def run(config: tuple[int, int, int] = config) -> tuple[float, str, Any]:
            def call(_: int = 0) -> Tensor:
                return ranks.slot_rotary(
                    at["pos_pages"], at["table"], at["lens"], following, renew, max_position=131072, config=config
                )

            wrong = int((call() != want).sum())
            return time_us(call), "", f"{wrong} wrong"

        found.append(row("slot_rotary", shape, config, run))

    def torch_way() -> tuple[float, str, Any]:
        live = torch.ones_like(places, dtype=torch.bool)
        return time_us(lambda _: reference.ranks_from_newest(places, live)), "", "0 wrong"

    return [*found, row("slot_rotary", shape, "torch: argsort alone", torch_way)]


def gather_rows() -> list[dict[str, Any]]:
    found = []
    caches = [cache(16384, 16384, seed=i) for i in range(2)]
    g = torch.Generator(device="cuda").manual_seed(1)
    angle = torch.randn(16384, D // 2, device="cuda", generator=g)
    half = torch.arange(D, device="cuda").roll(D // 2)
    rotary = torch.stack([torch.randperm(16384, device="cuda", generator=g) for _ in range(HKV)])[None]
    sorted_rotary = torch.arange(16384, device="cuda").expand(1, HKV, -1).contiguous()
    moved = 4 * HKV * 16384 * D * 2

    def one(name: str, config: Any, shape: str, **options: Any) -> None:
        def run() -> tuple[float, str, Any]:
            def call(i: int) -> tuple[Tensor | None, Tensor | None]:
                at = caches[i % 2]
                rotation = KeyRotation(**options)
                return gather.gather(at["k_pages"], at["v_pages"], at["table"], at["lens"], rotation, config)

            k, v = call(0)
            assert k is not None and v is not None
            x = pages.read(caches[0]["k_pages"], caches[0]["table"])
            if "rotary" in options:
                p = options["rotary"]
                turned = x.float() * options["cos"][p].float() + x[..., half].float() * options["sin"][p].float()
                x = turned.to(x.dtype)
            wrong = int((k != x).sum()) + int((v != pages.read(caches[0]["v_pages"], caches[0]["table"])).sum())
            us = time_us(call)
            return us, f"{moved / us / 1e6:.2f} TB/s", f"{wrong} differ"

        found.append(row(name, shape, config, run))

    for config in ((32, 1, 4), (32, 8, 4), (64, 1, 4), (64, 1, 8), (16, 1, 4)):
        one("gather", config, "8 x 16384 x 128 bf16, k and v")
    for dtype in (torch.float32, torch.bfloat16):
        cos, sin = torch.cat([angle.cos()] * 2, -1).to(dtype), torch.cat([-angle.sin(), angle.sin()], -1).to(dtype)
        shape = f"8 x 16384 x 128 bf16, k rotated ({str(dtype)[6:]} tables) and v"
        for config in ((32, 8, 4), (32, 4, 4), (32, 2, 4), (32, 1, 4), (16, 8, 4), (64, 8, 8), (64, 4, 8)):
            one("gather, half", config, shape, rotary=sorted_rotary, cos=cos, sin=sin, half=D // 2)
        one("gather, half, ranks differ", (32, 8, 4), shape, rotary=rotary, cos=cos, sin=sin, half=D // 2)
        one("gather, half, ranks differ", (32, 1, 4), shape, rotary=rotary, cos=cos, sin=sin, half=D // 2)
        one("gather, any partner", (32, 8, 4), shape, rotary=sorted_rotary, cos=cos, sin=sin, partner=half)

    def torch_way() -> tuple[float, str, Any]:
        def call(i: int) -> None:
            for name in ("k_pages", "v_pages"):
                pages.read(caches[i % 2][name], caches[i % 2]["table"])

        us = time_us(call)
        return us, f"{moved / us / 1e6:.2f} TB/s", "0 differ"

    return [*found, row("gather", "8 x 16384 x 128 bf16, k and v", "torch: index alone", torch_way)]


def arguments(slots: int, tokens: int, keep: int, seed: int, scores: str, recent: int) -> dict[str, Any]:
    capacity = max(keep, slots)
    g = torch.Generator(device="cuda").manual_seed(seed)
    options: dict[str, Any] = {"device": "cuda", "generator": g}
    start = 2 * slots
    positions = torch.arange(start, start + tokens, device="cuda")[None]
    k, v = (torch.randn(1, tokens, HKV, D, **options).bfloat16().transpose(1, 2) for _ in range(2))
    return cache(slots, start, capacity, seed, scores) | {
        "k": k, "v": v, "new_scores": draw(scores, (1, HKV, tokens), g), "slot_scores": None, "positions": positions,
        "rotary": positions, "valid": torch.tensor([tokens], dtype=torch.int32, device="cuda"),
        "keep": torch.full((1, HKV), keep, dtype=torch.int32, device="cuda"),
        "recent": torch.tensor([recent], dtype=torch.int32, device="cuda"), "window": 0, "chunk": 0,
    }  # fmt: skip


def restore(args: dict[str, Any]) -> Callable[[], None]:
    """Puts lens, positions and scores back, so that every timed call has the same work; keys and values don't matter."""
    kept = {n: args[n].clone() for n in ("lens", "pos_pages", "score_pages")}

    def back() -> None:
        for n, x in kept.items():
            args[n].copy_(x)

    return back


def survivors(args: dict[str, Any]) -> list[Tensor]:
    lens = args["lens"][0].tolist()
    pos = pages.read(args["pos_pages"], args["table"])[0, :, :, 0]
    return [pos[h, : lens[h]].sort().values for h in range(HKV)]


def differing(args: dict[str, Any], **options: Any) -> str:
    """Against the reference; restores the arguments."""
    back = restore(args)
    values = {n: args[n].clone() for n in ("k_pages", "v_pages")}
    flat(reference.cache_update)(**args)
    want = survivors(args)
    back()
    for n, x in values.items():
        args[n].copy_(x)
    flat(select.cache_update)(**args, **options)
    got = survivors(args)
    back()
    for n, x in values.items():
        args[n].copy_(x)
    wrong = sum(len(a) != len(b) or bool((a != b).any()) for a, b in zip(got, want))
    return f"{wrong} heads differ"


class Skipped:
    """Stands in for a kernel that is not to run."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: None


def without(*names: str) -> Callable[[Callable[[], float]], float]:
    """Runs something while the named kernels of select.py do nothing."""

    def during(run: Callable[[], float]) -> float:
        kept = {n: getattr(select, n) for n in names}
        try:
            for n in names:
                setattr(select, n, Skipped())
            return run()
        finally:
            for n, kernel in kept.items():
                setattr(select, n, kernel)

    return during


def select_rows() -> list[dict[str, Any]]:
    """Plans and shares of the three launches. Every check and every timed call starts from the same fresh state: a cache that
    already holds the new tokens would have positions twice, which `cache_update` excludes."""
    found = []
    large = [(4096, 256, 32), (4096, 256, 16), (4096, 512, 32)]
    small = [(2048, 256, 16), (4096, 256, 16), (2048, 128, 16), (1024, 256, 16), (2048, 256, 32)]
    cases = [
        ("a chunk, recent", 16384, 3072, 16384, "plain", 100, small),
        ("a chunk, bf16 scores", 16384, 3072, 16384, "half", 100, small[:1]),
        ("a chunk, many zeros", 16384, 3072, 16384, "zeros", 100, small[:1]),
        ("a chunk", 6000, 3072, 6000, "half", 100, small[:2]),
        ("room", 12000, 3072, 16384, "plain", 0, small[:1]),
        ("one shot", 0, 131072, 16384, "plain", 32, large),
    ]  # fmt: skip
    for name, slots, tokens, keep, scores, recent, plans in cases:
        shape = f"8 heads, {slots} slots + {tokens} tokens -> {keep}"
        args = arguments(slots, tokens, keep, 0, scores, recent)
        back = restore(args)
        idle = time_us(lambda _, back=back: back())  # type: ignore[misc]
        for config in plans:

            def timed(args: dict[str, Any] = args, config: Any = config, back: Any = back, idle: float = idle) -> float:
                def call(_: int) -> None:
                    back()
                    flat(select.cache_update)(**args, plan=config)

                us = time_us(call) - idle
                back()
                return us

            def run(args: dict[str, Any] = args, config: Any = config, timed: Any = timed) -> Any:
                error = differing(args, plan=config)
                return timed(), "", error

            found.append(row(f"cache_update: {name}, {scores}", shape, config, run))
            if config == plans[0]:
                # Nothing is moved in a run without `_move`, and nothing is read from lists that were not written.
                for left, skipped in (("plan alone", ("_lists", "_move")), ("plan and lists", ("_move",))):

                    def part(timed: Any = timed, skipped: tuple[str, ...] = skipped) -> tuple[float, str, Any]:
                        return without(*skipped)(timed), "", ""

                    found.append(row(f"cache_update: {name}, {scores}: {left}", shape, config, part))
    return found


PARTS = {"ranks": rank_rows, "gather": gather_rows, "select": select_rows}


def rows(parts: tuple[str, ...] = ("select",)) -> list[dict[str, Any]]:
    """The measurements of the named parts, checked against the references: by default those that are open."""
    return [line for part in parts for line in PARTS[part]()]


if __name__ == "__main__":
    for line in rows(tuple(sys.argv[1:]) or ("select",)):
        print(line, flush=True)
