"""A few new tokens on a paged cache, by the kernel of single tokens, against the torch reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvrewrite.kernels.attention.few import MOST_TOKENS, few_tokens, suits
from kvrewrite.kernels.groups import At, Dense, Logits, Pages, Tokens
from tests.kernels.test_decode import DEVICE, NAN, TOLERANCE, page_table, paged

HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16  # Triton's interpreter has no bf16
CASES: list[dict[str, Any]] = [
    {"lens": [[70, 5], [0, 129]], "t": 3},
    {"lens": [[200, 64]], "t": MOST_TOKENS, "h": 4},
    {"lens": [[70, 5], [60, 129]], "t": 4, "valid": [2, 0]},
    {"lens": [[70, 5], [60, 129]], "t": 2, "valid": [1, 2], "softcap": 3.0, "d": 24, "dv": 40},
    {"lens": [[130, 131]], "t": 6, "h": 8, "d": 64},
    {"lens": [[130, 131]], "t": 6, "h": 8, "d": 64, "dtype": HALF},
]


def arguments(case: dict[str, Any]) -> tuple[Tokens, Pages, At, Logits]:
    """Random, with garbage wherever nothing may be read."""
    g = torch.Generator().manual_seed(0)
    lens, t = torch.tensor(case["lens"], dtype=torch.int32), case["t"]
    (b, hkv), h, d = lens.shape, case.get("h", 4), case.get("d", 32)
    dv, dtype = case.get("dv", d), case.get("dtype", torch.float32)
    table, count = page_table(lens, max(1, -(-int(lens.max()) // 64)), g)
    c = table.shape[2] * 64

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    q, k = normal(b, t, h * d).view(b, t, h, d).transpose(1, 2), normal(b, t, hkv, d).transpose(1, 2)
    v, valid = (
        normal(b, t, hkv, dv).transpose(1, 2).clone(),
        torch.tensor(case.get("valid", [t] * b), dtype=torch.int32),
    )
    v[(torch.arange(t) >= valid[:, None])[:, None].expand(b, hkv, t)] = NAN
    places = torch.arange(c).expand(b, hkv, c)[..., None].expand(-1, -1, -1, 2).to(torch.int32)
    pools = [
        paged(x, table, lens, count, dead) for x, dead in ((normal(b, hkv, c, d), NAN), (normal(b, hkv, c, dv), NAN))
    ]
    cache = Pages(*pools, paged(places, table, lens, count, 2**31 - 1), table, lens)
    at = At(c + torch.arange(t).expand(b, t), valid)
    return Tokens(q, k, v), cache, at, Logits(None, None, None, d**-0.5, case.get("softcap", 0.0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_the_reference(case: dict[str, Any]) -> None:
    tokens, cache, at, logits = arguments(case)
    (q, k, v), valid = tokens, at.valid
    exact = [x.double() for x in (q, k, v.nan_to_num())]
    expected, expected_lse = torch.ops.kvrewrite.cached_attention(
        *exact, None, cache.k_pages.double(), cache.v_pages.double(), *cache[2:], *at, None, None, None, *logits[3:]
    )
    moved = [type(x)(*(y.to(DEVICE) for y in x)) for x in (tokens, cache, at)]
    out, lse = few_tokens(moved[0], Dense(None, None), *moved[1:], logits)
    assert out.dtype == q.dtype and out.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
    real = torch.arange(case["t"]) < valid[:, None]
    tolerance = TOLERANCE[q.dtype]
    for got, wanted in ((out, expected), (lse, expected_lse)):
        got, wanted = got.cpu().double().transpose(1, 2)[real], wanted.double().transpose(1, 2)[real]
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_which_suit() -> None:
    tokens, short, _, logits = arguments(CASES[0])
    cache = short._replace(table=torch.zeros(2, 2, 64, dtype=torch.int32))
    assert suits(tokens, cache, logits) and not suits(tokens, short, logits)
    for other in (logits._replace(window=4), logits._replace(sinks=torch.zeros(4))):
        assert not suits(tokens, cache, other)
    one = Tokens(*(x[:, :, :1] for x in tokens))
    assert not suits(one, cache, logits)
    many = Tokens(*(x.repeat(1, 1, 3, 1) for x in tokens))
    assert not suits(many, cache, logits)
