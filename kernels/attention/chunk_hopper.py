"""Chunk attention on Hopper: warp-specialized, with TMA loads and asynchronous warpgroup MMAs (Gluon).

One program computes 128 query rows of one head. It has three parts that run at once: a producer warp, which loads blocks of
keys and values into a ring of STAGES slots, and two consumers (warpgroups) of 64 rows each. The plain case only: all live
cached slots are visible, the new tokens are causal, no window, softcap, ALiBi or hidden tokens.
chunk_attention.py has the kernel for everything else, and the choice between them.

Blocks of keys are visited in this order, so that all that need a mask come last:

    [whole cache blocks] [chunk blocks before the diagonal] [the cache's last, partial block, if any] [diagonal blocks]

There is always a diagonal block, so the last block is always a masked one. No row is ever without a visible key: the first
block that a row meets holds the first slot or the first new token, which all rows see. So no exponent is -inf - -inf.

Barriers: of every ring slot, "full" (1 arrival: the producer's, with the bytes that TMA has yet to write) and "empty" (2
arrivals: one of each consumer, when its MMA has read the slot). Visit number i of the ring is slot i % STAGES in round
i // STAGES; a consumer waits for phase round & 1 of full, the producer for the other phase of empty, which a fresh barrier
lets through.

Gluon has no interpreter: this kernel is compiled in CI (tests/kernels/test_chunk_attention.py) and run on GPUs only.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kvrewrite.kernels.attention.chunk import heads_together
from kvrewrite.kernels.groups import Slots, Tokens

# Triton 3.6's name, and what it became
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

ROWS = 128  # query rows of a program, 64 for each consumer


class HopperConfig(NamedTuple):
    """What is open to measurement: keys in a block, ring slots, registers a thread at launch (None: what ptxas takes)."""

    block_n: int
    stages: int
    maxnreg: int | None = None


CONFIGS = {64: HopperConfig(128, 3), 128: HopperConfig(128, 2), 256: HopperConfig(64, 2)}  # by head dimension


@gluon.jit
def _max(a, b):
    return gl.maximum(a, b)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _produce(
    q_desc, kc_desc, vc_desc, k_desc, v_desc, q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
    m0, n_cached, n_open, tail, n_blocks,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: loads the query rows once, then every block of keys and values in the order of visits."""
    mbarrier.expect(q_full, 2 * 64 * D * 2)
    tma_load(q_desc, [m0, 0], q_full, q_s.index(0))
    tma_load(q_desc, [m0 + 64, 0], q_full, q_s.index(1))
    for i in range(n_blocks):
        slot = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        in_cache = (i < n_cached) | ((i == n_open) & (tail > 0))
        cache_row = gl.minimum(i, n_cached) * BLOCK_N
        chunk_row = (i - n_cached - gl.where(i >= n_open, tail, 0)) * BLOCK_N
        mbarrier.wait(k_empty.index(slot), phase)
        mbarrier.expect(k_full.index(slot), BLOCK_N * D * 2)
        if in_cache:
            tma_load(kc_desc, [cache_row, 0], k_full.index(slot), k_s.index(slot))
        else:
            tma_load(k_desc, [chunk_row, 0], k_full.index(slot), k_s.index(slot))
        mbarrier.wait(v_empty.index(slot), phase)
        mbarrier.expect(v_full.index(slot), BLOCK_N * D * 2)
        if in_cache:
            tma_load(vc_desc, [cache_row, 0], v_full.index(slot), v_s.index(slot))
        else:
            tma_load(v_desc, [chunk_row, 0], v_full.index(slot), v_s.index(slot))


@gluon.jit
def _mask(i, s, rows, n_live, n_cached, n_open, tail, BLOCK_N: gl.constexpr, S_L: gl.constexpr):
    """The logits of visit i >= n_open: columns below the cache's length, or not after the row's own token."""
    in_cache = ((i == n_open) & (tail > 0)).to(gl.int32)
    first = (in_cache * n_cached + (1 - in_cache) * (i - n_cached - tail)) * BLOCK_N
    end = in_cache * n_live + (1 - in_cache) * (rows + 1)
    cols = first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_L))
    return gl.where(cols[None, :] < end[:, None], s, float("-inf"))


