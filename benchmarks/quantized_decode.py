"""Times attention of one token on quantized caches, and their update, beside the decode kernels of bf16 caches, at
Llama-3.1-8B's shapes.

Run as a program it prints a line for each kind and configuration, a column for each shape; `all` as argument: all candidates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kvrewrite.ops  # noqa: F401  (registers the reference ops)
from benchmarks.decode import DTYPE, HKV, MORE_THAN_L2, D, H, Rotation, graph_us
from kvrewrite.kernels.attention.decode import PAGE, Config
from kvrewrite.kernels.groups import (
    At,
    Codes,
    Eviction,
    Logits,
    NewTokens,
    QuantizedCache,
    QuantizedPages,
    Rows,
    Tokens,
)
from kvrewrite.kernels.quantized.decode import config, decode_attention_quantized
from kvrewrite.kernels.quantized.scheme import KINDS, Scheme
from kvrewrite.kernels.quantized.tiles import tiles
from kvrewrite.kernels.quantized.update import decode_update_quantized

SHAPES = ((1, 16384), (8, 16384), (32, 4096))
RESIDUAL, GROUP = 128, 32
CANDIDATES = tuple(
    Config(*c)
    for c in ((8, 1, 2), (8, 1, 3), (4, 2, 3), (4, 4, 3), (8, 1, 2, 2), (4, 2, 2, 2), (4, 2, 3, 2), (4, 4, 2, 2))
)


class Quantized:
    """As many quantized caches of a shape as it takes to be larger than L2, in one pool of randomly ordered pages."""

    def __init__(self, kind: str, b: int, slots: int, least: int = MORE_THAN_L2):
        self.scheme, self.b, self.slots = Scheme(kind, GROUP), b, slots
        width, p = slots // PAGE, self.scheme.parameters
        slot_bytes = self.scheme.key_bytes(D, 2) + self.scheme.value_bytes(D, 2)
        self.bytes = int(b * HKV * slots * slot_bytes)
        self.count = max(1, -(-least // self.bytes))
        total = 1 + self.count * b * HKV * width

        def codes() -> Tensor:  # none of them is fp8's NaN
            return (
                torch.randint(0, 128, (total, PAGE, self.scheme.code_width(D)), device="cuda", dtype=torch.uint8) & 119
            )

        def ends(*shape: int) -> Tensor:
            sign = torch.tensor([-1.0, 1.0], device="cuda")[-p:]
            return ((1 + torch.rand(total, *shape, 1, device="cuda")) * sign).to(DTYPE).contiguous()

        self.k_pages, self.v_pages = codes(), codes()
        self.k_params, self.v_params = ends(PAGE // GROUP, D), ends(PAGE, D // self.scheme.value_group(D))
        self.score_pages = torch.rand(total, PAGE, device="cuda")
        self.pos_pages = torch.zeros(total, PAGE, 2, device="cuda", dtype=torch.int32)
        order = (torch.randperm(total - 1) + 1).to(torch.int32).cuda()
        self.tables = list(order.view(self.count, b, HKV, width))
        self.place()
        self.lens = [torch.full((b, HKV), slots, dtype=torch.int32, device="cuda") for _ in self.tables]
        self.qlens = [n - RESIDUAL for n in self.lens]
        self.k_tail = torch.randn(b, HKV, RESIDUAL + GROUP, D, device="cuda", dtype=DTYPE)
        self.v_tail = torch.randn_like(self.k_tail)
        self.q = torch.randn(b, 1, H * D, device="cuda", dtype=DTYPE).view(b, 1, H, D).transpose(1, 2)
        self.k = torch.randn(b, 1, HKV * D, device="cuda", dtype=DTYPE).view(b, 1, HKV, D).transpose(1, 2)
        self.v = torch.randn_like(self.k)
        self.positions = torch.full((b, 1), slots, device="cuda")
        self.valid = torch.ones(b, dtype=torch.int32, device="cuda")

    def place(self) -> None:
        """Gives slot i the position i."""
        at = torch.arange(self.slots, device="cuda", dtype=torch.int32).view(-1, PAGE)
        for table in self.tables:
            self.pos_pages[table.long()] = at[..., None].expand(self.b, HKV, -1, -1, 2)

    def codes(self) -> Codes:
        """Codes, parameters and tails."""
        return Codes(self.k_pages, self.v_pages, self.k_params, self.v_params, self.k_tail, self.v_tail)

    def attend(self, i: int, launch: Config | None = None, mass: bool = False) -> tuple:
        """Attention on cache i."""
        tokens, at = Tokens(self.q, self.k, self.v), At(self.positions, self.valid)
        cache = QuantizedPages(self.pos_pages, self.tables[i], self.lens[i], self.qlens[i])
        logits = Logits(scale=D**-0.5)
        return decode_attention_quantized(tokens, self.codes(), cache, at, logits, self.scheme, mass, launch)

    def attend_us(self, launch: Config | None = None, mass: bool = False) -> float:
        """Microseconds of attention."""
        return graph_us([lambda i=i: self.attend(i, launch, mass) for i in range(self.count)])  # type: ignore[misc]

    def error(self) -> float:
        """Relative error of the output on cache 0 against the reference op."""
        arguments = (
            self.q, self.k, self.v, *self.codes(), self.pos_pages, self.tables[0], self.lens[0],
            self.qlens[0], self.positions, self.valid, None, None, self.scheme.kind, GROUP, D**-0.5, 0.0, 0, 0, False,
        )  # fmt: skip
        from kvrewrite.ops.dispatch import kernels

        with kernels("reference"):
            expected = torch.ops.kvrewrite.decode_attention_quantized(*arguments)[0].float()
        return float((self.attend(0)[0].float() - expected).norm() / expected.norm())

    def arguments(self, evicts: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, budgets and protected slots of an update that evicts, or has room."""
        keep = torch.full((self.b, HKV), self.slots if evicts else 2**31 - 1, dtype=torch.int32, device="cuda")
        near = torch.full((self.b,), 64, dtype=torch.int32, device="cuda")
        return torch.full((self.b, HKV, 1), 2.0, device="cuda"), keep, near

    def update(self, i: int, new: Tensor, keep: Tensor, near: Tensor, now: Tensor | None = None) -> None:
        """The update of cache i by one token."""
        now = self.positions if now is None else now
        rows = Rows(now, now, self.valid, keep, near)
        where = QuantizedCache(self.score_pages, self.pos_pages, self.tables[i], self.lens[i], self.qlens[i])
        new_tokens = NewTokens(self.k, self.v, new)
        decode_update_quantized(new_tokens, rows, where, self.codes(), self.scheme, Eviction(protected_first=4))

    def update_us(self, evicts: bool) -> float:
        """Microseconds of the update of one token: with an eviction, or behind the last slot of half as many."""
        held = self.slots if evicts else self.slots // 2
        now = [torch.full((self.b, 1), self.slots - 1, device="cuda") for _ in self.tables]
        arguments = self.arguments(evicts)

        def step(i: int) -> None:  # its time is taken off
            now[i].add_(1)

        def update(i: int) -> None:
            step(i)
            self.update(i, *arguments, now[i])

        for lens, qlens in zip(self.lens, self.qlens):
            lens.fill_(held)
            qlens.fill_(held - RESIDUAL)
        base = graph_us([lambda i=i: step(i) for i in range(self.count)])  # type: ignore[misc]
        for start in now:
            start.fill_(self.slots - 1)
        self.place()  # what was measured before has left tokens that are later than those to come
        return graph_us([lambda i=i: update(i) for i in range(self.count)]) - base  # type: ignore[misc]


