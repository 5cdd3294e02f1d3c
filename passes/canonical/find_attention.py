"""Finds every attention in a captured graph and says what it computes. Analysis only: nothing is changed.

The search starts at anchors (sdpa, softmax, flex_attention, our own op) and walks to the two contractions around the
scores. What happens to the scores between them is not read off the ops: the chain is evaluated on chosen scores, and
its answers give the mask, the bias, the sinks, the scale and the softcap, or the reason why it is none of what we know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import (
    ancestors,
    dependents,
    get_attr,
    is_op,
    module_path,
    output_node,
    shape_of,
    symbol,
    tensor_of,
)
from kvrewrite.ir.masks import (
    FARTHEST,
    UnknownMask,
    classify_mask,
    described,
    expected_mask,
    first_difference,
    spread,
    spread_length,
    with_ends,
)
from kvrewrite.ir.site import NoSite
from kvrewrite.passes.canonical.apart import why_not
from kvrewrite.passes.canonical.learned import Live, Values, find_live, other_values
from kvrewrite.passes.canonical.probe import (
    FAILURES,
    MASKED,
    Probe,
    ProbeError,
    depends_on_data,
    integers_in,
    is_projection,
    only_shape,
    run_op,
    seen_in,
    subgraph_text,
    symbols,
    value_inputs,
)

aten = torch.ops.aten

SOFTMAX = ("aten::softmax", "aten::_softmax", "aten::_safe_softmax", "aten::log_softmax", "aten::_log_softmax")
CONTRACTIONS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)

MIN_LENGTH, MAX_LENGTH = 24, 8192
USUAL_LENGTH = 2048  # of a mask's probe
MOST_SHARED = 64  # tokens of a probe that layers share
USUAL_SCORES = 1 << 24  # elements that such a probe may have
NEAR_SCORES = 1 << 22  # where larger distances are looked at besides
LARGEST_WINDOW = 1 << 24  # larger integers are what masks fill in
SMALL_BATCH, SMALL_LENGTH = 2, 7
MAX_SCORES = 1 << 29  # elements of a score tensor that a probe may make
TOLERANCE = 1e-6


Unrepeated = tuple[fx.Node | None, fx.Node | None]


class NoAttention(Exception):
    """Why an anchor is not an attention that can be rewritten."""


@dataclass
class Operand:
    """A tensor of a site, and the permutation that brings it to (lead..., length, features).

    An entry of -1 in `order` stands for a dim that the tensor does not have (it is broadcast over it).
    """

    node: fx.Node
    order: tuple[int, ...]


@dataclass
class Attention:
    """What an anchor computes.

    replaced: the node whose value the attention is; out_order: its dims, as a permutation of (lead..., length,
    features).
    groups: how many times every kv head stands next to itself in k and v (1: not repeated); unrepeated: k and v from
    before that, where the graph has them. sinks: node holding one extra logit a head. slopes: ALiBi's, fp32;
    slopes_node: where they are learned, the node that holds them and whether it has them negated. factors: learned numbers, one
    or one a head, that the scores are multiplied (divided, where the flag is set) by besides `scale`. by_head: (window, chunk) of
    each head, where they differ.
    """

    anchor: fx.Node
    replaced: fx.Node
    module: str
    source: str
    q: Operand
    k: Operand
    v: Operand
    heads: int
    kv_heads: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    chunk: int = 0
    groups: int = 1
    sinks: fx.Node | None = None
    slopes: Tensor | None = None
    slopes_node: tuple[fx.Node, bool] | None = None
    factors: list[tuple[fx.Node, bool]] = field(default_factory=list)
    by_head: list[tuple[int, int]] | None = None
    unrepeated: Unrepeated = (None, None)
    out_order: tuple[int, ...] = ()


def find_attention(captured: Captured) -> Iterator[Attention | NoSite]:
    """Every attention of the graph in execution order, or why it is none that can be rewritten.

    Requires: a normalized graph.
    """
    for node in list(captured.graph.graph.nodes):
        finder = _finder(captured, node)
        if finder is None:
            continue
        try:
            yield finder(captured, node)
        except (NoAttention, ProbeError) as error:
            yield NoSite(node.name, _module(node), str(error))


def _finder(captured: Captured, node: fx.Node) -> Callable[[Captured, fx.Node], Attention] | None:
    if node.op != "call_function":
        return None
    if is_op(node, torch.ops.kvrewrite.attention.default):
        return _find_own
    if is_op(node, aten.scaled_dot_product_attention.default):
        return _find_sdpa
    if node.target is torch.ops.higher_order.flex_attention:
        return _find_flex
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in SOFTMAX:
        value = tensor_of(node)
        if value is not None and any(_mentions(captured, value.shape[d]) for d in _softmax_dims(node)):
            return _find_softmax
    return None


def _softmax_dims(node: fx.Node) -> list[int]:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
    return [int(dim)]  # type: ignore[arg-type]


def _mentions(captured: Captured, size: Any) -> bool:
    return captured.length_symbol in getattr(symbol(size), "free_symbols", ())


def _is_length(captured: Captured, size: Any) -> bool:
    return bool(symbol(size) == captured.length_symbol)


def _module(node: fx.Node) -> str:
    return str(node.meta.get("kvrewrite_module") or module_path(node))


# ------------------------------------------------------------------------------------------------ masks and biases
@dataclass
class Bias:
    """What is added to the scores: a mask, and ALiBi slopes or None; sinks are values of extra columns or None.

    by_head: (window, chunk) of each head, where they differ; window and chunk are 0 then.
    """

    window: int
    chunk: int
    slopes: Tensor | None
    sinks: Tensor | None
    by_head: list[tuple[int, int]] | None = None


def classify(added: Tensor, positions: Tensor | None = None, slopes: Tensor | None = None) -> Bias:
    """What `added` (B, H, n, n or n + 1) is: a known mask, plus nothing or ALiBi, plus sinks in the extra column.

    positions: of the tokens, ascending from 0, as `classify_mask` needs them; by default all of a text. slopes: ALiBi's (H,),
    where they are known: far from a token it falls below what masks fill in.
    Softmax ignores what is added to a whole row, so everything is taken relative to each token's view of itself.
    """
    length = added.shape[2]
    positions = torch.arange(length) if positions is None else positions
    extra = added[..., length:]
    added, own = _relative(added)
    if not torch.equal(added, added[:1].expand_as(added)):
        raise NoAttention("the mask or bias differs between the rows of a batch (heads and batch mixed, or padding)")
    bias = added[0]
    seen = _seen(bias, positions, slopes)
    by_head = None
    try:
        if not torch.equal(seen, seen[:1].expand_as(seen)):
            by_head = [classify_mask(of_head, positions) for of_head in seen]
        window, chunk = (0, 0) if by_head else classify_mask(seen[0], positions)
    except UnknownMask as error:
        raise NoAttention(str(error)) from error
    found = _classify_bias(bias, seen, positions)
    sinks = None
    if extra.shape[-1]:
        relative = (extra - own)[..., 0]
        if extra.shape[-1] != 1 or float((relative - relative[:1, :, :1]).abs().max()) > TOLERANCE:
            raise NoAttention("the scores have extra columns that are not one constant logit a head")
        sinks = relative[0, :, 0]
    return Bias(window, chunk, found, sinks, by_head)


def _relative(added: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to the scores (B, H, n, n), less what each query's own token gets; and that (B, H, n, 1)."""
    added = added[..., : added.shape[2]]
    own = added.diagonal(dim1=-2, dim2=-1)[..., None]
    if not bool((own > MASKED).all()):
        raise NoAttention("the mask hides a token from itself, which no causal mask does")
    return (added - own).nan_to_num(neginf=-math.inf), own


