"""The inputs of a rewritten graph: what each is for, its shape and dtype, and whether the graph writes to it.

A shape has numbers and letters. A letter is a size that may differ from call to call; it is the same size wherever it stands.

    B   rows                                     P0, P1, ...   pages in the pools of a cache class
    T   new tokens                               W0, W1, ...   pages that a page table of the class has room for
    L   columns whose logits are asked for       X0, X1, ...   the same of the table that a ragged update writes
    R   positions in the tables of cos and sin   O0, O1, ...   spare pages that a ragged update is offered
    S   tokens that a state has room for
    Z   positions that ranks may reach
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from kvrewrite.ir.value_facts import NamedSizes
from kvrewrite.kernels.quantized.scheme import Scheme

PAGE = 64  # slots per page
SPEC = "kvrewrite_input"  # in a placeholder's meta: its `InputSpec`

Kind = Literal["tokens", "rows", "span", "pool", "layers", "rotary", "length_table", "state"]
PoolShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class InputSpec:
    """One input of a rewritten graph.

    part: what it is, without the number of its class or rotation ("k_pages" of "k_pages_1"). kind: "layers" are tensors that
    all layers of a cache class share, each its own `input[layer]`. cls: the cache class that it belongs to, if it belongs to
    one; rotation: the same for tables of cos and sin. written: whether the graph writes to it.
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


def pool_shapes(k_dim: int, v_dim: int, dtype: torch.dtype, scheme: Scheme | None) -> PoolShapes:
    """What a page has in each pool, in the order in which ops take pools. scheme: how keys and values are quantized, or None."""
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


def class_inputs(cls: int, layers: int, kv_heads: int, pools: PoolShapes, ragged: bool) -> list[InputSpec]:
    """The cache of one class: its pools, and what each of its layers has. ragged: heads' pages are dealt by an update."""

    def of(part: str, kind: Kind, dtype: torch.dtype, shape: tuple[int | str, ...], written: bool) -> InputSpec:
        return InputSpec(f"{part}_{cls}", part, kind, dtype, shape, cls, written=written)

    heads, short = (layers, "B", kv_heads), torch.int32
    found = [of(name, "pool", dtype, (f"P{cls}", *shape), True) for name, (shape, dtype) in pools.items()]
    found.append(of("table", "layers", short, (*heads, f"W{cls}"), False))
    found.append(of("lens", "layers", short, heads, True))
    found.append(of("keep", "layers", short, heads, False))
    if ragged:
        found.append(of("floor", "rows", torch.float64, ("B",), False))
        found.append(of("spare", "layers", short, (layers, "B", f"O{cls}"), False))
        found.append(of("next_table", "layers", short, (*heads, f"X{cls}"), True))
    return found


def rotary_inputs(rotation: int, dim: int, dtype: torch.dtype) -> list[InputSpec]:
    """The tables of cos and sin of one rotation."""
    parts = ("rotary_cos", "rotary_sin")
    return [InputSpec(f"{p}_{rotation}", p, "rotary", dtype, ("R", dim), rotation=rotation) for p in parts]


def length_input(name: str, table: Tensor) -> InputSpec:
    """Frequencies that depend on the request's length; table: one of them."""
    return InputSpec(name, "length_table", "length_table", table.dtype, tuple(table.shape))


def state_input(name: str, shape: Iterable[int], dtype: str, per_token: bool) -> InputSpec:
    """A tensor that the cache carries from call to call."""
    lead = ("B", "S") if per_token else ("B",)
    return InputSpec(f"state_{name}", name, "state", getattr(torch, dtype), (*lead, *shape), written=True)


def spec_of(node: Any) -> InputSpec | None:
    """What is known of a graph input; None for every other node."""
    found: InputSpec | None = node.meta.get(SPEC) if isinstance(node, fx.Node) else None
    return found


class InputMaker:
    """Adds inputs to a graph that was captured, with fake values in the mode of its own values."""

    def __init__(self, gm: fx.GraphModule):
        self._graph = gm.graph
        tokens = next(n for n in gm.graph.nodes if n.op == "placeholder").meta["val"]
        self._device, self._mode = tokens.device, tokens.fake_mode
        self._sizes = NamedSizes(self._mode, {"B": tokens.shape[0], "T": tokens.shape[1]})

    def __call__(self, spec: InputSpec) -> fx.Node:
        """The input of this name, which is added behind the others if there is none."""
        inputs = [n for n in self._graph.nodes if n.op == "placeholder"]
        node = next((n for n in inputs if n.target == spec.name), None)
        if node is None:
            with self._graph.inserting_after(inputs[-1]):
                node = self._graph.placeholder(spec.name)
            sizes = self._sizes.shape(spec.shape)
            with self._mode:
                node.meta["val"] = torch.empty(sizes, dtype=spec.dtype, device=self._device)
        node.meta[SPEC] = spec
        return node
