"""Quantized keys and values in plain torch: KIVI's scheme (arXiv 2402.02750; code jy-yuan/KIVI) in int8 and int4, and
fp8.

Keys are quantized per channel over groups of `group` slots, because a few channels of a key are large at every token;
values per token over groups of channels. int8 and int4 are asymmetric, between the smallest and the largest value of a
group; fp8 (e4m3) is symmetric, its largest number being the largest magnitude of a group.

What is ours. A group keeps its two ends (lo, hi) in the cache's own dtype where KIVI keeps (minimum, scale): both ends
are members of the group, so they are held exactly in any dtype. Nothing overflows (fp16 parameters would, for a bf16
model beyond 65504), an offset channel loses nothing to a rounded zero, a group of equal values is exact, and quantizing
what was dequantized gives the same ends and values again. That is what bounds the drift of slots that an eviction
moves: values move as bytes; the keys of a group are coded again only when its ends widen (see `within`). For fp8 the
one parameter is the largest magnitude. Groups are any slots that lie side by side, not only tokens that followed each
other.

Elementwise fp32 (fp64 for fp64 caches), one rounding an operation and no fused multiply-add: the bits are the same on
every device. Values must be finite where live; dead slots may hold anything and get code 0.

Layout: codes (..., S, width) uint8; int4 holds channel i in the low half of byte i and channel i + D/2 in the high
half; fp8 is the bit pattern. Parameters: keys (..., S / group, D, P), values (..., S, D / value_group, P), where P = 2
(lo, hi) or, for fp8, 1 (largest magnitude).

Bytes of a slot, keys and values and parameters, group 32, caches of two bytes per number (dense: 4 D):

    D      dense   int8   fp8   int4
    128      512    288   272    160
    32       128     72    68     40
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("int8", "int4", "fp8")
FP8_MAX = 448.0  # the largest number of float8_e4m3fn


@dataclass(frozen=True)
class Scheme:
    """How a cache is quantized. kind: one of `KINDS`; group: slots of a key group, channels of a value group at
    most."""

    kind: str
    group: int = 32

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"quantize is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.group < 1:
            raise ValueError(f"quantize_group is {self.group}, expected at least 1")

    @property
    def parameters(self) -> int:
        """Numbers that a group keeps."""
        return 1 if self.kind == "fp8" else 2

    @property
    def levels(self) -> int:
        """The largest code of an integer kind."""
        return 15 if self.kind == "int4" else 255

    def code_width(self, d: int) -> int:
        """Bytes of a token's codes for head dim d. ValueError: int4 with an odd head dim."""
        if self.kind != "int4":
            return d
        if d % 2:
            raise ValueError(f"int4 packs two channels into a byte, and the head dim is {d}; use int8 or fp8")
        return d // 2

    def value_group(self, d: int) -> int:
        """Channels of a value group: the largest divisor of d that is at most `group` (80 and 32: 20)."""
        return max(g for g in range(1, min(self.group, d) + 1) if d % g == 0)

    def key_bytes(self, d: int, itemsize: int) -> float:
        """Bytes of one slot's key of head dim d, its share of the parameters (of `itemsize` bytes each) included."""
        return self.code_width(d) + d * self.parameters * itemsize / self.group

    def value_bytes(self, d: int, itemsize: int) -> int:
        """Bytes of one slot's value, as `key_bytes`."""
        return self.code_width(d) + d // self.value_group(d) * self.parameters * itemsize


