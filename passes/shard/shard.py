"""Tensor parallelism: makes of a rewritten program the part of one of several processes (ranks).

Requires a program after `insert_cache`, whole, on one device. Ensures a graph with the same inputs and results in which
this rank has a block of every layer's heads (its part of the cache, of queries, keys and values), a block of the channels
of other products where nothing else needs them, and a block of the vocabulary where that divides. What is not cut is
computed on every rank, so that the result is that of one process up to the order of sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from kvrewrite import policies
from kvrewrite.errors import OptionError
from kvrewrite.ir.fx import get_attr, set_attr
from kvrewrite.ir.layout import CacheLayout
from kvrewrite.ir.parallel import Parallel, Peers
from kvrewrite.ir.program import Program
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.shard import shape_rules
from kvrewrite.passes.shard.cache_rules import HEADS
from kvrewrite.passes.shard.placement import Split
from kvrewrite.passes.shard.plan import Plan, make_plan
from kvrewrite.passes.shard.write import Writer

assert HEADS and shape_rules  # whose import registers their rules
WORTH = 1 << 12  # a weight with fewer numbers is not worth a line in the report


class Sharder:
    """Deals a program out over so many ranks; the program stays as it is. Its parameters may be on meta.

    Raises OptionError where heads or the policy can't be dealt out, UnsupportedModelError where the graph can't.
    """

    def __init__(self, program: Program, ranks: int):
        check(program, ranks)
        self.program, self.ranks = program, ranks
        self.policy = policies.make(program.policy["name"], **program.policy["options"])
        classes = range(len(program.layout.classes))
        self.cut_classes = {c for c in classes if _heads_of(program, c) is not None}
        self.plan = make_plan(program.graph, program.layout, self.cut_classes, _kept(program), ranks)

    def part(self, peers: Peers) -> Program:
        """What one rank runs. Tensors that are cut are copies; `Program.parallel.cut` says how."""
        program, plan = self.program, self.plan
        own = self.policy.of_rank(peers.rank, peers.ranks)
        graph = Writer(program.graph.graph, plan, peers).run()
        cut = {name: (split.dim, split.parts) for name, split in plan.attributes.items()}
        made = fx.GraphModule(nn.Module(), fx.Graph(), class_name="Sharded")  # tables that no node reads stay, too
        for name in _names(program.graph):
            set_attr(made, name, _cut(get_attr(program.graph, name), cut.get(name), peers))
        _tie(made, program.graph, cut)
        made.graph = graph
        layout = self._layout()
        layout.attach(made)
        kv_heads = [spec.kv_heads for spec in program.layout.classes]
        parallel = Parallel(peers, kv_heads, cut, report(program, plan, self.cut_classes, peers))
        policy = {"name": own.name, "options": own.options()}
        sites = self._sites()
        return dataclasses.replace(program, graph=made, sites=sites, layout=layout, policy=policy, parallel=parallel)

    def _sites(self) -> list[AttentionSite]:
        """The sites with a rank's heads."""
        owners = {layer: c for c, spec in enumerate(self.program.layout.classes) for layer in spec.layers}
        found = []
        for site in self.program.sites:
            cls = owners[site.layer if site.shares_kv_with is None else site.shares_kv_with]
            ranks = self.ranks if cls in self.cut_classes else 1
            own = dataclasses.replace(site, inserted=list(site.inserted))
            own.heads, own.kv_heads = site.heads // ranks, site.kv_heads // ranks
            found.append(own)
        return found

    def _layout(self) -> CacheLayout:
        """What the runtime must know of a rank's graph."""
        layout, ranks = self.program.layout, self.ranks
        places = {str(n.target): self.plan.places.get(n) for n in self.plan.order if n.op == "placeholder"}
        classes = [
            dataclasses.replace(spec, kv_heads=spec.kv_heads // (ranks if c in self.cut_classes else 1))
            for c, spec in enumerate(layout.classes)
        ]

        def own(name: str, shape: Any, skip: int) -> list[Any]:
            sizes, place = list(shape), places.get(name)
            if isinstance(place, Split):
                sizes[place.dim - skip] = place.size // ranks
            return sizes

        states = [dataclasses.replace(s, shape=own(s.input, s.shape, 1 + s.per_token)) for s in layout.states]
        inputs = [dataclasses.replace(spec, shape=tuple(own(spec.name, spec.shape, 0))) for spec in layout.inputs]
        return dataclasses.replace(layout, classes=classes, states=states, inputs=inputs)


def shard(program: Program, peers: Peers) -> Program:
    """The part of a program that a rank runs; see `Sharder`."""
    return Sharder(program, peers.ranks).part(peers)


def check(program: Program, ranks: int) -> None:
    """Raises OptionError where a program can't be dealt out over so many ranks, before any work."""
    if program.parallel is not None:
        raise OptionError("the model is one process's part of a model already; shard the whole one")
    if program.layout.devices is not None:
        raise OptionError("tensor parallelism: the model lies on several devices of one process; load it on one")
    for c in range(len(program.layout.classes)):
        heads = _heads_of(program, c)
        if heads is not None and heads % ranks:
            fitting = [n for n in range(2, heads + 1) if heads % n == 0]
            raise OptionError(
                f"tensor parallelism: layer {program.layout.classes[c].layers[0]} has {heads} kv heads, which can't be dealt out "
                f"over {ranks} processes; "
                + (f"expected {' or '.join(map(str, fitting))} processes" if fitting else "use one process")
            )
    policies.make(program.policy["name"], **program.policy["options"]).of_rank(0, ranks)


def _heads_of(program: Program, cls: int) -> int | None:
    """kv heads of a cache class; None where it holds latents that all heads share, which every rank has whole."""
    spec = program.layout.classes[cls]
    if any(program.sites[layer].latent_cached for layer in spec.layers):
        return None
    return spec.kv_heads


def _kept(program: Program) -> set[str]:
    """Attributes that the runtime reads besides the graph."""
    found = {name for rotary in program.layout.rotary for name in rotary.constants}
    return found | {n for n in _names(program.graph) if n.startswith(("rotary_tables.", "length_tables."))}


def _names(gm: nn.Module) -> list[str]:
    tensors = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    return [name for name, _ in tensors]


def _tie(root: nn.Module, source: nn.Module, cut: Mapping[str, Any]) -> None:
    """Names of one parameter in the source are names of one here, too."""
    first: dict[Any, nn.Parameter] = {}
    for name in _names(source):
        value = get_attr(root, name)
        if isinstance(value, nn.Parameter):
            set_attr(root, name, first.setdefault((id(get_attr(source, name)), cut.get(name)), value))


def _cut(value: Tensor, how: tuple[int, tuple[int, ...]] | None, peers: Peers) -> Tensor:
    if how is None:
        return value
    made = cut_tensor(value.detach(), *how, peers)
    return nn.Parameter(made, requires_grad=False) if isinstance(value, nn.Parameter) else made


def cut_tensor(value: Tensor, dim: int, parts: tuple[int, ...], peers: Peers) -> Tensor:
    """A rank's blocks of a tensor, in memory of their own."""
    blocks = [value.narrow(dim, start, n) for start, n in Split(dim, parts).blocks(peers.rank, peers.ranks)]
    return torch.cat(blocks, dim) if len(blocks) > 1 else blocks[0].clone(memory_format=torch.contiguous_format)


def report(program: Program, plan: Plan, cut: set[int], peers: Peers) -> list[str]:
    """What each rank has, in words."""
    lines = []
    for c, spec in enumerate(program.layout.classes):
        layers = f"{len(spec.layers)} layers that own a cache"
        if c in cut:
            lines.append(f"{spec.kv_heads // peers.ranks} of {spec.kv_heads} kv heads in each of {layers}")
        else:
            lines.append(f"latents of {layers}: whole on every rank")
    tensors = {id(t): (n, t) for n in program.base if isinstance(t := get_attr(program.graph, n), Tensor)}
    whole = [(n, t) for n, t in tensors.values() if n not in plan.attributes]
    total = sum(t.nbytes for _, t in tensors.values())
    own = sum(t.nbytes if n not in plan.attributes else t.nbytes // peers.ranks for n, t in tensors.values())
    lines.append(
        f"{own} of {total} bytes of weights on each rank; {len(tensors) - len(whole)} of {len(tensors)} tensors are cut"
    )
    large = [f"{n} {list(t.shape)}" for n, t in whole if t.dim() > 1 and t.numel() >= WORTH]
    lines += [f"whole on every rank: {line}" for line in large]
    return lines
