"""Classifies graphs of the torch.compile backend: do they have attention, and do they treat every token by itself?

Attention is recognized by its ops. Tokens can mix in more ways than a list of ops could name (attention by hand,
recurrences, convolutions, fused layers), so the second question is answered by trying: the graph is run with one entry
of its inputs changed, and the other outputs are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

_SDPA = torch.nn.functional.scaled_dot_product_attention
_PASSING = {"dropout", "to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone", "getitem"} | {
    "reshape",
    "view",
    "flatten",
    "transpose",
    "unsqueeze",
    "squeeze",
}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "__matmul__"}


def has_attention(graph: fx.Graph) -> bool:
    """Whether something in a graph of Dynamo is attention: one of torch's functions for it, or a softmax whose result
    is the left side of a matrix product."""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        name = _name(node)
        if node.target is _SDPA or "attention" in name or "attn" in name or "through_cache" in name:
            return True
        if "softmax" in name and any(_name(n) in _PRODUCTS for n in _users_behind(node)):
            return True
    return False


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def _users_behind(node: fx.Node) -> Iterator[fx.Node]:
    """Yields the first users of a node, skipping ops that only pass values on."""
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if _name(user) in _PASSING:
                todo.append(user)
            else:
                yield user


def source_of(node: fx.Node) -> str:
    """Returns Dynamo's name for a graph input."""
    return source_name(getattr(node, "_dynamo_source", None) or node.meta["grapharg"].source)


def source_name(source: Any) -> str:
    """Returns a source of Dynamo in words."""
    name = source.name  # a method up to torch 2.11
    return str(name() if callable(name) else name)


def weights_of(graph: fx.Graph) -> set[int]:
    """Returns which inputs of a graph of Dynamo are parameters or buffers of a module."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    return {i for i, n in enumerate(inputs) if any(part in source_of(n) for part in ("._parameters[", "._buffers["))}


TRIES = 16  # entries of an axis that are changed in turn, from the first to the last


@torch.no_grad()
def is_token_wise(run: Callable[..., Any], inputs: Sequence[Any], weights: set[int]) -> bool:
    """Whether an entry of an input affects only that entry of the outputs.

    inputs: the graph's; weights: the indices of those that are parameters or buffers. Axes are matched from the left,
    as (batch, tokens); the last axis of a floating tensor is channels. An output with another layout must not change at
    all.
    """
    base = _outputs(run, inputs, weights)
    for i, given in enumerate(inputs):
        if i in weights or not isinstance(given, Tensor):
            continue
        for axis in range(given.dim() - given.is_floating_point()):
            size = given.shape[axis]
            for at in sorted({n * (size - 1) // TRIES for n in range(TRIES + 1)}) if size > 1 else ():
                changed = list(inputs)
                changed[i] = _changed(given, axis, at)
                try:
                    found = _outputs(run, changed, weights)
                except (RuntimeError, IndexError):  # not a token, so nothing is shown
                    return False
                if not all(_same_but(x, y, axis, at, size) for x, y in zip(base, found, strict=True)):
                    return False
    return True


def _outputs(run: Callable[..., Any], inputs: Sequence[Any], weights: set[int]) -> list[Tensor]:
    """Returns the graph's outputs, always with the same random numbers. The graph may write to copies of its inputs."""
    copies = [x.clone() if isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter) else x for x in inputs]
    devices = sorted({x.device.index or 0 for x in inputs if isinstance(x, Tensor) and x.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return [x for x in run(*copies) if isinstance(x, Tensor)]


def _changed(given: Tensor, axis: int, at: int) -> Tensor:
    """Returns a copy with one entry changed; integers stay among those that are there, as token ids must."""
    changed = given.clone()
    entry = changed.select(axis, at)
    if given.is_floating_point() or given.is_complex():
        entry.mul_(-1.5).add_(0.375)
    elif given.dtype == torch.bool:
        entry.logical_not_()
    else:
        low, high = given.min(), given.max()
        entry.copy_(torch.where(entry > low, low, high) if low < high else torch.where(entry > 0, entry - 1, 1))
    return changed


def _same_but(before: Tensor, after: Tensor, axis: int, at: int, size: int) -> bool:
    """Whether two outputs differ at most at one entry of an axis."""
    if before.shape != after.shape:
        return False
    if before.dim() > axis and before.shape[axis] == size:
        others = [n for n in range(size) if n != at]
        before, after = before[(slice(None),) * axis + (others,)], after[(slice(None),) * axis + (others,)]
    if not (before.is_floating_point() or before.is_complex()) or not before.numel():
        return torch.equal(before, after)
    near = 16 * torch.finfo(before.dtype).eps * float(before.abs().nan_to_num(0, 0, 0).max())
    return torch.allclose(before, after, rtol=0, atol=near, equal_nan=True)
