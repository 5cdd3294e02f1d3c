"""The result of a capture: a graph, and what the passes must know about its model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import kvrewrite.ops  # noqa: F401  (registers the ops that captured graphs have)

EMBEDDED = "kvrewrite_embedded"  # in the meta of nodes that turn token ids into embeddings
TRACE_BATCH, TRACE_LENGTH = 2, 17  # at least 2 (export makes size 1 a constant); no model has a dimension of 17


@dataclass
class RotaryTable:
    """Inverse frequencies that depend on the length (longrope, dynamic NTK): a graph attribute and how to choose.

    `short` applies up to `threshold` tokens, `long` beyond. `dynamic` types recompute the frequencies for every length,
    so they are fixed at `fixed_length`.
    """

    attribute: str
    threshold: int
    short: Tensor
    long: Tensor


@dataclass
class Captured:
    """A captured model.

    graph: a flat GraphModule. Its placeholders are `input_ids` and, if the model takes positions, `position_ids`, both
    (batch, length) int64; its one output is logits (batch, length, vocabulary). aliases: parameter name -> other names
    of the same parameter (tied weights). devices: parameter -> device, if not all are the same.
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
    # Length of the trace. If a loop over chunks is `unrolled`, the graph only holds for as many chunks.
    trace_length: int = TRACE_LENGTH
    unrolled: bool = False
    # Distance up to which masks were compared, the least over all masks; 0 if there was no mask.
    compared: int = 0
    # The reference graph of `passes/canonical/validate.py`, and what it proved; None if the check was switched off.
    before: Any = None
    stand_ins: Any = None
    proof: Any = None
    # Why the graph does not hold for all numbers of tokens and rows, None if it does. `canonical` raises this after
    # faults of the attention, which may be the cause of the model's branch.
    why_not: str | None = None
