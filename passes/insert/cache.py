"""Turns attention over a whole sequence into attention over a bounded, paged cache that is an input of the graph.

Requires the canonical graph with positions lifted, each attention node carrying its `AttentionSite`. Ensures that every
site reads its cache with `cached_attention` (or `latent_attention`), that every owner of keys and values updates it
once, after its last reader (so that at most one layer's new keys and values are alive), and that the logits are
computed only where they are asked for. Runs last: graph matchers refuse to cross mutating ops.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import fx

from kvrewrite.capture.captured import Captured
from kvrewrite.errors import OptionError
from kvrewrite.ir.fx import (
    arg,
    erase_dead,
    named_args,
    op_args,
    output_node,
    placeholder,
)
from kvrewrite.ir.layout import (
    CacheClass,
    CacheLayout,
    InputMaker,
    PoolShapes,
    Quantize,
    Rotary,
    State,
    call_inputs,
    class_inputs,
    pool_shapes,
)
from kvrewrite.ir.site import AttentionSite
from kvrewrite.kernels.quantized.scheme import Scheme
from kvrewrite.passes.canonical.find_rope import Rope, canonical_layout
from kvrewrite.passes.insert.carried_state import carry_states
from kvrewrite.passes.insert.devices import site_devices
from kvrewrite.passes.insert.latent import Absorbed
from kvrewrite.passes.insert.logits import logits_at
from kvrewrite.passes.insert.policy import PolicyWriter, insert_score
from kvrewrite.passes.insert.rotary_inputs import add_length_inputs, add_rotary_inputs
from kvrewrite.passes.insert.site_nodes import SiteNodes
from kvrewrite.policies.base import Policy

aten = torch.ops.aten
ops = torch.ops.kvrewrite


def site_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The canonical attention nodes in order."""
    return [n for n in gm.graph.nodes if n.target is ops.attention.default]


def insert_cache(captured: Captured, policy: Policy, ropes: dict[int, Rope]) -> CacheLayout:
    """Rewrites the graph in place and returns the layout that the runtime needs.

    ropes: rotation per site, used when the policy wants contiguous positions.
    """
    gm = captured.graph
    nodes = site_nodes(gm)
    sites: list[AttentionSite] = [n.meta["kvrewrite_site"] for n in nodes]
    contiguous = policy.positions == "contiguous"
    devices = site_devices(gm, captured.devices) if captured.devices else {}
    classes, where = _classes(nodes, sites, devices)
    policy.check_layers(len(where))
    scheme = _scheme(policy, sites)
    add = InputMaker(gm)
    pools = [pool_shapes(c.k_dim, c.v_dim, captured.dtype, scheme) for c in classes]
    inputs = _control_inputs(add, classes, pools, contiguous, policy)
    rotary: list[Rotary] = []
    tables = add_rotary_inputs(gm, captured, ropes, rotary, add) if contiguous or policy.needs_rotary else {}
    shared = _Shared(captured, sites, policy, inputs, list(pools[0]), scheme, add)
    owners: dict[int, dict[str, Any]] = {}
    for node, site in zip(nodes, sites, strict=True):
        owner = site.layer if site.shares_kv_with is None else site.shares_kv_with
        if owner not in owners:
            cache = _open_cache(gm, node, inputs, where[owner], ropes if contiguous else {}, tables, shared)
            cache.update(site=site, rotary=tables.get(site.layer, (None, None, None)))
            owners[owner] = cache
            if policy.recalls and policy.has_memory(site):
                shared.writer.write(policy.ask, shared.site_nodes(cache, named_args(node)), node)
            if policy.gates:
                cache["hidden"] = shared.writer.write(policy.gate, shared.site_nodes(cache, named_args(node)), node)
                site.inserted.append("gate")
        _read_cache(gm, node, site, inputs, owners[owner])
        if policy.recalls and policy.has_memory(site):
            _recall(policy, owners[owner], shared)
    for cache in owners.values():
        cache["span"] = _span([(r["window"], r["chunk"]) for r in cache["readers"]])
    carry_states(gm, inputs["valid"], shared.add_state)
    logits: fx.Node | None = None
    if policy.after_logits:
        logits = output_node(gm).args[0]  # type: ignore[assignment]
    last = logits
    if policy.shares_layers:
        last = _rate(policy, owners, shared)
    for cache in owners.values():
        last = _close_cache(policy, inputs, cache, shared, logits, last)
    logits_at(gm, inputs["logit_index"], captured.vocab_size, whole=policy.after_logits)
    lengths = add_length_inputs(gm, captured.rotary_tables, rotary, add)
    erase_dead(gm)
    gm.graph.lint()
    gm.recompile()
    return CacheLayout(
        classes=classes,
        contiguous=contiguous,
        rotary=rotary,
        length_tables=lengths,
        states=list(shared.writer.memory.states.values()),
        row_inputs=policy.row_inputs,
        rewrites_slots=shared.rewrites_slots,
        ragged=policy.ragged,
        quantize=None if scheme is None else Quantize(scheme.kind, scheme.group, policy.quantize_residual),
        inputs=add.inputs,
    )


