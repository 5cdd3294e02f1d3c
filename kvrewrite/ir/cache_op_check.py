"""Checks the cache ops of a graph from a file: they write in place and address pages.

Their arguments must be the program's own inputs (`_INPUTS` and the other tables) with the shapes that their kernels assume
(`_SHAPES`), and each layer's cache is updated once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.errors import ArtifactError
from kvrewrite.ir.fake_values import shown
from kvrewrite.ir.fx import get_attr, symbol
from kvrewrite.ir.layout import CacheClass, spec_of
from kvrewrite.kernels.attention.patterns import parse
from kvrewrite.kernels.groups import Memory

aten = torch.ops.aten

# Arguments of cache ops that must be inputs of the program, and their kind.
_POOLS = ("k_pages", "v_pages", "score_pages", "pos_pages", "k_params", "v_params")
_VIEWS = ("table", "lens", "spare", "next_table")
_INPUTS = {
    "positions": "positions",
    "valid": "valid",
    "recent": "recent",
    "rotary": "position_ids",
    "following": "following",
    "renew": "renew",
    "span": "span",
    "begins": "repeat_begins",
    "ends": "repeat_ends",
    "before": "memory_before",
    "after": "memory_after",
    "looks": "memory_looks",
}
_ENTERING = {"positions": 0, "valid": 1}  # results of `entering` that an update may have in their places
_STATES = {
    "k_tail": "k_tail_",
    "v_tail": "v_tail_",
    "qlens": "qlens_",
    "threshold": "merge_",
    "past": "past_",
    "last": "last_logits",
    "k_state": "gate_k_",
    "v_state": "gate_v_",
}
# The same of the ops of a memory of blocks; `observe` has an argument `newest` that is a number.
_MEMORY_OPS = ("look_up", "recall")
_MEMORY = {name: f"infllm_{name}_" for name in ("choice", *Memory._fields)}
_CACHE_OPS = {
    "cached_attention",
    "latent_attention",
    "observe",
    "reconstruction",
    "entering",
    "cache_update",
    "cache_update_quantized",
    "read_quantized",
    "read_pages",
    "slot_rotary",
    "slot_positions",
    "rotate",
    "gate",
    "surprisal",
    "cached_past",
    "cached_scan",
    "cached_sum",
    "look_up",
    "recall",
}
# Shapes by letters; a letter is the same size throughout a call. B, K, C are the rows, kv heads and slots of the table,
# T the new tokens, N all slots and new tokens.
_SHAPES = {
    "attention": "q BHTD k BKTD v BKTE sinks H alibi H",
    "cached_attention": (
        "q BHTD k BKTD v BKTE k_dense BKCD v_dense BKCE table BKP lens BK positions BT valid B sinks H alibi H hidden BKT"
    ),
    "latent_attention": "q BHTQ k BKTD table BKP lens BK positions BT valid B sinks H alibi H",
    "observe": (
        "q BHTD k BKTD lse BHT rows BT k_dense BKCD table BKP lens BK positions BT valid B alibi H hidden BKT above BT"
    ),
    "reconstruction": (
        "q BHTD k BKTD stored BKC begins B ends B k_dense BKCD table BKP positions BT valid B sinks H alibi H"
    ),
    "entering": "positions BT valid B ends B",
    "cache_update": (
        "k BKTD v BKTE new_scores BKT slot_scores BKC positions BT rotary BT valid B keep BK recent B table BKP lens BK "
        "select BKN drop BKT floor B spare BW next_table BKX threshold B"
    ),
    "cache_update_quantized": (
        "k BKTD v BKTE new_scores BKT slot_scores BKC positions BT rotary BT valid B keep BK recent B k_cached BKCD "
        "v_cached BKCE k_tail BKRD v_tail BKRE table BKP lens BK qlens BK select BKN drop BKT floor B spare BW "
        "next_table BKX threshold B"
    ),
    "read_quantized": "tail BKRD table BKP qlens BK",
    "read_pages": "table BKP",
    "slot_rotary": "table BKP lens BK following B renew B span ZY",
    "slot_positions": "table BKP lens BK positions BT valid B",
    "rotate": "x BKCD cos MD sin MD positions BKC partner D",
    "gate": "q BTG k BTG v BTG k_state BSG v_state BSG positions BT valid B",
    "surprisal": "logits BTV ids BT valid B last BV positions BT",
    "look_up": "q BHTD positions BT valid B before B after B looks B marks BMKD choice BY",
    "recall": (
        "out BHTE lse BHT far_q BHTD far_k BKTD v BKTE q BHTD k BKTD notes BZ first_k BFKD first_v BFKE host_k BSKD host_v BSKE "
        "near_k BNLKD near_v BNLKE near_use BNU marks BMKD newest BRWKD"
    ),
    "cached_scan": "q BTHN k BTHN v BTHP beta BTH state BHNP valid B",
}
_DTYPES = {
    "table": torch.int32,
    "lens": torch.int32,
    "keep": torch.int32,
    "valid": torch.int32,
    "recent": torch.int32,
    "qlens": torch.int32,
    "positions": torch.int64,
    "rotary": torch.int64,
    "hidden": torch.bool,
    "drop": torch.bool,
    "spare": torch.int32,
    "next_table": torch.int32,
}


class CacheOps:
    """The cache ops of one graph. classes: of the layout."""

    def __init__(self, gm: fx.GraphModule, classes: Sequence[CacheClass]):
        self.gm, self.classes = gm, classes
        self.updated: set[tuple[int, int]] = set()  # (class, index of the layer in it) whose cache is updated

    def not_updated(self) -> int | None:
        """The first layer whose cache no op updates, None if there is none."""
        owned = {(c, i) for c, each in enumerate(self.classes) for i in range(len(each.layers))}
        lacking = sorted(owned - self.updated)
        return self.classes[lacking[0][0]].layers[lacking[0][1]] if lacking else None

    def check(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Checks one call. args, kwargs: the fake values of the node's arguments."""
        op: Any = node.target
        base = op._schema.name.partition("::")[2]
        schema = op._schema.arguments
        nodes = dict(zip((a.name for a in schema), node.args)) | dict(node.kwargs)
        values = dict(zip((a.name for a in schema), args)) | kwargs
        for name, value in values.items():
            if isinstance(value, int) and not -(1 << 31) <= value < 1 << 63:
                raise ArtifactError(f"{name} is {value}")
        self._check_shapes(base, values)
        for argument in schema:
            if argument.alias_info is not None and argument.alias_info.is_write:
                source = nodes.get(argument.name)
                if source is not None and not _is_own_memory(source):
                    raise ArtifactError(
                        f"{argument.name}, which it writes to, is {source}; expected pages, lengths or a state of the cache"
                    )
        if values.get("patterns"):
            _check_patterns(values)
        if base in _CACHE_OPS:
            self._check_roles(base, nodes, values)

    def _check_shapes(self, base: str, values: dict[str, Any]) -> None:
        letters: dict[str, Any] = {}
        if isinstance(values.get("table"), Tensor) and values["table"].dim() == 3:
            letters["C"] = values["table"].shape[2] * 64
            if isinstance(values.get("positions"), Tensor) and values["positions"].dim() == 2:
                letters["N"] = letters["C"] + values["positions"].shape[1]
        words = _SHAPES.get(base, "").split()
        for name, shape in zip(words[::2], words[1::2]):
            value = values.get(name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.dim() != len(shape):
                raise ArtifactError(f"{name} is {shown(value)}; expected a tensor of {len(shape)} dimensions")
            if name in _DTYPES and value.dtype != _DTYPES[name] and base != "attention":
                raise ArtifactError(f"{name} is {shown(value)}; expected {_DTYPES[name]}")
            for letter, size in zip(shape, value.shape):
                if symbol(letters.setdefault(letter, size)) != symbol(size):
                    raise ArtifactError(
                        f"{name} is {shown(value)}, but its dimension {letter} is {symbol(letters[letter])} in the others"
                    )
        heads, groups = letters.get("H"), letters.get("K")
        if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
            raise ArtifactError(f"its {heads} heads can't share {groups} kv heads")

    def _check_roles(self, base: str, nodes: dict[str, Any], values: dict[str, Any]) -> None:
        """Checks that pages, tables, lengths and positions are the program's own inputs, all of one layer's cache."""
        found: set[tuple[int, int | None]] = set()
        for name, source in nodes.items():
            if source is None:
                continue
            if name in _POOLS or name in ("pool", "codes", "params"):
                kinds = (name,) if name in _POOLS else _POOLS
                found.add((self._class_of(name, source, kinds), None))
            elif name in _VIEWS:
                found.add(self._layer_of(name, source, name))
            elif name == "keep":
                found.add(self._layer_of(name, self._budget(source), name))
            elif name == "floor":
                found.add((self._class_of(name, source, ("floor",)), None))
            elif name in _INPUTS and base != "rotate":
                if base.startswith("cache_update") and name in _ENTERING:
                    source = _before_entering(source, name, nodes["drop"])
                if not _is_input(source) or source.target != _INPUTS[name]:
                    raise ArtifactError(f"{name} is {source}; expected the input {_INPUTS[name]!r}")
            elif name in ("cos", "sin"):
                spec = spec_of(source)
                if spec is None or spec.part != f"rotary_{name}":
                    raise ArtifactError(f"{name} is {source}; expected an input rotary_{name}_...")
            elif name in (states := _states(base)) or name == "state" or name == "tail":
                spec, wanted = spec_of(source), states.get(name, "")
                if spec is None or spec.kind != "state" or not spec.part.startswith(wanted):
                    raise ArtifactError(f"{name} is {source}; expected an input state_{wanted}...")
        if base == "rotate":
            self._check_rotation(nodes)
        classes, layers = {c for c, _ in found}, {i for _, i in found if i is not None}
        if len(classes) > 1 or len(layers) > 1:
            raise ArtifactError("its pages, table and lengths belong to caches of several layers")
        if base.startswith("cache_update") and classes and layers:
            self._check_update(base, classes.pop(), layers.pop(), values)

    def _class_of(self, name: str, source: Any, kinds: Sequence[str]) -> int:
        spec = spec_of(source)
        if spec is None or spec.cls is None or spec.part not in kinds:
            raise ArtifactError(f"{name} is {source}; expected an input {' or '.join(kinds)}_..., pages of the cache")
        return spec.cls

    def _layer_of(self, name: str, source: Any, kind: str) -> tuple[int, int]:
        """Returns the class and the layer's index in it, for a layer's part of an input that all layers share."""
        selects = isinstance(source, fx.Node) and source.target is aten.select.int and len(source.args) == 3
        if not selects or source.args[1] != 0 or type(source.args[2]) is not int:
            raise ArtifactError(
                f"{name} is {source}; expected a layer's part of the input {kind}_... (aten.select.int)"
            )
        c, index = self._class_of(name, source.args[0], (kind,)), source.args[2]
        if not 0 <= index < len(self.classes[c].layers):
            raise ArtifactError(f"{name} is that of layer {index}, of {len(self.classes[c].layers)}")
        return c, index

    def _budget(self, source: Any) -> Any:
        """Returns the input that a budget comes from, directly or through ops that never give a head more than its
        pages."""
        if not isinstance(source, fx.Node):
            return source
        if source.target is torch.ops.kvrewrite.kept_above.default:
            return source.args[3]
        if source.target is operator.getitem:
            shared, index = source.args
            if isinstance(shared, fx.Node) and shared.target is torch.ops.kvrewrite.share_layers.default:
                budgets = shared.args[2]
                if isinstance(budgets, (list, tuple)) and type(index) is int and 0 <= index < len(budgets):
                    return budgets[index]
        if source.target is aten.full_like.default:  # unlimited: the window bounds it
            c, index = self._layer_of("keep", source.args[0], "keep")
            if self.classes[c].windows[index]:
                return source.args[0]
        return source

    def _check_rotation(self, nodes: dict[str, Any]) -> None:
        positions, partner = nodes["positions"], nodes["partner"]
        if not isinstance(positions, fx.Node) or positions.target is not torch.ops.kvrewrite.slot_rotary.default:
            raise ArtifactError(f"positions is {positions}; expected what slot_rotary gives")
        if not isinstance(partner, fx.Node) or partner.op != "get_attr":
            raise ArtifactError(f"partner is {partner}; expected a constant")
        channels = get_attr(self.gm, str(partner.target))
        fits = channels.dtype == torch.int64 and channels.dim() == 1
        if not fits or not bool(((channels >= 0) & (channels < len(channels))).all()):
            raise ArtifactError(f"partner ({partner.target}) is not a list of channels")

    def _check_update(self, base: str, c: int, index: int, values: dict[str, Any]) -> None:
        spec = self.classes[c]
        if (c, index) in self.updated:
            raise ArtifactError(f"the cache of layer {spec.layers[index]} is updated twice")
        self.updated.add((c, index))
        for name, width in (("k", spec.k_dim), ("v", spec.v_dim)):
            shape = values[name].shape
            if shape[1] != spec.kv_heads or shape[3] != width:
                raise ArtifactError(f"{name} is {shown(values[name])}; the cache has {spec.kv_heads} heads of {width}")
        if (values["window"] or values["chunk"]) != spec.windows[index]:
            raise ArtifactError(
                f"window and chunk are {values['window']} and {values['chunk']}; the cache has pages for {spec.windows[index]}"
            )


def _before_entering(source: Any, name: str, drop: Any) -> Any:
    """The input that `entering` takes, where an update has its result; the node itself otherwise, or where `drop` is not of
    the same `entering`."""
    made = source.args[0] if isinstance(source, fx.Node) and source.target is operator.getitem else None
    if not isinstance(made, fx.Node) or made.target is not torch.ops.kvrewrite.entering.default:
        return source
    flags = isinstance(drop, fx.Node) and drop.target is operator.getitem and drop.args == (made, 2)
    return made.args[_ENTERING[name]] if flags and source.args[1] == _ENTERING[name] else source


def _check_patterns(values: dict[str, Any]) -> None:
    try:
        found = len(parse(values["patterns"]))
    except ValueError as error:
        raise ArtifactError(f"patterns: {error}") from None
    if found != values["q"].shape[1]:
        raise ArtifactError(f"patterns are of {found} heads; q has {values['q'].shape[1]}")
    if values["window"] or values["chunk"] or values["alibi"] is not None:
        raise ArtifactError("patterns are of causal attention; it has a window, a chunk or ALiBi")


def _is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _is_own_memory(node: Any) -> bool:
    """Whether a node is an input of the runtime, or a layer's part of one, that a program may write to."""
    if isinstance(node, fx.Node) and node.target is aten.select.int:
        node = node.args[0]
    spec = spec_of(node)
    return spec is not None and spec.written


def _states(base: str) -> dict[str, str]:
    """Arguments of an op that must be states, and how their names begin."""
    return {**_STATES, **_MEMORY} if base in _MEMORY_OPS else _STATES
