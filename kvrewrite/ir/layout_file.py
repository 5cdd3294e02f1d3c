"""A program's layout as the plain data that `kvrewrite.json` has of it (`schema.Layout`), and back.

The file names the graph's inputs; what they are follows from the rest of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.errors import ArtifactError
from kvrewrite.ir.fake_values import Sizes, same_sizes
from kvrewrite.ir.fx import get_attr
from kvrewrite.ir.graph_check import Place, check_graph
from kvrewrite.ir.layout import (
    CacheClass,
    CacheLayout,
    LengthTable,
    Quantize,
    Rotary,
    State,
    length_input,
    possible_inputs,
)
from kvrewrite.ir.serialize import graph_from_dict, graph_to_dict


def layout_to_dict(layout: CacheLayout, gm: fx.GraphModule) -> dict[str, Any]:
    """Plain data. gm: the program's graph, which has the tensors. Devices are left out."""

    def plain(part: Any) -> dict[str, Any]:
        return {name: value for name, value in asdict(part).items() if name != "device"}

    rotary = []
    for entry in layout.rotary:
        graph = graph_to_dict(entry.module(gm, torch.device("cpu")))
        rotary.append({"graph": graph, "constants": entry.constants, "length_tables": entry.length_tables})
    return {
        "classes": [plain(c) for c in layout.classes],
        "contiguous": layout.contiguous,
        "rotary": rotary,
        "length_tables": [plain(t) for t in layout.length_tables],
        "states": [plain(s) for s in layout.states],
        "row_inputs": layout.row_inputs,
        "rewrites_slots": layout.rewrites_slots,
        "ragged": layout.ragged,
        "quantize": None if layout.quantize is None else plain(layout.quantize),
        "inputs": layout.input_names,
    }


def read_layout(
    data: Mapping[str, Any], gm: fx.GraphModule, dtype: torch.dtype, device: torch.device, what: str
) -> CacheLayout:
    """The inverse for a program's graph, whose placeholders get their specs.

    data: fits `schema.Layout`, and is not trusted beyond that. dtype: of keys and values; device: of the tensors. what: the
    directory, for errors. Raises ArtifactError.
    """
    where = f"{what}/kvrewrite.json: layout"
    lengths = [LengthTable(**entry) for entry in data["length_tables"]]
    tables = {table.input: _length_input(table, gm, what) for table in lengths}
    quantize = data["quantize"]
    layout = CacheLayout(
        classes=[CacheClass(**entry) for entry in data["classes"]],
        contiguous=data["contiguous"],
        length_tables=lengths,
        states=[State(**entry) for entry in data["states"]],
        row_inputs=data["row_inputs"],
        rewrites_slots=data["rewrites_slots"],
        ragged=data["ragged"],
        quantize=None if quantize is None else Quantize(**quantize),
    )
    sizes = Sizes(device)
    fakes = {name: sizes.tensor(spec.dtype, spec.shape) for name, spec in tables.items()}
    layout.rotary = [
        _read_rotary(entry, gm, fakes, sizes, f"{where}.rotary[{i}].graph") for i, entry in enumerate(data["rotary"])
    ]
    try:
        known = possible_inputs(layout, dtype, tables.values())
    except (ValueError, ZeroDivisionError, KeyError) as error:
        raise ArtifactError(f"{where}: its pages can't be made: {error}") from error
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    if names != data["inputs"]:
        raise ArtifactError(f"{what}: the graph's inputs are not those of the manifest's layout; the files are damaged")
    if lacking := sorted(set(names) - known.keys()):
        raise ArtifactError(f"{where}: the runtime has no input {lacking[0]!r:.80}; the files are damaged")
    layout.inputs = [known[name] for name in names]
    layout.attach(gm)
    return layout


def _constant(gm: fx.GraphModule, name: str, what: str) -> Tensor:
    try:
        found = get_attr(gm, name)
    except AttributeError:
        found = None
    if not isinstance(found, Tensor):
        raise ArtifactError(f"{what}/kvrewrite.json: layout: there is no constant {name}; the manifest is damaged")
    return found


def _length_input(table: LengthTable, gm: fx.GraphModule, what: str) -> Any:
    short, long = (_constant(gm, f"length_tables.{table.index}.{kind}", what) for kind in ("short", "long"))
    if short.shape != long.shape or short.dtype != long.dtype:
        raise ArtifactError(f"{what}: the constants length_tables.{table.index} have different shapes")
    return length_input(table.input, short)


def _read_rotary(
    entry: Mapping[str, Any], gm: fx.GraphModule, tables: Mapping[str, Tensor], sizes: Sizes, what: str
) -> Rotary:
    """One rotation; what its graph gives is found out with fake tensors."""
    directory = what.partition("/kvrewrite.json")[0]
    graph = graph_from_dict(
        entry["graph"], {name: _constant(gm, name, directory) for name in entry["constants"]}, sizes.device, what
    )
    if lacking := set(entry["length_tables"]) - tables.keys():
        raise ArtifactError(f"{what}: there is no length table {min(lacking)}; the manifest is damaged")
    names = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    inputs = {name: tables[name] for name in entry["length_tables"]}
    if names[1:] != list(inputs) or not names:
        raise ArtifactError(
            f"{what}: its inputs are {', '.join(names)[:200]}; expected positions and its length tables"
        )
    inputs[names[0]] = sizes.tensor(torch.int64, ["positions"])
    made = check_graph(graph, inputs, Place(what, sizes))
    fits = (
        isinstance(made, (list, tuple)) and len(made) == 2 and all(isinstance(t, Tensor) and t.dim() == 2 for t in made)
    )
    if not fits or not all(same_sizes(t.shape[:1], (sizes.size("positions"),)) for t in made):
        raise ArtifactError(f"{what}: it does not give cos and sin (positions, D)")
    cos, sin = made
    if not same_sizes(cos.shape, sin.shape) or cos.dtype != sin.dtype or not isinstance(cos.shape[1], int):
        raise ArtifactError(f"{what}: it does not give cos and sin of the same shape and dtype")
    return Rotary(graph.graph, int(cos.shape[1]), cos.dtype, entry["length_tables"])
