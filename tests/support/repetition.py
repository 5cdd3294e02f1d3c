"""KVzip for tests/support/oracle.py, from its paper (arXiv 2505.23416, sections 3.2 to 3.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.support.oracle import Entry, Layer, Moment
from tests.support.oracle_rules import Scored, Scores, best


@dataclass(kw_only=True)
class KVzipRule(Scored):
    """What a repetition of the prompt looks up, a number at a time.

    prompt, following, answer: ids that are asked with; part: tokens that are repeated at a time.
    """

    sinks: int = 4
    scope: str = "model"
    part: int = 2000
    lead: int = 8
    prompt: tuple[int, ...] = ()
    following: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()
    head_floor: float = 0.0

    def repetition(self, ids: list[int]) -> list[tuple[list[int], range]]:
        found = []
        for begin in range(self.sinks, len(ids), self.part):
            places = range(begin, min(len(ids), begin + self.part))
            asked = list(self.prompt)
            if begin > self.sinks:
                asked = [*self.following, *ids[max(self.sinks, begin - self.lead) : begin]]
            found.append(([*asked, *self.answer, *(ids[j] for j in places)], places))
        return found

    def look(self, layer: Layer, places: range, queries: range) -> None:
        for h, entries in enumerate(layer.heads):
            for j in places:
                shares = []
                for g in layer.group(h):
                    for i in queries:
                        # The softmax over the first tokens, the part, and what was read so far: the other tokens' weights
                        # are left out of the sum.
                        weights = layer.attention[g][i]
                        some = [*range(self.sinks), *places, *range(queries.start, i + 1)]
                        shares.append(weights[j] / sum(weights[n] for n in some))
                entries[j].score = max(shares)

    def scores(self, layer: Layer, moment: Moment) -> Scores:
        return [[e.score for e in entries] for entries in layer.heads]

    def keep_all(self, layers: list[Layer], moment: Moment) -> list[list[list[Entry]]]:
        if moment.part != "again":
            return [layer.heads for layer in layers]
        if self.scope == "head":
            return [super(KVzipRule, self).keep(layer, moment) for layer in layers]
        out = []
        for group in [layers] if self.scope == "model" else [[layer] for layer in layers]:
            slots = sum(self.slots(layer, moment)[0] * len(layer.heads) for layer in group)
            everything = [
                Entry(e.key, e.value, e.position, n, score=math.inf if e.position < self.sinks else e.score)
                for layer in group
                for n, e in enumerate(e for head in layer.heads for e in head)
            ]
            stays = {id(e) for e in best(everything, [e.score for e in everything], slots, [False] * len(everything))}
            at = iter(everything)
            out += [[[e for e in head if id(next(at)) in stays] for head in layer.heads] for layer in group]
        return out
