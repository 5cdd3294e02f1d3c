"""What a capture gives: a graph, and what the passes must know of its model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import kvrewrite.ops  # noqa: F401  (registers the ops that captured graphs have)

TRACE_BATCH, TRACE_LENGTH = 2, 17  # at least 2 (size 1 silently becomes a constant); 17 is no model's dimension


@dataclass
class RotaryTable:
    """Inverse frequencies that depend on the length (longrope, dynamic NTK): graph attribute, and how to choose.

    `short` applies up to `threshold` tokens, `long` beyond. `dynamic` types recompute theirs for every length, so they are
    fixed at `fixed_length` instead.
    """

    attribute: str
    threshold: int
    short: Tensor
    long: Tensor


@dataclass
class Captured:
    """A captured model.

    graph: flat GraphModule with placeholders `input_ids` and, where the model takes positions, `position_ids`, both
    (batch, length) int64; one output, logits (batch, length, vocabulary). aliases: parameter name -> other names of the
    same parameter (tied weights). devices: parameter -> device, where they are not all the same.
    """

    graph: fx.GraphModule
    frontend: str
    dtype: torch.dtype
    vocab_size: int
    batch_symbol: Any = None
    length_symbol: Any = None
    max_positions: int | None = None
    aliases: dict[str, list[str]] = field(default_factory=dict)
    persistent: set[str] = field(default_factory=set)
    rotary_tables: list[RotaryTable] = field(default_factory=list)
    devices: dict[str, str] = field(default_factory=dict)
    # Tokens of the trace; what is `unrolled`, a loop over chunks, holds for sequences of as many chunks only.
    trace_length: int = TRACE_LENGTH
    unrolled: bool = False
    # Tokens up to which masks were compared at every distance, of the mask for which it is the fewest; 0 where there was no mask.
    compared: int = 0
    # What `passes/canonical/validate.py` compared the canonical graph with, and what it proved; None where that was switched off.
    before: Any = None
    stand_ins: Any = None
    proof: Any = None
    # Why the graph does not hold for all numbers of tokens and rows; "" where it does. `canonical` refuses it, after what is
    # wrong with the attention, which may be why the model goes another way.
    branch: str = ""