class _Shared:
    """What all sites share: graph inputs, states, and the policy's writer."""

    def __init__(
        self,
        captured: Captured,
        sites: list[AttentionSite],
        policy: Policy,
        inputs: dict[str, fx.Node],
        pools: list[str],
        scheme: Scheme | None,
        add: InputMaker,
    ):
        gm = captured.graph
        self.writer = PolicyWriter(gm, sites, policy, add, captured.max_positions)
        self.add, self.scheme, self.pools = add, scheme, pools
        self.tail = 0 if scheme is None else policy.quantize_residual + scheme.group
        self.dtype = str(captured.dtype).removeprefix("torch.")
        rows = ("positions", "valid", "recent", *policy.row_inputs)
        self.nodes: dict[str, fx.Node | None] = {n: inputs[n] for n in rows}
        self.nodes["input_ids"] = placeholder(gm, "input_ids")
        self.rewrites_slots = False  # whether scores of cached slots change while nothing is evicted

    def add_state(self, state: State) -> fx.Node:
        """A graph input that the cache carries from call to call; ops write to it."""
        self.writer.memory.states[state.name] = state
        return self.add(state.spec)

    def site_nodes(self, cache: dict[str, Any], attention: dict[str, Any], **more: fx.Node | None) -> SiteNodes:
        """What the policy sees of one site. attention: the arguments of its first reader; more: what only one hook sees."""
        known = {
            **self.nodes,
            **{n: cache[n] for n in (*self.pools, "table", "lens", "keep", "k_dense")},
            **more,
        }
        known |= {n: attention[n] for n in ("q", "k", "v")} | dict(zip(("cos", "sin", "partner"), cache["rotary"]))
        return SiteNodes(cache["site"], known, {**known, **cache, **attention}, cache.get("span", (0, 0)))


def _scheme(policy: Policy, sites: list[AttentionSite]) -> Scheme | None:
    """How keys and values are quantized; OptionError where a layer's can't be."""
    if policy.quantize == "none":
        return None
    scheme = Scheme(policy.quantize, policy.quantize_group)
    for site in sites:
        try:
            scheme.code_width(site.head_dim), scheme.code_width(site.v_head_dim)
        except ValueError as error:
            raise OptionError(
                f"{policy.name}: quantize={policy.quantize}, layer {site.layer} ({site.module}): {error}"
            ) from None
    if (
        isinstance(policy.budget, int)
        and policy.layer_budgets == "equal"
        and policy.budget < 2 * policy.quantize_residual
    ):
        warnings.warn(
            f"{policy.name}: of {policy.budget} slots the {policy.quantize_residual} newest stay in full precision "
            "(quantize_residual), so that little or no memory is saved; use a smaller quantize_residual",
            stacklevel=2,
        )
    return scheme


def _classes(
    nodes: list[fx.Node], sites: list[AttentionSite], devices: dict[int, str]
) -> tuple[list[CacheClass], dict[int, tuple[int, int]]]:
    """Groups the owning sites by the shape of their cache and its device; also site -> (class, index in it)."""
    classes: list[CacheClass] = []
    where: dict[int, tuple[int, int]] = {}
    for site in sites:
        if site.shares_kv_with is not None:
            continue
        kind = (site.kv_heads, site.head_dim, site.cached_v_dim, devices.get(site.layer))
        found = next((c for c in classes if (c.kv_heads, c.k_dim, c.v_dim, c.device) == kind), None)
        if found is None:
            found = CacheClass(*kind[:3], device=kind[3])
            classes.append(found)
        where[site.layer] = (classes.index(found), len(found.layers))
        found.layers.append(site.layer)
        # Readers that share this cache may look further back than its owner.
        readers = [s for s in sites if s.layer == site.layer or s.shares_kv_with == site.layer]
        window, chunk = _span([(s.window, s.chunk) for s in readers])
        found.windows.append(window or chunk)
    return classes, where


def _span(masks: list[tuple[int, int]]) -> tuple[int, int]:
    """The (window, chunk) outside which none of the readers looks; zeros where some reader looks at everything."""
    windows, chunks = zip(*masks)
    if all(windows):
        return max(windows), 0
    return (0, chunks[0]) if len(set(chunks)) == 1 else (0, 0)


