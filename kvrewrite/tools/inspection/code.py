"""The graph around every attention site, before and after: its nodes, their names, and which sites are alike."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

import kvrewrite.ops  # noqa: F401
from kvrewrite.ir.fx import ancestors, get_attr, is_size, module_path
from kvrewrite.ir.site import AttentionSite
from kvrewrite.tools.inspection.lines import Line, layout, wrapped
from kvrewrite.tools.inspection.source import Renderer, Sizes, op_name
from kvrewrite.tools.tables import ranges

aten, ops = torch.ops.aten, torch.ops.kvrewrite
MULTIPLIES = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.convolution.default)
READS = (ops.cached_attention.default, ops.latent_attention.default)
UPDATES = (ops.cache_update.default, ops.cache_update_quantized.default)
VIEWS = {
    "table": "(B, Hkv, pages) pages of each head",
    "lens": "(B, Hkv) live slots",
    "keep": "(B, Hkv) slots that stay after this call",
    "spare": "pages that can be dealt to heads",
    "next_table": "the table that holds after this call",
}
UPDATE_SCORES = {"new_scores": "scores", "slot_scores": "slot_scores", "select": "select"}
SCORES = set(UPDATE_SCORES.values())
NOTES = {
    "kvrewrite.attention": "causal attention of the whole sequence on itself",
    "kvrewrite.cached_attention": "on the cached slots and the new tokens; lse: log-sum-exp of each query",
    "kvrewrite.latent_attention": "on the cached latents and the new tokens; lse: log-sum-exp of each query",
    "kvrewrite.cache_update": "appends the new tokens and evicts down to keep, in place",
    "kvrewrite.cache_update_quantized": "appends the new tokens and evicts down to keep, in place",
    "kvrewrite.reconstruction": "what a repetition of the prompt attends to most",
    "kvrewrite.entering": "a repetition's tokens do not enter the cache",
    "kvrewrite.observe": "attention that each slot and new token gets from the queries",
}


@dataclass
class SiteCode:
    """One site's code. key: equal for sites that do the same with their own parameters."""

    layer: int
    module: str
    inputs: list[dict[str, str]]
    lines: list[Line]
    key: str

    def text(self, marks: bool = False) -> str:
        """Returns the code as a function of its inputs. marks: "+" before lines that the compiler added."""
        name = re.sub(r"\W", "_", self.module.rpartition(".")[2]) or "attention"
        if name[0].isdigit():
            name = f"layer_{name}"
        result = next((n for line in reversed(self.lines) for n in line.names if n != "_"), "None")
        head = wrapped(f"def {name}({', '.join(i['name'] for i in self.inputs)}):")
        sign = "  " if marks else ""
        rows = [
            *(f"{sign}{row}" for row in head),
            layout(self.lines, marks, indent="    "),
            f"{sign}    return {result}",
        ]
        return "\n".join(rows)


def sites_code(gm: fx.GraphModule, old: set[fx.Node] | None = None) -> list[SiteCode]:
    """Returns the code around every site of a graph, canonical or rewritten.

    old: the nodes that were there before; others are marked as new.
    """
    sizes = Sizes(gm)
    found = [n for n in gm.graph.nodes if n.target in (ops.attention.default, *READS)]
    return [_site_code(gm, n, n.meta["kvrewrite_site"], sizes, old) for n in found]


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _has_module(node: fx.Node) -> bool:
    """Whether a module of the model made the node, not a pass."""
    return bool(node.meta.get("nn_module_stack")) and not node.name.startswith("sym_size")


def _region(gm: fx.GraphModule, attention: fx.Node, module: str) -> set[fx.Node]:
    """Returns the shown nodes: the module of the attention call from its inputs to the projection after it, and what
    passes added for it."""

    def outside(node: fx.Node) -> bool:
        if node.op in ("placeholder", "get_attr", "output"):
            return True
        if not _has_module(node) or not module:
            return False
        return not _within(module_path(node), module)

    def enters(node: fx.Node) -> bool:
        """Whether the walk up ends here: outside the module, or, without modules, before projections."""
        return outside(node) or (not module and node.target in MULTIPLIES)

    roots = [attention]
    ends: set[fx.Node] = set()
    todo = [attention]
    while todo:  # forward
        node = todo.pop()
        for user in node.users:
            if user in ends or outside(user) or user.target in READS:
                continue
            ends.add(user)
            if user.target not in MULTIPLIES or not _has_module(user):
                todo.append(user)
    if attention.target in READS and attention.meta["kvrewrite_site"].shares_kv_with is None:
        table = next(a for a in attention.all_input_nodes if _view_of(a) == "table")
        ends |= {u for u in table.users if u.target in UPDATES}
    back = ancestors([*roots, *ends], enters)
    return {n for n in back if not outside(n)} | ends | {attention}


