"""The column-mass kernel against the torch reference in fp64: on the GPU, elsewhere in Triton's interpreter."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kvrewrite.kernels.attention import reference
from kvrewrite.kernels.attention.column_mass import column_mass
from kvrewrite.kernels.groups import At, KeySlots, Logits, Watch
from kvrewrite.kernels.limits import split_width
from tests.support.flat import flat
from tests.support.products import covering

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAN = float("nan")


@dataclass
class Problem:
    """New tokens and a cache, as the kernels get them: strided, with NaN in everything that is not live."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lens: Tensor
    cache_pos: Tensor
    positions: Tensor
    valid: Tensor
    sinks: Tensor | None
    alibi: Tensor | None
    hidden: Tensor | None
    options: dict[str, Any]

    def oracle(self, own: bool = True) -> dict[str, Any]:
        """The arguments of the reference: [cache, new tokens] in fp64."""
        b, hkv, t, _ = self.k.shape
        c = self.k_cache.shape[2]
        cached = torch.arange(c, device=DEVICE) < self.lens[..., None]
        arriving = (torch.arange(t, device=DEVICE) < self.valid[:, None])[:, None].expand(b, hkv, t)
        pos = torch.cat([self.cache_pos.long(), self.positions[:, None].expand(b, hkv, t)], dim=2)
        hidden = None if self.hidden is None else torch.nn.functional.pad(self.hidden, (c, 0))
        return {
            "k": torch.cat([self.k_cache, self.k], dim=2).double(),
            "q_pos": self.positions,
            "k_pos": pos,
            "live": torch.cat([cached, arriving], dim=2),
            "alibi": self.alibi,
            "hidden": hidden,
            **self.options,
        }

    def attend(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the reference in fp64."""
        values = torch.cat([self.v_cache, self.v], dim=2).double()
        return flat(reference.attend)(q=self.q.double(), v=values, sinks=self.sinks, own=True, **self.oracle())


def problem(
    *,
    b: int = 2,
    hkv: int = 2,
    group: int = 2,
    t: int = 40,
    c: int = 64,
    d: int = 32,
    dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    lens: list[int] | None = None,
    valid: list[int] | None = None,
    hide: float = 0.0,
    alibi: bool = False,
    sinks: bool = False,
    softcap: float = 0.0,
    window: int = 0,
    chunk: int = 0,
    seed: int = 0,
) -> Problem:
    """Random inputs. lens and valid: of all heads and rows in order, drawn where not given; hide: share of hidden tokens."""
    gen, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    h, dv = hkv * group, dv or d

    def tokens(heads: int, width: int) -> Tensor:  # (B, heads, T, width), a view of a projection
        return torch.randn(b, t, heads, width, generator=gen).to(DEVICE, dtype).transpose(1, 2)

    q, k, v = tokens(h, d), tokens(hkv, d), tokens(hkv, dv)
    lens = lens or [dice.randint(0, c) for _ in range(b * hkv)]
    valid = valid or [dice.randint(1, t) for _ in range(b)]
    live = torch.tensor(lens, dtype=torch.int32).view(b, hkv)
    caches = [torch.randn(b, hkv, c, width, generator=gen).to(dtype) for width in (d, dv)]
    for cache in caches:
        cache[torch.arange(c) >= live[..., None]] = NAN
    real = torch.tensor(valid, dtype=torch.int32)
    beyond = (torch.arange(t) >= real[:, None]).to(DEVICE)
    for x in (q, k, v):
        x.transpose(1, 2)[beyond] = NAN
    start = torch.tensor([[c + 3 + 7 * i] for i in range(b)])
    cache_pos = torch.stack([torch.randperm(c + 3, generator=gen)[:c] for _ in range(b * hkv)]) if c else torch.zeros(0)
    lens_view = torch.stack([live, live * 0], dim=-1).to(DEVICE)[..., 0]  # a view as of one layer of many
    hidden = (torch.rand(b, t, hkv, generator=gen) < hide).to(DEVICE).transpose(1, 2) if hide else None
    return Problem(
        q, k, v, *(x.to(DEVICE) for x in caches), lens_view,
        cache_pos.view(b, hkv, c).to(DEVICE, torch.int32), (start + torch.arange(t)).to(DEVICE), real.to(DEVICE),
        torch.randn(h, generator=gen).to(DEVICE) if sinks else None,
        (2.0 ** -torch.arange(1, h + 1)).to(DEVICE) if alibi else None, hidden,
        {"scale": d**-0.5, "softcap": softcap, "window": window, "chunk": chunk},
    )  # fmt: skip


def error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def check(p: Problem, *, newest: int = 0, above: bool = False, weights: str = "ones", seed: int = 0) -> None:
    """The kernel's result against the oracle's, and the same bits twice."""
    gen = torch.Generator().manual_seed(seed)
    b, _, t, _ = p.q.shape
    _, lse = p.attend()
    index = torch.arange(t, device=DEVICE)
    real = index < p.valid[:, None]
    rows = torch.ones(b, t, device=DEVICE)
    if weights == "some":
        rows = (torch.rand(b, t, generator=gen) < 0.5).to(DEVICE).float() * torch.rand(b, t, generator=gen).to(DEVICE)
    threshold = (1.0 / (p.positions + 1)).float() if above else None
    counted = torch.where(real, rows, 0.0)
    if newest:
        counted = torch.where(index >= p.valid[:, None] - newest, counted, 0.0)
    clean = torch.where(real[:, None], lse, 0.0)
    q = p.q.transpose(1, 2)
    q[counted == 0] = NAN  # rows that don't count may hold anything
    lse = torch.where((counted == 0)[:, None], NAN, clean)
    want = flat(reference.column_mass)(q=p.q.double(), lse=clean.double(), rows=counted, above=threshold, **p.oracle())
    position_free = not (p.options["window"] or p.options["chunk"] or p.alibi is not None)
    watch = Watch(p.q, p.k, lse, rows, threshold, newest)
    slots = KeySlots(p.k_cache, p.lens, None if position_free else p.cache_pos)
    arguments = (watch, slots, At(p.positions, p.valid), Logits(alibi=p.alibi, hidden=p.hidden, **p.options))
    got = column_mass(*arguments)
    assert got.shape == want.shape and got.dtype == torch.float32
    if above and p.q.dtype != torch.float32:
        assert (got - want).abs().sum() <= 2e-3 * want.sum() + 1  # a weight beside its threshold may go either way
    else:
        assert error(got, want) < ERROR[p.q.dtype]
    assert torch.equal(got[want == 0], want[want == 0])
    assert torch.equal(got, column_mass(*arguments))


@covering({("group", "d"): 1, "dtype": 3}, apart=lambda case: case["dtype"] == torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group,d", [(1, 16), (4, 64), (7, 24), (2, 96)])
def test_matches_reference(dtype: torch.dtype, group: int, d: int) -> None:
    """All rows count: H2O."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter's dot is wrong in bf16")
    check(problem(group=group, d=d, dtype=dtype))


