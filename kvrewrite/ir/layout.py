"""What the runtime must know of a rewritten graph, above all its inputs: what each is for, its shape and dtype, and
whether the graph writes to it. Each placeholder of the graph carries its `InputSpec` (`spec_of`).

A shape has numbers and letters. A letter is a size that may differ from call to call; it is the same size wherever it
stands.

    B   rows                                     P0, P1, ...   pages in the pools of a cache class
    T   new tokens                               W0, W1, ...   pages that a page table of the class has room for
    L   columns whose logits are asked for       X0, X1, ...   the same of the table that a ragged update writes
    R   positions in the tables of cos and sin   O0, O1, ...   spare pages that a ragged update is offered
    S   tokens that a state has room for         C0, C1, ...   slots of a class that are read as one tensor
    M   blocks of tokens, the same               Z             positions that ranks may reach
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from kvrewrite.ir.fx import get_attr, set_attr
from kvrewrite.ir.serialize import retarget_device
from kvrewrite.ir.value_facts import NamedSizes
from kvrewrite.kernels.quantized.scheme import Scheme

PAGE = 64  # slots per page
PIN_SPANS = 8  # spans of a row that can be pinned, where they do not touch
_SPEC = "kvrewrite_input"  # in a placeholder's meta: its `InputSpec`
_PER_CALL = ("B", "T", "L", "S", "M")  # letters whose sizes are the same in all single tokens of a batch

Kind = Literal["tokens", "rows", "span", "pool", "layers", "rotary", "length_table", "state"]
PoolShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class InputSpec:
    """One input of a rewritten graph.

    part: what it is, without the number of its class or rotation ("k_pages" of "k_pages_1"). kind: "layers" are tensors
    that all layers of a cache class share, each its own `input[layer]`. cls: the cache class that it belongs to, if it
    belongs to one; rotation: the same for tables of cos and sin. written: whether the graph writes to it.
    """

    name: str
    part: str
    kind: Kind
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    cls: int | None = None
    rotation: int | None = None
    written: bool = False

    @property
    def moving(self) -> tuple[int, ...]:
        """The dimensions whose size may differ from call to call."""
        return tuple(d for d, size in enumerate(self.shape) if isinstance(size, str))

    @property
    def moving_while_decoding(self) -> tuple[int, ...]:
        """The same for single tokens of a batch that stays as it is."""
        return tuple(d for d in self.moving if self.shape[d] not in _PER_CALL)


@dataclass
class CacheClass:
    """Layers whose caches have the same shape and share one pool of pages."""

    kv_heads: int
    k_dim: int
    v_dim: int
    layers: list[int] = field(default_factory=list)  # sites that own keys and values
    windows: list[int] = field(default_factory=list)  # most slots that a layer can ever need, 0: no limit
    device: str | None = None  # where the layers lie, if the model lies on several


@dataclass
class State:
    """A tensor (B, *shape), or (B, S, *shape), that a cache carries besides its slots; `fill` at first. slots: it holds
    slots of the cache, which are counted with the others; carried: it stands for a layer without attention. every: with
    per_token, how many tokens an entry stands for; host: it lies in host memory, pinned for a GPU, and begins as it is."""

    name: str
    shape: list[int]
    dtype: str
    per_token: bool = False
    fill: str = "0"
    slots: bool = False
    carried: bool = False
    device: str | None = None
    every: int = 1
    host: bool = False

    @property
    def input(self) -> str:
        """The name of the input that it is."""
        return f"state_{self.name}"

    @property
    def spec(self) -> InputSpec:
        """The input that it is."""
        lead = ("B", "S" if self.every == 1 else "M") if self.per_token else ("B",)
        shape = (*lead, *self.shape)
        return InputSpec(self.input, self.name, "state", getattr(torch, self.dtype), shape, written=True)


@dataclass
class Rotary:
    """One rotation: a graph (positions (N,), the length tables that it names) -> cos (N, dim), sin (N, dim)."""

    graph: fx.Graph
    dim: int
    dtype: torch.dtype
    length_tables: list[str]

    @property
    def constants(self) -> list[str]:
        """The tensors of the program that the graph reads."""
        return sorted({str(n.target) for n in self.graph.nodes if n.op == "get_attr"})

    def module(self, program: nn.Module, device: torch.device) -> fx.GraphModule:
        """The graph over tensors of the program, on a device."""
        root, graph = nn.Module(), fx.Graph()
        for name in self.constants:
            set_attr(root, name, get_attr(program, name).to(device))
        graph.output(graph.graph_copy(self.graph, {}))
        made = fx.GraphModule(root, graph, class_name="RotaryTables")
        retarget_device(made, device)
        return made


@dataclass
class LengthTable:
    """Frequencies that depend on the length of a request: constants `length_tables.{index}.short` and `.long`."""

    input: str
    index: int
    threshold: int | float
    in_graph: bool


@dataclass
class Quantize:
    """How keys and values are quantized; residual: newest slots that stay as they are."""

    kind: str
    group: int
    residual: int


@dataclass
class Devices:
    """Where a model on several devices has its inputs, and attributes that are no parameters of the original."""

    inputs: str
    attributes: dict[str, str]


@dataclass
class CacheLayout:
    """What the runtime must know of a program. inputs: those of the graph, in order. rewrites_slots: whether scores of
    cached slots change while nothing is evicted. devices: of a model on several."""

    classes: list[CacheClass] = field(default_factory=list)
    contiguous: bool = False
    rotary: list[Rotary] = field(default_factory=list)
    length_tables: list[LengthTable] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    row_inputs: list[str] = field(default_factory=list)
    rewrites_slots: bool = False
    ragged: bool = False
    quantize: Quantize | None = None
    inputs: list[InputSpec] = field(default_factory=list)
    devices: Devices | None = None

    @property
    def scheme(self) -> Scheme | None:
        """How keys and values are quantized, if they are."""
        return None if self.quantize is None else Scheme(self.quantize.kind, self.quantize.group)

    @property
    def owners(self) -> int:
        """How many layers own a cache."""
        return sum(len(c.layers) for c in self.classes)

    @functools.cached_property
    def input_names(self) -> list[str]:
        """The graph's inputs in order."""
        return [spec.name for spec in self.inputs]

    def attach(self, gm: fx.GraphModule) -> None:
        """Gives the graph's placeholders their specs."""
        specs = {spec.name: spec for spec in self.inputs}
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                node.meta[_SPEC] = specs[str(node.target)]


