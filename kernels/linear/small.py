"""Linear layers of a few tokens, as in a decode step: bound by reading the weights once.

    small_linear        y_i = x W_i^T (+ b_i) (+ residual) for up to MAX_WEIGHTS weights that share x, in one launch
    small_gated_linear  act(x Wg^T) * (x Wu^T) in one launch, with nothing in memory between

Both take x as it is, or its RMS norm times a gain: x g / sqrt(mean(x^2) + eps). Up to FMA_ROWS tokens that costs no
launch and no pass of its own: programs multiply W by x g, sum up x^2 on the way, and scale what comes out.

Up to FMA_ROWS tokens a program multiplies whole rows of W by x with ordinary FMAs: 16-byte loads, several in flight in
each thread, one reduction over threads at the end. More tokens (to MAX_ROWS) go through `tl.dot` with W as the left
operand, so that the tensor cores' long side lies along the weights' rows and only the tokens are padded, to 16, 32 or
64. There each program reads all of x again, from L2, which is why the blocks of rows grow with the tokens; where too
few blocks remain to occupy the GPU the sum over K is split, and a second small launch adds the parts in a fixed order.

Sums are fp32 and every result is rounded where the unfused graph rounds it, except that a norm before FMAs is not
rounded at all. Same inputs give the same bits. Kernels overlap (launch.py): the first weights come in before the
previous kernel ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrewrite.kernels.launch import begin, fetch, options

MAX_WEIGHTS = 4
MAX_ROWS = 64
FMA_ROWS = 2
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REDUCE_BLOCK = 256
AHEAD = 0  # measured on an H200: a step of the 8B shape takes 4.88 ms with 0, 5.14 with 2048 and 5.28 with 4096
FILL = 112  # programs that occupy the 132 SMs of an H200 well enough


class Norm(NamedTuple):
    """An RMS norm of rows of K numbers: x gain / sqrt(mean(x^2) + eps), gain (K,), contiguous, of x's dtype."""

    gain: Tensor
    eps: float


class Config(NamedTuple):
    """How one launch is cut. stages 1 loads into registers; more go through shared memory. split: parts of K (dot
    only). ahead: bytes of each row of W that are on their way into L2 while the previous kernel ends; None: AHEAD."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    unroll: int = 1
    split: int = 1
    ahead: int | None = None


def fma_config(k: int, dtype: torch.dtype, gated: bool, single: bool = False) -> Config:
    """For up to FMA_ROWS tokens; single: one token and one weight. Each thread holds 16 bytes of block_n rows (of both
    weights, gated) at each step.

    All warps lie along K, so block_k is 512 bytes a warp; then a thread's piece of x serves all of its rows. Small
    programs (64 threads, 14 on an SM) let 4096 to 7168 rows run in one wave. Measured on an H200, Llama-3.1-8B's
    shapes, one token: 3.2 (o) to 4.6 TB/s (lm_head), 5 to 10% more than the other candidates of
    benchmarks/small_linear.py.
    """
    warps = 4 if gated or single else 2
    block_k = min(warps * 512 // dtype.itemsize, max(16, triton.next_power_of_2(k)))
    if gated:
        return Config(2, block_k, warps, stages=3)
    if single:
        return Config(2, block_k, warps, stages=1, unroll=4)
    return Config(4, block_k, warps, stages=1)


def dot_config(rows: int, columns: int, dtype: torch.dtype, gated: bool) -> Config:
    """For FMA_ROWS < rows <= MAX_ROWS tokens; columns: of all weights together."""
    block_m = _block_m(rows)
    if dtype == torch.float32:
        return Config(16, 64, warps=4, stages=2)
    if gated:
        return {16: Config(64, 128, 4, 3), 32: Config(64, 128, 4, 3), 64: Config(64, 64, 4, 4)}[block_m]
    config = {16: Config(64, 128, 4, 4), 32: Config(64, 128, 4, 4), 64: Config(128, 64, 8, 4)}[block_m]
    split = 1
    while split < 8 and triton.cdiv(columns, config.block_n) * split < FILL:
        split *= 2
    return config._replace(split=split)


def _block_m(rows: int) -> int:
    return max(16, triton.next_power_of_2(rows))


def _lines(config: Config, k: int, x: Tensor) -> int:
    """How many cache lines of each row are fetched ahead: a power of two, or 0."""
    lines = min(AHEAD if config.ahead is None else config.ahead, k * x.element_size()) // 128
    return 1 << (lines.bit_length() - 1) if lines else 0


# ------------------------------------------------------------------------------------------------ kernels
@triton.jit
def _fetch_rows(w_rows, LINES: tl.constexpr, PDL: tl.constexpr):
    """Begins to bring the first LINES cache lines of rows of W (pointers (N, 1)) into L2."""
    if PDL and LINES > 0:
        line: tl.constexpr = 1024 // w_rows.dtype.element_ty.primitive_bitwidth
        fetch(w_rows + (tl.arange(0, LINES) * line)[None, :])


@triton.jit
def _scale(squares, eps, K: tl.constexpr):
    """1 / sqrt(mean + eps) of squares that threads summed up."""
    return tl.rsqrt(tl.sum(squares, axis=0) / K + eps)


@triton.jit
def _locate(block, ns, COUNT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weight this block of rows belongs to, its first block, and the columns of all weights before it."""
    which, first, before = 0, 0, 0
    end = tl.cdiv(ns[0], BLOCK_N)
    columns = ns[0]
    for i in tl.static_range(1, COUNT):
        if block >= end:
            which, first, before = i, end, columns
        end += tl.cdiv(ns[i], BLOCK_N)
        columns += ns[i]
    return which, block - first, before