def test_many_rows_stream_head_by_head() -> None:
    """More query rows than are flattened: the two loops of blocks with and without a causal mask."""
    check(problem(b=1, hkv=1, t=210, c=70, d=16, valid=[201], lens=[66]))
    check(problem(b=1, hkv=1, t=210, c=70, d=16, valid=[201], lens=[66], hide=0.5, window=40, alibi=True))
    check(problem(b=1, hkv=2, t=150, c=64, d=16, hide=0.5), weights="some")
    check(problem(b=1, hkv=1, t=140, c=64, d=64, dtype=torch.float16))


@pytest.mark.parametrize("newest", [1, 5, 32])
def test_newest_rows(newest: int) -> None:
    """SnapKV and TOVA: only the last rows count; one batch row has fewer than these."""
    check(problem(t=70, valid=[70, 3]), newest=newest)
    check(problem(b=1, t=200, c=0, d=16, valid=[190]), newest=newest, weights="some")


def test_newest_rows_head_by_head() -> None:
    """NACL: more of the last rows than are flattened."""
    check(problem(b=2, hkv=1, t=260, c=64, d=16, valid=[255, 140]), newest=150)


def test_counts_above_threshold() -> None:
    """Scissorhands: a row's weights above its threshold count as 1."""
    check(problem(), above=True)
    check(problem(b=1, hkv=1, t=150, d=16), above=True, weights="some")


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"window": 9},
        {"chunk": 16},
        {"window": 30, "chunk": 16},
        {"alibi": True},
        {"hide": 0.5},
        {"hide": 1.0, "window": 9, "softcap": 5.0},
    ],
)
def test_options(options: dict[str, Any]) -> None:
    """What changes logits and masks."""
    check(problem(**options))


