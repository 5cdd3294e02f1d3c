"""Finds what mixes tokens besides attention and can be carried as a state, and writes it as one op that later passes know.

A layer that convolves or scans has a region in the graph: from the ops that pad the sequence or look at other tokens to where
there is one entry a token again. What a region computes is found by evaluation, whatever ops it is made of:

- a **window**: zeros stand in front of the sequence, and what follows looks back as far as these (short convolutions, token
  shifts). The region stays, with `with_past` in the place of the padding.
- a **linear recurrence**: on random inputs of several lengths the region gives what `linear_scan` gives for one assignment of
  its inputs to queries, keys, values, decays and rates. `linear_scan` takes its place.

A `decayed_sum` is in the graph already where the model calls torch's associative_scan (`kvrewrite/capture/frontend.py`).

Regions that are neither stay as they are, and `check` refuses them with the reason that is noted here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._sympy.functions import Max, Min

from kvrewrite.capture.frontend import Captured
from kvrewrite.ir.fx import (
    ancestors,
    erase_dead,
    fake_value,
    get_attr,
    is_op,
    is_size,
    placeholder,
    shape_of,
    symbol,
    tensor_of,
)
from kvrewrite.kernels.recurrence.reference import linear_scan
from kvrewrite.passes.canonical.canonicalize import add_call, size_node
from kvrewrite.passes.canonical.check import CARRIED, PADS, data_nodes, mixes
from kvrewrite.passes.canonical.probe import Probe, ProbeError, depends_on_data, integers_in, only_shape, value_inputs

aten = torch.ops.aten
ops = torch.ops.kvrewrite
CONV1D = (aten.conv1d.default, aten.convolution.default)
TOLERANCE = 1e-9  # of the largest number; everything is evaluated in fp64
ROUNDED = 1e-6  # the same where the model has tables of powers of a rate, which it rounded to fp32
SHORT = 5  # tokens that assignments of roles are tried on
MOST_INPUTS = 6  # of a recurrence
LONGEST = 4096  # tokens that a region is evaluated on
FAR = 1 << 20  # tokens of a text that no table of a model is meant for


class NotCarried(Exception):
    """A region is no window, or no recurrence, and why."""


@dataclass
class Roles:
    """Which of a region's inputs is what in a linear recurrence, by their number; scale: of the result; skip: an input that is
    added to it times `gain`, the number of a constant; rate: the number of the constant that each head decays by, where no input
    says so."""

    q: int
    k: int
    v: int
    decay: int | None = None
    beta: int | None = None
    skip: int | None = None
    gain: int | None = None
    scale: float = 1.0
    rate: int | None = None


@dataclass
class Region:
    """A part of the graph that mixes tokens. nodes: in the graph's order, without the exits; inputs: data that it reads; exits:
    nodes with one entry a token that read it; shapes: other data, of which it reads the shape alone."""

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    exits: list[fx.Node]
    shapes: list[fx.Node]


@dataclass
class Padding:
    """What stands in front of the sequence: `count` zeros, put there by `node`. reader: what takes the sequence up for that.
    convolves: `node` is a convolution that pads. shifts: as many tokens are cut off at the end."""

    node: fx.Node
    count: int
    reader: fx.Node
    convolves: bool = False
    shifts: bool = False


def carry_state(captured: Captured) -> None:
    """Requires a canonical graph.

    Ensures: of every region that was understood, what carries its state is a `with_past` or `linear_scan` node, and all its nodes
    have "" under `CARRIED` in their meta; nodes of the others have the reason there.
    """
    gm = captured.graph
    if captured.unrolled:
        _settle_lengths(captured)
    for node in gm.graph.nodes:
        if is_op(node, ops.decayed_sum.default):
            node.meta[CARRIED] = ""
    known: dict[str, Roles] = {}
    regions = _regions(captured)
    for i, region in enumerate(regions):
        before = list(region.exits)
        try:
            reason = _rewrite(captured, region, known)
        except ProbeError as error:
            reason = str(error)
        for node in [*region.nodes, *region.exits]:
            node.meta[CARRIED] = reason
        replaced = dict(zip(before, region.exits))
        for later in regions[i + 1 :]:
            later.inputs = [replaced.get(n, n) for n in later.inputs]
            later.shapes = [replaced.get(n, n) for n in later.shapes]
    erase_dead(gm)
    if captured.unrolled and captured.max_positions is not None and _works_at(captured, FAR):
        captured.max_positions = None  # what was left of the loop over chunks
    gm.graph.lint()
    gm.recompile()


def _settle_lengths(captured: Captured) -> None:
    """Writes the length for sizes that are it: a loop over chunks ends where a chunk or the text does, and its results have the
    sum of all such differences as their length."""
    length, tokens = captured.length_symbol, captured.trace_length
    ids = placeholder(captured.graph, "input_ids")
    assert ids is not None

    def settled(size: Any) -> Any:
        expr = symbol(size)
        if getattr(expr, "free_symbols", None) != {length}:
            return size
        ends = {
            e: (min if isinstance(e, Min) else max)(e.args, key=lambda a: int(a.subs(length, tokens)))
            for e in expr.atoms(Min, Max)
        }
        return shape_of(ids)[1] if ends and expr.xreplace(ends) == length else size

    known = size_node(captured, 1)
    for node in list(captured.graph.graph.nodes):
        value = node.meta.get("val")
        if is_size(node) and settled(value) is not value:
            node.replace_all_uses_with(known)
        elif isinstance(value, Tensor) and hasattr(value, "fake_mode"):
            sizes = [settled(s) for s in value.shape]
            if any(a is not b for a, b in zip(sizes, value.shape)):
                with value.fake_mode:
                    node.meta["val"] = value.new_empty(sizes)


def _works_at(captured: Captured, length: int) -> bool:
    """Whether all shapes of the graph fit for a text of `length` tokens, wherever parameters lie."""
    values: dict[fx.Node, Any] = {}
    ids = placeholder(captured.graph, "input_ids")
    assert ids is not None
    device = ids.meta["val"].device
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for node in captured.graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = torch.zeros(2, length, dtype=torch.long, device=device)
            elif node.op == "get_attr":
                value = get_attr(captured.graph, str(node.target))
                values[node] = mode.from_tensor(value).to(device) if isinstance(value, Tensor) else value
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
                try:
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                except (RuntimeError, ValueError, IndexError):
                    return False
    return True


def _rewrite(captured: Captured, region: Region, known: dict[str, Roles]) -> str:
    """Rewrites one region; "" or why it could not be."""
    if any(layout_of(captured, n) is None for n in [*region.inputs, *region.exits]):
        return "the batch or the sequence is no axis of its own in what goes in or comes out"
    try:
        _Window(captured, region).rewrite()
        return ""
    except NotCarried as error:
        reason = f"it is no short convolution or token shift: {error}"
    try:
        if len(region.exits) != 1:
            raise NotCarried(f"{len(region.exits)} results have one entry a token, expected one")
        _Recurrence(captured, region, known).rewrite()
        return ""
    except NotCarried as error:
        return f"{reason}; and no linear attention or scan: {error}"


# ------------------------------------------------------------------------------------------------ regions
def _regions(captured: Captured) -> list[Region]:
    """All regions in the graph's order."""
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


