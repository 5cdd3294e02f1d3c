"""Beginnings of prompts that several requests share, such as system prompts: computed once, forked for each.

What is held at the end of a segment depends on the ids so far and on what the policy's plan says of the segments so far, and
on nothing else. So both are what a beginning is found by: where a budget is a part of the whole prompt's length, or a
prompt is one segment, plans of different prompts differ, and nothing is shared. A beginning is kept once it was seen
twice: what only one request has costs nothing but its hash.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.cache.slot_plan import head_budgets
from kvrewrite.policies import Policy, RowState, Segment
from kvrewrite.runtime.batch import Batch, Running

HASHES = 1 << 16  # of beginnings that were seen once


class Plan:
    """Where a prompt's segments end, and what its beginnings are found by. ends, keys: of each segment but the last."""

    def __init__(self, batch: Batch, ids: Sequence[int], policy: Policy, max_length: int | None):
        self.policy, self.total = policy, len(ids)
        self.segments = policy.plan(self.total)
        self.ends = np.cumsum([s.length for s in self.segments[:-1]], dtype=np.int64).tolist()
        self.keys: list[bytes] = []
        layout = batch.model.program.layout
        order = sorted((layer, k.kv_heads) for k in layout.classes for layer in k.layers)
        heads = [n for _, n in order]
        tables = [id(table) for table in batch.model.length_tables(max_length).values()]
        state = hashlib.blake2b(repr(tables).encode(), digest_size=16)
        known: dict[str, bytes] = {}
        data, begin = np.asarray(ids, dtype=np.int64), 0
        for segment, end in zip(self.segments, self.ends):
            said = repr((segment.length, segment.keep, segment.recent, sorted(segment.values.items())))
            if said not in known:  # budgets of heads may depend on the whole length, too
                known[said] = repr((said, head_budgets(policy, segment, self.total, heads))).encode()
            state.update(known[said])
            state.update(data[begin:end].tobytes())
            self.keys.append(state.digest())
            begin = end

    def goes_on(self, at: int, cache: EvictionCache) -> bool:
        """Whether what is left of the prompt after its segment `at` is planned the same from there."""
        rest = self.total - self.ends[at]
        state = RowState(seen=self.ends[at], generated=0, held=cache.length[0])
        left: list[Segment] = self.policy.plan(rest, state)
        return left == self.segments[at + 1 :]


class Prefixes:
    """Forks of caches at segments' ends. most: how many are kept; those that were not used for longest go."""

    def __init__(self, batch: Batch, most: int):
        self.batch, self.most, self.hits, self.tokens = batch, most, 0, 0
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._kept: OrderedDict[bytes, EvictionCache] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, plan: Plan) -> EvictionCache | None:
        """What there is of the longest beginning that is kept."""
        for at in range(len(plan.keys) - 1, -1, -1):
            kept = self._kept.get(plan.keys[at])
            if kept is not None and plan.goes_on(at, kept):
                self._kept.move_to_end(plan.keys[at])
                self.hits += 1
                self.tokens += plan.ends[at]
                return kept
        return None

    def wanted(self, plan: Plan) -> int | None:
        """The segment at whose end the prompt should be kept: the last one that another prompt had, too. Remembers this
        prompt's beginnings."""
        known = [at for at, key in enumerate(plan.keys) if key in self._seen]
        for key in plan.keys:
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > HASHES:
            self._seen.popitem(last=False)
        return known[-1] if self.most and known and plan.keys[known[-1]] not in self._kept else None

    def keep(self, key: bytes, running: Running) -> None:
        """Keeps a fork of what a prompt has so far."""
        assert running.cache is not None
        while len(self._kept) >= self.most:
            self.drop()
        self._kept[key] = running.cache.fork()

    def drop(self) -> bool:
        """Gives the pages of the one back that was not used for longest. Returns whether there was one."""
        if not self._kept:
            return False
        _, cache = self._kept.popitem(last=False)
        cache.reset()
        return True

    def clear(self) -> None:
        """Gives all pages back."""
        while self.drop():
            pass