def quantize_keys(k: Tensor, live: Tensor, scheme: Scheme, within: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keys k (..., S, D), live (..., S) bool -> codes (..., S, width) uint8, parameters (..., S / group, D, P) in k's
    dtype.

    S must be a multiple of the group. within: parameters that the groups had before, NaN where a group is new. Their
    ends are then only widened, so that the codes of slots that stay in place change only where a new token lies
    outside. A group without live slots has zeros (or its `within`).
    """
    *lead, s, d = k.shape
    if s % scheme.group:
        raise ValueError(f"{s} slots are not whole groups of {scheme.group}")
    grouped = k.reshape(*lead, s // scheme.group, scheme.group, d)
    alive = live.reshape(*lead, s // scheme.group, scheme.group, 1)
    params = _parameters(grouped, alive, -2, scheme, within)
    codes = _encode(grouped, alive, params.unsqueeze(-3), scheme)
    return _pack(codes.reshape(k.shape), scheme), params


def dequantize_keys(codes: Tensor, params: Tensor, scheme: Scheme) -> Tensor:
    """Inverse of `quantize_keys`: (..., S, D) in the parameters' dtype; dead slots give numbers without meaning."""
    *lead, groups, d, p = params.shape
    unpacked = _unpack(codes, scheme).reshape(*lead, groups, scheme.group, d)
    return _decode(unpacked, params.reshape(*lead, groups, 1, d, p), scheme).reshape(*lead, groups * scheme.group, d)


def quantize_values(v: Tensor, live: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Values v (..., S, D), live (..., S) bool -> codes (..., S, width) uint8, parameters (..., S, D / value_group, P)
    in v's dtype; dead slots have zeros. S may be anything: no slot knows of another."""
    group = scheme.value_group(v.shape[-1])
    grouped = v.reshape(*v.shape[:-1], v.shape[-1] // group, group)
    alive = live[..., None, None]
    params = _parameters(grouped, alive, -1, scheme, None)
    codes = _encode(grouped, alive, params.unsqueeze(-2), scheme)
    return _pack(codes.reshape(v.shape), scheme), params


def dequantize_values(codes: Tensor, params: Tensor, scheme: Scheme) -> Tensor:
    """Inverse of `quantize_values`: (..., S, D) in the parameters' dtype; dead slots give numbers without meaning."""
    *lead, groups, p = params.shape
    unpacked = _unpack(codes, scheme)
    grouped = unpacked.reshape(*lead, groups, unpacked.shape[-1] // groups)
    return _decode(grouped, params.reshape(*lead, groups, 1, p), scheme).reshape(unpacked.shape)


def _parameters(x: Tensor, alive: Tensor, dim: int, scheme: Scheme, within: Tensor | None) -> Tensor:
    """Ends of the groups that lie along `dim`: x's shape without it, and P at the end."""
    if scheme.kind == "fp8":
        ends = [torch.where(alive, x.abs(), 0).amax(dim)]
        if within is not None:
            ends = [torch.fmax(ends[0], within[..., 0])]
    else:
        # Of an empty group the ends are crossed: torch.fmin and fmax then give way to any number in `within`.
        lo = torch.where(alive, x, float("inf")).amin(dim)
        hi = torch.where(alive, x, float("-inf")).amax(dim)
        if within is not None:
            lo, hi = torch.fmin(lo, within[..., 0]), torch.fmax(hi, within[..., 1])
        empty = lo > hi
        # + 0: devices differ in which zero of -0.0 and 0.0 is the smaller one.
        ends = [torch.where(empty, 0, lo) + 0.0, torch.where(empty, 0, hi) + 0.0]
    return torch.stack(ends, dim=-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _encode(x: Tensor, alive: Tensor, params: Tensor, scheme: Scheme) -> Tensor:
    """Codes of x, one byte each; params broadcasts against x with P at the end."""
    wide = _wide(x.dtype)
    x, ends = torch.where(alive, x, 0).to(wide), params.to(wide)
    if scheme.kind == "fp8":
        unit = torch.where(ends[..., 0] > 0, x / ends[..., 0], 0)
        return (unit * FP8_MAX).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    span = ends[..., 1] - ends[..., 0]
    unit = torch.where(alive & (span > 0), (x - ends[..., 0]) / span, 0)
    return (unit * scheme.levels).round().clamp(0, scheme.levels).to(torch.uint8)


def _decode(codes: Tensor, params: Tensor, scheme: Scheme) -> Tensor:
    """What the codes stand for, in the parameters' dtype; the ends of a group come out exactly."""
    ends = params.to(_wide(params.dtype))
    if scheme.kind == "fp8":
        return (codes.view(torch.float8_e4m3fn).to(ends.dtype) * (1.0 / FP8_MAX) * ends[..., 0]).to(params.dtype)
    lo, hi = ends[..., 0], ends[..., 1]
    share = codes.to(ends.dtype) * (1.0 / scheme.levels)  # CUDA divides by numbers so, and 1 comes out exactly
    return (hi * share + lo * (1 - share)).to(params.dtype)


def _pack(codes: Tensor, scheme: Scheme) -> Tensor:
    width = scheme.code_width(codes.shape[-1])
    return codes if scheme.kind != "int4" else codes[..., :width] | (codes[..., width:] << 4)


def _unpack(codes: Tensor, scheme: Scheme) -> Tensor:
    return codes if scheme.kind != "int4" else torch.cat([codes & 15, codes >> 4], dim=-1)
