"""Validates the rewrite: runs the rewritten graph beside the captured one; both must give the same.

Finding an attention only says what the compiler believes; this pass tests it. It asks three questions about the
canonical graph and answers each by running both graphs in float64 on random inputs (`kvrewrite/ir/evaluate.py`):

- **sites**: does the canonical op give what the captured subgraph gives, from queries, keys and values to the attention's
  output, at several lengths and with scores large enough to show a mask or a scale?
- **positions**: with the sites cut, does the canonical graph give what the captured one gives?
- **locality**: with the sites and the carried states cut, is the rest a function of one token and its position? The same
  tokens are run alone and in texts of several lengths, in several rows and with other neighbours.

A module that computes something else is refused with the layer, whatever its ops.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.errors import OptionError, UnsupportedModelError
from kvrewrite.ir.evaluate import TOLERANCE, EvaluationError, Evaluator, StandIns, difference
from kvrewrite.ir.fx import (
    ancestors,
    arg,
    concretize,
    get_attr,
    is_op,
    is_size,
    module_path,
    placeholder,
    shape_of,
    tensor_of,
)
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.canonical.canonicalize import REPLACED, RESULT, SOURCE
from kvrewrite.passes.canonical.check import CARRIED, data_nodes
from kvrewrite.passes.canonical.probe import integers_in, is_projection, subgraph_text, symbols
from kvrewrite.passes.canonical.regions import layout_of

aten = torch.ops.aten

CHECKS = ("full", "sites", "off")
LENGTHS = (1, 2, 3, 17)  # tokens of texts for a site; the rest of the graph runs on all but 3
LONGEST = 4096  # longest text that a site is run on
MOST_SCORES = 1 << 24  # most elements of a site's scores
LONGEST_REST = 1024  # longest text that the rest of the graph is run on
MOST_ACTIVATIONS = 1 << 23  # most elements of its widest activation
POOL = 24  # tokens, with their positions, that are run alone and in company
FARTHEST = 1 << 17  # largest position of a token of the pool, if the model has no limit
GAINS = (1.5, 4.0)  # of queries and keys: scores are about the square of this

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


@dataclass
class Proof:
    """What was proved about a rewrite, for the report and the model card."""

    check: str
    sites: int = 0  # attention sites that were compared with what they replaced
    distinct: int = 0  # how many of these are different
    lengths: list[int] = field(default_factory=list)  # lengths of the texts that sites were run on
    rest: list[int] = field(default_factory=list)  # lengths of the texts that the rest was run on
    masks: int = 0  # distance up to which masks were compared; 0: there is none but the causal one
    whole: list[int] = field(default_factory=list)  # pieces that the whole was run in; 0 stands for padding

    def as_dict(self) -> dict[str, Any]:
        """Returns the proof as plain data."""
        return dict(self.__dict__)


class Snapshot:
    """A copy of a graph, to be compared with what passes make of it."""

    def __init__(self, captured: Captured):
        self.graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        self.graph.output(self.graph.graph_copy(captured.graph.graph, copies))
        self.nodes = {original.name: copy for original, copy in copies.items()}
        for original, copy in copies.items():
            copy.meta = dict(original.meta)


def require_check(check: str) -> None:
    """Raises OptionError if `check` is not in `CHECKS`."""
    if check not in CHECKS:
        raise OptionError(f"check is {check!r}, expected one of {', '.join(map(repr, CHECKS))}")


def validate(captured: Captured, before: Snapshot, stand_ins: StandIns, check: str) -> Proof:
    """Requires a canonical graph with lifted positions, and the normalized graph that it was made from.

    Ensures that the rewritten graph computes what was captured; raises UnsupportedModelError with layer and reason.
    """
    run = _Validation(captured, before, stand_ins)
    proof = Proof(check, masks=min(captured.compared, captured.max_positions or captured.compared))
    run.sites(proof)
    if check == "full":
        run.positions(proof)
        run.locality(proof)
    return proof


def _layer(node: fx.Node) -> str:
    site: AttentionSite = node.meta["kvrewrite_site"]
    return f"layer {site.layer} ({site.module or 'the model itself'})"


class _Validation:
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

    # ---------------------------------------------------------------------------------------------- inputs
    def _special(self) -> Tensor:
        """Returns the token ids that the graph names: special treatment of one of them shows on no other id."""
        gm = self.captured.graph
        ids = placeholder(gm, "input_ids")
        named = integers_in(self.captured, (u for n in _of_ids(gm, ids) for u in n.users))
        return torch.tensor(sorted(i for i in named if i < (self.captured.vocab_size or 2)), dtype=torch.long)

    def _ids(self, rows: int, length: int) -> Tensor:
        """Returns random token ids; half of them are ids that the graph names, if it names any."""
        ids = torch.randint(self.captured.vocab_size or 2, (rows, length), generator=self.generator)
        if not len(self.special):
            return ids
        which = torch.randint(len(self.special), (rows, length), generator=self.generator)
        half = torch.rand(rows, length, generator=self.generator) < 0.5
        return torch.where(half, self.special[which], ids)

    @staticmethod
    def _inputs(ids: Tensor, positions: Tensor | None = None) -> dict[str, Tensor]:
        if positions is None:
            positions = torch.arange(ids.shape[1]).expand_as(ids)
        return {"input_ids": ids, "position_ids": positions}

    def _random(self, node: fx.Node, rows: int, length: int, gain: float) -> Any:
        sizes = symbols(self.captured, rows, length)
        shape = concretize(shape_of(node), sizes)
        return gain * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    # ---------------------------------------------------------------------------------------------- sites
    def sites(self, proof: Proof) -> None:
        """Compares each site with what it replaced; sites with the same subgraph are compared once."""
        known: set[str] = set()
        together: dict[str, list[fx.Node]] = {}
        for source in self.sources:
            if REPLACED in source.meta:  # captured as the canonical op itself
                together.setdefault(source.meta[REPLACED], []).append(source)
        for name, sources in together.items():
            source = sources[0]
            replaced, result = self.snapshot.nodes[name], source.meta[RESULT]
            starts = list(dict.fromkeys(n for s in sources for n in self.starts[s]))
            proof.sites += len(sources)
            names = [n.name for n in starts]
            key = "\n".join(subgraph_text(self.captured, [n], names, parameters=False) for n in (replaced, result))
            if key in known:
                continue
            known.add(key)
            for length in self._site_lengths([s.meta["kvrewrite_site"] for s in sources]):
                self._run_site(source, replaced, result, starts, length)
                if length not in proof.lengths:
                    proof.lengths.append(length)
        proof.distinct = len(known)
        proof.lengths.sort()

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

    def _site_lengths(self, sites: list[AttentionSite]) -> list[int]:
        most = min(self.limit, LONGEST, math.isqrt(MOST_SCORES // sum(s.heads for s in sites)))
        sizes = {size for s in sites for size in (s.window, s.chunk) if size}
        around = [k * size + d for size in sizes for k in (1, 2) for d in (-1, 0, 1)]
        wanted = {*LENGTHS, *around, most}
        return sorted(n for n in wanted if 1 <= n <= most)

    def _run_site(
        self, source: fx.Node, replaced: fx.Node, result: fx.Node, starts: list[fx.Node], length: int
    ) -> None:
        rows = 2 if length <= max(LENGTHS) else 1
        for gain in GAINS if rows == 2 else GAINS[:1]:
            values = {n: self._random(n, rows, length, gain) for n in starts}
            inputs = self._inputs(self._ids(rows, length))
            try:
                want = self.before(inputs, [replaced], {self.snapshot.nodes[n.name]: v for n, v in values.items()})
                got = self.after(inputs, [result], values)
            except EvaluationError as error:
                raise UnsupportedModelError(
                    f"{_layer(source)}: its attention fails on a text of {length} tokens, which a cache needs: {error}"
                ) from error
            # ALiBi's slopes are kept in float32.
            tolerance = TOLERANCE + 1e-7 * length * (arg(source, "alibi") is not None)
            problem = difference(got[result], want[replaced], tolerance)
            if problem:
                raise UnsupportedModelError(
                    f"{_layer(source)}: its attention is not {_described(source)}, as which it was recognized: on a text of "
                    f"{length} tokens {problem}{self._weights_between(replaced, starts)}"
                )

    def _weights_between(self, replaced: fx.Node, starts: list[fx.Node]) -> str:
        """Names the parameters between a site's inputs and output: one that was folded into a number explains a
        mismatch."""
        names = {n.name for n in starts}
        between = ancestors([replaced], stop=lambda n: n.name in names)
        learned = sorted(
            str(n.target)
            for n in between
            if n.op == "get_attr" and isinstance(get_attr(self.captured.graph, str(n.target)), torch.nn.Parameter)
        )
        if not learned:
            return ""
        return f" (it depends on {', '.join(learned)}, which can't be folded into a number: weights may change)"

    # ---------------------------------------------------------------------------------------------- positions
    def positions(self, proof: Proof) -> None:
        """With the sites cut, compares the canonical graph with the captured one on texts that begin at position 0."""
        if not any(n.name not in self.snapshot.nodes and tensor_of(n) is not None for n in self.after.nodes):
            return  # no pass has changed the graph: it is the captured one
        output = _only(self.after.output)
        watched = [n for source in self.sources for n in self.starts[source]]
        pairs = {n: self.snapshot.nodes[n.name] for n in dict.fromkeys(watched)}
        pairs[output] = _only(self.before.output)
        layers = {n: _layer(source) for source in reversed(self.sources) for n in self.starts[source]}
        for length in self._rest_lengths():
            inputs = self._inputs(self._ids(2 if length <= max(LENGTHS) else 1, length))
            cut = {
                source: _token_value(source, (0, 2, 1, 3), inputs, self._shape(source, inputs))
                for source in self.sources
            }
            try:
                results = {s: s.meta[RESULT] for s in self.sources if s.meta.get(REPLACED) is not None}
                made = self.after(inputs, [*pairs, *results.values()], cut)
                given = {self.snapshot.nodes[s.meta[REPLACED]]: made[r] for s, r in results.items()}
                given |= {self.snapshot.nodes[s.name]: cut[s] for s in self.sources if s not in results}
                wanted = self.before(inputs, list(pairs.values()), given)
            except EvaluationError as error:
                raise UnsupportedModelError(
                    f"the model can't be run on a text of {length} tokens, which a cache needs: {_at(error.node)}{error}"
                ) from error
            for ours, theirs in pairs.items():
                problem = difference(made[ours], wanted[theirs])
                if problem:
                    where = layers.get(ours, "the logits")
                    raise UnsupportedModelError(
                        f"{where}: with positions as an input, the model computes something else than before: on a text of "
                        f"{length} tokens {problem} (at {ours.name})"
                    )
            proof.rest.append(length)

    def _rest_lengths(self) -> list[int]:
        if self.captured.unrolled and self.captured.trace_length <= self.limit:
            # A loop over chunks that the trace unrolled only holds for texts of as many chunks.
            return [self.captured.trace_length]
        widest = max((self._width(n) for n in self.after.nodes), default=1)
        longest = min(self.limit, LONGEST_REST, max(64, MOST_ACTIVATIONS // (2 * widest)))
        return sorted({n for n in (1, 2, 17, longest) if n <= self.limit})

    def _width(self, node: fx.Node) -> int:
        """Returns elements per token of a node's tensor."""
        value = tensor_of(node)
        if value is None or node.op != "call_function":
            return 0
        sizes = symbols(self.captured, 1, 1)
        return math.prod(concretize(tuple(value.shape), sizes)) if not _unbacked(value, sizes) else 0

    def _shape(self, node: fx.Node, inputs: dict[str, Tensor]) -> tuple[int, ...]:
        rows, length = inputs["input_ids"].shape
        return concretize(shape_of(node), symbols(self.captured, rows, length))

    # ---------------------------------------------------------------------------------------------- locality
    def locality(self, proof: Proof) -> None:
        """With sites and carried states cut, checks that the rest depends only on one token and its position."""
        gm = self.captured.graph
        watched: dict[fx.Node, tuple[str, list[int]]] = {}
        cuts: dict[fx.Node, list[int]] = {}
        for source in self.sources:
            cuts[source] = [0, 2, 1, 3]
            for name, operand in (("queries", "q"), ("keys", "k"), ("values", "v")):
                watched.setdefault(
                    arg(source, operand), (f"{_layer(source)}: the {name} of its attention", [0, 2, 1, 3])
                )
        data = data_nodes(gm)
        for node in gm.graph.nodes:
            if node.meta.get(CARRIED) != "" or node not in data:
                continue
            if any(u.meta.get(CARRIED) != "" for u in node.users) and not is_size(node):
                layout = layout_of(self.captured, node)
                if layout is not None:
                    cuts[node] = layout
            for read in node.all_input_nodes:
                if read in data and not is_size(read) and read.meta.get(CARRIED) != "":
                    layout = layout_of(self.captured, read)
                    if layout is not None:
                        watched.setdefault(read, (f"{_at(read)}what its recurrent state is made of", layout))
        output = _only(self.after.output)
        watched[output] = ("the logits", [0, 1, 2])
        run = _Locality(self, watched, cuts)
        for rows, length in run.arrangements():
            run.check(rows, length)
            if length not in proof.rest:
                proof.rest.append(length)
        proof.rest.sort()


