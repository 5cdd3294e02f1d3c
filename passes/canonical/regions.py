"""Finds regions of the graph that mix tokens besides attention, up to where there is one entry per token again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import is_size, symbol, tensor_of
from kvrewrite.passes.canonical.check import data_nodes, mixes
from kvrewrite.passes.canonical.probe import Probe, only_shape

TOLERANCE = 1e-9  # relative to the largest number; everything is evaluated in fp64
LONGEST = 4096  # longest text that a region is evaluated on


class NotCarried(Exception):
    """The reason why a region is no window or no recurrence."""


@dataclass
class Region:
    """A part of the graph that mixes tokens. nodes: in the graph's order, without the exits; inputs: data that it
    reads; exits: nodes with one entry per token that read it; shapes: other data of which it reads only the shape."""

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    exits: list[fx.Node]
    shapes: list[fx.Node]


@dataclass
class Padding:
    """The padding before the sequence: `node` puts `count` zeros there. reader: the node that takes the sequence for
    that. convolves: whether `node` is a convolution that pads. shifts: whether as many tokens are cut off at the
    end."""

    node: fx.Node
    count: int
    reader: fx.Node
    convolves: bool = False
    shifts: bool = False


def find_regions(captured: Captured) -> list[Region]:
    """Returns all regions in the graph's order."""
    gm, length = captured.graph, captured.length_symbol
    data = data_nodes(gm)
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    found: list[Region] = []
    taken: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node in taken or node not in data or is_size(node) or not mixes(node, length):
            continue
        members, exits = _grow(node, data, length)
        taken |= members | exits
        nodes = sorted(members - exits, key=place.__getitem__)
        last = sorted(exits, key=place.__getitem__)
        read = [(n, i) for n in members | exits for i in n.all_input_nodes if i in data and not is_size(i)]
        inputs = {i for n, i in read if not only_shape(n)} - members - exits
        shapes = {i for _, i in read} - inputs - members - exits
        found.append(Region(nodes, sorted(inputs, key=place.__getitem__), last, sorted(shapes, key=place.__getitem__)))
    return found


def probe_region(captured: Captured, region: Region, batch: int, length: int, seed: int = 0) -> Probe:
    """Returns a probe that skips values of which the region only needs the shape."""
    probe = Probe(captured, batch, length, seed=seed)
    probe.values.update({node: torch.zeros(probe.shape(node), dtype=torch.float64) for node in region.shapes})
    return probe


def _grow(seed: fx.Node, data: set[fx.Node], length: Any) -> tuple[set[fx.Node], set[fx.Node]]:
    """Grows the region around one op that mixes tokens; returns it and its exits. Exits may be members: an op may look
    back and give one entry per token at once."""
    members: set[fx.Node] = set()
    exits: set[fx.Node] = set()
    todo = [seed]
    while todo:
        node = todo.pop()
        if node in members or node in exits or node.op == "output":
            continue
        if _one_a_token(node, length) and (node is not seed or mixes(node, length)):
            exits.add(node)
        else:
            members.add(node)
            todo += [u for u in node.users if u in data and not is_size(u)]
        # What has no entry per token comes from the same region.
        todo += [i for i in node.all_input_nodes if i in data and not is_size(i) and not _one_a_token(i, length)]
    return members, exits


def _one_a_token(node: fx.Node, length: Any) -> bool:
    """Whether a node has one entry per token, or is several such tensors."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return all(_is_sequence(v, length) for v in value)
    return _is_sequence(value, length)


def _is_sequence(value: Any, length: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    sizes = [symbol(s) for s in value.shape]
    return sizes.count(length) == 1 and sum(length in getattr(s, "free_symbols", ()) for s in sizes) == 1


def layout_of(captured: Captured, node: fx.Node) -> list[int] | None:
    """Returns the order of dims that makes a tensor (batch, sequence, ...), or None."""
    value = tensor_of(node)
    if value is None:
        return None
    sizes = [symbol(s) for s in value.shape]
    lead = [[i for i, s in enumerate(sizes) if s == x] for x in (captured.batch_symbol, captured.length_symbol)]
    if any(len(found) != 1 for found in lead):
        return None
    first = [lead[0][0], lead[1][0]]
    rest = [i for i in range(len(sizes)) if i not in first]
    return [*first, *rest] if all(isinstance(sizes[i], int) for i in rest) else None


def close(got: Any, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    if not isinstance(got, Tensor) or got.shape != expected.shape or not bool(torch.isfinite(expected).all()):
        return False
    return float((got - expected).abs().max()) <= tolerance * max(1e-6, float(expected.abs().max()))
