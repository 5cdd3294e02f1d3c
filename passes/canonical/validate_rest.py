"""With the sites cut: is the rest what it was, and a function of one token and its position?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.evaluate import EvaluationError, difference
from kvrewrite.ir.fx import ancestors, arg, is_size, tensor_of
from kvrewrite.passes.canonical.both_graphs import LENGTHS, BothGraphs, layer_of, only, place_of, token_value
from kvrewrite.passes.canonical.canonicalize import REPLACED, RESULT
from kvrewrite.passes.canonical.check import CARRIED, data_nodes
from kvrewrite.passes.canonical.proof import Proof
from kvrewrite.passes.canonical.regions import layout_of

POOL = 24  # tokens, with their positions, that are run alone and in company


def compare_positions(run: BothGraphs, proof: Proof) -> None:
    """With the sites cut, compares the canonical graph with the captured one on texts that begin at position 0."""
    if not any(n.name not in run.snapshot.nodes and tensor_of(n) is not None for n in run.after.nodes):
        return  # no pass has changed the graph: it is the captured one
    output = only(run.after.output)
    watched = [n for source in run.sources for n in run.starts[source]]
    pairs = {n: run.snapshot.nodes[n.name] for n in dict.fromkeys(watched)}
    pairs[output] = only(run.before.output)
    layers = {n: layer_of(source) for source in reversed(run.sources) for n in run.starts[source]}
    for length in run.rest_lengths():
        inputs = run.inputs(run.ids(2 if length <= max(LENGTHS) else 1, length))
        cut = {source: token_value(source, (0, 2, 1, 3), inputs, run.shape(source, inputs)) for source in run.sources}
        try:
            results = {s: s.meta[RESULT] for s in run.sources if s.meta.get(REPLACED) is not None}
            made = run.after(inputs, [*pairs, *results.values()], cut)
            given = {run.snapshot.nodes[s.meta[REPLACED]]: made[r] for s, r in results.items()}
            given |= {run.snapshot.nodes[s.name]: cut[s] for s in run.sources if s not in results}
            wanted = run.before(inputs, list(pairs.values()), given)
        except EvaluationError as error:
            raise UnsupportedModelError(
                f"the model can't be run on a text of {length} tokens, which a cache needs: {place_of(error.node)}{error}"
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


def check_locality(run: BothGraphs, proof: Proof) -> None:
    """With sites and carried states cut, checks that the rest depends only on one token and its position."""
    gm = run.captured.graph
    watched: dict[fx.Node, tuple[str, list[int]]] = {}
    cuts: dict[fx.Node, list[int]] = {}
    for source in run.sources:
        cuts[source] = [0, 2, 1, 3]
        for name, operand in (("queries", "q"), ("keys", "k"), ("values", "v")):
            watched.setdefault(arg(source, operand), (f"{layer_of(source)}: the {name} of its attention", [0, 2, 1, 3]))
    data = data_nodes(gm)
    for node in gm.graph.nodes:
        if node.meta.get(CARRIED) != "" or node not in data:
            continue
        if any(u.meta.get(CARRIED) != "" for u in node.users) and not is_size(node):
            layout = layout_of(run.captured, node)
            if layout is not None:
                cuts[node] = layout
        for read in node.all_input_nodes:
            if read in data and not is_size(read) and read.meta.get(CARRIED) != "":
                layout = layout_of(run.captured, read)
                if layout is not None:
                    watched.setdefault(read, (f"{place_of(read)}what its recurrent state is made of", layout))
    output = only(run.after.output)
    watched[output] = ("the logits", [0, 1, 2])
    pool = _Locality(run, watched, cuts)
    for rows, length in pool.arrangements():
        pool.check(rows, length)
        if length not in proof.rest:
            proof.rest.append(length)
    proof.rest.sort()


class _Locality:
    """Tokens with positions, the result of each one alone, and the texts that they are put into."""

    def __init__(self, run: BothGraphs, watched: dict[fx.Node, tuple[str, list[int]]], cuts: dict[fx.Node, list[int]]):
        self.run, self.watched, self.cuts = run, watched, cuts
        generator = run.generator
        far = torch.randint(run.limit, (POOL,), generator=generator)
        far[: POOL // 3] = torch.arange(POOL // 3) % run.limit
        far[-1] = run.limit - 1
        self.positions = far
        self.tokens = run.ids(1, POOL)[0]
        self.alone = self._evaluate(self.tokens[:, None], self.positions[:, None])

    def arrangements(self) -> Iterable[tuple[int, int]]:
        """Yields (rows, tokens) of the texts to try."""
        if self.run.captured.unrolled:
            return ()
        longest = max(self.run.rest_lengths())
        sizes = [(1, 2), (2, 3), (5, 7), (2, 17)]
        return [*(s for s in sizes if s[1] <= longest), (1, longest)]

    def _evaluate(
        self, ids: Tensor, positions: Tensor, watched: dict[fx.Node, list[int]] | None = None
    ) -> dict[fx.Node, Tensor]:
        """Evaluates the watched nodes as (row, token, ...); watched: other nodes, with the orders of their dims."""
        run = self.run
        watched = {n: order for n, (_, order) in self.watched.items()} if watched is None else watched
        inputs = run.inputs(ids, positions)
        given = {n: token_value(n, order, inputs, run.shape(n, inputs)) for n, order in self.cuts.items()}
        try:
            found = run.after(inputs, watched, given)
        except EvaluationError as error:
            raise UnsupportedModelError(
                f"{place_of(error.node)}the model can't be run on a text of {ids.shape[1]} tokens ({ids.shape[0]} rows), which a "
                f"cache needs: {error}"
            ) from error
        return {n: value.permute(watched[n]) for n, value in found.items()}

    def check(self, rows: int, length: int) -> None:
        """Puts tokens of the pool into a text of other tokens and compares each with itself alone."""
        run = self.run
        ids = run.ids(rows, length)
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
        where = place_of(first) or f"{self.watched[node][0]}: "
        raise UnsupportedModelError(
            f"{where}{first.name} ({first.target}) must depend on one token and its position alone, but it mixes tokens or rows, "
            f"or depends on how many there are: beside other tokens, in a text of {length} tokens and {rows} "
            f"row{'s' if rows > 1 else ''}, {problem}. An evicted cache carries keys and values, nothing else"
        )
