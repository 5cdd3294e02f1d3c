"""Rules of ops that give the same numbers in another shape, order or selection; see `rules.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvrewrite.ir.fx import arg, parameters
from kvrewrite.passes.shard.placement import LOCAL, Split, even, regroup
from kvrewrite.passes.shard.rules import Answer, Call, rule

aten = torch.ops.aten


@rule("view.default", "reshape.default", "_unsafe_view.default")
def view(call: Call) -> Answer | None:
    """The same numbers in another shape."""
    x, sizes = call.args[0], list(call.args[1])
    split = call.split(x)
    out = split and regroup(split, call.shape(x) or (), call.out_shape, call.ranks)
    if out is None or not _set_size(sizes, out, call):
        return None
    return call.with_args(out, **{_sizes_name(call): sizes})


def _sizes_name(call: Call) -> str:
    return "shape" if "shape" in parameters(call.target) else "size"


def _set_size(sizes: list[Any], out: Split, call: Call) -> bool:
    """Puts a rank's own size into a list of sizes; False where that is computed elsewhere."""
    if type(sizes[out.dim]) is not int:
        return False
    if sizes[out.dim] != -1:
        sizes[out.dim] = out.size // call.ranks
    return True


@rule("flatten.using_ints", "unflatten.int")
def flatten(call: Call) -> Answer | None:
    """As `view`, where sizes other than those of the dimension stay unsaid."""
    x = call.args[0]
    split = call.split(x)
    out = split and regroup(split, call.shape(x) or (), call.out_shape, call.ranks)
    if out is None:
        return None
    if call.target is aten.flatten.using_ints:
        return call.as_it_is(out)
    sizes, first = list(arg(call.node, "sizes")), call.dim("dim", x)
    if not first <= out.dim < first + len(sizes):
        return None
    if type(sizes[out.dim - first]) is not int:
        return None
    if sizes[out.dim - first] != -1:
        sizes[out.dim - first] = out.size // call.ranks
    return call.with_args(out, sizes=sizes)


@rule("expand.default")
def expand(call: Call) -> Answer | None:
    """Repeats dimensions of size 1, which are never dealt out."""
    x, sizes = call.args[0], list(call.args[1])
    split = call.split(x)
    if split is None:
        return None
    out = split.at(split.dim + len(sizes) - call.rank(x))
    return call.with_args(out, size=sizes) if _set_size(sizes, out, call) else None


@rule("transpose.int", "permute.default", "t.default")
def permute(call: Call) -> Answer | None:
    """Dimensions in another order."""
    x = call.args[0]
    split, rank = call.split(x), call.rank(x)
    if split is None:
        return None
    order = list(range(rank))
    if call.target is aten.permute.default:
        order = [d % rank for d in call.args[1]]
    elif rank > 1:
        a, b = (0, 1) if call.target is aten.t.default else (call.dim("dim0", x), call.dim("dim1", x))
        order[a], order[b] = order[b], order[a]
    return call.as_it_is(split.at(order.index(split.dim)))


@rule("unsqueeze.default")
def unsqueeze(call: Call) -> Answer | None:
    """One more dimension."""
    x = call.args[0]
    split, at = call.split(x), arg(call.node, "dim") % (call.rank(x) + 1)
    return None if split is None else call.as_it_is(split.at(split.dim + (at <= split.dim)))


