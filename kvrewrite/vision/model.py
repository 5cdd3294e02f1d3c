"""A vision-language model whose language model is rewritten: `generate(pixel_values=...)` as the original's."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.cache.request import exclusive
from kvrewrite.ir.program import Program
from kvrewrite.runtime.call import check_cache, check_ids_form
from kvrewrite.runtime.model import RewrittenModel
from kvrewrite.vision.tower import Merged, Tower

_IN_ORDER = list(inspect.signature(RewrittenModel.forward).parameters)[1:]  # arguments of forward


def _as(method: Any) -> Any:
    """Gives what takes images besides the signature of what it calls, which transformers looks at."""
    return functools.wraps(method)


class VisionModel(RewrittenModel):
    """A `RewrittenModel` that also takes images, by the arguments of the original (pixel_values, image_grid_thw, ...).

    Made by `kvrewrite.transform` of a vision-language model. Its `tower`, the unmodified model without its language model,
    turns images and ids into embeddings; to the cache and its policy image tokens are tokens. Without images it is the
    language model alone.
    """

    def __init__(self, program: Program, config: Any, *args: Any, tower: Tower, **kwargs: Any):
        super().__init__(program, config, *args, **kwargs)
        self.tower = tower
        tower.stub.attach(self.get_input_embeddings())

    @property
    def beside(self) -> list[str]:
        """The tower's parameters."""
        return self.tower.stored

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, (cls, program, rest) = super().__reduce_ex__(protocol)
        return make, (cls, program, {**rest, "tower": self.tower})

    def __deepcopy__(self, memo: dict[int, Any]) -> VisionModel:
        """As of `RewrittenModel`."""
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, VisionModel)
        twin.tower.stub.attach(twin.get_input_embeddings())
        return twin

    @_as(RewrittenModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`RewrittenModel.forward`, with images."""
        if kwargs.keys() & self.tower.takes:
            args, kwargs = self._embedded(args, kwargs)
        return super().forward(*args, **kwargs)

    @_as(RewrittenModel.prefill)
    def prefill(self, *args: Any, **kwargs: Any) -> EvictionCache:
        """`RewrittenModel.prefill`, with images."""
        if kwargs.keys() & self.tower.takes:
            args, kwargs = self._embedded(args, kwargs)
        return super().prefill(*args, **kwargs)

    @_as(RewrittenModel.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`RewrittenModel.generate`, with images. Given a cache, the ids are the whole text and the images all of its images,
        or both are the new ones alone (with an attention_mask over past and new columns)."""
        images = self.tower.taken(kwargs)
        if images:
            ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
            given = kwargs.get("past_key_values") if kwargs.get("cache") is None else kwargs["cache"]
            mask = kwargs.get("attention_mask")
            whole = given is None or self._is_text(ids, mask, given)
            kwargs |= self._merge(ids, mask, images, None if whole else given)
        return super().generate(*args, **kwargs)

    def _embedded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with embeddings in the place of ids and images."""
        kwargs = dict(kwargs)
        images = self.tower.taken(kwargs)
        if not images:
            return args, kwargs
        kwargs |= dict(zip(_IN_ORDER, args))
        ids = kwargs.pop("input_ids", None)
        given = kwargs.get("past_key_values") if kwargs.get("cache") is None else kwargs["cache"]
        return (), {"input_ids": None, **kwargs, **self._merge(ids, kwargs.get("attention_mask"), images, given)}

    @exclusive
    def _merge(self, ids: Any, mask: Any, images: dict[str, Any], cache: Any) -> dict[str, Tensor]:
        """Embeddings of a text with images, and positions where its rotation has several axes. cache: what it goes on from, if
        it is not the whole text."""
        check_ids_form(ids)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask[:, mask.shape[1] - ids.shape[1] :]
        merged: Merged = self.tower(ids, mask, images)
        found = {"inputs_embeds": merged.embeds}
        if merged.positions is not None:
            found["rope_positions"] = merged.positions
            if cache is not None:
                check_cache(self, cache, len(ids))
                begin = torch.tensor([n + d for n, d in zip(cache.seen, cache.rope_deltas)])
                found["rope_positions"] = merged.positions + begin.to(merged.positions.device)[:, None, None]
        return found