def _seen(bias: Tensor, positions: Tensor, slopes: Tensor | None) -> Tensor:
    """What of a bias (H, n, n) is not masked, beside ALiBi with these slopes."""
    if slopes is not None:
        distance = (positions[:, None] - positions).clamp(min=0)
        bias = bias + slopes.to(bias.dtype)[:, None, None] * distance
    return seen_in(bias)


def _classify_bias(bias: Tensor, seen: Tensor, positions: Tensor) -> Tensor | None:
    """ALiBi slopes (H,) of a bias (H, n, n) that is 0 on the diagonal and counts where `seen` (H, n, n); None: there is none."""
    visible = torch.where(seen, bias, 0.0)
    if float(visible.abs().max()) <= TOLERANCE:
        return None
    distance = (positions[:, None] - positions).to(bias.dtype)
    slopes = -visible[:, 1, 0] / distance[1, 0]
    off = torch.where(seen, visible + slopes[:, None, None] * distance, 0.0).abs()
    # Slopes and positions may have been rounded in the model's dtype.
    most = 5e-3 * (slopes.abs()[:, None] * positions).clamp(min=1.0)[..., None]
    if not bool((off <= most).all()):
        nearest = distance[(off > most).any(0)].min()
        raise NoAttention(
            "the attention has a position bias that is not linear in the distance (a learned bias): it is another at a distance "
            f"of {int(nearest)} tokens"
        )
    return slopes.float()


@dataclass
class Fit:
    """The scale and softcap that a chain applies to scores."""

    scale: float
    softcap: float


def fit(chain: Callable[[Tensor], Tensor], shape: tuple[int, ...], length: int) -> Fit:
    """Scale and softcap of `chain`, which maps scores of `shape` to logits (B, H, S, S or S + 1).

    Raises NoAttention when no scale and softcap give what the chain gives on random scores.
    """
    zero = chain(torch.zeros(shape, dtype=torch.float64))[..., :length]
    own_zero = zero.diagonal(dim1=-2, dim2=-1)[..., None]
    seen = seen_in(zero - own_zero)
    generator = torch.Generator().manual_seed(0)
    below = torch.ones(length, length, dtype=torch.float64).tril(-1)

    def answers(size: float, only_sign: bool) -> tuple[Tensor, Tensor]:
        """Scores and what becomes of them. The diagonal stays 0, so that a change of whole rows can be told apart."""
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = (x.sign() if only_sign else x) * size * below
        y = chain(x)[..., :length]
        y = y - y.diagonal(dim1=-2, dim2=-1)[..., None] - (zero - own_zero)
        used = seen & (below > 0)
        return x.reshape(y.shape)[used], y[used]

    reason = "what happens to the scores between q·k and the softmax is not a scale and a softcap"
    x, y = answers(1e-4, only_sign=True)
    scale = float((y / x).median())
    if not math.isfinite(scale) or scale <= 0 or not float((y / x / scale - 1).abs().max()) <= 1e-5:  # NaN is not
        raise NoAttention(f"{reason} (they differ between heads, tokens or rows)")
    x, y = answers(1e4 / scale, only_sign=True)
    softcap = 0.0 if float((y / x / scale - 1).abs().max()) < 1e-5 else float(y.abs().median())
    for size in (1.0, softcap or 30.0):
        x, y = answers(size / scale, only_sign=False)
        expected = softcap * torch.tanh(x * scale / softcap) if softcap else x * scale
        if not float((y - expected).abs().max()) <= 1e-5 * max(1.0, size):
            raise NoAttention(reason)
    # Numbers that the model holds in single precision are exact to about seven digits.
    return Fit(float(f"{scale:.9g}"), float(f"{softcap:.7g}"))


