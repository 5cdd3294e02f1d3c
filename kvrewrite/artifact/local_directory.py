"""Resolves a model named on the command line to a local directory. Imports no torch, so a wrong name fails at once."""

from __future__ import annotations

import re
from pathlib import Path

from kvrewrite.errors import ArtifactError


def checkpoint_directory(model: str) -> Path:
    """Returns MODEL as a directory; if it looks like a hub name, says how to download it."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise ArtifactError(f"{model} is a file; expected the checkpoint directory that holds config.json and weights")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        name = path.name
        raise ArtifactError(
            f"{model} is not a local directory, and kvrewrite downloads nothing. If it is a name on the Hugging Face "
            f"Hub, download it first:\n  hf download {model} --local-dir {name}\nand then give the directory {name}"
        )
    raise ArtifactError(f"{model} does not exist; expected a local checkpoint directory (config.json and safetensors)")
