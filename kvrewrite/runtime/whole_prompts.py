"""Policies that evict from a prompt as a whole: pieces of one are refused, and a word is said about scores.

Such a policy evicts after the logits of the prompt, so they show nothing of it; and of pieces it would keep everything.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING

from kvrewrite.cache.request import Request
from kvrewrite.errors import CacheError, OptionError
from kvrewrite.policies import Policy
from kvrewrite.runtime.call import Tokens

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel


def check_pieces(model: RewrittenModel, tokens: Tokens, cache: Request) -> None:
    """A policy that evicts once needs a row's first prompt whole: of pieces it would keep everything, whatever its budget.
    (More of a prompt that fits the budget is right, because nothing goes.) Raises CacheError."""
    policy = model.policy
    for row, n in enumerate(tokens.counts):
        seen = cache.seen[row]
        if not n or not seen or tokens.decoding[row] or cache.prompted[row]:
            continue
        if cache.generated[row]:
            cache.prompted[row], cache.implied[row] = True, cache.columns  # what follows an answer is another prompt
        elif policy.evicts(policy.plan(seen + n), model.cache_owners):
            raise CacheError(
                f"row {row} gets {n} more tokens of a prompt after {seen}, before any token was generated, but "
                f"{policy.name} evicts once, from a row's first prompt as a whole, and would keep the pieces whatever "
                f"its budget ({policy.budget}). Pass the prompt in one call (generate without prefill_chunk_size), or "
                "use a policy that evicts between chunks (tova, h2o, keydiff, locret). If the first part is a text of its "
                "own that is asked about, make its cache with model.prefill(text), or say so with cache.end_prompt()"
            )


def check_chunk_size(policy: Policy, owners: int, size: int, columns: int, longest: int) -> None:
    """The same of `generate`'s prefill_chunk_size, before the first piece has run. owners: layers that own a cache;
    columns, longest: of the prompt, and of its longest row. Raises CacheError."""
    if columns > size and evicts_in_prompt(policy, longest, owners):
        raise CacheError(
            f"prefill_chunk_size={size} would cut the prompt of {longest} tokens, but {policy.name} evicts once, from a "
            f"row's first prompt as a whole, and would keep the pieces whatever its budget ({policy.budget}). Leave "
            "prefill_chunk_size out (whole keys and values are alive in one layer at a time), or use a policy that evicts "
            "between chunks (tova, h2o, keydiff, locret)"
        )


def evicts_in_prompt(policy: Policy, length: int, layers: int = 1) -> bool:
    """Whether a prompt of `length` tokens loses any before the first token is generated. layers: how many of the model's
    layers own a cache."""
    return policy.evicts(policy.plan(length), layers)


def evicts_within(policy: Policy, length: int, layers: int = 1) -> bool:
    """Whether a forward over `length` tokens evicts anything before its last segment, so that its logits can differ."""
    return policy.evicts(policy.plan(length)[:-1], layers)


def warn_of_scores(model: RewrittenModel, tokens: Tokens, cache: Request) -> bool:
    """Warns where logits of several columns are asked for, the policy evicts, and no column's logits can show it. Returns
    whether it did."""
    policy, told = model.policy, False
    for n, seen in zip(tokens.counts, cache.seen):
        if told or n < 2 or seen or not evicts_in_prompt(policy, n, model.cache_owners):
            continue
        if not evicts_within(policy, n, model.cache_owners):
            told = True
            warnings.warn(
                f"{policy.name} evicts after the logits of this call ({n} tokens in one piece), so a loss, a perplexity "
                f"or log-likelihoods made of them are those of the full cache. To score under eviction, {_scoring(policy)} "
                "(docs/measuring.md; said once)",
                stacklevel=2,
            )
    return told


def _scoring(policy: Policy) -> str:
    """How a text is scored under eviction with this policy."""
    prefill = "score what follows a context on the cache that model.prefill(context) returns"
    if policy.repeats_prompt:  # whose chunks evict nothing
        return prefill
    try:
        dataclasses.replace(policy, chunk=1)
    except OptionError:
        return prefill
    return f"transform with chunk=1 (every token then sees what was kept before it), or {prefill}"
