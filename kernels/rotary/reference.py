"""Keys that lie rotated in the cache while ranks are frozen, and the way back, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels import pages


def rotate_cached_keys(
    k_pages: Tensor,
    pos_pages: Tensor,
    table: Tensor,
    lens: Tensor,
    cos: Tensor,
    sin: Tensor,
    partner: Tensor,
    undo: bool,
) -> None:
    """See `kvrewrite::settle_keys`. One head at a time, so that little memory is needed.

    The rotation multiplies the pair (i, j = partner[i]) by [[cos_i, sin_i], [sin_j, cos_j]]; taking it back multiplies
    by the inverse of that matrix (scaled rotations, as of longrope, have a determinant other than 1).
    """
    slot = torch.arange(table.shape[2] * k_pages.shape[1], device=table.device)
    for head in range(table.shape[1]):
        one = table[:, head : head + 1]
        live = slot < lens[:, head : head + 1, None]
        x = pages.read(k_pages, one)
        place = torch.where(live, pages.read(pos_pages, one)[..., 1].long(), 0)
        wide = torch.promote_types(x.dtype, torch.float32)
        c, s, x = cos[place].to(wide), sin[place].to(wide), x.to(wide)
        if undo:
            across = c[..., partner]
            turned = (across * x - s * x[..., partner]) / (c * across - s * s[..., partner])
        else:
            turned = c * x + s * x[..., partner]
        pages.write(k_pages, one, slot.expand(live.shape), turned, live)