@triton.jit
def _choose(which, values, COUNT: tl.constexpr):
    """values[which]."""
    chosen = values[0]
    for i in tl.static_range(1, COUNT):
        if which == i:
            chosen = values[i]
    return chosen


@triton.jit
def _bias(which, biases, rows, live, COUNT: tl.constexpr, BLOCK_N: tl.constexpr):
    """The bias of each row in fp32, 0 where there is none."""
    bias = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.static_range(COUNT):
        if biases[i] is not None:
            bias += tl.load(biases[i] + rows, mask=live & (which == i), other=0.0).to(tl.float32)
    return bias


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """An activation of fp32 numbers."""
    if ACTIVATION == "silu":
        return g / (1.0 + tl.exp(-g))
    elif ACTIVATION == "gelu":
        return 0.5 * g * (1.0 + tl.math.erf(g * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # 0.5 (1 + tanh z) = 1 / (1 + exp(-2 z))
        return g / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))


@triton.jit
def _load_k(at, ks, K: tl.constexpr, STEP: tl.constexpr, POLICY: tl.constexpr):
    """A tile whose last axis runs along K, of which STEP are read together; zeros after the end."""
    if K % STEP != 0:
        return tl.load(at, mask=ks < K, other=0.0, eviction_policy=POLICY)
    else:
        return tl.load(at, eviction_policy=POLICY)


