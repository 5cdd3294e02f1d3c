"""Keeps learned values out of the constants of an attention.

A rewritten model shares its parameters with the original: loading other weights into one must change both. What
`find_attention` finds by evaluation (mask, scale, softcap, slopes) is constant, so it must not depend on any value in a
state dict. This is tested: the chain from the scores to the softmax is evaluated with other parameter values and must
give the same answer. Two things stay live in the graph: a factor of the scores (a learned temperature, Swin-V2's logit
scale), which becomes a factor of the queries, and one ALiBi slope per head.

A mask table in the state dict is a constant like any mask. Tables of integers, booleans, or zeros and ones are not
tested. Other floating buffers are only scaled as a whole, so that one of zeros and -inf masks the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import ancestors, dependents, get_attr, is_op, shape_of, symbol, tensor_of
from kvrewrite.passes.canonical.probe import Probe, ProbeError, depends_on_data, only_shape, seen_in

aten = torch.ops.aten
Values = Mapping[fx.Node, Tensor]
# (batch, length, values given to nodes) -> what becomes of scores: logits (B, H, S, S or S + 1).
ChainAt = Callable[[int, int, Values], Callable[[Tensor], Tensor]]

BATCH, LENGTH, FURTHER = 2, 7, 40
TOLERANCE = 1e-6


class LearnedConstant(ProbeError):
    """Something that must be constant depends on a parameter."""


@dataclass
class Live:
    """The parts of an attention's chain that are not constant. given: values for the chain that make its factors do
    nothing; factors: nodes that the scores are multiplied by, or divided by if the flag is set: one number, one per
    head or one per query; slopes: the node of learned ALiBi slopes, and whether it has them negated."""

    given: dict[fx.Node, Tensor] = field(default_factory=dict)
    factors: list[tuple[fx.Node, bool]] = field(default_factory=list)
    slopes: tuple[fx.Node, bool] | None = None


def learned_leaves(captured: Captured, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Returns those of the nodes that read a parameter, or a floating buffer of the state dict."""
    found = []
    for node in nodes:
        value = get_attr(captured.graph, str(node.target)) if node.op == "get_attr" else None
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if isinstance(value, torch.nn.Parameter) or (
            node.target in captured.persistent and not _is_table_of_a_mask(value)
        ):
            found.append(node)
    return sorted(found)


def _is_table_of_a_mask(value: Tensor) -> bool:
    """Whether a buffer holds only zeros and ones, one per pair of tokens."""
    if value.dim() < 2 or min(value.shape[-2:]) < 2 or value.device.type == "meta":
        return False
    return value.unique().tolist() == [0.0, 1.0]


def other_values(captured: Captured, nodes: Iterable[fx.Node], seed: int) -> dict[fx.Node, Tensor]:
    """Returns other possible values for the learned leaves of `nodes`. A buffer that is not all zeros is only
    scaled."""
    values = {}
    for i, node in enumerate(learned_leaves(captured, nodes)):
        held = get_attr(captured.graph, str(node.target))
        value = held.detach()
        drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(1000 * seed + i), dtype=torch.float64)
        if value.device.type == "meta":
            values[node] = drawn
            continue
        now = value.to("cpu", torch.float64)
        kept = not isinstance(held, torch.nn.Parameter) and bool(now.any())
        values[node] = now * (1.25 + 0.25 * seed) + (0.0 if kept else 0.5 * drawn)
    return values


