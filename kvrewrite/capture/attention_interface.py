"""Replaces the attention and masks of a transformers model during the trace."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.masks import FARTHEST, UnknownMask, classify_mask, expected_mask, spread, with_ends

TRACEABLE_EXPERTS = ("grouped_mm", "batched_mm")  # values of transformers' `experts_implementation`
NEAR = 1024  # a mask function is evaluated at all pairs of so many tokens
MAX_CHUNK = 2048  # largest chunk, for layers that cut the sequence into chunks
# Arguments, besides q, k, v, mask, scaling and dropout, that a transformers attention function may be given. Any other
# that is not None would silently change the result.
KNOWN_ATTENTION_KWARGS = {
    "sliding_window",
    "softcap",
    "s_aux",
    "sinks",
    "is_causal",
    "position_ids",
    "position_embeddings",
    "use_cache",
    "output_attentions",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "output_hidden_states",
    "return_dict",
    "num_items_in_batch",
    "output_router_logits",
    "is_training",
    "layer_idx",
}


def _classify_mask_function(mask_function: Any) -> tuple[int, int, int]:
    """Returns (window, chunk) of a transformers mask function, and the number of tokens up to which they hold.

    The function is evaluated and compared with known masks: at all pairs of the first tokens, and at every distance up
    to FARTHEST, or further if an integer in its closure asks for it.
    """
    sizes = [c for c in _integers_in(mask_function) if c <= 1 << 20]

    def seen_at(positions: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.long)
        try:
            mask = mask_function(zero, zero, positions[:, None], positions[None])
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            raise UnsupportedModelError(f"the mask function could not be evaluated: {error}") from error
        return torch.as_tensor(mask).expand(1, len(positions), len(positions))

    with torch.utils._python_dispatch._disable_current_modes():
        length = max([FARTHEST, *(2 * s + 3 for s in sizes)])
        try:
            positions, seen = with_ends(spread(length), seen_at)
            window, chunk = classify_mask(seen[0], positions)
            first = torch.arange(NEAR)
            if torch.equal(seen_at(first)[0], expected_mask(window, chunk, first)):
                return window, chunk, length
        except UnknownMask:
            pass
    raise UnsupportedModelError(
        "the mask is neither causal nor a sliding window nor chunked (prefix, bidirectional or content-dependent masks "
        "can't be kept with an evicted cache)"
    )


def _integers_in(function: Any, depth: int = 0) -> list[int]:
    """Returns the integers in a mask function's closure, nested functions included."""
    found: list[int] = []
    for cell in getattr(function, "__closure__", None) or ():
        value = cell.cell_contents
        values = value if isinstance(value, (list, tuple)) else [value]
        for item in values:
            if isinstance(item, int) and not isinstance(item, bool):
                found.append(item)
            elif callable(item) and depth < 8:
                found.extend(_integers_in(item, depth + 1))
    return sorted(set(found))


