"""What a policy sees of one attention site: tensors.

A policy's hooks (`score`, `gate`, `rate`) are ordinary torch code on them. The code runs once, on tensors without data; the
ops that it calls become nodes of the model's graph (`passes/insert/policy.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.site import AttentionSite

PREFIX = "policy_weights."  # where a graph has the policy's weights
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
Value = TypeVar("Value")


class Source(Protocol):
    """Where a site's tensors come from."""

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of this name, None where the graph has none."""

    def projections(self, adapted: bool) -> list[Tensor]:
        """What the projections of q, k and v give, each once; adapted: without the low-rank adapters beside them."""

    def hidden_states(self) -> Tensor:
        """What those projections read, (..., hidden)."""

    def unrotated(self, name: str) -> tuple[Tensor, list[int]]:
        """The queries or keys ("q", "k") without their rotation, and the order of their dimensions that makes them
        (B, heads, T, D)."""

    def output_weight(self) -> Tensor:
        """The weight that attention goes into, (channels out, H * Dv)."""

    def observe(self, **given: Any) -> Tensor:
        """`kvrewrite::observe` of the site's own attention."""

    def reconstruction(self, **given: Any) -> Tensor:
        """`kvrewrite::reconstruction` of the same."""

    def state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, **kind: Any) -> Tensor:
        """A state of the cache; kind: as `Site.state` has it."""

    def remember(self, name: str, layer: int | None, value: Any) -> None:
        """Keeps a value of a site, or of none, for later hooks."""

    def recall(self, name: str, layer: int | None) -> Any:
        """That value, None where there is none."""


