"""Labels that tell, beside each token of vLLM's batch, whose it is and how long that request's prompt is.

A model of vLLM is not told where a prompt ends, but a chunk at its end is computed differently from a cut that only the
scheduler made. What vLLM does carry through its scheduling, preemption included, is positions with several axes: the model
makes those of a prompt once for each request (`get_mrope_input_positions`), and those of generated tokens are counted on
from there. So the first axis carries a label instead, and the second the position.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

AXES = 3
_BITS = 32
_MASK = (1 << _BITS) - 1


class Label(NamedTuple):
    """Of one token. request: a number of its own, from 0 on; prompt: tokens of its prompt, None for a generated token;
    position: in the text, prompt and answer."""

    request: int
    prompt: int | None
    position: int


def prompt_positions(request: int, prompt: int) -> Tensor:
    """Labelled positions of a prompt: (AXES, prompt) int64."""
    positions = torch.arange(prompt).repeat(AXES, 1)
    positions[0] = (request << _BITS) | prompt
    return positions


def answer_delta(request: int) -> np.int64:
    """What vLLM adds to the position of a generated token, on each axis: in numpy, with a position of 32 bits."""
    return np.int64(-((request + 1) << _BITS))


def read(first: int, second: int) -> Label:
    """The label of a token from the first two axes of its position."""
    if first < 0:
        return Label(-(first >> _BITS) - 1, None, first & _MASK)
    return Label(first >> _BITS, first & _MASK, second)
