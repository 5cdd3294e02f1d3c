"""Computes lower bounds of a request's time: a model's and policy's bytes and FLOPs over rates measured in the same
run.

    floor of a prefill = FLOPs of linear layers / GEMM rate + FLOPs of attention / rate of the attention kernel
    limit of a decode step = max(weight bytes / copy bandwidth, FLOPs of linear layers / GEMM rate)
                             + bytes of cached keys and values / copy bandwidth

The scores of a policy, its own weights and evictions are not in them: what they cost is above the floor.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvrewrite.analysis.flops import Work, attention_of, decode_slots, kv_bytes, linears, visible_pairs, work_of
from kvrewrite.ir.layout import PAGE
from kvrewrite.ir.site import AttentionSite
from kvrewrite.policies import Policy

COPY_BYTES = 1 << 30  # of the copy that measures the bandwidth
GEMM_TOKENS = 8192  # more rows do not increase a GEMM's rate
SECONDS = 0.3  # at least so long per rate
SHAPES_AT_MOST = 12  # different linear layers that are timed


# ---------------------------------------------------------------------------------------------------------------- times
def prefill_floor(
    work: Work, context: int, batch: int, gemm: float, attention: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Returns seconds. gemm: FLOP/s; attention: (FLOPs of one row, FLOP/s) per kind of site."""
    linear = batch * (context * work.linear_flops + work.head_flops) / gemm
    attended = sum(batch * flops / rate for flops, rate in attention)
    return {"linear": linear, "attention": attended, "floor": linear + attended}


def decode_limit(work: Work, kv: float, batch: int, bandwidth: float, peak: float) -> dict[str, float]:
    """Returns seconds. kv: bytes that one row reads; bandwidth: bytes/s; peak: FLOP/s."""
    weights = work.weight_bytes / bandwidth
    compute = batch * (work.linear_flops + work.head_flops) / peak
    cache = batch * kv / bandwidth
    return {"weights": weights, "compute": compute, "cache": cache, "limit": max(weights, compute) + cache}


# -----------------------------------------------------------------------------------------------------------------
# rates
def timed(call: Callable[[], Any], device: torch.device, *, least: int = 3) -> float:
    """Returns the median seconds of a call; on a GPU without the time to start it."""
    call()
    if device.type != "cuda":
        times: list[float] = []
        while len(times) < least or (sum(times) < SECONDS and len(times) < 200):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return float(np.median(times))
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    once = max(time.perf_counter() - started, 1e-6)
    inner = max(1, min(100, math.ceil(0.01 / once)))
    times = []
    for _ in range(max(least, min(30, math.ceil(SECONDS / (once * inner))))):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / inner)
    return float(np.median(times))


