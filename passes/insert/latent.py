"""Lets the cache hold the compressed latent of MLA instead of every head's keys and values (`mla=latent`).

Requires the canonical graph with positions lifted. Ensures that every site has one kv head, whose key is [c, r], a token's
latent and the rotated key part that all heads share, and whose value is c. The queries take in W_uk and what attention gives
goes through W_uv ("absorbed"; DeepSeek-V2, arXiv 2405.04434, section 2.1.2), which is the same function:

    q . [W_uk c, r] = [W_uk^T q, q] . [c, r]   and   sum w W_uv c = W_uv sum w c

The site's node keeps what `insert_cache` needs to put `latent_attention` there (`Absorbed`), which for long chunks expands keys
and values again where that is cheaper. Policies see the absorbed queries and the one kv head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvrewrite.capture.captured import Captured
from kvrewrite.errors import OptionError
from kvrewrite.ir.fx import arg, erase_dead, named_args, op_args, shape_of
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.canonical.canonicalize import SOURCE, add_call
from kvrewrite.passes.canonical.find_latent import Latent, Rows, find_latent

aten = torch.ops.aten
ABSORB, PROJECT = "bhtn,hnr->bhtr", "bhtr,hvr->bhtv"


@dataclass
class Absorbed:
    """What `latent_attention` takes at a site: q (B, H, T, n + P), the weights W_uk and W_uv lie in, `rows` as the op has it;
    out: the node (B, H, T, Dv) that its result replaces."""

    q: fx.Node
    up_k: fx.Node
    up_v: fx.Node
    rows: list[int]
    out: fx.Node


def cache_latent(captured: Captured, policy: str) -> None:
    """Rewrites every site in place. OptionError with layer and reason where a site's keys and values are not made of one
    latent; the graph is as it was then."""
    gm = captured.graph
    nodes = [n for n in gm.graph.nodes if n.target is SOURCE]
    found: list[Latent] = []
    for node in nodes:
        latent, site = find_latent(captured, node), node.meta["kvrewrite_site"]
        if not isinstance(latent, Latent):
            raise OptionError(
                f"{policy}: mla=latent, layer {site.layer} ({site.module}): no compressed latent was found: {latent.reason}; "
                "use mla=expanded"
            )
        found.append(latent)
    keys: dict[Any, tuple[fx.Node, fx.Node]] = {}
    for node, latent in zip(nodes, found, strict=True):
        _absorb(gm, node, latent, keys)
    erase_dead(gm)
    gm.graph.lint()
    gm.recompile()


def _absorb(gm: fx.GraphModule, node: fx.Node, found: Latent, keys: dict[Any, tuple[fx.Node, fx.Node]]) -> None:
    site: AttentionSite = node.meta["kvrewrite_site"]
    q, rank, rotary = arg(node, "q"), found.rank, found.rotary_dim
    before = set(gm.graph.nodes)
    width = int(shape_of(q)[3])
    with gm.graph.inserting_before(node):
        if (found.latent, found.rotary) not in keys:  # sites that share keys and values share these
            parts = [_one_head(gm, part) for part in (found.latent, found.rotary)]
            key = add_call(gm, aten.cat.default, parts, -1)
            keys[found.latent, found.rotary] = key, add_call(gm, aten.slice.Tensor, key, 3, 0, rank)
        key, value = keys[found.latent, found.rotary]
        if found.rotary_first:
            rotated, rest = (add_call(gm, aten.slice.Tensor, q, 3, *ends) for ends in ((0, rotary), (rotary, width)))
            q = add_call(gm, aten.cat.default, [rest, rotated], -1)
        nope = add_call(gm, aten.slice.Tensor, q, 3, 0, width - rotary)
        rotated = add_call(gm, aten.slice.Tensor, q, 3, width - rotary, width)
        absorbed = add_call(gm, aten.einsum.default, ABSORB, [nope, head_rows(gm, found.keys, site.heads)])
        absorbed = add_call(gm, aten.cat.default, [absorbed, rotated], -1)
        latent = {**named_args(node), "q": absorbed, "k": key, "v": value}
        attention = add_call(gm, SOURCE, *op_args(SOURCE, **latent))
        out = add_call(gm, aten.einsum.default, PROJECT, [attention, head_rows(gm, found.values, site.heads)])
    for made in gm.graph.nodes:
        if made not in before:
            made.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack"))
    rows = [site.heads, rank]
    for each in (found.keys, found.values):
        rows += [each.start, each.stride, each.width]
    attention.meta.update(
        kvrewrite_site=site, kvrewrite_latent=Absorbed(q, found.keys.weight, found.values.weight, rows, out)
    )
    node.replace_all_uses_with(out)
    gm.graph.erase_node(node)
    site.expanded = [site.kv_heads, site.head_dim, site.v_head_dim]
    site.kv_heads, site.head_dim, site.v_head_dim, site.latent_cached = 1, rank + rotary, rank, True
    site.latent, site.latent_rotary = rank, rotary


def _one_head(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """(B, T, N), (B, T, 1, N) or (B, 1, T, N) as (B, 1, T, N)."""
    shape = shape_of(node)
    if len(shape) == 3:
        return add_call(gm, aten.unsqueeze.default, node, 1)
    return node if shape[1] == 1 else add_call(gm, aten.transpose.int, node, 1, 2)


def head_rows(gm: fx.GraphModule, rows: Rows, heads: int) -> fx.Node:
    """The rows of every head, a view (heads, width, R) of the weight (kernels/latent/reference.py has the same)."""
    end = rows.start + (heads - 1) * rows.stride + rows.width
    node = add_call(gm, aten.slice.Tensor, rows.weight, 0, rows.start, end)
    node = add_call(gm, aten.unfold.default, node, 0, rows.width, rows.stride)
    return add_call(gm, aten.transpose.int, node, 1, 2)