@gluon.jit
def _softmax(s, acc, m_i, l_i, scale2, O_L: gl.constexpr, P_L: gl.constexpr, DTYPE: gl.constexpr):
    """One step of the online softmax, in powers of 2: weights as an MMA operand, and the rescaled state."""
    m_new = gl.maximum(m_i, gl.reduce(s, 1, _max) * scale2)
    p = gl.exp2(s * scale2 - m_new[:, None])
    alpha = gl.exp2(m_i - m_new)
    l_new = l_i * alpha + gl.reduce(p, 1, _add)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_L))[:, None]
    return gl.convert_layout(p.to(DTYPE), P_L), acc, m_new, l_new


@gluon.jit
def _step(
    i, s, acc, m_i, l_i, q, k_s, v_s, k_full, k_empty, v_full, v_empty, scale2, rows, n_live, n_cached, n_open, tail,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    S_L: gl.constexpr, O_L: gl.constexpr, P_L: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Issues QK of visit i, does the softmax of visit i - 1 under it, then PV of visit i - 1.

    The data dependences force this order on ptxas: in the usual one, with the softmax of visit i between two waits, it sinks
    the exponentials below the second wait, and nothing overlaps.
    """
    slot = i % STAGES
    before = (i - 1) % STAGES
    zero = gl.zeros([64, BLOCK_N], gl.float32, S_L)
    mbarrier.wait(k_full.index(slot), (i // STAGES) & 1)
    s_next = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    if MASKED:
        s = _mask(i - 1, s, rows, n_live, n_cached, n_open, tail, BLOCK_N, S_L)
    p, acc, m_i, l_i = _softmax(s, acc, m_i, l_i, scale2, O_L, P_L, DTYPE)
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    acc_next = warpgroup_mma(p, v_s.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s_next])
    mbarrier.arrive(k_empty.index(slot), count=1)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc_next])
    mbarrier.arrive(v_empty.index(before), count=1)
    return s, acc, m_i, l_i


@gluon.jit
def _consume(
    q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr, sink_ptr, scale2, m0, t, n_valid,
    out_stride, n_live, n_cached, n_open, tail, n_blocks,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SINKS: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """A consumer: rows [m0 + 64 * CONSUMER, + 64). out_ptr, lse_ptr: row 0 of the head; sink_ptr: its sink's logit."""
    DTYPE: gl.constexpr = q_s.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_L, k_width=2)
    rows = m0 + CONSUMER * 64 + gl.arange(0, 64, gl.SliceLayout(1, S_L))
    acc = gl.zeros([64, D], gl.float32, O_L)
    zero = gl.zeros([64, BLOCK_N], gl.float32, S_L)
    m_i = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, S_L))
    l_i = gl.zeros([64], gl.float32, gl.SliceLayout(1, S_L))

    mbarrier.wait(q_full, 0)
    q = q_s.index(CONSUMER)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, k_s.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
    mbarrier.arrive(k_empty.index(0), count=1)
    for i in range(1, n_open + 1):  # the softmax is that of visit i - 1 < n_open: no mask
        s, acc, m_i, l_i = _step(
            i, s, acc, m_i, l_i, q, k_s, v_s, k_full, k_empty, v_full, v_empty, scale2, rows, n_live, n_cached, n_open, tail,
            BLOCK_N, D, STAGES, False, S_L, O_L, P_L, DTYPE,
        )  # fmt: skip
    for i in range(n_open + 1, n_blocks):
        s, acc, m_i, l_i = _step(
            i, s, acc, m_i, l_i, q, k_s, v_s, k_full, k_empty, v_full, v_empty, scale2, rows, n_live, n_cached, n_open, tail,
            BLOCK_N, D, STAGES, True, S_L, O_L, P_L, DTYPE,
        )  # fmt: skip
    last = n_blocks - 1
    s = _mask(last, s, rows, n_live, n_cached, n_open, tail, BLOCK_N, S_L)
    p, acc, m_i, l_i = _softmax(s, acc, m_i, l_i, scale2, O_L, P_L, DTYPE)
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    acc_next = warpgroup_mma(p, v_s.index(last % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc_next])

    if SINKS:
        sink = gl.load(sink_ptr).to(gl.float32) * 1.4426950408889634
        m_new = gl.maximum(m_i, sink)
        alpha = gl.exp2(m_i - m_new)
        l_i = l_i * alpha + gl.exp2(sink - m_new)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_L))[:, None]
        m_i = m_new
    lse = gl.where(rows < n_valid, (m_i + gl.log2(l_i)) * 0.6931471805599453, float("-inf"))
    gl.store(lse_ptr + rows, lse, mask=rows < t)
    acc = acc * gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, O_L))[:, None]
    out_rows = m0 + CONSUMER * 64 + gl.arange(0, 64, gl.SliceLayout(1, O_L))
    out_cols = gl.arange(0, D, gl.SliceLayout(0, O_L))
    acc = gl.where((out_rows < n_valid)[:, None], acc, 0.0)
    offsets = out_rows.to(gl.int64)[:, None] * out_stride + out_cols[None, :]
    gl.store(out_ptr + offsets, acc.to(DTYPE), mask=(out_rows < t)[:, None])