def test_nothing_live() -> None:
    """Empty heads, one slot, one token, rows without a token, no cache."""
    check(problem(lens=[0, 1, 64, 0], valid=[40, 1]))
    check(problem(t=1, valid=[1, 1]))
    check(problem(c=0))
    p = problem()
    p.valid[1] = 0
    check(p)


def test_boolean_rows() -> None:
    """Weights may be booleans."""
    p = problem()
    rows = torch.arange(40, device=DEVICE).expand(2, 40) % 3 == 0
    lse = torch.where((torch.arange(40, device=DEVICE) < p.valid[:, None])[:, None], p.attend()[1], 0.0)
    tail = (KeySlots(p.k_cache, p.lens), At(p.positions, p.valid), Logits(**p.options))
    got, want = (column_mass(Watch(p.q, p.k, lse, r), *tail) for r in (rows, rows.float()))
    assert torch.equal(got, want)


def test_widths_are_split() -> None:
    """Head dims as two powers of two."""
    assert [split_width(d) for d in (8, 16, 64, 80, 96, 112, 128, 192, 256)] == [
        (16, 0), (16, 0), (64, 0), (64, 16), (64, 32), (64, 64), (128, 0), (128, 64), (256, 0)
    ]  # fmt: skip


def test_refusals() -> None:
    """What there is no kernel for."""
    p = problem()
    lse, rows = torch.zeros(2, 4, 40, device=DEVICE), torch.ones(2, 40, device=DEVICE)
    slots, at = KeySlots(p.k_cache, p.lens), At(p.positions, p.valid)
    with pytest.raises(ValueError, match="float64"):
        column_mass(Watch(p.q.double(), p.k.double(), lse, rows), slots, at, Logits(**p.options))
    with pytest.raises(ValueError, match="cache_pos"):
        column_mass(Watch(p.q, p.k, lse, rows), slots, at, Logits(**{**p.options, "window": 4}))


def random_case(seed: int, largest: int) -> None:
    """A random shape with random options."""
    dice = random.Random(seed)
    dtype = dice.choice([torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
    p = problem(
        b=dice.randint(1, 3), hkv=dice.randint(1, 3), group=dice.choice([1, 2, 3, 4, 7]), t=dice.randint(1, largest),
        c=64 * dice.randint(0, largest // 64), d=dice.choice([16, 24, 32, 40, 64]), dtype=dtype,
        hide=dice.choice([0.0, 0.0, 0.4]), alibi=dice.random() < 0.2, softcap=dice.choice([0.0, 0.0, 3.0]),
        window=dice.choice([0, 0, 17]), chunk=dice.choice([0, 0, 32]), seed=seed,
    )  # fmt: skip
    check(p, newest=dice.choice([0, 0, 1, 8, 100]), weights=dice.choice(["ones", "some"]), seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(seed: int) -> None:
    """A few anywhere."""
    random_case(seed, 140)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100, 200))
def test_random_shapes_gpu(seed: int) -> None:
    """Many on the GPU."""
    random_case(seed, 700)