def pool_shapes(k_dim: int, v_dim: int, dtype: torch.dtype, scheme: Scheme | None) -> PoolShapes:
    """What a page has in each pool, in the order in which ops take pools. scheme: how keys and values are quantized, or
    None."""
    if scheme is None:
        shapes: PoolShapes = {"k_pages": ((PAGE, k_dim), dtype), "v_pages": ((PAGE, v_dim), dtype)}
    else:
        ends, width = scheme.parameters, scheme.code_width
        shapes = {
            "k_pages": ((PAGE, width(k_dim)), torch.uint8),
            "v_pages": ((PAGE, width(v_dim)), torch.uint8),
            "k_params": ((PAGE // scheme.group, k_dim, ends), dtype),
            "v_params": ((PAGE, v_dim // scheme.value_group(v_dim), ends), dtype),
        }
    shapes["score_pages"] = ((PAGE,), torch.float32)
    shapes["pos_pages"] = ((PAGE, 2), torch.int32)  # position in the text, position that the key is rotated by
    return shapes


def call_inputs(contiguous: bool, row_inputs: Iterable[str]) -> list[InputSpec]:
    """What every call has: tokens, positions, counts per row, and the policy's own numbers per row."""
    tokens = [InputSpec(n, n, "tokens", torch.int64, ("B", "T")) for n in ("input_ids", "position_ids", "positions")]
    rows = [InputSpec(n, n, "rows", torch.int32, ("B",)) for n in ("valid", "recent")]
    rows.append(InputSpec("logit_index", "logit_index", "rows", torch.int64, ("B", "L")))
    if contiguous:
        rows.append(InputSpec("following", "following", "rows", torch.int64, ("B",)))
        rows.append(InputSpec("renew", "renew", "rows", torch.bool, ("B",)))
        rows.append(InputSpec("span", "span", "span", torch.float32, (0, "Z")))
    return [*tokens, *rows, *(InputSpec(n, n, "rows", torch.int32, ("B",)) for n in row_inputs)]


def pin_inputs() -> list[InputSpec]:
    """The row's pinned spans: where each begins, and where it ends."""
    names = [f"pin_{end}_{i}" for end in ("begin", "end") for i in range(PIN_SPANS)]
    return [InputSpec(n, n, "rows", torch.int32, ("B",)) for n in names]


def class_inputs(cls: int, spec: CacheClass, pools: PoolShapes, ragged: bool) -> list[InputSpec]:
    """The cache of one class: its pools, and what each of its layers has. ragged: heads' pages are dealt by an
    update."""

    def of(part: str, kind: Kind, dtype: torch.dtype, shape: tuple[int | str, ...], written: bool) -> InputSpec:
        return InputSpec(f"{part}_{cls}", part, kind, dtype, shape, cls, written=written)

    layers, short = len(spec.layers), torch.int32
    heads = (layers, "B", spec.kv_heads)
    found = [of(name, "pool", dtype, (f"P{cls}", *shape), True) for name, (shape, dtype) in pools.items()]
    found.append(of("table", "layers", short, (*heads, f"W{cls}"), False))
    found.append(of("lens", "layers", short, heads, True))
    found.append(of("keep", "layers", short, heads, False))
    if ragged:
        found.append(of("floor", "rows", torch.float64, ("B",), False))
        found.append(of("spare", "layers", short, (layers, "B", f"O{cls}"), False))
        found.append(of("next_table", "layers", short, (*heads, f"X{cls}"), True))
    return found


def dense_inputs(cls: int, spec: CacheClass, dtype: torch.dtype) -> list[InputSpec]:
    """A class's slots as one tensor each of keys, of values and of whether they are alive, where these are read
    instead."""
    layers, slots = len(spec.layers), f"C{cls}"
    parts: list[tuple[str, torch.dtype, tuple[int | str, ...]]] = [
        ("k_slots", dtype, (layers, "B", spec.kv_heads, slots, spec.k_dim)),
        ("v_slots", dtype, (layers, "B", spec.kv_heads, slots, spec.v_dim)),
        ("live_slots", torch.bool, ("B", 1, 1, slots)),
    ]
    return [InputSpec(f"{p}_{cls}", p, "layers" if p != "live_slots" else "rows", t, s, cls) for p, t, s in parts]


def rotary_inputs(rotation: int, dim: int, dtype: torch.dtype) -> list[InputSpec]:
    """The tables of cos and sin of one rotation."""
    parts = ("rotary_cos", "rotary_sin")
    return [InputSpec(f"{p}_{rotation}", p, "rotary", dtype, ("R", dim), rotation=rotation) for p in parts]


def length_input(name: str, table: Tensor) -> InputSpec:
    """Frequencies that depend on the request's length; table: one of them."""
    return InputSpec(name, "length_table", "length_table", table.dtype, tuple(table.shape))


def possible_inputs(layout: CacheLayout, dtype: torch.dtype, lengths: Iterable[InputSpec]) -> dict[str, InputSpec]:
    """What a program with this layout may have as inputs, by name. dtype: of its keys and values."""
    found = call_inputs(layout.contiguous, layout.row_inputs)
    for c, spec in enumerate(layout.classes):
        found += class_inputs(c, spec, pool_shapes(spec.k_dim, spec.v_dim, dtype, layout.scheme), layout.ragged)
    for i, rotation in enumerate(layout.rotary):
        found += rotary_inputs(i, rotation.dim, rotation.dtype)
    return {spec.name: spec for spec in [*found, *(state.spec for state in layout.states), *lengths]}


def spec_of(node: Any) -> InputSpec | None:
    """What is known of a graph input; None for every other node."""
    found: InputSpec | None = node.meta.get(_SPEC) if isinstance(node, fx.Node) else None
    return found


class InputMaker:
    """Adds inputs to a graph that was captured, with fake values in the mode of its own values."""

    def __init__(self, gm: fx.GraphModule):
        self._graph = gm.graph
        tokens = next(n for n in gm.graph.nodes if n.op == "placeholder").meta["val"]
        self._device, self._mode = tokens.device, tokens.fake_mode
        self._sizes = NamedSizes(self._mode, {"B": tokens.shape[0], "T": tokens.shape[1]})

    def __call__(self, spec: InputSpec) -> fx.Node:
        """The input of this name, which is added after the others if there is none."""
        inputs = [n for n in self._graph.nodes if n.op == "placeholder"]
        node = next((n for n in inputs if n.target == spec.name), None)
        if node is None:
            with self._graph.inserting_after(inputs[-1]):
                node = self._graph.placeholder(spec.name)
        if node.meta.get("val") is None:
            sizes = self._sizes.shape(spec.shape)
            with self._mode:
                node.meta["val"] = torch.empty(sizes, dtype=spec.dtype, device=self._device)
        node.meta[_SPEC] = spec
        return node

    @property
    def inputs(self) -> list[InputSpec]:
        """What the graph has as inputs, in order."""
        return [node.meta[_SPEC] for node in self._graph.nodes if node.op == "placeholder"]