# Lengths that change from call to call compile once.
@gluon.jit(do_not_specialize=["lens_b", "lens_h", "t", "capacity", "batch_heads", "heads_at_once", "n_m"])
def _attend(
    Q, K, V, KC, VC, LENS, VALID, SINK, OUT, LSE, scale2,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, lens_b, lens_h,
    n_heads, group, t, capacity, batch_heads, heads_at_once, n_m,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """Q (B, H, t, D), K, V (B, Hkv, t, D) by strides; KC, VC (B, Hkv, capacity, D); OUT (B, t, H, D); LSE (B, H, t).

    Programs go through heads_at_once heads together (their keys fit in L2), heaviest query blocks first, so that the last
    programs to start are the short ones.
    """
    gl.static_assert(128 % BLOCK_N == 0)
    DTYPE: gl.constexpr = Q.dtype.element_ty
    pid = gl.program_id(0)
    first_head = pid // (n_m * heads_at_once) * heads_at_once
    rest = pid % (n_m * heads_at_once)
    together = gl.minimum(heads_at_once, batch_heads - first_head)
    bh = first_head + rest % together
    m0 = (n_m - 1 - rest // together) * 128
    b = (bh // n_heads).to(gl.int64)
    h = bh % n_heads
    hk = h // group
    n_kv = n_heads // group

    n_live = gl.load(LENS + b * lens_b + hk * lens_h)
    n_valid = gl.load(VALID + b)
    q_base = Q + b * q_b + h.to(gl.int64) * q_h
    k_base = K + b * k_b + hk.to(gl.int64) * k_h
    v_base = V + b * v_b + hk.to(gl.int64) * v_h
    cache_row = (b * n_kv + hk) * capacity

    # Rows from n_valid on get 0 and -inf, whatever is computed for them; a program without others does no more than it must.
    real = (m0 < n_valid).to(gl.int32)
    n_cached = n_live // BLOCK_N * real
    tail = gl.where(n_live % BLOCK_N > 0, 1, 0) * real
    n_open = n_cached + m0 // BLOCK_N * real
    seen = gl.minimum(m0 + 128, n_valid)  # new tokens that the last row sees
    diagonal = ((seen + BLOCK_N - 1) // BLOCK_N - m0 // BLOCK_N) * real + (1 - real)
    n_blocks = n_open + tail + diagonal

    q_l: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], DTYPE)
    k_l: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], DTYPE)
    # Rows beyond these shapes are read as zeros: dead slots and padding never reach an MMA. (TMA knows no shape of 0.)
    live = gl.maximum(n_live, 1)
    new = gl.maximum(n_valid, 1)
    q_desc = tma.make_tensor_descriptor(q_base, shape=[t, D], strides=[q_t, 1], block_shape=[64, D], layout=q_l)
    kc_desc = tma.make_tensor_descriptor(
        KC + cache_row * D, shape=[live, D], strides=[D, 1], block_shape=[BLOCK_N, D], layout=k_l
    )
    vc_desc = tma.make_tensor_descriptor(
        VC + cache_row * D, shape=[live, D], strides=[D, 1], block_shape=[BLOCK_N, D], layout=k_l
    )
    k_desc = tma.make_tensor_descriptor(k_base, shape=[new, D], strides=[k_t, 1], block_shape=[BLOCK_N, D], layout=k_l)
    v_desc = tma.make_tensor_descriptor(v_base, shape=[new, D], strides=[v_t, 1], block_shape=[BLOCK_N, D], layout=k_l)

    q_s = gl.allocate_shared_memory(DTYPE, [2, 64, D], q_l)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], k_l)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], k_l)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    out_stride = n_heads * D
    out_head = OUT + b * t * out_stride + h * D
    lse_head = LSE + bh.to(gl.int64) * t
    sink_ptr = SINK + h
    gl.warp_specialize(
        [
            (_consume, (
                q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty, out_head, lse_head, sink_ptr, scale2, m0, t, n_valid,
                out_stride, n_live, n_cached, n_open, tail, n_blocks, BLOCK_N, D, STAGES, SINKS, 0,
            )),
            (_consume, (
                q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty, out_head, lse_head, sink_ptr, scale2, m0, t, n_valid,
                out_stride, n_live, n_cached, n_open, tail, n_blocks, BLOCK_N, D, STAGES, SINKS, 1,
            )),
            (_produce, (
                q_desc, kc_desc, vc_desc, k_desc, v_desc, q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
                m0, n_cached, n_open, tail, n_blocks, BLOCK_N, D, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where Triton keeps the TMA descriptors that the programs make; torch aligns to 512 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _strides(x: Tensor) -> list[int]:
    """Strides of batch, heads and tokens; 0 where a size of 1 leaves them undefined, so that all are multiples of 16 bytes."""
    return [s if n > 1 else 0 for s, n in zip(x.stride()[:2], x.shape[:2], strict=True)] + [_row(x)]


def _row(x: Tensor) -> int:
    """The stride between tokens; with one token, one that TMA takes."""
    return x.stride(2) if x.shape[2] > 1 else x.shape[3]


def launch(
    tokens: Tokens,
    slots: Slots,
    valid: Tensor,
    sinks: Tensor | None,
    scale: float,
    config: HopperConfig | None = None,
    heads_at_once: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as chunk_attention.chunk_attention has them, already checked by it."""
    (q, k, v), (k_cache, v_cache, lens, _) = tokens, slots
    b, h, t, d = q.shape
    hkv, capacity = k_cache.shape[1], k_cache.shape[2]
    config = config or CONFIGS[d]
    out = torch.empty(b, t, h, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, t, dtype=torch.float32, device=q.device)
    if b == 0 or t == 0:
        return out.transpose(1, 2), lse
    if capacity == 0:  # an empty tensor has no address; nothing is read
        k_cache, v_cache = k, v
    if heads_at_once is None:
        heads_at_once = heads_together(b * h, h // hkv, capacity + t, 2 * d * q.element_size())
    blocks = triton.cdiv(t, ROWS)
    options: dict[str, Any] = {} if config.maxnreg is None else {"maxnreg": config.maxnreg}
    triton.set_allocator(_allocate)
    _attend[(blocks * b * h,)](
        q, k, v, k_cache, v_cache, lens, valid, lens if sinks is None else sinks, out, lse, scale * 1.4426950408889634,
        *_strides(q), *_strides(k), *_strides(v), *lens.stride(),
        h, h // hkv, t, capacity, b * h, heads_at_once, blocks,
        D=d, BLOCK_N=config.block_n, STAGES=config.stages, SINKS=sinks is not None, num_warps=4, **options,
    )  # fmt: skip
    return out.transpose(1, 2), lse
