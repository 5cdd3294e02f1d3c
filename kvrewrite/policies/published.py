"""Trained heads as their authors publish them: what a policy's `read_published` reads, and the checks that formats share."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import PolicyWeightsError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[str | int, ...]  # letters, each of which is one size throughout a file


class Published(ABC):
    """One file of published weights. Nothing in it is run, and its tensors stay as they are.

    What does not fit is refused with what was found and what was expected. Whether the weights fit a model is checked when
    they are used with one. `kvrewrite/artifact/published.py` reads.
    """

    def __init__(self, path: Path):
        self.path = path

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a safetensors file or a pickle, under dotted names."""

    @abstractmethod
    def state_dicts(self, key: str, what: str, data_types: Sequence[Any] = ()) -> list[dict[str, Tensor]]:
        """The state_dicts in the list that a pickled dict has under `key`. what: what each is, for messages ("gates");
        data_types: plain types that the file may hold beside torch's."""

    @abstractmethod
    def text(self) -> str:
        """A text file's content."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The config.json beside the file; empty if there is none."""

    def error(self, what: str) -> PolicyWeightsError:
        """The error to raise: the file, and what is wrong with it."""
        return PolicyWeightsError(f"{self.path}: {what}")

    def by_layer(self, tensors: Mapping[str, Tensor], pattern: str) -> list[dict[str, Tensor]]:
        """Tensors whose names match `pattern` with groups (layer, rest): one dict per layer, from 0 on."""
        layers: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            match = re.fullmatch(pattern, name)
            if match is None:
                raise self.error(f"{name} is none of this format's names ({pattern})")
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        missing = [str(i) for i in range(max(layers, default=0)) if i not in layers]
        if not layers or missing:
            raise self.error(f"layers {', '.join(missing[:8]) or 'all'} are missing; is the file whole?")
        return [layers[i] for i in range(len(layers))]

    def sizes(self, layers: list[dict[str, Tensor]], expected: Mapping[str, Shape]) -> dict[str, int]:
        """Checks that all layers have exactly these tensors with consistent sizes; returns the size of each letter."""
        sizes: dict[str, int] = {}
        for i, layer in enumerate(layers):
            if set(layer) != set(expected):
                more, less = sorted(set(layer) - set(expected)), sorted(set(expected) - set(layer))
                raise self.error(
                    f"layer {i} has {', '.join(more) or 'nothing'} beyond what is expected, and lacks "
                    f"{', '.join(less) or 'nothing'}; expected {', '.join(expected)}"
                )
            for name, shape in expected.items():
                tensor = layer[name]
                if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                    raise self.error(f"layer {i}, {name} is {tensor.dtype}, or not finite; expected finite numbers")
                fits = tensor.dim() == len(shape)
                for size, meaning in zip(tensor.shape, shape):
                    fits = fits and size == (meaning if isinstance(meaning, int) else sizes.setdefault(meaning, size))
                if not fits:
                    wanted = [str(m) if isinstance(m, int) or m not in sizes else f"{m}={sizes[m]}" for m in shape]
                    raise self.error(
                        f"layer {i}, {name} is {list(tensor.shape)}, expected ({', '.join(wanted)}) as the tensors before it"
                    )
        return sizes

    def agree_with_config(self, found: Mapping[str, Any]) -> None:
        """Checks that config.json says the same as the tensors."""
        config = self.config()
        for key, value in found.items():
            if key in config and config[key] != value:
                raise PolicyWeightsError(
                    f"{self.path} has {key} {value}, but the config.json beside it says {config[key]}"
                )
