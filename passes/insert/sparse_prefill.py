"""Gives attention the patterns by which it computes chunks of prompts (MInference): sparse prefill.

Requires a graph after `insert_cache`, proved without patterns. Ensures that each site whose heads are not all dense has
its patterns as an argument, and that nothing else changed: single tokens and chunks of at most 64 tokens are attended to
as before.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from kvrewrite.errors import OptionError
from kvrewrite.ir.fx import arg, is_op, set_args
from kvrewrite.ir.site import AttentionSite
from kvrewrite.kernels.attention.patterns import DENSE, HeadPattern

ops = torch.ops.kvrewrite
Patterns = Mapping[int, tuple[HeadPattern, ...]]  # by layer, for each query head; layers that are not in it are dense
NAME = "sparse_prefill"  # among what was inserted at a site


def why_not(site: AttentionSite) -> str | None:
    """The reason why a site stays dense whatever its patterns are, or None."""
    if site.window or site.chunk:
        return f"its mask is {site.mask}: it sees few keys as it is"
    return None


def insert_sparse_prefill(gm: fx.GraphModule, sites: list[AttentionSite], patterns: Patterns | HeadPattern) -> None:
    """Sets the patterns in place. patterns: a pattern for all heads, or those of each layer; sites with a window or a
    chunk stay dense. Raises OptionError where they do not fit the model."""
    if not isinstance(patterns, HeadPattern):
        unknown = sorted(patterns.keys() - {site.layer for site in sites})
        if unknown:
            raise OptionError(
                f"prefill: patterns of layer {unknown[0]}, but the model has {len(sites)} attention sites"
            )
    nodes: dict[int, Any] = {}
    for node in _calls(gm, ops.cached_attention.default, ops.latent_attention.default):
        nodes[node.meta["kvrewrite_site"].layer] = node
    found = 0
    for site in sites:
        every = isinstance(patterns, HeadPattern)
        heads = (patterns,) * site.heads if isinstance(patterns, HeadPattern) else patterns.get(site.layer, ())
        if why_not(site) or all(head == DENSE for head in heads):
            continue
        where = f"prefill: layer {site.layer} ({site.module})"
        if len(heads) != site.heads and not every:
            raise OptionError(
                f"{where} has {site.heads} query heads, got patterns of {len(heads)}; expected one for each"
            )
        if site.alibi:
            raise OptionError(f"{where} has ALiBi, and the patterns are defined without; leave prefill out")
        if site.latent_cached:
            raise OptionError(
                f"{where} caches latents (mla=latent), whose chunks have no sparse attention; use mla=expanded, or leave "
                "prefill out"
            )
        set_args(nodes[site.layer], patterns=",".join(map(str, heads)))
        site.inserted.append(NAME)
        found += 1
    if not found:
        raise OptionError(
            "prefill: every layer would stay dense; expected a layer without window or chunk, and a pattern"
        )
    if _sums_of_all(gm):
        warnings.warn(
            "prefill: the policy's scores add up what all queries of a chunk give to every key. They still read every key, "
            "at the cost of dense attention, and each weight is relative to what its query saw",
            stacklevel=3,
        )
    gm.recompile()


def is_sparse(gm: fx.GraphModule) -> bool:
    """Whether any attention has patterns."""
    return any(arg(node, "patterns") for node in _calls(gm, ops.cached_attention.default))


def _calls(gm: fx.GraphModule, *targets: Any) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if is_op(node, *targets)]


def _sums_of_all(gm: fx.GraphModule) -> bool:
    """Whether scores add up the weights of all queries of sparse attention."""
    sparse = {node for node in _calls(gm, ops.cached_attention.default) if arg(node, "patterns")}
    return any(arg(n, "newest") == 0 and arg(n, "lse").args[0] in sparse for n in _calls(gm, ops.observe.default))