def _probe(captured: Captured, region: Region, batch: int, length: int, seed: int = 0) -> Probe:
    """A probe that does not compute what the region knows the shape of alone."""
    probe = Probe(captured, batch, length, seed=seed)
    probe.values.update({node: torch.zeros(probe.shape(node), dtype=torch.float64) for node in region.shapes})
    return probe


def _grow(seed: fx.Node, data: set[fx.Node], length: Any) -> tuple[set[fx.Node], set[fx.Node]]:
    """The region around one op that mixes tokens, and its exits (which may be members: an op may look back and give one entry a
    token at once)."""
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
        # What is no token's own comes from the same region.
        todo += [i for i in node.all_input_nodes if i in data and not is_size(i) and not _one_a_token(i, length)]
    return members, exits


def _one_a_token(node: fx.Node, length: Any) -> bool:
    """Whether a node has one entry for each token, or is several such tensors."""
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
    """The order of dims that makes a tensor (batch, sequence, ...), or None."""
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


def _close(got: Any, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    if not isinstance(got, Tensor) or got.shape != expected.shape or not bool(torch.isfinite(expected).all()):
        return False
    return float((got - expected).abs().max()) <= tolerance * max(1e-6, float(expected.abs().max()))


# ------------------------------------------------------------------------------------------------ windows
class _Window:
    """A region that looks back as far as the zeros that it puts in front of the sequence."""

    def __init__(self, captured: Captured, region: Region):
        self.captured, self.region = captured, region
        self.body = [*region.nodes, *region.exits]

    def rewrite(self) -> None:
        """Puts `with_past` in; NotCarried, with the graph as it was, where the region is something else."""
        if len(self.region.inputs) != 1:
            raise NotCarried(f"it reads {len(self.region.inputs)} tensors with the sequence, expected one")
        x = self.region.inputs[0]
        layout = layout_of(self.captured, x)
        assert layout is not None
        if layout[0] != 0:
            raise NotCarried("the batch is not its first axis")
        found = [pad for node in self.body if (pad := self._padding(node, x, layout[1])) is not None]
        needed = value_inputs(self.region.exits)  # x[:, :1] may be there for the shape of the zeros alone
        readers = [n for n in self.body if x in n.all_input_nodes and n in needed and not only_shape(n)]
        if len(found) != 1 or readers != [found[0].reader]:
            many = "several ops put" if found else "none puts"
            raise NotCarried(f"of its ops {many} zeros before the sequence for all others to read")
        pad, node, count = found[0], found[0].node, found[0].count
        limit = self.captured.max_positions or LONGEST
        length = min(2 * count + 5, limit)
        if length <= count:
            raise NotCarried(f"it looks back {count} tokens, more than the model has positions")
        before = _probe(self.captured, self.region, 2, length)
        given = before.random(x)
        before.values[x] = given
        expected = {out: before(out) for out in self.region.exits}
        # What follows is evaluated on the padded sequence, whole and from any token on, as it will run.
        graph = self.captured.graph.graph
        with graph.inserting_before(node):
            past = add_call(self.captured.graph, ops.with_past.default, x, count, layout[1])
            taken = past
            if pad.shifts:
                taken = add_call(self.captured.graph, aten.slice.Tensor, past, layout[1], 0, -count)
        for new in {past, taken}:
            new.meta.update(nn_module_stack=node.meta.get("nn_module_stack"), **{CARRIED: ""})
        undo = node.args
        if pad.convolves:
            node.args = (past, *node.args[1:4], [0], *node.args[5:])
            self._refresh()
        padded = torch.cat([given.new_zeros(given.shape).narrow(layout[1], 0, count), given], layout[1])
        try:
            for start in (0, 1, count, length - 1):
                probe = _probe(self.captured, self.region, 2, length - start)
                probe.values.update({n: v for n, v in before.values.items() if n.op == "get_attr"})
                window = padded.narrow(layout[1], start, count + length - start)
                probe.values[past] = window
                if not pad.convolves:
                    probe.values[node] = probe(taken)
                for out, whole in expected.items():
                    order = layout_of(self.captured, out)
                    if order is None or not _close(probe(out), whole.narrow(order[1], start, length - start)):
                        raise NotCarried(f"its results depend on more than the {count} tokens before")
        except (NotCarried, ProbeError) as error:
            node.args = undo
            for new in [past] if taken is past else [taken, past]:
                graph.erase_node(new)
            self._refresh()
            raise NotCarried(str(error)) from error
        if not pad.convolves:
            node.replace_all_uses_with(taken)
            self.region.exits[:] = [taken if out is node else out for out in self.region.exits]
        self.region.nodes += [past] if taken in self.region.exits else [past, taken]

    def _padding(self, node: fx.Node, x: fx.Node, dim: int) -> Padding | None:
        """The zeros that `node` puts in front of the sequence x, if it does."""
        rank = len(shape_of(x))
        if is_op(node, *CONV1D) and node.args[0] is x:
            stride, padding, dilation = (
                _single(node.args[i] if len(node.args) > i else d) for i, d in ((3, 1), (4, 0), (5, 1))
            )
            flipped = is_op(node, aten.convolution.default) and node.args[6]
            weight = tensor_of(node.args[1])
            if stride != 1 or not padding or flipped or weight is None or rank != 3:
                return None
            if padding != (int(weight.shape[2]) - 1) * dilation:
                return None
            return Padding(node, padding, node, convolves=True)
        if is_op(node, *PADS) and node.args[0] is x:
            widths: Any = node.args[1]
            mode = node.args[2] if len(node.args) > 2 else "constant"
            value = node.args[3] if is_op(node, aten.pad.default) and len(node.args) > 3 else mode
            at = 2 * (rank - 1 - dim)
            other = [w for i, w in enumerate(widths) if i != at]
            zero = value in (None, 0, 0.0, "constant")
            left = widths[at] if at < len(widths) else 0
            return Padding(node, left, node) if isinstance(left, int) and left > 0 and not any(other) and zero else None
        if is_op(node, aten.cat.default):
            parts: Any = node.args[0]
            at = node.args[1] if len(node.args) > 1 else 0  # type: ignore[assignment]
            if len(parts) != 2 or at % rank != dim:
                return None
            zeros, count = parts[0], shape_of(parts[0])[dim]
            if not isinstance(count, int) or any(n in self.region.inputs for n in value_inputs([zeros])):
                return None
            shifts = parts[1] is not x
            if shifts and not self._cuts(parts[1], x, dim, count):
                return None
            probe = _probe(self.captured, self.region, 2, count + 3)
            probe.values[x] = probe.random(x)
            if depends_on_data(zeros) or bool(probe(zeros).any()):
                return None
            return Padding(node, count, parts[1] if shifts else node, shifts=shifts)
        return None

    @staticmethod
    def _cuts(node: fx.Node, x: fx.Node, dim: int, count: int) -> bool:
        """Whether `node` is x without its last `count` tokens."""
        if not is_op(node, aten.slice.Tensor) or node.args[0] is not x:
            return False
        at, start, end, step = (
            node.args[i] if len(node.args) > i else d for i, d in ((1, 0), (2, None), (3, None), (4, 1))
        )
        return bool(at == dim and start in (None, 0) and end == -count and step == 1)

    def _refresh(self) -> None:
        """Shapes of the region's nodes after a change."""
        for node in self.body:
            node.meta["val"] = fake_value(node)


def _single(value: Any) -> int:
    """An argument that is a number or a list of one."""
    return int(value[0]) if isinstance(value, (list, tuple)) else int(value)


# ------------------------------------------------------------------------------------------------ recurrences
class _Recurrence:
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
        # What heads may decay by: one number a head, as exp(-|rate| distance) or as rate ** distance.
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
        """Puts `linear_scan` in; NotCarried where the region is something else."""
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
        """The region as text: equal where the same is computed from other weights."""
        number = {n: f"%{i}" for i, n in enumerate([*self.region.inputs, *self.all])}
        lines = [f"{number[n]} {self.rests[i]} {self.layouts[i]}" for i, n in enumerate(self.region.inputs)]
        for node in self.all:
            what = f"{tuple(node.meta['val'].shape)}" if node.op == "get_attr" else f"{node.target}"
            arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: number.get(n, str(n.meta.get("val"))))
            lines.append(f"{number[node]} {what} {arguments}")
        return "\n".join(lines)

    # -- recognition
    def _find(self) -> Roles:
        """The roles with which a linear recurrence gives what the region gives."""
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
            # No weight may be in the scale. (Tables of powers of a rate go with the rate: they are left alone without a scale.)
            changed = self.weights if complete.scale != 1.0 else [n for n in self.weights if self._is_learned(n)]
            if changed:
                again = self._evaluated(lengths[0], 1, complete, changed)
                if self._agrees(complete, *again, at_gain=True) is None:
                    raise NotCarried("a weight is a factor of its results")
            return complete
        shapes = ", ".join(f"(batch, tokens, {', '.join(map(str, r))})" for r in self.rests)
        raise NotCarried(f"what it gives is none that queries, keys, values and decays among {shapes} would give")

    def _several_chunks(self) -> int:
        """A length at which whatever the region is cut into is there more than twice."""
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
        """The region on random inputs: they, as (batch, tokens, ...), and its results. changed: weights with other values."""
        probe = _probe(self.captured, self.region, batch, length, seed=length)
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
        """Roles that fit the shapes, each input once."""
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
        """The roles, with the gain of `skip`, where the recurrence with them gives the region's results; else None."""
        q, k, v = given[roles.q], given[roles.k], given[roles.v]
        decay = q.new_zeros(q.shape[:3]) if roles.decay is None else given[roles.decay]
        if roles.rate is not None:
            node, power = self.rates[roles.rate]
            rate = probe(node).reshape(-1).abs()
            decay = decay + (rate.log() if power else -rate)
        beta = None if roles.beta is None else given[roles.beta]
        out, _ = linear_scan(q, k, v, decay, beta, q.new_zeros(q.shape[0], *q.shape[2:], v.shape[3]))
        if roles.skip is None:
            if not at_gain:
                scale = float((out * expected).sum() / (out * out).sum())
                roles = roles if abs(scale - 1) < TOLERANCE else replace(roles, scale=scale)
            tolerance = TOLERANCE if roles.rate is None else ROUNDED
            return roles if _close(out * roles.scale, expected, tolerance) else None
        gains = [roles.gain] if at_gain else range(len(self.constants))
        for i in gains:
            assert i is not None
            shape = self._gain_shape(self.constants[i])
            if shape is not None:
                more = given[roles.skip] * probe(self.constants[i]).reshape(shape)
                if _close(out + more, expected):
                    return Roles(roles.q, roles.k, roles.v, roles.decay, roles.beta, roles.skip, i)
        return None

    def _gain_shape(self, node: fx.Node) -> list[int] | None:
        """How a constant goes with (..., heads, channels), if it is floating and has one number for each or for each head."""
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
        """An input as (batch, tokens, ...)."""
        node, order = self.region.inputs[i], self.layouts[i]
        return node if order == sorted(order) else add_call(self.captured.graph, aten.permute.default, node, order)
