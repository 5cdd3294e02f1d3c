"""Runs heads that differ by their weights alone as one, with stacked weights: a step then takes as many kernels as one head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap


@dataclass
class HeadStack:
    """Heads (their numbers) with one graph. weights: by the first head's names, (len(heads), ...), what is trained; own: the
    parameters of each head, in the same order, which have the trained values after `write_back`."""

    heads: list[int]
    graph: fx.GraphModule
    weights: dict[str, nn.Parameter]
    own: list[list[nn.Parameter]]

    def scores(self, which: list[int], reads: Tensor) -> Tensor:
        """The scores, (W, Hkv, N) fp32, of what some of the heads read, (W, N, C); which: places in `heads`."""
        every = which == list(range(len(self.heads)))
        weights = {name: w if every else w[which] for name, w in self.weights.items()}
        return vmap(lambda given, read: functional_call(self.graph, given, (read[None],))[0])(weights, reads)

    @torch.no_grad()
    def write_back(self) -> None:
        """Gives each head its trained weights."""
        for weight, own in zip(self.weights.values(), zip(*self.own, strict=True), strict=True):
            for part, parameter in zip(weight, own, strict=True):
                parameter.copy_(part)


def stacked(graphs: list[fx.GraphModule], used: list[int]) -> list[HeadStack]:
    """Stacks those of some heads (`used`: numbers) that have the same graph and shapes."""
    groups: dict[str, list[int]] = {}
    for n in used:
        groups.setdefault(_kind(graphs[n]), []).append(n)
    stacks = []
    for heads in groups.values():
        own = [[graphs[n].get_parameter(name) for name in _names(graphs[n])] for n in heads]
        weights = {
            name: nn.Parameter(torch.stack([p.detach() for p in each]))
            for name, each in zip(_names(graphs[heads[0]]), zip(*own, strict=True), strict=True)
        }
        stacks.append(HeadStack(heads, graphs[heads[0]], weights, own))
    return stacks


def _names(graph: fx.GraphModule) -> list[str]:
    """The weights, in the order in which the graph reads them."""
    return list(dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "get_attr"))


def _kind(graph: fx.GraphModule) -> str:
    """What two heads have in common if they differ by their weights' values alone."""
    place = {node: i for i, node in enumerate(graph.graph.nodes)}
    names = {name: i for i, name in enumerate(_names(graph))}
    nodes = [
        (
            node.op,
            names[str(node.target)] if node.op == "get_attr" else node.target,
            fx.node.map_arg((node.args, node.kwargs), place.__getitem__),
        )
        for node in graph.graph.nodes
    ]
    shapes = [tuple(graph.get_parameter(name).shape) for name in names]
    return repr((nodes, shapes))
