"""Arguments of a rewritten model's `forward` beside its own: what changes nothing passes, everything else is refused by name.

The original's `forward` takes more than a rewritten one, and much of it changes the result (images, embeddings, the bounds of
packed texts). Callers also pass arguments that change nothing (`generate`, Trainer, pipelines, lm-eval); those are listed here.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvrewrite.errors import ArgumentError, InputError

# Arguments that callers pass with a value that changes nothing. None never does.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_router_logits": (False,),
    "is_causal": (True,),
}
# What a call says about columns: it has to agree with what the cache counts.
COUNTED = "cache_position"
# Arguments that models of transformers have and a rewritten one has not: why.
_REASONS = {
    "token_type_ids": "its graph has no input for them",
    "output_attentions": "attention weights are never made",
    "output_hidden_states": "its graph returns logits alone",
    "output_router_logits": "its graph returns logits alone",
    "is_causal": "its masks are part of the graph",
    **dict.fromkeys(
        ("pixel_values", "pixel_values_videos", "image_grid_thw", "image_sizes"),
        "it is a language model alone; transform the vision-language model (docs/vision.md), or let the unmodified model make "
        "embeddings of images and text, and pass inputs_embeds",
    ),
}


def check_arguments(given: Mapping[str, Any], forward: Callable[..., Any]) -> None:
    """Raises for every argument beside those of `forward` that might change the result: InputError where it is one of
    transformers' own, else ArgumentError, which is a TypeError, too."""
    for name, value in given.items():
        if value is None or name == COUNTED or any(value is ok for ok in HARMLESS.get(name, ())):
            continue
        if name in _REASONS:
            raise InputError(f"{name} is not supported by a rewritten model: {_REASONS[name]}; leave it out")
        takes = [n for n in inspect.signature(forward).parameters if n not in ("self", "generated", "kwargs")]
        close = difflib.get_close_matches(name, takes, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ArgumentError(
            f"got the argument {name!r}{hint}, which a rewritten model does not take and which might change the result; "
            f"expected some of {', '.join(takes)}. Leave it out"
        )


def check_columns(cache_position: Tensor | None, begin: int, width: int) -> None:
    """Columns are counted by the cache: given ones must be `begin`, `begin` + 1, ..."""
    if cache_position is None:
        return
    expected = torch.arange(begin, begin + width)
    if not isinstance(cache_position, Tensor) or not torch.equal(cache_position.cpu().long().reshape(-1), expected):
        raise InputError(
            f"{COUNTED} is {cache_position}, expected {begin} to {begin + width - 1}: columns are counted by the cache; leave "
            f"{COUNTED} out"
        )
