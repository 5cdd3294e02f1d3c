"""Quantized keys and values against loops over single numbers in fp64, with dead slots full of NaN."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvrewrite.kernels.quantized.scheme import (
    FP8_MAX,
    KINDS,
    Scheme,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-50}
# All numbers that float8_e4m3fn has, by their definition: 4 bits of exponent with bias 7, 3 of mantissa, no infinity.
FP8 = sorted(
    {m / 8 * 2.0**-6 for m in range(8)} | {(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)}
)
FP8 = [x for x in FP8 if x <= FP8_MAX]


def kinds() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", KINDS)


def dtypes() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32, offset: float = 3.0) -> Tensor:
    """Numbers with channels of different size, as keys have them; the first channel lies far from 0."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(shape[-1], generator=generator) * 4 + 0.1
    middle = torch.randn(shape[-1], generator=generator) * offset
    middle[0] = 50.0
    return (torch.randn(*shape, generator=generator) * size + middle).to(dtype)


def with_dead(x: Tensor, seed: int, share: float = 0.3) -> tuple[Tensor, Tensor]:
    """x with NaN and inf in slots that are not live, and which are."""
    live = torch.rand(x.shape[:-1], generator=torch.Generator().manual_seed(seed)) >= share
    x = torch.where(live[..., None], x, float("nan"))
    x[..., 0] = torch.where(live, x[..., 0], float("inf"))
    return x, live


