"""Where the rows of a prompt end, for `generate`: it reads the logits of the last column, where a row padded on the right has
none."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.errors import InputError


def padding_after(mask: Tensor | None, new: int, piece: int | None) -> Tensor | None:
    """How many columns of padding stand after each row's last token, (B,) int64 on the mask's device; None where no row has
    some. mask: (B, columns), 1 for tokens, whose last `new` columns come in now, the last piece of them `piece` columns wide
    (None: in one piece).

    Raises InputError for a row that has no token among them, or none in the last piece.
    """
    if mask is None or bool(mask[:, -1].all()):
        return None
    after = mask.flip(1).to(torch.int64).argmax(1)
    after = torch.where(mask.any(1), after, mask.shape[1])
    rows = after.tolist()
    for row, count in enumerate(rows):
        if count >= new:
            raise InputError(
                f"row {row} has no token among the {new} new columns (attention_mask is 0 there), so there is nothing to "
                "generate its answer from; leave the row out of the call (cache.select takes rows of a cache), or give it a token"
            )
        last = new if piece is None else (new - 1) % piece + 1
        if count >= last:
            raise InputError(
                f"row {row} has {count} columns of padding on the right, and prefill_chunk_size={piece} cuts off its last token "
                "from the end of the prompt; pad on the left, or leave prefill_chunk_size out"
            )
    return after


def last_logits(logits: Tensor, after: Tensor) -> Tensor:
    """The logits (B, 1, V) of each row's last token, of those (B, columns, V) of the last columns; after: see `padding_after`."""
    column = logits.shape[1] - 1 - after.to(logits.device)
    return logits[torch.arange(len(logits), device=logits.device), column][:, None]
