"""Chunk attention's kernels against kernels/attention/reference.py, in the interpreter or on a GPU."""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from kvrewrite.kernels.attention import chunk as kernel
from kvrewrite.kernels.attention import reference
from kvrewrite.kernels.attention.chunk import Config, choose_route
from kvrewrite.kernels.groups import Logits, Placed, Tokens
from tests.support.flat import flat

chunk_attention, portable = flat(kernel.chunk_attention), flat(kernel.portable)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # the interpreter's tl.dot has no bf16
]
SMALL = Config(16, 16, 4, 2)


def call(
    b: int = 1,
    h: int = 2,
    hkv: int = 1,
    t: int = 21,
    c: int = 64,
    d: int = 32,
    dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    lens: list[list[int]] | None = None,
    valid: list[int] | None = None,
    sinks: bool = False,
    alibi: bool = False,
    hidden: float = 0.0,
    softcap: float = 0.0,
    window: int = 0,
    chunk: int = 0,
    gaps: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of chunk_attention: strided new tokens, caches whose dead slots are NaN, cached slots in random order."""
    dv = d if dv is None else dv
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    live = torch.tensor(lens) if lens is not None else torch.full((b, hkv), c)
    real = torch.tensor(valid) if valid is not None else torch.full((b,), t)
    q, k, v = (normal(b, t, n).to(dtype) for n in (h * d, hkv * d, hkv * dv))
    # Cached positions come before the new tokens', in any order, with holes where tokens were evicted.
    steps = torch.randint(1, gaps + 1, (b, t), generator=g).cumsum(1)
    positions = steps + 2 * c
    slots = torch.stack([torch.randperm(2 * c + 1, generator=g)[:c] for _ in range(b * hkv)]).view(b, hkv, c)
    k_cache, v_cache = normal(b, hkv, c, d), normal(b, hkv, c, dv)
    dead = torch.arange(c) >= live[..., None]
    padding = torch.arange(t) >= real[:, None]
    for x in (k_cache, v_cache):
        x[dead] = float("nan")
    for x in (q, k, v):
        x[padding] = float("nan")
    wide_lens = (
        torch.stack([live, live], dim=-1).int().to(DEVICE)
    )  # as the caches have them: the last stride is the layers'
    placed = bool(window or chunk or alibi)
    return {
        "q": q.to(DEVICE).view(b, t, h, d).transpose(1, 2),
        "k": k.to(DEVICE).view(b, t, hkv, d).transpose(1, 2),
        "v": v.to(DEVICE).view(b, t, hkv, dv).transpose(1, 2),
        "k_cache": k_cache.to(DEVICE, dtype),
        "v_cache": v_cache.to(DEVICE, dtype),
        "lens": wide_lens[..., 0],
        "cache_pos": slots.int().to(DEVICE) if placed else None,
        "positions": positions.to(DEVICE),
        "valid": real.int().to(DEVICE),
        "sinks": normal(h).to(DEVICE) if sinks else None,
        "alibi": (2.0 ** -torch.arange(1, h + 1)).to(DEVICE) if alibi else None,
        "hidden": (torch.rand(b, hkv, t, generator=g) < hidden).to(DEVICE) if hidden else None,
        "scale": d**-0.5,
        "softcap": softcap,
        "window": window,
        "chunk": chunk,
    }


def expected(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The reference in float64."""
    b, _, t, _ = a["q"].shape
    hkv, c = a["k_cache"].shape[1:3]
    cached = torch.arange(c, device=DEVICE) < a["lens"][..., None]
    real = (torch.arange(t, device=DEVICE) < a["valid"][:, None])[:, None].expand(b, hkv, t)
    slots = (
        torch.zeros(b, hkv, c, device=DEVICE, dtype=torch.int64) if a["cache_pos"] is None else a["cache_pos"].long()
    )
    hidden = None if a["hidden"] is None else torch.nn.functional.pad(a["hidden"], (c, 0))
    keys, values = (torch.cat([a[f"{x}_cache"], a[x]], 2).double() for x in "kv")
    places = torch.cat([slots, a["positions"][:, None].expand(b, hkv, t)], 2)
    logits = Logits(**{name: a[name] for name in Logits._fields} | {"hidden": hidden})
    placed = Placed(a["positions"], places, torch.cat([cached, real], 2))
    return reference.attend(Tokens(a["q"].double(), keys, values), placed, logits, own=True)


def check(a: dict[str, Any], got: tuple[Tensor, Tensor]) -> None:
    """out and LSE of the real rows are the reference's; rows of padding are 0 and -inf."""
    (out, lse), (want, want_lse) = got, expected(a)
    b, h, t, _ = a["q"].shape
    dtype = a["q"].dtype
    assert out.shape == want.shape and out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert lse.shape == (b, h, t) and lse.dtype == torch.float32 and lse.is_contiguous()
    real = (torch.arange(t, device=DEVICE) < a["valid"][:, None])[:, None].expand(b, h, t)
    assert torch.equal(out[~real], torch.zeros_like(out[~real]))
    assert torch.isneginf(lse[~real]).all()
    out, lse, want, want_lse = out[real].double(), lse[real], want[real].double(), want_lse[real]
    assert not out.isnan().any()
    if out.numel():
        assert (out - want).norm() <= TOLERANCE[dtype] * want.norm()
    blind = torch.isneginf(want_lse)
    assert torch.equal(torch.isneginf(lse), blind) and not out[blind].any()
    torch.testing.assert_close(lse[~blind], want_lse[~blind], atol=2e-5 if dtype == torch.float32 else 2e-3, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {"h": 4, "hkv": 1, "t": 37},
        {"b": 2, "h": 14, "hkv": 2, "t": 5, "d": 16, "lens": [[64, 0], [1, 33]]},
        {"t": 1, "lens": [[64]]},
        {"t": 1, "lens": [[0]]},
        {"t": 33, "c": 0},
        {"b": 3, "t": 20, "lens": [[17], [64], [0]], "valid": [20, 0, 3]},
        {"d": 48, "dv": 32, "t": 18},
        {"d": 24, "dv": 40, "t": 18, "lens": [[50]]},
        {"d": 8, "t": 17},
    ],
)
def test_shapes(shape: dict[str, Any], dtype: torch.dtype) -> None:
    a = call(**shape, dtype=dtype)
    check(a, portable(**a, config=SMALL))
    if dtype == torch.float32:
        check(a, chunk_attention(**a))


