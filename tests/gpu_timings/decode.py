"""Times attention of one token and the update of the cache beside torch's attention, at Llama-3.1-8B's shapes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvrewrite.kernels.gpu.decode import PAGE, Config, config, decode_attention
from kvrewrite.kernels.gpu.decode_update import decode_update

H, HKV, D = 32, 8, 128
DTYPE = torch.bfloat16
SHAPES = ((1, 4096), (1, 16384), (8, 4096), (8, 16384), (32, 4096), (32, 16384))
CANDIDATES = (
    Config(3, 4, 3), Config(2, 4, 4), Config(2, 4, 3), Config(1, 8, 6), Config(1, 4, 6), Config(4, 4, 2), Config(2, 8, 4),
)  # fmt: skip
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

    def __init__(self, b: int, slots: int, skew: int = 1):
        pages = slots // PAGE
        short, long = 2 * pages // (1 + skew), 2 * pages - 2 * pages // (1 + skew)
        need = torch.tensor([short, long]).repeat(b * HKV // 2).view(b, HKV)
        self.width = max(int(need.max()), pages)
        self.bytes = int(need.sum()) * PAGE * D * 2 * 2
        self.count = max(1, -(-MORE_THAN_L2 // self.bytes))
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
        self.tickets = torch.zeros(b * HKV, dtype=torch.int32, device="cuda")

    def attend(self, i: int, launch: Config | None = None, mass: bool = False, window: int = 0) -> tuple:
        """Our attention on cache i."""
        return decode_attention(
            self.q, self.k, self.v, None, None, self.k_pages, self.v_pages, self.pos_pages, self.tables[i], self.lens[i],
            self.positions, self.valid, None, None, scale=D**-0.5, softcap=0.0, window=window, chunk=0, mass=mass,
            tickets=self.tickets, launch=launch,
        )  # fmt: skip

    def attend_us(self, launch: Config | None = None, mass: bool = False, window: int = 0) -> float:
        """Microseconds of our attention."""
        return graph_us([lambda i=i: self.attend(i, launch, mass, window) for i in range(self.count)])  # type: ignore[misc]

    def dense(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys and values of cache i for the baselines, (B, Hkv, slots, D): as many pages, though not its own."""
        n = self.b * HKV * self.slots // PAGE
        part = slice(1 + i * n, 1 + (i + 1) * n)
        shape = (self.b, HKV, self.slots, D)
        return self.k_pages[part].view(shape), self.v_pages[part].view(shape)

    def baselines(self) -> dict[str, float | str]:
        """Microseconds of torch's attention on equal caches of this size."""
        found: dict[str, float | str] = {}
        folded = self.q.transpose(1, 2).reshape(self.b, HKV, H // HKV, D)
        for name, backend, q in (
            ("default", None, self.q), ("cudnn", SDPBackend.CUDNN_ATTENTION, self.q),
            ("flash", SDPBackend.FLASH_ATTENTION, self.q), ("flash, folded groups", SDPBackend.FLASH_ATTENTION, folded),
        ):  # fmt: skip
            try:
                with sdpa_kernel(backend) if backend else nullcontext():

                    def one(i: int, q: Tensor = q) -> Tensor:
                        return F.scaled_dot_product_attention(q, *self.dense(i), enable_gqa=q.shape[1] == H)

                    found[name] = graph_us([lambda i=i: one(i) for i in range(self.count)])  # type: ignore[misc]
            except Exception as error:  # a backend that refuses is a result, too
                found[name] = str(error)[:120]
        return found

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
    """Attention: the frozen configuration, candidates, skewed heads and attention mass beside torch's attention."""
    caches, usual = Rotation(1, 4096), config(DTYPE, D, D, H // HKV)
    two = usual._replace(one_launch=False)

    def compile_one(launch: Config) -> None:
        with suppress(Exception):  # the rows say why
            caches.attend(0, launch)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(compile_one, (*CANDIDATES, two, two._replace(overlap=True))))
    return [row for b, slots in SHAPES for row in (*_attention_of(b, slots), *_attention_of(b, slots, skew=16))]


def _attention_of(b: int, slots: int, skew: int = 1) -> list[dict[str, Any]]:
    caches, shape = Rotation(b, slots, skew), f"B={b} slots={slots}" + (f" skewed 1:{skew}" if skew > 1 else "")
    usual = config(DTYPE, D, D, H // HKV)

    def rate(us: float) -> str:
        return f"{caches.bytes / us / 1e6:.2f} TB/s"

    def timed(launch: Config, mass: bool, window: int) -> dict[str, Any]:
        us = caches.attend_us(launch, mass, window)
        return {"us": us, "rate": rate(us), "error": caches.error(launch)}

    found = []
    works: list[tuple[str, Config, bool, int]] = [("decode_attention", usual, False, 0)]
    if skew == 1:
        for name, us in caches.baselines().items():
            value = {"us": us, "rate": rate(us)} if isinstance(us, float) else {"error": us}
            found.append(_try({"kernel": "sdpa", "shape": shape, "config": name}, lambda v=value: v))  # type: ignore[misc]
        # At the other sizes the answers are the same as at one of these.
        candidates = CANDIDATES if (b, slots) in ((1, 4096), (1, 16384), (8, 16384)) else CANDIDATES[:3]
        two = usual._replace(one_launch=False)
        works = [("decode_attention", c, False, 0) for c in (*candidates, two, two._replace(overlap=True))]
        works.append(("decode_attention mass", usual, True, 0))
        works.append(("decode_attention window", usual, False, 1 << 20))
    for name, launch, mass, window in works:
        row = {"kernel": name, "shape": shape, "config": str(launch)}
        found.append(_try(row, lambda w=(launch, mass, window): timed(*w)))  # type: ignore[misc]
    return found


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
            decode_update(
                caches.k, caches.v, new, slot_scores, now[i], now[i], caches.valid, budget, near, caches.k_pages,
                caches.v_pages, caches.score_pages, caches.pos_pages, caches.tables[i], caches.lens[i], sinks=4,
                window=window, chunk=0,
            )  # fmt: skip

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
    for line in rows():
        print(line)
