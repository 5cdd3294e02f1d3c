"""Compiles a captured graph to a program: runs the passes, adds the policy weights and proves the result.

`transform`, `convert`, `inspect` and the torch.compile backend all compile with this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.program import Program
from kvrewrite.ir.site import AttentionSite
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
    from kvrewrite.runtime.translation import prove_whole, reference_logits

    progress("finding attention and proving it" if check != "off" else "finding attention")
    with _float32():
        sites = canonical(captured, observe, check)
        reference = reference_logits(captured) if check == "full" else None
        if not isinstance(policy, Policy):
            policy = policy(sites)
        progress(f"inserting {policy.name}")
        program = insert(captured, sites, policy, read_weights(weights), model_facts(config), observe)
        if reference is not None:
            progress("proving the whole")
            captured.proof.whole = prove_whole(program, captured, reference)
    program.proof = captured.proof.as_dict() if captured.proof is not None else None
    captured.before = captured.stand_ins = None
    return program


@contextmanager
def _float32() -> Iterator[None]:
    """Sets torch's default dtype to float32: passes evaluate parts of a graph on numbers that they make up."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def find_sites(captured: Captured, observe: Observer | None) -> list[AttentionSite]:
    """Returns every attention site of a captured graph and makes the graph canonical."""
    with _float32():
        return canonical(captured, observe)
