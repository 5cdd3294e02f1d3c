"""The compiler's passes in their fixed order.

    capture -> normalize -> find_attention + canonicalize -> carry_state -> check -> lift_positions -> (cache_latent)
    -> insert_policy + insert_cache -> place, where parameters lie on several devices

cache_latent is there where a policy asks for it (mla=latent).

Each pass says in its module what it requires and ensures; none is skipped on error and none misses in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.errors import OptionError, UnsupportedModelError
from kvrewrite.ir.evaluate import StandIns
from kvrewrite.ir.fx import named_args, placeholder
from kvrewrite.ir.pass_log import PassLog
from kvrewrite.ir.program import Program
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.canonical.both_graphs import Snapshot
from kvrewrite.passes.canonical.canonicalize import canonicalize, check_no_scores
from kvrewrite.passes.canonical.carry_state import carry_state
from kvrewrite.passes.canonical.check import check as check_mixing
from kvrewrite.passes.canonical.find_latent import Latent, find_latent
from kvrewrite.passes.canonical.find_rope import NoRope, Rope, find_rope
from kvrewrite.passes.canonical.lift_positions import lift_positions, limit_positions
from kvrewrite.passes.canonical.normalize import normalize
from kvrewrite.passes.canonical.proof import require_check
from kvrewrite.passes.canonical.validate import validate
from kvrewrite.passes.insert.cache import insert_cache, site_nodes
from kvrewrite.passes.insert.devices import place
from kvrewrite.passes.insert.embeds import embedded_node
from kvrewrite.passes.insert.latent import cache_latent
from kvrewrite.passes.insert.policy import PolicyWriter, attach_weights
from kvrewrite.passes.insert.site_nodes import SiteNodes
from kvrewrite.policies import Policy
from kvrewrite.policies.site import PREFIX
from kvrewrite.policies.weights import check_policy_weights

Observer = Callable[[str, fx.GraphModule], None]


def canonical(captured: Captured, observe: Observer | None = None, check: str = "full") -> list[AttentionSite]:
    """Runs everything up to the canonical graph, in place, and returns the sites found; policy-independent.

    check: what is proved by running (`passes/canonical/validate.py`): "full", "sites" or "off". What was proved is left in
    `captured.proof`.
    """
    require_check(check)
    passes = PassLog()

    def step(name: str) -> None:
        captured.graph.graph.lint()
        passes.done(name, captured.graph, timed=name != "capture")  # which ran before this function
        if observe is not None:
            observe(name, captured.graph)
            passes.restart()

    step("capture")
    normalize(captured)
    step("normalize")
    before = Snapshot(captured) if check != "off" else None
    sites = canonicalize(captured)
    if captured.why_not:
        raise UnsupportedModelError(captured.why_not)
    step("canonicalize")
    carry_state(captured)
    step("carry_state")
    check_mixing(captured, sites)
    check_no_scores(captured)
    lift_positions(captured)
    limit_positions(captured)
    step("lift_positions")
    if before is not None:
        captured.stand_ins, captured.before = StandIns(), before
        captured.proof = validate(captured, before, captured.stand_ins, check)
        step("validate")
    ropes = find_ropes(captured)
    for site, node in zip(sites, site_nodes(captured.graph), strict=True):
        found = ropes[site.layer]
        site.rope = isinstance(found, Rope) or found.rotated
        latent = find_latent(captured, node)
        if isinstance(latent, Latent):
            site.latent, site.latent_rotary = latent.rank, latent.rotary_dim
    return sites


def find_ropes(captured: Captured) -> dict[int, Rope | NoRope]:
    """The rotation of each site's keys, or why there is none that can be used."""
    position_ids = placeholder(captured.graph, "position_ids")
    found: dict[int, Rope | NoRope] = {}
    known: dict[Any, Rope] = {}
    for node in site_nodes(captured.graph):
        site: AttentionSite = node.meta["kvrewrite_site"]
        key: fx.Node = node.args[1]  # type: ignore[assignment]
        found[site.layer] = find_rope(captured.graph, key, site.kv_heads, position_ids, captured.max_positions, known)
    return found


