"""The operators of a memory of blocks (kernels/recall/): what to fetch, before attention to the cache, and attention to it
after that."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrewrite.kernels.groups import Attended, Entering, Memory, Question, Recalling
from kvrewrite.kernels.recall import lookup, memory
from kvrewrite.ops.dispatch import fused
from kvrewrite.ops.groups import define

MOST_CHANNELS = 256  # of a head, for torch's flash attention

look_up_op = define(
    "look_up",
    Question,
    "Tensor marks",
    "Tensor choice",
    "SymInt first",
    "SymInt block",
    returns="Tensor",
    writes=["choice"],
)


@look_up_op
def look_up(asked: Question, marks: Tensor, choice: Tensor, first: int, block: int) -> Tensor:
    """See kernels/recall/lookup.py."""
    return lookup.look_up(asked, marks, choice, first, block)


@look_up_op.fake
def _(asked: Question, marks: Tensor, choice: Tensor, first: int, block: int) -> Tensor:
    size = (choice.shape[0], lookup.NOTES + choice.shape[1])
    return choice.new_empty(size, dtype=torch.int64, device="cpu")


recall_op = define(
    "recall",
    Attended,
    Entering,
    "Tensor notes",
    Memory,
    Recalling,
    returns="Tensor",
    writes=Memory._fields,
)


@recall_op
def recall(attended: Attended, new: Entering, notes: Tensor, into: Memory, how: Recalling) -> Tensor:
    """See kernels/recall/memory.py."""
    flash = fused("recall", new.far_q, why_not_flash(new, how))
    return memory.recall(attended, new, notes, into, how, flash)


@recall_op.fake
def _(attended: Attended, new: Entering, notes: Tensor, into: Memory, how: Recalling) -> Tensor:
    return torch.empty_like(attended.out)


def why_not_flash(new: Entering, how: Recalling) -> str | None:
    """The reason why torch's flash attention does not compute attention to a memory, or None."""
    q, channels = new.far_q, (new.far_q.shape[3], new.v.shape[3])
    if not q.is_cuda:
        return "flash attention needs a GPU"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention computes in float16 and bfloat16, not in {q.dtype}"
    if how.softcap:
        return "flash attention has no softcap"
    if channels[0] != channels[1] or channels[0] % 8 or channels[0] > MOST_CHANNELS:
        return f"flash attention has no heads of {channels[0]} and {channels[1]} channels"
    return None
