"""Builds the training graph of Attention-Gates: the canonical graph with gates where sites own keys, and no cache.

A gate's nodes are those that the policy inserts for inference (`AttentionGate.probability`). The differences: the
gate's own attention sees the whole text at once, flags become straight-through gates, and attention has gradients
(`gated_attention`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint as checkpoint_of

from kvrewrite.capture.captured import Captured
from kvrewrite.errors import InputError, OptionError
from kvrewrite.ir.fx import erase_dead, get_attr, output_node, placeholder, set_attr
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.insert.cache import site_nodes
from kvrewrite.passes.insert.logits import logits_at
from kvrewrite.passes.insert.policy import PolicyWriter
from kvrewrite.passes.insert.site_nodes import SiteNodes
from kvrewrite.passes.pipeline import expected_weights
from kvrewrite.policies.attention_gate import AttentionGate
from kvrewrite.policies.site import PREFIX
from kvrewrite.tools.training import gated_attention  # noqa: F401  (registers the op)
from kvrewrite.tools.training.heads_graph import TrainingSite

ops = torch.ops.kvrewrite


# --------------------------------------------------------------------------------------------------- what the graph
# calls
def attend_to_all(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Computes the gate's causal attention over a whole text, like `kvrewrite::gate`: (B, T, heads * d) each, in
    fp32."""
    b, t, width = q.shape
    q, k, v = (x.float().view(b, t, heads, width // heads).transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).reshape(b, t, width)


def straight_through(p: Tensor, positions: Tensor, gated: Tensor, threshold: float, start: int) -> Tensor:
    """Returns gates m (B, Hkv, T): 1 if p > threshold, else 0, with the gradient of p; 1 without a gradient for the
    first `start` positions and where `gated` (B, T) is not set."""
    hard = (~(p <= threshold)).to(p.dtype)
    may = (positions >= start) & gated
    return torch.where(may[:, None], hard + (p - p.detach()), 1.0)


# ----------------------------------------------------------------------------------------------------------- the graph
def insert_gates(
    captured: Captured, sites: list[AttentionSite], policy: AttentionGate, weights: Mapping[str, Tensor], flip: bool
) -> fx.GraphModule:
    """Turns a canonical graph, in place, into (input_ids, position_ids, gated, index) -> (logits, gates).

    weights: from `initial_weights` or a file; they become trainable fp32 parameters `policy_weights.<name>`. gated (B,
    T) bool: tokens that a gate may drop; index (B, K): tokens whose logits are needed, (B, K, vocabulary). gates: one
    (B, Hkv, T) fp32 per site that owns keys, in order. flip: see `gated_attention`.
    """
    gm = captured.graph
    position_ids = placeholder(gm, "position_ids")
    nodes: dict[str, fx.Node] = {}
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    for name in ([] if position_ids is not None else ["position_ids"]) + ["gated", "index"]:
        with gm.graph.inserting_after(last):
            last = nodes[name] = gm.graph.placeholder(name)
    positions = position_ids if position_ids is not None else nodes["position_ids"]
    writer = PolicyWriter(gm, sites, policy, make_site=TrainingSite)
    for name, tensor in weights.items():
        set_attr(gm, PREFIX + name, nn.Parameter(tensor.detach().float().clone()))
    gates: dict[int, fx.Node] = {}
    for node, site in zip(site_nodes(gm), sites, strict=True):
        q, k, v, *rest = node.args
        owner = site.layer if site.shares_kv_with is None else site.shares_kv_with
        if owner not in gates:
            seen = {"q": q, "k": k, "v": v}
            own = writer.write(policy.projections, SiteNodes(site, seen), node)
            with gm.graph.inserting_before(node):
                seen["attended"] = gm.graph.call_function(attend_to_all, (*own, policy.gate_heads))
            p = writer.write(lambda s: policy.probability(s, s.input("attended")), SiteNodes(site, seen), node)
            where = (positions, nodes["gated"], policy.threshold, policy.start)
            with gm.graph.inserting_before(node):
                gates[owner] = gm.graph.call_function(straight_through, (p, *where))
        with gm.graph.inserting_before(node):
            pair = gm.graph.call_function(ops.gated_attention.default, (q, k, v, gates[owner], *rest, flip))
            out = gm.graph.call_function(operator.getitem, (pair, 0))
        out.meta["val"] = node.meta.get("val")
        pair.meta["kvrewrite_site"] = site
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)
    logits_at(gm, nodes["index"], captured.vocab_size)
    output = output_node(gm)
    output.args = ((output.args[0], tuple(gates.values())),)
    erase_dead(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def initial_weights(
    captured: Captured, sites: list[AttentionSite], policy: AttentionGate, *, bias: float, seed: int
) -> dict[str, Tensor]:
    """Returns weights of gates that first keep all tokens: W_o is small and the bias gives p = sigmoid(bias)."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in expected_weights(captured, sites, policy).items():
        if name.endswith("bias"):
            found[name] = torch.full(shape, float(bias))
            continue
        scale = (0.1 if ".o_proj." in name else 1.0) / shape[-1] ** 0.5
        found[name] = torch.randn(shape, generator=generator) * scale
    return found


class GatedModel(nn.Module):
    """A captured model with gates, for training. The backbone's parameters are the model's own, never copies.

    owners: the sites that have a gate, in the order of `forward`'s gates. flip: see `gated_attention`. checkpoint:
    keeps only the tensors between layers for the backward pass and recomputes the rest.
    """

    def __init__(
        self,
        captured: Captured,
        sites: list[AttentionSite],
        policy: AttentionGate,
        weights: Mapping[str, Tensor],
        *,
        flip: bool = True,
        checkpoint: bool = False,
    ):
        super().__init__()
        if not policy.gate_heads or not policy.gate_dim:
            raise OptionError("attention_gate: training needs gate_heads and gate_dim")
        self.policy, self.sites = policy, sites
        self.owners = [s for s in sites if s.shares_kv_with is None]
        self.dtype, self.vocab_size = captured.dtype, captured.vocab_size
        expected = expected_weights(captured, sites, policy)
        if wrong := sorted(
            n for n in {*expected, *weights} if n not in weights or tuple(weights[n].shape) != expected.get(n)
        ):
            raise OptionError(
                f"the gates' weights do not fit this model: {', '.join(wrong[:8])}; expected weights trained on it"
            )
        # Frequencies that change with the length stay those of short texts here.
        self.longest = min((t.threshold for t in captured.rotary_tables), default=captured.max_positions)
        device = next(captured.graph.parameters()).device
        self.gate_names = sorted(expected)
        self.graph = insert_gates(captured, sites, policy, {n: weights[n].to(device) for n in expected}, flip)
        self.checkpoint = checkpoint
        self._parts: list[tuple[torch.device, fx.GraphModule]] = []  # not a submodule: its parameters are the graph's
        self.names = [str(n.target) for n in self.graph.graph.nodes if n.op == "placeholder"]

    def gate_weights(self) -> dict[str, nn.Parameter]:
        """Returns the gates' parameters by their names in the file that inference reads."""
        return {name: get_attr(self.graph, PREFIX + name) for name in self.gate_names}

    def forward(
        self, input_ids: Tensor, gated: Tensor | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns logits (B, K, vocabulary) of the tokens `index` (B, K), and the gates (B, Hkv, T) of each owner.

        input_ids: (B, T), rows left-aligned: no token sees what comes after a row's end. gated: (B, T) bool, default
        all: tokens that a gate may drop. index: default all tokens.
        """
        arguments = self.arguments(input_ids, gated, index)
        if self.checkpoint and torch.is_grad_enabled():
            logits, gates = _Checkpointed(self._chain(input_ids.device)).run(*arguments)
        else:
            logits, gates = self.graph(*arguments)
        return logits, list(gates)

    def _chain(self, device: torch.device) -> fx.GraphModule:
        """Returns the graph in parts; rebuilds them if the model has moved, because moving changes the graph's
        buffers."""
        if not self._parts or self._parts[0][0] != device:
            self._parts = [(device, _cut(self.graph))]
        return self._parts[0][1]

    def arguments(self, input_ids: Tensor, gated: Tensor | None, index: Tensor | None) -> list[Tensor]:
        """Returns the graph's arguments; parameters as in `forward`."""
        b, t = input_ids.shape
        if self.longest is not None and t > self.longest:
            raise InputError(
                f"texts of {t} tokens are too long to train this model's gates on; expected at most {self.longest} (its "
                "positions, or the length from which on its rotary frequencies change)"
            )
        every = torch.arange(t, device=input_ids.device).expand(b, t)
        given = {
            "input_ids": input_ids,
            "position_ids": every,
            "gated": torch.ones_like(input_ids, dtype=torch.bool) if gated is None else gated,
            "index": every if index is None else index,
        }
        return [given[name] for name in self.names]


def _cut(gm: fx.GraphModule) -> fx.GraphModule:
    """Cuts the graph into a chain of modules, each from one attention to the next."""
    home, homes = 0, {}
    for node in gm.graph.nodes:
        home += node.target is ops.gated_attention.default
        homes[node] = home
    return split_module(gm, gm, homes.__getitem__, keep_original_order=True)  # type: ignore[arg-type]


class _Checkpointed(fx.Interpreter):
    """Runs such a chain; keeps nothing inside a module for the backward pass."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        part = self.module.get_submodule(target)
        return checkpoint_of(part, *args, use_reentrant=False, preserve_rng_state=False)


class _Recorder(fx.Interpreter):
    """Runs the training graph and records the size of the gates' values."""

    def __init__(self, graph: fx.GraphModule, real: Tensor):
        super().__init__(graph)
        self.real, self.sizes = real, []  # type: ignore[var-annotated]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is attend_to_all:
            self.sizes.append(args[2][self.real].float().square().mean().sqrt())
        return super().call_function(target, args, kwargs)


@torch.no_grad()
def calibrate(model: GatedModel, input_ids: Tensor, real: Tensor, *, spread: float = 0.4, seed: int = 0) -> None:
    """Sets the initial weights of fresh gates from the layers' inputs on one batch (B, T).

    Random projections of a layer's input are as large as the input, which differs by orders of magnitude between
    models, and an untrained attention averages over the text, so that a gate would treat all tokens alike. So
    projections are scaled to unit size; queries and keys are first the same, and so large that a token attends mostly
    to itself (log T + 3 above the others); and W_o gives the logits of p a standard deviation of `spread`.
    """
    recorder = _Recorder(model.graph, real)
    recorder.run(*model.arguments(input_ids, torch.zeros_like(real), torch.zeros_like(input_ids[:, :1])))
    weights, policy = model.gate_weights(), model.policy
    assert policy.gate_heads and policy.gate_dim
    generator = torch.Generator().manual_seed(seed)
    alike = (math.log(input_ids.shape[1]) + 3) / policy.gate_dim**0.5
    for site, size in zip(model.owners, recorder.sizes, strict=True):
        if not torch.isfinite(size) or size == 0:
            raise InputError(
                f"layer {site.layer} ({site.module}): its input is {float(size)} in size, so gates can't be trained"
            )
        q, k, v, o = (weights[policy.weight_name(site, f"{x}_proj.weight")] for x in "qkvo")
        v.div_(size)
        q.mul_(alike**0.5 / size)
        k.copy_(q)
        o.copy_(torch.randn(o.shape, generator=generator) * spread / o.shape[1] ** 0.5)


__all__ = ["GatedModel", "attend_to_all", "calibrate", "initial_weights", "insert_gates", "straight_through"]
