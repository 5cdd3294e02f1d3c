"""What stands in a cache's text for tokens that came as embeddings: a negative number for each, made of its bytes.

A cache compares later texts with what it was given. Ids compare as they are; an embedding has none, so its bytes are hashed to
30 bits: two different embeddings agree by chance once in a billion. An id and an embedding compare by the embedding that
the model has for the id.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

HIGHEST = -(1 << 30) - 1  # of all signatures
_WIDTHS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_STEP = 256  # tokens at a time: each takes 8 bytes for each number of its embedding meanwhile


@functools.lru_cache(maxsize=8)
def _factors(width: int, device: torch.device) -> Tensor:
    """An odd number for each place of an embedding; the same on every machine."""
    place = torch.arange(1, width + 1, dtype=torch.int64)
    mixed = place * -7046029254386353131  # 2^64 divided by the golden ratio, as int64
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return (((mixed ^ (mixed >> 32)) << 1) | 1).to(device)


def signatures(embeds: Tensor) -> Tensor:
    """Embeddings (B, T, D) -> (B, T) int64, from -2^31 to HIGHEST, which depend on the bytes of each token's embedding."""
    numbers = embeds.detach().contiguous().view(_WIDTHS[embeds.element_size()])
    factors = _factors(embeds.shape[-1], embeds.device)
    sums = [(part.long() * factors).sum(-1) for part in numbers.split(_STEP, dim=1)]
    return HIGHEST - ((torch.cat(sums, 1) >> 34) & ((1 << 30) - 1))
