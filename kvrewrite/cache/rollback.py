"""Taking back the newest tokens of a cache, in place: drafts that are verified need it.

A token that has only been appended can be taken back, and the cache is what it would be had it never seen it. What went
through an eviction can't: what that evicted is gone, and scores that summed up attention have taken in that of the token.
So a cache knows how far it goes back (`firm`), and everything else is refused with the reason. For caches that can't go back
in place, a `fork()` or a `checkpoint()` made before does, and costs the pages that are written to meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvrewrite.cache.pages import to_device
from kvrewrite.ir.layout import CacheLayout
from kvrewrite.policies.base import Policy
from kvrewrite.policies.segments import UNLIMITED

if TYPE_CHECKING:
    from kvrewrite.cache.eviction_cache import EvictionCache

PROMPTS = 64  # the newest ones, which a cache can be taken back across


class Turn(NamedTuple):
    """What a cache counted before a step of several tokens: columns and, of each row, tokens since the prompt before."""

    columns: int
    generated: tuple[int, ...]


def why_never(layout: CacheLayout, policy: Policy) -> str | None:
    """The reason why no cache of a program goes back in place, or None."""
    if any(state.carried for state in layout.states):
        return "layers without attention carry a state that has taken the tokens in"
    if policy.recalls:
        return f"{policy.name} has put tokens into its memory, and found blocks by them"
    if layout.quantize is not None:
        return "slots that were quantized have lost their exact keys and values"
    if layout.contiguous:
        return f"{policy.name} ranks cached keys anew (positions=contiguous)"
    if policy.gates or policy.data_dependent:
        return f"with {policy.name} the text decides which tokens enter the cache"
    return None


def remembers(layout: CacheLayout) -> bool:
    """Whether tokens leave something behind besides slots: in the scores of others, or in what a policy sums up."""
    return layout.rewrites_slots or any(not state.per_token for state in layout.states)


def only_appends(policy: Policy) -> bool:
    """Whether nothing ever goes under a policy, whatever its scores are."""
    return not policy.evicts_ever or policy.slots(1) >= UNLIMITED


def why_not(cache: EvictionCache, columns: int) -> str | None:
    """The reason why a cache can't become what it was after its first `columns` columns, or None."""
    if cache.why_never is not None:
        return cache.why_never
    if columns < cache.firm:
        return f"its policy has evicted, or summed up attention, up to column {cache.firm}, and column {columns} lies before that"
    windows = [int(n) for lease in cache.leases for n in lease.windows if n]
    kept = cache.windows_from is not None and columns >= cache.windows_from
    if windows and columns < cache.columns and not kept:
        most = max(seen + ahead for seen, ahead in zip(cache.seen, cache.ahead))
        if most >= min(windows):  # what the next token would not see has gone
            return f"layers with a window of {min(windows)} have lost tokens that would come into view again"
    return None


def take_back(cache: EvictionCache, columns: int) -> None:
    """Becomes what it was after its first `columns` columns, where `why_not` has nothing against it."""
    gone = cache.history.real(cache.columns)[:, columns:].sum(1)
    for lease in cache.leases:
        lens = lease.lens  # a decoding graph gives them back
        lens -= to_device(gone.astype(np.int32), lens.device)[None, :, None]
        lease.resize(lease.bound - gone[None, :, None], 0)
    left = [turn for turn in cache.turns if turn.columns < columns]
    if len(left) < len(cache.turns):  # what counted tokens before the first prompt that is taken back
        first = cache.turns[len(left)]
        gone_since = cache.history.real(first.columns)[:, columns:].sum(1).tolist()
        cache.generated = [max(0, n - since) for n, since in zip(first.generated, gone_since)]
    else:
        cache.generated = [max(0, n - new) for n, new in zip(cache.generated, gone.tolist())]
    cache.turns = left
    for row, n in enumerate(gone.tolist()):
        cache.ahead[row] = max(0, cache.ahead[row] + n)
        cache.seen[row] -= n
        cache.length[row] -= n
        cache.next_rotary[row] -= n
        if columns <= cache.implied[row]:  # nothing has said yet that its first prompt is complete
            cache.prompted[row], cache.implied[row] = False, 0
        if cache.seen[row] < cache.first_prompt[row] or not cache.prompted[row]:
            first_prompt = cache.first_prompt[row]
            cache.first_prompt[row] = first_prompt if cache.seen[row] > first_prompt else 0
            cache.prompted[row] = cache.prompted[row] and cache.seen[row] >= first_prompt
    cache.history.crop(columns)
    cache.columns, cache.ended = columns, None
    cache.checkpoints = [c for c in cache.checkpoints if c.columns <= columns]