def find_live(captured: Captured, nodes: set[fx.Node], scores: fx.Node | None, chain_at: ChainAt, heads: int) -> Live:
    """Finds the live parts of a chain: the factors of the scores and the slopes.

    nodes: everything that the chain reads besides the data; scores: the node of the scores if it is in the graph; the
    chain takes its shape, else (B, H, S, S). Raises LearnedConstant with the parameter if anything else in the chain is
    learned.
    """
    learned = bool(learned_leaves(captured, nodes))
    constant = _constant_factors(captured, nodes, scores, heads)
    if not learned and not constant:
        return Live()
    chain = _Chain(captured, nodes, scores, chain_at, heads)
    live = Live()
    for node in dict.fromkeys([*constant, *chain.candidates()]):
        by_query = any(symbol(s) == captured.length_symbol for s in shape_of(node))
        for divides in (False, True):
            if chain.is_factor(node, divides, live.given, by_query):
                live.factors.append((node, divides))
                # Of any length: the chain is evaluated at several.
                shape = [1] * len(shape_of(node)) if by_query else chain.probe.shape(node)
                live.given[node] = torch.ones(shape, dtype=torch.float64)
                break
    if not learned:
        return live
    live.slopes = chain.slopes(live.given)
    return live


def _constant_factors(captured: Captured, nodes: set[fx.Node], scores: fx.Node | None, heads: int) -> list[fx.Node]:
    """Returns nodes that multiply or divide the scores or what they become: (..., S, 1), one number per query, or
    (..., heads, 1, 1)."""
    if scores is None:
        return []
    after = dependents([scores])
    found = []
    for node in sorted(nodes):
        value = tensor_of(node)
        if node in after or value is None or value.dtype == torch.bool or value.dim() < 2 or depends_on_data(node):
            continue
        if any(is_op(u, aten.mul.Tensor, aten.div.Tensor) and u in after for u in node.users):
            sizes = [symbol(s) for s in value.shape]
            by_query = sizes[-2] == captured.length_symbol and all(s == 1 for s in (*sizes[:-2], sizes[-1]))
            by_head = heads > 1 and sizes[-3:] == [heads, 1, 1] and all(s == 1 for s in sizes[:-3])
            if by_query or by_head:
                found.append(node)
    return found


