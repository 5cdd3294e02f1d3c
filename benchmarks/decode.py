"""Times attention of one token, and the update of the cache, beside torch's attention, at Llama-3.1-8B's shapes.

Run as a program it prints a table: one line a configuration, one column a shape; `update` as argument: the update.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvrewrite.kernels.attention.decode import PAGE, Config, config, decode_attention
from kvrewrite.kernels.groups import (
    At,
    Cache,
    Dense,
    Eviction,
    Logits,
    NewTokens,
    Pages,
    Rows,
    TokenOptions,
    Tokens,
)
from kvrewrite.kernels.update.decode import decode_update

H, HKV, D = 32, 8, 128
DTYPE = torch.bfloat16
SHAPES = ((1, 4096), (1, 16384), (8, 4096), (8, 16384), (32, 4096), (32, 16384))
CANDIDATES = (
    Config(2, 4, 3), Config(2, 4, 2, 2), Config(2, 4, 3, 1, 1), Config(2, 4, 3, 1, 2), Config(2, 4, 2, 2, 2),
    Config(1, 4, 6), Config(1, 8, 3, 2, 2), Config(3, 4, 3), Config(4, 4, 2),
)  # fmt: skip
SKEWED, LIMIT = 16, 1.05  # lengths 1:16; how much longer than torch's attention ours may take
MORE_THAN_L2 = 400 << 20


def graph_us(calls: list[Callable[[], Any]], least: int = 24) -> float:
    """Microseconds a call: the median over replays of a CUDA graph that runs through `calls` at least `least` times."""
    calls = calls * max(1, -(-least // len(calls)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    del kept
    return statistics.median(times[2:])


class Rotation:
    """As many caches of a shape as it takes to be larger than L2, in one pool of randomly ordered pages."""

    def __init__(self, b: int, slots: int, skew: int = 1, least: int = MORE_THAN_L2):
        pages = slots // PAGE
        short, long = 2 * pages // (1 + skew), 2 * pages - 2 * pages // (1 + skew)
        need = torch.tensor([short, long]).repeat(b * HKV // 2).view(b, HKV)
        self.width = max(int(need.max()), pages)
        self.bytes = int(need.sum()) * PAGE * D * 2 * 2
        self.count = max(1, -(-least // self.bytes))
        total = 1 + self.count * int(need.sum())
        self.k_pages = torch.randn(total, PAGE, D, device="cuda", dtype=DTYPE)
        self.v_pages = torch.randn(total, PAGE, D, device="cuda", dtype=DTYPE)
        self.score_pages = torch.rand(total, PAGE, device="cuda")
        self.pos_pages = torch.zeros(total, PAGE, 2, device="cuda", dtype=torch.int32)
        order = torch.randperm(total - 1) + 1
        column = torch.arange(self.width)
        self.tables, self.lens = [], []
        for i in range(self.count):
            table = torch.zeros(b, HKV, self.width, dtype=torch.int32)
            mine = order[i * int(need.sum()) : (i + 1) * int(need.sum())]
            table[column < need[..., None]] = mine.to(torch.int32)
            self.tables.append(table.cuda())
            self.lens.append((need * PAGE).to(torch.int32).cuda())
        self.b, self.slots = b, slots
        for table in self.tables:
            at = torch.arange(self.width * PAGE, device="cuda").view(1, 1, self.width, PAGE)
            self.pos_pages[table.long()] = at.expand(b, HKV, -1, -1)[..., None].to(torch.int32)
        self.q = torch.randn(b, 1, H * D, device="cuda", dtype=DTYPE).view(b, 1, H, D).transpose(1, 2)
        self.k = torch.randn(b, 1, HKV * D, device="cuda", dtype=DTYPE).view(b, 1, HKV, D).transpose(1, 2)
        self.v = torch.randn_like(self.k)
        self.positions = torch.full((b, 1), self.width * PAGE, device="cuda")
        self.valid = torch.ones(b, dtype=torch.int32, device="cuda")

    def attend(self, i: int, launch: Config | None = None, mass: bool = False, window: int = 0) -> tuple:
        """Our attention on cache i."""
        cache = Pages(self.k_pages, self.v_pages, self.pos_pages, self.tables[i], self.lens[i])
        tokens, at = Tokens(self.q, self.k, self.v), At(self.positions, self.valid)
        logits = Logits(scale=D**-0.5, window=window)
        return decode_attention(tokens, Dense(), cache, at, logits, TokenOptions(mass), launch)

    def attend_us(self, launch: Config | None = None, mass: bool = False, window: int = 0) -> float:
        """Microseconds of our attention."""
        return graph_us([lambda i=i: self.attend(i, launch, mass, window) for i in range(self.count)])  # type: ignore[misc]

    def dense(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys and values of cache i for the baselines, (B, Hkv, slots, D): as many pages, though not its own."""
        n = self.b * HKV * self.slots // PAGE
        part = slice(1 + i * n, 1 + (i + 1) * n)
        shape = (self.b, HKV, self.slots, D)
        return self.k_pages[part].view(shape), self.v_pages[part].view(shape)

    def torch_us(self) -> float:
        """Microseconds of torch's attention on equal caches of this size."""

        def one(i: int) -> Tensor:
            return F.scaled_dot_product_attention(self.q, *self.dense(i), enable_gqa=True)

        return graph_us([lambda i=i: one(i) for i in range(self.count)])  # type: ignore[misc]

    def error(self, launch: Config | None = None) -> float:
        """Relative error of out and mass on cache 0 against float32 math."""
        out, _, mass = self.attend(0, launch, mass=True)
        assert mass is not None
        worst = 0.0
        for b in range(min(self.b, 2)):
            for h in range(HKV):
                n = int(self.lens[0][b, h])
                page = self.tables[0][b, h, : -(-n // PAGE)].long()
                keys = torch.cat([self.k_pages[page].view(-1, D)[:n], self.k[b, h]]).float()
                values = torch.cat([self.v_pages[page].view(-1, D)[:n], self.v[b, h]]).float()
                group = slice(h * (H // HKV), (h + 1) * (H // HKV))
                weights = torch.softmax(self.q[b, group, 0].float() @ keys.T * D**-0.5, -1)
                expected, got = weights @ values, out[b, group, 0].float()
                worst = max(worst, float((got - expected).norm() / expected.norm()))
                total = weights.sum(0)
                found = torch.cat([mass[b, h, :n], mass[b, h, -1:]])
                worst = max(worst, float((found - total).norm() / total.norm()))
        return worst


def _try(row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """row with what `work` measured, or with why it failed."""
    empty: dict[str, Any] = {"us": None, "rate": None, "error": None}
    try:
        return {**row, **empty, **work()}
    except Exception as error:
        return {**row, **empty, "error": f"{type(error).__name__}: {error}"[:300]}


def attention_rows() -> list[dict[str, Any]]:
    """Attention: torch's, all candidates, and of the frozen configuration also skewed heads, mass and a window."""
    _compile_all()
    found = []
    for b, slots in SHAPES:
        caches, shape = Rotation(b, slots), f"{b}x{slots}"
        usual = config(DTYPE, D, D, H // HKV, b * HKV, slots)
        found.append(_timed("sdpa", shape, "", caches, caches.torch_us, lambda: None))
        found += [_attention("decode_attention", shape, c, caches) for c in CANDIDATES]
        found.append(_attention("mass", shape, usual, caches, mass=True))
        found.append(_attention("window", shape, usual, caches, window=1 << 20))
        del caches
        found.append(_attention(f"skewed 1:{SKEWED}", shape, usual, Rotation(b, slots, SKEWED)))
    return found


def _attention(
    name: str, shape: str, launch: Config, caches: Rotation, mass: bool = False, window: int = 0
) -> dict[str, Any]:
    def us() -> float:
        return caches.attend_us(launch, mass, window)

    return _timed(name, shape, str(tuple(launch)), caches, us, lambda: caches.error(launch))


def _timed(
    name: str, shape: str, launch: str, caches: Rotation, us: Callable[[], float], error: Callable[[], float | None]
) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        took = us()
        return {"us": took, "rate": f"{caches.bytes / took / 1e6:.2f} TB/s", "error": error()}

    return _try({"kernel": name, "shape": shape, "config": launch}, work)


def _compile_all() -> None:
    """Compiles what is timed, several kernels at a time; what fails says so when it is timed."""
    works = []
    for b, slots in ((1, 4096), (8, 4096), (32, 4096)):
        small = Rotation(b, slots, least=1)
        usual = config(DTYPE, D, D, H // HKV, b * HKV, slots)
        works += [(small, c, mass, 0) for c in CANDIDATES for mass in (False, True)] + [(small, usual, False, 1 << 20)]

    def compile_one(work: tuple[Rotation, Config, bool, int]) -> None:
        with suppress(Exception):
            work[0].attend(0, *work[1:])

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(compile_one, works))


def table() -> str:
    """The rows of attention as text: a line a kernel and configuration, a column a shape; ! marks what is over LIMIT times
    torch's attention, x what is wrong."""
    cells: dict[str, dict[str, str]] = {}
    best: dict[str, float] = {}
    failures = []
    for row in attention_rows():
        shape, us = row["shape"], row["us"]
        if us is None:
            text = "failed"
            failures.append(f"{row['kernel']} {row['config']} {shape}: {row['error']}")
        else:
            best.setdefault(shape, us)  # torch's comes first
            mark = "x" if (row["error"] or 0.0) > 1e-2 else "!" if us > LIMIT * best[shape] else " "
            text = f"{us:.1f}{mark}"
        name = f"{row['kernel']} {row['config']}" if row["kernel"] == "decode_attention" else row["kernel"]
        cells.setdefault(name.replace("decode_attention ", ""), {})[shape] = text
    shapes = [f"{b}x{slots}" for b, slots in SHAPES]
    lines = [f"{'us':22s}" + "".join(f"{shape:>10s}" for shape in shapes)]
    lines += [f"{name:22s}" + "".join(f"{found.get(s, ''):>10s}" for s in shapes) for name, found in cells.items()]
    return "\n".join(lines + failures)


def update_rows() -> list[dict[str, Any]]:
    """The update: appending, replacing the least, with attention mass as scores, and behind a window."""
    return [row for b, slots in SHAPES for row in _updates_of(b, slots)]


def _updates_of(b: int, slots: int) -> list[dict[str, Any]]:
    caches = Rotation(b, slots)
    mass = torch.rand(b, HKV, slots + 1, device="cuda")
    new = torch.full((b, HKV, 1), 2.0, device="cuda")
    now = [caches.positions.clone() for _ in range(caches.count)]

    def step(i: int) -> None:  # each cache's tokens come in without gaps; its time is taken off
        now[i].add_(1)

    def timed(keep: int, recent: int, slot_scores: Tensor | None, window: int) -> dict[str, Any]:
        budget = torch.full((b, HKV), keep, dtype=torch.int32, device="cuda")
        near = torch.full((b,), recent, dtype=torch.int32, device="cuda")

        def update(i: int) -> None:
            step(i)
            pools = (caches.k_pages, caches.v_pages, caches.score_pages, caches.pos_pages)
            rows = Rows(now[i], now[i], caches.valid, budget, near)
            cache = Cache(*pools, caches.tables[i], caches.lens[i])
            decode_update(NewTokens(caches.k, caches.v, new, slot_scores), rows, cache, Eviction(4, window))

        at = torch.arange(slots, device="cuda", dtype=torch.int32).view(slots // PAGE, PAGE)
        for i, table in enumerate(caches.tables):
            caches.pos_pages[table.long()] = at[..., None].expand(b, HKV, -1, -1, 2)
            caches.score_pages[table.long()] = torch.rand(b, HKV, slots // PAGE, PAGE, device="cuda")
            caches.lens[i].fill_(slots // 2 if keep > slots else slots)
            now[i].fill_(slots - 1)
        base = graph_us([lambda i=i: step(i) for i in range(caches.count)])  # type: ignore[misc]
        for i in range(caches.count):
            now[i].fill_(slots - 1)
        us = graph_us([lambda i=i: update(i) for i in range(caches.count)]) - base  # type: ignore[misc]
        return {"us": us, "rate": f"{base:.2f} us taken off"}

    found = []
    for name, arguments in (
        ("append", (2**31 - 1, 0, None, 0)), ("replace", (slots, 0, None, 0)), ("replace, recent", (slots, 64, None, 0)),
        ("replace, slot scores", (slots, 64, mass[..., :-1], 0)), ("window", (slots, 64, None, slots)),
    ):  # fmt: skip
        row = {"kernel": "decode_update", "shape": f"B={b} slots={slots}", "config": name}
        found.append(_try(row, lambda a=arguments: timed(*a)))  # type: ignore[misc]
    return found


def rows() -> list[dict[str, Any]]:
    """Everything that is measured here, one row each: kernel, shape, config, us, rate, error."""
    return attention_rows() + update_rows()


if __name__ == "__main__":
    print("\n".join(map(str, update_rows())) if "update" in sys.argv[1:] else table())