def _compile(launches: tuple[Config | None, ...]) -> None:
    """Compiles what is timed, several kernels at a time; what fails says so when it is timed."""

    def one(call: Callable[[], Any]) -> None:
        with suppress(Exception):
            call()

    calls: list[Callable[[], Any]] = []
    for kind in KINDS:
        for b, slots in (
            (1, 16384),
            (8, 4096),
        ):  # numbers of rows that are one, and multiples of 16, are cases of their own
            caches = Quantized(kind, b, slots, 1)
            calls += [partial(caches.attend, 0, c) for c in launches]
            calls += [partial(caches.attend, 0, None, True), partial(caches.update, 0, *caches.arguments(True))]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, calls))


def main(everything: bool) -> None:
    """Prints the table."""
    launches: tuple[Config | None, ...] = CANDIDATES if everything else (None,)
    _compile(launches)
    print(f"{'us':38s}" + "".join(f"{f'{b}x{slots}':>12s}" for b, slots in SHAPES))
    lines: dict[str, list[str]] = {}

    def add(name: str, us: float) -> None:
        lines.setdefault(name, []).append(f"{us:12.1f}")

    for b, slots in SHAPES:
        add("bf16 decode_attention", Rotation(b, slots).attend_us())
        for kind in KINDS:
            caches, shape = Quantized(kind, b, slots), tiles(Scheme(kind, GROUP), D, D, H // HKV)
            for launch in launches:
                chosen = launch or config(caches.scheme, DTYPE, shape, D, b * HKV)
                add(f"{kind} {tuple(chosen)[:4] if everything else 'attention'}", caches.attend_us(launch))
            add(f"{kind} error, times 1e4", 1e4 * caches.error() if b == 1 else float("nan"))
            add(f"{kind} with mass", caches.attend_us(mass=True))
            add(f"{kind} update, appends", caches.update_us(False))
            add(f"{kind} update, evicts", caches.update_us(True))
    for name, cells in lines.items():
        print(f"{name:38s}" + "".join(cells))


if __name__ == "__main__":
    main("all" in sys.argv[1:])
