"""From a captured graph to a program: passes, policy weights and the proof of the whole.

`transform`, `convert`, `inspect` and the torch.compile backend all compile through here.
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
    """No progress."""


def model_facts(config: Any) -> dict[str, Any]:
    """What policies may ask of a model's configuration."""
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            return {"activation": value}
    return {}


def read_weights(weights: Weights) -> tuple[Mapping[str, Tensor], Mapping[str, str]] | None:
    """Policy weights and their metadata, from a file where they are one."""
    if weights is None:
        return None
    if isinstance(weights, (str, Path)):
        from kvrewrite.artifact.policy_weights import read_policy_weights

        return read_policy_weights(weights)
    return weights, {}


def compile_captured(
    captured: Captured,
    policy: Policy,
    weights: Weights,
    config: Any,
    observe: Observer | None,
    progress: Progress,
    check: str = "full",
) -> Program:
    """Runs the passes over a captured graph and proves the result; `transform` says what the arguments are."""
    from kvrewrite.runtime.translation import prove_whole, reference_logits

    progress("finding attention and proving it" if check != "off" else "finding attention")
    with _float32():
        sites = canonical(captured, observe, check)
        reference = reference_logits(captured) if check == "full" else None
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
    """torch's own default dtype, whatever the caller's is: passes run parts of a graph on numbers that they make up."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def find_sites(captured: Captured, observe: Observer | None) -> list[AttentionSite]:
    """Every attention site of a captured graph, which becomes canonical."""
    with _float32():
        return canonical(captured, observe)