def expected_weights(captured: Captured, sites: list[AttentionSite], policy: Policy) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the policy weights for this model."""
    writer = PolicyWriter(captured.graph, sites, policy)
    found: dict[str, tuple[int, ...]] = {}
    for site, node in zip(sites, site_nodes(captured.graph), strict=True):
        if site.shares_kv_with is None:
            found |= writer.expected_weights(SiteNodes(site, named_args(node)))
    return found


def insert(
    captured: Captured,
    sites: list[AttentionSite],
    policy: Policy,
    weights: tuple[Mapping[str, Tensor], Mapping[str, str]] | None = None,
    facts: dict[str, Any] | None = None,
    observe: Observer | None = None,
) -> Program:
    """Inserts a policy and a cache into a canonical graph, in place.

    weights: (tensors, metadata) of the policy weights. facts: what policies may ask of the model's config ("activation").
    Raises OptionError where the policy does not fit the model, PolicyWeightsError where the weights do not.
    """
    passes = PassLog()
    facts = {**(facts or {}), "vocab_size": captured.vocab_size}
    ropes = find_ropes(captured)
    # A layer without any rotation needs none; one whose rotation can't be replayed rules contiguous positions out.
    problems = {i: r for i, r in ropes.items() if isinstance(r, NoRope) and r.rotated}
    if problems:
        layer = min(problems)
        facts["rope_problem"] = f"layer {layer} ({sites[layer].module}): {problems[layer].reason}"
    if weights is not None:
        facts["policy_tensors"], facts["policy_metadata"] = weights
    policy = policy.adapt(sites, facts)
    if policy.weights_are_options:
        weights = None
    if policy.needs_rotary and "rope_problem" in facts:
        raise OptionError(f"{policy.name} needs the model's rotation: {facts['rope_problem']}")
    if policy.recalls and captured.devices:
        raise OptionError(
            f"{policy.name}: a memory belongs to one device, and this model lies on several; load it on one"
        )
    if policy.positions == "contiguous":
        if "rope_problem" in facts:
            raise OptionError(
                f"{policy.name}: positions=contiguous is not possible: {facts['rope_problem']}; use positions=original"
            )
        if not any(isinstance(r, Rope) for r in ropes.values()):
            raise OptionError(
                f"{policy.name}: positions=contiguous needs rotary embeddings, and this model has none (learned or no "
                "positions, ALiBi); use positions=original"
            )
    if policy.mla == "latent":
        cache_latent(captured, policy.name)
        passes.done("cache_latent", captured.graph)
        if observe is not None:
            observe("cache_latent", captured.graph)
    expected = expected_weights(captured, sites, policy)
    policy_names: list[str] = []
    if expected or weights is not None:
        tensors, metadata = weights if weights is not None else ({}, {})
        fitting = check_policy_weights(
            tensors, expected, metadata, policy=policy.name, model=model_fingerprint(sites), dtype=captured.dtype
        )
        policy_names = attach_weights(captured.graph, fitting)
    usable = {i: r for i, r in ropes.items() if isinstance(r, Rope)}
    layout = insert_cache(captured, policy, usable)
    if policy.repeats_prompt and (carried := [s.name for s in layout.states if s.carried]):
        raise UnsupportedModelError(
            f"{policy.name} reads the prompt a second time, and the model has layers whose state ({carried[0]}) would read "
            "the repetition, too; use a policy that reads it once (snapkv, expected_attention, keydiff)"
        )
    passes.done("insert_cache", captured.graph)
    if observe is not None:
        observe("insert_cache", captured.graph)
        passes.restart()
    if captured.devices:
        place(captured.graph, captured.devices, layout)
        passes.done("place", captured.graph)
        if observe is not None:
            observe("place", captured.graph)
    gm = captured.graph
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    extra = {n for n, _ in gm.named_buffers() if n.startswith(("rotary_tables.", "length_tables."))}
    extra |= {n for entry in layout.rotary for n in entry.constants}
    _drop_unused(gm, used | extra)
    names = {n for n, _ in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]}
    base = sorted(n for n in names if n in captured.persistent)
    return Program(
        graph=gm,
        sites=sites,
        layout=layout,
        policy={"name": policy.name, "options": policy.options()},
        dtype=str(captured.dtype).removeprefix("torch."),
        vocab_size=captured.vocab_size,
        max_positions=captured.max_positions,
        frontend=captured.frontend,
        base=base,
        policy_weights=sorted(policy_names),
        constants=sorted(names - set(base) - set(policy_names)),
        aliases=captured.aliases,
        embedded=embedded_node(gm),
    )


def model_fingerprint(sites: list[AttentionSite]) -> str:
    """The shapes that policy weights depend on, as text: which base models they fit."""
    return ";".join(f"{s.heads},{s.kv_heads},{s.head_dim},{s.v_head_dim}" for s in sites)


def _drop_unused(gm: fx.GraphModule, used: set[str]) -> None:
    """Removes parameters and buffers that no node reads."""
    for name in [n for n, _ in [*gm.named_parameters(), *gm.named_buffers()]]:
        if name not in used:
            *path, leaf = name.split(".")
            module: torch.nn.Module = gm.get_submodule(".".join(path))
            delattr(module, leaf)


__all__ = ["PREFIX", "canonical", "expected_weights", "find_ropes", "insert", "model_fingerprint"]