class _Chain:
    """Evaluates one chain, with other values of the parameters that it reads."""

    def __init__(self, captured: Captured, nodes: set[fx.Node], scores: fx.Node | None, chain_at: ChainAt, heads: int):
        self.captured, self.nodes, self.scores, self.chain_at, self.heads = captured, nodes, scores, chain_at, heads
        self.leaves = learned_leaves(captured, nodes)
        self.probe = Probe(captured, BATCH, LENGTH)
        self.now: dict[fx.Node, Tensor] = {leaf: self.probe(leaf) for leaf in self.leaves}
        self.others = [other_values(captured, nodes, seed) for seed in (1, 2)]
        self.x = self.random_scores(BATCH, LENGTH)

    def random_scores(self, batch: int, length: int) -> Tensor:
        shape = (batch, self.heads, length, length)
        if self.scores is not None:
            shape = Probe(self.captured, batch, length).shape(self.scores)  # type: ignore[assignment]
        return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def answer(self, x: Tensor, given: Values, batch: int = BATCH, length: int = LENGTH) -> Tensor:
        """Returns the logits for scores x, each relative to the token's own; -inf if masked."""
        y = self.chain_at(batch, length, given)(x)[..., :length]
        y = y - y.diagonal(dim1=-2, dim2=-1)[..., None]
        return torch.where(seen_in(y), y, torch.where(y.isnan(), y, -math.inf))

    def candidates(self) -> list[fx.Node]:
        """Returns parameter-dependent nodes with one number in all or per head, nearest to the softmax first."""
        found = []
        for node in sorted(self.nodes, reverse=True):
            value = tensor_of(node)
            if value is None or not value.is_floating_point() or any(not isinstance(s, int) for s in value.shape):
                continue
            if math.prod(shape_of(node)) not in (1, self.heads) or depends_on_data(node) or node is self.scores:
                continue
            if any(leaf in self.leaves for leaf in ancestors([node], stop=only_shape)):
                found.append(node)
        return found

    def is_factor(self, node: fx.Node, divides: bool, given: Values, by_query: bool = False) -> bool:
        """Whether the scores are multiplied (divided) by `node` and it has no other effect."""
        shape = self.probe.shape(node)
        factor = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        by_head = factor.reshape((1, 1, -1, 1) if by_query else (1, -1, 1, 1))
        by_head = 1 / by_head if divides else by_head
        x = self.x.reshape(BATCH, self.heads, LENGTH, LENGTH)
        for values in self.others:
            with_factor = {**values, **given, node: factor}
            without = {**values, **given, node: torch.ones(shape, dtype=torch.float64)}
            got = self.answer(self.x, with_factor)
            if not _same(got, self.answer((x * by_head).reshape(self.x.shape), without)):
                return False
            if _same(got, self.answer(self.x, without)):
                return False  # it multiplies nothing
        return True

    def slopes(self, given: Values) -> tuple[fx.Node, bool] | None:
        """Returns the node of learned slopes, None if there are none; refuses anything else that is learned."""
        sets = [{**values, **given} for values in (self.now, *self.others)]
        zero = torch.zeros_like(self.x)
        found = [-self.answer(zero, values)[0, :, 1, 0] for values in sets]
        learned = not all(_same(found[0], other) for other in found[1:])
        found = [s if learned else torch.zeros_like(s) for s in found]
        for batch, length in ((BATCH, LENGTH), (1, self._further())):
            x = self.random_scores(batch, length)
            distance = (torch.arange(length)[:, None] - torch.arange(length)).double()
            for scores in (torch.zeros_like(x), x):
                answers = [
                    self.answer(scores, values, batch, length) + slopes[:, None, None] * distance
                    for values, slopes in zip(sets, found, strict=True)
                ]
                for other in answers[1:]:
                    if not _same(answers[0], other):
                        raise LearnedConstant(self._reason(given))
        if not learned:
            return None
        probes = [Probe(self.captured, BATCH, LENGTH, values) for values in sets]
        for node in sorted(self.nodes):
            value = tensor_of(node)
            if value is None or not value.is_floating_point() or depends_on_data(node):
                continue
            if math.prod(self.probe.shape(node)) != self.heads:
                continue
            held = [probe(node).flatten().double() for probe in probes]
            for negated in (False, True):
                if all(_same(-h if negated else h, s) for h, s in zip(held, found, strict=True)):
                    return node, negated
        raise LearnedConstant(self._reason(given))

    def _further(self) -> int:
        return min(FURTHER, self.captured.max_positions or FURTHER)

    def _reason(self, given: Values) -> str:
        """Returns why the chain can't be rewritten; names the first parameter that alone changes it."""
        zero = torch.zeros_like(self.x)
        for leaf in self.leaves:
            values = {**self.now, **given}
            changed = {**values, leaf: self.others[0][leaf]}
            if all(_same(self.answer(x, values), self.answer(x, changed)) for x in (zero, self.x)):
                continue
            held = get_attr(self.captured.graph, str(leaf.target))
            if isinstance(held, torch.nn.Parameter):
                return (
                    f"its mask, position bias, scale or softcap is made of the parameter {leaf.target}, which other weights "
                    "would change (a learned bias); only a factor of the scores and one ALiBi slope a head can stay learned"
                )
            return (
                f"its mask, position bias, scale or softcap is made of the buffer {leaf.target}, which is in the state dict, so "
                "other weights would change it. If it follows from the configuration, register it with persistent=False"
            )
        return "its mask, position bias, scale or softcap is made of several parameters together (a learned bias)"


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two answers are the same; NaN is not."""
    if a.shape != b.shape or not torch.equal(a == -math.inf, b == -math.inf):
        return False
    a, b = a.nan_to_num(neginf=0.0, nan=math.nan), b.nan_to_num(neginf=0.0, nan=math.nan)
    size = max(1.0, float(a.abs().max())) if a.numel() else 1.0
    return bool(((a - b).abs() <= TOLERANCE * size).all())


def with_learned(slopes: Tensor | None, live: Live, heads: int) -> Tensor | None:
    """Returns the slopes of all heads (zeros if there are only learned ones), None if there are none."""
    if slopes is None:
        return torch.zeros(heads) if live.slopes is not None else None
    return slopes.expand(heads).clone()
