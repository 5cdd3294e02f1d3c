"""KVzip's score in plain torch: what a repetition of the text looks up in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels.attention.reference import largest_weights
from kvrewrite.kernels.groups import At, Dense, Logits, Placed, Repetition, Tokens


def reconstruction(
    repetition: Repetition, dense: Dense, k_pages: Tensor, table: Tensor, at: At, logits: Logits
) -> Tensor:
    """See `kvrewrite::reconstruction`."""
    q, k, stored, begins, ends, first, most = repetition
    b, hkv, t, _ = k.shape
    # Single tokens are never a repetition, so that decoding does not ask the device.
    if t == 1 or not bool((ends > 0).any()):
        return stored.clone()
    device, page = q.device, k_pages.shape[1]
    begins, ends = begins.long()[:, None], ends.long()[:, None]
    part, head = begins + torch.arange(most, device=device), torch.arange(first, device=device).expand(b, -1)
    slots = torch.cat([head, part], dim=1)
    live = torch.cat([head < ends, part < ends], dim=1)
    inside = slots.masked_fill(~live, 0)[:, None].expand(b, hkv, -1)
    if dense.k_dense is None:
        cached = k_pages[torch.gather(table.long(), 2, inside // page), inside % page]
    else:
        cached = torch.gather(dense.k_dense, 2, inside[..., None].expand(-1, -1, -1, k.shape[3]))
    real = torch.arange(t, device=device) < at.valid[:, None]
    # Nothing was evicted, so a slot is a place in the text.
    pos = torch.cat([slots, at.positions], dim=1)[:, None].expand(b, hkv, -1)
    seen = torch.cat([live, real], dim=1)[:, None].expand(b, hkv, -1)
    placed = Placed(at.positions, pos, seen)
    keys = torch.cat([cached.to(k.dtype), k], dim=2)
    found = largest_weights(Tokens(q, keys, keys), placed, logits, real & (ends > 0))[:, :, first : first + most]
    slot = torch.arange(stored.shape[2], device=device)
    again = torch.gather(found, 2, (slot - begins).clamp(0, most - 1)[:, None].expand(b, hkv, -1))
    return torch.where(((slot >= begins) & (slot < ends))[:, None], again, stored)
