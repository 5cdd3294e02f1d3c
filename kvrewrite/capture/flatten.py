"""Turns an exported program into a flat graph from token ids and positions to logits."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from kvrewrite.capture.attention_interface import MAX_CHUNK
from kvrewrite.capture.captured import EMBEDDED, Captured
from kvrewrite.errors import CaptureError, UnsupportedModelError
from kvrewrite.ir.fx import clean_path, dependents, is_op, is_size, module_path, set_attr, shape_of, symbol


def _choose_logits(found: list[fx.Node], ids: Tensor, table: tuple[int, int] | None) -> fx.Node:
    """Chooses the logits among the tensors that a model returns.

    table: rows and columns of the token embedding. Logits have one entry per row of it; a head may have more or fewer
    (a padded or cut vocabulary), but a tensor with the embedding's columns is hidden states.
    """

    def size(node: fx.Node) -> int | None:
        value: Tensor = node.meta["val"]
        if value.dim() != 3 or [symbol(s) for s in value.shape[:2]] != [symbol(s) for s in ids.shape]:
            return None
        return value.shape[2] if isinstance(value.shape[2], int) and value.is_floating_point() else None

    sizes = [size(node) for node in found]
    if table is not None and table[0] in sizes:
        return found[sizes.index(table[0])]
    first: Tensor = found[0].meta["val"]
    shape = tuple(map(str, first.shape))
    if sizes[0] is None:
        last = first.dim() == 3 and first.shape[1] == 1
        raise CaptureError(
            f"the logits have the shape {shape} for token ids of shape {tuple(map(str, ids.shape))}; expected (batch, length, "
            "vocabulary), the logits of every token"
            + (
                ". It returns those of one token of each row alone, as nanoGPT's forward does without targets: wrap it in a "
                "module whose forward(input_ids) gives those of all tokens"
                if last
                else ""
            )
        )
    if table is not None and sizes[0] == table[1]:
        raise CaptureError(
            f"forward returned {shape}, which are hidden states: the token embedding has {table[0]} rows of {table[1]}, so "
            f"logits have {table[0]} entries per token. Wrap the model in a module whose forward(input_ids) returns its logits."
        )
    return found[0]


def unrolled_chunk(program: Any) -> int:
    """Returns the chunk size of a loop over chunks that the trace unrolled, 0 if there is none.

    torch records what a trace assumes about sizes. An assumption that a quotient of the length is constant means such a
    loop. (An assumption that the length fits a table looks the same, but without the division.)
    """
    ids = ids_of(program)
    length = symbol(ids.shape[1])
    if not hasattr(length, "free_symbols"):
        return 0
    found = 0
    size: Any = ids.shape[1]
    for guard in size.node.shape_env.guards:
        assumed = guard.expr
        if not isinstance(assumed, sympy.Eq) or assumed.free_symbols != {length}:
            continue
        if not assumed.has(sympy.Function):  # torch's quotients and remainders are functions; Max and Min are not
            continue
        chunk = max((int(n) for n in assumed.atoms(sympy.Integer)), default=0)
        if 1 < chunk <= MAX_CHUNK and not all(assumed.subs({length: n * chunk + 3}) for n in range(1, 5)):
            found = max(found, chunk)
    return found


def vocab_size(model: nn.Module) -> int | None:
    """Returns the rows of the token embedding, from the config or the model's first embedding; None if it has none."""
    config = getattr(model, "config", None)
    get_embeddings = getattr(model, "get_input_embeddings", None)
    if get_embeddings is not None and config is not None:
        embedding = get_embeddings()
        if hasattr(embedding, "weight"):
            return int(embedding.weight.shape[0])
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return int(module.num_embeddings)
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def _token_lookup(graph: fx.Graph) -> fx.Node | None:
    """Returns the node that looks up the unchanged token ids in a table; None if there is none."""
    aten = torch.ops.aten
    unchanged = {
        aten._to_copy.default,
        aten.clone.default,
        aten.view.default,
        aten.reshape.default,
        aten.contiguous.default,
        aten.unsqueeze.default,
        aten.transpose.int,
        aten.t.default,
        aten.permute.default,
        aten.alias.default,
        aten.to.dtype,
        aten._unsafe_view.default,
        aten.detach.default,
    }
    ids = {n for n in graph.nodes if n.op == "placeholder" and n.target == "input_ids"}
    for node in graph.nodes:
        if is_op(node, *unchanged) and node.args[0] in ids:
            ids.add(node)
        index = None
        if is_op(node, aten.embedding.default):
            index = node.args[1]
        elif is_op(node, aten.index.Tensor) and len(node.args[1]) == 1:
            index = node.args[1][0]
        elif is_op(node, aten.index_select.default) and node.args[1] == 0:
            index = node.args[2]
        if index in ids:
            shape = node.args[0].meta["val"].shape
            if len(shape) == 2 and all(isinstance(s, int) for s in shape):
                return node
    return None


def _table_size(lookup: fx.Node) -> tuple[int, int]:
    """Rows and columns of the table of a lookup."""
    table = lookup.args[0]
    assert isinstance(table, fx.Node)
    rows, columns = shape_of(table)
    return int(rows), int(columns)


