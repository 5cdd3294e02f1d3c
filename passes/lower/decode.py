"""Lowering: puts fused ops in the place of several, on a copy of the program that a device runs.

Requires a graph behind `insert_cache`; ensures the same results up to rounding. Retaining heads are folded where they can be.
`lower_prefill` serves any number of tokens, and `without_logits` of it those of a prompt that nobody wants logits of.
`lower_decode` is for one token a row: attention with its mass comes from one op,
linears of the same input are one launch, and where ranks are frozen (`settled`) cached keys lie rotated in their pages, so
that nothing is rotated while decoding. Where ranks change with every token, attention rotates keys as it reads them, and the
update keeps ranks up to date. The saved program stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from kvrewrite.ir.fx import ancestors, erase_dead, get_attr, is_op, is_size, mutates, output_node, same_size, tensor_of
from kvrewrite.ir.pass_log import PassLog
from kvrewrite.ops.linear import chunk_kernel_suits
from kvrewrite.passes.insert.latent import ABSORB, PROJECT
from kvrewrite.passes.lower.fold_heads import fold_heads
from kvrewrite.passes.lower.fuse_linears import activation_of, fuse_gates, fuse_linears
from kvrewrite.passes.lower.fuse_norms import fuse_norms

ops = torch.ops.kvrewrite
aten = torch.ops.aten
_END = 2**63 - 1  # where a slice of everything ends


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph once more, over the same parameters and buffers. Its code is generated if it is called: passes follow, and
    what runs in the end are parts of it (a third of the time of `compile` for 32 layers)."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return _LazyGraphModule(gm, graph)


def fold(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with folded retaining heads, from which both others are made."""
    return _lowered(gm, "", [fold_heads])


def lower_prefill(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy for prompts."""
    steps = [_rank_all_layers, _fuse_reads, _turn_both, _overlap, _fuse_gates, erase_dead]
    return _lowered(gm, "prefill_", steps)


def without_logits(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a program, or of its last part, that writes to the caches and returns nothing. What only the logits need is gone:
    most often all of the last layer but its keys, values and their scores."""
    lowered = copy_of(gm)
    output_node(lowered).args = ((),)
    erase_dead(lowered)
    for node in reversed(_calls(lowered, ops.attend_and_update.default)):
        if not node.users:
            _replace(node, ops.cache_update.default, (*node.args[12:], None, None, None, None))
            erase_dead(lowered)
    lowered.graph.lint()
    lowered.recompile()
    return lowered


def lower_decode(gm: fx.GraphModule, settled: bool) -> fx.GraphModule:
    """A copy for single tokens."""
    latents = [_absorb_latents] if _calls(gm, ops.latent_attention.default) else []
    steps = [
        _use_settled_keys if settled else _fuse_reads, *latents, _ignore_flags, _fuse_mass, _take_the_only_row, _keep_pages,
        _fuse_updates, *([] if settled else [_turn_keys_in_attention]), _fuse_linears, fuse_norms, erase_dead,
    ]  # fmt: skip
    return _lowered(gm, "decode_settled_" if settled else "decode_", steps)


def _lowered(gm: fx.GraphModule, what: str, steps: Sequence[Callable[[fx.GraphModule], Any]]) -> fx.GraphModule:
    """A copy behind these passes, each of which is logged by its name, with `what` in front."""
    lowered, passes = copy_of(gm), PassLog()
    for step in steps:
        step(lowered)
        passes.done(what + step.__name__.removeprefix("_"), lowered)
    lowered.graph.lint()
    lowered.recompile()
    return lowered


def _fuse_gates(gm: fx.GraphModule) -> None:
    fuse_gates(gm, chunk_kernel_suits)


def _fuse_linears(gm: fx.GraphModule) -> None:
    fuse_linears(gm, singles=True)


def _calls(gm: fx.GraphModule, *targets: Any) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if is_op(n, *targets)]


