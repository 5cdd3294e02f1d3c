"""Resolves a model named on the command line to a local directory. Imports no torch, so a wrong name fails at once."""

from __future__ import annotations

import re
from pathlib import Path

from kvrewrite.errors import ArtifactError


def gguf_file(model: str) -> Path | None:
    """The GGUF file that MODEL is, or holds where it has no safetensors; None if there is none."""
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        return _whole(path)
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ArtifactError(f"{model} has {len(files)} GGUF files ({names}); give one of them instead of the directory")
    return _whole(files[0]) if files else None


def _whole(file: Path) -> Path:
    """Returns a GGUF file that is not one part of several."""
    if re.search(r"-\d{5}-of-\d{5}$", file.stem):
        raise ArtifactError(
            f"{file} is one part of a GGUF model; join the parts first: llama-gguf-split --merge {file.name} whole.gguf"
        )
    return file


def checkpoint_directory(model: str) -> Path:
    """Returns MODEL as a directory; if it looks like a hub name, says how to download it."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.exists():
        raise ArtifactError(
            f"{model} is a GGUF file, which only `kvrewrite convert` reads; convert it first (--policy full changes nothing)"
        )
    if path.exists():
        raise ArtifactError(f"{model} is a file; expected the checkpoint directory that holds config.json and weights")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        name = path.name
        raise ArtifactError(
            f"{model} is not a local directory, and kvrewrite downloads nothing. If it is a name on the Hugging Face "
            f"Hub, download it first:\n  hf download {model} --local-dir {name}\nand then give the directory {name}"
        )
    raise ArtifactError(f"{model} does not exist; expected a local checkpoint directory (config.json and safetensors)")
