"""Contiguous positions: cached keys lie rotated by their rank while single tokens are decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvrewrite.cache.pages import to_device
from kvrewrite.ir.fx import is_op
from kvrewrite.ir.layout import spec_of
from kvrewrite.ir.program import Program
from kvrewrite.policies import Policy

if TYPE_CHECKING:
    from kvrewrite.cache.eviction_cache import EvictionCache
    from kvrewrite.runtime.model import RewrittenModel

ops = torch.ops.kvrewrite


def rotates_keys(program: Program, policy: Policy) -> bool:
    """Whether ranks are frozen while decoding, so that keys can lie rotated in their pages."""
    return program.layout.contiguous and not policy.renews_ranks_in_decoding


class KeyRotation:
    """What is done to cached keys before the first single token: where ranks are frozen, keys are rotated, which is undone before
    the next prompt; else ranks are written to the pages, as `token_update` keeps them."""

    def __init__(self, model: RewrittenModel):
        self.model = model
        self.sites: list[tuple[int, int, int, str]] = []  # class, layer in it, rotation, name of its partners
        for node in model.graph_module.graph.nodes:
            if is_op(node, ops.rotate.default):
                _, cos, _, positions, partner = node.args
                table = positions.args[1]
                cache, rotation = spec_of(table.args[0]), spec_of(cos)
                assert cache is not None and cache.cls is not None and rotation is not None
                assert rotation.rotation is not None
                site = (cache.cls, int(table.args[2]), rotation.rotation, str(partner.target))
                if site not in self.sites:
                    self.sites.append(site)

    def rotate(self, cache: EvictionCache) -> None:
        """Ranks that are not final yet are made, then keys are rotated in place."""
        device = self.model.device
        renew = [not s and n > 0 for s, n in zip(cache.ranks_frozen, cache.seen)]
        cache.next_rotary = [n if r else p for n, p, r in zip(cache.length, cache.next_rotary, renew)]
        cache.ranks_frozen = [s or r for s, r in zip(cache.ranks_frozen, renew)]
        following, anew = to_device(cache.next_rotary, device), to_device(renew, device)
        span = torch.empty(0, max(1, *cache.seen), device=device)
        self._apply(cache, undo=False, ranks=(following, anew, span) if any(renew) else None)
        cache.keys_rotated = True

    def hold_ranks(self, cache: EvictionCache) -> None:
        """Writes the ranks of all slots to their pages, counted from the newest token of the text."""
        device = self.model.device
        following, anew = to_device(cache.seen, device), to_device([True] * cache.batch_size, device)
        span = torch.empty(0, max(1, *cache.seen), device=device)
        for lease in cache.leases:
            lease.unshare(np.zeros_like(lease.bound))
        for c, layer in {(c, layer): None for c, layer, *_ in self.sites}:
            lease = cache.leases[c]
            ops.slot_rotary(lease.store.pos_pages, lease.table[layer], lease.lens[layer], following, anew, span)
        cache.ranks_held = True

    def undo(self, cache: EvictionCache) -> None:
        """Keys are unrotated again."""
        self._apply(cache, undo=True, ranks=None)
        cache.keys_rotated = False

    def _apply(self, cache: EvictionCache, undo: bool, ranks: tuple[Tensor, Tensor, Tensor] | None) -> None:
        for lease in cache.leases:
            lease.unshare(np.zeros_like(lease.bound))
        tables = cache.rotary(max(cache.next_rotary) + 1)
        for c, layer, rotation, partner in self.sites:
            lease = cache.leases[c]
            where = (lease.store.pos_pages, lease.table[layer], lease.lens[layer])
            if ranks is not None:
                ops.slot_rotary(*where, *ranks)
            channels = self.model.graph_module.get_buffer(partner)
            ops.settle_keys(lease.store.k_pages, *where, *tables[rotation], channels, undo)
