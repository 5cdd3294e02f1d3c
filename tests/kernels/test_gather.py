"""The GPU kernels that read cached slots, rotate and rank them, here or where they lie, against the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvrewrite.kernels import pages
from kvrewrite.kernels.groups import KeyRotation
from kvrewrite.kernels.rotary import gather, ranks, rotate_cached_keys
from kvrewrite.kernels.rotary import reference as rotary_reference
from kvrewrite.kernels.update import reference
from tests.support.products import pairwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 64


def gathered(k: Any, v: Any, at: dict[str, Any], config: Any = None, **rotation: Any) -> tuple[Any, Any]:
    """What the kernel makes of pools with this layout."""
    return gather.gather(k, v, at["table"], at["lens"], KeyRotation(**rotation), config)


def layout(seed: int, lens: list[list[int]], width: int, span: int = 3) -> dict[str, Tensor]:
    """Table, lengths and positions of heads whose slots are in any order; positions are spread over `span` times the slots.
    Dead slots hold garbage."""
    g = torch.Generator().manual_seed(seed)
    b, hkv = len(lens), len(lens[0])
    total = 1 + b * hkv * width
    table = (torch.randperm(total - 1, generator=g) + 1).to(torch.int32).reshape(width, b, hkv).permute(1, 2, 0)
    pos = torch.full((total, PAGE, 2), 2**31 - 1, dtype=torch.int32)
    for i in range(b):
        for h in range(hkv):
            n = lens[i][h]
            slot = torch.arange(n)
            page, at = table[i, h, slot // PAGE].long(), slot % PAGE
            pos[page, at, 0] = torch.randperm(max(span * n, 1), generator=g)[:n].to(torch.int32)
            pos[page, at, 1] = torch.randint(0, 50, (n,), generator=g).to(torch.int32)
    stacked = torch.full((b, hkv, 3), 10**6, dtype=torch.int32)
    stacked[..., 1] = torch.tensor(lens, dtype=torch.int32)
    return {"table": table.to(DEVICE), "lens": stacked.to(DEVICE)[..., 1], "pos_pages": pos.to(DEVICE)}


def pool(at: dict[str, Tensor], dim: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Random numbers where slots live, NaN elsewhere."""
    g = torch.Generator().manual_seed(seed)
    total = at["pos_pages"].shape[0]
    found = torch.randn(total, PAGE, dim, generator=g).to(DEVICE, dtype)
    live = at["pos_pages"][..., 0] < 2**31 - 1
    return torch.where(live[..., None], found, torch.nan)


def dense(x: Tensor, at: dict[str, Tensor]) -> Tensor:
    """What is wanted: live slots in order, zeros behind."""
    found = pages.read(x, at["table"])
    live = torch.arange(found.shape[2], device=DEVICE) < at["lens"][..., None]
    return torch.where(live[..., None], found, 0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, partner: Tensor) -> Tensor:
    """As the op does it."""
    turned = x.float() * cos[positions].float() + x[..., partner].float() * sin[positions].float()
    return turned.to(x.dtype)


def half_partner(dim: int, half: int) -> Tensor:
    d = torch.arange(dim)
    return torch.where(d < half, d + half, torch.where(d < 2 * half, d - half, d))


LENS = [[100, 0, 64], [1, 128, 65]]
# The interpreter's bfloat16 is not to be trusted.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.mark.parametrize("dims", [(16, 16), (64, 32), (96, 96), (192, 128), (24, 40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather(dims: tuple[int, int], dtype: torch.dtype) -> None:
    at = layout(0, LENS, 2)
    k, v = (pool(at, d, dtype, d) for d in dims)
    got_k, got_v = gathered(k, v, at)
    for got, x in ((got_k, k), (got_v, v)):
        assert got is not None and got.is_contiguous() and got.dtype == dtype
        assert torch.equal(got, dense(x, at))


def test_only_one_pool() -> None:
    at = layout(1, LENS, 2)
    k = pool(at, 16, torch.float32)
    got_k, got_v = gathered(k, None, at)
    assert got_v is None and got_k is not None and torch.equal(got_k, dense(k, at))
    got_k, got_v = gathered(None, k, at)
    assert got_k is None and got_v is not None and torch.equal(got_v, dense(k, at))
    assert gathered(None, None, at) == (None, None)


