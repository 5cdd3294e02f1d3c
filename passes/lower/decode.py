"""Lowering for single tokens, one per row: fused ops take the place of several, on a copy of the program that a device
runs.

Requires a graph after `insert_cache`; ensures the same results up to rounding. Attention with its mass comes from one
op, linears of the same input are one launch, and where ranks are frozen (`keys_rotated`) cached keys lie rotated in their
pages, so that nothing is rotated while decoding. Where ranks change with every token, attention rotates keys as it
reads them, and the update keeps ranks up to date. The saved program stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kvrewrite.ir.fx import arg, erase_dead, get_attr, is_op, named_args, op_args, set_args
from kvrewrite.passes.insert.latent import ABSORB, PROJECT
from kvrewrite.passes.lower.fuse_linears import fuse_linears
from kvrewrite.passes.lower.fuse_norms import fuse_norms
from kvrewrite.passes.lower.match import (
    END,
    cache_of,
    calls,
    lowered,
    replace,
    retaining_head,
    rotation,
    written_before,
)
from kvrewrite.passes.lower.prompt import fuse_reads, shares_or_merges

ops = torch.ops.kvrewrite
aten = torch.ops.aten


def lower_decode(gm: fx.GraphModule, keys_rotated: bool) -> fx.GraphModule:
    """A copy for single tokens."""
    latents = [_absorb_latents] if calls(gm, ops.latent_attention.default) else []
    steps = [
        _nothing_repeats,
        _use_rotated_keys if keys_rotated else fuse_reads,
        *latents,
        _ignore_flags,
        fuse_mass,
        take_the_only_row,
        _keep_pages,
        _fuse_updates,
        *([] if keys_rotated else [_rotate_keys_in_attention]),
        _fuse_linears,
        fuse_norms,
        erase_dead,
    ]
    return lowered(gm, "decode_rotated_" if keys_rotated else "decode_", steps)


def _nothing_repeats(gm: fx.GraphModule) -> None:
    """Where prompts are read twice, generated tokens are only added: they repeat nothing, and nothing goes."""
    again = calls(gm, ops.reconstruction.default)
    for node in again:
        node.replace_all_uses_with(arg(node, "stored"))
    for node in calls(gm, ops.entering.default):
        results: dict[Any, fx.Node] = {user.args[1]: user for user in node.users}
        for index, name in enumerate(("positions", "valid")):
            results[index].replace_all_uses_with(arg(node, name))
        for update in list(results[2].users):
            set_args(update, drop=None, slot_scores=None)
    for node in calls(gm, ops.share_layers.default) if again else []:
        for result in node.users:
            result.replace_all_uses_with(arg(node, "keep")[result.args[1]])


def _fuse_linears(gm: fx.GraphModule) -> None:
    fuse_linears(gm, singles=True)


def _use_rotated_keys(gm: fx.GraphModule) -> None:
    """Attention reads the pages as they are, and the new token's key is cached rotated, too."""
    rotated: dict[Any, Any] = {}
    for node in calls(gm, ops.cached_attention.default):
        if is_op(arg(node, "k_dense"), ops.rotate.default):
            rotated.setdefault(arg(node, "table"), arg(node, "k"))
            set_args(node, k_dense=None)
    for node in calls(gm, ops.cache_update.default):
        if arg(node, "table") in rotated:
            set_args(node, k=rotated[arg(node, "table")])
    # What ranks the slots would write to the cache.
    for node in calls(gm, ops.rotate.default):
        gm.graph.erase_node(node)
    for node in calls(gm, ops.slot_rotary.default):
        gm.graph.erase_node(node)


def _ignore_flags(gm: fx.GraphModule) -> None:
    """With one new token a gate's flag has no effect: a token always sees itself."""
    for node in calls(gm, ops.cached_attention.default):
        set_args(node, hidden=None)


def _absorb_latents(gm: fx.GraphModule) -> None:
    """One token's attention on latents as the ops that it consists of: it is always absorbed, and `observe` looks with
    the same queries."""
    for node in calls(gm, ops.latent_attention.default):
        args = named_args(node)
        q, k, up_k, up_v = (args.pop(name) for name in ("q", "k", "up_k", "up_v"))
        heads, rank, *keys, start, stride, dv = args.pop("rows")
        users: dict[Any, fx.Node] = {user.args[1]: user for user in node.users}
        watchers = [n for n in users[1].users if is_op(n, ops.observe.default)] if 1 in users else []
        with gm.graph.inserting_before(node):
            if watchers:
                absorbed = arg(watchers[0], "q")
            else:
                nope, rotated = (_call(gm, aten.slice.Tensor, q, 3, *e) for e in ((0, keys[2]), (keys[2], END)))
                w_k = _head_rows(gm, up_k, heads, *keys)
                absorbed = _call(gm, aten.einsum.default, ABSORB, [nope, w_k])
                absorbed = _call(gm, aten.cat.default, [absorbed, rotated], -1)
            value = _call(gm, aten.slice.Tensor, k, 3, 0, rank)
            attend = ops.cached_attention.default
            found_args = op_args(attend, q=absorbed, k=k, v=value, k_dense=None, hidden=None, **args)
            pair = _call(gm, attend, *found_args)
            pair.meta.update(node.meta)
            found = _call(gm, operator.getitem, pair, 0)
            w_v = _head_rows(gm, up_v, heads, start, stride, dv)
            out = _call(gm, aten.einsum.default, PROJECT, [found, w_v])
            results = {0: out, 1: _call(gm, operator.getitem, pair, 1)}
        for index, user in users.items():
            user.replace_all_uses_with(results[index])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)