def codes_of(codes: Tensor, kind: str) -> Tensor:
    """Codes one to an element: integers, or for fp8 the numbers that they stand for."""
    if kind == "fp8":
        return codes.view(torch.float8_e4m3fn).double()
    if kind == "int8":
        return codes.double()
    low = [[int(b) % 16 for b in row] for row in codes.flatten(0, -2)]
    high = [[int(b) // 16 for b in row] for row in codes.flatten(0, -2)]
    return torch.tensor([a + b for a, b in zip(low, high)]).double().reshape(*codes.shape[:-1], -1)


def check_group(
    members: list[float], codes: list[float], params: list[float], kind: str, out: list[float], dtype: torch.dtype
) -> None:
    """One group: its live members, their codes, its parameters and what comes out."""
    if not members:
        assert all(p == 0 for p in params) and all(c == 0 for c in codes)
        return
    slack = ROUNDING[dtype]
    if kind == "fp8":
        top = max(abs(m) for m in members)
        assert params == [top]
        for m, c, o in zip(members, codes, out, strict=True):
            if top == 0:
                assert c == 0 and o == 0
                continue
            unit = abs(m) / top * FP8_MAX
            best = min(abs(unit - x) for x in FP8)
            assert abs(abs(c) - unit) <= best + 1e-3 and c * m >= 0
            assert abs(o - c / FP8_MAX * top) <= slack * abs(o) + 1e-30
            assert abs(o - m) <= max(abs(m) / 16, top / FP8_MAX * 2**-10) * 1.0001 + slack * abs(m)
        return
    levels = 15 if kind == "int4" else 255
    lo, hi = min(members), max(members)
    assert params == [lo, hi]
    for m, c, o in zip(members, codes, out, strict=True):
        assert c == int(c) and 0 <= c <= levels
        if lo == hi:
            assert c == 0 and o == m, "a group of equal values is exact"
            continue
        step = (hi - lo) / levels
        assert abs(c - (m - lo) / step) <= 0.5 + 2**-16 * max(abs(lo), abs(hi)) / (hi - lo)
        assert abs(o - m) <= step * 0.5 * 1.0001 + slack * max(abs(lo), abs(hi))
        assert lo <= o <= hi
        assert not (c == 0 and o != lo) and not (c == levels and o != hi), "ends are exact"


@kinds()
@dtypes()
def test_keys_against_loops(kind: str, dtype: torch.dtype) -> None:
    scheme = Scheme(kind, group=8)
    k, live = with_dead(draw(0, 2, 3, 40, 6, dtype=dtype), 1)
    k[0, 0, 8:16] = k[0, 0, 16:17]  # equal values
    live[0, 0, 8:16] = True
    k[0, 0, 16:17].zero_()
    live[0, 1, :8] = False  # a dead group
    live[0, 2] = False  # a dead head
    live[1, 0, :8] = torch.arange(8) == 3  # one live slot
    k = torch.where(live[..., None], torch.nan_to_num(k, nan=1.0, posinf=2.0), k)
    codes, params = quantize_keys(k, live, scheme)
    out = dequantize_keys(codes, params, scheme)
    assert codes.dtype == torch.uint8 and codes.shape == (2, 3, 40, 3 if kind == "int4" else 6)
    assert params.dtype == out.dtype == dtype and params.shape == (2, 3, 5, 6, 1 if kind == "fp8" else 2)
    assert out.shape == k.shape and torch.isfinite(out).all()
    single = codes_of(codes, kind)
    assert (single[~live] == 0).all()
    for b, h, g, d in itertools.product(range(2), range(3), range(5), range(6)):
        slots = [s for s in range(8 * g, 8 * g + 8) if live[b, h, s]]
        member, code, got = ([float(x[b, h, s, d]) for s in slots] for x in (k, single, out))
        check_group(member, code, params[b, h, g, d].tolist(), kind, got, dtype)


@kinds()
@dtypes()
@pytest.mark.parametrize(("d", "group", "expected"), [(12, 4, 4), (12, 32, 12), (10, 4, 2), (14, 13, 7)])
def test_values_against_loops(kind: str, dtype: torch.dtype, d: int, group: int, expected: int) -> None:
    scheme = Scheme(kind, group=group)
    assert scheme.value_group(d) == expected
    v, live = with_dead(draw(2, 2, 2, 7, d, dtype=dtype), 3)
    codes, params = quantize_values(v, live, scheme)
    out = dequantize_values(codes, params, scheme)
    assert codes.shape == (2, 2, 7, scheme.code_width(d)) and out.shape == v.shape
    assert params.shape == (2, 2, 7, d // expected, scheme.parameters) and params.dtype == out.dtype == dtype
    assert torch.isfinite(out).all()
    single = codes_of(codes, kind)
    for b, h, s, g in itertools.product(range(2), range(2), range(7), range(d // expected)):
        at = slice(g * expected, (g + 1) * expected)
        member, code, got = (x[b, h, s, at].double().tolist() if live[b, h, s] else [] for x in (v, single, out))
        assert live[b, h, s] or (single[b, h, s] == 0).all()
        check_group(member, code, params[b, h, s, g].tolist(), kind, got, dtype)


@kinds()
@dtypes()
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_again_is_the_same(kind: str, dtype: torch.dtype, offset: float) -> None:
    """Quantizing what was dequantized: same ends, same codes, same values, bit for bit."""
    scheme = Scheme(kind, group=16)
    k, live = with_dead(draw(4, 2, 2, 64, 33, dtype=dtype, offset=offset)[..., 1:], 5)
    for quantize, dequantize in ((quantize_keys, dequantize_keys), (quantize_values, dequantize_values)):
        codes, params = quantize(k, live, scheme)
        out = dequantize(codes, params, scheme)
        again, ends = quantize(out, live, scheme)
        assert torch.equal(ends, params)
        assert torch.equal(dequantize(again, ends, scheme)[live], out[live])
        if offset == 0.0:
            assert torch.equal(again, codes)


def test_far_channels_settle() -> None:
    """bf16 around 50 is coarser than int8 over a range of 1: codes may move once, the values never do."""
    scheme = Scheme("int8", group=32)
    k = (50 + torch.rand(1, 1, 64, 4, generator=torch.Generator().manual_seed(6))).bfloat16()
    live = torch.ones(1, 1, 64, dtype=torch.bool)
    out = dequantize_keys(*quantize_keys(k, live, scheme), scheme)
    assert (out.float() - k.float()).abs().max() <= 0.125  # half a step of the dtype at most
    for _ in range(3):
        again = dequantize_keys(*quantize_keys(out, live, scheme), scheme)
        assert torch.equal(again, out)


@kinds()
@dtypes()
def test_within_keeps_the_others(kind: str, dtype: torch.dtype) -> None:
    """Slots replaced inside the old ends, or dropped: nobody else's code changes, though the extremes are gone."""
    scheme = Scheme(kind, group=16)
    k = draw(7, 1, 2, 32, 8, dtype=dtype, offset=0.0)
    live = torch.ones(1, 2, 32, dtype=torch.bool)
    codes, params = quantize_keys(k, live, scheme)
    out = dequantize_keys(codes, params, scheme)
    replaced = int(out[0, 0, :16, 1].abs().argmax())  # an end of channel 1's first group
    dropped = (replaced + 1) % 16
    out[0, 0, replaced] = out[0, 0, (replaced + 2) % 16]
    live[0, 0, dropped] = False
    out[0, 0, dropped] = float("nan")
    again, ends = quantize_keys(out, live, scheme, within=params)
    others = [s for s in range(32) if s not in (replaced, dropped)]
    assert torch.equal(ends, params)
    assert torch.equal(dequantize_keys(again, ends, scheme)[0, 0, others], out[0, 0, others])
    alone = quantize_keys(out, live, scheme)[1]
    assert not torch.equal(alone, params), "without it the ends would have moved"
    # NaN: a group that starts anew; a newcomer outside widens the ends.
    fresh = params.clone()
    fresh[0, 0] = float("nan")
    _, ends = quantize_keys(out, live, scheme, within=fresh)
    assert torch.equal(ends[0, 0], alone[0, 0]) and torch.equal(ends[0, 1], params[0, 1])
    out[0, 1, 3] = 1000.0
    _, ends = quantize_keys(out, live, scheme, within=params)
    assert (ends[0, 1, 0, :, -1] == 1000).all() and torch.equal(ends[0, 1, 1], params[0, 1, 1])


@kinds()
def test_neighbouring_numbers(kind: str) -> None:
    """Groups of floats that differ in their last bits only: nothing comes out beyond the ends."""
    generator = torch.Generator().manual_seed(14)
    base = torch.randn(1, 512, generator=generator).repeat(4, 1).view(torch.int32)
    k = (base + torch.randint(0, 9, base.shape, generator=generator, dtype=torch.int32)).view(torch.float32)
    live, scheme = torch.ones(4, dtype=torch.bool), Scheme(kind, group=4)
    codes, params = quantize_keys(k, live, scheme)
    out = dequantize_keys(codes, params, scheme)
    assert torch.equal(quantize_keys(out, live, scheme)[1], params)
    assert (out.abs() <= k.abs().amax(0)).all() and (kind == "fp8" or (out.abs() >= k.abs().amin(0)).all())


@kinds()
def test_zeros_have_one_sign(kind: str) -> None:
    k, live = torch.tensor([[-0.0, 0.0], [0.0, -0.0]]), torch.ones(2, dtype=torch.bool)
    for quantize in (quantize_keys, quantize_values):
        assert not torch.signbit(quantize(k, live, Scheme(kind, group=2))[1]).any()
    assert not torch.signbit(quantize_keys(-k.abs(), live, Scheme(kind, group=2))[1]).any()


@kinds()
def test_within_of_an_empty_group(kind: str) -> None:
    scheme = Scheme(kind, group=4)
    k, live = torch.full((1, 1, 4, 2), float("nan")), torch.zeros(1, 1, 4, dtype=torch.bool)
    ends = torch.ones(1, 1, 1, 2, scheme.parameters)
    assert torch.equal(quantize_keys(k, live, scheme, within=ends)[1], ends)
    assert (quantize_keys(k, live, scheme, within=ends * float("nan"))[1] == 0).all()


@pytest.mark.parametrize(
    ("kind", "once", "bound"), [("int8", 0.0054, 0.025), ("int4", 0.079, 0.33), ("fp8", 0.026, 0.07)]
)
def test_drift_under_replacement(kind: str, once: float, bound: float) -> None:
    """One key stays while the 31 others of its group are replaced 2000 times (64 turnovers of a cache): how far it moves.

    Its code changes when a newcomer widens the ends, which becomes rare. Measured, root mean square: int8 0.0054 at first,
    0.022 at the end (0.074 if the ends were found anew each time); int4 0.079, 0.31 (1.37); fp8 0.026, 0.064 (0.33).
    """
    scheme = Scheme(kind, group=32)
    live = torch.ones(1, 1, 32, dtype=torch.bool)

    def run(steps: int, sticky: bool) -> float:
        generator = torch.Generator().manual_seed(8)
        k = torch.randn(1, 1, 32, 64, generator=generator).bfloat16()
        codes, params = quantize_keys(k, live, scheme)
        for step in range(steps):
            out = dequantize_keys(codes, params, scheme)
            out[0, 0, step % 31] = torch.randn(64, generator=generator).bfloat16()
            codes, params = quantize_keys(out, live, scheme, within=params if sticky else None)
        error = dequantize_keys(codes, params, scheme)[0, 0, 31].float() - k[0, 0, 31].float()
        return float(error.square().mean().sqrt())

    assert run(0, True) == pytest.approx(once, rel=0.05)
    drifted = run(2000, True)
    assert drifted <= bound and drifted < run(2000, False) / 2


@kinds()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_numbers(kind: str, dtype: torch.dtype) -> None:
    """Beyond what fp16 can hold, and so small that nothing but the range matters."""
    scheme = Scheme(kind, group=4)
    live = torch.ones(1, 4, dtype=torch.bool)
    for size in (1e30, 1e6, 1e-20):
        k = torch.tensor([-1.0, 0.25, 0.5, 1.0]).mul(size).to(dtype)[None, :, None].expand(1, 4, 2).contiguous()
        for quantize, dequantize in ((quantize_keys, dequantize_keys), (quantize_values, dequantize_values)):
            out = dequantize(*quantize(k, live, scheme), scheme)
            assert ((out - k).abs() / size).max() <= (0.08 if kind == "int4" else 0.04)


def test_errors_of_typical_keys() -> None:
    """The root mean square errors that the documentation may quote: normal keys, group 32, 128 channels, bf16."""
    k = torch.randn(1, 2, 512, 128, generator=torch.Generator().manual_seed(9)).bfloat16()
    live = torch.ones(1, 2, 512, dtype=torch.bool)
    for kind, bound in (("int8", 0.006), ("fp8", 0.026), ("int4", 0.085)):
        scheme = Scheme(kind)
        for quantize, dequantize in ((quantize_keys, dequantize_keys), (quantize_values, dequantize_values)):
            error = dequantize(*quantize(k, live, scheme), scheme).float() - k.float()
            assert error.square().mean().sqrt() < bound, kind
            assert error.square().mean().sqrt() > bound / 2, kind


@pytest.mark.parametrize(("kind", "sizes"), [("int8", (288, 72)), ("int4", (160, 40)), ("fp8", (272, 68))])
def test_bytes_of_a_slot(kind: str, sizes: tuple[int, int]) -> None:
    """What the table of the module says is what the tensors hold."""
    scheme = Scheme(kind)
    for d, size in zip((128, 32), sizes):
        assert scheme.key_bytes(d, 2) + scheme.value_bytes(d, 2) == size
        x, live = torch.zeros(1, 1, 64, d, dtype=torch.bfloat16), torch.ones(1, 1, 64, dtype=torch.bool)
        held = [*quantize_keys(x, live, scheme), *quantize_values(x, live, scheme)]
        assert sum(t.numel() * t.element_size() for t in held) == 64 * size
        assert Scheme(kind, 64).key_bytes(d, 2) < scheme.key_bytes(d, 2)


def test_head_dims_that_the_group_does_not_divide() -> None:
    expected = {
        64: 32,
        72: 24,
        80: 20,
        96: 32,
        100: 25,
        112: 28,
        128: 32,
        192: 32,
        256: 32,
        576: 32,
        16: 16,
        1: 1,
        37: 1,
    }
    assert {d: Scheme("int8").value_group(d) for d in expected} == expected


@kinds()
def test_batch_rows_are_independent(kind: str) -> None:
    scheme = Scheme(kind, group=8)
    k, live = with_dead(draw(10, 3, 2, 16, 8), 11)
    together = [*quantize_keys(k, live, scheme), *quantize_values(k, live, scheme)]
    for b in range(3):
        alone = [
            *quantize_keys(k[b : b + 1], live[b : b + 1], scheme),
            *quantize_values(k[b : b + 1], live[b : b + 1], scheme),
        ]
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, alone))


@kinds()
def test_no_slots(kind: str) -> None:
    scheme = Scheme(kind, group=8)
    k, live = torch.zeros(2, 2, 0, 8), torch.zeros(2, 2, 0, dtype=torch.bool)
    assert dequantize_keys(*quantize_keys(k, live, scheme), scheme).shape == (2, 2, 0, 8)
    assert dequantize_values(*quantize_values(k, live, scheme), scheme).shape == (2, 2, 0, 8)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'int2', expected one of int8, int4, fp8"):
        Scheme("int2")
    with pytest.raises(ValueError, match="quantize_group is 0"):
        Scheme("int8", 0)
    with pytest.raises(ValueError, match="head dim is 7"):
        Scheme("int4").code_width(7)
    with pytest.raises(ValueError, match="48 slots are not whole groups of 32"):
        quantize_keys(torch.zeros(1, 1, 48, 8), torch.ones(1, 1, 48, dtype=torch.bool), Scheme("int8"))


@pytest.mark.gpu
@kinds()
@dtypes()
def test_gpu_has_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    scheme = Scheme(kind)
    k, live = with_dead(draw(12, 2, 4, 256, 128, dtype=dtype), 13)
    for quantize, dequantize in ((quantize_keys, dequantize_keys), (quantize_values, dequantize_values)):
        here = quantize(k, live, scheme)
        there = quantize(k.cuda(), live.cuda(), scheme)
        assert torch.equal(here[0], there[0].cpu())
        same = [x.contiguous().view(torch.uint8) for x in (here[1], there[1].cpu())]
        assert torch.equal(*same)
        out = [x.contiguous().view(torch.uint8) for x in (dequantize(*here, scheme), dequantize(*there, scheme).cpu())]
        assert torch.equal(*out)
