"""Checks a program from a directory: its parts must fit each other and the inputs that the runtime will give it.

Reading has already checked the types of both files (`schema.py`). This module checks the layout against the policy and
the sites, and the graphs against the inputs that the layout promises (`graph_check.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.errors import ArtifactError, OptionError
from kvrewrite.ir.fake_values import Sizes, same_sizes
from kvrewrite.ir.graph_check import Place, check_graph
from kvrewrite.ir.program import Program
from kvrewrite.policies import Policy
from kvrewrite.policies import make as make_policy

_MEMORY = 1 << 30  # bytes of values that any graph may have in a short call


def check_program(program: Program, device: torch.device, what: str) -> None:
    """Raises ArtifactError with the place. what: the directory, for errors. Replaces the graph's facts with computed
    ones."""
    try:
        policy = make_policy(program.policy["name"], **program.policy["options"])
        policy.check_layers(program.layout.owners)
    except (OptionError, TypeError) as error:
        raise ArtifactError(
            f"{what}: its policy can't be made: {error}; import the module that registers it, or the manifest is damaged"
        ) from error
    _check_layout(program, policy, what)
    weights = sum(t.nbytes for t in {id(t): t for t in program.graph.parameters()}.values())
    sizes = Sizes(device)
    place = Place(f"{what}/graph.json", sizes, program.layout.classes, max(_MEMORY, 4 * weights))
    inputs = {spec.name: sizes.tensor(spec.dtype, spec.shape) for spec in program.layout.inputs}
    logits = check_graph(program.graph, inputs, place)
    fits = isinstance(logits, Tensor) and logits.dim() == 3 and logits.is_floating_point()
    if not fits or logits.shape[2] != program.vocab_size:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ArtifactError(
            f"{what}/graph.json: the output is {got}, expected logits (B, T, {program.vocab_size}); the files are damaged"
        )
    rows = (inputs["logit_index"], 1) if "logit_index" in inputs else (inputs["input_ids"], 1)
    if not same_sizes(logits.shape[:2], rows[0].shape[:2]):
        raise ArtifactError(f"{what}/graph.json: the output has other rows or tokens than were asked for")


def _check_layout(program: Program, policy: Policy, what: str) -> None:
    layout = program.layout

    def wrong(reason: str) -> ArtifactError:
        return ArtifactError(f"{what}/kvrewrite.json: layout: {reason}; the manifest is damaged")

    agree = {
        "contiguous": (layout.contiguous, policy.positions == "contiguous"),
        "ragged": (layout.ragged, policy.ragged),
        "row_inputs": (layout.row_inputs, policy.row_inputs),
        "quantize": (
            layout.quantize and (layout.quantize.kind, layout.quantize.group, layout.quantize.residual),
            None if policy.quantize == "none" else (policy.quantize, policy.quantize_group, policy.quantize_residual),
        ),
    }
    for name, (told, wanted) in agree.items():
        if told != wanted:
            raise wrong(f"{name} is {told}, but with {policy.name} and its options it is {wanted}")
    shares = any(str(n.target) == "kvrewrite.share_layers.default" for n in program.graph.graph.nodes)
    if shares != policy.shares_layers:
        raise wrong(f"its layers share a budget or not, other than with {policy.name}")
    sites = {site.layer: site for site in program.sites}
    if sorted(sites) != list(range(len(program.sites))):
        raise wrong("the sites are not numbered in order")
    owners = [layer for c in layout.classes for layer in c.layers]
    if len(set(owners)) != len(owners) or not set(owners) <= sites.keys():
        raise wrong("a layer owns two caches, or there is no such layer")
    for c in layout.classes:
        if len(c.layers) != len(c.windows) or c.layers != sorted(c.layers):
            raise wrong("a class has layers out of order, or other numbers of layers and windows")
    named = {"states": [s.name for s in layout.states], "length_tables": [t.input for t in layout.length_tables]}
    for name, names in named.items():
        if len(set(names)) != len(names):
            raise wrong(f"two of its {name} have the same name")
    constants = set(program.constants)
    needed = {n for entry in layout.rotary for n in entry.constants}
    needed |= {f"length_tables.{t.index}.{kind}" for t in layout.length_tables for kind in ("short", "long")}
    if lacking := needed - constants:
        raise wrong(f"there is no constant {min(lacking)}")