def _view_of(node: fx.Node) -> str | None:
    """Returns the control input of which a node is one layer's part: "table", "lens", ..."""
    if node.target is aten.select.int and isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder":
        name = re.sub(r"_\d+$", "", str(node.args[0].target))
        return name if name in VIEWS else None
    return None


def _roles(region: set[fx.Node], attention: fx.Node, module: str) -> dict[fx.Node, str]:
    """Returns the names of nodes: results by name, and "~name" for what only leads to one of them."""
    roles: dict[fx.Node, str] = {}
    ends: list[tuple[Any, str]] = []
    schema = attention.target._schema.arguments  # type: ignore[union-attr]
    for value, argument in zip(attention.args, schema):
        if argument.name in ("q", "k", "v", "sinks", "alibi", "hidden", "k_dense", "v_dense"):
            ends.append((value, argument.name))
    for node in region:
        if node.target in UPDATES:
            for value, argument in zip(node.args, node.target._schema.arguments):  # type: ignore[union-attr]
                if argument.name in UPDATE_SCORES:
                    ends.append((value, UPDATE_SCORES[argument.name]))
            if isinstance(node.args[0], fx.Node) and node.args[0] is not attention.args[1]:
                roles[node.args[0]] = "k_unrotated"
        taken = node.args[1] if node.target is operator.sub else None
        if isinstance(taken, fx.Node) and taken.target is aten.sym_size.int and taken.args[0] is attention.args[1]:
            roles[node] = "cached"  # how many of the scores are those of cached slots
        if node.target is ops.observe.default and attention.target is ops.latent_attention.default:
            ends.append((node.args[0], "q_absorbed"))
        if node.target is ops.slot_rotary.default:
            roles[node] = "slot_positions"
        if (view := _view_of(node)) is not None:
            roles[node] = view
    if attention.target in READS:
        for user in attention.users:
            roles[user] = "out" if user.args[1] == 0 else "lse"
    else:
        roles[attention] = "out"
    for value, name in ends:
        if isinstance(value, fx.Node) and value.op not in ("placeholder", "get_attr"):
            roles.setdefault(value, name)
    leads: dict[fx.Node, set[str]] = {}
    for value, name in ends:
        if isinstance(value, fx.Node):
            others = {v for v, other in ends if isinstance(v, fx.Node) and other != name}
            for node in ancestors([value], lambda n: n not in region or n is attention or n in others):  # noqa: B023
                leads.setdefault(node, set()).add(name)
    for node in region:
        reached = leads.get(node, set())
        if node in roles or is_size(node):
            continue
        if len(reached) == 1 and not SCORES & reached:
            roles[node] = f"~{next(iter(reached))}"
        elif not reached and _has_module(node):
            roles[node] = "~out"
    for node in {i for n in region for i in n.all_input_nodes if i not in region}:
        if node.op not in ("placeholder", "get_attr") and not is_size(node):
            roles.setdefault(node, _input_name(node))
    order = [n for n in attention.graph.nodes if n in region]
    for node in order:  # cos.unsqueeze(1) is still cos
        came = {roles.get(i, "").removeprefix("~") for i in node.all_input_nodes if not is_size(i)}
        if node not in roles and len(came) == 1 and came <= {"cos", "sin"}:
            roles[node] = f"~{came.pop()}"
    return roles


def _input_name(node: fx.Node) -> str:
    """Names a tensor from outside: cos and sin by their role, others by their shape in the model."""
    near = ancestors([node], lambda n: _has_module(n) and module_path(n) != module_path(node))
    kinds = {op_name(n) for n in near if module_path(n) == module_path(node)}
    path = module_path(node)
    if "cos" in kinds and "sin" not in kinds:
        return "cos"
    if "sin" in kinds and "cos" not in kinds:
        return "sin"
    if node.target in READS or "attn" in path.rsplit(".", 1)[-1]:
        return "shared"
    if "head" in path.rsplit(".", 1)[-1]:
        return "logits"
    value = node.meta.get("val")
    return "x" if isinstance(value, torch.Tensor) and value.dim() == 3 else op_name(node).split(".")[-1]


