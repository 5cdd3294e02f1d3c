"""Compiles a captured graph to a program: runs the passes, adds the policy weights and proves the result.

`transform`, `convert`, `inspect` and the torch.compile backend all compile with this module.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.collector import no_collection
from kvrewrite.ir.program import Program
from kvrewrite.ir.site import AttentionSite
from kvrewrite.ir.waits import told
from kvrewrite.passes.pipeline import Observer, canonical, insert
from kvrewrite.policies import Policy

Progress = Callable[[str], None]
Weights = str | Path | Mapping[str, Tensor] | None


def quiet(_: str) -> None:
    """Reports no progress."""


def model_facts(config: Any) -> dict[str, Any]:
    """Returns what policies may ask about a model's configuration."""
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            return {"activation": value}
    return {}


def read_weights(weights: Weights) -> tuple[Mapping[str, Tensor], Mapping[str, str]] | None:
    """Returns policy weights and their metadata; reads them if `weights` is a file."""
    if weights is None:
        return None
    if isinstance(weights, (str, Path)):
        from kvrewrite.artifact.policy_weights import read_policy_weights

        return read_policy_weights(weights)
    return weights, {}


class Canonical:
    """A captured model whose attention is found and proved, into which any number of policies can go, each in a copy.

    The capture and its proof take most of a rewrite's time and are the same for every policy. check: as for
    `transform`; "full" proves the whole again for each policy.
    """

    def __init__(self, captured: Captured, observe: Observer | None, progress: Progress = quiet, check: str = "full"):
        from kvrewrite.runtime.translation import reference_logits

        what = "finding attention and proving it" if check != "off" else "finding attention"
        progress(what)
        self.captured = captured
        with _float32(), told(what):
            self.sites = canonical(captured, observe, check)
            self.reference = reference_logits(captured) if check == "full" else None

    def copy(self) -> Canonical:
        """Returns one for a further policy: the graph is its own, parameters and stand-ins for them are shared."""
        graph, twin = self.captured.graph, copy.copy(self)
        tensors = [*graph.parameters(), *graph.buffers()]
        copied: fx.GraphModule = copy.deepcopy(graph, {id(tensor): tensor for tensor in tensors})
        own = {id(site): copy.deepcopy(site) for site in self.sites}
        for node in copied.graph.nodes:  # a copied node has the meta of the one that it was copied from
            if "kvrewrite_site" in node.meta:
                node.meta["kvrewrite_site"] = own[id(node.meta["kvrewrite_site"])]
        twin.sites = [own[id(site)] for site in self.sites]
        twin.captured = dataclasses.replace(self.captured, graph=copied, proof=copy.copy(self.captured.proof))
        return twin

    def program(
        self,
        policy: Policy,
        weights: Weights,
        config: Any,
        observe: Observer | None = None,
        progress: Progress = quiet,
    ) -> Program:
        """Inserts a policy, in place: this can be done once, so take a `copy` where there are more."""
        from kvrewrite.runtime.translation import prove_whole

        captured = self.captured
        with _float32():
            progress(f"inserting {policy.name}")
            with told(f"inserting {policy.name}"):
                program = insert(captured, self.sites, policy, read_weights(weights), model_facts(config), observe)
            if self.reference is not None:
                progress("proving the whole")
                with told("proving the whole by running it"):
                    captured.proof.whole = prove_whole(program, captured, self.reference)
        program.proof = captured.proof.as_dict() if captured.proof is not None else None
        captured.before = captured.stand_ins = None
        return program


def compile_captured(
    captured: Captured,
    policy: Policy | Callable[[list[AttentionSite]], Policy],
    weights: Weights,
    config: Any,
    observe: Observer | None,
    progress: Progress,
    check: str = "full",
) -> Program:
    """Runs the passes over a captured graph and proves the result; `transform` documents the arguments.

    policy: a policy, or what chooses one once the sites are known.
    """
    found = Canonical(captured, observe, progress, check)
    chosen = policy if isinstance(policy, Policy) else policy(found.sites)
    return found.program(chosen, weights, config, observe, progress)


@contextmanager
def _float32() -> Iterator[None]:
    """Sets torch's default dtype to float32: passes evaluate parts of a graph on numbers that they make up. Python's collector
    waits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with no_collection():
            yield
    finally:
        torch.set_default_dtype(before)


def find_sites(captured: Captured, observe: Observer | None) -> list[AttentionSite]:
    """Returns every attention site of a captured graph and makes the graph canonical."""
    with _float32():
        return canonical(captured, observe)