@rule("squeeze.dim", "squeeze.dims")
def squeeze(call: Call) -> Answer | None:
    """Without dimensions of size 1."""
    x, dims = call.args[0], arg(call.node, "dim")
    split, shape = call.split(x), call.shape(x) or ()
    if split is None:
        return None
    chosen = {d % len(shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    return call.as_it_is(split.at(split.dim - sum(d < split.dim and shape[d] == 1 for d in chosen)))


@rule("select.int")
def select(call: Call) -> Answer | None:
    """One index of a dimension."""
    x, dim = call.args[0], arg(call.node, "dim")
    if call.place(x) == LOCAL:
        return call.as_it_is(LOCAL)
    split, at = call.split(x), dim % call.rank(x)
    if split is None or at == split.dim:
        return None
    return call.as_it_is(split.at(split.dim - (at < split.dim)))


@rule("slice.Tensor")
def slices(call: Call) -> Answer | None:
    """A range of a dimension; of the dealt one, whole parts."""
    x = call.args[0]
    split, at = call.split(x), call.dim("dim", x)
    if split is None:
        return None
    if at != split.dim:
        return call.as_it_is(split)
    start, end, step = (arg(call.node, name) for name in ("start", "end", "step"))
    if type(step) is not int or not all(v is None or type(v) is int for v in (start, end)):
        return None
    size = split.size
    if step > 1:  # every second one, say: of each block the same
        own = size // call.ranks
        if len(split.parts) > 1 or own % step or not 0 <= (start or 0) < step or (end is not None and end < size):
            return None
        return call.as_it_is(Split(split.dim, (size // step,)))
    start, end = (min(max(v + size if v < 0 else v, 0), size) for v in (start or 0, size if end is None else end))
    found = _parts(split, start, end)
    if found is None:
        return None
    return call.with_args(found, start=start // call.ranks, end=end // call.ranks)


def _parts(split: Split, start: int, end: int) -> Split | None:
    """The parts that lie in [start, end), None where it cuts one."""
    borders = [sum(split.parts[:i]) for i in range(len(split.parts) + 1)]
    if start not in borders or end not in borders or end <= start:
        return None
    return Split(split.dim, split.parts[borders.index(start) : borders.index(end)])


@rule("split_with_sizes.default", "split.Tensor", "chunk.default", "unbind.int")
def pieces(call: Call) -> Answer | None:
    """Several ranges of a dimension."""
    x, dim = call.args[0], call.dim("dim", call.args[0])
    split = call.split(x)
    if split is None:
        return None
    outs = call.out_shape
    if dim != split.dim:
        moved = split.at(split.dim - (call.target is aten.unbind.int and dim < split.dim))
        return call.as_it_is((moved,) * len(outs))
    if call.target is aten.unbind.int or not all(type(s[dim]) is int for s in outs):
        return None
    found, start = [], 0
    for shape in outs:
        found.append(_parts(split, start, start + shape[dim]))
        start += shape[dim]
    if any(f is None for f in found):
        return None
    sizes = [f.size // call.ranks for f in found if f is not None]
    if call.target is aten.split_with_sizes.default:
        return call.with_args(tuple(found), split_sizes=sizes)
    if len(set(sizes)) > 1:
        return None
    return (
        call.with_args(tuple(found), split_size=sizes[0])
        if call.target is aten.split.Tensor
        else call.as_it_is(tuple(found))
    )


@rule("cat.default", "stack.default")
def cat(call: Call) -> Answer | None:
    """One after the other; along the dealt dimension there are more parts then."""
    tensors: Any = call.args[0]
    first = next((x for x in tensors if call.split(x) is not None), None)
    if first is None:
        return None
    split = call.split(first)
    assert split is not None
    if call.target is aten.stack.default:
        at = arg(call.node, "dim") % (call.rank(first) + 1)
        return call.answer(lambda n: split, split.at(split.dim + (at <= split.dim)))
    at = call.dim("dim", first)
    if at != split.dim:
        return call.answer(lambda n: split, split)
    wants: dict[fx.Node, Split] = {}
    for x in tensors:
        own = call.split(x)
        if own is None or own.dim != split.dim:
            own = even(split.dim, (call.shape(x) or ())[split.dim], call.ranks)
        if own is None:
            return None
        wants[x] = own
    return call.answer(wants.__getitem__, Split(split.dim, tuple(p for x in tensors for p in wants[x].parts)))


@rule("constant_pad_nd.default", "flip.default")
def others(call: Call) -> Answer | None:
    """Pads or turns dimensions that are not dealt out."""
    x = call.args[0]
    split, rank = call.split(x), call.rank(x)
    if split is None:
        return None
    if call.target is aten.flip.default:
        touched = {d % rank for d in arg(call.node, "dims")}
    else:
        touched = {rank - 1 - i for i in range(len(arg(call.node, "pad")) // 2)}
    return None if split.dim in touched else call.as_it_is(split)


@rule("index.Tensor")
def index(call: Call) -> Answer | None:
    """Picks along one dimension that is not dealt out, by a list of indices."""
    x, indices = call.args[:2]
    split = call.split(x)
    given = [i for i, value in enumerate(indices) if value is not None]
    if split is None or len(given) != 1 or given[0] == split.dim or call.rank(indices[given[0]]) != 1:
        return None
    return call.answer(lambda n: split if n is x else None, split)


@rule("new_zeros.default", "new_ones.default", "new_full.default", "new_empty.default")
def made(call: Call) -> Answer | None:
    """Takes nothing of its argument but its dtype."""
    return call.as_it_is(None)


@rule("sym_size.int")
def size(call: Call) -> Answer | None:
    """The size of the whole tensor."""
    x, dim = call.args[0], call.dim("dim", call.args[0])
    split = call.split(x)
    if split is None:
        return None
    found = call.as_it_is(None)
    if dim == split.dim:
        found.constant = split.size
    return found