class _Locality:
    """Tokens with positions, the result of each one alone, and the texts that they are put into."""

    def __init__(
        self, validation: _Validation, watched: dict[fx.Node, tuple[str, list[int]]], cuts: dict[fx.Node, list[int]]
    ):
        self.run, self.watched, self.cuts = validation, watched, cuts
        generator = validation.generator
        far = torch.randint(validation.limit, (POOL,), generator=generator)
        far[: POOL // 3] = torch.arange(POOL // 3) % validation.limit
        far[-1] = validation.limit - 1
        self.positions = far
        self.tokens = validation._ids(1, POOL)[0]
        self.alone = self._evaluate(self.tokens[:, None], self.positions[:, None])

    def arrangements(self) -> Iterable[tuple[int, int]]:
        """Yields (rows, tokens) of the texts to try."""
        if self.run.captured.unrolled:
            return ()
        longest = max(self.run._rest_lengths())
        sizes = [(1, 2), (2, 3), (5, 7), (2, 17)]
        return [*(s for s in sizes if s[1] <= longest), (1, longest)]

    def _evaluate(
        self, ids: Tensor, positions: Tensor, watched: dict[fx.Node, list[int]] | None = None
    ) -> dict[fx.Node, Tensor]:
        """Evaluates the watched nodes as (row, token, ...); watched: other nodes, with the orders of their dims."""
        run = self.run
        watched = {n: order for n, (_, order) in self.watched.items()} if watched is None else watched
        inputs = run._inputs(ids, positions)
        given = {n: _token_value(n, order, inputs, run._shape(n, inputs)) for n, order in self.cuts.items()}
        try:
            found = run.after(inputs, watched, given)
        except EvaluationError as error:
            raise UnsupportedModelError(
                f"{_at(error.node)}the model can't be run on a text of {ids.shape[1]} tokens ({ids.shape[0]} rows), which a "
                f"cache needs: {error}"
            ) from error
        return {n: value.permute(watched[n]) for n, value in found.items()}

    def check(self, rows: int, length: int) -> None:
        """Puts tokens of the pool into a text of other tokens and compares each with itself alone."""
        run = self.run
        ids = run._ids(rows, length)
        positions = torch.randint(run.limit, (rows, length), generator=run.generator)
        places = torch.randperm(rows * length, generator=run.generator)[:POOL]
        chosen = torch.randperm(POOL, generator=run.generator)[: len(places)]
        ids.view(-1)[places], positions.view(-1)[places] = self.tokens[chosen], self.positions[chosen]

        def differs(found: dict[fx.Node, Tensor], alone: dict[fx.Node, Tensor], node: fx.Node) -> str:
            return difference(found[node].flatten(0, 1)[places], alone[node][:, 0][chosen])

        together = self._evaluate(ids, positions)
        for node in self.watched:
            if problem := differs(together, self.alone, node):
                break
        else:
            return
        # The first node that differs says more than the watched one.
        gm = run.captured.graph
        before = ancestors([node], stop=lambda n: n in self.cuts)
        orders = {n: order for n in gm.graph.nodes if n in before and (order := layout_of(run.captured, n)) is not None}
        alone, together = (
            self._evaluate(*given, orders)
            for given in ((self.tokens[:, None], self.positions[:, None]), (ids, positions))
        )
        first = next((n for n in orders if differs(together, alone, n)), node)
        while getattr(first.target, "__name__", "") == "getitem":  # one of several results
            first = first.all_input_nodes[0]
        where = _at(first) or f"{self.watched[node][0]}: "
        raise UnsupportedModelError(
            f"{where}{first.name} ({first.target}) must depend on one token and its position alone, but it mixes tokens or rows, "
            f"or depends on how many there are: beside other tokens, in a text of {length} tokens and {rows} "
            f"row{'s' if rows > 1 else ''}, {problem}. An evicted cache carries keys and values, nothing else"
        )


# ------------------------------------------------------------------------------------------------ helpers
def _only(output: Any) -> fx.Node:
    found = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(found, fx.Node)
    return found


def _at(node: fx.Node) -> str:
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


def _unbacked(value: Tensor, sizes: dict[Any, int]) -> bool:
    """Whether a size does not follow from the inputs' sizes (it depends on the data)."""
    return any(
        isinstance(s, torch.SymInt) and not getattr(s.node.expr, "free_symbols", set()) <= set(sizes)
        for s in value.shape
    )


def _token_value(node: fx.Node, order: Iterable[int], inputs: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
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


def _described(source: fx.Node) -> str:
    site: AttentionSite = source.meta["kvrewrite_site"]
    mask = f"a window of {site.window}" if site.window else f"chunks of {site.chunk}" if site.chunk else "a causal mask"
    more = [f"a scale of {site.scale:.6g}"]
    more += [f"a softcap of {site.softcap:g}"] if site.softcap else []
    more += ["ALiBi"] if site.alibi else []
    more += ["sinks"] if site.sinks else []
    return f"softmax attention with {mask} and {', '.join(more)}"


__all__ = ["CHECKS", "Proof", "Snapshot", "require_check", "validate"]