class Rates:
    """Rates of this machine, each measured once when first needed. None: it could not be measured (`problems`)."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.known: dict[str, float | None] = {}
        self.problems: dict[str, str] = {}

    def _once(self, key: str, measure: Callable[[], float]) -> float | None:
        if key not in self.known:
            try:
                with torch.no_grad():
                    self.known[key] = measure()
            except Exception as error:
                if is_fatal(error):
                    raise
                self.known[key] = None
                self.problems[key] = "out of memory" if is_out_of_memory(error) else first_line(error)
            release(self.device)
        return self.known[key]

    def bandwidth(self) -> float | None:
        """Measures the bytes/s read and written by a large copy."""

        def measure() -> float:
            size = COPY_BYTES
            if self.device.type == "cuda":
                size = min(size, torch.cuda.mem_get_info(self.device)[0] // 8)
            else:
                size = 1 << 26
            source = torch.zeros(size, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            return 2 * size / timed(lambda: target.copy_(source), self.device)

        return self._once("copy", measure)

    def gemm(self, model: nn.Module, rows: int) -> float | None:
        """Measures the FLOP/s of the model's own linear layers on `rows` tokens."""
        rows = max(1, min(rows, GEMM_TOKENS))

        def measure() -> float:
            counts: dict[tuple[int, ...], int] = {}
            weights: dict[tuple[int, ...], Tensor] = {}
            for weight in linears(model):
                counts[tuple(weight.shape)] = counts.get(tuple(weight.shape), 0) + 1
                weights.setdefault(tuple(weight.shape), weight)
            seconds = flops = 0.0
            for shape in sorted(counts, key=lambda s: -counts[s] * math.prod(s))[:SHAPES_AT_MOST]:
                x = torch.randn(rows, shape[1], device=self.device, dtype=self.dtype)
                once = timed(lambda w=weights[shape], x=x: nn.functional.linear(x, w), self.device)  # type: ignore[misc]
                seconds += counts[shape] * once
                flops += counts[shape] * 2.0 * rows * math.prod(shape)
            return flops / seconds

        return self._once(f"gemm, {rows} tokens", measure)

    @property
    def peak(self) -> float | None:
        """Returns the best GEMM rate so far."""
        return max((v for k, v in self.known.items() if k.startswith("gemm") and v), default=None)

    def chunk_attention(self, site: AttentionSite, tokens: int, cached: int, batch: int) -> float | None:
        """Measures the FLOP/s of kvrewrite's attention of `tokens` on `cached` slots and themselves."""
        key = f"chunk attention, {_site_text(site)}, {tokens} on {cached}, batch {batch}"
        return self._once(key, lambda: self._chunk_attention(site, tokens, cached, batch))

    def _chunk_attention(self, site: AttentionSite, tokens: int, cached: int, batch: int) -> float:
        import kvrewrite.ops  # noqa: F401

        on: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        q = torch.randn(batch, site.heads, tokens, site.head_dim, **on)
        k = torch.randn(batch, site.kv_heads, tokens, site.head_dim, **on)
        v = torch.randn(batch, site.kv_heads, tokens, site.v_head_dim, **on)
        width = max(1, -(-cached // PAGE))
        pages = batch * site.kv_heads * width
        table = torch.arange(1, pages + 1, dtype=torch.int32, device=self.device).view(batch, site.kv_heads, width)
        k_pages = torch.randn(pages + 1, PAGE, site.head_dim, **on)
        v_pages = torch.randn(pages + 1, PAGE, site.v_head_dim, **on)
        places = torch.zeros(pages + 1, PAGE, 2, dtype=torch.int32, device=self.device)
        slots = torch.arange(width * PAGE, dtype=torch.int32, device=self.device).view(width, PAGE, 1)
        places[1:] = slots.repeat(batch * site.kv_heads, 1, 1)
        lens = torch.full((batch, site.kv_heads), cached, dtype=torch.int32, device=self.device)
        positions = (cached + torch.arange(tokens, device=self.device)).repeat(batch, 1)
        valid = torch.full((batch,), tokens, dtype=torch.int32, device=self.device)

        def call() -> Any:
            return torch.ops.kvrewrite.cached_attention(
                q,
                k,
                v,
                None,
                k_pages,
                v_pages,
                places,
                table,
                lens,
                positions,
                valid,
                None,
                None,
                None,
                site.scale,
                site.softcap,
                site.window,
                site.chunk,
            )

        pairs = visible_pairs(tokens, cached, cached, site.window, site.chunk)
        flops = 2.0 * (site.head_dim + site.v_head_dim) * site.heads * pairs * batch
        return flops / timed(call, self.device)

    def sdpa(self, site: AttentionSite, tokens: int, batch: int) -> float | None:
        """Measures the FLOP/s of torch's causal attention of a whole prompt, as transformers calls it."""

        def measure() -> float:
            on: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
            q = torch.randn(batch, site.heads, tokens, site.head_dim, **on)
            k = torch.randn(batch, site.kv_heads, tokens, site.head_dim, **on)
            v = torch.randn(batch, site.kv_heads, tokens, site.v_head_dim, **on)

            def call() -> Any:
                return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            # is_causal has no window, so this is the rate without one.
            pairs = visible_pairs(tokens, 0)
            return 2.0 * (site.head_dim + site.v_head_dim) * site.heads * pairs * batch / timed(call, self.device)

        return self._once(f"sdpa, {_site_text(site)}, {tokens} tokens, batch {batch}", measure)


def _site_text(site: AttentionSite) -> str:
    span = f" window {site.window}" if site.window else f" chunks {site.chunk}" if site.chunk else ""
    return f"{site.heads}/{site.kv_heads} heads of {site.head_dim}/{site.v_head_dim}{span}"


def limits(
    rates: Rates,
    model: Any,
    sites: Sequence[AttentionSite],
    policy: Policy | None,
    context: int,
    batch: int,
    steps: int,
) -> dict[str, Any]:
    """Returns floor and limit of a cell, with the rates that they use; parts are None if a rate is missing."""
    work, attention = work_of(model), attention_of(sites, context, policy)
    longest = max((tokens for tokens, _ in attention.call), default=context)
    gemm = rates.gemm(model, batch * longest)
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, s in enumerate(sites):
        kinds.setdefault((s.heads, s.kv_heads, s.head_dim, s.v_head_dim, s.window, s.chunk), []).append(i)
    parts: list[tuple[float, float | None]] = []
    attended = []
    for members in kinds.values():
        dearest = max(members, key=lambda i: attention.flops[i])
        tokens, cached = attention.call[dearest]
        if policy is None:
            rate = rates.sdpa(sites[dearest], tokens, batch)
        else:
            rate = rates.chunk_attention(sites[dearest], tokens, cached, batch)
        parts.append((sum(attention.flops[i] for i in members), rate))
        attended.append(
            {
                "layers": len(members),
                "kernel": "torch sdpa" if policy is None else "kvrewrite chunk",
                "tokens": tokens,
                "cached": cached,
                "flops": batch * parts[-1][0],
                "flops_per_second": rate,
            }
        )
    missing = [p for k, p in rates.problems.items() if "attention" in k or "sdpa" in k]
    known = [(f, r) for f, r in parts if r is not None]
    itemsize = next(model.parameters()).element_size()
    slots = decode_slots(attention, sites, steps // 2, context, policy)
    kv = kv_bytes(sites, slots, itemsize, policy)
    bandwidth, peak = rates.bandwidth(), rates.peak
    complete = gemm is not None and len(known) == len(parts)
    return {
        "prefill": prefill_floor(work, context, batch, gemm, known) if complete and gemm is not None else None,
        "decode": decode_limit(work, kv, batch, bandwidth, peak) if bandwidth and peak else None,
        "linear_flops": batch * (context * work.linear_flops + work.head_flops),
        "gemm_flops_per_second": gemm,
        "attention": attended,
        "weight_bytes": work.weight_bytes,
        "kv_bytes": batch * kv,
        "copy_bytes_per_second": bandwidth,
        "why_not": None if complete else "; ".join(dict.fromkeys(missing)) or "a rate could not be measured",
    }


# ----------------------------------------------------------------------------------------------------------------
# errors
def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host ran out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower()


def is_fatal(error: BaseException) -> bool:
    """Whether nothing more can be measured: every later call on the GPU fails."""
    text = str(error).lower()
    return not is_out_of_memory(error) and ("cuda error" in text or "device-side assert" in text)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def release(device: torch.device) -> None:
    """Frees a GPU's memory that nothing holds any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
