"""Inserts a policy: its scoring subgraph as ordinary nodes at every site, its weights as ordinary parameters.

Requires the canonical graph with positions lifted. Ensures that every site that owns its keys and values has a `Scores`,
and that each policy weight is an attribute `policy_weights.<name>` of the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.errors import UnsupportedModelError
from kvrewrite.graph import set_attr, shape_of, tensor_of
from kvrewrite.passes.find_rope import projections
from kvrewrite.policies.base import Policy, Scores
from kvrewrite.site import AttentionSite

aten = torch.ops.aten
PREFIX = "policy_weights."
ACTIVATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "silu": (aten.silu.default, {}),
    "swish": (aten.silu.default, {}),
    "relu": (aten.relu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_new": (aten.gelu.default, {"approximate": "tanh"}),
    "gelu_pytorch_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "gelu_fast": (aten.gelu.default, {"approximate": "tanh"}),
    "tanh": (aten.tanh.default, {}),
    "sigmoid": (aten.sigmoid.default, {}),
}


class SiteHook:
    """What a policy sees of one attention site, and the nodes it can add there.

    q (B, H, T, D), k (B, Hkv, T, D) and v (B, Hkv, T, Dv) are the tensors that enter attention. Nodes are added behind the
    last reader of the site's cache.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        site: AttentionSite,
        q: Any,
        k: Any,
        v: Any,
        after: fx.Node,
        observation: dict[str, Any] | None = None,
    ):
        self.gm, self.site = gm, site
        self.q, self.k, self.v = q, k, v
        self.after = after  # where the next node goes
        self.observation = observation  # what insert_cache knows once the site reads a cache

    # -- adding nodes
    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a node behind the last one that this hook added."""
        with self.gm.graph.inserting_after(self.after):
            self.after = self.gm.graph.call_function(target, args, kwargs)
        self.after.meta["kvrewrite_policy"] = self.site.layer
        return self.after

    def weight(self, name: str) -> fx.Node:
        """The policy weight called `name`."""
        with self.gm.graph.inserting_after(self.after):
            self.after = self.gm.graph.get_attr(PREFIX + name)
        return self.after

    def linear(self, x: fx.Node, weight: fx.Node) -> fx.Node:
        """x (..., in) times weight (out, in), without bias."""
        return self.call(aten.linear.default, x, weight)

    def activation(self, x: fx.Node, name: str) -> fx.Node:
        """An activation by the name that configurations use."""
        if name not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"layer {self.site.layer} ({self.site.module}): activation {name!r} is not known to policies; expected one "
                f"of {', '.join(ACTIVATIONS)} (option activation=...)"
            )
        target, kwargs = ACTIVATIONS[name]
        return self.call(target, x, **kwargs)

    def add(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """a + b."""
        return self.call(aten.add.Tensor, a, b)

    # -- what the site offers
    def per_head(self, x: fx.Node) -> fx.Node:
        """Scores (B, T, Hkv) as (B, Hkv, T) in fp32."""
        return self.call(aten.to.dtype, self.call(aten.transpose.int, x, 1, 2), torch.float32)

    def position_scores(self) -> fx.Node:
        """Each new token's own position as its score: (B, Hkv, T)."""
        assert self.observation is not None
        positions = self.call(aten.to.dtype, self.observation["positions"], torch.float32)
        return self.call(
            aten.expand.default, self.call(aten.unsqueeze.default, positions, 1), [-1, self.site.kv_heads, -1]
        )

    def ones_rows(self) -> fx.Node:
        """Every query row counts once: (B, T)."""
        assert self.observation is not None
        return self.call(aten.ones_like.default, self.observation["positions"], dtype=torch.float32)

    def observe(self, rows: fx.Node) -> fx.Node:
        """Attention mass of [cache, new tokens] under these query rows: (B, Hkv, C + T)."""
        assert self.observation is not None
        return self.call(torch.ops.kvrewrite.observe.default, *self.observation["observe"](rows))

    def split(self, mass: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Splits (B, Hkv, C + T) into cached slots and new tokens."""
        length = self.call(aten.sym_size.int, self.k, 2)
        capacity = self.call(aten.sym_size.int, mass, 2)
        cut = self.call(operator.sub, capacity, length)
        return self.call(aten.slice.Tensor, mass, 2, 0, cut), self.call(aten.slice.Tensor, mass, 2, cut)

    def read_scores(self) -> fx.Node:
        """The stored scores of cached slots: (B, Hkv, C)."""
        assert self.observation is not None
        return self.call(
            torch.ops.kvrewrite.read_pages.default, self.observation["score_pages"], self.observation["table"]
        )

    def _projections(self) -> list[fx.Node]:
        """The projections of q, k and v, each once; one node when they are fused."""
        found: list[fx.Node] = []
        heads = ("queries", self.q), ("keys", self.k), ("values", self.v)
        for name, node in heads:
            leaves = projections(node)
            if len(leaves) != 1:
                raise UnsupportedModelError(
                    f"layer {self.site.layer} ({self.site.module}): its {name} come from {len(leaves)} projections; this "
                    "policy needs one projection each (or one fused one), so models with latent attention (MLA) are not "
                    "supported by it"
                )
            if leaves[0] not in found:
                found.append(leaves[0])
        return found

    def projected_width(self) -> int:
        """Channels of [q | k | v]."""
        width = sum(int(shape_of(n)[-1]) for n in self._projections())
        expected = (
            self.site.heads + self.site.kv_heads
        ) * self.site.head_dim + self.site.kv_heads * self.site.v_head_dim
        if width != expected:
            raise UnsupportedModelError(
                f"layer {self.site.layer} ({self.site.module}): its projections have {width} channels, expected "
                f"{expected} for q, k and v"
            )
        return width

    def projected(self) -> fx.Node:
        """The raw outputs of the q, k and v projections, before norms and RoPE: (B, T, q + k + v channels)."""
        value = tensor_of(self.q)
        assert value is not None
        batch = self.call(aten.sym_size.int, self.q, 0)
        length = self.call(aten.sym_size.int, self.q, 2)
        parts = [self.call(aten.reshape.default, n, [batch, length, -1]) for n in self._projections()]
        return parts[0] if len(parts) == 1 else self.call(aten.cat.default, parts, -1)


def attach_weights(gm: fx.GraphModule, tensors: Mapping[str, Tensor]) -> list[str]:
    """Puts policy weights into the graph as parameters; returns their attribute names."""
    names = []
    for name, tensor in tensors.items():
        set_attr(gm, PREFIX + name, torch.nn.Parameter(tensor, requires_grad=False))
        names.append(PREFIX + name)
    return names


def insert_policy(hook: SiteHook, policy: Policy) -> Scores:
    """Adds the policy's scoring nodes at one site that already reads its cache."""
    scores = policy.score(hook)
    hook.site.inserted.append(policy.name)
    return scores
