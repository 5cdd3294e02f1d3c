"""Decides what is cut: which products by columns, which tables of embeddings by rows, which attributes of the graph.

Starts with every product cut by columns and follows what they give through the graph. Where an op needs the whole
tensor, the products that it came from are cut in another way, or not at all; what reaches only the graph's result
(logits) is put together there. What is left is what sharding saves: queries, keys and values into attention, gates into
the next product, the last product into the logits. Nothing is decided by names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import arg, dependents, get_attr, mutates
from kvrewrite.ir.layout import CacheLayout
from kvrewrite.ir.projections import is_weight_op
from kvrewrite.passes.shard.linears import Product, multiply, weight_of
from kvrewrite.passes.shard.placement import LOCAL, Placement, Split, Want, attribute_of, mapped
from kvrewrite.passes.shard.rules import Answer, Call, answer

aten = torch.ops.aten
ops = torch.ops.kvrewrite
# Sizes that stand for those that a call decides: different primes, so that no two dimensions are taken for each other.
_SIZES = {"B": 3, "T": 11, "L": 5, "R": 4099, "S": 8209, "Z": 2053, "P": 17, "W": 13, "X": 13, "O": 29}
LEAST = 8  # channels: a smaller block is not worth the ranks' conversation
_HEADS_OF_STATES = {"k_tail": 1, "v_tail": 1, "qlens": 1}  # what a quantized cache has of each head
_RESHAPES = (aten.view.default, aten.reshape.default, aten.clone.default, aten.alias.default, aten._to_copy.default)


@dataclass
class Plan:
    """What `write.py` carries out.

    order: the graph's nodes; answers, places: what each does, and how it lies; attributes: those that are cut, by name;
    tables: look-ups in a table of which a rank has some rows; columns: products that are cut by columns.
    """

    order: list[fx.Node]
    answers: dict[fx.Node, Answer]
    places: dict[fx.Node, Placement]
    shapes: dict[fx.Node, Any]
    attributes: dict[str, Split]
    tables: dict[fx.Node, int]
    columns: dict[fx.Node, tuple[int, ...]]
    products: dict[fx.Node, Product]
    gathered: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)


def make_plan(gm: fx.GraphModule, layout: CacheLayout, cut: set[int], kept: set[str], ranks: int) -> Plan:
    """cut: the cache classes whose heads are dealt out. kept: attributes that must stay whole."""
    shapes = whole_shapes(gm, layout)
    products = {n: p for n in gm.graph.nodes if (p := weight_of(n, shapes)) is not None}
    options = {n: _options(n, p, shapes, ranks) for n, p in products.items()}
    tables = _tables(gm, shapes, ranks)
    final = {n for n in products if not _feeds_more(n, set(products))}
    plan = Plan(list(gm.graph.nodes), {}, {}, shapes, {}, tables, {}, products)
    while True:
        plan.columns = {n: o[0] for n, o in options.items() if o}
        sources = _follow(gm, layout, plan, cut, ranks)
        wrong: set[fx.Node] = set()
        for _, node in plan.gathered:
            found = sources.get(node, frozenset())
            wrong |= set() if found <= final else found
        if not wrong:
            break
        for node in wrong:
            options[node] = options[node][1:]
    _cut_attributes(gm, plan, kept)
    _follow(gm, layout, plan, cut, ranks)
    return plan


def whole_shapes(gm: fx.GraphModule, layout: CacheLayout) -> dict[fx.Node, Any]:
    """The shape of every node's tensor in one process, for made-up sizes; of several results, a list of them."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    values: dict[fx.Node, Any] = {}
    specs = {spec.name: spec for spec in layout.inputs}

    def size(letter: int | str) -> int:
        return letter if isinstance(letter, int) else _SIZES[letter[0]]

    for node in gm.graph.nodes:
        if node.op == "placeholder":
            spec = specs[str(node.target)]
            with mode:
                values[node] = torch.empty([size(n) for n in spec.shape], dtype=spec.dtype)
        elif node.op == "get_attr":
            real = get_attr(gm, str(node.target))
            with mode:
                values[node] = torch.empty(real.shape, dtype=real.dtype)
        elif node.op == "call_function":
            args, kwargs = (mapped(a, lambda a: _argument(a, values)) for a in (node.args, dict(node.kwargs)))
            try:
                with mode, enable_python_dispatcher():
                    values[node] = node.target(*args, **kwargs)
            except Exception as error:
                raise UnsupportedModelError(
                    f"tensor parallelism: the shape of {node.name} ({node.target}) can't be computed: {error}"
                ) from error
    return {n: _shape(v) for n, v in values.items()}