def _mark_embedded(graph: fx.Graph, model: nn.Module, lookup: fx.Node | None) -> None:
    """Marks what turns ids into embeddings: what the module that `get_input_embeddings` returns does with them (a lookup,
    often a factor, too), or the lookup alone. The last marked node is what `inputs_embeds` stands for."""
    get_embeddings = getattr(model, "get_input_embeddings", None)
    module = get_embeddings() if get_embeddings is not None else None
    paths = {name for name, m in model.named_modules(remove_duplicate=False) if m is module and name}
    ids = [n for n in graph.nodes if n.op == "placeholder" and n.target == "input_ids"]
    of_ids = dependents(ids, stop=is_size)
    inside = [n for n in graph.nodes if n in of_ids and any(_is_in(module_path(n), path) for path in paths)]
    for node in inside or ([] if lookup is None else [lookup]):
        node.meta[EMBEDDED] = True


def _is_in(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".")


def flatten(program: Any, model: nn.Module, frontend: str, takes_positions: bool) -> Captured:
    """Turns an exported program into a plain GraphModule whose parameters and buffers keep their own names."""
    from torch.export.graph_signature import InputKind, OutputKind

    signature = program.graph_signature
    for spec in signature.output_specs:
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            raise UnsupportedModelError(
                f"the model writes to its own state ({spec.target}) in forward: recurrent state or counters can't be "
                "carried by an evicted cache"
            )
    targets: dict[str, str] = {}
    for spec in signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            targets[spec.arg.name] = clean_path(spec.target)
    root = nn.Module()
    state = {**program.state_dict, **program.constants}
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    order = iter(["input_ids", "position_ids"])
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in targets:
            target = targets[node.name]
            # Rename a parameter of the model itself that has an input's name: generated code would confuse the two.
            env[node] = new.create_node("get_attr", target, name=target if "." in target else f"model_{target}")
        elif node.op == "placeholder":
            env[node] = new.placeholder(next(order))
        elif node.op == "output":
            found = [env[n] for n in node.args[0] if isinstance(n, fx.Node)]
            continue
        elif node.op == "get_attr":
            # Subgraphs of higher-order ops.
            if isinstance(getattr(program.graph_module, node.target, None), fx.GraphModule):
                root.add_module(node.target, getattr(program.graph_module, node.target))
            env[node] = new.node_copy(node, lambda n: env[n])
        else:
            env[node] = new.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    for spec in signature.input_specs:
        if targets.get(spec.arg.name):
            value = state[spec.target]
            set_attr(root, targets[spec.arg.name], value)
    inputs = {n.target: n for n in new.nodes if n.op == "placeholder"}
    ids = inputs["input_ids"].meta["val"]
    lookup = _token_lookup(new)
    table = None if lookup is None else _table_size(lookup)
    new.output(_choose_logits(found, ids, table))
    _mark_embedded(new, model, lookup)
    new.eliminate_dead_code(is_impure_node=lambda n: n.op == "placeholder" or n.is_impure())
    gm = fx.GraphModule(root, new, class_name=type(model).__name__)
    vocab = table[0] if table is not None else vocab_size(model)
    if vocab is None:
        raise CaptureError(
            "no token embedding was found; expected a table that the ids are looked up in, or a config with vocab_size"
        )
    if not takes_positions:
        unused = inputs["position_ids"]
        if unused.users:
            raise CaptureError("position_ids is used by a model that does not take it")
        gm.graph.erase_node(unused)
    gm.graph.lint()
    gm.recompile()
    first = next(p for p in model.parameters() if p.is_floating_point())
    return Captured(
        graph=gm,
        frontend=frontend,
        dtype=first.dtype,
        vocab_size=vocab,
        batch_symbol=ids.shape[0].node.expr,
        length_symbol=ids.shape[1].node.expr,
        max_positions=upper_bound(ids.shape[1]),
        aliases=_aliases(model),
        persistent=set(model.state_dict().keys()),
    )


def ids_of(program: Any) -> Tensor:
    """Returns the value of the token ids in an exported program."""
    name = program.graph_signature.user_inputs[0]
    return next(n for n in program.graph.nodes if n.name == name).meta["val"]


def longest_text(program: Any) -> int | None:
    """Returns the longest text that an exported program holds for, None if there is no bound."""
    name = program.graph_signature.user_inputs[0]
    length = next(n for n in program.graph.nodes if n.name == name).meta["val"].shape[1]
    return upper_bound(length) if isinstance(length, torch.SymInt) and length.node.maybe_as_int() is None else None


def upper_bound(size: torch.SymInt) -> int | None:
    """Returns the largest length that the traced graph allows (a table of learned positions, a causal buffer)."""
    ranges = size.node.shape_env.var_to_range.get(size.node.expr)
    if ranges is None:
        return None
    return int(ranges.upper) if isinstance(ranges.upper, sympy.Integer) and ranges.upper < 1 << 30 else None


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Returns all names of each parameter that has several (tied weights)."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() if len(names) > 1 for name in names}
