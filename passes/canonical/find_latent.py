"""Finds the latent that keys and values are made of (MLA; DeepSeek-V2, arXiv 2405.04434, section 2.1) by dataflow.

Requires the canonical graph. At a site with a latent c (B, T, R), head h has the key [W_uk,h c, r] and the value W_uv,h
c; the rotated part r (B, T, P) is the same for all heads. Both are found by dependence: W_uk c is the projection
upstream of the key that reads the same input as the value's projection, and r is the rest of the key. How they are
combined (views, splits, copies into an empty tensor) is found by evaluating it on numbered channels. Anything else is
reported as not found, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kvrewrite.capture.captured import Captured
from kvrewrite.ir.fx import ancestors, arg, is_op, shape_of, tensor_of
from kvrewrite.ir.projections import is_weight_op, projections
from kvrewrite.passes.canonical.find_rope import depends
from kvrewrite.passes.canonical.probe import Probe, ProbeError

aten = torch.ops.aten
TOKENS = 2  # tokens that keys and values are evaluated on


@dataclass
class Rows:
    """The rows of each head in an up-projection's weight (N, R): head h has [start + h * stride, + width)."""

    weight: fx.Node
    start: int
    stride: int
    width: int


@dataclass
class Latent:
    """What the keys and values of one site are made of.

    latent: (B, T, R) or (B, 1, T, R); rotary: (B, T, P), (B, 1, T, P) or (B, T, 1, P); keys and values: each head's
    rows of W_uk (n) and W_uv (Dv). rotary_first: whether a key is [r, W_uk c] instead of [W_uk c, r].
    """

    latent: fx.Node
    rotary: fx.Node
    keys: Rows
    values: Rows
    rank: int
    rotary_dim: int
    rotary_first: bool


@dataclass
class NoLatent:
    """The reason why a site's keys and values are not known to be made of one latent; falsy."""

    reason: str

    def __bool__(self) -> bool:
        return False


class _Unlike(Exception):
    """Keys or values are not made of the latent in the required form."""


def find_latent(captured: Captured, site: fx.Node) -> Latent | NoLatent:
    """Returns the latent of a canonical attention node."""
    q, k, v = (arg(site, name) for name in ("q", "k", "v"))
    of_values, of_keys = projections(v), projections(k)
    if len(of_keys) < 2:
        return NoLatent("its keys come from one projection, without a part that all heads share")
    if len(of_values) != 1:
        return NoLatent(f"its values come from {len(of_values)} projections, expected one of the latent")
    up_v = of_values[0]
    both = [n for n in of_keys if n.args[0] is up_v.args[0]]
    if len(both) != 1:
        return NoLatent("no projection of its keys reads what the projection of its values reads")
    up_k = both[0]
    if shape_of(q)[1] != shape_of(k)[1]:
        return NoLatent(f"its {shape_of(q)[1]} query heads share {shape_of(k)[1]} heads of keys")
    try:
        for up in (up_k, up_v):
            _check_projection(up)
        rotary = _shared_part(k, up_k)
        return _read_off(captured, k, v, up_k, up_v, rotary)
    except _Unlike as error:
        return NoLatent(str(error))
    except ProbeError as error:
        return NoLatent(f"how its keys and values are put together could not be evaluated ({error})")


def _check_projection(up: fx.Node) -> None:
    """Checks that the projection is c W^T and that W does not depend on the text."""
    if not is_op(up, aten.linear.default):
        raise _Unlike(f"the projection of the latent is {up.target}, expected a linear layer")
    if len(up.args) > 2 and up.args[2] is not None:
        raise _Unlike("the projection of the latent has a bias")
    if not isinstance(up.args[1], fx.Node) or any(n.op == "placeholder" for n in ancestors([up.args[1]])):
        raise _Unlike("the weight of the latent's projection depends on the input")


