"""Kernels for the linear layers of a few tokens, against float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from kvrewrite.kernels.linear import small as module
from kvrewrite.kernels.linear.small import (
    Config,
    Norm,
    dot_config,
    fma_config,
    rms_norm,
    small_gated_linear,
    small_linear,
)
from kvrewrite.ops import linear as linear_ops
from tests.support.products import pairwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":  # the interpreter's dot of bf16 is wrong
    DTYPES.append(torch.bfloat16)
ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
GROUPS = {"one": (37,), "q k v": (64, 16, 16), "q k v head": (40, 8, 8, 33), "tiny": (1, 1)}


def random_tensor(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def inputs(
    m: int, k: int, ns: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, list[Tensor], list[Any]]:
    """x, weights, and a bias for every other weight."""
    g = torch.Generator().manual_seed(seed)
    x = random_tensor(g, m, k, dtype=dtype)
    weights = [random_tensor(g, n, k, dtype=dtype, scale=k**-0.5) for n in ns]
    biases = [random_tensor(g, n, dtype=dtype) if i % 2 else None for i, n in enumerate(ns)]
    return x, weights, biases


def check(x: Tensor, weights: list[Tensor], biases: list[Any], config: Config | None = None) -> None:
    outs = small_linear(x, weights, biases, config=config)
    for out, w, b in zip(outs, weights, biases, strict=True):
        expected = linear(x.double(), w.double(), None if b is None else b.double())
        assert out.shape == expected.shape and out.dtype == x.dtype and out.is_contiguous()
        assert error(out, expected) < ERROR[x.dtype]
    again = small_linear(x, weights, biases, config=config)
    assert all(torch.equal(a, b) for a, b in zip(outs, again, strict=True))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("m", [1, 2, 3, 17, 64])
def test_linear(m: int, group: str) -> None:
    """Both kernels, every padding of the tokens, groups that do not fill their last block, K that no block divides."""
    check(*inputs(m, 72, GROUPS[group], torch.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 40])
def test_half_precision(m: int, dtype: torch.dtype) -> None:
    check(*inputs(m, 72, (21, 5), dtype))


@pytest.mark.parametrize("k", [1, 7, 16, 64, 130, 1024])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_widths(m: int, k: int) -> None:
    check(*inputs(m, k, (9, 20), torch.float32))


@pytest.mark.parametrize(("split", "k", "ns"), [(2, 96, (8, 260)), (4, 200, (40, 9, 20)), (8, 200, (17, 5))])
def test_split(split: int, k: int, ns: tuple[int, ...]) -> None:
    """Parts of K, some of them behind its end, in scratch that holds NaN at first."""
    x, weights, biases = inputs(5, k, ns, torch.float32)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        check(x, weights, biases, Config(32, 16, warps=4, stages=2, split=split))
        check(x, weights[:1], [None], Config(16, 32, warps=4, stages=2, split=split))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("config", [Config(1, 64, 2, 1, 4), Config(8, 32, 2, 3), Config(2, 128, 4, 1, 2)], ids=str)
@pytest.mark.parametrize("m", [1, 2])
def test_other_cuts(m: int, config: Config) -> None:
    check(*inputs(m, 136, (21, 5), torch.float32), config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 6])
def test_residual(m: int, dtype: torch.dtype) -> None:
    """Rounded twice, as linear and add one after the other are."""
    x, (w,), _ = inputs(m, 72, (21,), dtype)
    residual = random_tensor(torch.Generator().manual_seed(1), m, 21, dtype=dtype)
    bias = random_tensor(torch.Generator().manual_seed(2), 21, dtype=dtype)
    for b in (None, bias):
        (plain,) = small_linear(x, [w], [b])
        (out,) = small_linear(x, [w], [b], residual)
        assert torch.equal(out, plain + residual)
        (parts,) = small_linear(x, [w], [b], residual, Config(16, 16, 4, 2, split=2)) if m > 2 else (out,)
        expected = linear(x.double(), w.double(), None if b is None else b.double()) + residual.double()
        assert error(out, expected) < ERROR[dtype] and error(parts, expected) < ERROR[dtype]


@pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", linear_ops.ACTIVATIONS)
@pytest.mark.parametrize("m", [1, 2, 4])
def test_gated(m: int, activation: str, dtype: torch.dtype) -> None:
    """Also for gates far from zero, where exp overflows."""
    x, (gate, up), _ = inputs(m, 72, (37, 37), dtype)
    gate[0], gate[1] = 40 * x[0], -40 * x[0]
    act = linear_ops.ACTIVATIONS[activation]
    expected = act(linear(x.double(), gate.double())) * linear(x.double(), up.double())
    out = small_gated_linear(x, gate, up, activation)
    assert out.shape == (m, 37) and bool(out.isfinite().all())
    assert error(out[:, 2:], expected[:, 2:]) < 2 * ERROR[dtype] and error(out, expected) < 2 * ERROR[dtype]
    assert torch.equal(out, small_gated_linear(x, gate, up, activation))
    # The rounding of the unfused graph: the same linears, then the activation and the product each rounded.
    g, u = small_linear(x, [gate, up])
    steps = act(g.float()).to(dtype).float() * u.float()
    assert error(out, steps.to(dtype).double()) < (1e-6 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("m", [1, 2, 9])
def test_strided_and_batched(m: int) -> None:
    """x, residual as (B, 1, K) and with strides of something larger; results are dense."""
    x, weights, _ = inputs(m, 48, (21, 8), torch.float32)
    wide = torch.full((m, 1, 100), float("nan"), device=DEVICE)
    wide[:, 0, 16:64] = x
    for out, w in zip(small_linear(wide[..., 16:64], weights), weights, strict=True):
        assert out.shape == (m, 1, w.shape[0]) and error(out, linear(x.double(), w.double())[:, None]) < 1e-5
    residual = torch.zeros(m, 1, 50, device=DEVICE)[..., 3:24] + 1
    (out,) = small_linear(wide[..., 16:64], weights[:1], residual=residual)
    assert error(out, linear(x.double(), weights[0].double())[:, None] + 1) < 1e-5
    transposed = x.T.contiguous().T
    assert error(small_linear(transposed, weights[:1])[0], linear(x.double(), weights[0].double())) < 1e-5


def normed(x: Tensor, norm: Norm) -> Tensor:
    """The RMS norm in float64."""
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps) * norm.gain.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_norm(m: int, dtype: torch.dtype) -> None:
    """In front of every kind of launch, with rows of very different size, one of zeros, and strides of something larger."""
    x, weights, biases = inputs(m, 72, (21, 5, 8), dtype)
    x *= torch.tensor([30.0, 1e-3, 1.0, 0.0, 1.0], device=DEVICE, dtype=dtype)[:m, None]
    wide = torch.full((m, 1, 100), float("nan"), device=DEVICE, dtype=dtype)
    wide[:, 0, 16:88] = x
    gain = random_tensor(torch.Generator().manual_seed(1), 72, dtype=dtype) + 1
    norm = Norm(gain, 1e-5)
    exact = normed(x, norm)[:, None]
    got = small_linear(wide[..., 16:88], weights, biases, norm=norm)
    for out, w, b in zip(got, weights, biases, strict=True):
        expected = linear(exact, w.double(), None if b is None else b.double())
        assert out.shape == expected.shape and error(out, expected) < ERROR[dtype]
    residual = torch.ones(m, 1, 21, device=DEVICE, dtype=dtype)
    (out,) = small_linear(wide[..., 16:88], weights[:1], residual=residual, norm=norm)
    assert error(out, linear(exact, weights[0].double()) + 1) < ERROR[dtype]
    up = weights[0].flip(0).contiguous()
    out = small_gated_linear(wide[..., 16:88], weights[0], up, "silu", norm=norm)
    expected = linear_ops.ACTIVATIONS["silu"](linear(exact, weights[0].double())) * linear(exact, up.double())
    assert error(out, expected) < 2 * ERROR[dtype]
    assert torch.equal(out, small_gated_linear(wide[..., 16:88], weights[0], up, "silu", norm=norm))
    alone = rms_norm(wide[..., 16:88], norm)
    assert alone.shape == exact.shape and error(alone, exact) < ERROR[dtype]
    reference = linear_ops.rms_norm(x.cpu()[:, None], gain.cpu(), 1e-5)
    assert error(alone.cpu(), reference.double()) < (1e-6 if dtype == torch.float32 else 1e-3)


def test_nan_stays_in_its_row() -> None:
    """One token's NaN reaches neither the others nor anything through padding."""
    for m in (2, 5):
        x, weights, biases = inputs(m, 40, (9, 5), torch.float32)
        expected = small_linear(x, weights, biases)
        x[1] = float("nan")
        for got, want in zip(small_linear(x, weights, biases), expected, strict=True):
            rows = [i for i in range(m) if i != 1]
            assert bool(got[1].isnan().all()) and torch.equal(got[rows], want[rows])