@pytest.mark.parametrize(
    "options",
    [
        {"sinks": True},
        {"softcap": 3.0},
        {"softcap": 50.0, "window": 30},
        {"window": 1},
        {"window": 7, "lens": [[40]]},
        {"window": 130, "gaps": 9},
        {"chunk": 16},
        {"chunk": 200, "sinks": True},
        {"alibi": True},
        {"alibi": True, "window": 9, "softcap": 2.0},
        {"hidden": 0.5},
        {"hidden": 1.0, "lens": [[0]]},
        {"hidden": 0.3, "window": 12, "valid": [29]},
        {"hidden": 0.3, "sinks": True, "chunk": 33, "softcap": 5.0, "alibi": True},
    ],
)
def test_options(options: dict[str, Any]) -> None:
    a = call(h=4, hkv=2 if "lens" not in options else 1, t=40, **options)
    check(a, portable(**a, config=SMALL))
    check(a, portable(**a, config=Config(32, 16, 4, 2), heads_at_once=4))


def test_positions_after_the_queries_are_not_seen() -> None:
    a = call(t=20, alibi=True)
    a["cache_pos"][:, :, ::3] += 1000
    a["sinks"] = torch.zeros(2, device=DEVICE)
    check(a, portable(**a, config=SMALL))


@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_without_real_tokens(sinks: bool) -> None:
    a = call(b=2, t=3, valid=[0, 3], lens=[[0], [0]], window=5, sinks=sinks)
    out, lse = portable(**a, config=SMALL)
    assert not out[0].any() and torch.isneginf(lse[0]).all()
    check(a, (out, lse))


@pytest.mark.parametrize("heads_at_once", [1, 2, 3, 6])
def test_every_order_of_programs(heads_at_once: int) -> None:
    a = call(b=2, h=3, hkv=3, t=37, d=16)
    check(a, portable(**a, config=SMALL, heads_at_once=heads_at_once))


