"""Codes as numbers for tensor cores, and what they are multiplied by.

A word is what is loaded as one number: one byte or two, and a byte has one code, or in int4 two. Words come from shared
memory in the order in which a tensor core takes numbers of 16 bits. So the codes number i of all words are an operand as
they are, and nothing moves between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvrewrite.kernels.quantized.scheme import FP8_MAX

_FP8_UNIT = tl.constexpr(1.0 / FP8_MAX)


@triton.jit
def scale_and_zero(raw, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """What centered codes are multiplied by, and what is added then, fp32. raw: a group's two ends in one integer, or
    for fp8 its largest magnitude."""
    if KIND == "fp8":
        scale = raw.to(tl.float32) * _FP8_UNIT
        zero = scale * 0.0
    else:
        if raw.dtype == tl.int64:
            low = raw.to(tl.int32).to(tl.float32, bitcast=True)
            high = (raw >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        else:
            low = raw.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
            high = (raw >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        unit: tl.constexpr = 1.0 / 15 if KIND == "int4" else 1.0 / 255
        middle: tl.constexpr = 8.0 if KIND == "int4" else 128.0
        scale = high * unit - low * unit
        zero = low + scale * middle
    return scale, zero


# From a register with two words to the codes that begin SHIFT bits up in them, in bf16, where 0x43xx is 128 and more.
_INT8_TO_BF16 = """{
    .reg .b32 x, a, b;
    shr.u32 x, $1, SHIFT;
    lop3.b32 a, x, 0x007f007f, 0x43004300, 0xEA;
    lop3.b32 b, x, 0x00800080, 0x43804380, 0x6A;
    sub.bf16x2 $0, a, b;
}"""
_INT4_TO_BF16 = """{
    .reg .b32 x, a, m;
    mov.b32 m, 0x43084308;
    shr.u32 x, $1, SHIFT;
    lop3.b32 a, x, 0x000f000f, 0x43004300, 0xEA;
    sub.bf16x2 $0, a, m;
}"""
# The exponent lies where bf16's does, but counts from another number: out comes 2**-120 times what the code stands for,
# subnormal numbers included. What it is multiplied with makes up for a part of that, the sum for the rest, so that
# neither leaves the range of bf16.
_FP8_TO_BF16 = """{
    .reg .b32 x, a;
    shl.b32 x, $1, SHIFT;
    and.b32 a, x, 0x7f007f00;
    shr.u32 a, a, 4;
    lop3.b32 $0, x, 0x80008000, a, 0xEA;
}"""
K_UP, K_REST = tl.constexpr(2.0**60), tl.constexpr(2.0**60)
V_UP, V_REST = tl.constexpr(2.0**90), tl.constexpr(2.0**30)
_INT8_0 = tl.constexpr(_INT8_TO_BF16.replace("SHIFT", "0"))
_INT8_1 = tl.constexpr(_INT8_TO_BF16.replace("SHIFT", "8"))
_INT4_0 = tl.constexpr(_INT4_TO_BF16.replace("SHIFT", "0"))
_INT4_1 = tl.constexpr(_INT4_TO_BF16.replace("SHIFT", "4"))
_INT4_2 = tl.constexpr(_INT4_TO_BF16.replace("SHIFT", "8"))
_INT4_3 = tl.constexpr(_INT4_TO_BF16.replace("SHIFT", "12"))
_FP8_0 = tl.constexpr(_FP8_TO_BF16.replace("SHIFT", "8"))
_FP8_1 = tl.constexpr(_FP8_TO_BF16.replace("SHIFT", "0"))


@triton.jit
def _to_bf16(words, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def centered(words, PART: tl.constexpr, KIND: tl.constexpr, MATH: tl.constexpr, FAST: tl.constexpr):
    """The codes number PART of words: int8 -128 to 127, int4 -8 to 7, fp8 as they are. FAST: by hand, to bf16, fp8
    2**-120 of them."""
    if FAST:
        if KIND == "fp8":
            x = _to_bf16(words, _FP8_0 if PART == 0 else _FP8_1)
        elif KIND == "int8":
            x = _to_bf16(words, _INT8_0 if PART == 0 else _INT8_1)
        elif PART < 2:
            x = _to_bf16(words, _INT4_0 if PART == 0 else _INT4_1)
        else:
            x = _to_bf16(words, _INT4_2 if PART == 2 else _INT4_3)
    else:
        bits = words.to(tl.int32)
        if KIND == "int4":
            x = ((bits >> (4 * PART)) & 15).to(tl.int8) - 8
        elif KIND == "int8":
            x = ((bits >> (8 * PART)) & 255).to(tl.uint8)
            x = (x ^ 0x80).to(tl.int8, bitcast=True)
        else:
            x = ((bits >> (8 * PART)) & 255).to(tl.uint8)
            x = x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return x.to(MATH)