def test_refusals() -> None:
    x, (w, v), _ = inputs(2, 16, (8, 6), torch.float32)
    with pytest.raises(ValueError, match="0 weights"):
        small_linear(x, [])
    with pytest.raises(ValueError, match="5 weights"):
        small_linear(x, [w] * 5)
    with pytest.raises(ValueError, match="65 tokens"):
        small_linear(x.new_zeros(65, 16), [w])
    with pytest.raises(ValueError, match="float64"):
        small_linear(x.double(), [w.double()])
    with pytest.raises(ValueError, match=r"weight \(16, 8\)"):
        small_linear(x, [w.T])
    with pytest.raises(ValueError, match="contiguous"):
        small_linear(x, [w.new_zeros(16, 8).T])
    with pytest.raises(ValueError, match="bias"):
        small_linear(x, [w], [v[0]])
    with pytest.raises(ValueError, match=r"gain \(6,\)"):
        small_linear(x, [w], norm=Norm(v[:, 0].contiguous(), 1e-6))
    with pytest.raises(ValueError, match="residual"):
        small_linear(x, [w], residual=x)
    with pytest.raises(ValueError, match="equal ones"):
        small_gated_linear(x, w, v, "silu")
    with pytest.raises(ValueError, match="'relu'"):
        small_gated_linear(x, w, w, "relu")


