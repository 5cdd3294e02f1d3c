"""Times column mass and gated attention at Llama-3.1-8B shapes (32 query heads, 8 kv heads, head dim 128, bf16)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.testing
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvrewrite.kernels.attention import reference
from kvrewrite.kernels.attention.column_mass import column_mass
from kvrewrite.kernels.attention.gated import compact, gated_attention
from kvrewrite.kernels.groups import At, KeySlots, Logits, Placed, Slots, Tokens, Watch

H, HKV, D = 32, 8, 128
PLAIN: dict[str, Any] = {"scale": D**-0.5, "softcap": 0.0, "window": 0, "chunk": 0}


def tokens(t: int, heads: int) -> Tensor:
    """(1, heads, T, D), a view of a projection."""
    return torch.randn(1, t, heads, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)


def error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.double() - want.double()).norm() / want.double().norm())


class Observed:
    """New tokens, a full cache and the log-sum-exp of the last `rows` query rows (NaN elsewhere)."""

    def __init__(self, t: int, c: int, rows: int):
        self.t, self.c, self.rows = t, c, rows
        self.q, self.k, self.cache = tokens(t, H), tokens(t, HKV), tokens(c, HKV).contiguous()
        self.positions = c + torch.arange(t, device="cuda")[None]
        self.valid = torch.tensor([t], device="cuda", dtype=torch.int32)
        self.lens = torch.full((1, HKV), c, device="cuda", dtype=torch.int32)
        self.lse = torch.full((1, H, t), float("nan"), device="cuda")
        values = torch.zeros(1, HKV, c + t, 1, device="cuda", dtype=torch.bfloat16)
        keys, placed = self.shared()
        newest = Tokens(self.q[:, :, t - rows :], keys, values)
        _, self.lse[:, :, t - rows :] = reference.attend(newest, placed, Logits(**PLAIN), own=rows == t)
        self.weights = (torch.arange(t, device="cuda") >= t - rows).float()[None]

    def shared(self) -> tuple[Tensor, Placed]:
        """What both reference functions take: all keys, and where they and the rows stand."""
        places = torch.arange(self.c + self.t, device="cuda").expand(1, HKV, -1)
        live = torch.ones_like(places, dtype=torch.bool)
        k = torch.cat([self.cache, self.k], dim=2)
        return k, Placed(self.positions[:, self.t - self.rows :], places, live)

    def reference(self, above: Tensor | None = None) -> Tensor:
        """In torch."""
        start = self.t - self.rows
        keys, placed = self.shared()
        above = None if above is None else above[:, start:]
        watch = Watch(self.q[:, :, start:], keys, self.lse[:, :, start:], self.weights[:, start:], above)
        return reference.column_mass(watch, placed, Logits(**PLAIN))

    def kernel(self, above: Tensor | None = None, tiles: dict[str, int] | None = None) -> Tensor:
        """Ours."""
        newest = 0 if self.rows == self.t else self.rows
        watch = Watch(self.q, self.k, self.lse, self.weights, above, newest)
        at = At(self.positions, self.valid)
        return column_mass(watch, KeySlots(self.cache, self.lens), at, Logits(**PLAIN), tiles)

    def rate(self, us: float) -> str:
        """Arithmetic and key bytes by time."""
        pairs = self.rows * (self.c + self.t) - (self.rows * (self.rows - 1)) // 2
        return f"{2 * H * D * pairs / us / 1e6:.0f} TFLOP/s, {(self.c + self.t) * HKV * D * 2 / us / 1e3:.0f} GB/s of K"


def _row(
    kernel: str, shape: str, config: Any, run: Callable[[], Any], rate: Callable[[float], str], wrong: Any
) -> dict:
    """One measurement; a candidate that fails is a row, too."""
    try:
        mistake = wrong() if callable(wrong) else wrong
        us = triton.testing.do_bench(run, warmup=15, rep=60, return_mode="median") * 1e3
        return {"kernel": kernel, "shape": shape, "config": config, "us": us, "rate": rate(us), "error": mistake}
    except Exception as failure:
        return {
            "kernel": kernel, "shape": shape, "config": config, "us": None, "rate": None, "error": repr(failure)[:300]
        }  # fmt: skip


def _graph_us(runs: list[Callable[[], Any]]) -> float:
    """Microseconds a run in a CUDA graph of all of them: no launch overhead, and more memory than the L2 cache has."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return triton.testing.do_bench(graph.replay, warmup=15, rep=60, return_mode="median") * 1e3 / len(runs)


def _tiles(n: int, r: int, warps: int, stages: int, registers: int = 0) -> dict[str, int]:
    chosen = {"BLOCK_N": n, "BLOCK_R": r, "num_warps": warps, "STAGES": stages}
    return {**chosen, "maxnreg": registers} if registers else chosen


