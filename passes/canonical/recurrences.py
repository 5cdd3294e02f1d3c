"""Finds linear recurrences: the assignment of a region's inputs for which `linear_scan` gives the region's result."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import ancestors, get_attr, is_size, shape_of, symbol, tensor_of
from kvrewrite.kernels.recurrence.reference import linear_scan
from kvrewrite.passes.canonical.canonicalize import add_call
from kvrewrite.passes.canonical.check import CARRIED, data_nodes
from kvrewrite.passes.canonical.probe import Probe, depends_on_data, integers_in
from kvrewrite.passes.canonical.regions import LONGEST, TOLERANCE, NotCarried, Region, close, layout_of, probe_region

aten = torch.ops.aten
ops = torch.ops.kvrewrite
ROUNDED = 1e-6  # the same if the model has tables of powers of a rate that are rounded to fp32
SHORT = 5  # tokens on which assignments of roles are tried
MOST_INPUTS = 6  # most inputs of a recurrence
FAR = 1 << 20  # tokens; no model's table is meant for so long a text


@dataclass
class Roles:
    """The role of each of a region's inputs in a linear recurrence, by index; scale: of the result; skip: an input that
    is added to it times `gain`, the index of a constant; rate: the index of the constant that each head decays by, if
    no input says so."""

    q: int
    k: int
    v: int
    decay: int | None = None
    beta: int | None = None
    skip: int | None = None
    gain: int | None = None
    scale: float = 1.0
    rate: int | None = None


class Recurrence:
    """A region that computes a linear recurrence of its inputs, with heads as an axis of their own."""

    def __init__(self, captured: Captured, region: Region, known: dict[str, Roles]):
        self.captured, self.region, self.known, self.exit = captured, region, known, region.exits[0]
        body = [*region.nodes, *region.exits]
        data = data_nodes(captured.graph)
        self.layouts = [layout_of(captured, n) or [] for n in region.inputs]
        self.rests = [self._rest(n, order) for n, order in zip(region.inputs, self.layouts)]
        self.out = layout_of(captured, self.exit) or []
        self.heads = self._rest(self.exit, self.out)
        constants = dict.fromkeys(i for n in body for i in n.all_input_nodes if i not in data and not is_size(i))
        self.constants = [n for n in constants if tensor_of(n) is not None]
        place = {node: i for i, node in enumerate(captured.graph.graph.nodes)}
        behind = ancestors(self.constants)
        self.all = sorted({*body, *behind}, key=place.__getitem__)
        self.weights = [
            n for n in self.all if n.op == "get_attr" and (x := tensor_of(n)) is not None and x.is_floating_point()
        ]
        # Constants that heads may decay by: one number per head, as exp(-|rate| distance) or as rate ** distance.
        a_head = [n for n in self.all if self._is_a_head(n) and not depends_on_data(n)]
        self.rates = [(n, power) for power in (False, True) for n in a_head]

    def _is_a_head(self, node: fx.Node) -> bool:
        value = tensor_of(node)
        if value is None or not value.is_floating_point() or not self.heads:
            return False
        return all(isinstance(s, int) for s in value.shape) and value.numel() == self.heads[0]

    @staticmethod
    def _rest(node: fx.Node, order: list[int]) -> tuple[int, ...]:
        return tuple(int(shape_of(node)[i]) for i in order[2:])

    def rewrite(self) -> None:
        """Inserts `linear_scan`; raises NotCarried if the region is something else."""
        if len(self.heads) != 2:
            raise NotCarried(
                f"its results have {len(self.heads)} axes besides batch and sequence, expected heads and channels"
            )
        if len(self.region.inputs) > MOST_INPUTS:
            raise NotCarried(f"it has {len(self.region.inputs)} inputs")
        text = self._text()
        if text not in self.known:
            self.known[text] = self._find()
        self._replace(self.known[text])

    def _text(self) -> str:
        """Returns the region as text: equal if another region computes the same from other weights."""
        number = {n: f"%{i}" for i, n in enumerate([*self.region.inputs, *self.all])}
        lines = [f"{number[n]} {self.rests[i]} {self.layouts[i]}" for i, n in enumerate(self.region.inputs)]
        for node in self.all:
            what = f"{tuple(node.meta['val'].shape)}" if node.op == "get_attr" else f"{node.target}"
            arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: number.get(n, str(n.meta.get("val"))))
            lines.append(f"{number[node]} {what} {arguments}")
        return "\n".join(lines)

    # -- recognition
    def _find(self) -> Roles:
        """Finds the roles for which a linear recurrence gives the region's result."""
        lengths = [SHORT, self._several_chunks()]
        if self.captured.unrolled:  # it holds for as many chunks as the trace had
            lengths = [self.captured.trace_length, self.captured.trace_length - 2]
        short = self._evaluated(lengths[0], 2, None)
        for roles in self._assignments():
            complete = self._agrees(roles, *short)
            if complete is None:
                continue
            for length in lengths:
                again = self._evaluated(length, 1, complete)
                if self._agrees(complete, *again, at_gain=True) is None:
                    raise NotCarried(f"it is one on {lengths[0]} tokens, but not on {length}")
            # The scale must not depend on a weight. (Tables of powers of a rate belong to the rate; without a scale
            # they stay.)
            changed = self.weights if complete.scale != 1.0 else [n for n in self.weights if self._is_learned(n)]
            if changed:
                again = self._evaluated(lengths[0], 1, complete, changed)
                if self._agrees(complete, *again, at_gain=True) is None:
                    raise NotCarried("a weight is a factor of its results")
            return complete
        shapes = ", ".join(f"(batch, tokens, {', '.join(map(str, r))})" for r in self.rests)
        raise NotCarried(f"what it gives is none that queries, keys, values and decays among {shapes} would give")

    def _several_chunks(self) -> int:
        """Returns a length that has more than two of whatever the region cuts the sequence into."""
        sizes = {1}
        for node in self.region.nodes:
            value = tensor_of(node)
            for size in value.shape if value is not None else ():
                expr = symbol(size)
                if self.captured.length_symbol in getattr(expr, "free_symbols", ()):
                    sizes |= {int(number) for number in expr.atoms() if getattr(number, "is_Integer", False)}
        if max(sizes) <= 2:
            sizes |= {n for n in integers_in(self.captured, self.all) if n <= 512}
        return min(2 * max(sizes) + 3, LONGEST, self.captured.max_positions or LONGEST)

    def _evaluated(
        self, length: int, batch: int, roles: Roles | None, changed: Iterable[fx.Node] = ()
    ) -> tuple[Probe, list[Tensor], Tensor]:
        """Runs the region on random inputs; returns these, as (batch, tokens, ...), and its results. changed: uses
        other weights."""
        probe = probe_region(self.captured, self.region, batch, length, seed=length)
        probe.values.update({n: 0.9 * x if bool((x := probe(n)).any()) else x + 0.1 for n in changed})
        given = []
        for i, (node, order) in enumerate(zip(self.region.inputs, self.layouts)):
            x = probe.random(node)
            if len(order) == 3 or (roles is not None and i == roles.decay):
                x = -0.3 * x.abs()  # decays must not grow
            elif roles is not None and i == roles.k:
                x = x / x.norm(dim=-1, keepdim=True)
            probe.values[node] = x
            given.append(x.permute(order))
        return probe, given, probe(self.exit).permute(self.out)

    def _is_learned(self, node: fx.Node) -> bool:
        held = get_attr(self.captured.graph, str(node.target))
        return isinstance(held, torch.nn.Parameter) or held.numel() == 1

    def _assignments(self) -> Iterator[Roles]:
        """Yields roles that fit the shapes; each input has one role."""
        heads, channels = self.heads
        wide = [i for i, rest in enumerate(self.rests) if len(rest) == 2 and rest[0] == heads]
        narrow = [i for i, rest in enumerate(self.rests) if rest == (heads,)]
        if len(wide) + len(narrow) != len(self.rests) or not 3 <= len(wide) <= 4 or len(narrow) > 2:
            return
        for q, k, v, *other in itertools.permutations(wide):
            if self.rests[q] != self.rests[k] or self.rests[v] != (heads, channels):
                continue
            for few in itertools.permutations(narrow):
                if not other:
                    yield Roles(q, k, v, *few)
                    if not few:
                        yield from (Roles(q, k, v, rate=i) for i in range(len(self.rates)))
                    if len(few) == 1:
                        yield Roles(q, k, v, None, few[0])
                    continue
                if self.rests[other[0]] == (heads, channels):
                    yield Roles(q, k, v, *few, skip=other[0])  # type: ignore[arg-type, misc]
                    if len(few) == 1:
                        yield Roles(q, k, v, None, few[0], other[0])
                if self.rests[other[0]] == self.rests[k] and len(few) < 2:
                    yield Roles(q, k, v, other[0], *few)

    def _agrees(
        self, roles: Roles, probe: Probe, given: list[Tensor], expected: Tensor, at_gain: bool = False
    ) -> Roles | None:
        """Returns the roles, with the gain of `skip`, if their recurrence gives the region's results; else None."""
        q, k, v = given[roles.q], given[roles.k], given[roles.v]
        decay = q.new_zeros(q.shape[:3]) if roles.decay is None else given[roles.decay]
        if roles.rate is not None:
            node, power = self.rates[roles.rate]
            rate = probe(node).reshape(-1).abs()
            decay = decay + (rate.log() if power else -rate)
        beta = None if roles.beta is None else given[roles.beta]
        out, _ = linear_scan(q, k, v, decay, beta, q.new_zeros(q.shape[0], *q.shape[2:], v.shape[3]))
        if roles.skip is None:
            tolerance = TOLERANCE if roles.rate is None else ROUNDED
            if not at_gain:
                # A scale within the tolerance is rounding, which differs from processor to processor, and none of the model's.
                scale = float((out * expected).sum() / (out * out).sum())
                roles = roles if abs(scale - 1) < tolerance else replace(roles, scale=scale)
            return roles if close(out * roles.scale, expected, tolerance) else None
        gains = [roles.gain] if at_gain else range(len(self.constants))
        for i in gains:
            assert i is not None
            shape = self._gain_shape(self.constants[i])
            if shape is not None:
                more = given[roles.skip] * probe(self.constants[i]).reshape(shape)
                if close(out + more, expected):
                    return Roles(roles.q, roles.k, roles.v, roles.decay, roles.beta, roles.skip, i)
        return None

    def _gain_shape(self, node: fx.Node) -> list[int] | None:
        """Returns how a floating constant with one number per channel or head broadcasts to (..., heads, channels)."""
        value = tensor_of(node)
        heads, channels = self.heads
        if value is None or not value.is_floating_point() or any(not isinstance(s, int) for s in value.shape):
            return None
        return {heads: [heads, 1], heads * channels: [heads, channels]}.get(value.numel())

    # -- rewriting
    def _replace(self, roles: Roles) -> None:
        gm, exit = self.captured.graph, self.exit
        before = set(gm.graph.nodes)
        with gm.graph.inserting_before(exit):
            q, k, v = (self._ordered(i) for i in (roles.q, roles.k, roles.v))
            if roles.decay is not None:
                decay = self._ordered(roles.decay)
            else:
                decay = add_call(gm, aten.zeros_like.default, add_call(gm, aten.select.int, q, 3, 0))
            if roles.rate is not None:
                node, power = self.rates[roles.rate]
                rate = add_call(gm, aten.abs.default, add_call(gm, aten.reshape.default, node, [self.heads[0]]))
                rate = add_call(gm, aten.log.default if power else aten.neg.default, rate)
                decay = add_call(gm, aten.add.Tensor, decay, rate)
            beta = None if roles.beta is None else self._ordered(roles.beta)
            result = add_call(gm, ops.linear_scan.default, q, k, v, decay, beta)
            if roles.scale != 1.0:
                result = add_call(gm, aten.mul.Scalar, result, roles.scale)
            if roles.skip is not None:
                assert roles.gain is not None
                gain = self.constants[roles.gain]
                gain = add_call(gm, aten.reshape.default, gain, self._gain_shape(gain))
                more = add_call(gm, aten.mul.Tensor, self._ordered(roles.skip), gain)
                result = add_call(gm, aten.add.Tensor, result, more)
            wanted, got = tensor_of(exit), tensor_of(result)
            assert wanted is not None and got is not None
            if wanted.dtype != got.dtype:
                result = add_call(gm, aten._to_copy.default, result, dtype=wanted.dtype)
            if self.out != [0, 1, 2, 3]:
                result = add_call(gm, aten.permute.default, result, [self.out.index(i) for i in range(4)])
        for node in gm.graph.nodes:
            if node not in before:
                node.meta.update(nn_module_stack=exit.meta.get("nn_module_stack"), **{CARRIED: ""})
        exit.replace_all_uses_with(result)
        self.region.exits[0] = result

    def _ordered(self, i: int) -> fx.Node:
        """Returns an input as (batch, tokens, ...)."""
        node, order = self.region.inputs[i], self.layouts[i]
        return node if order == sorted(order) else add_call(self.captured.graph, aten.permute.default, node, order)
