"""Which model it is: hashes of a rewritten program and of its weights, to find caches that belong to another."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvrewrite.ir.fx import get_attr
from kvrewrite.ir.layout_file import layout_to_dict
from kvrewrite.ir.serialize import graph_to_dict

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel

_WORDS = 1 << 18  # of 8 bytes, that are summed up at once


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A sha256 of names, dtypes, shapes and sums over the bytes of tensors, on the devices where they lie.

    The sums are integers, alike on all devices: of each 2 MiB, its words times odd numbers that depend on their places,
    modulo 2**64. They find mistakes, at the speed of memory; who makes files on purpose could make two alike.
    """
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        whole.update(_sums(tensor.detach()).numpy().tobytes())
    return whole.hexdigest()


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Odd numbers that look random, one for each place."""
    place = torch.arange(1, _WORDS + 1, device=device)
    mixed = place * -7046029254386353131
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return (mixed ^ (mixed >> 32)) | 1


def _sums(tensor: Tensor) -> Tensor:
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    sums, factors = [], _factors(data.device)
    for at in range(0, data.numel(), 8 * _WORDS):
        piece = data[at : at + 8 * _WORDS]
        if piece.numel() % 8 or piece.storage_offset() % 8:  # not readable as words where it lies
            piece = torch.cat([piece, piece.new_zeros(-piece.numel() % 8)])
        words = piece.view(torch.int64)
        sums.append((words * factors[: len(words)]).sum())
    return torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)


def program_hash(model: RewrittenModel) -> str:
    """A sha256 of the rewritten graph, its layout and its numbers, without tensors. It is the same for a model and for
    the directory that it was saved to."""
    program = model.program
    nodes = [{k: v for k, v in node.items() if k != "val"} for node in graph_to_dict(program.graph)["nodes"]]
    said: dict[str, Any] = {"nodes": nodes, "layout": layout_to_dict(program.layout, program.graph)}
    for entry in said["layout"]["rotary"]:
        entry["graph"] = [{k: v for k, v in node.items() if k != "val"} for node in entry["graph"]["nodes"]]
    for name in ("dtype", "vocab_size", "max_positions"):
        said[name] = getattr(program, name)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def weights_hash(model: RewrittenModel) -> str:
    """A `digest` of everything that the model's graph reads: weights, the policy's, and tables."""
    program = model.program
    names = (*program.base, *program.policy_weights, *program.constants)
    return digest({name: get_attr(program.graph, name) for name in names})
