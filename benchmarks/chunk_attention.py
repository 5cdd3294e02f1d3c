"""Chunk attention on a GPU: correctness at full size, and rates beside FlexAttention, cuDNN + merge and FlashAttention 2.

`rows()` returns one dict a measurement; run as a script it prints them as JSON lines:

    python -m benchmarks.chunk_attention [part ...]

Rates are TFLOP/s, with 4 * H * D * (T * C + T * (T + 1) / 2) operations, at Llama-3.1-8B's shape (H 32, Hkv 8, D 128, bf16) but
where a shape says otherwise. Errors are relative, against float64: on 64 query rows at full size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from kvrewrite.kernels.attention import chunk as portable
from kvrewrite.kernels.attention.chunk import Config, heads_together
from kvrewrite.kernels.attention.reference import attend
from kvrewrite.kernels.groups import Logits, Placed, Slots, Tokens
from tests.support.flat import flat

chunk_attention = flat(portable.chunk_attention)
PARTS = ("ragged", "routes", "orders", "hopper", "portable", "dims", "small", "features")
MAIN = [(3072, 16384), (4096, 16384)]
MORE = [(3072, 6016), (4096, 6016), (3072, 0), (1948, 16384)]
HOPPER = [(128, 2, None), (128, 2, 168), (128, 3, None), (64, 2, None), (64, 3, None), (64, 4, None)]
TILES = [
    Config(128, 128, 8, 2), Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 4, 3),
]  # fmt: skip


class Case:
    """Random tensors of one shape, every slot live."""

    def __init__(
        self, t: int, c: int, d: int = 128, dv: int | None = None, h: int = 32, hkv: int = 8, b: int = 1
    ) -> None:
        self.t, self.c, self.d, self.dv, self.h, self.hkv, self.b = t, c, d, dv or d, h, hkv, b
        options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        self.q = torch.randn(b, t, h * d, **options).view(b, t, h, d).transpose(1, 2)
        self.k = torch.randn(b, t, hkv * d, **options).view(b, t, hkv, d).transpose(1, 2)
        self.v = torch.randn(b, t, hkv * self.dv, **options).view(b, t, hkv, self.dv).transpose(1, 2)
        self.k_cache = torch.randn(b, hkv, c, d, **options)
        self.v_cache = torch.randn(b, hkv, c, self.dv, **options)
        self.lens = torch.full((b, hkv), c, dtype=torch.int32, device="cuda")
        self.valid = torch.full((b,), t, dtype=torch.int32, device="cuda")
        self.positions = torch.arange(c, c + t, device="cuda").expand(b, t).contiguous()
        self.cache_pos = torch.arange(c, dtype=torch.int32, device="cuda").expand(b, hkv, c).contiguous()
        self.scale = d**-0.5

    @property
    def shape(self) -> str:
        return f"B={self.b} T={self.t} C={self.c} H={self.h}/{self.hkv} D={self.d}/{self.dv}"

    @property
    def flops(self) -> float:
        return 2 * self.b * self.h * (self.d + self.dv) * (self.t * self.c + self.t * (self.t + 1) / 2)

    def arguments(self, **options: Any) -> dict[str, Any]:
        given = {"sinks": None, "alibi": None, "hidden": None, "softcap": 0.0, "window": 0, "chunk": 0}
        names = ("q", "k", "v", "k_cache", "v_cache", "lens", "cache_pos", "positions", "valid", "scale")
        return {n: getattr(self, n) for n in names} | given | options

    def error(self, out: Tensor) -> float:
        """Relative error of 64 rows of a plain call, every head."""
        at = torch.linspace(0, self.t - 1, min(64, self.t), device="cuda").long()
        keys = torch.cat([self.k_cache, self.k], 2).double()
        values = torch.cat([self.v_cache, self.v], 2).double()
        wrong, size = 0.0, 0.0
        for h in range(self.h):
            hk = h // (self.h // self.hkv)
            logits = self.q[:, h, at].double() @ keys[:, hk].transpose(1, 2) * self.scale
            unseen = torch.arange(self.c + self.t, device="cuda") > (self.c + at)[:, None]
            want = logits.masked_fill(unseen, float("-inf")).softmax(-1) @ values[:, hk]
            wrong += float((out[:, h, at].double() - want).square().sum())
            size += float(want.square().sum())
        return (wrong / size) ** 0.5


def measured(
    kernel: str, case: Case, config: Any, run: Callable[[], Any], plain: bool = True, flops: float | None = None
) -> dict[str, Any]:
    """One row; a run that fails gives a row with the reason."""
    row: dict[str, Any] = {
        "kernel": kernel,
        "shape": case.shape,
        "config": str(config),
        "us": None,
        "rate": None,
        "error": None,
    }
    try:
        got = run()
        out = got[0] if isinstance(got, tuple) else got
        if plain:
            row["error"] = case.error(out)
        del got, out
        ms = triton.testing.do_bench(run, warmup=20, rep=120, return_mode="median")
        row["us"] = ms * 1e3
        row["rate"] = (case.flops if flops is None else flops) / ms / 1e9
    except Exception as problem:
        row["error"] = f"{type(problem).__name__}: {problem}"[:300]
    return row


def hopper_run(case: Case, config: tuple[int, int, int | None], heads: int | None = None) -> Callable[[], Any]:
    from kvrewrite.kernels.attention import chunk_hopper as hopper

    new, slots = Tokens(case.q, case.k, case.v), Slots(case.k_cache, case.v_cache, case.lens)
    settings = hopper.HopperConfig(*config)
    return lambda: hopper.launch(new, slots, case.valid, None, case.scale, settings, heads)


def portable_run(case: Case, config: Config | None, heads: int | None = None, **options: Any) -> Callable[[], Any]:
    return lambda: flat(portable.portable)(**case.arguments(**options), config=config, heads_at_once=heads)


def flash_run(case: Case) -> Callable[[], Any]:
    """FlashAttention 2; causal is lower-right there. The concatenation of cache and chunk is not timed."""
    keys = torch.cat([case.k_cache, case.k], 2)
    values = torch.cat([case.v_cache, case.v], 2)
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    return lambda: attention(case.q, keys, values, 0.0, True, False, scale=case.scale)[0]


def flex_run(case: Case) -> Callable[[], Any]:
    """FlexAttention, compiled; the concatenation and the block mask are not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    c = case.c
    keys = torch.cat([case.k_cache, case.k], 2)
    values = torch.cat([case.v_cache, case.v], 2)
    mask = create_block_mask(lambda b, h, q, kv: kv <= q + c, None, None, case.t, c + case.t, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(case.q, keys, values, block_mask=mask, scale=case.scale, enable_gqa=True)


def ragged() -> Iterator[dict[str, Any]]:
    """Heads and rows of different lengths, dead slots and padding NaN, sinks: errors only."""
    for d in (64, 128, 256, 96):
        case = Case(391, 1024, d, h=8, hkv=2, b=3)
        case.lens.copy_(torch.tensor([[1024, 0], [1, 577], [640, 127]]))
        case.valid.copy_(torch.tensor([391, 130, 0]))
        dead = torch.arange(case.c, device="cuda") >= case.lens[..., None]
        case.k_cache[dead], case.v_cache[dead] = float("nan"), float("nan")
        padding = (torch.arange(case.t, device="cuda") >= case.valid[:, None])[:, None]
        for x in (case.q, case.k, case.v):
            x.masked_fill_(padding[..., None], float("nan"))
        sinks = torch.randn(case.h, device="cuda")
        keys = torch.cat([case.k_cache, case.k], 2).double()
        values = torch.cat([case.v_cache, case.v], 2).double()
        places = torch.cat([case.cache_pos.long(), case.positions[:, None].expand(3, 2, -1)], 2)
        placed = Placed(case.positions, places, torch.cat([~dead, ~padding.expand(3, 2, -1)], 2))
        logits = Logits(sinks, scale=case.scale)
        want, want_lse = attend(Tokens(case.q.double(), keys, values), placed, logits, own=True)
        real = ~padding.expand(3, case.h, -1)
        for route in ("hopper", "triton") if d != 96 else ("triton",):
            row: dict[str, Any] = {
                "kernel": f"ragged {route}",
                "shape": case.shape,
                "config": "",
                "us": None,
                "rate": None,
            }
            try:
                out, lse = chunk_attention(**case.arguments(sinks=sinks), route=route)
                off = (out[real].double() - want[real]).norm() / want[real].norm()
                row["error"] = float(off)
                row["config"] = f"lse off by {float((lse[real] - want_lse[real]).abs().max()):.2e}"
                if out[~real].any() or not torch.isneginf(lse[~real]).all():
                    row["error"] = "padding is not 0 and -inf"
            except Exception as problem:
                row["error"] = f"{type(problem).__name__}: {problem}"[:300]
            yield row


def routes() -> Iterator[dict[str, Any]]:
    """The three routes as they are, and FlashAttention 2, at every shape."""
    for t, c in MAIN + MORE:
        case = Case(t, c)
        for route in ("hopper", "triton", "cudnn"):
            arguments = case.arguments(route=route, full=True)
            yield measured(route, case, "default", lambda arguments=arguments: chunk_attention(**arguments))  # type: ignore[misc]
        yield measured("flash 2", case, "", flash_run(case))


def orders() -> Iterator[dict[str, Any]]:
    """How many heads go together through L2; all: heaviest blocks of all heads first."""
    for t, c in [*MAIN, (3072, 6016), (3072, 0)]:
        case = Case(t, c)
        chosen = heads_together(case.h, 4, c + t, 512)
        for heads in sorted({1, 4, 8, 16, 32, chosen}):
            name = f"heads_at_once={heads}" + (" (default)" if heads == chosen else "")
            yield measured("hopper", case, name, hopper_run(case, HOPPER[0], heads))
    case = Case(*MAIN[0])
    for heads in (1, 4, 32):
        yield measured("triton", case, f"heads_at_once={heads}", portable_run(case, None, heads))


def hopper_tiles() -> Iterator[dict[str, Any]]:
    for t, c in MAIN:
        case = Case(t, c)
        for config in HOPPER:
            yield measured("hopper", case, config, hopper_run(case, config))


def portable_tiles() -> Iterator[dict[str, Any]]:
    """The portable kernel's tiles beside FlexAttention in the same run: config says the rate as a multiple of Flex's."""
    for t, c in MAIN:
        case = Case(t, c)
        yardstick = measured("flex", case, "", flex_run(case))
        yield yardstick
        runs = [(str(tuple(tile)), portable_run(case, tile)) for tile in TILES]
        runs += [(f"{tuple(TILES[0])}, all heads", portable_run(case, TILES[0], case.h))]
        for name, run in runs:
            row = measured("triton", case, name, run)
            if row["rate"] and yardstick["rate"]:
                row["config"] = f"{name}: {row['rate'] / yardstick['rate']:.3f} x Flex"
            yield row


def dims() -> Iterator[dict[str, Any]]:
    """Other head dimensions, T = 3072, C = 16384."""
    t, c = MAIN[0]
    case = Case(t, c, 64)
    for config in ((128, 3, None), (128, 2, None), (64, 4, None)):
        yield measured("hopper", case, config, hopper_run(case, config))
    for tile in (Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(64, 64, 4, 3)):
        yield measured("triton", case, tuple(tile), portable_run(case, tile))
    yield measured("cudnn", case, "", lambda: chunk_attention(**case.arguments(route="cudnn", full=True)))
    yield measured("flash 2", case, "", flash_run(case))
    half = Case(t, c, 96, h=32, hkv=32)
    for tile in (Config(128, 64, 8, 3), Config(128, 64, 8, 2)):
        yield measured("triton", half, tuple(tile), portable_run(half, tile))
    yield measured("flash 2", half, "", flash_run(half))
    wide = Case(t, c, 256, h=16, hkv=8)
    yield measured("hopper", wide, (64, 2, None), hopper_run(wide, (64, 2, None)))
    for tile in (Config(128, 64, 8, 2), Config(128, 32, 8, 2)):
        yield measured("triton", wide, tuple(tile), portable_run(wide, tile))
    yield measured("flash 2", wide, "", flash_run(wide))
    latent = Case(t, c, 192, 128, h=16, hkv=16)
    for tile in (Config(128, 64, 8, 2), Config(128, 64, 8, 3)):
        yield measured("triton", latent, tuple(tile), portable_run(latent, tile))


def small() -> Iterator[dict[str, Any]]:
    """Few new tokens (a last chunk, a question): which route takes them."""
    for t in (16, 64, 128, 512):
        case = Case(t, 16384)
        for route in ("hopper", "triton"):
            arguments = case.arguments(route=route)
            yield measured(route, case, "default", lambda arguments=arguments: chunk_attention(**arguments))  # type: ignore[misc]


def features() -> Iterator[dict[str, Any]]:
    """What the options cost the portable kernel."""
    case = Case(3072, 4096)
    chosen: list[dict[str, Any]] = [
        {}, {"window": 4096}, {"softcap": 50.0}, {"chunk": 8192}, {"alibi": torch.rand(32, device="cuda")},
        {"hidden": torch.rand(1, 8, 3072, device="cuda") < 0.3},
    ]  # fmt: skip
    for options in chosen:
        yield measured(
            "triton", case, ",".join(options) or "plain", portable_run(case, None, **options), plain=not options
        )


def rows(parts: tuple[str, ...] = PARTS) -> list[dict[str, Any]]:
    """All measurements of the named parts; each compiles what it needs, "hopper" and "portable" the most."""
    run = {
        "ragged": ragged, "routes": routes, "orders": orders, "hopper": hopper_tiles, "portable": portable_tiles,
        "dims": dims, "small": small, "features": features,
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    for part in parts:
        try:
            for row in run[part]():
                found.append(row)
                if __name__ == "__main__":
                    print(json.dumps(row), flush=True)
        except Exception as problem:
            found.append(
                {"kernel": part, "shape": "", "config": "", "us": None, "rate": None, "error": repr(problem)[:300]}
            )
        torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    rows(tuple(sys.argv[1:]) or PARTS)
