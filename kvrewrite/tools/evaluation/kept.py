"""What each kv head kept of one text: recorded while policies are measured, for the report's heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvrewrite.tools.evaluation.ask import prefill

Bits = Mapping[str, Sequence[str]]


def record(model: Any, ids: Sequence[int]) -> dict[str, list[str]]:
    """Compresses a text alone and returns, for each layer (its number as text), a hex number for each kv head: bit i from
    the left says whether token i was kept."""
    given = torch.tensor([list(ids)])
    cache = prefill(model, given, torch.ones_like(given), len(ids) + 1)
    found = {}
    for layer, rows in cache.positions().items():
        found[str(layer)] = [pack(positions, len(ids)) for positions in rows[0]]
    return found


def pack(positions: Sequence[int], length: int) -> str:
    """Positions below `length` as hex; the inverse of `unpack`."""
    bits = bytearray(-(-length // 8))
    for position in positions:
        bits[position // 8] |= 128 >> position % 8
    return bits.hex()


def unpack(text: str, length: int) -> list[bool]:
    """Whether each of `length` positions is in a hex number."""
    bits = bytes.fromhex(text)
    return [bool(bits[i // 8] & 128 >> i % 8) for i in range(length)]


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token. A character of several tokens is a part of the last of them."""
    found: list[str] = []
    start = 0  # of the tokens whose text is not complete yet
    for end in range(1, len(ids) + 1):
        lead = list(ids[max(0, start - 4) : start])  # how a token is written may depend on those before it
        before, now = tokenizer.decode(lead), tokenizer.decode([*lead, *ids[start:end]])
        if now.endswith("\ufffd") and end < len(ids) and end - start < 6:
            found.append("")
            continue
        found.append(now[len(before) :])
        start = end
    return found
