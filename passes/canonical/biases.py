"""Finds what is added to scores by evaluating it: a mask, ALiBi, another bias per head, or something unknown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import get_attr
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
from kvrewrite.passes.canonical.learned import Values
from kvrewrite.passes.canonical.operands import NoAttention
from kvrewrite.passes.canonical.probe import MASKED, Probe, ProbeError, integers_in, seen_in

MIN_LENGTH, MAX_LENGTH = 24, 8192
USUAL_LENGTH = 2048  # tokens of a mask's probe
MOST_SHARED = 64  # a probe of at most so many tokens is shared by layers
USUAL_SCORES = 1 << 24  # most elements of the scores in such a probe
NEAR_SCORES = 1 << 22  # the same if larger distances are compared too
LARGEST_WINDOW = 1 << 24  # larger integers are what masks fill in
MAX_SCORES = 1 << 29  # most elements of a score tensor in a probe
TOLERANCE = 1e-6


@dataclass
class Bias:
    """What is added to the scores: a mask, and ALiBi slopes or None; sinks: the values of extra columns (attention
    sinks) or None.

    by_head: (window, chunk) per head if they differ; window and chunk are 0 then.
    """

    window: int
    chunk: int
    slopes: Tensor | None
    sinks: Tensor | None
    by_head: list[tuple[int, int]] | None = None


def classify(added: Tensor, positions: Tensor | None = None, slopes: Tensor | None = None) -> Bias:
    """Classifies `added` (B, H, n, n or n + 1): a known mask, plus nothing or ALiBi, plus attention sinks in the last
    column.

    positions: of the tokens, ascending from 0, as `classify_mask` needs them; default: all of a text. slopes: ALiBi's
    (H,), if known: far from a token, ALiBi falls below the values that masks fill in. Softmax ignores a constant added
    to a whole row, so everything is relative to what each query adds to its own token.
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
            raise NoAttention("the scores have extra columns that are not one constant logit per head")
        sinks = relative[0, :, 0]
    return Bias(window, chunk, found, sinks, by_head)