class InterfaceCalls:
    """Our attention and mask functions for one capture.

    modules: paths of the modules that called the attention function, in order. masks: for each mask an empty tensor of
    its shape, with the mask's window and chunk. A mask is recognized by its storage, because models may slice it to its
    whole size.
    """

    def __init__(self, model: nn.Module):
        self.paths = {id(module): name for name, module in model.named_modules()}
        self.modules: list[str] = []
        self.masks: list[tuple[Tensor, tuple[int, int]]] = []
        self.compared = 0  # tokens up to which these masks were compared

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: Any = None,
        attention_mask: Tensor | None = None,
        device: Any = None,
        **_: Any,
    ) -> Tensor:
        if attention_mask is not None:
            raise UnsupportedModelError("the model makes its own padding mask, which capture does not expect")
        *found, compared = _classify_mask_function(mask_function)
        self.compared = min(self.compared or compared, compared)
        stand_in = torch.empty((batch_size, 1, q_length, kv_length), dtype=torch.bool, device=device)
        self.masks.append((stand_in, (found[0], found[1])))
        return stand_in

    def _window_and_chunk(self, mask: Tensor) -> tuple[int, int] | None:
        """Returns the window and chunk of `mask`; None unless it is our mask, unchanged and whole."""
        for ours, found in self.masks:
            if mask.untyped_storage()._cdata == ours.untyped_storage()._cdata:
                same = mask.shape == ours.shape and mask.stride() == ours.stride() and mask._version == 0
                return found if same and mask.storage_offset() == 0 else None
        return None

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        path = self.paths.get(id(module), type(module).__name__)
        where = f"layer {len(self.modules)} ({path})"
        for name, given in kwargs.items():
            if given is not None and name not in KNOWN_ATTENTION_KWARGS:
                raise UnsupportedModelError(
                    f"{where}: its attention is given {name}={type(given).__name__}, which changes what it computes in a "
                    "way that kvrewrite does not know (content-dependent or sparse attention, or a learned bias)"
                )
        window = chunk = 0
        if attention_mask is not None:
            found = self._window_and_chunk(attention_mask)
            if found is None:
                raise UnsupportedModelError(f"{where}: the model edits its attention mask on the way to the attention")
            window, chunk = found
        else:
            causal = kwargs.get("is_causal")
            if not (getattr(module, "is_causal", True) if causal is None else causal):
                raise UnsupportedModelError(f"{where}: its attention is not causal")
            window = int(kwargs.get("sliding_window") or 0)
        sinks = kwargs.get("s_aux") if kwargs.get("s_aux") is not None else kwargs.get("sinks")
        self.modules.append(path)
        out = torch.ops.kvrewrite.attention(
            query,
            key,
            value,
            sinks.reshape(-1) if sinks is not None else None,
            None,
            float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
            float(kwargs.get("softcap") or 0.0),
            window,
            chunk,
        )
        # Contiguous, as transformers' own functions return it, because models `view` it. Normalizing drops the copy.
        return out.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def replaced(obj: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute while open."""
    before = getattr(obj, name)
    setattr(obj, name, value)
    try:
        yield
    finally:
        setattr(obj, name, before)


def configs(model: nn.Module) -> list[Any]:
    """Returns every configuration object that any part of a transformers model reads."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in found.values() if hasattr(c, "_attn_implementation_internal")]


@contextlib.contextmanager
def attention_implementation(model: nn.Module, name: str, instead_of: str | None = None) -> Iterator[None]:
    """Runs a transformers model with another attention while open. instead_of: replaces only this implementation."""
    with contextlib.ExitStack() as stack:
        for config in configs(model):
            if instead_of in (None, config._attn_implementation_internal):
                stack.enter_context(replaced(config, "_attn_implementation_internal", name))
        yield


@contextlib.contextmanager
def transformers_tracing(model: nn.Module, attention: str) -> Iterator[None]:
    """Sets the attention implementation of a transformers model during the trace, and restores everything afterwards.

    Experts keep the implementation that the model was loaded with if it can be traced. transformers' own loop over
    experts can't (it reads the routing), nor can kernels that a graph does not show; grouped_mm computes the same.
    Packed-sequence detection is off: a trace can't read the positions, so their differences would enter every mask.
    Recurrent layers are traced in their torch.compile form, whose scans are few ops; other export targets unroll them
    token by token.
    """
    from transformers import masking_utils

    with contextlib.ExitStack() as stack:
        if hasattr(masking_utils, "find_packed_sequence_indices"):
            stack.enter_context(replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None))
        stack.enter_context(attention_implementation(model, attention))
        for source in {sys.modules[type(module).__module__] for module in model.modules()}:
            if source.__name__.startswith("transformers.models.") and hasattr(source, "is_torchdynamo_exporting"):
                stack.enter_context(replaced(source, "is_torchdynamo_exporting", lambda: False))
        for config in configs(model):
            if getattr(config, "_experts_implementation_internal", None) not in (None, *TRACEABLE_EXPERTS):
                stack.enter_context(replaced(config, "_experts_implementation_internal", "grouped_mm"))
        yield


def of_transformers(model: nn.Module) -> bool:
    """Whether a model's class is defined in transformers."""
    return is_transformers_model(model) and type(model).__module__.startswith("transformers.")


def is_transformers_model(model: nn.Module) -> bool:
    """Whether `model` is a `transformers.PreTrainedModel`; does not import transformers."""
    return any(
        c.__module__.startswith("transformers.") and c.__name__ == "PreTrainedModel" for c in type(model).__mro__
    )
