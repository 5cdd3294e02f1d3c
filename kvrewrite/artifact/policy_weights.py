"""Reads and writes policy weights (gates, retaining heads) as safetensors. Only this module reads pickles."""

from __future__ import annotations

import errno
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvrewrite import __version__
from kvrewrite.artifact.checkpoint import lfs_message, read_header, text_is_lfs
from kvrewrite.artifact.files import replace_tensors
from kvrewrite.errors import ArtifactError, PolicyWeightsError
from kvrewrite.policies.weights import LISTED

_MAX_DEPTH, _MAX_TENSORS = 32, 1_000_000  # of dicts in a pickle
# What torch.load raises for files that are truncated or of another kind.
_UNREADABLE = (
    EOFError,
    zipfile.BadZipFile,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    OSError,
)


def import_pickle(
    path: str | Path, out: str | Path, *, metadata: Mapping[str, str] | None = None, force: bool = False
) -> dict[str, Tensor]:
    """Turns a torch pickle of policy weights into a safetensors file; returns its tensors.

    The pickle is read with `weights_only=True`, so nothing in it runs. It must hold a (nested) dict of tensors and
    nothing else, because anything else would be lost. metadata: what the file says about the weights. force: overwrites
    `out`. The file appears whole or not at all.
    """
    path, out = Path(path), Path(out)
    check_destination(out, force)
    tensors = flatten(path, read_pickle(path))
    save_policy_weights(out, tensors, metadata)
    return tensors


def check_destination(out: Path, force: bool) -> None:
    """Raises PolicyWeightsError if `out` can't be written."""
    if out.exists() and not force:
        raise PolicyWeightsError(f"{out} exists; choose another name, or overwrite it with force=True (--force)")
    if out.is_dir():
        raise PolicyWeightsError(f"{out} is a directory; expected the name of a safetensors file to write")
    if out.suffix != ".safetensors":
        raise PolicyWeightsError(f"{out}: expected a name that ends in .safetensors, the format that is written")


def read_pickle(path: Path, data_types: Sequence[Any] = ()) -> Any:
    """Returns what a torch pickle holds. Nothing in it runs; data_types: plain types allowed besides torch's."""
    if not path.is_file():
        raise PolicyWeightsError(f"{path} does not exist or is not a file; expected a torch pickle (.pt, .pth, .bin)")
    if text_is_lfs(path):
        raise PolicyWeightsError(lfs_message(path))
    if path.suffix == ".safetensors":
        raise PolicyWeightsError(f"{path} is a safetensors file already; use it as it is")
    try:
        with torch.serialization.safe_globals(list(data_types)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
        raise PolicyWeightsError(
            f"{path} is not a pickle of plain tensors: {reason[:300] or str(error).splitlines()[0][:300]}. kvrewrite "
            "never loads pickles that could run code; ask its author for a state_dict or, better, a safetensors file"
        ) from error
    except _UNREADABLE as error:
        raise PolicyWeightsError(
            f"{path} can't be read as a torch pickle ({type(error).__name__}: {str(error).strip()[:200]}); it is "
            "damaged, cut off or something else. Copy it again"
        ) from error


def flatten(path: Path, content: Any) -> dict[str, Tensor]:
    """Flattens nested dicts of tensors into one with dotted names."""
    tensors: dict[str, Tensor] = {}
    others: list[str] = []

    def visit(prefix: str, value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            tensors[prefix] = value.detach()
        elif depth > _MAX_DEPTH or len(tensors) + len(others) > _MAX_TENSORS:  # a dict may hold itself
            raise PolicyWeightsError(
                f"{path} holds dicts in dicts more than {_MAX_DEPTH} deep, or more than {_MAX_TENSORS} tensors; expected a "
                "state_dict"
            )
        elif isinstance(value, Mapping) and all(isinstance(k, (str, int)) for k in value):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), inner, depth + 1)
        else:
            others.append(f"{prefix or 'the file itself'} ({type(value).__name__})")

    visit("", content, 0)
    if others or not tensors or "" in tensors:
        what = ", ".join(others[:LISTED]) or ("a bare tensor without a name" if tensors else "no tensor at all")
        raise PolicyWeightsError(
            f"{path} holds {what}; expected a dict from names to tensors and nothing else. Save the state_dict alone: "
            "torch.save(module.state_dict(), path)"
        )
    unusable = [n for n, t in tensors.items() if t.layout != torch.strided or t.is_quantized or t.is_meta]
    if unusable:
        raise PolicyWeightsError(
            f"{path}: {', '.join(unusable[:LISTED])} is sparse, quantized or without values; expected dense tensors"
        )
    floats = {n: t if t.itemsize > 1 else t.float() for n, t in tensors.items() if t.is_floating_point()}
    if bad := [n for n, t in floats.items() if not bool(torch.isfinite(t).all())]:
        raise PolicyWeightsError(
            f"{path}: {', '.join(bad[:LISTED])} is not finite (infinite or not a number); the file is damaged"
        )
    return tensors


def save_policy_weights(out: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes policy weights as safetensors: to a file beside `out`, which is then renamed."""
    try:
        replace_tensors(out, tensors, {**(metadata or {}), "kvrewrite": __version__})
    except OSError as error:
        reason = "no space is left" if error.errno == errno.ENOSPC else str(error)
        raise PolicyWeightsError(f"{out} could not be written, and nothing was changed: {reason}") from error


def read_policy_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file of policy weights."""
    path = Path(path)
    if not path.exists():
        raise PolicyWeightsError(f"{path} does not exist; expected a safetensors file of policy weights")
    if path.is_dir():
        raise PolicyWeightsError(f"{path} is a directory; give the safetensors file in it")
    if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"):
        raise PolicyWeightsError(
            f"{path} is a pickle, which could run code; convert it once: kvrewrite import-weights {path} "
            f"--out {path.with_suffix('.safetensors')}"
        )
    try:
        _, metadata = read_header(path)
        tensors = load_file(path)
    except (ArtifactError, OSError, SafetensorError) as error:
        raise PolicyWeightsError(str(error)) from error
    if not tensors:
        raise PolicyWeightsError(f"{path} has no tensors; expected policy weights")
    return tensors, metadata
