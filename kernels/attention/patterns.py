"""Which part of a chunk's attention each query head computes, as text: the patterns of sparse prefill.

The patterns are those of MInference (arXiv 2407.02490, section 3), with numbers:

    vertical_slash:V:S   the V columns and the S diagonals that the chunk's last queries attend to most
    a_shape:F:W          the first F keys and the W newest of each query
    block_sparse:N       the N blocks of keys whose mean is nearest to the mean of a block of queries
    dense                every key

A site's pattern is one such word for each query head, in order, with commas: it stands in the graph as an argument of
attention. Numbers are of keys as the chunk sees them: the slots that the cache holds, in their order, then the new
tokens. Only torch is imported here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

QUERY_BLOCK = 128  # queries that see the same blocks of keys
KEY_BLOCK = 64
LAST_QUERIES = 64  # of a chunk, which columns and diagonals are chosen by
FORCED = 30  # first columns and nearest diagonals that are chosen in any case
DENSE_TOKENS = 64  # chunks of at most so many tokens see everything
NUMBERS = {"vertical_slash": 2, "a_shape": 2, "block_sparse": 1, "dense": 0}


class HeadPattern(NamedTuple):
    """One head's pattern: its kind and the numbers after it, 0 where there are none."""

    kind: str
    first: int = 0
    second: int = 0

    def __str__(self) -> str:
        return ":".join([self.kind, *map(str, self[1 : 1 + NUMBERS[self.kind]])])


DENSE = HeadPattern("dense")


def parse_head(word: str) -> HeadPattern:
    """A pattern from its text; ValueError says what is wrong."""
    kind, *numbers = word.split(":")
    if kind not in NUMBERS:
        raise ValueError(f"pattern {word!r}: got {kind!r}, expected one of {', '.join(NUMBERS)}")
    if len(numbers) != NUMBERS[kind]:
        raise ValueError(
            f"pattern {word!r}: got {len(numbers)} numbers, expected {NUMBERS[kind]}, as in {EXAMPLES[kind]}"
        )
    if not all(n.isascii() and n.isdigit() and 0 < int(n) < 1 << 31 for n in numbers):
        raise ValueError(f"pattern {word!r}: expected whole numbers from 1 on, as in {EXAMPLES[kind]}")
    return HeadPattern(kind, *map(int, numbers))


EXAMPLES = {
    "vertical_slash": "vertical_slash:1000:6096",
    "a_shape": "a_shape:1024:4096",
    "block_sparse": "block_sparse:100",
    "dense": "dense",
}


@lru_cache(maxsize=1024)
def parse(text: str) -> tuple[HeadPattern, ...]:
    """The patterns of a site's heads from its text; ValueError says what is wrong."""
    return tuple(parse_head(word) for word in text.split(","))


class HeadTable(NamedTuple):
    """The numbers of a site's patterns on a device, per head: vertical, slash, first, window, blocks (H,) int64, 0 for
    heads of other kinds; dense (H,) bool. block_heads: the numbers of the heads of kind block_sparse, int64. most: the
    largest of vertical, slash and blocks, known on the host."""

    vertical: Tensor
    slash: Tensor
    first: Tensor
    window: Tensor
    blocks: Tensor
    dense: Tensor
    block_heads: Tensor
    most: tuple[int, int, int]


@lru_cache(maxsize=4096)
def head_table(text: str, device: torch.device) -> HeadTable:
    """The table of a site's text. It is made once for a device, so that a captured graph copies nothing from the host."""
    heads = parse(text)

    def of(kind: str, numbers: list[int]) -> list[int]:
        return [n if h.kind == kind else 0 for h, n in zip(heads, numbers, strict=True)]

    first, second = [h.first for h in heads], [h.second for h in heads]
    vertical, slash, blocks = of("vertical_slash", first), of("vertical_slash", second), of("block_sparse", first)
    return HeadTable(
        torch.tensor(vertical, device=device),
        torch.tensor(slash, device=device),
        torch.tensor(of("a_shape", first), device=device),
        torch.tensor(of("a_shape", second), device=device),
        torch.tensor(blocks, device=device),
        torch.tensor([h.kind == "dense" for h in heads], device=device),
        torch.tensor([i for i, n in enumerate(blocks) if n], device=device, dtype=torch.int64),
        (max(vertical), max(slash), max(blocks)),
    )
