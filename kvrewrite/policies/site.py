"""What a policy sees of one attention site, and the nodes that it can add there."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import op_args, shape_of, tensor_of
from kvrewrite.ir.layout import InputSpec, State
from kvrewrite.ir.projections import projections
from kvrewrite.ir.site import AttentionSite

aten = torch.ops.aten
ops = torch.ops.kvrewrite
PREFIX = "policy_weights."
# Which argument of a projection is the activation.
INPUT = {aten.linear.default: 0, aten.addmm.default: 1, aten.mm.default: 0, aten.matmul.default: 0}
CASTS = (aten.to.dtype, aten._to_copy.default)
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


@dataclass
class SiteInputs:
    """What `insert_cache` knows once a site reads a cache: graph inputs and nodes. Shared by all sites: `memo`, `states`."""

    nodes: dict[str, fx.Node]  # positions, valid, input_ids, pools, table, lens, the policy's own inputs
    observed: Callable[[], dict[str, Any]]  # what `observe` takes of the site's first reader, by name
    k_dense: fx.Node | None
    memo: dict[str, Any]
    states: dict[str, State]
    add_input: Callable[[InputSpec], fx.Node]
    logits: fx.Node | None = None
    unrotated_query: Callable[[SiteHook], fx.Node] | None = None  # adds the queries without their rotation
    rotary: tuple[fx.Node, fx.Node, fx.Node] | None = None  # cos, sin (P, D) and partner (D,), with `needs_rotary`
    # The (window, chunk) outside which nobody looks at the site's slots; in `rate`, `score`.
    span: tuple[int, int] = (0, 0)


class SiteHook:
    """What a policy sees of one attention site, and the nodes it can add there.

    q (B, H, T, D), k (B, Hkv, T, D) and v (B, Hkv, T, Dv) are the tensors that enter attention. Nodes are added behind
    `after`, or in front of `before` where that is given.
    """

    # For policies, which are listed and checked without torch.
    aten, ops = aten, ops

    def __init__(
        self,
        gm: fx.GraphModule,
        site: AttentionSite,
        q: Any,
        k: Any,
        v: Any,
        after: fx.Node,
        inputs: SiteInputs | None = None,
        before: fx.Node | None = None,
    ):
        self.gm, self.site = gm, site
        self.q, self.k, self.v = q, k, v
        self.after, self.before = after, before
        self._inputs = inputs

    @property
    def inputs(self) -> SiteInputs:
        """What is there once the site reads a cache; not while shapes are asked for (`Policy.weights`)."""
        if self._inputs is None:
            raise TypeError("this hook only tells shapes; nodes of the cache are there in `gate` and `score`")
        return self._inputs

    # -- adding nodes
    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a node behind the last one that this hook added."""
        place = self.gm.graph.inserting_after(self.after) if self.before is None else None
        with place or self.gm.graph.inserting_before(self.before):  # type: ignore[arg-type]
            self.after = self.gm.graph.call_function(target, args, kwargs)
        self.after.meta["kvrewrite_policy"] = self.site.layer
        return self.after

    def weight(self, name: str) -> fx.Node:
        """The policy weight called `name`."""
        place = self.gm.graph.inserting_after(self.after) if self.before is None else None
        with place or self.gm.graph.inserting_before(self.before):  # type: ignore[arg-type]
            self.after = self.gm.graph.get_attr(PREFIX + name)
        return self.after

    def linear(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
        """x (..., in) times weight (out, in), plus bias (out,)."""
        return self.call(aten.linear.default, x, weight, *([] if bias is None else [bias]))

    def activation(self, x: fx.Node, name: str) -> fx.Node:
        """An activation by the name that configurations use."""
        if name not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"layer {self.site.layer} ({self.site.module}): activation {name!r} is not known to policies; expected one "
                f"of {', '.join(ACTIVATIONS)} (option activation=...)"
            )
        target, kwargs = ACTIVATIONS[name]
        return self.call(target, x, **kwargs)

    def item(self, x: fx.Node, index: int) -> fx.Node:
        """One of several results."""
        return self.call(operator.getitem, x, index)

    def add(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """a + b."""
        return self.call(aten.add.Tensor, a, b)

    def scale(self, x: fx.Node, factor: float) -> fx.Node:
        """factor * x."""
        return self.call(aten.mul.Scalar, x, factor)

    def fp32(self, x: fx.Node) -> fx.Node:
        """x in fp32."""
        return self.call(aten.to.dtype, x, torch.float32)

    def int64(self, x: fx.Node) -> fx.Node:
        """x in int64."""
        return self.call(aten.to.dtype, x, torch.int64)

    def where(self, condition: fx.Node, a: fx.Node | float, b: fx.Node | float) -> fx.Node:
        """a where the condition holds, else b."""
        overload = {
            (True, True): aten.where.self,
            (True, False): aten.where.ScalarOther,
            (False, True): aten.where.ScalarSelf,
        }[isinstance(a, fx.Node), isinstance(b, fx.Node)]
        return self.call(overload, condition, a, b)

    def per_row(self, x: fx.Node) -> fx.Node:
        """(B,) as (B, 1, 1), to go with (B, Hkv, N)."""
        return self.call(aten.unsqueeze.default, self.call(aten.unsqueeze.default, x, 1), 2)

    def all_heads(self, x: fx.Node) -> fx.Node:
        """(B, N) or (B, 1, N), the same for every kv head: (B, Hkv, N)."""
        return self.call(aten.expand.default, x, [-1, self.site.kv_heads, -1])

    def once(self, name: str, make: Callable[[], fx.Node]) -> fx.Node:
        """A node that all sites share, made by the first that asks. It must not depend on the site."""
        memo = self.inputs.memo
        if name not in memo:
            memo[name] = make()
        return memo[name]

    # -- what the site offers
    def input(self, name: str) -> fx.Node:
        """A graph input: "positions" (B, T), "valid" (B,), "input_ids" (B, T) or one of the policy's own (B,)."""
        return self.inputs.nodes[name]

    def state(self, name: str, shape: tuple[int, ...], dtype: str, *, per_token: bool = False) -> fx.Node:
        """Something that the policy remembers: (B, *shape), or (B, capacity, *shape) with an entry per token that grows
        with the text. The cache carries it; an op that declares the mutation writes to it. Zeros at first."""
        states = self.inputs.states
        if name not in states:
            states[name] = State(name, list(shape), dtype, per_token)
            self.inputs.memo[f"state {name}"] = self.inputs.add_input(states[name].spec)
        return self.inputs.memo[f"state {name}"]

    @property
    def logits(self) -> fx.Node:
        """The logits of the new tokens (B, T, V), with `after_logits`."""
        assert self.inputs.logits is not None
        return self.inputs.logits

    def per_head(self, x: fx.Node) -> fx.Node:
        """Scores (B, T, Hkv) as (B, Hkv, T) in fp32."""
        return self.call(aten.to.dtype, self.call(aten.transpose.int, x, 1, 2), torch.float32)

    def position_scores(self) -> fx.Node:
        """Each new token's own position as its score: (B, Hkv, T)."""
        return self.all_heads(self.call(aten.unsqueeze.default, self.fp32(self.input("positions")), 1))

    def ones_rows(self) -> fx.Node:
        """Every query row counts once: (B, T)."""
        return self.call(aten.ones_like.default, self.input("positions"), dtype=torch.float32)

    def newest_rows(self, count: int | fx.Node) -> fx.Node:
        """The last `count` valid query rows of each row count once: (B, T)."""
        valid = self.input("valid")
        if isinstance(count, int):
            count = self.call(aten.full_like.default, valid, count)
        return self.call(ops.newest_rows.default, self.input("positions"), valid, count)

    def observe(self, rows: fx.Node, above: fx.Node | None = None, newest: Any = 0) -> fx.Node:
        """Attention mass of [cache, new tokens] under these query rows: (B, Hkv, C + T), summed over a group's heads.

        above: (B, T) thresholds; counts weights above them instead. newest: at most how many rows have a weight, where
        they are each row's last ones: saves the work for the others."""
        observed = self.inputs.observed() | {"rows": rows, "above": above, "newest": newest}
        return self.call(ops.observe.default, *op_args(ops.observe.default, **observed))

    def split(self, mass: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Splits (B, Hkv, C + T) into cached slots and new tokens."""
        length = self.call(aten.sym_size.int, self.k, 2)
        capacity = self.call(aten.sym_size.int, mass, 2)
        cut = self.call(operator.sub, capacity, length)
        return self.call(aten.slice.Tensor, mass, 2, 0, cut), self.call(aten.slice.Tensor, mass, 2, cut)

    def read_scores(self) -> fx.Node:
        """The stored scores of cached slots: (B, Hkv, C)."""
        return self.call(ops.read_pages.default, self.input("score_pages"), self.input("table"))

    def slot_positions(self) -> fx.Node:
        """Positions in the text of [cache, new tokens], -1 where there is nothing: (B, Hkv, C + T) int64."""
        names = ("pos_pages", "table", "lens", "positions", "valid")
        return self.call(ops.slot_positions.default, *(self.input(n) for n in names))

    def keys(self) -> fx.Node:
        """Keys of [cache, new tokens] as attention sees them, rotated: (B, Hkv, C + T, D). Dead slots hold anything."""
        cached = self.inputs.k_dense
        if cached is None:
            cached = self.call(ops.read_pages.default, self.input("k_pages"), self.input("table"))
        return self.call(aten.cat.default, [cached, self.k], 2)

    def _source(self) -> fx.Node:
        """What the projections multiply by their weights; its last axis are the layer's input channels."""
        found = {n.args[INPUT[n.target]] for n in self._projections(adapted=True) if n.target in INPUT}
        if len(found) != 1:
            raise UnsupportedModelError(
                f"layer {self.site.layer} ({self.site.module}): its queries, keys and values are not projections of one "
                "input, which this policy needs"
            )
        node = found.pop()
        assert isinstance(node, fx.Node)
        return node

    def hidden_states(self) -> fx.Node:
        """The attention layer's input, which its projections read: (B, T, hidden)."""
        node = self._source()
        value = tensor_of(node)
        if value is not None and value.dim() == 3:
            return node
        batch, length = (self.call(aten.sym_size.int, self.q, i) for i in (0, 2))
        return self.call(aten.reshape.default, node, [batch, length, -1])

    def hidden_width(self) -> int:
        """Channels of `hidden_states`."""
        return int(shape_of(self._source())[-1])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that attention runs in."""
        value = tensor_of(self.q)
        assert value is not None
        return value.dtype

    def query_before_rope(self) -> fx.Node:
        """The queries without their rotation, (B, H, T, D); as they are where the model has none."""
        assert self.inputs.unrotated_query is not None
        return self.inputs.unrotated_query(self)

    def _projections(self, adapted: bool = False) -> list[fx.Node]:
        """The projections of q, k and v, each once; one node when they are fused. adapted: without the low-rank adapters
        (LoRA) beside them, for whom only their input counts."""
        found: list[fx.Node] = []
        heads = ("queries", self.q), ("keys", self.k), ("values", self.v)
        for name, node in heads:
            leaves = projections(node)
            if adapted:
                leaves = [n for n in leaves if not any(_adapts(n, other) for other in leaves)]
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


def _adapts(node: fx.Node, projection: fx.Node) -> bool:
    """Whether `node` is B (A x) of a projection W x: what LoRA adds to it."""

    def source(of: Any) -> Any:
        found = of.args[INPUT[of.target]] if isinstance(of, fx.Node) and of.target in INPUT else None
        while isinstance(found, fx.Node) and found.target in CASTS:
            found = found.args[0]
        return found

    return source(node) is not None and source(source(node)) is source(projection) is not None
