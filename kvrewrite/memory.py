"""How much memory caches take, from the sites alone: for reports, dry runs and model cards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvrewrite.kernels.reference.quantize import Scheme
from kvrewrite.pages import PAGE, SLOT_EXTRA
from kvrewrite.policies import UNLIMITED, Policy
from kvrewrite.site import AttentionSite


@dataclass
class MemoryPlan:
    """Bytes for one context length. full: an ordinary cache; evicted: after the prompt; peak: during the prompt."""

    context: int
    batch: int
    full: int
    evicted: int
    peak: int


def plan_memory(
    sites: Iterable[AttentionSite], policy: Policy, itemsize: int, context: int, batch: int = 1
) -> MemoryPlan:
    """Cache bytes for prompts of `context` tokens.

    The peak adds the keys and values of one chunk in one layer, which are alive while that layer runs. Pages are counted
    whole; an ordinary cache keeps every token in layers without a window and the window in the others. A quantized cache
    has its newest slots in full precision besides the pages, and in the peak one layer's slots as attention reads them.
    """
    owners = [site for site in sites if site.shares_kv_with is None]
    full = evicted = chunk_bytes = longest = widest = 0
    # Heads that all have the same budget count as one.
    alike = [1 if policy.head_pattern else site.kv_heads for site in owners]
    kept = [[0] * (site.kv_heads // n) for site, n in zip(owners, alike)]
    most = [[0] * (site.kv_heads // n) for site, n in zip(owners, alike)]
    for segment in policy.plan(context):
        longest = max(longest, segment.length)
        for i, keep in enumerate(policy.layer_keeps(segment, context, len(owners))):
            for h, limit in enumerate(policy.head_keeps(keep, i, len(kept[i]))):
                kept[i][h] = min(kept[i][h] + segment.length, limit)
                most[i][h] = max(most[i][h], kept[i][h])
    for i, site in enumerate(owners):
        token = site.kv_heads * (site.head_dim + site.v_head_dim) * itemsize
        span = site.window or site.chunk or UNLIMITED
        full += min(context, span) * token
        for slots, add in ((kept[i], True), (most[i], False)):
            pages = [-(-min(n, span) // PAGE) for n in slots]
            size = sum(pages) * alike[i] * (_page_bytes(site, policy, itemsize) // site.kv_heads)
            size += _row_bytes(site, policy, itemsize)
            if add:
                evicted += size
            else:
                chunk_bytes += size
                widest = max(widest, max(pages) * PAGE * token)
    each = [s.kv_heads * (s.head_dim + s.v_head_dim) * itemsize for s in owners]
    layer = sum(each) if policy.shares_layers else max(each, default=0)
    peak = chunk_bytes + layer * longest + (widest if policy.quantize != "none" else 0)
    return MemoryPlan(context, batch, full * batch, evicted * batch, peak * batch)


def _page_bytes(site: AttentionSite, policy: Policy, itemsize: int) -> int:
    """A page of every kv head of a layer."""
    if policy.quantize == "none":
        return PAGE * site.kv_heads * ((site.head_dim + site.v_head_dim) * itemsize + SLOT_EXTRA)
    scheme = Scheme(policy.quantize, policy.quantize_group)
    slot = scheme.key_bytes(site.head_dim, itemsize) + scheme.value_bytes(site.v_head_dim, itemsize) + SLOT_EXTRA
    return site.kv_heads * round(PAGE * slot)


def _row_bytes(site: AttentionSite, policy: Policy, itemsize: int) -> int:
    """What a layer has for a row besides pages: the newest slots in full precision, a threshold for merging."""
    size = 4 if policy.merge else 0
    if policy.quantize != "none":
        tail = policy.quantize_residual + policy.quantize_group
        size += site.kv_heads * (tail * (site.head_dim + site.v_head_dim) * itemsize + 4)
    return size


def human(size: float) -> str:
    """Bytes for people: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
