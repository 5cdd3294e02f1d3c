"""What turns images and text into embeddings: the unmodified vision-language model, with a stub for its language model.

The stub records what the language model would have been given. It is compared with what the same call gives without images,
because that is what the rewritten graph computes: embeddings may differ, and positions of a rotation with
several axes; anything else that differs is refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvrewrite.artifact.meta_model import parameters_on_meta
from kvrewrite.errors import InputError
from kvrewrite.ir.axes import AXES

# What a processor makes beside images: alone, they ask for nothing.
_MARKS = ("mm_token_type_ids", "token_type_ids")
_OF_TEXT = ("input_ids", "attention_mask", "inputs_embeds", "position_ids")
# What no caller chooses; it says nothing about a text.
_PLUMBING = ("use_cache", "cache", "past_key_values", "return_dict", "cache_position", "logits_to_keep")


@dataclass
class Merged:
    """What the language model is given for a text with images. embeds (B, T, D); positions (B, T, 3), or None where they
    are the tokens' index; image (B, T) bool: tokens whose embedding is not that of their id."""

    embeds: Tensor
    positions: Tensor | None
    image: Tensor


class LanguageStub(nn.Module):
    """Stands for a language model: has its embeddings, and remembers what it is called with. The table is that of the rewritten
    model (`attach`)."""

    def __init__(self, config: Any, name: str):
        super().__init__()
        self.config = config
        self._name = name
        self.given: dict[str, Any] = {}

    def attach(self, embedding: nn.Module) -> None:
        """Gives the stub what makes embeddings of ids."""
        self.add_module(self._name, embedding)

    def get_input_embeddings(self) -> Any:
        """The model's table."""
        return self._modules[self._name]

    def forward(self, input_ids: Tensor | None = None, **given: Any) -> Any:
        """Returns the embeddings as hidden states."""
        if given.get("inputs_embeds") is None and input_ids is not None:
            given["inputs_embeds"] = self.get_input_embeddings()(input_ids)
        self.given = given
        return BaseModelOutputWithPast(last_hidden_state=given["inputs_embeds"])


def reads_images(model: nn.Module) -> bool:
    """Whether a model's forward takes images beside token ids."""
    found = getattr(model, "input_modalities", "text")
    return "image" in ([found] if isinstance(found, str) else found)


def tower_of(model: Any) -> Tower | None:
    """The tower of a vision-language model. None for a model without images, and where the language model is no module of its
    own: one that holds the embeddings of ids and nothing that sees images."""
    modalities = getattr(model, "input_modalities", "text")
    if "image" not in ([modalities] if isinstance(modalities, str) else modalities):
        return None
    table = model.get_input_embeddings()
    path = next((name for name, module in model.named_modules() if module is table), "").rpartition(".")[0]
    if not path or getattr(model.get_submodule(path), "config", None) is not model.config.get_text_config():
        return None
    return Tower(model, path)


def stored_names(model: Any) -> list[str]:
    """Which parameters of a model, with data or without, its tower needs of a checkpoint; [] where it has no tower."""
    tower = tower_of(model)
    return [] if tower is None else tower.stored