class Site:
    """One attention site, as a policy's code sees it. B rows, T new tokens, C cached slots, N = C + T.

    Sizes are numbers that torch's tracing stands for: compute with them, but no `if` may ask for one. Rows are padded:
    only the first valid[b] of a row's T tokens are real. Dead slots of the cache hold anything.
    """

    def __init__(
        self, facts: AttentionSite, every: list[AttentionSite], source: Source, span: tuple[int, int] = (0, 0)
    ):
        self.facts = facts
        self.every = every  # what is known of all sites of the model, in order
        self.span = span  # the (window, chunk) outside which nobody looks at the site's slots; zeros: no end
        self._source = source

    # -- numbers
    layer = property(operator.attrgetter("facts.layer"), doc="Number of the site, in the order in which they run.")
    heads = property(operator.attrgetter("facts.heads"), doc="Query heads H.")
    kv_heads = property(operator.attrgetter("facts.kv_heads"), doc="Heads Hkv of keys and values.")
    scale = property(operator.attrgetter("facts.scale"), doc="What attention multiplies q . k by.")
    ops = torch.ops.kvrewrite  # ops that policies share; `ops/scores.py` says what each does

    # -- the new tokens
    def input(self, name: str) -> Tensor:
        """A tensor by its name; also one of the policy's own `inputs`, (B,) int32."""
        found = self._source.tensor(name)
        if found is None:
            raise UnsupportedModelError(
                f"layer {self.layer} ({self.facts.module}): there is no {name} that a policy could read here; `gate` comes "
                "before attention, and only policies with `after_logits` or `needs_rotary` have logits, cos and sin"
            )
        return found

    @property
    def q(self) -> Tensor:
        """Queries as attention sees them, (B, H, T, D)."""
        return self.input("q")

    @property
    def k(self) -> Tensor:
        """Keys of the new tokens as attention sees them, (B, Hkv, T, D)."""
        return self.input("k")

    @property
    def v(self) -> Tensor:
        """Values of the new tokens, (B, Hkv, T, Dv)."""
        return self.input("v")

    @property
    def positions(self) -> Tensor:
        """Place of each new token in its row's text, (B, T) int64."""
        return self.input("positions")

    @property
    def valid(self) -> Tensor:
        """How many of a row's new tokens are real, (B,) int32."""
        return self.input("valid")

    @property
    def recent(self) -> Tensor:
        """How many of the newest slots this eviction protects, (B,) int32."""
        return self.input("recent")

    @property
    def keep(self) -> Tensor:
        """How many slots each head keeps, (B, Hkv) int32."""
        return self.input("keep")

    @property
    def logits(self) -> Tensor:
        """The logits of the new tokens (B, T, V), with `after_logits`."""
        return self.input("logits")

    @property
    def rotary(self) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
        """cos, sin (P, D) and partner (D,) of the site's rotation, with `needs_rotary`; Nones where it has none."""
        if self._source.tensor("cos") is None:
            return None, None, None
        return self.input("cos"), self.input("sin"), self.input("partner")

    @property
    def query_before_rope(self) -> Tensor:
        """The queries without their rotation, (B, H, T, D); as they are where the model has none."""
        return self._before_rope("q")

    @property
    def key_before_rope(self) -> Tensor:
        """The new tokens' keys without their rotation, (B, Hkv, T, D); as they are where the model has none."""
        return self._before_rope("k")

    def _before_rope(self, name: str) -> Tensor:
        found, order = self._source.unrotated(name)
        return found if order == [0, 1, 2, 3] else found.permute(order)

    @property
    def hidden_states(self) -> Tensor:
        """The attention layer's input, which its projections read: (B, T, hidden)."""
        return self._per_token(self._source.hidden_states())

    @property
    def projected(self) -> Tensor:
        """The raw outputs of the q, k and v projections, before norms and RoPE: (B, T, q + k + v channels)."""
        parts = [self._per_token(x, always=True) for x in self._source.projections(adapted=False)]
        facts, width = self.facts, sum(int(x.shape[-1]) for x in parts)
        expected = (facts.heads + facts.kv_heads) * facts.head_dim + facts.kv_heads * facts.v_head_dim
        if width != expected:
            raise UnsupportedModelError(
                f"layer {facts.layer} ({facts.module}): its projections have {width} channels, expected {expected} for q, k "
                "and v"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _per_token(self, x: Tensor, always: bool = False) -> Tensor:
        if x.dim() == 3 and not always:
            return x
        return x.reshape(self.q.shape[0], self.q.shape[2], -1)

    def output_norms(self) -> Tensor:
        """||W_h v||_1 of the new tokens, averaged over a group's heads: (B, Hkv, T) fp32. W_h is what the layer's output
        projection has for query head h. UnsupportedModelError where attention goes into something else."""
        return self.ops.projected_norm(self.v, self._source.output_weight())

    # -- the cache and the new tokens
    def slot_positions(self) -> Tensor:
        """Positions in the text of [cache, new tokens], -1 where there is nothing: (B, Hkv, N) int64."""
        return self.ops.slot_positions(*map(self.input, ("pos_pages", "table", "lens", "positions", "valid")))

    def stored_scores(self) -> Tensor:
        """The scores that cached slots have, (B, Hkv, C) fp32."""
        return self.ops.read_pages(self.input("score_pages"), self.input("table"))

    def keys(self) -> Tensor:
        """Keys of [cache, new tokens] as attention sees them: (B, Hkv, N, D)."""
        cached = self._source.tensor("k_dense")
        if cached is None:
            cached = self.ops.read_pages(self.input("k_pages"), self.input("table"))
        return torch.cat([cached, self.k], 2)

    def observe(self, rows: Tensor, above: Tensor | None = None, newest: int | torch.SymInt = 0) -> Tensor:
        """Attention that [cache, new tokens] receive from these queries: (B, Hkv, N) fp32, summed over a group's heads.

        rows: (B, T), what each query counts (`every_row`, `newest_rows`). above: (B, T) thresholds; counts the weights above
        them instead of summing. newest: at most how many rows count, if they are each row's last: saves the rest's work.
        """
        return self._source.observe(rows=rows, above=above, newest=newest)

    def reconstruct(self, first: int, most: int) -> Tensor:
        """With `repeats_prompt`: the stored scores, but for the part of the text that a row repeats: the largest
        attention that the repetition gives to each of its slots, (B, Hkv, C) fp32. first: slots before all parts; most:
        slots of a part."""
        begins, ends = self.input("repeat_begins"), self.input("repeat_ends")
        given = {"stored": self.stored_scores(), "begins": begins, "ends": ends, "first": first, "most": most}
        return self._source.reconstruction(**given)

    def every_row(self) -> Tensor:
        """Every query counts once: (B, T)."""
        return torch.ones_like(self.positions, dtype=torch.float32)

    def newest_rows(self, count: int | Tensor) -> Tensor:
        """The last `count`, a number or (B,), real queries of each row count once: (B, T)."""
        if isinstance(count, int):
            count = torch.full_like(self.valid, count)
        return self.ops.newest_rows(self.positions, self.valid, count)

    # -- shapes
    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, Hkv, N) as what belongs to cached slots (B, Hkv, C) and to new tokens (B, Hkv, T)."""
        cut = x.shape[2] - self.k.shape[2]
        return x[:, :, :cut], x[:, :, cut:]

    def join(self, cached: Tensor, new: Tensor) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([cached, new], 2)

    def per_row(self, x: Tensor) -> Tensor:
        """(B,) as (B, 1, 1), to go with (B, Hkv, N)."""
        return x.unsqueeze(1).unsqueeze(2)

    def all_heads(self, x: Tensor) -> Tensor:
        """(B, N) or (B, 1, N), the same for every kv head: (B, Hkv, N)."""
        return (x.unsqueeze(1) if x.dim() == 2 else x).expand(-1, self.kv_heads, -1)

    def per_head(self, x: Tensor) -> Tensor:
        """Scores (B, T, Hkv) as (B, Hkv, T) in fp32."""
        return x.transpose(1, 2).to(torch.float32)

    def position_scores(self) -> Tensor:
        """Each new token's own position as its score, so that the oldest goes first: (B, Hkv, T) fp32."""
        return self.all_heads(self.positions.to(torch.float32))

    # -- trained policies
    def weight(self, name: str) -> Tensor:
        """The policy weight of this name, as `Policy.weights` lists it."""
        return self.input(PREFIX + name)

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        """x (..., in) times the policy weight of this name (out, in), plus another (out,)."""
        return functional.linear(x, self.weight(weight), None if bias is None else self.weight(bias))

    @staticmethod
    def linear_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The same of tensors."""
        return functional.linear(x, weight, bias)

    def cached_channels(self) -> Tensor:
        """What the cache will hold of the new tokens, [k | v]: (B, Hkv, T, D + Dv)."""
        return torch.cat([self.k, self.v], -1)

    softplus = staticmethod(functional.softplus)

    def activation(self, x: Tensor, name: str) -> Tensor:
        """An activation by the name that configurations use."""
        if name not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"layer {self.layer} ({self.facts.module}): activation {name!r} is not known to policies; expected one "
                f"of {', '.join(ACTIVATIONS)} (option activation=...)"
            )
        return ACTIVATIONS[name](x)

    # -- from call to call, and from site to site
    def state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | str, **kind: Any) -> Tensor:
        """Something that the policy remembers from call to call: (B, *shape), or (B, capacity, *shape) with an entry per
        token that grows with the text. The cache carries it; an op that declares the mutation writes to it. Zeros at first.
        kind: per_token (default False); every: how many tokens such an entry stands for (1); host: whether it lies in host
        memory (False), where what grows is not zero at first."""
        return self._source.state(name, shape, getattr(torch, dtype) if isinstance(dtype, str) else dtype, **kind)

    def remember(self, name: str, value: Any) -> None:
        """Keeps tensors (one, or a tuple or list) of this site for `recall` in a later hook."""
        self._source.remember(name, self.layer, value)

    def recall(self, name: str, layer: int | None = None) -> Any:
        """What `remember` kept at this site, or at another; None where it kept nothing."""
        return self._source.recall(name, self.layer if layer is None else layer)

    def once(self, name: str, make: Callable[[], Value]) -> Value:
        """Tensors that all sites share, made by the first that asks. They must not depend on the site."""
        found = self._source.recall(name, None)
        if found is None:
            found = make()
            self._source.remember(name, None, found)
        return found