def column_mass_rows() -> list[dict]:
    """H2O, SnapKV, TOVA, NACL, Scissorhands."""
    found = []
    many = [
        None, _tiles(128, 64, 8, 3), _tiles(128, 64, 8, 2, 128), _tiles(256, 64, 8, 3), _tiles(64, 64, 4, 3),
        _tiles(64, 64, 4, 2),  _tiles(128, 64, 4, 2),
    ]  # fmt: skip
    few = [None, _tiles(128, 32, 4, 1), _tiles(128, 64, 4, 1), _tiles(64, 64, 4, 1)]
    cases: list[tuple[str, int, int, int, list[Any]]] = [
        ("H2O", 3072, 16384, 3072, many),
        ("SnapKV", 131072, 0, 32, few),
        ("SnapKV", 131072, 64, 64, [None]),
        ("TOVA", 3072, 16384, 1, [None, _tiles(64, 16, 4, 1), _tiles(128, 16, 8, 1), _tiles(256, 16, 8, 1)]),
        ("H2O decode", 1, 16384, 1, [None, _tiles(64, 16, 4, 1), _tiles(32, 16, 2, 1)]),
        ("NACL 1%", 32768, 0, 328, [None, _tiles(128, 64, 8, 2, 128)]),
    ]
    for name, t, c, rows, candidates in cases:
        x = Observed(t, c, rows)
        copies = [x, *(Observed(t, c, rows) for _ in range(3 if rows == 1 else 0))]
        shape = f"{name}: T={t} C={c} rows={rows}"
        want = x.reference()
        found.append(_row("column_mass in torch", shape, "", x.reference, x.rate, 0.0))
        for tiles in candidates:
            found.append(
                _row(
                    "column_mass",
                    shape,
                    tiles or "default",
                    [lambda y=y, tiles=tiles: y.kernel(tiles=tiles) for y in copies],
                    x.rate,
                    lambda x=x, tiles=tiles, want=want: error(x.kernel(tiles=tiles), want),
                )
            )
        if name == "NACL 1%":
            share = 1.0 / (x.positions + 1).float()
            counts = x.reference(share)
            found.append(
                _row(
                    "column_mass above",
                    shape,
                    "default",
                    lambda x=x, share=share: x.kernel(share),
                    x.rate,
                    lambda x=x, share=share, counts=counts: error(x.kernel(share), counts),
                )
            )
        del x, copies, want
        torch.cuda.empty_cache()
    return found


def gated_rows() -> list[dict]:
    """Time by evicted share, beside dense causal attention."""
    found = []
    candidates: list[Any] = [
        None,
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    ]
    last = 64  # rows compared: they see most keys
    for t, c in ((32768, 0), (1024, 16384)):
        q, k, v = tokens(t, H), tokens(t, HKV), tokens(t, HKV)
        k_cache, v_cache = tokens(c, HKV).contiguous(), tokens(c, HKV).contiguous()
        lens = torch.full((1, HKV), c, device="cuda", dtype=torch.int32)
        positions, valid = c + torch.arange(t, device="cuda")[None], torch.tensor([t], device="cuda", dtype=torch.int32)
        pairs = t * c + t * (t + 1) // 2

        def rate(us: float, pairs: int = pairs) -> str:
            return f"{4 * H * D * pairs / us / 1e6:.0f} TFLOP/s of the dense work"

        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if not c else ():

            def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v, backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            found.append(_row("dense causal attention", f"T={t}", backend.name, dense, rate, 0.0))
        for share in (0.0, 0.5, 0.6, 0.9):
            hidden = (torch.rand(1, t, HKV, device="cuda") < share).transpose(1, 2)

            def run(
                tiles: Any = None, q: Tensor = q, k: Tensor = k, v: Tensor = v, k_cache: Tensor = k_cache,
                v_cache: Tensor = v_cache, lens: Tensor = lens, positions: Tensor = positions, valid: Tensor = valid,
                hidden: Tensor = hidden,
            ) -> tuple[Tensor, Tensor]:  # fmt: skip
                slots, logits = Slots(k_cache, v_cache, lens), Logits(hidden=hidden, **PLAIN)
                return gated_attention(Tokens(q, k, v), slots, At(positions, valid), logits, tiles)

            places = torch.arange(c + t, device="cuda").expand(1, HKV, -1)
            everything = Tokens(q[:, :, -last:], torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2))
            placed = Placed(positions[:, -last:], places, torch.ones_like(places, dtype=torch.bool))
            logits = Logits(hidden=torch.nn.functional.pad(hidden, (c, 0)), **PLAIN)
            want, _ = reference.attend(everything, placed, logits)
            for tiles in candidates if share in (0.0, 0.5) and not c else [None]:
                found.append(
                    _row(
                        "gated_attention",
                        f"T={t} C={c} evicted={share}",
                        tiles or "default",
                        lambda run=run, tiles=tiles: run(tiles),
                        rate,
                        lambda run=run, tiles=tiles, want=want: error(run(tiles)[0][:, :, -last:], want),
                    )
                )
            found.append(
                _row(
                    "gated_attention: gathering alone",
                    f"T={t} C={c} evicted={share}",
                    "",
                    lambda k=k, v=v, hidden=hidden, positions=positions, valid=valid: compact(
                        k, v, hidden, positions, valid
                    ),
                    lambda us, share=share, t=t: f"{4 * (1 - share) * t * HKV * D * 2 / us / 1e3:.0f} GB/s",
                    0.0,
                )
            )
    return found


def rows() -> list[dict]:
    """All measurements: kernel, shape, config, us, rate, error against the reference."""
    torch.manual_seed(0)
    return column_mass_rows() + gated_rows()