def _call(gm: fx.GraphModule, target: Any, *args: Any) -> fx.Node:
    return gm.graph.call_function(target, args)


def _head_rows(gm: fx.GraphModule, weight: Any, heads: int, start: int, stride: int, width: int) -> fx.Node:
    """The rows of every head (heads, width, R), as `insert.latent.head_rows`."""
    node = _call(gm, aten.slice.Tensor, weight, 0, start, start + (heads - 1) * stride + width)
    return _call(gm, aten.transpose.int, _call(gm, aten.unfold.default, node, 0, width, stride), 1, 2)


def fuse_mass(gm: fx.GraphModule) -> None:
    """One token's attention, and from the same pass the mass that `observe` would compute once more."""
    for node in calls(gm, ops.cached_attention.default):
        args = named_args(node)
        del args["patterns"]  # which are of chunks
        if args.pop("hidden") is not None:
            continue
        logs = [n for n in node.users if is_op(n, operator.getitem) and n.args[1] == 1]
        watchers = [n for lse in logs for n in lse.users if _sums_weights(n, args["q"], lse)]
        args["mass"], fused = bool(watchers), ops.decode_attention.default
        stored = _quantized(args["k_dense"], args["v_dense"])
        if stored is not None:
            del args["k_dense"], args["v_dense"]
            args, fused = args | stored, ops.decode_attention_quantized.default
        new = replace(node, fused, op_args(fused, **args))
        for watcher in watchers:
            with gm.graph.inserting_before(watcher):
                mass = gm.graph.call_function(operator.getitem, (new, 2))
                weight = gm.graph.call_function(aten.unsqueeze.default, (arg(watcher, "rows"), 1))
                weighted = gm.graph.call_function(aten.mul.Tensor, (mass, weight))
            watcher.replace_all_uses_with(weighted)
            gm.graph.erase_node(watcher)


def _quantized(k_dense: Any, v_dense: Any) -> dict[str, Any] | None:
    """Where keys and values are what quantized slots stand for: those slots, as arguments of
    `decode_attention_quantized`."""
    if not is_op(k_dense, ops.read_quantized.default) or not is_op(v_dense, ops.read_quantized.default):
        return None
    stored = {name: arg(k_dense, name) for name in ("qlens", "kind", "group")}
    for x, read in (("k", k_dense), ("v", v_dense)):
        stored |= {f"{x}_pages": arg(read, "codes"), f"{x}_params": arg(read, "params"), f"{x}_tail": arg(read, "tail")}
    return stored


def _keep_pages(gm: fx.GraphModule) -> None:
    """Single tokens deal no pages and share no budgets: each head keeps the pages that it has (spare and floor are -1).
    What quantized slots stand for is not needed: attention and update read codes."""
    for node in calls(gm, ops.shared_budgets.default):
        node.replace_all_uses_with(arg(node, "keep"))
    for node in calls(gm, ops.cache_update.default):
        set_args(node, floor=None, spare=None, next_table=None)
    for node in calls(gm, ops.cache_update_quantized.default):
        set_args(node, k_cached=None, v_cached=None, floor=None, spare=None, next_table=None)


