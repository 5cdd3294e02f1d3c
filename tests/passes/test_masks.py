"""Masks by position are told from all distances up to the model's longest length, however they are written, or refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvrewrite.ir.masks import BLOCK, classify_mask, expected_mask, spread, spread_length, with_ends
from kvrewrite.ir.site import NoSite
from kvrewrite.passes.canonical.find_attention import find_attention
from kvrewrite.passes.canonical.normalize import normalize
from kvrewrite.passes.canonical.operands import Attention
from tests.support.products import covering, few
from tests.support.rewritten import traced_once

VOCAB, HEADS, DIM = 31, 4, 4
WIDTH = HEADS * DIM
Mask = Callable[
    [Tensor, Tensor], Tensor
]  # positions of queries (S, 1) and of keys (S,) -> what is seen, (S, S) or (HEADS, S, S)


class Model(nn.Module):
    """One attention, which gets its numbers of tokens from `at`."""

    def __init__(self, core: Callable[..., Tensor], at: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core, self.at = core, at
        self.embed, self.qkv, self.head = (
            nn.Embedding(VOCAB, WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, VOCAB),
        )

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(ids)).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        at = self.at(ids)
        return self.head(self.core(q, k, v, at[:, None], at).transpose(1, 2).flatten(2))


def arange(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1])


def sdpa(mask: Mask) -> Callable[..., Tensor]:
    return lambda q, k, v, i, j: F.scaled_dot_product_attention(q, k, v, attn_mask=mask(i, j))


def softmax(mask: Mask) -> Callable[..., Tensor]:
    return lambda q, k, v, i, j: (q @ k.mT * DIM**-0.5).masked_fill(~mask(i, j), -math.inf).softmax(-1) @ v


def flex(mask: Mask) -> Callable[..., Tensor]:
    def core(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        s = q.shape[2]
        block = create_block_mask(lambda b, h, i, j: mask(i, j), None, None, s, s, device="cpu")
        return flex_attention(q, k, v, block_mask=block)

    return core


def biased(bias: Mask) -> Callable[..., Tensor]:
    """Softmax attention with something added to the scores."""
    return lambda q, k, v, i, j: (q @ k.mT + bias(i, j)).masked_fill(i < j, -math.inf).softmax(-1) @ v


def found(core: Callable[..., Tensor], at: Callable[[Tensor], Tensor] = arange) -> tuple[Attention | NoSite, Any]:
    captured = traced_once(Model(core, at).eval())
    normalize(captured)
    (one,) = find_attention(captured)
    return one, captured


def masked(seen: Callable[[Any, Any], Any]) -> Mask:
    return lambda i, j: (i >= j) & seen(i, j)


SPELLINGS: dict[str, tuple[Mask, int, int]] = {
    "quotient": (masked(lambda i, j: (i - j) // 64 < 64), 4096, 0),
    "division": (masked(lambda i, j: (i - j) / 50 < 60), 3000, 0),
    "logarithm": (masked(lambda i, j: (i - j + 1).log2() <= 12), 4096, 0),
    "square": (masked(lambda i, j: (i - j) * (i - j) < 3000 * 3000), 3000, 0),
    "floats": (masked(lambda i, j: (i - j).float() * 0.01 < 1000.005), 100001, 0),
    "quotients": (masked(lambda i, j: i // 64 // 64 == j // 64 // 64), 0, 4096),
    "chunks": (masked(lambda i, j: i // 5000 == j // 5000), 0, 5000),
    "constant": (masked(lambda i, j: i - j < 5000), 5000, 0),
}


CASES = [(a, n) for a in (sdpa, softmax) for n in SPELLINGS] + [(flex, "quotient"), (flex, "chunks")]


@covering({"name": 1, "attention": 1})
@pytest.mark.parametrize("attention, name", CASES)
def test_far_windows_and_chunks(attention: Callable[[Mask], Callable[..., Tensor]], name: str) -> None:
    mask, window, chunk = SPELLINGS[name]
    one, captured = found(attention(mask))
    assert isinstance(one, Attention), one
    assert (one.window, one.chunk, one.by_head) == (window, chunk, None)
    assert captured.compared >= 1 << 17


@pytest.mark.parametrize("attention", [sdpa, softmax, pytest.param(flex, marks=pytest.mark.thorough)])
def test_far_windows_per_head(attention: Callable[[Mask], Callable[..., Tensor]]) -> None:
    windows = torch.tensor([10, 2000, 3000, 70000])
    if attention is flex:

        def core(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Tensor:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return (i >= j) & ((i - j) // 10 < windows[h] // 10)

            s = q.shape[2]
            return flex_attention(q, k, v, block_mask=create_block_mask(mask, None, HEADS, s, s, device="cpu"))
    else:
        core = attention(lambda i, j: (i >= j) & ((i - j) // 10 < windows[:, None, None] // 10))
    one, _ = found(core)
    assert isinstance(one, Attention), one
    assert one.by_head == [(int(w), 0) for w in windows]


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "hidden for a while": (sdpa(masked(lambda i, j: (i - j < 50000) | (i - j > 60000))), "a distance of 50000"),
    "in a softmax": (softmax(masked(lambda i, j: (i - j < 50000) | (i - j > 60000))), "a distance of 50000"),
    "window and first": (sdpa(masked(lambda i, j: ((i - j) // 50 < 60) | (j < 4))), "a distance of 3000"),
    "blocks": (sdpa(masked(lambda i, j: i // 3000 - j // 3000 <= 1)), "causal.* 2048 tokens, but not at a distance of 3051"),
    "chunk that slides once": (sdpa(masked(lambda i, j: (i < 5000) | (i - j < 4000))), "causal on the first 2048"),
    "later ones": (sdpa(lambda i, j: (i >= j) | (j - i > 70000)), "tokens see later ones.*a distance of -70001"),
    "another window": (
        sdpa(masked(lambda i, j: torch.where(i < 9000, i - j < 100, i - j < 200))), "a window of 100 on the first 2048"
    ),
    "alibi that bends": (biased(lambda i, j: -0.01 * (i - j).clamp(max=10000)), "not linear in the distance"),
    "steep alibi that bends": (biased(lambda i, j: -0.5 * (i - j).clamp(max=100000)), "not linear in the distance"),
    "alibi that begins": (biased(lambda i, j: -0.5 * (i - j - 4000).clamp(min=0)), "not linear in the distance"),
    "alibi that adds up": (  # a mask of -10,000 that a later token's bias makes up for
        lambda q, k, v, i, j: ((q @ k.mT) + 0.5 * j + torch.where(i >= j, 0.0, -10000.0)).softmax(-1) @ v,
        "tokens see later ones",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", few(REFUSED, rest=("in a softmax", "another window", "steep alibi that bends", "alibi that begins"))
)
def test_what_changes_far_away_is_refused(name: str) -> None:
    core, reason = REFUSED[name]
    one, _ = found(core)
    assert isinstance(one, NoSite), one
    assert re.search(reason, one.reason), one.reason


def test_far_alibi() -> None:
    slopes = torch.tensor([1.0, 0.25, 0.004, 0.5])
    one, captured = found(biased(lambda i, j: -slopes[:, None, None] * (i - j)))
    assert isinstance(one, Attention) and one.slopes is not None, one
    assert torch.allclose(one.slopes, slopes) and (one.window, one.chunk, one.by_head) == (0, 0, None)
    assert captured.compared == 1 << 17
    one, _ = found(lambda q, k, v, i, j: biased(
        lambda i, j: torch.where((i - j) // 10 < 300, -slopes[:, None, None] * (i - j), -math.inf)
    )(q, k, v, i, j))  # fmt: skip
    assert isinstance(one, Attention) and one.slopes is not None and one.window == 3000, one
    assert torch.allclose(one.slopes, slopes)


def test_far_window_beside_a_sink() -> None:
    sinks = torch.tensor([0.5, 1.0, -1.0, 2.0])

    def core(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~((i >= j) & ((i - j) // 64 < 64)), -math.inf)
        column = sinks.reshape(1, HEADS, 1, 1).expand(q.shape[0], HEADS, q.shape[2], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v

    one, captured = found(core)
    assert isinstance(one, Attention) and one.sinks is not None and one.window == 4096, one
    assert captured.compared == 1 << 17


# ------------------------------------------------------------------------------------------- how positions are written
POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum of ones": lambda ids: torch.ones_like(ids[0]).cumsum(-1) - 1,
    "sum of a mask": lambda ids: torch.ones(ids.shape[1], dtype=torch.bool).cumsum(0) - 1,
    "before the end": lambda ids: torch.arange(1 - ids.shape[1], 1),
    "less the length": lambda ids: torch.arange(ids.shape[1]) - ids.shape[1],
    "table": lambda ids: torch.arange(1 << 18)[: ids.shape[1]],
    "end of a table": lambda ids: torch.arange(1 << 18)[-ids.shape[1] :],
    "looked up": lambda ids: torch.arange(1 << 18)[torch.arange(ids.shape[1])],
    "matrix": lambda ids: torch.arange(ids.shape[1])[None].expand(3, -1).reshape(3, -1).T[:, 1].float(),
}


@pytest.mark.parametrize(
    "name", few(POSITIONS, rest=("sum of a mask", "less the length", "looked up", "end of a table"))
)
def test_spellings_of_positions(name: str) -> None:
    one, captured = found(sdpa(masked(lambda i, j: (i - j) // 64 < 64)), POSITIONS[name])
    assert isinstance(one, Attention) and one.window == 4096, one
    assert captured.compared >= 1 << 17


def test_tables_of_masks() -> None:
    """A window by tril, and a table whose last tokens see less."""
    window = torch.ones(2500, 2500, dtype=torch.bool).tril() & torch.ones(2500, 2500, dtype=torch.bool).triu(-2199)
    broken = window.clone()
    broken[2450:, :400] = False
    for table, right in ((window, True), (broken, False)):
        one, captured = found(sdpa(lambda i, j, table=table: table[: i.shape[0], : i.shape[0]]))
        assert isinstance(one, Attention if right else NoSite), one
        assert not right or (one.window, captured.compared) == (2200, 2500)
    one, _ = found(lambda q, k, v, i, j: sdpa(
        lambda i, j: (lambda o: o.tril() & ~o.tril(-64 * 64))(torch.ones(i.shape[0], i.shape[0], dtype=torch.bool))
    )(q, k, v, i, j))  # fmt: skip
    assert isinstance(one, Attention) and one.window == 4096, one


def test_a_table_that_ends_is_the_longest_length() -> None:
    table = -0.5 * torch.arange(5000)
    one, captured = found(biased(lambda i, j: table[(i - j).clamp(min=0)]))
    assert isinstance(one, Attention) and one.slopes is not None, one
    assert captured.max_positions == captured.compared == 5000


def test_what_mixes_positions_is_compared_on_the_first_tokens() -> None:
    """A sum over the positions can't be evaluated at chosen ones: as far as all pairs go, which is said."""
    one, captured = found(sdpa(masked(lambda i, j: (j - i) < (i * 0).sum() + 1)))
    assert isinstance(one, Attention) and one.window == 0, one
    assert captured.compared == 2048


# ------------------------------------------------------------------------------------------- the comparison itself
@pytest.mark.parametrize("length", [1, 2, 3, 24, 100, 2048, 5000, 1 << 17])
def test_every_distance_is_compared(length: int) -> None:
    positions = spread(length)
    assert positions[0] == 0 and positions[-1] == length - 1 and bool((positions.diff() > 0).all())
    assert len((positions[:, None] - positions).unique()) == 2 * length - 1
    assert len(spread(spread_length(len(positions)))) <= max(len(positions), BLOCK)


@pytest.mark.parametrize("size", [1, 2, 361, 362, 363, 1000, 4096, 65537, 131071])
def test_ends_of_windows_and_chunks_are_exact(size: int) -> None:
    for window, chunk in ((size, 0), (0, size)):
        positions, seen = with_ends(spread(1 << 17), lambda p, m=(window, chunk): expected_mask(*m, p)[None])
        got = classify_mask(seen[0], positions)
        assert got == (window, chunk) or (
            size in (1, 131071) and bool((expected_mask(*got, positions) == seen[0]).all())
        )