def test_configurations() -> None:
    """What the tables say for Llama-3.1-8B occupies the GPU; both sides agree on how much a launch takes."""
    assert module.MAX_WEIGHTS == linear_ops.MAX_WEIGHTS and set(module.ACTIVATIONS) == set(linear_ops.ACTIVATIONS)
    assert all(most <= module.MAX_ROWS for most in linear_ops.KERNEL_TOKENS.values())
    for rows in (3, 16, 32, 64):
        for columns in (4096, 6144, 7168, 28672, 128256):
            config = dot_config(rows, columns, torch.bfloat16, gated=False)
            assert -(-columns // config.block_n) * config.split >= module.FILL
    assert (
        fma_config(4096, torch.bfloat16, gated=False).block_k
        == fma_config(4096, torch.float32, gated=False).block_k * 2
    )


def draw(seed: int) -> None:
    rng = random.Random(seed)
    m, k = rng.choice([1, 2, rng.randint(3, 64)]), rng.choice([rng.randint(1, 300), 64 * rng.randint(1, 6)])
    ns = tuple(rng.randint(1, 150 if DEVICE == "cuda" else 40) for _ in range(rng.randint(1, 4)))
    dtype = rng.choice(DTYPES)
    x, weights, biases = inputs(m, k, ns, dtype, seed)
    check(x, weights, biases)
    activation = rng.choice(list(linear_ops.ACTIVATIONS))
    up = weights[0] * 0.5 + 0.1
    expected = linear_ops.ACTIVATIONS[activation](linear(x.double(), weights[0].double())) * linear(
        x.double(), up.double()
    )
    assert error(small_gated_linear(x, weights[0], up, activation), expected) < 2 * ERROR[dtype]


@pytest.mark.parametrize("seed", range(5))
def test_random_shapes(seed: int) -> None:
    draw(seed)


@pytest.mark.gpu
def test_random_shapes_on_the_gpu() -> None:
    for seed in range(100, 200):
        draw(seed)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 8, 32, 64])
def test_llama_shapes_in_a_cuda_graph(m: int) -> None:
    """bf16 at the sizes of Llama-3.1-8B, captured and replayed with other numbers."""
    g = torch.Generator().manual_seed(0)
    x = random_tensor(g, m, 1, 4096, dtype=torch.bfloat16)
    weights = [random_tensor(g, n, 4096, dtype=torch.bfloat16, scale=1 / 64) for n in (4096, 1024, 1024, 1024)]
    small_linear(x, weights)
    small_gated_linear(x, weights[0], weights[0], "silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = small_linear(x, weights)
        gated = small_gated_linear(x, weights[0], weights[0], "silu")
    x.copy_(random_tensor(g, m, 1, 4096, dtype=torch.bfloat16))
    graph.replay()
    for out, w in zip(outs, weights, strict=True):
        assert error(out, linear(x.double(), w.double())) < ERROR[x.dtype]
    y = linear(x.double(), weights[0].double())
    assert error(gated, torch.nn.functional.silu(y) * y) < 2 * ERROR[x.dtype]