def _relative(added: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what is added to the scores (B, H, n, n) relative to each query's own token, and its (B, H, n, 1)."""
    added = added[..., : added.shape[2]]
    own = added.diagonal(dim1=-2, dim2=-1)[..., None]
    if not bool((own > MASKED).all()):
        raise NoAttention("the mask hides a token from itself, which no causal mask does")
    return (added - own).nan_to_num(neginf=-math.inf), own


def _seen(bias: Tensor, positions: Tensor, slopes: Tensor | None) -> Tensor:
    """Returns which entries of a bias (H, n, n) are not masked, given ALiBi with these slopes."""
    if slopes is not None:
        distance = (positions[:, None] - positions).clamp(min=0)
        bias = bias + slopes.to(bias.dtype)[:, None, None] * distance
    return seen_in(bias)


def _classify_bias(bias: Tensor, seen: Tensor, positions: Tensor) -> Tensor | None:
    """Returns the ALiBi slopes (H,) of a bias (H, n, n), 0 on the diagonal; only entries in `seen` count. None: no
    ALiBi."""
    visible = torch.where(seen, bias, 0.0)
    if float(visible.abs().max()) <= TOLERANCE:
        return None
    distance = (positions[:, None] - positions).to(bias.dtype)
    slopes = -visible[:, 1, 0] / distance[1, 0]
    off = torch.where(seen, visible + slopes[:, None, None] * distance, 0.0).abs()
    # The model may have rounded slopes and positions to its own dtype.
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
    """Fits the scale and softcap of `chain`, which maps scores of `shape` to logits (B, H, S, S or S + 1).

    Raises NoAttention if no scale and softcap reproduce the chain on random scores.
    """
    zero = chain(torch.zeros(shape, dtype=torch.float64))[..., :length]
    own_zero = zero.diagonal(dim1=-2, dim2=-1)[..., None]
    seen = seen_in(zero - own_zero)
    generator = torch.Generator().manual_seed(0)
    below = torch.ones(length, length, dtype=torch.float64).tril(-1)

    def answers(size: float, only_sign: bool) -> tuple[Tensor, Tensor]:
        """Returns scores and the chain's answer. The diagonal stays 0: this separates a change of whole rows."""
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = (x.sign() if only_sign else x) * size * below
        y = chain(x)[..., :length]
        y = y - y.diagonal(dim1=-2, dim2=-1)[..., None] - (zero - own_zero)
        used = seen & (below > 0)
        return x.reshape(y.shape)[used], y[used]

    reason = "what happens to the scores between q·k and the softmax is not a scale and a softcap"
    x, y = answers(1e-4, only_sign=True)
    scale = float((y / x).median())
    if not math.isfinite(scale) or scale <= 0 or not float((y / x / scale - 1).abs().max()) <= 1e-5:  # also NaN
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
    """Returns the length of the text on which all pairs of a mask, made by `nodes`, are compared.

    planes: how many (length, length) matrices it has. far: larger distances are compared too. Otherwise the text is
    long enough to show every window or chunk that a constant among `nodes` suggests, or as long as the model can take
    if possible.
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
    """Returns the length of a mask that is stored as a table, whose entries may be anything; 0 if there is none."""
    held = [get_attr(captured.graph, str(n.target)) for n in nodes if n.op == "get_attr"]
    tables = [t for t in held if isinstance(t, Tensor) and t.dim() >= 2 and t.shape[-1] == t.shape[-2]]
    return max((t.shape[-1] for t in tables), default=0)


def _far_length(captured: Captured, nodes: set[fx.Node], planes: int) -> int:
    """Returns the distance up to which a mask is compared: the model's longest length, else FARTHEST; more if a
    constant among `nodes` asks for it; less if the mask has many planes."""
    wanted = captured.max_positions or max(FARTHEST, 2 * _largest_window(captured, nodes) + 3)
    return min(wanted, spread_length(math.isqrt(USUAL_SCORES // planes)))


def _largest_window(captured: Captured, nodes: set[fx.Node]) -> int:
    """Returns the largest constant among `nodes` that may be a mask's window."""
    return max((i for i in integers_in(captured, nodes) if i < LARGEST_WINDOW), default=0)


# What is added to the scores (B, H, n, n or n + 1) of a text with so many tokens, or of its n tokens at these
# positions.
AddedAt = Callable[[int, Tensor | None], Tensor]


def classify_everywhere(captured: Captured, nodes: set[fx.Node], planes: int, added_at: AddedAt, far: bool) -> Bias:
    """Classifies what is added to scores: at all pairs of the first tokens and at every distance up to the longest
    length.

    nodes: the ops that make it; planes: how many matrices it has; far: whether it can be evaluated at chosen positions.
    If it can't, only all pairs are compared. `captured.compared` records the distance that was reached. Raises
    NoAttention if it is of no known kind, or is something else far from a token than near it.
    """
    far = far and _runs_far(added_at, 2)
    length = probe_length(captured, nodes, planes, far)
    if planes * length * length > MAX_SCORES:
        raise NoAttention(f"telling its mask needs {planes} heads of {length} x {length} scores, which is too much")
    added = as_long_as_it_runs(captured, length, lambda n: added_at(n, None))
    near, length = classify(added), added.shape[2]
    del added  # this is the largest tensor of the analysis
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
    """Classifies what is added to scores at every distance below `far`; it is `near` on the first `length` tokens."""
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


def check_known(captured: Captured, nodes: set[fx.Node]) -> None:
    """Refuses masks and biases that depend on content or on values that are not available."""
    for node in nodes:
        if node.op == "placeholder" and node.target == "input_ids":
            raise NoAttention("its mask or bias depends on the content of the text")
        if node.op == "get_attr":
            value = get_attr(captured.graph, str(node.target))
            if isinstance(value, Tensor) and value.device.type == "meta" and not isinstance(value, torch.nn.Parameter):
                raise NoAttention(f"its mask or bias reads {node.target}, which has no data (it is on the meta device)")


def shared_probe(
    captured: Captured, batch: int, length: int, given: Values | None = None, positions: Tensor | None = None
) -> Probe:
    """Returns a probe with only these given values; it is kept for the next layer, because layers share their mask."""
    if length > MOST_SHARED or positions is not None:  # its values are too large to keep, or asked for once
        return Probe(captured, batch, length, given, positions=positions)
    key = (batch, length, id(captured.graph), *((n.name, id(v)) for n, v in (given or {}).items()))
    kept: dict[Any, Probe] = captured.graph.meta.setdefault("kvrewrite_probes", {})
    if key not in kept:
        if len(kept) > 2:
            kept.clear()
        kept[key] = Probe(captured, batch, length, given)  # keeps the given values alive, so that their ids stay unique
    return kept[key]


def as_long_as_it_runs(captured: Captured, length: int, run: Callable[[int], Tensor]) -> Tensor:
    """Returns `run(length)`, or `run` of the largest smaller length for which a table that it reads has entries.

    The model can't run on longer texts either; `captured.max_positions` is set to that length.
    """
    try:
        return run(length)
    except ProbeError:
        if length <= MIN_LENGTH:
            raise
    low, high = MIN_LENGTH, length  # low runs, or raises the error again; high does not run
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
    """Returns `far`, or the largest smaller length for which a table has entries; at least `length`, which runs."""
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


def once(captured: Captured, what: str, compute: Callable[[], Any]) -> Any:
    """Computes something once for all layers in which it is the same, as identified by the text `what`."""
    known: dict[str, Any] = captured.graph.meta.setdefault("kvrewrite_known", {})
    if what not in known:
        known[what] = compute()
    return known[what]


def forget_probes(captured: Captured) -> None:
    """Frees what the analysis remembers between anchors."""
    for name in ("kvrewrite_probes", "kvrewrite_known"):
        captured.graph.meta.pop(name, None)
