"""The captured graph and what passes made of it, side by side: what the checks of `validate.py` run."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.evaluate import Evaluator, StandIns
from kvrewrite.ir.fx import arg, concretize, is_op, is_size, module_path, placeholder, shape_of, symbol, tensor_of
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.canonical.canonicalize import SOURCE
from kvrewrite.passes.canonical.check import CARRIED, data_nodes
from kvrewrite.passes.canonical.probe import integers_in, is_projection, symbols

aten = torch.ops.aten

LENGTHS = (1, 2, 3, 17)  # tokens of texts for a site; the rest of the graph runs on all but 3
LONGEST_REST = 1024  # longest text that the rest of the graph is run on
MOST_ACTIVATIONS = 1 << 23  # most elements of its widest activation
FARTHEST = 1 << 17  # largest position of a token, if the model has no limit

# Ops that only move data: equal inputs give equal outputs.
MOVES = {
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.chunk.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.clone.default,
    aten._to_copy.default,
    aten.alias.default,
    aten.cat.default,
    aten.stack.default,
    aten.index_select.default,
    aten.index.Tensor,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.swapaxes.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.mT.default,
    aten.contiguous.default,
    aten.tile.default,
    aten.expand_as.default,
    aten.unsafe_split.Tensor,
}


class Snapshot:
    """A copy of a graph, to be compared with what passes make of it."""

    def __init__(self, captured: Captured):
        self.graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        self.graph.output(self.graph.graph_copy(captured.graph.graph, copies))
        self.nodes = {original.name: copy for original, copy in copies.items()}
        for original, copy in copies.items():
            copy.meta = dict(original.meta)


class BothGraphs:
    """Evaluates both graphs on random texts. sources: the sites' ops in the canonical graph."""

    def __init__(self, captured: Captured, before: Snapshot, stand_ins: StandIns):
        self.captured, self.snapshot = captured, before
        root = captured.graph
        self.before = Evaluator(before.graph, root, stand_ins)
        self.after = Evaluator(captured.graph.graph, root, stand_ins)
        self.sources = [n for n in captured.graph.graph.nodes if is_op(n, SOURCE)]
        self.limit = captured.max_positions or FARTHEST
        self.generator = torch.Generator().manual_seed(11)
        self.special = self._special()
        data = data_nodes(captured.graph)
        self.starts = {source: self._starts(source, data) for source in self.sources}

    def _special(self) -> Tensor:
        """Returns the token ids that the graph names: special treatment of one of them shows on no other id."""
        gm = self.captured.graph
        ids = placeholder(gm, "input_ids")
        named = integers_in(self.captured, (u for n in _of_ids(gm, ids) for u in n.users))
        return torch.tensor(sorted(i for i in named if i < (self.captured.vocab_size or 2)), dtype=torch.long)

    def ids(self, rows: int, length: int) -> Tensor:
        """Returns random token ids; half of them are ids that the graph names, if it names any."""
        ids = torch.randint(self.captured.vocab_size or 2, (rows, length), generator=self.generator)
        if not len(self.special):
            return ids
        which = torch.randint(len(self.special), (rows, length), generator=self.generator)
        half = torch.rand(rows, length, generator=self.generator) < 0.5
        return torch.where(half, self.special[which], ids)

    @staticmethod
    def inputs(ids: Tensor, positions: Tensor | None = None) -> dict[str, Tensor]:
        """What both graphs take: ids and positions (rows, tokens); positions count from 0 by themselves."""
        if positions is None:
            positions = torch.arange(ids.shape[1]).expand_as(ids)
        return {"input_ids": ids, "position_ids": positions}

    def random(self, node: fx.Node, rows: int, length: int, gain: float) -> Any:
        """A normally distributed value for a node, times `gain`."""
        sizes = symbols(self.captured, rows, length)
        shape = concretize(shape_of(node), sizes)
        return gain * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def rest_lengths(self) -> list[int]:
        """Lengths of the texts that the graph is run on with its sites cut."""
        if self.captured.unrolled and self.captured.trace_length <= self.limit:
            # A loop over chunks that the trace unrolled only holds for texts of as many chunks.
            return [self.captured.trace_length]
        sizes = symbols(self.captured, 1, 1)
        shapes = [
            tuple(v.shape) for n in self.after.nodes if n.op == "call_function" and (v := tensor_of(n)) is not None
        ]
        # The same few shapes come again in every layer.
        distinct = {tuple(map(symbol, shape)): shape for shape in shapes}
        widest = max((math.prod(concretize(s, sizes)) for s in distinct.values() if not _unbacked(s, sizes)), default=1)
        longest = min(self.limit, LONGEST_REST, max(64, MOST_ACTIVATIONS // (2 * widest)))
        return sorted({n for n in (1, 2, 17, longest) if n <= self.limit})

    def shape(self, node: fx.Node, inputs: dict[str, Tensor]) -> tuple[int, ...]:
        """A node's shape in numbers for these inputs."""
        rows, length = inputs["input_ids"].shape
        return concretize(shape_of(node), symbols(self.captured, rows, length))

    def _starts(self, source: fx.Node, data: set[fx.Node]) -> list[fx.Node]:
        """Returns the nodes, in both graphs, from which ops only move data to a site's queries, keys and values. data:
        nodes that depend on ids.

        If the model repeats kv heads and the canonical graph takes one of each, everything between the projection and
        the attention is repeated (RoPE, say), so the projection is returned.
        """
        found: dict[fx.Node, None] = {}
        todo: list[tuple[fx.Node, bool]] = [(arg(source, name), False) for name in ("q", "k", "v")]
        seen: set[tuple[fx.Node, bool]] = set()
        while todo:
            node, repeated = todo.pop()
            if (node, repeated) in seen or is_size(node) or node not in data:
                continue
            seen.add((node, repeated))
            # A node that carries a state is another op than the captured node of its name.
            new = node.name not in self.snapshot.nodes or node.meta.get(CARRIED) == ""
            repeated = repeated or (new and is_op(node, aten.slice.Tensor))
            moves = node.op == "call_function" and (
                new or getattr(node.target, "__name__", "") == "getitem" or node.target in MOVES
            )
            if moves or (repeated and node.op == "call_function" and not is_projection(node)):
                todo += [(n, repeated) for n in node.all_input_nodes]
            else:
                found[node] = None
        return list(found)


def layer_of(node: fx.Node) -> str:
    """The layer and module of a site's op, for messages."""
    site: AttentionSite = node.meta["kvrewrite_site"]
    return f"layer {site.layer} ({site.module or 'the model itself'})"


def only(output: Any) -> fx.Node:
    """The first output of a graph: the logits."""
    found = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(found, fx.Node)
    return found


def place_of(node: fx.Node) -> str:
    """Where in the model a node is from, for the beginning of a message; empty where nothing says so."""
    path = module_path(node)
    index = re.search(r"\.(\d+)(?:\.|$)", path)
    return f"layer {index.group(1)} ({path}): " if index else f"{path}: " if path else ""


def _of_ids(gm: fx.GraphModule, ids: fx.Node | None) -> list[fx.Node]:
    """Returns the token ids and the integers and booleans that are made of them."""
    found = [ids] if ids is not None else []
    for node in gm.graph.nodes:
        value = tensor_of(node)
        if value is not None and not value.is_floating_point() and any(n in found for n in node.all_input_nodes):
            found.append(node)
    return found


def _unbacked(shape: Iterable[Any], sizes: dict[Any, int]) -> bool:
    """Whether a size does not follow from the inputs' sizes (it depends on the data)."""
    return any(
        isinstance(s, torch.SymInt) and not getattr(s.node.expr, "free_symbols", set()) <= set(sizes) for s in shape
    )


def token_value(node: fx.Node, order: Iterable[int], inputs: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """Returns a value for a cut node that depends only on each token and its position; order: dims as (row, token,
    ...)."""
    order = list(order)
    ids, positions = inputs["input_ids"].double(), inputs["position_ids"].double()
    rest = [shape[d] for d in order[2:]]
    channel = torch.arange(math.prod(rest), dtype=torch.float64)
    salt = float(_number(node.name) % 97)
    made = torch.sin((ids * 0.37 + positions * 0.11 + salt)[..., None] + channel * 0.77).reshape(*ids.shape, *rest)
    return made.permute([order.index(d) for d in range(len(order))])


def _number(name: str) -> int:
    """Returns a number for a name, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