def probe_length(captured: Captured, nodes: set[fx.Node], planes: int, far: bool) -> int:
    """Tokens of the text on which all pairs of a mask, made by `nodes`, are compared.

    planes: how many matrices (length, length) it has. far: whether larger distances are compared besides; else the text shows
    every window or chunk that a constant among `nodes` asks for, and is as long as the model can take where that is possible.
    """
    most = math.isqrt((NEAR_SCORES if far else USUAL_SCORES) // planes)
    length = max(MIN_LENGTH, min(USUAL_LENGTH, most), _table_length(captured, nodes))
    limit = captured.max_positions
    if far:
        return min(length, MAX_LENGTH, limit or length)
    largest = max((i for i in integers_in(captured, nodes) if i < 1 << 40), default=0)
    length = max(length, 2 * largest + 3)
    if limit is not None:
        length = limit if planes * limit**2 <= USUAL_SCORES else min(length, limit)
    if length > MAX_LENGTH:
        raise NoAttention(
            f"its mask has a constant of {largest}; telling windows from it needs {length} positions, more than "
            f"{MAX_LENGTH}"
        )
    return length


def _table_length(captured: Captured, nodes: set[fx.Node]) -> int:
    """Tokens of a mask that is kept as a table, which may be any; 0 where there is none."""
    held = [get_attr(captured.graph, str(n.target)) for n in nodes if n.op == "get_attr"]
    tables = [t for t in held if isinstance(t, Tensor) and t.dim() >= 2 and t.shape[-1] == t.shape[-2]]
    return max((t.shape[-1] for t in tables), default=0)


def _far_length(captured: Captured, nodes: set[fx.Node], planes: int) -> int:
    """Tokens up to which a mask is compared at every distance: the model's longest length, else FARTHEST, more where a constant
    among `nodes` asks for it; fewer where the mask has many planes."""
    wanted = captured.max_positions or max(FARTHEST, 2 * _largest_window(captured, nodes) + 3)
    return min(wanted, spread_length(math.isqrt(USUAL_SCORES // planes)))


def _largest_window(captured: Captured, nodes: set[fx.Node]) -> int:
    """The largest constant among `nodes` that a mask might have as a window."""
    return max((i for i in integers_in(captured, nodes) if i < LARGEST_WINDOW), default=0)


# What is added to the scores (B, H, n, n or n + 1) of a text of so many tokens, or of n tokens at these positions of one.
AddedAt = Callable[[int, Tensor | None], Tensor]


def classify_everywhere(captured: Captured, nodes: set[fx.Node], planes: int, added_at: AddedAt, far: bool) -> Bias:
    """What is added to scores, compared at all pairs of the first tokens and at every distance up to the model's longest length.

    nodes: what makes it; planes: how many matrices it has; far: whether it can be evaluated at chosen positions. Where it can't,
    it is compared as far as all pairs go. `captured.compared` says how far that was.
    Raises NoAttention where it is nothing that we know, or another thing far from a token than near to it.
    """
    far = far and _runs_far(added_at, 2)
    length = probe_length(captured, nodes, planes, far)
    if planes * length * length > MAX_SCORES:
        raise NoAttention(f"telling its mask needs {planes} heads of {length} x {length} scores, which is too much")
    added = _as_long_as_it_runs(captured, length, lambda n: added_at(n, None))
    near, length = classify(added), added.shape[2]
    del added  # the largest tensor of the analysis
    if far:
        farthest = _as_far_as_it_runs(captured, length, _far_length(captured, nodes, planes), added_at)
        if farthest > length:
            near, length = _classify_far(near, length, farthest, added_at), farthest
        hidden = _largest_window(captured, nodes)
        if length <= min(hidden + 2, (captured.max_positions or length + 1) - 1) and not (near.window or near.chunk):
            raise NoAttention(
                f"its mask has a constant of {hidden}; it is compared on up to {length} tokens, on which a window of that size "
                "does not show"
            )
    captured.compared = min(captured.compared or length, length)
    return near


def _classify_far(near: Bias, length: int, far: int, added_at: AddedAt) -> Bias:
    """What is added to scores at every distance below `far`, which is `near` on the first `length` tokens."""
    last: list[Tensor] = []  # positions, and what is added there

    def at(positions: Tensor) -> Tensor:
        if not last or last[0] is not positions:
            last[:] = [positions]
            last.append(added_at(len(positions), positions))
        return last[1]

    positions, seen = with_ends(spread(far), lambda p: _seen(_relative(at(p))[0][0], p, near.slopes))
    known = near.by_head or [(near.window, near.chunk)] * len(seen)
    differs = first_difference(seen, torch.stack([expected_mask(*m, positions) for m in known]), positions)
    del seen
    try:
        found = classify(at(positions), positions, near.slopes)
    except NoAttention as error:
        where = ""
        if differs is not None:
            names = " or ".join(dict.fromkeys(described(*m) for m in known))
            where = (
                f" (its mask is {names} on the first {length} tokens, but not at a distance of {differs[0] - differs[1]}: token "
                f"{differs[0]} and token {differs[1]})"
            )
        raise NoAttention(f"{error}{where}") from error
    there = found.by_head or [(found.window, found.chunk)] * len(known)
    shown = [(w if w < length else 0, c if c < length else 0) for w, c in there]
    if shown != known:
        one, other = next(pair for pair in zip(known, shown, strict=True) if pair[0] != pair[1])
        raise NoAttention(f"its mask is {described(*one)} on the first {length} tokens and {described(*other)} beyond")
    for what, a, b in (("ALiBi slopes", near.slopes, found.slopes), ("extra column", near.sinks, found.sinks)):
        if (a is None) != (b is None) or (a is not None and b is not None and not torch.allclose(a, b)):
            raise NoAttention(f"its {what} on the first {length} tokens are others than on the first {far}")
    return found


def _check_known(captured: Captured, nodes: set[fx.Node]) -> None:
    """Refuses masks and biases that depend on content or on values that are not there."""
    for node in nodes:
        if node.op == "placeholder" and node.target == "input_ids":
            raise NoAttention("its mask or bias depends on the content of the text")
        if node.op == "get_attr":
            value = get_attr(captured.graph, str(node.target))
            if isinstance(value, Tensor) and value.device.type == "meta" and not isinstance(value, torch.nn.Parameter):
                raise NoAttention(f"its mask or bias reads {node.target}, which has no data (it is on the meta device)")


# ------------------------------------------------------------------------------------------------ our own op
def _find_own(captured: Captured, node: fx.Node) -> Attention:
    args: Any = node.args
    q, k, v, sinks, alibi, scale, softcap, window, chunk = args
    return Attention(
        anchor=node,
        replaced=node,
        module=_module(node),
        source="interface",
        q=_plain(q),
        k=_plain(k),
        v=_plain(v),
        heads=int(shape_of(q)[1]),
        kv_heads=int(shape_of(k)[1]),
        scale=float(scale),
        softcap=float(softcap),
        window=int(window),
        chunk=int(chunk),
        sinks=sinks if isinstance(sinks, fx.Node) else None,
        slopes_node=(alibi, False) if isinstance(alibi, fx.Node) else None,
        out_order=(0, 1, 2, 3),
    )


def _plain(node: fx.Node) -> Operand:
    return Operand(node, tuple(range(len(shape_of(node)))))


# ------------------------------------------------------------------------------------------------ sdpa
def _find_sdpa(captured: Captured, node: fx.Node) -> Attention:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v = given["query"], given["key"], given["value"]
    mask = given.get("attn_mask")
    if given.get("dropout_p"):
        raise NoAttention(f"it applies dropout ({given['dropout_p']}) in eval mode, so its result is random")
    if mask is None and not given.get("is_causal"):
        raise NoAttention("the attention is not causal (no mask and is_causal=False)")
    heads, kv_heads = _check_operands(captured, q, k, v)
    window = chunk = 0
    slopes = slopes_node = by_head = None
    if mask is not None:
        behind = value_inputs([mask])
        _check_known(captured, behind)

        def added_at(batch: int, length: int, values: Values | None = None, positions: Tensor | None = None) -> Tensor:
            added: Tensor = _shared_probe(captured, batch, length, values, positions)(mask)
            if added.dtype == torch.bool:
                added = torch.zeros(added.shape, dtype=torch.float64).masked_fill(~added, -math.inf)
            if given.get("is_causal"):
                added = added + torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)
            if added.dim() == 3 and len(shape_of(q)) == 3 and added.shape[0] not in (1, batch):
                added = added.reshape(batch, heads, *added.shape[1:])
            while added.dim() < 4:
                added = added[None]
            return added.expand(added.shape[0], added.shape[1], length, length)

        live = find_live(captured, behind, None, lambda b, s, values: lambda x: x + added_at(b, s, values), heads)
        heads_of_mask = shape_of(mask)[-3] if len(shape_of(mask)) > 2 else 1
        planes = heads_of_mask if isinstance(heads_of_mask, int) else heads

        def classified() -> Bias:
            far = why_not(captured, behind) is None
            classify(added_at(SMALL_BATCH, SMALL_LENGTH))
            return classify_everywhere(captured, behind, planes, lambda n, at: added_at(1, n, None, at), far)

        bias = _once(captured, f"{heads} {given.get('is_causal')} {subgraph_text(captured, [mask])}", classified)
        window, chunk, by_head, slopes_node = bias.window, bias.chunk, bias.by_head, live.slopes
        slopes = _with_learned(bias.slopes, live, heads)
    scale = given.get("scale")
    groups = 1
    unrepeated: Unrepeated = (None, None)
    kv_op = _plain(k), _plain(v)
    if heads == kv_heads:
        groups, unrepeated = _repeats(captured, *kv_op, heads)
    rank = len(shape_of(q))
    return Attention(
        anchor=node,
        replaced=node,
        module=_module(node),
        source="sdpa",
        q=_plain(q),
        k=kv_op[0],
        v=kv_op[1],
        heads=heads,
        kv_heads=kv_heads // groups,
        scale=float(scale) if scale is not None else float(int(shape_of(q)[-1]) ** -0.5),
        window=window,
        chunk=chunk,
        by_head=by_head,
        groups=groups,
        slopes=slopes,
        slopes_node=slopes_node,
        unrepeated=unrepeated,
        out_order=tuple(range(rank)),
    )


def _shared_probe(
    captured: Captured, batch: int, length: int, given: Values | None = None, positions: Tensor | None = None
) -> Probe:
    """A probe with no values but these given; layers share their mask, so the last one is kept for the next layer."""
    if length > MOST_SHARED or positions is not None:  # its values are too large to be kept, or asked for once
        return Probe(captured, batch, length, given, positions=positions)
    key = (batch, length, id(captured.graph), *((n.name, id(v)) for n, v in (given or {}).items()))
    kept: dict[Any, Probe] = captured.graph.meta.setdefault("kvrewrite_probes", {})
    if key not in kept:
        if len(kept) > 2:
            kept.clear()
        kept[key] = Probe(captured, batch, length, given)  # holds what is given, so that no other has its id
    return kept[key]


def _as_long_as_it_runs(captured: Captured, length: int, run: Callable[[int], Tensor]) -> Tensor:
    """What `run` gives for `length` tokens, or for the most below that for which a table that it reads has entries.

    The model can't be run on longer texts either, which `captured.max_positions` then says.
    """
    try:
        return run(length)
    except ProbeError:
        if length <= MIN_LENGTH:
            raise
    low, high = MIN_LENGTH, length  # low: runs, or the error is raised again; high: does not
    best = run(low)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            best, low = run(middle), middle
        except ProbeError:
            high = middle
    captured.max_positions = low if captured.max_positions is None else min(low, captured.max_positions)
    return best


def _runs_far(added_at: AddedAt, length: int) -> bool:
    """Whether what is added to scores can be evaluated for the first and the last of `length` tokens alone."""
    try:
        added_at(2, torch.tensor([0, length - 1]))
    except ProbeError:
        return False
    return True


def _as_far_as_it_runs(captured: Captured, length: int, far: int, added_at: AddedAt) -> int:
    """`far`, or the most below that for which a table that is read has entries; `length`, which runs, at least."""
    if far <= length or _runs_far(added_at, far):
        return far
    if not _runs_far(added_at, length):
        raise NoAttention(
            f"its mask can't be evaluated at chosen positions of a text, though at all of {length} tokens"
        )
    low, high = length, far
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _runs_far(added_at, middle) else (low, middle)
    captured.max_positions = low if captured.max_positions is None else min(low, captured.max_positions)
    return low


def _once(captured: Captured, what: str, compute: Callable[[], Any]) -> Any:
    """What `compute` gives, computed once for all layers in which it is the same, as the text `what` says."""
    known: dict[str, Any] = captured.graph.meta.setdefault("kvrewrite_known", {})
    if what not in known:
        known[what] = compute()
    return known[what]


def forget_probes(captured: Captured) -> None:
    """Frees what the analysis remembers between anchors."""
    for name in ("kvrewrite_probes", "kvrewrite_known"):
        captured.graph.meta.pop(name, None)


def _check_operands(captured: Captured, q: fx.Node, k: fx.Node, v: fx.Node) -> tuple[int, int]:
    """(heads, kv heads) of q, k and v of shape (..., length, features); refuses cross-attention and odd ranks."""
    for name, node in (("query", q), ("key", k), ("value", v)):
        shape = shape_of(node)
        if not 3 <= len(shape) <= 4 or not _is_length(captured, shape[-2]):
            raise NoAttention(
                f"its {name} has the shape {tuple(map(str, shape))}; expected (batch, heads, length, features) with "
                "the length of the input (cross-attention and memories are not supported)"
            )
    return _heads(captured, q), _heads(captured, k)


def _heads(captured: Captured, node: fx.Node) -> int:
    """Heads of a (B, H, S, D) or (B * H, S, D) operand."""
    shape = shape_of(node)
    if len(shape) == 4:
        return int(shape[1])
    return _ratio(captured, shape[:1])


def _ratio(captured: Captured, lead: tuple[Any, ...]) -> int:
    """How many heads `lead`, sizes whose product is batch * heads, stands for."""
    counts = set()
    for batch in (3, 5):
        sizes = symbols(captured, batch, 7)
        product = 1
        for size in lead:
            expr = symbol(size)
            product *= int(expr.subs(sizes)) if hasattr(expr, "subs") else int(expr)
        counts.add(product / batch)
    if len(counts) != 1 or not (heads := counts.pop()).is_integer():
        raise NoAttention(f"batch and heads can't be told apart in the dims {tuple(map(str, lead))}")
    return int(heads)


# ------------------------------------------------------------------------------------------------ flex_attention
def _find_flex(captured: Captured, node: fx.Node) -> Attention:
    args: Any = node.args
    q, k, v, score_mod, block_mask, scale = args[:6]
    score_buffers: Any = args[7] if len(args) > 7 else ()
    mask_buffers: Any = args[8] if len(args) > 8 else ()
    mask_mod = block_mask[-1]
    heads, kv_heads = _check_operands(captured, q, k, v)
    out = [u for u in node.users if u.args[1:] == (0,)]
    if len(out) != 1 or len(node.users) != 1:
        raise NoAttention("flex_attention's log-sum-exp is used by the model")
    buffers = [b for b in (*score_buffers, *mask_buffers) if isinstance(b, fx.Node)]
    behind = value_inputs(buffers)
    _check_known(captured, behind)
    graphs = [get_attr(captured.graph, str(g.target)) for g in (score_mod, mask_mod)]
    inner = {n for g in graphs for n in g.graph.nodes}

    live = Live()

    def chain_at(
        batch: int, length: int, given: Values | None = None, positions: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        probe = _shared_probe(captured, batch, length, live.given if given is None else given, positions)
        tokens = torch.arange(length) if positions is None else positions
        index = [
            at.reshape([-1 if i == d else 1 for i in range(4)])
            for d, at in enumerate((torch.arange(batch), torch.arange(heads), tokens, tokens))
        ]
        read = [[probe(b) if isinstance(b, fx.Node) else b for b in bs] for bs in (score_buffers, mask_buffers)]

        def chain(scores: Tensor) -> Tensor:
            logits = _run_subgraph(graphs[0], [scores * scale, *index, *read[0]])
            keep = _run_subgraph(graphs[1], [*index, *read[1]])
            return torch.where(keep, logits.expand(batch, heads, length, length), -math.inf)

        return chain

    live = find_live(captured, behind, None, chain_at, heads)
    # The functions read their buffers at the numbers of tokens.
    whole = [b.name for b in buffers if tensor_of(b) is not None and any(_mentions(captured, s) for s in shape_of(b))]
    far = not any(why_not(captured, nodes) for nodes in (behind, {n for n in inner if n.op == "call_function"}))

    def added_at(length: int, positions: Tensor | None) -> Tensor:
        return chain_at(1, length, None, positions)(torch.zeros(1, heads, length, length, dtype=torch.float64))

    bias = classify_everywhere(captured, behind | inner, heads, added_at, far and not whole)
    small = (SMALL_BATCH, heads, SMALL_LENGTH, SMALL_LENGTH)
    classify(chain_at(SMALL_BATCH, SMALL_LENGTH)(torch.zeros(small, dtype=torch.float64)))
    found = fit(chain_at(SMALL_BATCH, SMALL_LENGTH), small, SMALL_LENGTH)
    groups, unrepeated = _repeats(captured, _plain(k), _plain(v), heads) if heads == kv_heads else (1, (None, None))
    return Attention(
        anchor=node,
        replaced=out[0],
        module=_module(node),
        source="flex_attention",
        q=_plain(q),
        k=_plain(k),
        v=_plain(v),
        heads=heads,
        kv_heads=kv_heads // groups,
        scale=found.scale,
        softcap=found.softcap,
        window=bias.window,
        chunk=bias.chunk,
        by_head=bias.by_head,
        groups=groups,
        slopes=_with_learned(bias.slopes, live, heads),
        slopes_node=live.slopes,
        factors=live.factors,
        unrepeated=unrepeated,
        out_order=(0, 1, 2, 3),
    )


def _run_subgraph(gm: fx.GraphModule, inputs: list[Any]) -> Tensor:
    """The value of a score or mask function on whole tensors of indices instead of single ones."""
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = get_attr(gm, str(node.target))
        elif node.op == "output":
            result = fx.node.map_arg(node.args[0], lambda n: values[n])
            return result[0] if isinstance(result, (tuple, list)) else result
        else:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
            try:
                values[node] = run_op(node, args, kwargs)
            except FAILURES as error:
                raise ProbeError(f"a score or mask function could not be evaluated: {error}") from error
    raise ProbeError("a score or mask function has no output")


# ------------------------------------------------------------------------------------------------ softmax
@dataclass
class Contraction:
    """A product of two tensors over one dim: out[lead, m, n] = sum over c of left[lead, m, c] * right[lead, c, n].

    `left` is brought to (lead..., m, c), `right` to (lead..., n, c); `out_order` permutes (lead..., m, n) into the
    order that the node produces.
    """

    node: fx.Node
    left: Operand
    right: Operand
    out_order: tuple[int, ...]


def contraction(node: fx.Node, left: fx.Node | None = None) -> Contraction:
    """`node` as a Contraction. left: the operand that must be the left one, else the one with dim -2 of the result."""
    if is_op(node, aten.einsum.default):
        return _einsum(node, left)
    first, second = node.args[1:3] if is_op(node, aten.baddbmm.default) else node.args[:2]  # type: ignore[misc]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    if left is not None and first is not left:
        raise NoAttention("the attention weights are the right operand of their product with the values")
    a, b = len(shape_of(first)), len(shape_of(second))
    if a < 3 or a != b:
        raise NoAttention(f"operands of {a} and {b} dims; expected batched matrices")
    identity = tuple(range(a))
    swapped = (*range(a - 2), a - 1, a - 2)
    right = Operand(second, swapped)
    if is_op(second, aten.transpose.int) and {d % a for d in second.args[1:]} == {a - 2, a - 1}:  # type: ignore[operator]
        assert isinstance(second.args[0], fx.Node)
        right = Operand(second.args[0], identity)
    return Contraction(node, Operand(first, identity), right, identity)


def _einsum(node: fx.Node, left: fx.Node | None) -> Contraction:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if "->" not in equation or "." in equation or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        raise NoAttention(f"the einsum {equation!r} is none of two named operands")
    inputs, out = equation.split("->")
    letters = inputs.split(",")
    pairs = list(zip(letters, operands, strict=True))
    if any(len(set(s)) != len(s) for s in (*letters, out)):
        raise NoAttention(f"the einsum {equation!r} takes diagonals")
    if left is None:
        if out[-2] not in letters[0]:
            pairs.reverse()
    elif pairs[0][1] is not left:
        pairs.reverse()
    (a, first), (b, second) = pairs
    summed = [c for c in a if c in b and c not in out]
    free = [c for c in out if c not in a]
    own = [c for c in out if c not in b]
    only_summed = set(a) - set(out) == set(b) - set(out) == set(summed)
    if len(summed) != 1 or len(free) != 1 or not own or not only_summed:
        raise NoAttention(f"the einsum {equation!r} is not a product of batched matrices")
    # Of weights (..., query, key) the last dim but one is the query, wherever the result has it.
    m = out[-2] if left is None else a[-2]
    if m not in own:
        raise NoAttention(f"the einsum {equation!r} mixes queries and keys")
    lead = [c for c in out if c not in (m, free[0])]
    if any(c not in a for c in lead):
        raise NoAttention(f"the einsum {equation!r} has batch dims that only the keys have")
    order_a = tuple(a.index(c) for c in (*lead, m, summed[0]))
    # Lead dims that `right` lacks (query heads of a group) are marked -1: they become dims of size 1.
    order_b = tuple(b.find(c) for c in (*lead, free[0], summed[0]))
    canonical = [*lead, m, free[0]]
    return Contraction(node, Operand(first, order_a), Operand(second, order_b), tuple(canonical.index(c) for c in out))


def _groups_last(captured: Captured, qk: Contraction, av: Contraction) -> tuple[Contraction, Contraction]:
    """Both products of an attention with their lead dims in one order, in which those that the keys and values are broadcast
    over come last: the query heads of one kv head stand side by side then, as the canonical op has them.
    """
    rank = len(av.left.order)
    if len(qk.left.order) != rank or sorted(av.left.order) != list(range(rank)):
        return qk, av  # the weights have other dims than the scores
    # Lead dims of both in the order of the weights.
    qk = _reordered(qk, sorted(range(rank - 2), key=lambda i: qk.out_order.index(i)))
    av = _reordered(av, sorted(range(rank - 2), key=lambda i: av.left.order[i]))

    def broadcast(operand: Operand, i: int) -> bool:
        dim = operand.order[i]
        return dim < 0 or symbol(shape_of(operand.node)[dim]) == 1

    queries = shape_of(qk.left.node)
    missing = [
        i
        for i in range(rank - 2)
        if broadcast(qk.right, i) and broadcast(av.right, i) and symbol(queries[qk.left.order[i]]) != 1
    ]
    order = [*(i for i in range(rank - 2) if i not in missing), *missing]
    return _reordered(qk, order), _reordered(av, order)


def _reordered(product: Contraction, lead: list[int]) -> Contraction:
    """A contraction with its lead dims in another order."""
    order = [*lead, len(lead), len(lead) + 1]
    left, right = (
        Operand(operand.node, tuple(operand.order[i] for i in order)) for operand in (product.left, product.right)
    )
    return Contraction(product.node, left, right, tuple(order.index(i) for i in product.out_order))


def _find_softmax(captured: Captured, node: fx.Node) -> Attention:
    shape = shape_of(node)
    dim = _softmax_dims(node)[0] % len(shape)
    if dim != len(shape) - 1:
        raise NoAttention("a softmax over the sequence that is not over its last dim")
    if "log" in node.target._schema.name:  # type: ignore[union-attr]
        raise NoAttention("a log-softmax over the sequence")
    if len(shape) < 3 or not _is_length(captured, shape[-2]):
        raise NoAttention("a softmax over the sequence that is not an attention of every token")
    source = node.args[0]
    assert isinstance(source, fx.Node)
    scores = _scores_before(captured, source)
    qk = contraction(scores)
    av_node, weights = _values_after(captured, node)
    qk, av = _groups_last(captured, qk, contraction(av_node, left=weights))
    # From here on every use of the scores must end in the product with the values.
    if output_node(captured.graph) in dependents([scores], stop=lambda n: n is av_node):
        raise NoAttention("its scores or weights are used for something else too, so they can't be replaced")
    lead = _scores_lead(captured, scores, qk)
    heads = _ratio(captured, lead)
    _check_weights(captured, node, weights, heads)
    bias, found, sinks, live = _fold_chain(captured, source, scores, heads)
    *before, features, keys = av.right.order
    kv = qk.right, Operand(av.right.node, (*before, keys, features))
    kv_heads = _operand_heads(captured, kv[0])
    if _operand_heads(captured, kv[1]) != kv_heads:
        kv_heads = heads  # one is repeated in the graph, the other by broadcasting: both are expanded
    groups = 1
    unrepeated: Unrepeated = (None, None)
    if kv_heads == heads:
        groups, unrepeated = _repeats(captured, *kv, heads)
    return Attention(
        anchor=node,
        replaced=av_node,
        module=_module(av_node),
        source="softmax",
        q=qk.left,
        k=kv[0],
        v=kv[1],
        heads=heads,
        kv_heads=kv_heads // groups,
        scale=found.scale,
        softcap=found.softcap,
        window=bias.window,
        chunk=bias.chunk,
        by_head=bias.by_head,
        groups=groups,
        sinks=sinks,
        slopes=_with_learned(bias.slopes, live, heads),
        slopes_node=live.slopes,
        factors=live.factors,
        unrepeated=unrepeated,
        out_order=av.out_order,
    )


def _is_scores(captured: Captured, node: fx.Node) -> bool:
    """Whether `node` is a contraction whose result has two dims of the length."""
    if not is_op(node, *CONTRACTIONS):
        return False
    return sum(_is_length(captured, size) for size in shape_of(node)) == 2


def _scores_before(captured: Captured, source: fx.Node) -> fx.Node:
    """The product of queries and keys that `source`, a softmax's input, is made from."""
    stop = lambda n: _is_scores(captured, n) or only_shape(n) or is_projection(n)  # noqa: E731
    found = [n for n in ancestors([source], stop=stop) if _is_scores(captured, n)]
    dependent = [n for n in found if depends_on_data(n)]
    if not dependent:
        raise NoAttention(
            "a softmax over the sequence whose scores are no product of queries and keys: tokens are pooled or gated by it "
            "(compressed keys and values)"
        )
    if len(dependent) > 1:
        raise NoAttention("its scores are the sum of several products (disentangled or relative-position attention)")
    return dependent[0]


def _values_after(captured: Captured, softmax: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The product of the weights and the values after `softmax`, and its operand that holds the weights."""
    reached = dependents([softmax], stop=lambda n: is_op(n, *CONTRACTIONS))

    def is_weights(n: fx.Node) -> bool:
        return n in reached and sum(_is_length(captured, size) for size in shape_of(n)) >= 2

    found = sorted(n for n in reached if is_op(n, *CONTRACTIONS) and any(is_weights(i) for i in n.all_input_nodes))
    if len(found) != 1:
        raise NoAttention(f"{len(found)} products use its weights; expected one, with the values")
    weights = [n for n in found[0].all_input_nodes if n in reached]
    if len(weights) != 1:
        raise NoAttention("both operands of the product with the values depend on the weights")
    others = [n for n in found[0].all_input_nodes if n not in reached]
    if not any(_is_length(captured, size) for n in others for size in shape_of(n)):
        raise NoAttention("its weights are mixed between heads before the product with the values (talking heads)")
    return found[0], weights[0]


def _scores_lead(captured: Captured, scores: fx.Node, qk: Contraction) -> tuple[Any, ...]:
    shape = shape_of(scores)
    ordered = [shape[qk.out_order.index(i)] for i in range(len(shape))]
    if not all(_is_length(captured, size) for size in ordered[-2:]):
        got = tuple(map(str, shape))
        raise NoAttention(f"its scores have the shape {got}; expected (batch, heads, length, length)")
    return tuple(ordered[:-2])


def _operand_heads(captured: Captured, operand: Operand) -> int:
    """Heads that an operand has before it is broadcast; its missing dims must be the last ones before the length."""
    shape = shape_of(operand.node)
    lead = tuple(1 if d < 0 else shape[d] for d in operand.order[:-2])
    return _ratio(captured, lead)


def _check_weights(captured: Captured, softmax: fx.Node, weights: fx.Node, heads: int) -> None:
    """Refuses models that change the weights between the softmax and the product with the values."""
    probe = Probe(captured, SMALL_BATCH, SMALL_LENGTH)
    given = probe.random(softmax)
    expected = given[..., :SMALL_LENGTH]
    behind = ancestors([weights], stop=lambda n: n is softmax or only_shape(n))
    others = other_values(captured, behind, 1)
    for values in ({}, others) if others else ({},):  # as they are, and with other parameters
        got = Probe(captured, SMALL_BATCH, SMALL_LENGTH, {softmax: given, **values})(weights)
        if got.numel() != expected.numel() or not torch.equal(got.reshape(expected.shape), expected):
            raise NoAttention("its weights are changed between the softmax and the product with the values")


def _fold_chain(
    captured: Captured, source: fx.Node, scores: fx.Node, heads: int
) -> tuple[Bias, Fit, fx.Node | None, Live]:
    """What becomes of the scores on the way to `source`, the softmax's input."""
    behind = ancestors([source], stop=lambda n: n is scores or only_shape(n)) - {scores}
    baddbmm = is_op(scores, aten.baddbmm.default)
    added = scores.args[0] if baddbmm else None
    if isinstance(added, fx.Node):
        behind |= value_inputs([added])
    _check_known(captured, behind)

    live = Live()

    def chain_at(
        batch: int, length: int, given: Values | None = None, positions: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        shared = _shared_probe(captured, batch, length, live.given if given is None else given, positions)
        outer = {n for n in behind if n not in dependents([scores])}
        known = {n: shared(n) for n in outer if any(u not in outer for u in n.users)}

        def chain(x: Tensor) -> Tensor:
            if baddbmm:
                assert isinstance(added, fx.Node)
                beta, alpha = float(scores.kwargs.get("beta", 1)), float(scores.kwargs.get("alpha", 1))  # type: ignore[arg-type]
                x = beta * shared(added) + alpha * x
            out: Tensor = Probe(captured, batch, length, {**known, scores: x}, positions=positions)(source)
            return out.reshape(batch, heads, length, out.shape[-1])

        return chain

    live = find_live(captured, {n for n in behind if n not in dependents([scores])}, scores, chain_at, heads)

    def added_at(length: int, positions: Tensor | None) -> Tensor:
        shape = Probe(captured, 1, length).shape(scores)
        return chain_at(1, length, None, positions)(torch.zeros(shape, dtype=torch.float64))

    def classified() -> tuple[Bias, Bias, Fit]:
        shape = Probe(captured, SMALL_BATCH, SMALL_LENGTH).shape(scores)
        bias = classify_everywhere(captured, behind, heads, added_at, why_not(captured, behind) is None)
        small = chain_at(SMALL_BATCH, SMALL_LENGTH)
        few = classify(small(torch.zeros(shape, dtype=torch.float64)))
        return bias, few, fit(small, shape, SMALL_LENGTH)

    roots = [source, added] if isinstance(added, fx.Node) else [source]
    # Layers of which a factor is learned have it set to one in the chain, so it is no part of what is the same.
    factors = [f"{n.name} {value.tolist()}" for n, value in live.given.items()]
    scaling = dict(scores.kwargs) if baddbmm else ""
    what = f"{heads} {factors} {scaling} {subgraph_text(captured, roots, [scores.name])}"
    bias, few, found = _once(captured, what, classified)
    sinks = None
    if few.sinks is not None:
        sinks = _holder(_shared_probe(captured, SMALL_BATCH, SMALL_LENGTH, live.given), behind, few.sinks)
        if sinks is None:
            raise NoAttention("the scores have an extra column that does not come from one parameter a head")
    return bias, found, sinks, live


def _holder(probe: Probe, nodes: set[fx.Node], values: Tensor) -> fx.Node | None:
    """The earliest of `nodes` that holds `values`, one number a head, in any shape."""
    for node in sorted(nodes):
        value = tensor_of(node)
        if value is None or not value.is_floating_point() or depends_on_data(node):
            continue
        if math.prod(probe.shape(node)) != values.numel():
            continue
        if torch.allclose(probe(node).flatten().to(values.dtype), values, rtol=1e-6, atol=1e-9):
            return node
    return None


def _with_learned(slopes: Tensor | None, live: Live, heads: int) -> Tensor | None:
    """The slopes of all heads; where they are learned there are some, whatever they are now."""
    if slopes is None:
        return torch.zeros(heads) if live.slopes is not None else None
    return slopes.expand(heads).clone()


# ------------------------------------------------------------------------------------------------ repeated kv heads
def _as_heads(value: Tensor, operand: Operand, batch: int) -> Tensor:
    """An operand's value as (B, heads, S, D)."""
    value = value.permute([d for d in operand.order if d >= 0])
    return value.reshape(batch, -1, *value.shape[-2:])


def _repeats(captured: Captured, k: Operand, v: Operand, heads: int) -> tuple[int, Unrepeated]:
    """How often every kv head stands next to itself in k and v, and nodes (B, Hkv, S, D) from before the repeat."""
    learned = other_values(captured, ancestors([k.node, v.node], stop=is_projection), 1)
    probe = Probe(captured, SMALL_BATCH, SMALL_LENGTH, learned, cut=is_projection)
    values = [_as_heads(probe(o.node), o, SMALL_BATCH) for o in (k, v)]
    for groups in (g for g in range(heads, 1, -1) if heads % g == 0):
        kept = [x[:, ::groups] for x in values]
        if all(torch.equal(x, y.repeat_interleave(groups, dim=1)) for x, y in zip(values, kept, strict=True)):
            found = [_before_repeat(probe, o.node, y) for o, y in zip((k, v), kept, strict=True)]
            return groups, (found[0], found[1])
    return 1, (None, None)


def _before_repeat(probe: Probe, node: fx.Node, kept: Tensor) -> fx.Node | None:
    """A node on the way to `node` that already is (B, Hkv, S, D), so that the repeat need not be computed."""
    for _ in range(12):
        if len(node.all_input_nodes) < 1 or not isinstance(node.args[0], fx.Node) or probe.cut(node):
            return None
        node = node.args[0]
        value = tensor_of(node)
        if value is not None and value.dim() == 4 and probe.shape(node) == tuple(kept.shape):
            return node if torch.equal(probe(node), kept) else None
    return None
