"""Where the tensors that a policy sees of a site are in the graph, and how its code reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import op_args, parameters, placeholder
from kvrewrite.ir.layout import InputSpec, State
from kvrewrite.ir.projections import projections
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.canonical.find_rope import Rope, find_rope
from kvrewrite.passes.insert.output_projection import output_projection
from kvrewrite.policies.site import PREFIX

aten = torch.ops.aten
observe = torch.ops.kvrewrite.observe.default
reconstruction = torch.ops.kvrewrite.reconstruction.default
# Which argument of a projection is the activation.
INPUT = {aten.linear.default: 0, aten.addmm.default: 1, aten.mm.default: 0, aten.matmul.default: 0}
CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass
class SiteNodes:
    """The nodes that a site's tensors are. known: by the names that `Site.input` takes; observed: what `observe` takes of
    the site's attention, by name."""

    facts: AttentionSite
    known: Mapping[str, Any]
    observed: Mapping[str, Any] = field(default_factory=dict)
    span: tuple[int, int] = (0, 0)
    _unrotated: dict[str, tuple[fx.Node, list[int]]] = field(default_factory=dict)

    def projections(self, adapted: bool) -> list[fx.Node]:
        """The projections of q, k and v, each once; one node when they are fused. adapted: without the low-rank adapters
        (LoRA) beside them, for whom only their input counts."""
        found: list[fx.Node] = []
        for name, short in (("queries", "q"), ("keys", "k"), ("values", "v")):
            node = self.known[short]
            assert node is not None
            leaves = projections(node)
            if adapted:
                leaves = [n for n in leaves if not any(_adapts(n, other) for other in leaves)]
            if len(leaves) != 1:
                raise UnsupportedModelError(
                    f"layer {self.facts.layer} ({self.facts.module}): its {name} come from {len(leaves)} projections; this "
                    "policy needs one projection each (or one fused one), so models with latent attention (MLA) are not "
                    "supported by it"
                )
            if leaves[0] not in found:
                found.append(leaves[0])
        return found

    def hidden_states(self) -> fx.Node:
        """What the projections multiply by their weights; its last axis are the layer's input channels."""
        found = {n.args[INPUT[n.target]] for n in self.projections(adapted=True) if n.target in INPUT}
        if len(found) != 1:
            raise UnsupportedModelError(
                f"layer {self.facts.layer} ({self.facts.module}): its queries, keys and values are not projections of one "
                "input, which this policy needs"
            )
        node = found.pop()
        assert isinstance(node, fx.Node)
        return node

    def unrotated(self, name: str, gm: fx.GraphModule, max_positions: int | None) -> tuple[fx.Node, list[int]]:
        """The queries or keys ("q", "k") without their rotation, as they are where there is none; and what order of dimensions
        (B, heads, T, D) is."""
        facts, node = self.facts, self.known[name]
        assert node is not None
        if name not in self._unrotated:
            what, heads = ("queries", facts.heads) if name == "q" else ("keys", facts.kv_heads)
            found = find_rope(gm, node, heads, placeholder(gm, "position_ids"), max_positions)
            if not isinstance(found, Rope) and found.rotated:
                raise UnsupportedModelError(
                    f"layer {facts.layer} ({facts.module}): the {what}' rotation was not understood ({found.reason}), and "
                    f"this policy needs {what} without it"
                )
            self._unrotated[name] = (found.pre, list(found.layout)) if isinstance(found, Rope) else (node, [0, 1, 2, 3])
        return self._unrotated[name]

    def output_projection(self, gm: fx.GraphModule) -> tuple[str, bool]:
        """The weight that the site's attention goes into; see `output_projection.py`."""
        pair = self.observed["lse"].args[0]
        out = next(n for n in pair.users if n.args[1] == 0)
        return output_projection(gm, out, self.facts)


def _adapts(node: fx.Node, projection: fx.Node) -> bool:
    """Whether `node` is B (A x) of a projection W x: what LoRA adds to it."""

    def source(of: Any) -> Any:
        found = of.args[INPUT[of.target]] if isinstance(of, fx.Node) and of.target in INPUT else None
        while isinstance(found, fx.Node) and found.target in CASTS:
            found = found.args[0]
        return found

    return source(node) is not None and source(source(node)) is source(projection) is not None


@dataclass
class Memory:
    """What the hooks of all sites share. kept: (name, layer, or None for what belongs to no site) -> nodes; states: what the
    policy and others have the cache carry, by name."""

    gm: fx.GraphModule
    add_input: Callable[[InputSpec], fx.Node] | None = None
    max_positions: int | None = None
    kept: dict[tuple[str, int | None], Any] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    weights: dict[tuple[str, int], fx.Node] = field(default_factory=dict)


class Reader:
    """A site's tensors, each standing for a node (`policies.site.Source`). look: node -> tensor; before: where nodes are
    added that read weights, None where there are no weights yet."""

    def __init__(self, memory: Memory, nodes: SiteNodes, before: fx.Node | None, look: Callable[[fx.Node], Tensor]):
        self._memory, self._nodes, self._before, self._look = memory, nodes, before, look
        self.remembered: dict[tuple[str, int | None], Any] = {}

    def tensor(self, name: str) -> Tensor | None:
        node = self._attribute(name) if name.startswith(PREFIX) else self._nodes.known.get(name)
        return None if node is None else self._look(node)

    def _attribute(self, name: str) -> fx.Node:
        """One node per weight and site."""
        key = (name, self._nodes.facts.layer)
        if key not in self._memory.weights:
            assert self._before is not None
            with self._memory.gm.graph.inserting_before(self._before):
                self._memory.weights[key] = self._memory.gm.graph.get_attr(name)
        return self._memory.weights[key]

    def projections(self, adapted: bool) -> list[Tensor]:
        return [self._look(n) for n in self._nodes.projections(adapted)]

    def hidden_states(self) -> Tensor:
        return self._look(self._nodes.hidden_states())

    def output_weight(self) -> Tensor:
        name, turned = self._nodes.output_projection(self._memory.gm)
        found = self._look(self._attribute(name))
        return found.t() if turned else found

    def unrotated(self, name: str) -> tuple[Tensor, list[int]]:
        found, order = self._nodes.unrotated(name, self._memory.gm, self._memory.max_positions)
        return self._look(found), order

    def observe(self, **given: Any) -> Tensor:
        return self._of_attention(observe, given)

    def reconstruction(self, **given: Any) -> Tensor:
        return self._of_attention(reconstruction, given)

    def _of_attention(self, op: Any, given: dict[str, Any]) -> Tensor:
        """An op that takes the rest of its arguments from the site's attention."""
        known = {n: v for n, v in self._nodes.observed.items() if n in parameters(op) and n not in given}
        values = {n: self._look(v) if isinstance(v, fx.Node) else v for n, v in known.items()}
        found: Tensor = op(*op_args(op, **values, **given))
        return found

    def state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, **kind: Any) -> Tensor:
        assert self._memory.add_input is not None
        made = State(name, list(shape), str(dtype).removeprefix("torch."), **kind)
        return self._look(self._memory.add_input(self._memory.states.setdefault(name, made).spec))

    def remember(self, name: str, layer: int | None, value: Any) -> None:
        self.remembered[name, layer] = value

    def recall(self, name: str, layer: int | None) -> Any:
        found = self.remembered.get((name, layer))
        if found is None and (name, layer) in self._memory.kept:
            found = tree_map(self._look, self._memory.kept[name, layer])
        return found