def _fuse_updates(gm: fx.GraphModule) -> None:
    """The update of one token takes in what precedes it: its rotation, and what a retaining head does after its hidden
    layer. Attention takes in the rotation, too."""
    rotations = {n: rotation(n) for n in calls(gm, aten.add.Tensor)}
    whole: dict[Any, Any] = {}  # rotated token -> (token, cos, sin), where nothing but attention and updates needs it
    for node, found in rotations.items():
        if found is not None and all(_takes_unrotated(user, node) for user in node.users):
            whole[node] = found
    for node in calls(gm, ops.decode_attention.default):
        q, k = arg(node, "q"), arg(node, "k")
        # One flag says for both whether they are rotated.
        cos = sin = None
        if q in whole and k in whole and whole[q][1:] == whole[k][1:]:
            q, (k, cos, sin) = whole[q][0], whole[k]
        early = cache_of(arg(node, "lens")) not in written_before(node)
        set_args(node, q=q, k=k, cos=cos, sin=sin, early=early)
    for node in calls(gm, ops.cache_update.default):
        if shares_or_merges(node):
            continue
        k, cos, sin = whole.get(arg(node, "k"), (arg(node, "k"), None, None))
        scores, head, activation = retaining_head(gm, arg(node, "new_scores")) or (
            arg(node, "new_scores"),
            None,
            "silu",
        )
        if cos is not None or head is not None:
            _as_token_update(node, k=k, scores=scores, head=head, activation=activation, cos=cos, sin=sin)
    for node, (x, *_) in whole.items():
        for user in list(node.users):
            if is_op(user, aten.sym_size.int):
                user.replace_input_with(node, x)


def _as_token_update(update: fx.Node, **changed: Any) -> None:
    """`token_update` in the place of a `cache_update`, with these arguments changed or added."""
    args, fused = named_args(update), ops.token_update.default
    args["scores"] = args.pop("new_scores")
    kept = {name: args[name] for name in args if name not in ("floor", "spare", "next_table", "threshold")}
    replace(update, fused, op_args(fused, **{**kept, **changed}))


def _rotate_keys_in_attention(gm: fx.GraphModule) -> None:
    """Contiguous positions that change with every token: `decode_attention` rotates the keys, and `token_update` keeps
    ranks in the pages, both as their docstrings say. Where something else wants the rotated keys, or channels have
    other partners than those half a head away, they are made as before."""
    for read in calls(gm, ops.read_rotated.default):
        table, ranks = arg(read, "table"), arg(read, "positions")
        readers = list(read.users)
        updates = calls(gm, ops.cache_update.default, ops.token_update.default)
        updates = [n for n in updates if arg(n, "table") is table]
        head_dim = get_attr(gm, str(arg(read, "partner").target)).numel()
        if (
            2 * arg(read, "half") != head_dim
            or len(updates) != 1
            or not is_op(ranks, ops.slot_rotary.default)
            or list(ranks.users) != [read]
            or not all(is_op(n, ops.decode_attention.default) and arg(n, "k_dense") is read for n in readers)
            or (is_op(updates[0], ops.cache_update.default) and shares_or_merges(updates[0]))
        ):
            continue
        rotated = {"following": arg(ranks, "following"), "key_cos": arg(read, "cos"), "key_sin": arg(read, "sin")}
        for node in readers:
            set_args(node, k_dense=None, early=False, **rotated)
        gm.graph.erase_node(read)
        gm.graph.erase_node(ranks)
        (update,) = updates
        rotary = arg(update, "positions")
        if is_op(update, ops.cache_update.default):
            plain = {"head": None, "activation": "silu", "cos": None, "sin": None}
            _as_token_update(update, rotary=rotary, **plain, ranks=True)
        else:
            set_args(update, rotary=rotary, ranks=True)
    for node in calls(gm, ops.decode_attention.default):
        set_args(node, early=cache_of(arg(node, "lens")) not in written_before(node))


def _takes_unrotated(user: fx.Node, x: fx.Node) -> bool:
    """Whether a reader of the rotated token x has one argument for it, and can rotate it itself, or wants its size
    only."""
    if is_op(user, aten.sym_size.int):
        return True
    if is_op(user, ops.decode_attention.default):
        own: tuple[str, ...] = ("q", "k")
    elif is_op(user, ops.cache_update.default) and not shares_or_merges(user):
        own = ("k",)
    else:
        return False
    places = {name for name, value in named_args(user).items() if value is x}
    return bool(places) and places <= {*own}


def take_the_only_row(gm: fx.GraphModule) -> None:
    """Hidden states of one token need not be picked for the logits."""
    for node in calls(gm, aten.gather.default):
        source: Any
        source, index = arg(node, "self"), arg(node, "index")
        if is_op(index, aten.expand.default) and is_op(arg(index, "self"), aten.unsqueeze.default):
            picked = arg(arg(index, "self"), "self")
            if isinstance(picked, fx.Node) and picked.op == "placeholder" and picked.target == "logit_index":
                while is_op(source, aten.slice.Tensor) and (arg(source, "start"), arg(source, "end")) == (0, END):
                    source = arg(source, "self")
                node.replace_all_uses_with(source)
                gm.graph.erase_node(node)


def _sums_weights(node: fx.Node, q: Any, lse: Any) -> bool:
    """Whether `node` is an `observe` that sums weights, not flags, of these queries."""
    if not is_op(node, ops.observe.default):
        return False
    args = named_args(node)
    return args["q"] is q and args["lse"] is lse and args["above"] is None and args["hidden"] is None
