"""The sum of two GPUs' parts in one kernel without a barrier, for the few numbers of a decode step.

Each rank stores its part into a buffer that lies on the other GPU, four bytes at a time, each beside the number of this sum
(its "epoch") in one store of eight bytes. So whoever reads the right epoch has the right data, and nobody waits for anything
else. Two buffers take turns: a rank can only begin sum k + 1 once the other one has begun sum k, and is through with reading
sum k - 1. Both add the same two numbers, so both have the same bits.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrewrite.kernels.launch import begin, options

BLOCK = 512  # words of four bytes that a program sums


@triton.jit
def _halves(words, DTYPE: tl.constexpr):
    """The two numbers of 16 bits in each word, fp32."""
    low = words.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _word(low, high, DTYPE: tl.constexpr):
    """The word of two numbers, which are rounded to 16 bits."""
    low_bits = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low_bits | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _send(at, value, STRONG: tl.constexpr):
    """Stores eight bytes each, where another GPU may read them."""
    if STRONG:
        tl.inline_asm_elementwise(
            "st.relaxed.sys.global.b64 [$1], $2; mov.u32 $0, 0;",
            "=r,l,l",
            [at.to(tl.int64), value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(at, value)


@triton.jit
def _pair_sum_kernel(
    x, residual, out, mine, theirs, state, words, capacity,
    DTYPE: tl.constexpr, NARROW: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, STRONG: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Words of out = x + the other rank's x (+ residual). state: the epoch of the sum before, and programs that are
    through."""
    begin(PDL)
    epoch = tl.load(state) + 1
    word = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), words - 1)  # the last one again instead of a mask
    own = tl.load(x + word)
    at = (epoch % 2).to(tl.int64) * capacity + word
    _send(theirs + at, (epoch.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF), STRONG)
    got = tl.load(mine + at, volatile=True)
    while tl.sum(((got >> 32).to(tl.int32) != epoch).to(tl.int32), 0) > 0:
        got = tl.load(mine + at, volatile=True)
    other = got.to(tl.int32)
    if NARROW:
        a, b = _halves(own, DTYPE)
        c, d = _halves(other, DTYPE)
        total = _word(a + c, b + d, DTYPE)
        if RESIDUAL:  # to the rounded sum, as one op after the other
            a, b = _halves(total, DTYPE)
            c, d = _halves(tl.load(residual + word), DTYPE)
            total = _word(c + a, d + b, DTYPE)
    else:
        sums = own.to(tl.float32, bitcast=True) + other.to(tl.float32, bitcast=True)
        if RESIDUAL:
            sums = tl.load(residual + word).to(tl.float32, bitcast=True) + sums
        total = sums.to(tl.int32, bitcast=True)
    tl.store(out + word, total)
    # All threads have read the epoch: the sum in the loop above waits for them.
    if tl.atomic_add(state + 1, 1) == tl.num_programs(0) - 1:
        tl.store(state + 1, 0)
        tl.store(state, epoch)


def pair_sum(x: Tensor, mine: Tensor, theirs: Tensor, state: Tensor, residual: Tensor | None = None) -> Tensor:
    """x + the other rank's x, rounded, and then residual + that, if there is one.

    x: contiguous, bf16, fp16 or fp32, in whole words of four bytes, at most half as many as `mine` has entries; residual: like
    x. mine, theirs: int64, this rank's buffer and the other one's, zeros at first; state: int32 (2,), zeros at first. Both
    ranks call this with the same shapes in the same order.
    """
    words = x.numel() * x.element_size() // 4
    capacity = mine.numel() // 2
    if not 0 < words <= capacity or x.numel() * x.element_size() % 4:
        raise ValueError(
            f"pair_sum: {x.numel()} numbers of {x.dtype}, expected 1 to {capacity} whole words of four bytes"
        )
    out = torch.empty_like(x)
    narrow = x.element_size() == 2
    _pair_sum_kernel[(triton.cdiv(words, BLOCK),)](
        _words(x), None if residual is None else _words(residual), _words(out), mine, theirs, state, words, capacity,
        DTYPE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16, NARROW=narrow, RESIDUAL=residual is not None,
        BLOCK=BLOCK, STRONG=x.is_cuda, num_warps=4, **options(x.device),
    )  # fmt: skip
    return out


def _words(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.int32)
