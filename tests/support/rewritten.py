"""Rewritten tiny models for tests: every family is captured once per process, every (policy, options) is made once."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from kvrewrite import policies
from kvrewrite.capture import export
from kvrewrite.capture.attention_interface import is_transformers_model
from kvrewrite.capture.captured import Captured
from kvrewrite.capture.frontend import capture
from kvrewrite.compiler import model_facts
from kvrewrite.ir.fx import set_attr
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.pipeline import canonical, expected_weights, insert
from kvrewrite.runtime.foreign_config import foreign_config
from kvrewrite.runtime.model import RewrittenModel
from tests.support.foreign import FOREIGN, make_foreign
from tests.support.zoo import make

HIDDEN = 24  # of random retaining heads


def ours() -> list[type[policies.Policy]]:
    """The policies of this repository, without those that tests and examples register."""
    return [p for p in policies.POLICIES.values() if p.__module__.startswith("kvrewrite.policies.")]


def build(name: str) -> nn.Module:
    """A tiny model. Fresh weights attend to all tokens alike, which hides mistakes in scores; so queries and keys grow."""
    model = make_foreign(name) if name in FOREIGN else make(name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(8)
    return model


@functools.cache
def original(name: str) -> nn.Module:
    """The unmodified model. Tests must leave it as it is."""
    return build(name)


def traced_once(model: nn.Module) -> Captured:
    """A module as `capture` gives it, without two further traces, of one token and of one row: only `pipeline.canonical` looks
    at what they found, so that tests of single passes need not wait for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "why_not_single", lambda *_: None)
        return capture(model)


@functools.cache
def _traced(name: str) -> Captured:
    return capture(original(name))


def traced(name: str) -> Captured:
    """A family as `capture` gives it, to be changed by the test; traced once."""
    source = _traced(name)
    copied, _ = fork(source)
    for attribute in ("aliases", "persistent", "rotary_tables", "devices"):
        setattr(copied, attribute, copy.copy(getattr(source, attribute)))
    return copied


@functools.cache
def captured(name: str) -> Captured:
    """The canonical graph of a family."""
    found = traced(name)
    canonical(found)
    return found


def fork(source: Captured) -> tuple[Captured, list[AttentionSite]]:
    """A copy to insert a policy into; parameters are shared."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(source.graph.graph, {}))
    gm = fx.GraphModule(source.graph, graph)
    sites = []
    for node in gm.graph.nodes:
        if "kvrewrite_site" in node.meta:
            node.meta["kvrewrite_site"] = copy.deepcopy(node.meta["kvrewrite_site"])
            sites.append(node.meta["kvrewrite_site"])
    return dataclasses.replace(source, graph=gm), sites


def own(name: str) -> tuple[nn.Module, Captured]:
    """A family whose parameters a test may change: a model, and the canonical graph with that model's parameters."""
    model = build(name)
    found, _ = fork(captured(name))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for node in found.graph.graph.find_nodes(op="get_attr"):
        if node.target in parameters:
            set_attr(found.graph, node.target, parameters[node.target])
    return model, found


def rewrite(model: nn.Module, source: Captured, policy: str, weights: dict[str, Tensor] | None, **options: Any) -> Any:
    """What `kvrewrite.transform` does, with a capture that is there already. weights None: random ones."""
    copied, sites = fork(source)
    config = getattr(model, "config", None)
    chosen = policies.make(policy, **options)
    if weights is None and chosen.needs_weights:
        generator = torch.Generator().manual_seed(7)
        if hasattr(chosen, "hidden_size"):
            chosen = dataclasses.replace(chosen, hidden_size=HIDDEN)
        elif hasattr(chosen, "gate_heads") and not options.get("gate_heads"):
            chosen = dataclasses.replace(chosen, gate_heads=2, gate_dim=8)
        shapes = expected_weights(copied, sites, chosen)
        weights = {n: torch.randn(s, generator=generator) / s[-1] ** 0.5 for n, s in shapes.items()}
        if policy == "duo_attention" and not options.get("heads"):
            heads = [s.kv_heads for s in sites if s.shares_kv_with is None]
            weights = {"full_attention_heads": torch.rand(len(heads), heads[0], generator=generator)}
    program = insert(copied, sites, chosen, (weights, {}) if weights is not None else None, model_facts(config))
    if not is_transformers_model(model):
        return RewrittenModel(program, foreign_config(program, type(model).__name__), source=model)
    return RewrittenModel(program, config, model.generation_config, source=model)  # type: ignore[arg-type]


@functools.cache
def rewritten(name: str, policy: str, **options: Any) -> Any:
    """A family with a policy; raises what the compiler raises when it refuses."""
    return rewrite(original(name), captured(name), policy, None, **options)


def logits(model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits of an original model, without a cache."""
    if is_transformers_model(model):
        kwargs["use_cache"] = False
    with torch.no_grad():
        out = model(ids, **kwargs)
    return out if isinstance(out, Tensor) else out.logits
