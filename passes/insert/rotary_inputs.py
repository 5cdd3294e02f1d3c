"""Inputs of a rewritten graph that rotations come from: tables of cos and sin, and frequencies that depend on the length."""

from __future__ import annotations

from torch import fx

from kvrewrite.capture.captured import Captured, RotaryTable
from kvrewrite.ir.fx import add_placeholder, get_attr, set_attr
from kvrewrite.ir.layout import InputMaker, LengthTable, Rotary, length_input, rotary_inputs
from kvrewrite.passes.canonical.find_rope import Rope


def add_rotary_inputs(
    gm: fx.GraphModule, captured: Captured, ropes: dict[int, Rope], rotary: list[Rotary], add: InputMaker
) -> dict[int, tuple[fx.Node, fx.Node, fx.Node]]:
    """One (cos, sin, partner) per distinct rotation: site -> nodes; fills `rotary` with the graphs that make them."""
    by_signature: dict[str, tuple[fx.Node, fx.Node, fx.Node]] = {}
    tables: dict[int, tuple[fx.Node, fx.Node, fx.Node]] = {}
    for layer, rope in ropes.items():
        if rope.signature not in by_signature:
            index = len(rotary)
            cos, sin = (add(spec) for spec in rotary_inputs(index, len(rope.partner), rope.dtype))
            for node in rope.table.graph.nodes:
                if node.op == "get_attr" and str(node.target).startswith("rotary_"):
                    name = f"rotary_tables.{index}.{node.target}"
                    set_attr(gm, name, get_attr(rope.table, str(node.target)))
                    set_attr(rope.table, name, get_attr(rope.table, str(node.target)))
                    node.target = name
            lengths = add_length_inputs(rope.table, captured.rotary_tables, [], None)
            names = [table.input for table in lengths]
            rotary.append(Rotary(rope.table.graph, len(rope.partner), rope.dtype, names))
            set_attr(gm, f"rotary_tables.{index}.partner", rope.partner)
            with gm.graph.inserting_after(sin):
                partner = gm.graph.get_attr(f"rotary_tables.{index}.partner")
            by_signature[rope.signature] = (cos, sin, partner)
        tables[layer] = by_signature[rope.signature]
    return tables


def add_length_inputs(
    gm: fx.GraphModule, tables: list[RotaryTable], rotary: list[Rotary], add: InputMaker | None
) -> list[LengthTable]:
    """Turns frequencies that depend on the request's length into graph inputs `length_table_{i}`. add: None for a graph of
    rotary tables, whose inputs have no values."""
    found = []
    for i, table in enumerate(tables):
        nodes = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == table.attribute]
        used = any(f"length_table_{i}" in r.length_tables for r in rotary)
        if not nodes and not used:
            continue
        name = f"length_table_{i}"
        if nodes:
            new = add_placeholder(gm, name) if add is None else add(length_input(name, table.short))
            for node in nodes:
                node.replace_all_uses_with(new)
                gm.graph.erase_node(node)
        set_attr(gm, f"length_tables.{i}.short", table.short)
        set_attr(gm, f"length_tables.{i}.long", table.long)
        found.append(LengthTable(name, i, table.threshold, bool(nodes)))
    return found