def _site_code(
    gm: fx.GraphModule, attention: fx.Node, site: AttentionSite, sizes: Sizes, old: set[fx.Node] | None
) -> SiteCode:
    module = site.module
    region = _region(gm, attention, module)

    def parameter(node: fx.Node) -> str:
        name = str(node.target)
        return name.removeprefix(f"{module}.") if module else name

    values = {
        n: v
        for n in gm.graph.nodes
        if n.op == "get_attr" and isinstance(v := get_attr(gm, str(n.target)), torch.Tensor)
    }
    renderer = Renderer(
        gm, region, _roles(region, attention, module), parameter, sizes=sizes, old=old, notes=NOTES, values=values
    )
    lines = renderer.run()
    for line in lines:
        if len(line.names) == 1 and line.names[0] in VIEWS and line.op == "select":
            line.note = VIEWS[line.names[0]]
    renderer.inputs.sort(key=lambda n: (n.op == "placeholder", renderer.order[n]))
    inputs = [
        {
            "name": renderer.names[n],
            "node": n.name,
            "from": _origin(n),
            "shape": "" if (v := renderer._value(n)) is None else sizes.shape(v),
        }
        for n in renderer.inputs
    ]
    owner = site.layer if site.shares_kv_with is None else site.shares_kv_with
    where = [_normal(_origin(n), module, {site.layer, owner}) for n in renderer.inputs]
    text = _normal(layout(lines), module, {site.layer, owner})
    text = re.sub(rf"\b((?:{'|'.join(VIEWS)})_\d+)\[\d+\]", r"\1[·]", text)
    facts = [site.source, site.mask, str(site.window), str(site.chunk), str(site.shares_kv_with is None)]
    return SiteCode(site.layer, module, inputs, lines, "\n".join([*facts, *where, text]))


def _origin(node: fx.Node) -> str:
    """Says where an input comes from."""
    if node.op == "placeholder":
        return "input of the graph"
    return module_path(node) or "the graph"


def _normal(text: str, module: str, layers: set[int]) -> str:
    """Removes what differs between layers that do the same: layer numbers in paths and in names of states."""
    parent = module.rpartition(".")[0]
    if parent:
        text = text.replace(f"{parent}.", "·.")
    for layer in layers:
        text = re.sub(
            rf"(?<=\bpolicy_weights\.)([A-Za-z_.]*\.)?{layer}(?=\.)|(?<=\bstate_)(\w+_){layer}\b", r"\1\2·", text
        )
    return text


@dataclass
class Group:
    """Sites that do the same; the code of the first stands for all."""

    layers: list[int]
    before: SiteCode
    after: SiteCode | None

    @property
    def title(self) -> str:
        """Says which layers these are, and which of them is shown."""
        first, others = self.layers[0], self.layers[1:]
        if not others:
            return f"layer {first}"
        return f"layer {first}; layer{'s' if len(others) > 1 else ''} {ranges(others)}: the same"

    def as_dict(self) -> dict[str, Any]:
        """Returns the group as plain data."""

        def code(side: SiteCode) -> dict[str, Any]:
            return {
                "layer": side.layer,
                "module": side.module,
                "inputs": side.inputs,
                "lines": [{**asdict(line), "comment": line.comment} for line in side.lines],
                "text": side.text(),
            }

        return {
            "layers": self.layers,
            "before": code(self.before),
            "after": None if self.after is None else code(self.after),
        }


def fold(before: Iterable[SiteCode], after: Iterable[SiteCode] | None) -> list[Group]:
    """Groups sites whose code is the same before and after."""
    befores = list(before)
    afters: list[SiteCode | None] = [None] * len(befores) if after is None else list(after)
    groups: dict[tuple[str, str], Group] = {}
    for b, a in zip(befores, afters, strict=True):
        key = (b.key, a.key if a is not None else "")
        if key in groups:
            groups[key].layers.append(b.layer)
        else:
            groups[key] = Group([b.layer], b, a)
    return list(groups.values())
