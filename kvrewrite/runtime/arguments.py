"""Arguments of a rewritten model's `forward` and `generate`: what changes nothing passes, everything else is refused by name.

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
    "inputs_embeds": "its graph begins with token ids",
    "token_type_ids": "its graph has no input for them",
    "output_attentions": "attention weights are never made",
    "output_hidden_states": "its graph returns logits alone",
    "output_router_logits": "its graph returns logits alone",
    "is_causal": "its masks are part of the graph",
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


def check_tensor(name: str, value: Any) -> None:
    """Raises InputError where a tensor argument is something else, such as a list."""
    if value is not None and not isinstance(value, Tensor):
        raise InputError(
            f"{name} is a {type(value).__name__}, expected a (batch, tokens) tensor; torch.tensor([...]) makes one of lists"
        )


def check_ids_form(input_ids: Any) -> None:
    """Raises InputError where `input_ids` is no (batch, tokens) tensor of integers with at least one row and one column."""
    check_tensor("input_ids", input_ids)
    if input_ids is None or input_ids.dim() != 2:
        got = "nothing" if input_ids is None else f"shape {tuple(input_ids.shape)}"
        raise InputError(f"input_ids: got {got}, expected a (batch, tokens) tensor of token ids")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"input_ids has dtype {input_ids.dtype}, expected int64")
    if not input_ids.numel():
        raise InputError(
            f"input_ids has shape {tuple(input_ids.shape)}, expected at least one token; an empty prompt can begin with the "
            "tokenizer's BOS token"
        )


def check_logits_to_keep(logits_to_keep: Any) -> None:
    """Raises InputError where it is no number of columns."""
    if not isinstance(logits_to_keep, int) or isinstance(logits_to_keep, bool):
        raise InputError(f"logits_to_keep is a {type(logits_to_keep).__name__}, expected an int")
    if logits_to_keep < 0:
        raise InputError(
            f"logits_to_keep is {logits_to_keep}, expected 0 (all columns) or how many of the last columns to return"
        )