def _control_inputs(
    add: InputMaker, classes: list[CacheClass], pools: list[PoolShapes], contiguous: bool, policy: Policy
) -> dict[str, fx.Node]:
    """Adds the inputs that every rewritten graph has; by name."""
    specs = call_inputs(contiguous, policy.row_inputs)
    for c, (spec, shapes) in enumerate(zip(classes, pools)):
        specs += class_inputs(c, spec, shapes, policy.ragged)
    return {spec.name: add(spec) for spec in specs}


def _open_cache(
    gm: fx.GraphModule,
    node: fx.Node,
    inputs: dict[str, Any],
    where: tuple[int, int],
    ropes: dict[int, Rope],
    tables: dict[int, tuple[fx.Node, fx.Node, fx.Node]],
    shared: _Shared,
) -> dict[str, Any]:
    """The views of one owner's cache, before its attention. where: its class, and its index in that."""
    site: AttentionSite = node.meta["kvrewrite_site"]
    cache_class, index = where
    pools = {name: inputs[f"{name}_{cache_class}"] for name in shared.pools}
    tails: dict[str, fx.Node] = {}
    if shared.scheme is not None:
        for name, dim in (("k_tail", site.head_dim), ("v_tail", site.v_head_dim)):
            shape = [site.kv_heads, shared.tail, dim]
            tails[name] = shared.add_state(State(f"{name}_{site.layer}", shape, shared.dtype, slots=True))
        tails["qlens"] = shared.add_state(State(f"qlens_{site.layer}", [site.kv_heads], "int32"))
    with gm.graph.inserting_before(node):
        views = {
            name: gm.graph.call_function(aten.select.int, (inputs[f"{name}_{cache_class}"], 0, index))
            for name in ("table", "lens", "keep", "spare", "next_table")
            if f"{name}_{cache_class}" in inputs
        }
        k, v = arg(node, "k"), arg(node, "v")
        cache: dict[str, Any] = {**pools, **views, **tails, "k": k, "v": v, "readers": []}
        if site.latent_cached:  # a value is the first channels of its key
            cache["v"] = gm.graph.call_function(aten.slice.Tensor, (k, 3, 0, 0))
        cache.update(hidden=None, floor=inputs.get(f"floor_{cache_class}"), k_dense=None, k_raw=None, v_dense=None)
        if shared.scheme is not None:
            scheme, stored = (shared.scheme.kind, shared.scheme.group), (views["table"], tails["qlens"])
            cache["k_raw"], cache["v_dense"] = (
                gm.graph.call_function(
                    ops.read_quantized.default,
                    (pools[f"{x}_pages"], pools[f"{x}_params"], tails[f"{x}_tail"], *stored, *scheme, x == "v"),
                )
                for x in "kv"
            )
            cache["k_dense"] = cache["k_raw"]
            site.inserted.append("dequantize")
        rope = ropes.get(site.layer)
        if rope is not None:
            cos, sin, partner = tables[site.layer]
            cache["k"] = canonical_layout(gm.graph, rope.pre, rope.layout)
            positions = gm.graph.call_function(
                ops.slot_rotary.default,
                (
                    pools["pos_pages"],
                    views["table"],
                    views["lens"],
                    inputs["following"],
                    inputs["renew"],
                    inputs["span"],
                ),
            )
            raw = cache["k_raw"]
            if raw is None:
                raw = gm.graph.call_function(ops.read_pages.default, (pools["k_pages"], views["table"]))
            cache["k_dense"] = gm.graph.call_function(ops.rotate.default, (raw, cos, sin, positions, partner))
            site.inserted.append("rotate cached keys")
    return cache


def _read_cache(
    gm: fx.GraphModule, node: fx.Node, site: AttentionSite, inputs: dict[str, Any], cache: dict[str, Any]
) -> None:
    """Replaces one canonical attention node by attention on [cache, new tokens]."""
    args = named_args(node)
    reader = dict(args)
    args |= {name: cache[name] for name in ("k_pages", "v_pages", "pos_pages", "table", "lens")}
    args |= {name: inputs[name] for name in ("positions", "valid")}
    replaced = node
    absorbed: Absorbed | None = node.meta.get("kvrewrite_latent")
    target: Any = ops.cached_attention.default
    if absorbed is not None:
        replaced, target = absorbed.out, ops.latent_attention.default
        del args["v"]
        args |= {"q": absorbed.q, "up_k": absorbed.up_k, "up_v": absorbed.up_v, "rows": absorbed.rows}
    else:
        args |= {name: cache[name] for name in ("k_dense", "v_dense", "hidden")}
    with gm.graph.inserting_before(node):
        pair = gm.graph.call_function(target, op_args(target, **args))
        out = gm.graph.call_function(operator.getitem, (pair, 0))
        lse = gm.graph.call_function(operator.getitem, (pair, 1))
    pair.meta.update(kvrewrite_site=site, nn_module_stack=node.meta.get("nn_module_stack"))
    out.meta["val"] = replaced.meta.get("val")
    replaced.replace_all_uses_with(out)
    site.inserted.insert(0, "cached_attention" if absorbed is None else "latent_attention")
    cache["readers"].append({**reader, "lse": lse})
    cache["last"] = lse
    if replaced is not node:
        gm.graph.erase_node(replaced)
    gm.graph.erase_node(node)


