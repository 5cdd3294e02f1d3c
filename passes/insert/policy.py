"""Inserts a policy: the ops of its code as ordinary nodes at every site, its weights as ordinary parameters.

Requires the canonical graph with positions lifted. Ensures that each policy weight is an attribute `policy_weights.<name>`
of the graph, and that a hook's nodes are ops that a saved graph may have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from kvrewrite.errors import OptionError
from kvrewrite.ir.fx import set_attr
from kvrewrite.ir.layout import InputSpec
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.insert.site_nodes import Memory, Reader, SiteNodes
from kvrewrite.passes.insert.trace import Run, Values, inline, running, trace
from kvrewrite.policies.base import PROMPT, Policy, Scores
from kvrewrite.policies.site import PREFIX, Site


def attach_weights(gm: fx.GraphModule, tensors: Mapping[str, Tensor]) -> list[str]:
    """Puts policy weights into the graph as parameters; returns their attribute names."""
    names = []
    for name, tensor in tensors.items():
        set_attr(gm, PREFIX + name, torch.nn.Parameter(tensor, requires_grad=False))
        names.append(PREFIX + name)
    return names


# What code of kvrewrite's own policies did, and its graph: a further rewrite need not trace it again. They ask nothing of
# sizes, whatever their options. Others may, which tracing finds out; so they are traced for every rewrite.
_TRACED: dict[Any, fx.Graph] = {}
_MOST = 256
LARGE = 1e30  # above any score


class PolicyWriter:
    """Writes the hooks of one policy into one graph.

    add_input: adds an input for a state. max_positions: see `find_rope`. make_site: another `Site`, for training.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        sites: list[AttentionSite],
        policy: Policy,
        add_input: Callable[[InputSpec], fx.Node] | None = None,
        max_positions: int | None = None,
        make_site: type[Site] = Site,
    ):
        self.sites, self.policy, self.memory = sites, policy, Memory(gm, add_input, max_positions)
        self._make_site = make_site
        self._traced: dict[Any, fx.Graph] = {}
        self._numbers, self._symbols = Values(gm, symbolic=False), Values(gm, symbolic=True)

    def expected_weights(self, nodes: SiteNodes) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the policy weights that a site needs."""
        with running(self._numbers, self.policy.name):
            return self.policy.weights(self._site(nodes, Reader(self.memory, nodes, None, self._numbers)))

    def _site(self, nodes: SiteNodes, reader: Reader) -> Site:
        return self._make_site(nodes.facts, self.sites, reader, nodes.span)

    def write(self, hook: Callable[[Site], Any], nodes: SiteNodes, before: fx.Node) -> Any:
        """Puts what `hook` computes into the graph, before a node; returns its result with nodes in the place of tensors."""
        read: dict[fx.Node, Tensor] = {}

        def look(node: fx.Node) -> Tensor:
            if node not in read:
                noted.on = False  # making the value is no part of the code
                read[node] = self._numbers(node)
                noted.on = True
            return read[node]

        def run(look: Callable[[fx.Node], Tensor], values: Values) -> tuple[list[Any], Any]:
            reader = Reader(self.memory, nodes, before, look)
            with running(values, self.policy.name):
                result = hook(self._site(nodes, reader))
            return tree_flatten((result, reader.remembered))

        noted = Run()
        with noted:
            flat, form = run(look, self._numbers)
        known = _TRACED if type(self.policy).__module__.startswith("kvrewrite.policies.") else self._traced
        inputs = [(noted.name(x), x.dtype, x.shape, x.device, self._numbers.moving(node)) for node, x in read.items()]
        key = (type(self.policy), self._make_site, repr(inputs), *noted.notes, repr([noted.name(x) for x in flat]))
        body = known.get(key)
        if body is None:

            def traced(*values: Tensor) -> list[Any]:
                return run(dict(zip(read, values, strict=True)).__getitem__, self._symbols)[0]

            if len(known) >= _MOST:
                known.clear()
            body = known[key] = trace(traced, [self._symbols(n) for n in read], self.policy.name)
        result, remembered = tree_unflatten(inline(body, list(read), before, nodes.facts.layer), form)
        self.memory.kept.update(remembered)
        return result


def insert_score(writer: PolicyWriter, nodes: SiteNodes, before: fx.Node) -> Scores:
    """Adds the policy's scores at one site that already reads its cache, before a node."""
    policy = writer.policy

    def score(site: Site) -> tuple[Any, ...]:
        scores = policy.score(site)
        if not isinstance(scores, Scores):
            scores = Scores(scores)
        for name in ("new", "slots", "select"):
            _check(policy, name, getattr(scores, name), site.kv_heads)
        select = _prompt_first(site, scores) if policy.protect_prompt else scores.select
        return scores.new, scores.slots, select, scores.keep

    found = writer.write(score, nodes, before)
    nodes.facts.inserted.append(policy.name)
    return Scores(*found)


def _prompt_first(site: Site, scores: Scores) -> Tensor:
    """What an eviction goes by with protect_prompt, (B, Hkv, C + T): the prompt is worth more than any score."""
    by = scores.select
    if by is None:
        by = site.join(site.stored_scores() if scores.slots is None else scores.slots, scores.new)
    return by.masked_fill(site.slot_positions() < site.per_row(site.input(PROMPT)), LARGE)


def _check(policy: Policy, name: str, found: Any, kv_heads: int) -> None:
    """Scores must be what the update takes; OptionError says what they are."""
    if found is None and name != "new":
        return
    if not isinstance(found, Tensor) or found.dim() != 3 or found.dtype != torch.float32:
        got = f"{found.dim()}-dimensional {found.dtype}" if isinstance(found, Tensor) else repr(found)
        raise OptionError(
            f"policy {policy.name}: {name} of its scores is {got}, expected a tensor (rows, kv heads, tokens) in fp32"
        )
    if found.shape[1] != kv_heads:
        raise OptionError(
            f"policy {policy.name}: {name} of its scores has {found.shape[1]} heads, expected one per kv head ({kv_heads}); "
            "query heads of a group share their keys: take their mean or maximum"
        )