def _argument(value: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return values[value]
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(n if type(n) is int else None for n in value.shape)
    return [_shape(v) for v in value] if isinstance(value, (list, tuple)) else None


def _options(node: fx.Node, product: Product, shapes: dict[fx.Node, Any], ranks: int) -> list[tuple[int, ...]]:
    """Ways to cut a product by columns, the likeliest first: as what reads it takes it apart, and as a whole."""
    width = shapes[node][-1]
    found = []
    borders = _borders(node, shapes, width)
    if borders:
        found.append(tuple(b - a for a, b in zip([0, *borders], [*borders, width])))
    found.append((width,))
    for user in node.users:
        if user.target in _RESHAPES and shapes.get(user) is not None:
            lead = [n for n in shapes[user][len(shapes[node]) - 1 :] if n is not None and n > 1]
            if lead and width % lead[0] == 0:
                found.append((width // lead[0],) * lead[0])
    return [o for o in dict.fromkeys(found) if Split(0, o).fits(ranks) and min(o) >= LEAST * ranks]


def _borders(node: fx.Node, shapes: dict[fx.Node, Any], width: int) -> list[int]:
    """Where readers of a tensor cut its last dimension."""
    found: set[int] = set()
    for user in node.users:
        last = len(shapes[node]) - 1
        if user.target in _RESHAPES and shapes.get(user) is not None and shapes[user][-1] == width:
            found |= set(_borders(user, shapes, width))
        elif user.target is aten.slice.Tensor:
            dim, start, end = (arg(user, name) for name in ("dim", "start", "end"))
            if dim % (last + 1) == last:
                found |= {n % width for n in (start or 0, end) if type(n) is int and abs(n) < width}
        elif isinstance(shapes.get(user), list):
            at = 0
            for piece in shapes[user]:
                if piece is not None and len(piece) == last + 1 and piece[:-1] == shapes[node][:-1]:
                    at += piece[-1]
                    found.add(at)
    return sorted(found - {0, width})


def _feeds_more(node: fx.Node, products: set[fx.Node]) -> bool:
    """Whether what a product gives goes into another one, or into attention."""
    after = dependents([node]) - {node}
    return any(n in products or is_weight_op(n) or n.target is ops.cached_attention.default for n in after)


def _tables(gm: fx.GraphModule, shapes: dict[fx.Node, Any], ranks: int) -> dict[fx.Node, int]:
    """Look-ups of token ids: the rows of their tables. Other tables (positions) are small."""
    found = {}
    for node in gm.graph.nodes:
        if node.target is not aten.embedding.default:
            continue
        ids = node.args[1]
        while ids.target in _RESHAPES:
            ids = ids.args[0]
        if node.args[0].op == "get_attr" and ids.op == "placeholder" and ids.target == "input_ids":
            rows = shapes[node.args[0]][0]
            if rows % ranks == 0:
                found[node] = rows
    return found


def _inputs(gm: fx.GraphModule, layout: CacheLayout, cut: set[int]) -> dict[fx.Node, Placement]:
    """How the graph's inputs lie."""
    specs = {spec.name: spec for spec in layout.inputs}
    quantized = {s.input for s in layout.states if s.name.rpartition("_")[0] in _HEADS_OF_STATES}
    found: dict[fx.Node, Placement] = {}
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        spec = specs[str(node.target)]
        if spec.cls in cut:
            heads = spec.part in ("table", "lens", "keep", "next_table")
            found[node] = Split(2, (layout.classes[spec.cls].kv_heads,)) if heads else None
            if spec.kind == "pool" or spec.part == "spare":
                found[node] = LOCAL
        elif spec.name in quantized:
            owner = int(spec.name.rpartition("_")[2])
            cls = next(c for c, k in enumerate(layout.classes) if owner in k.layers)
            found[node] = Split(1, (int(spec.shape[1]),)) if cls in cut else None
    return found


def _follow(
    gm: fx.GraphModule, layout: CacheLayout, plan: Plan, cut: set[int], ranks: int
) -> dict[fx.Node, frozenset[fx.Node]]:
    """Fills in how everything lies; returns the products that each node's split comes from."""
    places: dict[fx.Node, Placement] = dict(_inputs(gm, layout, cut))
    plan.answers, plan.places, plan.gathered = {}, places, []
    sources: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            places[node] = plan.attributes.get(str(node.target))
        if node.op not in ("call_function", "output"):
            continue
        call = Call(node, ranks, places, plan.shapes)
        found: Answer | None = None
        if node in plan.products:
            found = multiply(call, plan.products[node], plan.columns.get(node))
        elif node in plan.tables:
            found = _look_up(call, plan.tables[node])
        elif node.op == "output":
            found = call.whole()
        found = found or answer(call)
        plan.answers[node], places[node] = found, found.out
        wants = wants_of(found)
        _check(node, wants, places)
        for want in wants:
            if isinstance(places.get(want.node), (Split, tuple)) and want.split != places[want.node]:
                plan.gathered.append((node, want.node))
        own = frozenset({node} if node in plan.products and isinstance(found.out, Split) and not found.reduce else ())
        if not found.inherent:
            own = own.union(*(sources.get(w.node, frozenset()) for w in wants if isinstance(w.split, (Split, tuple))))
        sources[node] = own if isinstance(found.out, (Split, tuple)) else frozenset()
    return sources


def wants_of(found: Answer) -> list[Want]:
    """All arguments of a call that are nodes."""
    wants: list[Want] = []
    mapped([found.args, found.kwargs, found.bias], lambda v: wants.append(v) if isinstance(v, Want) else None)
    return wants


def _check(node: fx.Node, wants: list[Want], places: dict[fx.Node, Placement]) -> None:
    """What is a rank's own, or written to, must be taken as it lies."""
    written = set()
    if mutates(node):
        target: Any = node.target
        schema = target._schema.arguments
        written = {a for a, s in zip(node.args, schema) if s.alias_info is not None and s.alias_info.is_write}
    for want in wants:
        have = places.get(want.node)
        if have != want.split and (have == LOCAL or want.node in written):
            raise UnsupportedModelError(
                f"tensor parallelism: {node.name} ({node.target}) reads {want.node.name} for all heads together, which each "
                "process has for its own heads only; use this policy in one process"
            )


def _look_up(call: Call, rows: int) -> Answer:
    """A table of which each rank has some rows: the others' tokens give zero, and the sum is the whole."""
    weight = call.node.args[0]
    return call.answer(lambda n: Split(0, (rows,)) if n is weight else None, None, reduce=True)


def _cut_attributes(gm: fx.GraphModule, plan: Plan, kept: set[str]) -> None:
    """Attributes of which every reader takes the same blocks are cut for good."""
    groups: dict[int, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            groups.setdefault(id(get_attr(gm, str(node.target))), []).append(node)
    for nodes in groups.values():
        wanted = {split for node in nodes for split in _uses(node, node, plan)}
        names = {str(n.target) for n in nodes}
        if len(wanted) == 1 and not names & kept and isinstance(split := wanted.pop(), Split):
            plan.attributes |= dict.fromkeys(names, split)


def _uses(attribute: fx.Node, node: fx.Node, plan: Plan) -> list[Split | None]:
    """How readers of an attribute want it, those of its transposes and casts included."""
    found: list[Split | None] = []
    for user in node.users:
        if user not in plan.answers:
            continue
        for want in wants_of(plan.answers[user]):
            if want.node is not node:
                continue
            if isinstance(want.split, Split):
                seen = attribute_of(node, want.split, lambda n: len(plan.shapes[n]))
                found.append(seen[1] if seen is not None else None)
            elif attribute_of(user, Split(0, (1,)), lambda n: len(plan.shapes[n])) is not None:
                found += _uses(attribute, user, plan)
            else:
                found.append(None)
    return found
