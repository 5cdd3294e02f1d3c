"""Attention and the update beside it, against one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvrewrite.ops.dispatch import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 64
ops = torch.ops.kvrewrite


def call(seed: int, b: int, h: int, hkv: int, t: int, width: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments by name: heads of any length, dead slots NaN, budgets below, at and above what is held."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    total, room = 1 + b * hkv * width, width * PAGE - t
    table = (1 + torch.randperm(total - 1, generator=g)).to(torch.int32).reshape(b, hkv, width)
    lens = torch.randint(0, room + 1, (b, hkv), generator=g, dtype=torch.int32)
    lens[0, 0] = room
    pools = {"k_pages": normal(total, PAGE, d), "v_pages": normal(total, PAGE, d)}
    dead = torch.ones(total, PAGE, dtype=torch.bool)
    pos = torch.zeros(total, PAGE, 2, dtype=torch.int32)
    for row in range(b):
        for head in range(hkv):
            slot = torch.arange(int(lens[row, head]))
            dead[table[row, head, slot // PAGE].long(), slot % PAGE] = False
            pos[table[row, head, slot // PAGE].long(), slot % PAGE] = slot[:, None].to(torch.int32).expand(-1, 2)
    for pool in pools.values():
        pool[dead] = float("nan")
    keep = torch.randint(1, width * PAGE, (b, hkv), generator=g, dtype=torch.int32)
    valid = torch.randint(0, t + 1, (b,), generator=g, dtype=torch.int32)
    valid[0] = t
    positions = (room + torch.arange(t)).expand(b, -1).contiguous()
    rows = {"positions": positions, "rotary": positions, "valid": valid, "keep": keep}
    found = {
        "q": normal(b, t, h, d).transpose(1, 2), "k": normal(b, t, hkv, d).transpose(1, 2),
        "v": normal(b, t, hkv, d).transpose(1, 2), "k_dense": None, "v_dense": None, "sinks": None, "alibi": None,
        "hidden": None, "scale": d**-0.5, "softcap": 0.0, "visible_window": 0, "visible_chunk": 0,
        "new_k": normal(b, hkv, t, d), "new_v": normal(b, hkv, t, d), "scores": torch.randn(b, hkv, t, generator=g),
        "slot_scores": None, **rows, "recent": torch.full((b,), 3, dtype=torch.int32), **pools,
        "score_pages": torch.randn(total, PAGE, generator=g), "pos_pages": pos, "table": table, "lens": lens, "first": 2,
        "window": 0, "chunk": 0, "select": None, "drop": None,
    }  # fmt: skip
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in found.items()}


def apart(a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The two ops."""
    old = [a[n] for n in ("k_pages", "v_pages", "pos_pages", "table", "lens", "positions", "valid")]
    shape = (a["scale"], a["softcap"], a["visible_window"], a["visible_chunk"])
    out = ops.cached_attention(a["q"], a["k"], a["v"], None, *old, a["sinks"], None, None, *shape)
    update = list(a.values())[12:]
    ops.cache_update(*update, None, None, None, None)
    return out


GPU = pytest.mark.gpu
CASES = [
    (0, 2, 4, 2, 9, 2, 16, torch.float32),
    (1, 1, 2, 1, 1, 1, 8, torch.float32),
    *(pytest.param(seed, 1, 32, 8, 3072, 300, 128, torch.bfloat16, marks=GPU) for seed in range(3)),
    *(pytest.param(seed, 3, 8, 2, 128 + 57 * seed, 20, 64, torch.float16, marks=GPU) for seed in range(20)),
]


@pytest.mark.parametrize(("seed", "b", "h", "hkv", "t", "width", "d", "dtype"), CASES)
def test_the_same_bits(seed: int, b: int, h: int, hkv: int, t: int, width: int, d: int, dtype: torch.dtype) -> None:
    """Results, pools and lengths; also when nothing waits between calls."""
    first = call(seed, b, h, hkv, t, width, d, dtype)
    written = ("k_pages", "v_pages", "score_pages", "pos_pages", "lens")
    with kernels("auto" if DEVICE == "cuda" else "fused"):
        runs = []
        for one in (apart, lambda a: ops.attend_and_update(*a.values()), lambda a: ops.attend_and_update(*a.values())):
            mine = {n: x.clone() if n in written else x for n, x in first.items()}
            runs.append((*one(mine), *(mine[n] for n in written)))
    for got in runs[1:]:
        for x, y in zip(got, runs[0], strict=True):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
