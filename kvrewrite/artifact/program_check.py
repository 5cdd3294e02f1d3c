"""Checks a program that was read from a directory: its parts fit each other and what the runtime will give it.

The types of both files were checked when they were read (`schema.py`). Here: the layout against the policy and the sites, and the
graphs against the inputs that the layout promises (`graph_check.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvrewrite.cache.pages import pool_shapes, scheme_of
from kvrewrite.errors import ArtifactError, OptionError
from kvrewrite.ir.fx import get_attr
from kvrewrite.ir.graph_check import Place, Sizes, check_graph, same_sizes
from kvrewrite.ir.program import Program
from kvrewrite.ir.serialize import graph_from_dict
from kvrewrite.policies import Policy
from kvrewrite.policies import make as make_policy

_MEMORY = 1 << 30  # bytes of values that any graph may have at a short call


def check_program(program: Program, device: torch.device, what: str) -> None:
    """Raises ArtifactError with the place. what: the directory, for errors. Facts in the graph become those that are computed."""
    try:
        policy = make_policy(program.policy["name"], **program.policy["options"])
        policy.check_layers(sum(len(c["layers"]) for c in program.layout["classes"]))
    except (OptionError, TypeError) as error:
        raise ArtifactError(f"{what}: its policy can't be made: {error}; the manifest is damaged") from error
    _check_layout(program, policy, what)
    weights = sum(t.nbytes for t in {id(t): t for t in program.graph.parameters()}.values())
    sizes = Sizes(device)
    place = Place(f"{what}/graph.json", sizes, program.layout["classes"], max(_MEMORY, 4 * weights))
    inputs = _inputs(program, sizes, what)
    found = [str(n.target) for n in program.graph.graph.nodes if n.op == "placeholder"]
    if found != program.layout["inputs"]:
        raise ArtifactError(f"{what}: the graph's inputs are not those of the manifest's layout; the files are damaged")
    logits = check_graph(program.graph, inputs, place)
    fits = isinstance(logits, Tensor) and logits.dim() == 3 and logits.is_floating_point()
    if not fits or logits.shape[2] != program.vocab_size:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ArtifactError(
            f"{what}/graph.json: the output is {got}, expected logits (B, T, {program.vocab_size}); the files are damaged"
        )
    rows = (inputs["logit_index"], 1) if "logit_index" in found else (inputs["input_ids"], 1)
    if not same_sizes(logits.shape[:2], rows[0].shape[:2]):
        raise ArtifactError(f"{what}/graph.json: the output has other rows or tokens than were asked for")


def _check_layout(program: Program, policy: Policy, what: str) -> None:
    layout = program.layout

    def wrong(reason: str) -> ArtifactError:
        return ArtifactError(f"{what}/kvrewrite.json: layout: {reason}; the manifest is damaged")

    agree = {
        "contiguous": (layout["contiguous"], policy.positions == "contiguous"),
        "ragged": (layout["ragged"], policy.ragged),
        "row_inputs": (layout["row_inputs"], list(policy.inputs)),
        "quantize": (
            layout["quantize"] and (layout["quantize"]["kind"], layout["quantize"]["group"], layout["quantize"]["residual"]),
            None if policy.quantize == "none" else (policy.quantize, policy.quantize_group, policy.quantize_residual),
        ),
    }  # fmt: skip
    for name, (told, wanted) in agree.items():
        if told != wanted:
            raise wrong(f"{name} is {told}, but with {policy.name} and its options it is {wanted}")
    shares = any(str(n.target) == "kvrewrite.share_layers.default" for n in program.graph.graph.nodes)
    if shares != policy.shares_layers:
        raise wrong(f"its layers share a budget or not, other than with {policy.name}")
    sites = {site.layer: site for site in program.sites}
    if sorted(sites) != list(range(len(program.sites))):
        raise wrong("the sites are not numbered in order")
    owners = [layer for c in layout["classes"] for layer in c["layers"]]
    if len(set(owners)) != len(owners) or not set(owners) <= sites.keys():
        raise wrong("a layer owns two caches, or there is no such layer")
    for c in layout["classes"]:
        if len(c["layers"]) != len(c["windows"]) or c["layers"] != sorted(c["layers"]):
            raise wrong("a class has layers out of order, or other numbers of layers and windows")
    for name in ("states", "length_tables"):
        names = [entry.get("name", entry.get("input")) for entry in layout[name]]
        if len(set(names)) != len(names):
            raise wrong(f"two of its {name} have the same name")
    constants = set(program.constants)
    for table in layout["length_tables"]:
        if lacking := {f"length_tables.{table['index']}.{kind}" for kind in ("short", "long")} - constants:
            raise wrong(f"there is no constant {min(lacking)}")
    known = {table["input"] for table in layout["length_tables"]}
    for entry in layout["rotary"]:
        if lacking := set(entry["constants"]) - constants:
            raise wrong(f"there is no constant {min(lacking)}")
        if lacking := set(entry["length_tables"]) - known:
            raise wrong(f"there is no length table {min(lacking)}")


def _inputs(program: Program, sizes: Sizes, what: str) -> dict[str, Tensor]:
    """What the runtime will give the graph, by name."""
    layout, dtype = program.layout, getattr(torch, program.dtype)
    long, short = torch.int64, torch.int32
    found = {
        "input_ids": sizes.tensor(long, ["B", "T"]), "position_ids": sizes.tensor(long, ["B", "T"]),
        "positions": sizes.tensor(long, ["B", "T"]), "logit_index": sizes.tensor(long, ["B", "L"]),
        "valid": sizes.tensor(short, ["B"]), "recent": sizes.tensor(short, ["B"]),
        "following": sizes.tensor(long, ["B"]), "renew": sizes.tensor(torch.bool, ["B"]),
        "span": sizes.tensor(torch.float32, [0, "Z"]),
    }  # fmt: skip
    found |= {name: sizes.tensor(short, ["B"]) for name in layout["row_inputs"]}
    try:
        scheme = scheme_of(layout)
        pools = [pool_shapes(c["k_dim"], c["v_dim"], dtype, scheme) for c in layout["classes"]]
    except (ValueError, ZeroDivisionError, KeyError) as error:
        raise ArtifactError(f"{what}/kvrewrite.json: layout: its pages can't be made: {error}") from error
    for c, (spec, shapes) in enumerate(zip(layout["classes"], pools)):
        lead = [len(spec["layers"]), "B", spec["kv_heads"]]
        found |= {f"{name}_{c}": sizes.tensor(kind, [f"pages {c}", *shape]) for name, (shape, kind) in shapes.items()}
        found |= {f"{name}_{c}": sizes.tensor(short, lead) for name in ("lens", "keep")}
        found[f"table_{c}"] = sizes.tensor(short, [*lead, f"P{c}"])
        found[f"next_table_{c}"] = sizes.tensor(short, [*lead, f"X{c}"])
        found[f"spare_{c}"] = sizes.tensor(short, [*lead[:2], f"W{c}"])
        found[f"floor_{c}"] = sizes.tensor(torch.float64, ["B"])
    for state in layout["states"]:
        lead = ["B", "S"] if state["per_token"] else ["B"]
        found[f"state_{state['name']}"] = sizes.tensor(getattr(torch, state["dtype"]), [*lead, *state["shape"]])
    tables: dict[str, Tensor] = {}
    for table in layout["length_tables"]:
        both = [get_attr(program.graph, f"length_tables.{table['index']}.{kind}") for kind in ("short", "long")]
        if both[0].shape != both[1].shape or both[0].dtype != both[1].dtype:
            raise ArtifactError(f"{what}: the constants length_tables.{table['index']} have different shapes")
        tables[table["input"]] = sizes.tensor(both[0].dtype, list(both[0].shape))
    found |= tables
    for i, entry in enumerate(layout["rotary"]):
        found |= _rotary(program, i, entry, tables, sizes, f"{what}/kvrewrite.json: layout.rotary[{i}].graph")
    return found


def _rotary(
    program: Program, index: int, entry: Mapping[str, Any], tables: dict[str, Tensor], sizes: Sizes, what: str
) -> dict[str, Tensor]:
    """What a graph of rotary tables gives."""
    constants = {n: get_attr(program.graph, n) for n in entry["constants"]}
    graph = graph_from_dict(entry["graph"], constants, sizes.device, what)
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
    return {f"rotary_cos_{index}": made[0], f"rotary_sin_{index}": made[1]}
