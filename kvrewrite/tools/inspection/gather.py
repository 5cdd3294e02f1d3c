"""Runs the compiler on a checkpoint directory without its weights and keeps what is worth seeing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from kvrewrite import policies
from kvrewrite.artifact import directory as artifact
from kvrewrite.artifact.checkpoint import read_json
from kvrewrite.artifact.files import load_tensors
from kvrewrite.artifact.meta_model import build_on_meta
from kvrewrite.capture.fake_parameters import capture_on_meta
from kvrewrite.compiler import Weights, model_facts, read_weights
from kvrewrite.errors import ArtifactError, OptionError
from kvrewrite.ir.program import Program
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.pipeline import canonical, insert
from kvrewrite.policies import Policy
from kvrewrite.policies.site import PREFIX
from kvrewrite.tools.inspection.code import Group, SiteCode, fold, sites_code

PASSES = {
    "capture": "torch.export's graph of the model, on fake tensors",
    "normalize": "views and casts in one form, training leftovers gone",
    "canonicalize": "every attention call found, proved, and put as one op; masks gone",
    "carry_state": "what else mixes tokens (short convolutions, linear recurrences) found, proved, and put as an op with a state",
    "lift_positions": "positions are an input of the graph",
    "cache_latent": "one kv head, of the compressed latent; queries absorb the up-projections (mla=latent)",
    "insert_cache": "cache, policy and eviction at every site; logits only where asked for",
}


@dataclass
class PassDone:
    """A pass: the number of nodes after it, and its seconds."""

    name: str
    what: str
    nodes: int
    seconds: float


@dataclass
class Inspection:
    """What the compiler found and did. policy: None if none was asked for; then nothing was inserted.

    model: on the meta device; groups: the code of sites, grouped by equality.
    """

    name: str
    model: nn.Module
    config: Any
    dtype: torch.dtype
    sites: list[AttentionSite]
    policy: Policy | None
    groups: list[Group]
    passes: list[PassDone]
    graph: fx.Graph
    program: Program | None = None

    def group_of(self, layer: int) -> Group:
        """Returns the group of a layer; raises OptionError if the model has no such layer."""
        for group in self.groups:
            if layer in group.layers:
                return group
        raise OptionError(f"--site is {layer}, expected a layer from 0 to {len(self.sites) - 1}")


def inspect_directory(
    directory: str | Path,
    policy: Policy | None = None,
    *,
    policy_weights: Weights = None,
    max_length: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Inspection:
    """Compiles the model of a directory for a policy and shows what that did; does not read the weights.

    policy: None: a converted directory's own policy, no policy for any other. Raises as `convert`.
    """
    directory = Path(directory)
    if artifact.is_artifact(directory):
        manifest = artifact.read_manifest(directory)
        if not read_json(directory / "config.json").get("model_type"):
            raise ArtifactError(
                f"{directory} was made of a module that is not from transformers, so its graph from before can't be made "
                "again; use --graph to see the rewritten graph, or `observe` of kvrewrite.transform"
            )
        if policy is None:
            policy = policies.make(manifest["policy"]["name"], **manifest["policy"]["options"])
            if manifest["policy_weights"] and policy_weights is None:
                policy_weights = _stored_weights(directory)
    progress("building the model without weights")
    model, config = build_on_meta(directory)
    passes: list[PassDone] = []
    before: list[SiteCode] = []
    after: list[SiteCode] | None = None
    old: set[fx.Node] = set()
    progress("capturing")
    clock = time.perf_counter()
    captured = capture_on_meta(model, max_length=max_length)

    def observe(name: str, gm: fx.GraphModule) -> None:
        nonlocal clock, after
        seconds = time.perf_counter() - clock
        passes.append(PassDone(name, PASSES.get(name, ""), len(gm.graph.nodes), seconds))
        if name == "lift_positions":
            before.extend(sites_code(gm))
            old.update(gm.graph.nodes)
        if name == "insert_cache":
            after = sites_code(gm, old)
        clock = time.perf_counter()

    progress("finding attention")
    sites = canonical(captured, observe)
    program: Program | None = None
    if policy is not None:
        progress(f"inserting {policy.name}")
        clock = time.perf_counter()
        program = insert(captured, sites, policy, read_weights(policy_weights), model_facts(config), observe)
        policy = policies.make(program.policy["name"], **program.policy["options"])  # adapted to the model
    groups = fold(before, after)
    return Inspection(
        directory.resolve().name,
        model,
        config,
        captured.dtype,
        sites,
        policy,
        groups,
        passes,
        captured.graph.graph,
        program,
    )


def _stored_weights(directory: Path) -> Mapping[str, Tensor]:
    """Returns the policy weights in a converted directory, by the policies' names."""
    stored = load_tensors(directory / artifact.POLICY)
    return {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