def _with(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """A module as it is, but for another one at a path."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    head, _, rest = path.partition(".")
    twin._modules[head] = new if not rest else _with(module.get_submodule(head), rest, new)
    return twin


class Tower(nn.Module):
    """Makes embeddings (B, T, D) of token ids and images with the code of the unmodified model.

    model: the vision-language model, whose weights are shared; path: where its language model is.
    """

    def __init__(self, model: Any, path: str):
        super().__init__()
        self.at = path
        whole, table = model.get_submodule(path), model.get_input_embeddings()
        self.stub = LanguageStub(whole.config, next(n for n, m in whole.named_children() if m is table))
        stripped = _with(model, path, self.stub)
        if (head := model.get_output_embeddings()) is not None:
            stripped = _with(stripped, next(n for n, m in model.named_modules() if m is head), nn.Identity())
        self.kind, self.dtype = type(model), model.dtype
        self.model = _own(stripped, self.stub)
        named = inspect.signature(type(model).forward).parameters.values()
        takes = {p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD}
        # Arguments about images.
        self.takes = frozenset(takes - {"self", "labels", *_OF_TEXT, *_PLUMBING} | {*_MARKS})

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as its weights: transformers hangs functions on modules that can't be pickled."""
        return built, (self.kind, self.model.config, self.dtype, self.weights())

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers under the names that the unmodified model has for them; without those of the stub."""
        places = dict(self.model.named_modules(remove_duplicate=False))
        found: dict[str, Tensor] = {}
        for path, module in places.items():
            if module is not self.stub and not path.startswith(f"{self.at}."):
                own = {**module._parameters, **module._buffers}
                found |= {f"{path}.{name}".lstrip("."): t for name, t in own.items() if t is not None}
        return found

    @property
    def stored(self) -> list[str]:
        """The names of those weights that a checkpoint holds."""
        held = self.model.state_dict().keys()
        return [name for name in self.weights() if name in held]

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Gives the tower these parameters and buffers, those that it has not got are left as they are."""
        for name, value in weights.items():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[leaf] = value

    def taken(self, given: dict[str, Any]) -> dict[str, Any]:
        """Takes what is about images out of a call's arguments; {} where that is nothing."""
        about = {name: given.pop(name) for name in self.takes & given.keys()}
        about = {name: value for name, value in about.items() if value is not None}
        return about if about.keys() - {*_MARKS} else {}

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor | None, images: Mapping[str, Any]) -> Merged:
        """ids (B, T); mask (B, T); images: the unmodified model's arguments, such as pixel_values. Raises InputError where
        images change more than embeddings and positions."""
        device = self.stub.get_input_embeddings().weight.device
        images = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in images.items()}
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
        plain, given = self._call(ids, mask, {}), self._call(ids, mask, images)
        embeds, positions = given.pop("inputs_embeds"), given.pop("position_ids", None)
        table = plain.pop("inputs_embeds")
        if _same(positions, plain.pop("position_ids", None)) or _counted(positions, ids, mask):
            positions = None
        elif positions.dim() != 3:
            raise InputError(_why_not("position_ids"))
        for name in sorted(given.keys() | plain.keys()):
            if not _same(given.get(name), plain.get(name)):
                raise InputError(_why_not(name))
        placed = None if positions is None else positions[-AXES:].movedim(0, -1).long()
        return Merged(embeds, placed, (embeds != table).any(-1))

    def _call(self, ids: Tensor, mask: Tensor | None, images: Mapping[str, Any]) -> dict[str, Any]:
        """What the language model is given."""
        self.model(input_ids=ids, attention_mask=mask, use_cache=False, **images)
        given, self.stub.given = self.stub.given, {}
        return {name: value for name, value in given.items() if value is not None and name not in _PLUMBING}


def built(kind: type[Any], config: Any, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None) -> Tower:
    """The tower of a model of this class and configuration. weights: `Tower.weights`; without them parameters are on meta."""
    with parameters_on_meta(), initialization.no_init_weights():
        model = kind._from_config(copy.deepcopy(config), dtype=dtype)
    tower = tower_of(model.eval())
    assert tower is not None
    tower.fill(weights or {})
    return tower


def _own(stripped: nn.Module, stub: LanguageStub) -> nn.Module:
    """A copy with parameters of its own over the same storage, so that moving one model does not move the other. The stub's
    are the rewritten model's already."""
    memo: dict[int, Any] = {id(stub): stub}
    for parameter in stripped.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    twin = copy.deepcopy(stripped, memo)
    return twin.eval()


def _counted(positions: Tensor, ids: Tensor, mask: Tensor | None) -> bool:
    """Whether positions (..., B, T) are those of a text: real tokens counted from 0."""
    real = torch.ones_like(ids) if mask is None else mask
    return bool((positions == real.cumsum(1) - 1)[..., real.bool()].all())


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, be they tensors, containers of them or plain values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return a is b or bool(a == b)


def _why_not(name: str) -> str:
    """The refusal for an argument of the language model that images change."""
    if "mask" in name and name != "visual_pos_masks":
        what = (
            f"with images the language model's mask ({name}) is another one than for text: image tokens see each other in both "
            "directions, and a cache that evicts chunk by chunk cannot show them what comes later"
        )
    else:
        what = f"beside embeddings, images give the language model {name!r}, which the rewritten graph has no input for"
    return f"images are not supported by this rewritten model: {what}. Use the original model for images; text works"