def rotation(dim: int, half: int, kind: str, dtype: torch.dtype, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    cos, sin = (torch.randn(400, dim, generator=g) for _ in range(2))
    cos[:, 2 * half :], sin[:, 2 * half :] = 1.0, 0.0
    partner = half_partner(dim, half) if kind == "half" else torch.arange(dim) ^ 1
    return cos.to(DEVICE, dtype), sin.to(DEVICE, dtype), partner.to(DEVICE)


@pairwise
@pytest.mark.parametrize(("dim", "half"), [(16, 8), (64, 32), (96, 48), (80, 16), (192, 32)], ids=str)
@pytest.mark.parametrize("kind", ["half", "pairs", "half, not told"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16], ids=str)
def test_rotated(dim: int, half: int, kind: str, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    at = layout(2, LENS, 2)
    k, v = pool(at, dim, dtype), pool(at, 16, dtype)
    cos, sin, partner = rotation(dim, half, kind.split(",")[0], table_dtype)
    rotary = torch.randint(0, 400, (2, 3, 128), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    live = torch.arange(128, device=DEVICE) < at["lens"][..., None]
    garbage = torch.where(live, rotary, 10**12)
    got_k, got_v = gathered(
        k,
        v,
        at,
        rotary=garbage,
        cos=cos,
        sin=sin,
        partner=partner,
        half=half if kind == "half" else 0,
    )
    assert got_k is not None and got_v is not None and torch.equal(got_v, dense(v, at))
    expected = torch.where(live[..., None], rotate(dense(k, at), cos, sin, rotary, partner), 0)
    assert torch.equal(got_k, expected)


@pytest.mark.parametrize("config", [(8, 1, 1), (32, 2, 4), (128, 3, 8)], ids=str)
def test_other_configurations(config: tuple[int, int, int]) -> None:
    at = layout(5, LENS, 2)
    k = pool(at, 32, torch.float32)
    cos, sin, _ = rotation(32, 16, "half", torch.float32)
    rotary = torch.randint(0, 400, (2, 3, 128), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    options = {"rotary": rotary, "cos": cos, "sin": sin, "half": 16}
    usual, _ = gathered(k, None, at, **options)  # type: ignore[arg-type]
    other, _ = gathered(k, None, at, **options, config=config)  # type: ignore[arg-type]
    assert usual is not None and other is not None and torch.equal(usual, other)


def test_refusals() -> None:
    at = layout(6, LENS, 2)
    k = pool(at, 16, torch.float32)
    rotary = torch.zeros(2, 3, 128, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="need cos, sin and either partner or half"):
        gathered(k, None, at, rotary=rotary)
    with pytest.raises(ValueError, match="pools must be contiguous"):
        gathered(k[:, ::2], None, at)
    cos = torch.zeros(4, 16, device=DEVICE)
    with pytest.raises(ValueError, match="half = 9, but keys have 16 channels"):
        gathered(k, None, at, rotary=rotary, cos=cos, sin=cos, half=9)


# ------------------------------------------------------------------------------------------------ ranks
def wanted_ranks(at: dict[str, Tensor], following: Tensor, renew: Tensor) -> tuple[Tensor, Tensor]:
    """As `kvrewrite::slot_rotary` has it: the rotary positions, and the pool afterwards."""
    pos = at["pos_pages"].clone()
    places = pages.read(pos, at["table"])
    slot = torch.arange(places.shape[2], device=DEVICE)
    live = slot < at["lens"][..., None]
    rank = reference.ranks_from_newest(places[..., 0], live)
    renewed = (following[:, None, None] - 1 - rank).clamp(min=0)
    rotary = torch.where(live, torch.where(renew[:, None, None], renewed, places[..., 1].long()), 0)
    updated = torch.stack([places[..., 0], rotary.to(torch.int32)], dim=-1)
    pages.write(pos, at["table"], slot.expand(live.shape), updated, live)
    return rotary, pos


def check_ranks(at: dict[str, Tensor], following: list[int], renew: list[bool], **options: Any) -> None:
    ahead = torch.tensor(following, device=DEVICE)
    anew = torch.tensor(renew, device=DEVICE)
    rotary, pool_after = wanted_ranks(at, ahead, anew)
    mine = at["pos_pages"].clone()
    got = ranks.slot_rotary(mine, at["table"], at["lens"], ahead, anew, **options)
    assert got.dtype == torch.int64 and got.is_contiguous() and torch.equal(got, rotary)
    assert torch.equal(mine[1:], pool_after[1:])
    again = at["pos_pages"].clone()
    assert torch.equal(ranks.slot_rotary(again, at["table"], at["lens"], ahead, anew, **options), got)


@pytest.mark.parametrize("renew", [[True, True], [True, False], [False, False]], ids=str)
@pytest.mark.parametrize("span", [1, 3])
def test_slot_rotary(renew: list[bool], span: int) -> None:
    check_ranks(layout(8, LENS, 2, span), [100, 128], renew, max_position=span * 128)


def test_ranks_below_zero_are_zero() -> None:
    check_ranks(layout(9, LENS, 2), [20, 60], [True, True], max_position=1000)


@pytest.mark.parametrize("config", [(64, 16, 1), (128, 256, 4)], ids=str)
def test_other_configurations_of_ranks(config: tuple[int, int, int]) -> None:
    check_ranks(layout(10, LENS, 2), [100, 128], [True, True], max_position=391, config=config)


def random_heads(seed: int, scale: int) -> tuple[dict[str, Tensor], int, int]:
    g = torch.Generator().manual_seed(seed)
    b, hkv, most = (int(torch.randint(1, top, (), generator=g)) for top in (4, 5, 150 * scale))
    lens = [[int(torch.randint(most + 1, (), generator=g)) for _ in range(hkv)] for _ in range(b)]
    span = int(torch.randint(1, 5, (), generator=g))
    return layout(seed, lens, -(-most // PAGE), span), b, span * most + 1


def check_random(seed: int, scale: int, dtype: torch.dtype) -> None:
    at, b, top = random_heads(seed, scale)
    g = torch.Generator().manual_seed(seed)
    check_ranks(
        at,
        torch.randint(0, top, (b,), generator=g).tolist(),
        (torch.rand(b, generator=g) < 0.7).tolist(),
        max_position=top,
    )
    k = pool(at, 32, dtype)
    cos, sin, partner = rotation(32, 16, "half", torch.float32)
    c = at["table"].shape[2] * PAGE
    rotary = torch.randint(0, 400, (*at["lens"].shape, c), generator=g).to(DEVICE)
    got, _ = gathered(k, None, at, rotary=rotary, cos=cos, sin=sin, half=16)
    live = torch.arange(c, device=DEVICE) < at["lens"][..., None]
    assert got is not None
    assert torch.equal(got, torch.where(live[..., None], rotate(dense(k, at), cos, sin, rotary, partner), 0))


# ------------------------------------------------------------------------------------------------ keys where they lie
@pairwise
@pytest.mark.parametrize(("dim", "half"), [(16, 8), (96, 48), (80, 16), (128, 64)], ids=str)
@pytest.mark.parametrize("kind", ["half", "pairs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("undo", [False, True])
def test_rotate_cached_keys(dim: int, half: int, kind: str, dtype: torch.dtype, undo: bool) -> None:
    at = layout(11, [[100, 0, 64], [1, 128, 65]], 3)
    k = pool(at, dim, dtype)
    cos, sin, partner = rotation(dim, half, kind, torch.float32)
    rest = (k, at["pos_pages"], at["table"], at["lens"], cos, sin, partner, undo)
    mine, wanted = k.clone(), k.clone()
    rotate_cached_keys.rotate_cached_keys(mine, *rest[1:])
    rotary_reference.rotate_cached_keys(wanted, *rest[1:])
    assert torch.equal(dense(mine, at), dense(wanted, at)) and not torch.equal(dense(mine, at), dense(k, at))
    live = torch.zeros_like(k[..., 0], dtype=torch.bool)
    pages.write(live, at["table"], torch.arange(3 * PAGE, device=DEVICE).expand(2, 3, -1), *_alive(at))
    assert torch.equal(
        torch.where(live[..., None], 0, mine)[1:].isnan(), torch.where(live[..., None], 0, k)[1:].isnan()
    )


def _alive(at: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    live = torch.arange(3 * PAGE, device=DEVICE) < at["lens"][..., None]
    return live, live


def test_rotate_cached_keys_there_and_back() -> None:
    at = layout(12, [[1000, 700]], 16)
    k = pool(at, 64, torch.float32)
    cos, sin, partner = rotation(64, 32, "half", torch.float32)
    mine = k.clone()
    for undo in (False, True):
        rotate_cached_keys.rotate_cached_keys(mine, at["pos_pages"], at["table"], at["lens"], cos, sin, partner, undo)
    torch.testing.assert_close(dense(mine, at), dense(k, at), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_random(seed: int) -> None:
    check_random(seed, 1, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100))
def test_random_on_gpu(seed: int) -> None:
    check_random(seed, 1 + seed % 60, torch.bfloat16)
