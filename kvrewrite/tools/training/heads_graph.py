"""Builds the training graph of retaining heads: the canonical graph with heads where sites own keys, and no cache.

A head's nodes are those that the policy inserts for inference (`Locret.score`). Heads feed only the loss, so there is
no backward pass through the backbone: its parameters are frozen, and autograd only records the heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import ancestors, dependents, erase_dead, named_args, output_node, placeholder, set_attr
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.insert.cache import site_nodes
from kvrewrite.passes.insert.policy import PolicyWriter, insert_score
from kvrewrite.passes.insert.site_nodes import SiteNodes
from kvrewrite.policies.base import Policy
from kvrewrite.policies.site import PREFIX, Site
from kvrewrite.tools.training import gated_attention  # noqa: F401  (registers the op)

ops = torch.ops.kvrewrite


class TrainingSite(Site):
    """Trains weights in fp32 and uses them in inference's dtype."""

    def weight(self, name: str) -> Tensor:
        """Returns the policy weight called `name`, in attention's dtype."""
        return super().weight(name).to(self.q.dtype)


def attend(tokens: tuple[Tensor, ...], sinks: Tensor | None, alibi: Tensor | None, *shape: float) -> Tensor:
    """Computes `kvrewrite::attention` of whole texts without a T x T tensor: by SDPA if equivalent, else in blocks.

    tokens: q, k and v; shape: scale, softcap, window and chunk."""
    q, k, v = tokens
    scale, softcap, window, chunk = shape
    if sinks is None and alibi is None and not softcap and not window and not chunk:
        return nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    every = torch.ones(k.shape[:3], dtype=torch.float32, device=k.device)
    out, _ = ops.gated_attention(q, k, v, every, sinks, alibi, *shape, True)
    return out


def insert_heads(
    captured: Captured, sites: list[AttentionSite], policy: Policy, weights: Mapping[str, nn.Parameter]
) -> fx.GraphModule:
    """Turns a canonical graph, in place, into its placeholders -> (scores, queries, keys, sinks, ALiBi's slopes, reads), each
    a tuple over owners.

    Per site that owns its keys: scores (B, Hkv, T) fp32, queries (B, H, T, D) and keys (B, Hkv, T, D) as attention sees
    them, what the head reads (B, T, C), and what else is (H,) or None.
    weights: the trained parameters by the policy's names; they are put into the graph, not copied.
    """
    gm = captured.graph
    for name, parameter in weights.items():
        set_attr(gm, PREFIX + name, parameter)
    writer = PolicyWriter(gm, sites, policy, make_site=TrainingSite)
    found: list[tuple[Any, ...]] = []
    for node, site in zip(site_nodes(gm), sites, strict=True):
        q, k, v, *rest = node.args
        if site.shares_kv_with is None:
            scores = insert_score(writer, SiteNodes(site, {"q": q, "k": k, "v": v}), node)
            own = named_args(node)
            found.append((scores.new, q, k, own["sinks"], own["alibi"]))
        with gm.graph.inserting_before(node):
            out = gm.graph.call_function(attend, ((q, k, v), *rest))
        out.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)
    output = output_node(gm)
    reads = [_head(gm, scores)[1] for scores, *_ in found]
    output.args = ((*(tuple(part) for part in zip(*found)), tuple(reads)),)
    erase_dead(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def _head(gm: fx.GraphModule, scores: fx.Node) -> tuple[set[fx.Node], fx.Node]:
    """Returns the nodes of one head, which are those between trained weights and its scores, and what they read."""
    trained = dependents(n for n in gm.graph.nodes if n.op == "get_attr" and str(n.target).startswith(PREFIX))
    own = ancestors([scores], lambda n: n not in trained) & trained
    (read,) = {n for node in own for n in node.all_input_nodes} - own
    return own, read


def head_graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """Returns the heads of a graph of `insert_heads` alone, which share its weights: of what a head reads (B, T, C), its
    scores (B, Hkv, T) fp32."""
    heads, outputs = [], cast("tuple[tuple[fx.Node, ...], ...]", output_node(gm).args[0])
    for scores in outputs[0]:
        own, read = _head(gm, scores)
        graph = fx.Graph()
        copied = {read: graph.placeholder("read")}
        for node in gm.graph.nodes:
            if node in own:
                copied[node] = graph.node_copy(node, copied.__getitem__)
        graph.output(copied[scores])
        heads.append(fx.GraphModule(gm, graph))
    return heads


def arguments(gm: fx.GraphModule, input_ids: Tensor) -> list[Tensor]:
    """Returns the training graph's arguments for left-aligned texts (B, T)."""
    given = {"input_ids": input_ids}
    if placeholder(gm, "position_ids") is not None:
        given["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return [given[str(node.target)] for node in gm.graph.nodes if node.op == "placeholder"]