def _recall(policy: Policy, cache: dict[str, Any], shared: _Shared) -> None:
    """Attention to the memory, after that to the cache, whose result it takes over."""
    lse = cache["last"]
    out, following, reader = lse.prev, lse.next, cache["readers"][-1]
    nodes = shared.site_nodes(cache, reader, out=out, lse=lse)
    both = shared.writer.write(policy.recall, nodes, following)
    both.meta["val"] = out.meta.get("val")
    out.replace_all_uses_with(both, delete_user_cb=lambda user: user.target is not ops.recall.default)
    cache["site"].inserted.append("recall")


def _entering(gm: fx.GraphModule, before: fx.Node, at: tuple[fx.Node, ...], kv_heads: int) -> list[fx.Node]:
    """Positions, number and flags of the tokens that an update takes, with those of repetitions left out. at: the inputs
    of `entering`."""
    with gm.graph.inserting_before(before):
        found = gm.graph.call_function(ops.entering.default, (*at, kv_heads))
        return [gm.graph.call_function(operator.getitem, (found, i)) for i in range(3)]


def _rate(policy: Policy, owners: dict[int, dict[str, Any]], shared: _Shared) -> fx.Node:
    """What layers that share one budget are worth, each after its attention; returns a node after all of them."""
    place = {node: i for i, node in enumerate(shared.writer.memory.gm.graph.nodes)}
    ends = []
    for cache in owners.values():
        following = cache["last"].next
        shared.writer.write(policy.rate, shared.site_nodes(cache, cache["readers"][0]), following)
        ends.append((place[cache["last"]], following.prev))
    return max(ends, key=lambda end: end[0])[1]


def _close_cache(
    policy: Policy,
    inputs: dict[str, Any],
    cache: dict[str, Any],
    shared: _Shared,
    logits: fx.Node | None,
    last: fx.Node | None,
) -> fx.Node:
    """Scores and updates one owner's cache after its last reader, or after `last` where scores need the logits or what
    all layers are worth. Returns the update."""
    site = cache["site"]
    waits = policy.after_logits or policy.shares_layers
    following = (last if waits and last else cache["last"]).next
    scores = insert_score(shared.writer, shared.site_nodes(cache, cache["readers"][0], logits=logits), following)
    shared.rewrites_slots |= scores.slots is not None
    window, chunk = cache["span"]
    args: dict[str, Any] = {name: cache[name] for name in ("k", "v", *shared.pools, "table", "lens", "floor")}
    args |= {name: inputs[name] for name in ("positions", "valid", "recent")}
    args |= {name: cache.get(name) for name in ("spare", "next_table")}
    dropped = cache["hidden"]
    if policy.repeats_prompt:
        at = (inputs["positions"], inputs["valid"], inputs["repeat_ends"])
        args["positions"], args["valid"], dropped = _entering(shared.writer.memory.gm, following, at, site.kv_heads)
    args |= {
        "new_scores": scores.new,
        "slot_scores": scores.slots,
        "rotary": inputs["position_ids"],
        "keep": cache["keep"] if scores.keep is None else scores.keep,
        "sinks": policy.sinks,
        "window": window,
        "chunk": chunk,
        "select": scores.select,
        "drop": dropped,
        "threshold": shared.add_state(State(f"merge_{site.layer}", [], "float32", fill="nan"))
        if policy.merge
        else None,
    }
    update = ops.cache_update.default
    if shared.scheme is not None:
        update = ops.cache_update_quantized.default
        args |= {"kind": shared.scheme.kind, "group": shared.scheme.group}
        args |= {name: cache[name] for name in ("k_tail", "v_tail", "qlens")}
        # Where the update waits for other layers, what was dequantized for attention would wait in all of them.
        args |= (
            {"k_cached": None, "v_cached": None}
            if waits
            else {"k_cached": cache["k_raw"], "v_cached": cache["v_dense"]}
        )
    with shared.writer.memory.gm.graph.inserting_before(following):
        node = shared.writer.memory.gm.graph.call_function(update, op_args(update, **args))
    site.inserted.append("cache_update")
    return node
