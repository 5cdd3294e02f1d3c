"""silu(x gate^T) * (x up^T) for many tokens on Hopper: one warp-specialized GEMM that writes neither product (Gluon).

A program computes tiles of 64 * CONSUMERS tokens by BLOCK_N outputs, one after the other. A producer warp loads blocks
of 64 channels of x, gate and up by TMA into a ring of STAGES slots; each consumer, a warpgroup of its own, multiplies
64 rows of x by both weights, so that gate and up of an output meet in the same registers. While consumers write a tile
out, the producer already loads the next.

Barriers of every ring slot: "full" (1 arrival: the producer's, with the bytes that TMA has yet to write) and "empty"
(one of each consumer). Visit number i of the ring is slot i % STAGES in round i // STAGES; a consumer waits for phase
round & 1 of full, the producer for the other phase of empty, which a fresh barrier lets through.

Gluon has no interpreter: this kernel is compiled in CI (tests/kernels/test_gated_linear.py) and run on GPUs only.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import cache
from typing import NamedTuple

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

# Triton 3.6's names, and what they became
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

BLOCK_K = 64  # channels of a ring slot: 128 bytes of a row, as TMA swizzles them


class GatedConfig(NamedTuple):
    """What is open to measurement: consumers (64 tokens each), outputs of a tile, ring slots."""

    consumers: int
    block_n: int
    stages: int


CONFIGS = (GatedConfig(3, 128, 3), GatedConfig(2, 128, 4))
SMALLER = 1.02  # how much longer the second takes for the same work, on an H200


def choose_config(tokens: int, outputs: int, processors: int) -> GatedConfig:
    """Larger tiles read less, but the last round of tiles may leave most multiprocessors idle."""

    def cost(config: GatedConfig) -> float:
        tiles = triton.cdiv(tokens, 64 * config.consumers) * triton.cdiv(outputs, config.block_n)
        return triton.cdiv(tiles, processors) * config.consumers * (1.0 if config.consumers == 3 else SMALLER)

    return min(CONFIGS, key=cost)


@gluon.jit
def _produce(
    x_desc, g_desc, u_desc, x_s, g_s, u_s, full, empty, tiles, m_tiles, steps,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    i = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m0 = tile % m_tiles * 64 * CONSUMERS
        n0 = tile // m_tiles * BLOCK_N
        for k in range(steps):
            slot = i % STAGES
            mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, (64 * CONSUMERS + 2 * BLOCK_N) * BLOCK_K * 2)
            for c in gl.static_range(CONSUMERS):
                tma_load(x_desc, [m0 + 64 * c, k * BLOCK_K], bar, x_s.index(slot * CONSUMERS + c))
            tma_load(g_desc, [n0, k * BLOCK_K], bar, g_s.index(slot))
            tma_load(u_desc, [n0, k * BLOCK_K], bar, u_s.index(slot))
            i += 1


@gluon.jit
def _consume(
    out_desc, x_s, g_s, u_s, out_s, full, empty, tiles, m_tiles, steps,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    DTYPE: gl.constexpr = x_s.dtype
    i = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        gate = gl.zeros([64, BLOCK_N], gl.float32, L)
        up = gl.zeros([64, BLOCK_N], gl.float32, L)
        for k in range(steps):
            slot = i % STAGES
            mbarrier.wait(full.index(slot), (i // STAGES) & 1)
            x = x_s.index(slot * CONSUMERS + CONSUMER)
            gate = warpgroup_mma(x, g_s.index(slot).permute((1, 0)), gate, is_async=True)
            up = warpgroup_mma(x, u_s.index(slot).permute((1, 0)), up, is_async=True)
            gate, up = warpgroup_mma_wait(num_outstanding=2, deps=[gate, up])
            if k > 0:  # what was read in the step before has been
                mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)
            i += 1
        gate, up = warpgroup_mma_wait(num_outstanding=0, deps=[gate, up])
        mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)
        g = gate.to(DTYPE).to(gl.float32)
        h = g / (1.0 + gl.exp2(g * -1.4426950408889634)) * up.to(DTYPE).to(gl.float32)
        tma.store_wait(0)
        out_s.index(CONSUMER).store(h.to(DTYPE))
        fence_async_shared()
        m0 = (tile % m_tiles * CONSUMERS + CONSUMER) * 64
        tma_store(out_desc, [m0, tile // m_tiles * BLOCK_N], out_s.index(CONSUMER))
    tma.store_wait(0)


# Lengths that change from call to call compile once.
@gluon.jit(do_not_specialize=["tokens"])
def _gated(
    X, GATE, UP, OUT, tokens, channels, outputs,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """X (tokens, channels), GATE, UP (outputs, channels), OUT (tokens, outputs), contiguous."""
    DTYPE: gl.constexpr = X.dtype.element_ty
    x_l: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_K], DTYPE)
    w_l: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_K], DTYPE)
    o_l: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_N], DTYPE)
    x_desc = tma.make_tensor_descriptor(
        X, shape=[tokens, channels], strides=[channels, 1], block_shape=[64, BLOCK_K], layout=x_l
    )
    g_desc = tma.make_tensor_descriptor(
        GATE, shape=[outputs, channels], strides=[channels, 1], block_shape=[BLOCK_N, BLOCK_K], layout=w_l
    )
    u_desc = tma.make_tensor_descriptor(
        UP, shape=[outputs, channels], strides=[channels, 1], block_shape=[BLOCK_N, BLOCK_K], layout=w_l
    )
    out_desc = tma.make_tensor_descriptor(
        OUT, shape=[tokens, outputs], strides=[outputs, 1], block_shape=[64, BLOCK_N], layout=o_l
    )
    x_s = gl.allocate_shared_memory(DTYPE, [STAGES * CONSUMERS, 64, BLOCK_K], x_l)
    g_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_K], w_l)
    u_s = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_K], w_l)
    out_s = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 64, BLOCK_N], o_l)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    m_tiles = (tokens + 64 * CONSUMERS - 1) // (64 * CONSUMERS)
    tiles = m_tiles * ((outputs + BLOCK_N - 1) // BLOCK_N)
    steps = (channels + BLOCK_K - 1) // BLOCK_K
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    out_desc, x_s, g_s, u_s, out_s, full, empty, tiles, m_tiles, steps, CONSUMERS, BLOCK_N, STAGES, 0,
                )),
                (_consume, (
                    out_desc, x_s, g_s, u_s, out_s, full, empty, tiles, m_tiles, steps, CONSUMERS, BLOCK_N, STAGES, 1,
                )),
                (_produce, (
                    x_desc, g_desc, u_desc, x_s, g_s, u_s, full, empty, tiles, m_tiles, steps, CONSUMERS, BLOCK_N, BLOCK_K,
                    STAGES,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (_consume, (
                    out_desc, x_s, g_s, u_s, out_s, full, empty, tiles, m_tiles, steps, CONSUMERS, BLOCK_N, STAGES, 0,
                )),
                (_consume, (
                    out_desc, x_s, g_s, u_s, out_s, full, empty, tiles, m_tiles, steps, CONSUMERS, BLOCK_N, STAGES, 1,
                )),
                (_consume, (
                    out_desc, x_s, g_s, u_s, out_s, full, empty, tiles, m_tiles, steps, CONSUMERS, BLOCK_N, STAGES, 2,
                )),
                (_produce, (
                    x_desc, g_desc, u_desc, x_s, g_s, u_s, full, empty, tiles, m_tiles, steps, CONSUMERS, BLOCK_N, BLOCK_K,
                    STAGES,
                )),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where Triton keeps the TMA descriptors that the programs make; torch aligns to 512 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(x: Tensor, gate: Tensor, up: Tensor, config: GatedConfig | None = None) -> Tensor:
    """silu(x gate^T) * (x up^T): x (M, K), gate, up (N, K), contiguous, bf16 or fp16, K and N multiples of 8. Returns
    (M, N)."""
    m, k = x.shape
    n = gate.shape[0]
    if gate.shape != (n, k) or up.shape != (n, k) or {gate.dtype, up.dtype} != {x.dtype} or k % 8 or n % 8:
        raise ValueError(
            f"got x {tuple(x.shape)} {x.dtype}, gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}; expected "
            "(M, K), (N, K) and (N, K) of one dtype, K and N multiples of 8"
        )
    x, gate, up = x.contiguous(), gate.contiguous(), up.contiguous()
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    config = config or choose_config(m, n, _processors(x.device))
    tiles = triton.cdiv(m, 64 * config.consumers) * triton.cdiv(n, config.block_n)
    triton.set_allocator(_allocate)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _gated[(min(_processors(x.device), tiles),)](
            x, gate, up, out, m, k, n, CONSUMERS=config.consumers, BLOCK_N=config.block_n, BLOCK_K=BLOCK_K,
            STAGES=config.stages, num_warps=4,
        )  # fmt: skip
    return out
