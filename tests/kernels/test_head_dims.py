"""Every head dim: each op that has a kernel against fp64, on a GPU; a few dims in Triton's interpreter."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

from kvrewrite.kernels import pages
from kvrewrite.kernels.limits import FEWEST_CHANNELS
from kvrewrite.kernels.scores.reference import pool_window
from kvrewrite.ops.dispatch import kernels
from tests.support import head_dims
from tests.support.head_dims import DIMS, SMALL_SHAPES, UNEQUAL, Found, sweep

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def wrong(found: list[Found]) -> list[Found]:
    assert found
    return [x for x in found if not x.right]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "dv"), [*((d, d) for d in DIMS), *UNEQUAL])
def test_on_a_gpu(d: int, dv: int, dtype: torch.dtype) -> None:
    found = list(sweep(d, dv, dtype, "cuda", seed=d))
    assert not wrong(found)
    missing = [x for x in found if x.missing and not x.op.startswith(("token, ", "update, "))]  # some ways to quantize
    if dtype != torch.float32 and min(d, dv) < FEWEST_CHANNELS:  # chunks go to the reference, which says why
        assert missing and all(f"head dims from {FEWEST_CHANNELS} on" in x.missing for x in missing), missing
    else:
        assert not missing


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU above")
@pytest.mark.parametrize(
    ("d", "dv", "dtype"),
    [
        (1, 1, torch.float32),
        (17, 40, torch.float16),
        pytest.param(40, 40, torch.float16, marks=pytest.mark.thorough),
        (100, 24, torch.float32),
    ],
)
def test_in_the_interpreter(d: int, dv: int, dtype: torch.dtype) -> None:
    found = list(sweep(d, dv, dtype, "cpu", SMALL_SHAPES, quantized=False))
    assert not wrong(found)
    assert not [x for x in found if x.missing]


@pytest.mark.parametrize(("added", "right"), [(0.0, True), (1e-6, True), (1e-3, False)])
def test_log_sum_exps_are_compared_with_all_of_them(added: float, right: bool) -> None:
    """The one nearest to 0 may be off by what others are rounded by, and not by more."""

    def off(lse: torch.Tensor) -> torch.Tensor:
        assert lse.dtype == torch.float32 and lse.abs().max() > 1
        lse.view(-1)[lse.abs().argmin()] += added
        return lse

    def run(a: head_dims.Layer) -> dict[str, torch.Tensor]:
        with kernels("reference"):
            found = head_dims.token(a, turned=False)
        return {**found, "lse": off(found["lse"])} if next(calls) == 0 else found  # the kernel's is the first

    calls = itertools.count()
    layer = head_dims.Layer(head_dims.SHAPES[2], 256, 8, torch.float32, "cpu", 256)
    found = head_dims.against_exact("token", "token", run, layer)
    assert found.right == right and next(calls) == 3

    def quantized(*given: object) -> tuple[torch.Tensor, ...]:
        with kernels("reference"):
            out, lse, mass = torch.ops.kvrewrite.decode_attention_quantized(*given)
        return out, off(lse), mass

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(head_dims, "ops", types.SimpleNamespace(decode_attention_quantized=quantized))
        found = head_dims.quantized_attention("int8", 256, 8, torch.float32, "cpu", 256)
    assert found.right == right


def kept(scores: torch.Tensor, budget: int, mode: str, device: str) -> set[tuple[int, int]]:
    """What (head, position) of (1, Hkv, T) scores Ada-KV keeps: heads share budgets, the newest 32 stay."""
    _, heads, t = scores.shape
    width = -(-t // 64)
    table = torch.arange(1, 1 + heads * width, dtype=torch.int32, device=device).view(1, heads, width)
    pools = [torch.zeros(1 + heads * width, 64, *rest, device=device) for rest in ((8,), (8,), ())]
    places = torch.zeros(1 + heads * width, 64, 2, dtype=torch.int32, device=device)
    lens = torch.zeros(1, heads, dtype=torch.int32, device=device)
    index = torch.arange(t, device=device)[None]
    k = torch.zeros(1, heads, t, 8, device=device)
    valid, recent = (torch.tensor([n], dtype=torch.int32, device=device) for n in (t, 32))
    keep, floor = lens + budget, torch.tensor([0.2], dtype=torch.float64, device=device)
    with kernels(mode):
        torch.ops.kvrewrite.cache_update(
            k, k, scores.to(device), None, index, index, valid, keep, recent, *pools, places, table, lens, 0, 0, 0, None, None,
            floor, None, None, None,
        )  # fmt: skip
    held = pages.read(places, table)[0, :, :, 0]
    return {(h, int(x)) for h in range(heads) for x in held[h, : int(lens[0, h])]}


@pytest.mark.gpu
@pytest.mark.parametrize(("spread", "seed"), [(1.0, 0), (1.0, 1), (1.0, 2), (1e-3, 0), (1e-3, 1)])
def test_ada_kv_at_40_heads_of_8(spread: float, seed: int) -> None:
    """By the same scores the update keeps what the reference does; by the kernels' scores what those of fp64 say, unless they are
    closer to each other than fp32 rounds (spread 1e-3), where the reference's own fp32 scores say something else, too."""
    g = torch.Generator().manual_seed(seed)
    h, hkv, t, d = 40, 8, 600, 128
    q, k = spread * torch.randn(1, h, t, d, generator=g).cuda(), torch.randn(1, hkv, t, d, generator=g).cuda()
    positions, valid = torch.arange(t, device="cuda")[None], torch.tensor([t], dtype=torch.int32, device="cuda")
    table, lens = (torch.zeros(1, hkv, *rest, dtype=torch.int32, device="cuda") for rest in ((1,), ()))
    empty, places = torch.zeros(1, 64, d, device="cuda"), torch.zeros(1, 64, 2, dtype=torch.int32, device="cuda")
    rest = (places, table, lens, positions, valid)
    options = (d**-0.5, 0.0, 0, 0)
    lse = torch.ops.kvrewrite.cached_attention(q, k, k, None, empty, empty, *rest, None, None, None, *options)[1]
    newest = positions >= t - 32
    mass = torch.ops.kvrewrite.observe(q, k, lse, newest, None, empty, *rest, None, None, *options, None, 32)[..., 64:]
    mine = pool_window(mass, valid, 32, 7, True)
    logits = q[:, :, -32:].double() @ k.double().repeat_interleave(h // hkv, 1).mT * d**-0.5
    logits = logits.masked_fill(positions > positions[:, -32:].mT, float("-inf"))
    exact = pool_window(logits.softmax(-1).view(1, hkv, -1, t).sum(2), valid, 32, 7, True)
    assert (mine - exact).norm() <= 2e-6 * exact.norm()
    assert kept(mine, 128, "fused", "cuda") == kept(mine, 128, "reference", "cpu")
    if spread == 1.0:
        assert kept(mine, 128, "fused", "cuda") == kept(exact.float(), 128, "reference", "cpu")