def random_call(seed: int, dims: list[int], c: int, t: int, dtypes: list[torch.dtype]) -> dict[str, Any]:
    """Any shape and any options; c and t are the largest."""
    r = random.Random(seed)
    b, hkv, c = r.choice([1, 2, 3]), r.choice([1, 2]), 64 * r.randint(0, c // 64)
    t = r.randint(1, t)
    some = lambda p, value: value if r.random() < p else 0  # noqa: E731
    return call(
        b=b, hkv=hkv, h=hkv * r.choice([1, 4, 7]), t=t, c=c, d=r.choice(dims), dv=r.choice(dims), dtype=r.choice(dtypes),
        lens=[[r.randint(0, c) for _ in range(hkv)] for _ in range(b)], valid=[r.randint(0, t) for _ in range(b)],
        sinks=r.random() < 0.3, alibi=r.random() < 0.3, hidden=some(0.3, 0.4), softcap=some(0.3, 4.0),
        window=some(0.3, r.randint(1, c + t)), chunk=some(0.3, r.randint(1, c + t)), gaps=r.randint(1, 3), seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_random_calls(seed: int) -> None:
    a = random_call(seed, [16, 24, 48], 128, 40, [torch.float32, torch.float16])
    check(a, portable(**a, config=Config(16, 32, 4, 2)))


def test_the_same_bits_twice() -> None:
    a = call(h=4, hkv=2, t=30, sinks=True)
    for x, y in zip(chunk_attention(**a), chunk_attention(**a), strict=True):
        assert torch.equal(x, y)


def test_merge_is_attention_on_the_union() -> None:
    a = call(b=2, h=4, hkv=2, t=37)
    nothing = {"k_cache": a["k_cache"][:, :, :0], "v_cache": a["v_cache"][:, :, :0]}
    own, own_lse = chunk_attention(**{**a, **nothing, "lens": a["lens"] * 0})
    q, keys, values = a["q"], a["k_cache"].repeat_interleave(2, 1), a["v_cache"].repeat_interleave(2, 1)
    logits = q @ keys.transpose(2, 3) * a["scale"]
    check(a, kernel.merge(own, own_lse, logits.softmax(-1) @ values, logits.logsumexp(-1)))


def test_the_route() -> None:
    bf16 = torch.bfloat16
    assert choose_route((9, 0), bf16, 128, 128) == "hopper"
    assert choose_route((9, 0), torch.float16, 64, 64) == "hopper"
    assert choose_route((8, 0), bf16, 128, 128) == "triton"
    assert choose_route((10, 0), bf16, 128, 128) == "triton"
    assert choose_route(None, bf16, 128, 128) == "triton"
    assert choose_route((9, 0), torch.float32, 128, 128) == "triton"
    assert choose_route((9, 0), bf16, 96, 96) == "triton"
    assert choose_route((9, 0), bf16, 192, 128) == "triton"
    assert choose_route((9, 0), bf16, 128, 128, ("window",)) == "triton"
    assert choose_route((9, 0), bf16, 128, 128, aligned=False) == "triton"
    assert kernel.features_in_use(Logits()) == ()
    assert kernel.features_in_use(Logits(None, torch.ones(1), torch.ones(1), 0.5, 1.0, 2, 3)) == (
        "alibi", "hidden", "softcap", "window", "chunk",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"route": "fast"}, "expected one of"),
        ({"route": "hopper", "window": 4, "cache_pos": True}, "route 'hopper' can't have"),
        ({"route": "cudnn"}, "route 'cudnn' can't have"),
        ({"window": 4}, "need cache_pos"),
        ({"k": "double"}, "convert one of them first"),
        ({"lens": "short"}, "lens has shape"),
        ({"k_cache": "strided"}, "must be contiguous"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    a = call()
    altered: dict[Any, Any] = {
        "double": a["k"].double(),
        "short": a["lens"][:, :0],
        "strided": torch.stack([a["k_cache"], a["k_cache"]], -1)[..., 0],
        True: torch.zeros(1, 1, 64, dtype=torch.int32, device=DEVICE),
    }
    with pytest.raises(ValueError, match=message):
        chunk_attention(**{**a, **{name: altered.get(x, x) for name, x in change.items()}})


COMPILE = """
import os, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from kvrewrite.kernels.attention import chunk_hopper as hopper

fn = hopper._attend
pointers = dict.fromkeys(("Q", "K", "V", "KC", "VC", "OUT"), "*bf16")
pointers.update(LENS="*i32", VALID="*i32", SINK="*fp32", LSE="*fp32", scale2="fp32")
for d, config in [(128, hopper.CONFIGS[128])]:
    constants = {"D": d, "BLOCK_N": config.block_n, "STAGES": config.stages, "SINKS": True}
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in fn.arg_names}
    whole = [i for i, n in enumerate(fn.arg_names) if n[:2] in ("q_", "k_", "v_") or (n in pointers and n != "scale2")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in whole}
    options = {"num_warps": 4} | ({"maxnreg": config.maxnreg} if config.maxnreg else {})
    source = GluonASTSource(fn, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    path = sys.argv[1] + f"/{d}.cubin"
    open(path, "wb").write(binary.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    print(d, binary.metadata.shared, int(re.search(r"STACK:(\\d+)", usage).group(1)))
"""


def test_the_warp_specialized_kernel_compiles_without_spills(tmp_path: Path) -> None:
    """Gluon has no interpreter, but Triton compiles for a GPU that is not there (in a process that does not interpret)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    lines = [[int(x) for x in line.split()] for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [128]
    for _, shared, stack in lines:
        assert shared <= 232448 and stack == 0  # an H100's shared memory for a block; spilled bytes


# ------------------------------------------------------------------------------------------------ on a GPU only
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100))
def test_random_calls_at_full_size(seed: int) -> None:
    a = random_call(seed, [64, 80, 96, 128, 256], 640, 400, [torch.float32, torch.float16, torch.bfloat16])
    check(a, chunk_attention(**a))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize(
    "shape",
    [
        {"t": 1, "c": 64},
        {"t": 1, "c": 0},
        {"t": 128, "c": 0, "h": 8, "hkv": 2},
        {"t": 300, "c": 1024, "h": 8, "hkv": 2, "sinks": True},
        {"t": 333, "c": 640, "h": 7, "hkv": 1, "lens": [[577]]},
        {"b": 3, "t": 260, "c": 256, "hkv": 2, "lens": [[0, 256], [1, 65], [128, 127]], "valid": [260, 0, 129]},
        {"b": 2, "t": 129, "c": 64, "h": 4, "lens": [[3], [0]], "valid": [1, 128], "sinks": True},
    ],
)
def test_hopper(shape: dict[str, Any], d: int, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    a = call(**shape, d=d, dtype=dtype)
    got = chunk_attention(**a, route="hopper")
    check(a, got)
    for x, y in zip(got, chunk_attention(**a, route="hopper"), strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100))
def test_hopper_at_random(seed: int) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    hopper = importlib.import_module("kvrewrite.kernels.attention.chunk_hopper")
    r = random.Random(seed)
    b, hkv, c, t = r.choice([1, 2, 3]), r.choice([1, 2]), 64 * r.randint(0, 20), r.randint(1, 700)
    a = call(
        b=b, hkv=hkv, h=hkv * r.choice([1, 4, 7]), t=t, c=c, d=r.choice([64, 128]), sinks=r.random() < 0.3, seed=seed,
        dtype=r.choice([torch.float16, torch.bfloat16]), lens=[[r.randint(0, c) for _ in range(hkv)] for _ in range(b)],
        valid=[r.randint(0, t) for _ in range(b)],
    )  # fmt: skip
    check(a, chunk_attention(**a, route="hopper"))
    names = ("q", "k", "v", "k_cache", "v_cache", "lens", "valid", "sinks", "scale")
    config = hopper.HopperConfig(r.choice([64, 128]), 2)
    arguments = {n: a[n] for n in names}
    check(a, flat(hopper.launch)(**arguments, config=config, heads_at_once=r.randint(1, 5)))


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
def test_cudnn(d: int) -> None:
    a = call(b=2, h=8, hkv=2, t=256, c=512, d=d, dtype=torch.bfloat16)
    check(a, chunk_attention(**a, route="cudnn", full=True))


@pytest.mark.gpu
@pytest.mark.parametrize("route", ["hopper", "triton"])
def test_in_a_cuda_graph(route: str) -> None:
    if route == "hopper" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    a = call(b=2, h=4, hkv=2, t=140, c=256, d=128, dtype=torch.bfloat16, lens=[[256, 100], [3, 0]])
    chunk_attention(**a, route=route)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chunk_attention(**a, route=route)
    a["lens"].fill_(64)
    a["k_cache"].nan_to_num_()
    a["v_cache"].nan_to_num_()
    graph.replay()
    torch.cuda.synchronize()
    check(a, got)


@pytest.mark.gpu
def test_triton_is_new_enough() -> None:
    assert tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 6)
