"""Opens the tower of a model directory: its class is transformers' own, its weights are those of the base checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvrewrite.artifact.checkpoint import Checkpoint, some
from kvrewrite.artifact.companions import auto_model
from kvrewrite.artifact.recipes import load_parameters
from kvrewrite.errors import ArtifactError
from kvrewrite.vision.tower import Tower, built


def load_tower(directory: Path, manifest: Mapping[str, Any], config: Any, device: torch.device | str) -> Tower:
    """The tower of a model directory, on a device. Raises ArtifactError where this version of transformers has another one."""
    checkpoint = Checkpoint.open(directory, manifest["files"])
    names = manifest["vision"]
    wrong = f"{directory} has weights for images that transformers has no use for here"
    known = auto_model(config)._model_mapping
    if type(config) not in known:
        raise ArtifactError(f"{wrong}: no model for images and text has a {type(config).__name__}")
    tower = built(known[type(config)], config, getattr(torch, manifest["dtype"]))
    if missing := set(names) ^ set(tower.stored):
        raise ArtifactError(
            f"{wrong}, or lacks some: {some(sorted(missing))}. Install transformers {manifest['transformers']}, with which the "
            "model was converted, or convert it again"
        )
    tower.fill(load_parameters(checkpoint, manifest["recipes"], names, device))
    return tower.to(device)
