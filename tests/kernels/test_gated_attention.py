"""The Attention-Gate kernel against the torch reference in fp64: on the GPU, elsewhere in Triton's interpreter."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvrewrite.kernels.attention.gated import gated_attention
from kvrewrite.kernels.groups import At, Logits, Slots, Tokens
from tests.kernels.test_column_mass import DEVICE, ERROR, Problem, error, problem
from tests.support.products import covering


def run(p: Problem, **changed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's results; it gets the positions of cached keys only where they matter."""
    located = p.options["window"] or p.options["chunk"] or p.alibi is not None
    slots = Slots(p.k_cache, p.v_cache, p.lens, p.cache_pos if located else None)
    logits = Logits(p.sinks, p.alibi, p.hidden, **p.options)._replace(**changed)
    return gated_attention(Tokens(p.q, p.k, p.v), slots, At(p.positions, p.valid), logits)


def check(p: Problem, twice: bool = DEVICE == "cuda") -> None:
    """Output and log-sum-exp of real rows against the oracle's; and the same bits twice, which the interpreter, that runs one
    program after the other, gives anyway."""
    want, want_lse = p.attend()
    got, lse = run(p)
    assert got.shape == want.shape and got.transpose(1, 2).is_contiguous() and got.dtype == p.q.dtype
    real = (torch.arange(p.q.shape[2], device=DEVICE) < p.valid[:, None])[:, None].expand(lse.shape)
    assert error(got[real], want[real]) < ERROR[p.q.dtype]
    assert (lse - want_lse)[real].abs().max() < (1e-4 if p.q.dtype == torch.float32 else 2e-2)
    assert not got.isnan().any() and not lse.isnan().any()
    again, lse_again = run(p) if twice else (got, lse)
    assert torch.equal(got, again) and torch.equal(lse, lse_again)


@covering({("group", "d", "dv"): 1, "dtype": 3}, apart=lambda case: case["dtype"] == torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group,d,dv", [(1, 16, 16), (4, 64, 64), (7, 24, 24), (2, 96, 96), (2, 48, 32), (2, 16, 96)])
def test_matches_reference(dtype: torch.dtype, group: int, d: int, dv: int) -> None:
    """Half of the new tokens are hidden."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter's dot is wrong in bf16")
    check(problem(group=group, d=d, dv=dv, dtype=dtype, hide=0.5))


@pytest.mark.parametrize("hide", [1e-9, 0.1, 0.6, 0.95, 1.0])
def test_shares(hide: float) -> None:
    """From nothing hidden to everything, over several blocks of queries and keys."""
    check(
        problem(b=1, hkv=1, t=210, c=70, d=16, lens=[66], valid=[203], hide=hide), twice=DEVICE == "cuda" or hide == 0.6
    )


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"window": 9},
        {"chunk": 16},
        {"window": 30, "chunk": 16},
        {"alibi": True},
        {"sinks": True},
        {"sinks": True, "window": 9, "softcap": 5.0, "alibi": True},
    ],
)
def test_options(options: dict[str, Any]) -> None:
    """What changes logits and masks; also where blocks of queries begin behind the window."""
    check(problem(hide=0.5, **options))
    check(problem(b=1, hkv=1, t=190, c=64, d=16, hide=0.5, **options))


def test_nothing_live() -> None:
    """Empty heads, one slot, one token, rows without a token, no cache."""
    check(problem(lens=[0, 1, 64, 0], valid=[40, 1], hide=0.5))
    check(problem(t=1, valid=[1, 1], hide=0.5))
    check(problem(c=0, hide=0.5))
    check(problem(c=0, hide=1.0))
    p = problem(hide=0.5)
    p.valid[1] = 0
    check(p)


def test_refusals() -> None:
    """What there is no kernel for."""
    p = problem(hide=0.5)
    with pytest.raises(ValueError, match="float64"):
        run(replace(p, q=p.q.double()))
    with pytest.raises(ValueError, match="scale"):
        run(p, scale=-1.0)
    with pytest.raises(ValueError, match="cache_pos"):
        run(p, window=4)


def random_case(seed: int, largest: int) -> None:
    """A random shape with random options."""
    dice = random.Random(seed)
    dtype = dice.choice([torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
    p = problem(
        b=dice.randint(1, 3), hkv=dice.randint(1, 3), group=dice.choice([1, 2, 3, 4, 7]), t=dice.randint(1, largest),
        c=64 * dice.randint(0, largest // 64), d=dice.choice([16, 24, 32, 40, 64]), dv=dice.choice([None, 16, 40]),
        dtype=dtype, hide=dice.choice([1e-9, 0.4, 0.9]), alibi=dice.random() < 0.2, sinks=dice.random() < 0.2,
        softcap=dice.choice([0.0, 0.0, 3.0]), window=dice.choice([0, 0, 17]), chunk=dice.choice([0, 0, 32]), seed=seed,
    )  # fmt: skip
    check(p)


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(seed: int) -> None:
    """A few anywhere."""
    random_case(seed, 140)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100, 200))
def test_random_shapes_gpu(seed: int) -> None:
    """Many on the GPU."""
    random_case(seed, 700)
