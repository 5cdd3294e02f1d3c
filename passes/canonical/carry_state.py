"""Finds token mixing besides attention that a state can carry, and replaces it with an op that later passes know.

A layer that convolves or scans is a region of the graph. It begins at ops that pad the sequence or look at other tokens
and ends where there is one entry per token again (`regions.py`). Evaluation shows what a region computes, whatever its
ops:

- a **window** (`windows.py`): zeros before the sequence, and ops that look back at most as far as these (short
  convolutions, token shifts). The region stays; `with_past` replaces the padding.
- a **linear recurrence** (`recurrences.py`): on random inputs of several lengths the region equals `linear_scan` for one
  assignment of its inputs to queries, keys, values, decays and rates. `linear_scan` replaces it.

If the model calls torch's associative_scan, the graph already has a `decayed_sum` (`kvrewrite/capture/export.py`).

Other regions stay as they are, and `check` refuses them with the reason that is recorded here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._sympy.functions import Max, Min

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import erase_dead, get_attr, is_op, is_size, placeholder, shape_of, symbol
from kvrewrite.passes.canonical.canonicalize import size_node
from kvrewrite.passes.canonical.check import CARRIED
from kvrewrite.passes.canonical.probe import ProbeError
from kvrewrite.passes.canonical.recurrences import FAR, Recurrence, Roles
from kvrewrite.passes.canonical.regions import NotCarried, Region, find_regions, layout_of
from kvrewrite.passes.canonical.windows import Window

aten = torch.ops.aten
ops = torch.ops.kvrewrite


def carry_state(captured: Captured) -> None:
    """Requires a canonical graph.

    Ensures: the state of every region that was understood is carried by a `with_past` or `linear_scan` node, and all
    nodes of the region have "" under `CARRIED` in their meta. Nodes of the other regions have the reason there.
    """
    gm = captured.graph
    if captured.unrolled:
        _resolve_lengths(captured)
    for node in gm.graph.nodes:
        if is_op(node, ops.decayed_sum.default):
            node.meta[CARRIED] = ""
    known: dict[str, Roles] = {}
    regions = find_regions(captured)
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
        captured.max_positions = None  # it came from the loop over chunks
    gm.graph.lint()
    gm.recompile()


def _resolve_lengths(captured: Captured) -> None:
    """Replaces sizes that equal the length by the length. A loop over chunks ends at a chunk's or the text's end, so
    the length of its results is the sum of all these differences."""
    length, tokens = captured.length_symbol, captured.trace_length
    ids = placeholder(captured.graph, "input_ids")
    assert ids is not None

    def resolved(size: Any) -> Any:
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
        if is_size(node) and resolved(value) is not value:
            node.replace_all_uses_with(known)
        elif isinstance(value, Tensor) and hasattr(value, "fake_mode"):
            sizes = [resolved(s) for s in value.shape]
            if any(a is not b for a, b in zip(sizes, value.shape)):
                with value.fake_mode:
                    node.meta["val"] = value.new_empty(sizes)


def _works_at(captured: Captured, length: int) -> bool:
    """Whether all shapes of the graph fit a text of `length` tokens, whatever device parameters are on."""
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
    """Rewrites one region; returns "" or the reason why it could not."""
    if any(layout_of(captured, n) is None for n in [*region.inputs, *region.exits]):
        return "the batch or the sequence is no axis of its own in what goes in or comes out"
    try:
        Window(captured, region).rewrite()
        return ""
    except NotCarried as error:
        reason = f"it is no short convolution or token shift: {error}"
    try:
        if len(region.exits) != 1:
            raise NotCarried(f"{len(region.exits)} results have one entry per token, expected one")
        Recurrence(captured, region, known).rewrite()
        return ""
    except NotCarried as error:
        return f"{reason}; and no linear attention or scan: {error}"