def _replace(node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Another call in a node's place, with its metadata."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def _lens_of(gm: fx.GraphModule) -> dict[Any, Any]:
    """The live lengths that go with each page table."""
    return {n.args[7]: n.args[8] for n in _calls(gm, ops.cached_attention.default)}


def _fuse_reads(gm: fx.GraphModule) -> None:
    """Cached keys are read and rotated in one pass."""
    lens = _lens_of(gm)
    for node in _calls(gm, ops.rotate.default):
        read, cos, sin, positions, partner = node.args
        if is_op(read, ops.read_pages.default):
            pool, table = read.args  # type: ignore[union-attr]
            half = _half_split(get_attr(gm, str(partner.target)))  # type: ignore[union-attr]
            _replace(node, ops.read_rotated.default, (pool, table, lens[table], cos, sin, positions, partner, half))


def _half_split(partner: torch.Tensor) -> int:
    """h where the partners of channels 0..h-1 are h..2h-1 and the rest has none, as in most models; else 0."""
    d = partner.numel()
    channel = torch.arange(d, device=partner.device)
    h = int(partner[0]) if d else 0
    if h < 1 or 2 * h > d:
        return 0
    expected = torch.cat([channel[h : 2 * h], channel[:h], channel[2 * h :]])
    return h if torch.equal(partner.to(channel.dtype), expected) else 0


def _rank_all_layers(gm: fx.GraphModule) -> None:
    """Ranks of all layers at once, in front of everything: they depend on what earlier steps have kept only."""
    by_pool: dict[Any, list[fx.Node]] = {}
    for node in _calls(gm, ops.slot_rotary.default):
        by_pool.setdefault(node.args[0], []).append(node)
    first = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
    for pool, nodes in by_pool.items():
        tables = [n.args[1] for n in nodes]
        lens = [n.args[2] for n in nodes]
        rest = nodes[0].args[3:]
        layers = [t.args[2] for t in tables]  # type: ignore[union-attr]
        if layers != list(range(len(layers))) or any(n.args[3:] != rest for n in nodes):
            continue
        with gm.graph.inserting_before(first):
            whole = (tables[0].args[0], lens[0].args[0])  # type: ignore[union-attr]
            ranks = gm.graph.call_function(ops.slot_rotary_layers.default, (pool, *whole, len(layers), *rest))
            each = gm.graph.call_function(aten.unbind.int, (ranks, 0))
            picked = [gm.graph.call_function(operator.getitem, (each, i)) for i in range(len(layers))]
        for node, pick in zip(nodes, picked):
            node.replace_all_uses_with(pick)
            gm.graph.erase_node(node)


def _turn_both(gm: fx.GraphModule) -> None:
    """RoPE of the new tokens' queries and keys in one pass."""
    order: dict[fx.Node, float] = {node: i for i, node in enumerate(gm.graph.nodes)}
    done: set[fx.Node] = set()
    for node in _calls(gm, ops.cached_attention.default):
        q, k = node.args[:2]
        found_q, found_k = _rotation(q), _rotation(k)
        if found_q is None or found_k is None or found_q[1:] != found_k[1:] or {q, k} & done:
            continue
        tokens = [tensor_of(x).shape[axis] for x, axis in ((found_q[0], 2), (found_q[1], 1), (found_q[2], 1))]  # type: ignore[union-attr]
        for old, x in ((q, found_q[0]), (k, found_k[0])):
            for user in list(old.users):  # type: ignore[union-attr]
                if is_op(user, aten.sym_size.int):
                    user.replace_input_with(old, x)  # type: ignore[arg-type]
        first = min([*q.users, *k.users], key=lambda n: order[n])  # type: ignore[union-attr]
        if not all(same_size(tokens[0], n) for n in tokens) or order[first] < max(order[q], order[k]):  # type: ignore[index]
            continue
        done |= {q, k}  # type: ignore[arg-type]
        with gm.graph.inserting_before(first):
            both = gm.graph.call_function(ops.turn_both.default, (found_q[0], found_k[0], *found_q[1:]))
            picked = [gm.graph.call_function(operator.getitem, (both, i)) for i in range(2)]
        for old, new in zip((q, k), picked):
            order[new] = order[first] - 0.5
            new.meta.update(old.meta)  # type: ignore[union-attr]
            old.replace_all_uses_with(new)  # type: ignore[union-attr]


def _overlap(gm: fx.GraphModule) -> None:
    """Attention and the update behind it in one op that runs both at the same time, where the update needs nothing of what
    attention computes and nobody else reads the cache between them. What makes its scores moves in front."""
    by_cache: dict[Any, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        for lens in {n for n in node.all_input_nodes if _is_lens(n)}:
            if not is_op(node, aten.sym_size.int):
                by_cache.setdefault(_cache_of(lens), []).append(node)
    for users in by_cache.values():
        if len(users) < 2:
            continue
        attend, update = users[-2:]
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        if not is_op(attend, ops.cached_attention.default) or not is_op(update, ops.cache_update.default):
            continue
        q, k, v, k_dense, k_pages, v_pages, pos_pages, table, lens, positions, valid, *options = attend.args
        v_dense = options[7] if len(options) > 7 else None
        own = update.args
        shared = (own[4], own[6], *own[9:11], *own[12:15])
        if shared != (positions, valid, k_pages, v_pages, pos_pages, table, lens) or any(
            a is not None for a in own[20:]
        ):
            continue
        late = [n for n in ancestors(update.all_input_nodes) if order[n] > order[attend]]
        pure = all(n.op == "get_attr" or is_size(n) or _is_aten(n) for n in late)
        between = [n for n in table.users if order[attend] < order[n] < order[update]]  # type: ignore[union-attr]
        if attend in ancestors(late) or not pure or not all(map(is_size, between)):
            continue
        for node in sorted(late, key=lambda n: order[n]):
            attend.prepend(node)
        args = (q, k, v, k_dense, v_dense, *options[:7], *own[:20])
        _replace(attend, ops.attend_and_update.default, args)
        gm.graph.erase_node(update)


def _is_aten(node: fx.Node) -> bool:
    """Whether a node calls an op of torch's own that writes to nothing. None of them reads a cache."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten" and not mutates(node)


def _is_lens(node: fx.Node) -> bool:
    """Whether a node is the live lengths of one layer's cache."""
    source = node.args[0] if is_op(node, aten.select.int) else node
    return isinstance(source, fx.Node) and source.op == "placeholder" and str(source.target).startswith("lens_")


def _use_settled_keys(gm: fx.GraphModule) -> None:
    """Attention reads the pages as they are, and the newcomer's key is cached rotated, too."""
    rotated: dict[Any, Any] = {}
    for node in _calls(gm, ops.cached_attention.default):
        if is_op(node.args[3], ops.rotate.default):
            rotated.setdefault(node.args[7], node.args[1])
            node.update_arg(3, None)
    for node in _calls(gm, ops.cache_update.default):
        if node.args[13] in rotated:
            node.update_arg(0, rotated[node.args[13]])
    # What ranks the slots would write to the cache.
    for node in _calls(gm, ops.rotate.default):
        gm.graph.erase_node(node)
    for node in _calls(gm, ops.slot_rotary.default):
        gm.graph.erase_node(node)


def _ignore_flags(gm: fx.GraphModule) -> None:
    """A flag hides a token from others only, and the only query is that token's own."""
    for node in _calls(gm, ops.cached_attention.default):
        node.update_arg(13, None)


def _absorb_latents(gm: fx.GraphModule) -> None:
    """One token's attention on latents as the ops that it consists of: it is always absorbed, and `observe` looks with the same
    queries."""
    for node in _calls(gm, ops.latent_attention.default):
        args: Any = node.args
        q, k, up_k, up_v, *cache, sinks, alibi, scale, softcap, window, chunk, rows = args
        heads, rank, *keys, start, stride, dv = rows
        users: dict[Any, fx.Node] = {n.args[1]: n for n in node.users}
        watchers = [n for n in users[1].users if is_op(n, ops.observe.default)] if 1 in users else []
        with gm.graph.inserting_before(node):
            if watchers:
                absorbed = watchers[0].args[0]
            else:
                nope, turned = (_call(gm, aten.slice.Tensor, q, 3, *e) for e in ((0, keys[2]), (keys[2], _END)))
                w_k = _head_rows(gm, up_k, heads, *keys)
                absorbed = _call(gm, aten.einsum.default, ABSORB, [nope, w_k])
                absorbed = _call(gm, aten.cat.default, [absorbed, turned], -1)
            value = _call(gm, aten.slice.Tensor, k, 3, 0, rank)
            rest = (*cache, sinks, alibi, None, scale, softcap, window, chunk)
            pair = _call(gm, ops.cached_attention.default, absorbed, k, value, None, *rest)
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
    """The rows of every head (heads, width, R), as `cache_latent.head_rows`."""
    node = _call(gm, aten.slice.Tensor, weight, 0, start, start + (heads - 1) * stride + width)
    return _call(gm, aten.transpose.int, _call(gm, aten.unfold.default, node, 0, width, stride), 1, 2)


def _fuse_mass(gm: fx.GraphModule) -> None:
    """One token's attention, and from the same pass the mass that `observe` would compute anew."""
    for node in _calls(gm, ops.cached_attention.default):
        (q, k, v, k_dense, k_pages, v_pages, pos_pages, table, lens, positions, valid, sinks, alibi, hidden, *shape) = (
            node.args
        )
        if hidden is not None:
            continue
        v_dense = shape[4] if len(shape) > 4 else None
        read = _quantized(k_dense, v_dense)
        logs = [n for n in node.users if is_op(n, operator.getitem) and n.args[1] == 1]
        watchers = [n for lse in logs for n in lse.users if _same_rows(n, q, lse)]
        pools = (k_pages, v_pages, pos_pages)
        rest = (table, lens, positions, valid, sinks, alibi, *shape[:4])
        if read is None:
            arguments = (q, k, v, k_dense, v_dense, *pools, *rest, bool(watchers))
            new = _replace(node, ops.decode_attention.default, arguments)
        else:
            stored, qlens, scheme = read
            arguments = (
                q,
                k,
                v,
                *stored,
                pos_pages,
                table,
                lens,
                qlens,
                *rest[2:6],
                *scheme,
                *shape[:4],
                bool(watchers),
            )
            new = _replace(node, ops.decode_attention_quantized.default, arguments)
        for watcher in watchers:
            with gm.graph.inserting_before(watcher):
                mass = gm.graph.call_function(operator.getitem, (new, 2))
                weight = gm.graph.call_function(aten.unsqueeze.default, (watcher.args[3], 1))
                weighted = gm.graph.call_function(aten.mul.Tensor, (mass, weight))
            watcher.replace_all_uses_with(weighted)
            gm.graph.erase_node(watcher)


def _quantized(k_dense: Any, v_dense: Any) -> tuple[tuple[Any, ...], Any, tuple[str, int]] | None:
    """Where keys and values are what quantized slots stand for: their pools, parameters and tails, qlens, and kind and group."""
    if not is_op(k_dense, ops.read_quantized.default) or not is_op(v_dense, ops.read_quantized.default):
        return None
    k_pages, k_params, k_tail, _, qlens, kind, group, _ = k_dense.args
    v_pages, v_params, v_tail = v_dense.args[:3]
    return (k_pages, v_pages, k_params, v_params, k_tail, v_tail), qlens, (kind, group)


def _keep_pages(gm: fx.GraphModule) -> None:
    """Single tokens deal no pages and share no budgets: each head keeps the pages that it has (spare and floor are -1). What
    quantized slots stand for is not needed: attention and update read codes."""
    for node in _calls(gm, ops.cache_update.default):
        for i in (20, 21, 22):  # floor, spare, next_table
            node.update_arg(i, None)
    for node in _calls(gm, ops.cache_update_quantized.default):
        for i in (9, 10, 29, 30, 31):  # k_cached, v_cached; floor, spare, next_table
            node.update_arg(i, None)


def _fuse_updates(gm: fx.GraphModule) -> None:
    """The update of one token takes in what stands before it: its rotation, and what a retaining head does behind its hidden
    layer. Attention takes in the rotation, too."""
    turns = {n: _rotation(n) for n in _calls(gm, aten.add.Tensor)}
    whole: dict[Any, Any] = {}  # rotated token -> (token, cos, sin), where nothing but attention and updates needs it
    for node, found in turns.items():
        if found is not None and all(_takes_unrotated(user, node) for user in node.users):
            whole[node] = found
    for node in _calls(gm, ops.decode_attention.default):
        q, k, *rest = node.args
        # One flag says for both whether they are rotated.
        turned: tuple[Any, ...] = (q, k, None, None)
        if q in whole and k in whole and whole[q][1:] == whole[k][1:]:
            turned = (whole[q][0], whole[k][0], *whole[q][1:])
        early = _cache_of(node.args[9]) not in _written_before(node)
        _replace(node, ops.decode_attention.default, (*turned[:2], *rest, *turned[2:], early))
    for node in _calls(gm, ops.cache_update.default):
        k, v, scores, slot_scores, *rest = node.args
        if any(a is not None for a in rest[16:]):
            continue
        turned = whole.get(k, (k, None, None))
        hidden, head, name = _head(gm, scores) or (scores, None, "silu")
        if turned[1] is not None or head is not None:
            args = (turned[0], v, hidden, slot_scores, *rest[:16], head, name, *turned[1:])
            _replace(node, ops.token_update.default, args)
    for node, (x, *_) in whole.items():
        for user in list(node.users):
            if is_op(user, aten.sym_size.int):
                user.replace_input_with(node, x)


def _turn_keys_in_attention(gm: fx.GraphModule) -> None:
    """Contiguous positions that change with every token: `decode_attention` rotates the keys, and `token_update` keeps ranks in
    the pages, both as their docstrings say. Where something else wants the rotated keys, or channels have other partners than
    those half a head away, they are made as before."""
    for read in _calls(gm, ops.read_rotated.default):
        _, table, _, cos, sin, ranks, partner, half = read.args
        readers = list(read.users)
        updates = [n for n in _calls(gm, ops.cache_update.default, ops.token_update.default) if n.args[13] is table]
        head_dim = get_attr(gm, str(partner.target)).numel()  # type: ignore[union-attr]
        if (
            2 * half != head_dim  # type: ignore[operator]
            or len(updates) != 1
            or not is_op(ranks, ops.slot_rotary.default)
            or list(ranks.users) != [read]  # type: ignore[union-attr]
            or not all(is_op(n, ops.decode_attention.default) and n.args[3] is read for n in readers)
            or any(a is not None for a in updates[0].args[20:] if is_op(updates[0], ops.cache_update.default))
        ):
            continue
        following = ranks.args[3]  # type: ignore[union-attr]
        for node in readers:
            args = list(node.args)
            args[3] = None
            _replace(node, ops.decode_attention.default, (*args[:21], False, following, cos, sin))
        gm.graph.erase_node(read)
        gm.graph.erase_node(ranks)  # type: ignore[arg-type]
        args = list(updates[0].args)
        if is_op(updates[0], ops.cache_update.default):
            args = [*args[:20], None, "silu", None, None]
        args[5] = args[4]
        _replace(updates[0], ops.token_update.default, (*args, True))
    for node in _calls(gm, ops.decode_attention.default):
        node.update_arg(21, _cache_of(node.args[9]) not in _written_before(node))


def _cache_of(lens: Any) -> Any:
    """What tells the cache of one layer from others, of its lens."""
    return (lens.args[0], lens.args[2]) if is_op(lens, aten.select.int) else lens


def _written_before(node: fx.Node) -> set[Any]:
    """The caches that have been written to in this step before a node. Where that is not the one that it reads, there are
    launches between that write and the node: at least those that make its queries."""
    written: set[Any] = set()
    for other in node.graph.nodes:
        if other is node:
            break
        if mutates(other):
            written.update(_cache_of(n) for n in other.all_input_nodes)
    return written


def _takes_unrotated(user: fx.Node, x: fx.Node) -> bool:
    """Whether a reader of the rotated token x has one argument for it, and can rotate it itself, or wants its size only."""
    if is_op(user, ops.decode_attention.default):
        return x in user.args[:2] and x not in user.args[2:]
    if is_op(user, ops.cache_update.default):
        return user.args[0] is x and x not in user.args[1:] and all(a is None for a in user.args[20:])
    return is_op(user, aten.sym_size.int)


def _rotation(node: Any) -> tuple[Any, Any, Any] | None:
    """(x, cos, sin) where `node` is x * cos + cat([-x2, x1]) * sin of the halves x1, x2 of x, cos and sin (B, 1, D)."""
    if len(node.args) != 2 or node.kwargs:
        return None
    straight, crossed = node.args
    if not is_op(straight, aten.mul.Tensor) or not is_op(crossed, aten.mul.Tensor):
        return None
    (x, cos), (swapped, sin) = straight.args, crossed.args
    if not is_op(swapped, aten.cat.default) or swapped.args[1:] not in ((-1,), (3,)) or len(swapped.args[0]) != 2:
        return None
    negated, low = swapped.args[0]
    if not is_op(negated, aten.neg.default):
        return None
    high = negated.args[0]
    value = tensor_of(x)
    if value is None or value.dim() != 4 or not isinstance(value.shape[3], int) or value.shape[3] % 2:
        return None
    half = value.shape[3] // 2
    for part, bounds in ((low, (0, half)), (high, (half, _END))):
        if not is_op(part, aten.slice.Tensor) or part.args[0] is not x or tuple(part.args[1:]) != (3, *bounds):
            return None
    found = []
    for table in (cos, sin):
        if not is_op(table, aten.unsqueeze.default) or table.args[1] != 1:
            return None
        row = table.args[0]
        have = tensor_of(row)
        if have is None or have.dim() != 3 or have.dtype != value.dtype or have.shape[2] != value.shape[3]:
            return None
        if not same_size(have.shape[0], value.shape[0]):
            return None
        found.append(row)
    return x, found[0], found[1]


def _head(gm: fx.GraphModule, scores: Any) -> tuple[Any, Any, str] | None:
    """(hidden, head, activation) where scores are to(act(hidden) head^T), transposed, in fp32."""
    if is_op(scores, aten.to.dtype) and scores.args[1] == torch.float32:
        scores = scores.args[0]
    if not is_op(scores, aten.transpose.int) or tuple(scores.args[1:]) != (1, 2):
        return None
    second = scores.args[0]
    if not is_op(second, aten.linear.default) or len(second.args) != 2:
        return None
    active, head = second.args
    name = activation_of(active)
    if name is None or head.op != "get_attr" or not get_attr(gm, str(head.target)).is_contiguous():
        return None
    return active.args[0], head, name


def _take_the_only_row(gm: fx.GraphModule) -> None:
    """Hidden states of one token need not be picked for the logits."""
    for node in _calls(gm, aten.gather.default):
        source, index = node.args[0], node.args[2]
        if is_op(index, aten.expand.default) and is_op(index.args[0], aten.unsqueeze.default):  # type: ignore[union-attr]
            picked = index.args[0].args[0]  # type: ignore[union-attr]
            if isinstance(picked, fx.Node) and picked.op == "placeholder" and picked.target == "logit_index":
                while is_op(source, aten.slice.Tensor) and tuple(source.args[2:]) == (0, _END):  # type: ignore[union-attr]
                    source = source.args[0]  # type: ignore[union-attr]
                node.replace_all_uses_with(source)  # type: ignore[arg-type]
                gm.graph.erase_node(node)


def _same_rows(node: fx.Node, q: Any, lse: Any) -> bool:
    """Whether `observe` sums weights, not flags, of these queries."""
    if not is_op(node, ops.observe.default) or node.args[0] is not q or node.args[2] is not lse:
        return False
    above = node.args[17] if len(node.args) > 17 else None
    return above is None and node.args[12] is None