def _channels(node: fx.Node) -> int | None:
    """Returns the channels per token of a (B, T, N), (B, 1, T, N) or (B, T, 1, N) node shared by all heads; else
    None."""
    value = tensor_of(node)
    if value is None or not value.is_floating_point() or value.dim() not in (3, 4):
        return None
    moving = [d for d, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
    if moving not in ([0, 1], [0, 2]) or not isinstance(value.shape[-1], int):
        return None
    if value.dim() == 4 and value.shape[3 - moving[1]] != 1:
        return None
    return int(value.shape[-1]) if value.dim() == 4 or moving == [0, 1] else None


def _shared_part(k: fx.Node, up_k: fx.Node) -> fx.Node:
    """Returns the part of the keys that is not made of the latent, before it is broadcast to all heads."""
    region = ancestors([k], stop=is_weight_op)
    latent = depends(region, {up_k})
    others = {n for n in region if is_weight_op(n) and n.op == "call_function"} - {up_k}
    data = depends(region, others) - latent
    frontier = {n for node in latent - {up_k} for n in node.all_input_nodes if n in data}
    if len(frontier) != 1:
        raise _Unlike(f"beside the latent its keys are put together from {len(frontier)} parts, expected one")
    node = frontier.pop()
    best = node if _channels(node) else None
    while node not in others:
        sources = [n for n in node.all_input_nodes if n in data]
        if len(sources) != 1:
            break
        node = sources[0]
        channels = _channels(node)
        if channels and node not in others and (best is None or channels < (_channels(best) or 0)):
            best = node
    if best is None:
        raise _Unlike("the rotated part of its keys is not one that all heads share")
    return best


def _read_off(
    captured: Captured, k: fx.Node, v: fx.Node, up_k: fx.Node, up_v: fx.Node, rotary: fx.Node
) -> Latent | NoLatent:
    """Expresses keys and values as channels of the two projections and of the shared part."""
    n_k, n_v, p = (int(shape_of(n)[-1]) for n in (up_k, up_v, rotary))
    latent = up_k.args[0]
    assert isinstance(latent, fx.Node)
    if _channels(latent) is None or _channels(up_k) is None or _channels(up_v) is None:
        raise _Unlike("the latent has heads of its own")
    keys = _sources(captured, k, {up_k: n_k, rotary: p})
    values = _sources(captured, v, {up_v: n_v})
    shared = keys >= n_k
    at = torch.nonzero(shared[0]).flatten()
    first = len(at) > 0 and int(at[0]) == 0
    place = torch.arange(p) if first else torch.arange(keys.shape[1] - p, keys.shape[1])
    if not torch.equal(shared, shared[:1].expand_as(shared)) or not torch.equal(at, place):
        raise _Unlike("the part of the keys that all heads share is not at the beginning or at the end of every head")
    if not torch.equal(keys[:, place], (n_k + torch.arange(p)).expand(len(keys), p)):
        raise _Unlike("heads have the shared part of their keys in another order")
    rest = keys[:, p:] if first else keys[:, : keys.shape[1] - p]
    rank = int(shape_of(latent)[-1])
    expanded = keys.numel() + values.numel()
    if rank + p >= expanded:
        raise _Unlike(
            f"its latent and shared keys ({rank} + {p} channels) are no smaller than keys and values ({expanded})"
        )
    return Latent(latent, rotary, _rows(up_k, rest), _rows(up_v, values), rank, p, first)


def _sources(captured: Captured, node: fx.Node, parts: dict[fx.Node, int]) -> Tensor:
    """Returns, for each head and channel of a key or value (B, H, T, D), the channel that it copies, counted through
    `parts` (node -> its channels): (H, D) int64. Raises _Unlike if it is not a copy of a channel of the same token."""
    total = sum(parts.values())
    generator = torch.Generator().manual_seed(0)
    numbers = torch.arange(TOKENS * total, dtype=torch.float64).reshape(TOKENS, total)
    drawn = torch.randn(TOKENS, total, generator=generator, dtype=torch.float64)

    def value(of: Tensor) -> Tensor:
        given, begin = {}, 0
        for part, channels in parts.items():
            # One row: tokens one after another, whichever axes come before the channels.
            probe = Probe(captured, 1, TOKENS)
            given[part] = of[:, begin : begin + channels].reshape(probe.shape(part))
            begin += channels
        found: Tensor = Probe(captured, 1, TOKENS, given)(node)
        return found[0].transpose(0, 1)  # (T, H, D)

    found = value(numbers)
    index = found.round().long()
    inside = (index >= 0) & (index < TOKENS * total)
    token = torch.arange(TOKENS)[:, None, None]
    if not bool((inside & (index // total == token) & (index == found)).all()):
        raise _Unlike("its keys and values are not copies of what the latent is projected to")
    index = index % total
    if not torch.equal(index, index[:1].expand_as(index)) or not torch.equal(
        value(drawn), drawn[token.expand_as(index), index]
    ):
        raise _Unlike("its keys and values are not copies of what the latent is projected to")
    return index[0]


def _rows(up: fx.Node, channels: Tensor) -> Rows:
    """Returns the rows of each head (H, width); they must be adjacent, with the same distance from head to head."""
    heads, width = channels.shape
    start = int(channels[0, 0])
    stride = int(channels[1, 0]) - start if heads > 1 else width
    expected = start + stride * torch.arange(heads)[:, None] + torch.arange(width)
    if stride < 1 or not torch.equal(channels, expected):
        raise _Unlike("the rows of its heads do not follow each other in the weight of the latent's projection")
    weight = up.args[1]
    assert isinstance(weight, fx.Node)
    return Rows(weight, start, stride, width)
