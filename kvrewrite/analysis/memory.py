"""Computes the memory of caches from the sites alone: for reports, dry runs and model cards."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kvrewrite.cache.pages import SLOT_EXTRA
from kvrewrite.cache.slot_plan import pages_of, prompt_slots
from kvrewrite.ir.layout import PAGE, CacheLayout
from kvrewrite.ir.site import AttentionSite
from kvrewrite.kernels.latent.reference import heads_at_once
from kvrewrite.kernels.quantized.scheme import Scheme
from kvrewrite.policies import Policy


@dataclass
class MemoryPlan:
    """Bytes for one context length. full: an ordinary cache; evicted: after the prompt; peak: during the prompt;
    carried: the part of each that recurrent layers carry, at any length."""

    context: int
    batch: int
    full: int
    evicted: int
    peak: int
    carried: int = 0


@dataclass
class LayerPlan:
    """One layer that owns a cache, for one row. slots: live slots per head after the prompt; most: the most that a head
    has during it; pages: of all heads, after the prompt; full, evicted, largest: bytes of an ordinary cache, after the
    prompt, and at the maximum."""

    site: AttentionSite
    slots: list[int]
    most: int
    pages: int
    full: int
    evicted: int
    largest: int


def plan_layers(sites: Iterable[AttentionSite], policy: Policy, itemsize: int, context: int) -> list[LayerPlan]:
    """Plans what each layer's cache holds and takes for prompts of `context` tokens.

    Pages are counted whole. An ordinary cache keeps every token in layers without a window and the window in the
    others. A quantized cache has its newest slots in full precision besides the pages. If heads share the budget of
    their layer (head_budgets=adakv, gates), slots are the mean over heads.
    """
    owners = [site for site in sites if site.shares_kv_with is None]
    spans = [site.window or site.chunk for site in owners]
    found = prompt_slots(policy, policy.passes(context), [site.kv_heads for site in owners], spans)
    plans = []
    for site, span, held in zip(owners, spans, found):
        slots, widest = held[-1], held.max(0)
        pages, widest_pages = (int(pages_of(heads).sum()) for heads in (slots, widest))
        page, row = _page_bytes(site, policy, itemsize) // site.kv_heads, _row_bytes(site, policy, itemsize)
        plans.append(
            LayerPlan(
                site=site,
                slots=slots.tolist(),
                most=int(widest.max()),
                pages=pages,
                full=min(context, span or context) * _token_bytes(site, itemsize),
                evicted=pages * page + row,
                largest=widest_pages * page + row,
            )
        )
    return plans


def carried_bytes(layout: CacheLayout) -> int:
    """Returns the bytes per row that layers without attention carry at any length of text: windows of inputs and the
    states of recurrences. layout: the program's."""
    carried = [state for state in layout.states if state.carried]
    return sum(math.prod(state.shape) * getattr(torch, state.dtype).itemsize for state in carried)


def plan_memory(
    sites: Iterable[AttentionSite], policy: Policy, itemsize: int, context: int, batch: int = 1, carried: int = 0
) -> MemoryPlan:
    """Plans the cache bytes of all layers (`plan_layers`) and of what other layers carry (`carried_bytes`, for one
    row).

    The peak adds the keys and values of one chunk in one layer (in all, if layers share a budget), which are alive
    while that layer runs, and for a quantized cache one layer's slots as attention reads them. For caches of latents,
    full is a full cache of latents, and the peak adds what is expanded of one layer's at a time.
    """
    layers = plan_layers(sites, policy, itemsize, context)
    longest = max((segment.length for segment in policy.passes(context)), default=0)
    each = [_token_bytes(p.site, itemsize) for p in layers]
    token = sum(each) if policy.shares_layers else max(each, default=0)
    widest = max((-(-p.most // PAGE) * PAGE * t for p, t in zip(layers, each)), default=0)
    full, evicted = sum(p.full for p in layers), sum(p.evicted for p in layers)
    peak = sum(p.largest for p in layers) + token * longest + (widest if policy.quantize != "none" else 0)
    again = max((_expanded_bytes(p, itemsize, longest, batch) for p in layers), default=0)
    full, evicted, peak = ((n + carried) * batch for n in (full, evicted, peak))
    return MemoryPlan(context, batch, full, evicted, peak + again, carried * batch)


def _expanded_bytes(plan: LayerPlan, itemsize: int, longest: int, batch: int) -> int:
    """Returns the most bytes that a chunk expands at a time of a layer's latents: keys and values of some heads."""
    if plan.site.expanded is None:
        return 0
    heads, k, v = plan.site.expanded
    slots = -(-plan.most // PAGE) * PAGE + longest
    return heads_at_once(heads, batch, slots, k + v, itemsize) * batch * slots * (k + v) * itemsize


def _token_bytes(site: AttentionSite, itemsize: int) -> int:
    """Returns the bytes of one token's keys and values in all kv heads of a layer, in full precision."""
    return site.kv_heads * site.cached_channels * itemsize


def _page_bytes(site: AttentionSite, policy: Policy, itemsize: int) -> int:
    """Returns the bytes of one page in every kv head of a layer."""
    if policy.quantize == "none":
        return PAGE * site.kv_heads * (site.cached_channels * itemsize + SLOT_EXTRA)
    scheme = Scheme(policy.quantize, policy.quantize_group)
    slot = scheme.key_bytes(site.head_dim, itemsize) + scheme.value_bytes(site.v_head_dim, itemsize) + SLOT_EXTRA
    return site.kv_heads * round(PAGE * slot)


def _row_bytes(site: AttentionSite, policy: Policy, itemsize: int) -> int:
    """Returns a layer's bytes per row besides pages: the newest slots in full precision, a threshold for merging."""
    size = 4 if policy.merge else 0
    if policy.quantize != "none":
        tail = policy.quantize_residual + policy.quantize_group
        size += site.kv_heads * (tail * (site.head_dim + site.v_head_dim) * itemsize + 4)
    return size