@triton.jit
def _fma_kernel(
    x, stride_x, gain, eps, weights, biases, outs, ns, residual, stride_r,
    K: tl.constexpr, M: tl.constexpr, COUNT: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    which, block, _ = _locate(tl.program_id(0), ns, COUNT, BLOCK_N)
    n = _choose(which, ns, COUNT)
    w = _choose(which, weights, COUNT)
    y = _choose(which, outs, COUNT)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n
    w_rows = w + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * K  # the last row once more instead of a mask
    _fetch_rows(w_rows, LINES, PDL)
    begin(PDL)
    first = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares_0 = tl.zeros((BLOCK_K,), tl.float32)
    squares_1 = tl.zeros((BLOCK_K,), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES, loop_unroll_factor=UNROLL):
        ks = k + tl.arange(0, BLOCK_K)
        tile = _load_k(w_rows + ks[None, :], ks[None, :], K, BLOCK_K, "evict_first").to(tl.float32)
        x_0 = _load_k(x + ks, ks, K, BLOCK_K, "evict_last").to(tl.float32)
        if NORM:
            g = _load_k(gain + ks, ks, K, BLOCK_K, "evict_last").to(tl.float32)
            squares_0 += x_0 * x_0
            x_0 *= g
        first += tile * x_0[None, :]
        if M == 2:
            x_1 = _load_k(x + stride_x + ks, ks, K, BLOCK_K, "evict_last").to(tl.float32)
            if NORM:
                squares_1 += x_1 * x_1
                x_1 *= g
            second += tile * x_1[None, :]
    bias = _bias(which, biases, rows, live, COUNT, BLOCK_N)
    for m in tl.static_range(M):
        if m == 0:
            total, squares = tl.sum(first, axis=1), squares_0
        else:
            total, squares = tl.sum(second, axis=1), squares_1
        if NORM:
            total *= _scale(squares, eps, K)
        out = (total + bias).to(y.dtype.element_ty)
        if RESIDUAL:
            added = tl.load(residual + m * stride_r + rows, mask=live, other=0.0)
            out = (out.to(tl.float32) + added.to(tl.float32)).to(out.dtype)
        tl.store(y + m * n + rows, out, mask=live)


@triton.jit
def _gated_fma_kernel(
    x, stride_x, gain, eps, w_gate, w_up, y, n,
    K: tl.constexpr, M: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n
    offset = tl.minimum(rows, n - 1).to(tl.int64)[:, None] * K
    _fetch_rows(w_gate + offset, LINES, PDL)
    _fetch_rows(w_up + offset, LINES, PDL)
    begin(PDL)
    gate_0 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    gate_1 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_0 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_1 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares_0 = tl.zeros((BLOCK_K,), tl.float32)
    squares_1 = tl.zeros((BLOCK_K,), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES, loop_unroll_factor=UNROLL):
        ks = k + tl.arange(0, BLOCK_K)
        gate = _load_k(w_gate + offset + ks[None, :], ks[None, :], K, BLOCK_K, "evict_first").to(tl.float32)
        up = _load_k(w_up + offset + ks[None, :], ks[None, :], K, BLOCK_K, "evict_first").to(tl.float32)
        x_0 = _load_k(x + ks, ks, K, BLOCK_K, "evict_last").to(tl.float32)
        if NORM:
            g = _load_k(gain + ks, ks, K, BLOCK_K, "evict_last").to(tl.float32)
            squares_0 += x_0 * x_0
            x_0 *= g
        gate_0 += gate * x_0[None, :]
        up_0 += up * x_0[None, :]
        if M == 2:
            x_1 = _load_k(x + stride_x + ks, ks, K, BLOCK_K, "evict_last").to(tl.float32)
            if NORM:
                squares_1 += x_1 * x_1
                x_1 *= g
            gate_1 += gate * x_1[None, :]
            up_1 += up * x_1[None, :]
    for m in tl.static_range(M):
        if m == 0:
            gate, up, squares = tl.sum(gate_0, axis=1), tl.sum(up_0, axis=1), squares_0
        else:
            gate, up, squares = tl.sum(gate_1, axis=1), tl.sum(up_1, axis=1), squares_1
        if NORM:
            scale = _scale(squares, eps, K)
            gate, up = gate * scale, up * scale
        out = _gated(gate, up, y.dtype.element_ty, ACTIVATION)
        tl.store(y + m * n + rows, out, mask=live)


@triton.jit
def _gated(gate, up, DTYPE: tl.constexpr, ACTIVATION: tl.constexpr):
    """act(gate) * up, rounded after each linear, the activation and the product, as the unfused graph is."""
    active = activate(gate.to(DTYPE).to(tl.float32), ACTIVATION).to(DTYPE).to(tl.float32)
    return (active * up.to(DTYPE).to(tl.float32)).to(DTYPE)


@triton.jit
def _dot_kernel(
    x, stride_x, weights, biases, outs, ns, residual, stride_r, parts, M, columns,
    K: tl.constexpr, COUNT: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    which, block, before = _locate(tl.program_id(0), ns, COUNT, BLOCK_N)
    n = _choose(which, ns, COUNT)
    w = _choose(which, weights, COUNT)
    y = _choose(which, outs, COUNT)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n
    tokens = tl.arange(0, BLOCK_M)
    w_rows = w + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * K
    x_rows = x + tl.minimum(tokens, M - 1)[:, None] * stride_x
    SIZE: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K  # of a part of K
    start = tl.program_id(1) * SIZE
    if SPLIT == 1:
        _fetch_rows(w_rows, LINES, PDL)
    begin(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, SIZE, BLOCK_K, num_stages=STAGES):
        ks = (start + k + tl.arange(0, BLOCK_K))[None, :]
        tile = _load_k(w_rows + ks, ks, K, SPLIT * BLOCK_K, "evict_first")
        tile_x = _load_k(x_rows + ks, ks, K, SPLIT * BLOCK_K, "evict_last")
        acc = tl.dot(tile, tl.trans(tile_x), acc, input_precision="ieee")
    mask = live[:, None] & (tokens < M)[None, :]
    if SPLIT > 1:
        part = tl.program_id(1).to(tl.int64) * M
        tl.store(parts + (part + tokens)[None, :] * columns + (before + rows)[:, None], acc, mask=mask)
    else:
        out = (acc + _bias(which, biases, rows, live, COUNT, BLOCK_N)[:, None]).to(y.dtype.element_ty)
        if RESIDUAL:
            added = tl.load(residual + tokens[None, :] * stride_r + rows[:, None], mask=mask, other=0.0)
            out = (out.to(tl.float32) + added.to(tl.float32)).to(out.dtype)
        tl.store(y + tokens[None, :] * n + rows[:, None], out, mask=mask)


@triton.jit
def _sum_parts_kernel(
    parts, biases, outs, ns, residual, stride_r, M, columns,
    COUNT: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    which, block, before = _locate(tl.program_id(0), ns, COUNT, BLOCK)
    n = _choose(which, ns, COUNT)
    y = _choose(which, outs, COUNT)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    live = rows < n
    m = tl.program_id(1)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(SPLIT):
        acc += tl.load(parts + (m + i * M).to(tl.int64) * columns + before + rows, mask=live, other=0.0)
    out = (acc + _bias(which, biases, rows, live, COUNT, BLOCK)).to(y.dtype.element_ty)
    if RESIDUAL:
        added = tl.load(residual + m * stride_r + rows, mask=live, other=0.0)
        out = (out.to(tl.float32) + added.to(tl.float32)).to(out.dtype)
    tl.store(y + m * n + rows, out, mask=live)


@triton.jit
def _gated_dot_kernel(
    x, stride_x, w_gate, w_up, y, n, M,
    K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    offset = tl.minimum(rows, n - 1).to(tl.int64)[:, None] * K
    x_rows = x + tl.minimum(tokens, M - 1)[:, None] * stride_x
    _fetch_rows(w_gate + offset, LINES, PDL)
    _fetch_rows(w_up + offset, LINES, PDL)
    begin(PDL)
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        ks = (k + tl.arange(0, BLOCK_K))[None, :]
        tile_x = tl.trans(_load_k(x_rows + ks, ks, K, BLOCK_K, "evict_last"))
        tile_gate = _load_k(w_gate + offset + ks, ks, K, BLOCK_K, "evict_first")
        tile_up = _load_k(w_up + offset + ks, ks, K, BLOCK_K, "evict_first")
        gate = tl.dot(tile_gate, tile_x, gate, input_precision="ieee")
        up = tl.dot(tile_up, tile_x, up, input_precision="ieee")
    out = _gated(gate, up, y.dtype.element_ty, ACTIVATION)
    mask = (rows < n)[:, None] & (tokens < M)[None, :]
    tl.store(y + tokens[None, :] * n + rows[:, None], out, mask=mask)


@triton.jit
def _norm_kernel(x, stride_x, gain, eps, y, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The norm of one token, rounded before and after the gain, as the unfused graph is."""
    m = tl.program_id(0)
    ks = tl.arange(0, BLOCK)
    g = tl.load(gain + ks, mask=ks < K, other=0.0)
    begin(PDL)
    value = tl.load(x + m * stride_x + ks, mask=ks < K, other=0.0).to(tl.float32)
    normed = (value * _scale(value * value, eps, K)).to(g.dtype).to(tl.float32)
    tl.store(y + m * K + ks, (normed * g.to(tl.float32)).to(g.dtype), mask=ks < K)


# ------------------------------------------------------------------------------------------------ entry points
def small_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None] | None = None,
    residual: Tensor | None = None,
    config: Config | None = None,
    norm: Norm | None = None,
) -> list[Tensor]:
    """[x W^T + b for each weight], with fp32 sums rounded once; with a residual, that is then added and rounded again.
    With a norm, that of x stands for x.

    x: (..., K) with 1 to MAX_ROWS tokens; weights: 1 to MAX_WEIGHTS of (N_i, K), contiguous; biases: (N_i,) or None
    each; residual: (..., N) for a single weight. All of one dtype, bf16, fp16 or fp32. Returns new tensors (..., N_i).
    config: for timings; None takes the one for these shapes. Raises ValueError for what it does not do.
    """
    biases = [None] * len(weights) if biases is None else biases
    if not 1 <= len(weights) <= MAX_WEIGHTS or len(biases) != len(weights):
        raise ValueError(
            f"small_linear: {len(weights)} weights and {len(biases)} biases, expected 1 to {MAX_WEIGHTS} of each"
        )
    flat = _check("small_linear", x, weights, norm)
    m, k = flat.shape
    for weight, bias in zip(weights, biases, strict=True):
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype or not bias.is_contiguous()):
            raise ValueError(
                f"small_linear: bias {tuple(bias.shape)} {bias.dtype}, expected ({weight.shape[0]},) {x.dtype}, contiguous"
            )
    outs = [x.new_empty(*x.shape[:-1], w.shape[0]) for w in weights]
    rest = None
    if residual is not None:
        if len(weights) != 1 or residual.shape != outs[0].shape or residual.dtype != x.dtype:
            raise ValueError(
                f"small_linear: {len(weights)} weights and a residual {tuple(residual.shape)} {residual.dtype}, expected one "
                f"weight and {tuple(outs[0].shape)} {x.dtype}"
            )
        rest = _rows(residual)
    ns = tuple(w.shape[0] for w in weights)
    count, stride_r = len(weights), 0 if rest is None else rest.stride(0)
    common = (tuple(biases), tuple(outs), ns, rest, stride_r)
    launch = options(x.device)
    if m <= FMA_ROWS:
        c = config or fma_config(k, x.dtype, gated=False, single=m == count == 1)
        gain, eps = norm or (None, 0.0)
        _fma_kernel[(sum(triton.cdiv(n, c.block_n) for n in ns),)](
            flat, flat.stride(0), gain, eps, tuple(weights), *common, K=k, M=m, COUNT=count, NORM=norm is not None,
            RESIDUAL=rest is not None, BLOCK_N=c.block_n, BLOCK_K=c.block_k, STAGES=c.stages, UNROLL=c.unroll,
            LINES=_lines(c, k, x), num_warps=c.warps, **launch,
        )  # fmt: skip
        return outs
    flat = flat if norm is None else rms_norm(flat, norm)
    c = config or dot_config(m, sum(ns), x.dtype, gated=False)
    parts = torch.empty(c.split, m, sum(ns), dtype=torch.float32, device=x.device) if c.split > 1 else None
    _dot_kernel[(sum(triton.cdiv(n, c.block_n) for n in ns), c.split)](
        flat, flat.stride(0), tuple(weights), *common, parts, m, sum(ns), K=k, COUNT=count, RESIDUAL=rest is not None,
        BLOCK_M=_block_m(m), BLOCK_N=c.block_n, BLOCK_K=c.block_k, SPLIT=c.split, STAGES=c.stages,
        LINES=_lines(c, k, x), num_warps=c.warps, **launch,
    )  # fmt: skip
    if parts is not None:
        _sum_parts_kernel[(sum(triton.cdiv(n, REDUCE_BLOCK) for n in ns), m)](
            parts, *common, m, sum(ns), COUNT=count, RESIDUAL=rest is not None, SPLIT=c.split, BLOCK=REDUCE_BLOCK,
            num_warps=4, **launch,
        )  # fmt: skip
    return outs


def small_gated_linear(
    x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str, config: Config | None = None, norm: Norm | None = None
) -> Tensor:
    """act(x Wg^T) * (x Wu^T), rounded after each linear, the activation and the product. With a norm, that of x stands
    for x.

    x: (..., K) with 1 to MAX_ROWS tokens; w_gate, w_up: (N, K), contiguous; activation: one of ACTIVATIONS. All of one
    dtype, bf16, fp16 or fp32. Returns a new tensor (..., N). Raises ValueError for what it does not do.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"small_gated_linear: activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    flat = _check("small_gated_linear", x, [w_gate, w_up], norm)
    if w_gate.shape != w_up.shape:
        shapes = f"{tuple(w_gate.shape)} and {tuple(w_up.shape)}"
        raise ValueError(f"small_gated_linear: weights {shapes}, expected equal ones")
    (m, k), n = flat.shape, w_gate.shape[0]
    out = x.new_empty(*x.shape[:-1], n)
    launch = options(x.device)
    if m <= FMA_ROWS:
        c = config or fma_config(k, x.dtype, gated=True)
        gain, eps = norm or (None, 0.0)
        _gated_fma_kernel[(triton.cdiv(n, c.block_n),)](
            flat, flat.stride(0), gain, eps, w_gate, w_up, out, n, K=k, M=m, ACTIVATION=activation, NORM=norm is not None,
            BLOCK_N=c.block_n, BLOCK_K=c.block_k, STAGES=c.stages, UNROLL=c.unroll, LINES=_lines(c, k, x),
            num_warps=c.warps, **launch,
        )  # fmt: skip
        return out
    flat = flat if norm is None else rms_norm(flat, norm)
    c = config or dot_config(m, 2 * n, x.dtype, gated=True)
    _gated_dot_kernel[(triton.cdiv(n, c.block_n),)](
        flat, flat.stride(0), w_gate, w_up, out, n, m, K=k, ACTIVATION=activation, BLOCK_M=_block_m(m),
        BLOCK_N=c.block_n, BLOCK_K=c.block_k, STAGES=c.stages, LINES=_lines(c, k, x), num_warps=c.warps, **launch,
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """The norm of each row of x (..., K), rounded before and after the gain; for any number of tokens."""
    flat = _rows(x)
    m, k = flat.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm_kernel[(m,)](
        flat, flat.stride(0), norm.gain, norm.eps, out, K=k, BLOCK=triton.next_power_of_2(k),
        num_warps=8 if k > 1024 else 4, **options(x.device),
    )  # fmt: skip
    return out


def _check(name: str, x: Tensor, weights: list[Tensor], norm: Norm | None) -> Tensor:
    """x as (M, K) with contiguous rows."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: x is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    k = x.shape[-1]
    for w in weights:
        if w.dim() != 2 or w.shape[1] != k or w.dtype != x.dtype or not w.is_contiguous():
            raise ValueError(f"{name}: weight {tuple(w.shape)} {w.dtype}, expected (N, {k}) {x.dtype}, contiguous")
    if norm is not None and (norm.gain.shape != (k,) or norm.gain.dtype != x.dtype or not norm.gain.is_contiguous()):
        raise ValueError(
            f"{name}: gain {tuple(norm.gain.shape)} {norm.gain.dtype}, expected ({k},) {x.dtype}, contiguous"
        )
    flat = _rows(x)
    if not 1 <= flat.shape[0] <= MAX_ROWS:
        raise ValueError(f"{name}: {flat.shape[0]} tokens, expected 1 to {MAX_ROWS}")
    return flat


def _rows(x: Tensor) -> Tensor:
    """(..., K) as (M, K) whose last axis is contiguous."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
