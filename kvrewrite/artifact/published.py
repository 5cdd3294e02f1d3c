"""Turns published trained heads into policy weights: `kvrewrite import-weights FILE --policy NAME`.

Formats follow the authors' public code at the commits that the policies name. Nothing in a file is run: pickles are
read with `weights_only=True`. Tensors are copied unchanged. A file of another format, an incomplete one, or one that
contradicts itself is refused with what was found and what was expected. Whether it fits a model is checked when it is
used with one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvrewrite.artifact.checkpoint import lfs_message, text_is_lfs
from kvrewrite.artifact.policy_weights import check_destination, flatten, read_pickle, save_policy_weights
from kvrewrite.errors import OptionError, PolicyWeightsError
from kvrewrite.policies.duo_attention import PATTERN
from kvrewrite.policies.trim_kv import GATES, PARTS

Found = tuple[dict[str, Tensor], dict[str, str]]  # tensors, metadata
Shape = tuple[str | int, ...]  # letters, each of which is one size throughout a file


def import_published(
    path: str | Path, out: str | Path, policy: str, *, force: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Turns a published file (or its directory) into a safetensors file for `policy`; returns tensors and metadata.

    Raises OptionError for policies without such files, PolicyWeightsError if the file does not fit.
    """
    if policy not in IMPORTERS:
        raise OptionError(
            f"--policy {policy}: no trained heads are known for it; expected one of {', '.join(IMPORTERS)}"
        )
    path, out = Path(path), Path(out)
    check_destination(out, force)
    tensors, metadata = IMPORTERS[policy](path)
    metadata = {"policy": policy, **metadata}
    save_policy_weights(out, tensors, metadata)
    return tensors, metadata


# ------------------------------------------------------------------------------------------------------------- helpers
def _file(path: Path, names: tuple[str, ...], what: str) -> Path:
    """Returns the file itself if a directory is given."""
    if not path.is_dir():
        if not path.is_file():
            raise PolicyWeightsError(f"{path} does not exist; expected {what}")
        return path
    found = [path / n for n in names if (path / n).is_file()]
    if not found:
        raise PolicyWeightsError(f"{path} has no {' or '.join(names)}; expected {what}")
    return found[0]


def _config(file: Path) -> dict[str, Any]:
    """Returns the config.json beside a file; empty if there is none."""
    config = file.parent / "config.json"
    if not config.is_file():
        return {}
    try:
        found = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise PolicyWeightsError(f"{config} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise PolicyWeightsError(f"{config} holds a {type(found).__name__}, expected a JSON object")
    return found


def _tensors(file: Path) -> dict[str, Tensor]:
    """Returns all tensors of a safetensors file or a pickle, under dotted names."""
    if file.suffix != ".safetensors":
        return flatten(file, read_pickle(file))
    if text_is_lfs(file):
        raise PolicyWeightsError(lfs_message(file))
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise PolicyWeightsError(f"{file} is not a whole safetensors file: {error}") from error


def _by_layer(file: Path, tensors: Mapping[str, Tensor], pattern: str) -> list[dict[str, Tensor]]:
    """Returns tensors whose names match `pattern` with groups (layer, rest): one dict per layer, from 0 on."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(pattern, name)
        if match is None:
            raise PolicyWeightsError(f"{file}: {name} is none of this format's names ({pattern})")
        layers.setdefault(int(match[1]), {})[match[2]] = tensor
    missing = [str(i) for i in range(max(layers, default=0)) if i not in layers]
    if not layers or missing:
        raise PolicyWeightsError(f"{file}: layers {', '.join(missing[:8]) or 'all'} are missing; is the file whole?")
    return [layers[i] for i in range(len(layers))]


def _fit(file: Path, layers: list[dict[str, Tensor]], expected: Mapping[str, Shape]) -> dict[str, int]:
    """Checks that all layers have exactly these tensors with consistent sizes; returns the size of each letter."""
    sizes: dict[str, int] = {}
    for i, layer in enumerate(layers):
        if set(layer) != set(expected):
            more, less = sorted(set(layer) - set(expected)), sorted(set(expected) - set(layer))
            raise PolicyWeightsError(
                f"{file}: layer {i} has {', '.join(more) or 'nothing'} beyond what is expected, and lacks "
                f"{', '.join(less) or 'nothing'}; expected {', '.join(expected)}"
            )
        for name, shape in expected.items():
            tensor = layer[name]
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise PolicyWeightsError(
                    f"{file}: layer {i}, {name} is {tensor.dtype}, or not finite; expected finite numbers"
                )
            fits = tensor.dim() == len(shape)
            for size, meaning in zip(tensor.shape, shape):
                fits = fits and size == (meaning if isinstance(meaning, int) else sizes.setdefault(meaning, size))
            if not fits:
                wanted = [f"{m}={sizes[m]}" if m in sizes else str(m) for m in shape]  # type: ignore[index]
                raise PolicyWeightsError(
                    f"{file}: layer {i}, {name} is {list(tensor.shape)}, expected ({', '.join(wanted)}) as the tensors before it"
                )
    return sizes


def _agree(file: Path, config: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Checks that config.json agrees with the tensors."""
    for key, value in found.items():
        if key in config and config[key] != value:
            raise PolicyWeightsError(f"{file} has {key} {value}, but the config.json beside it says {config[key]}")


# ------------------------------------------------------------------------------------------------------------- formats
def _locret(path: Path) -> Found:
    """Reads retaining heads: a state_dict with fc1 and fc2 of every layer (huangyuxiang03/Locret @ 28995c5)."""
    file = _file(path, (), "the .bin file of Locret's retaining heads")
    layers = _by_layer(file, _tensors(file), r"model\.layers\.(\d+)\.self_attn\.(.+)")
    sizes = _fit(file, layers, {"fc1.weight": ("hidden", "q+k+v"), "fc2.weight": ("kv heads", "hidden")})
    names = {f"model.layers.{i}.self_attn.{n}": t for i, layer in enumerate(layers) for n, t in layer.items()}
    return names, {"layers": str(len(layers)), "kv_heads": str(sizes["kv heads"]), "hidden_size": str(sizes["hidden"])}


def _kvzap(path: Path) -> Found:
    """Reads a KVzapModel from save_pretrained: nn.Linear, or Sequential(Linear, GELU, Linear), for every layer."""
    file = _file(
        path, ("model.safetensors", "pytorch_model.bin"), "the model.safetensors of a KVzap model, or its directory"
    )
    tensors = _tensors(file)
    layers = _by_layer(file, tensors, r"layers\.(\d+)\.(.+)")
    linear = "weight" in layers[0]
    expected: dict[str, Shape] = {
        "0.weight": ("hidden", "input"),
        "0.bias": ("hidden",),
        "2.weight": ("kv heads", "hidden"),
        "2.bias": ("kv heads",),
    }
    sizes = _fit(file, layers, {"weight": ("kv heads", "input"), "bias": ("kv heads",)} if linear else expected)
    config = _config(file)
    facts = {"input_dim": sizes["input"], "output_dim": sizes["kv heads"], "n_modules": len(layers)}
    _agree(file, config, {**facts, "hidden_dim": None if linear else sizes["hidden"]})
    found = {"kind": "linear" if linear else "mlp", "layers": str(len(layers)), "kv_heads": str(sizes["kv heads"])}
    return tensors, found


def _numpy() -> list[Any]:
    """Returns the types in pickled numpy arrays: Fast KVzip's files hold some (losses), which are dropped."""
    import numpy as np
    from numpy._core import multiarray

    rebuild = multiarray._reconstruct  # type: ignore[attr-defined]
    dtypes = [getattr(np.dtypes, n) for n in ("Float64DType", "Float32DType", "Int64DType")]
    # The module had another name before numpy 2.
    return [rebuild, (rebuild, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, *dtypes]


def _fast_kvzip(path: Path) -> Found:
    """Reads {"module": [state_dict of each gate], and records of the training}."""
    file = _file(path, (), "a .pt file of Fast KVzip's gates, such as qwen3-8b/q4_dim16_sink16.pt")
    content = read_pickle(file, _numpy())
    gates = content.get("module") if isinstance(content, Mapping) else None
    if not isinstance(gates, (list, tuple)) or not gates or not all(isinstance(g, Mapping) for g in gates):
        raise PolicyWeightsError(f'{file}: expected a dict with a list of gates under "module" (Fast KVzip\'s .pt)')
    layers = [flatten(file, gate) for gate in gates]
    sizes = _fit(
        file,
        layers,
        {
            "q_norm.weight": ("rank",),
            "k_norm.weight": ("rank",),
            "k_base": ("kv heads", 1, "sinks", "rank"),
            "b": ("kv heads", 1, "group"),
            "q_proj.weight": ("heads*rank", "input"),
            "q_proj.bias": ("heads*rank",),
            "k_proj.weight": ("kv heads*rank", "input"),
        },
    )
    for name, product in (("kv heads*rank", sizes["kv heads"]), ("heads*rank", sizes["kv heads"] * sizes["group"])):
        if sizes[name] != product * sizes["rank"]:
            raise PolicyWeightsError(
                f"{file}: its projections have {sizes[name]} rows ({name}), expected {product * sizes['rank']}"
            )
    tensors = {f"gates.{i}.{n}": t for i, layer in enumerate(layers) for n, t in layer.items()}
    return tensors, {
        "gates": str(len(layers)),
        "kv_heads": str(sizes["kv heads"]),
        "group": str(sizes["group"]),
        "rank": str(sizes["rank"]),
        "sinks": str(sizes["sinks"]),
    }


def _trim_kv(path: Path) -> Found:
    """Reads trimkv_weights.pth: the retention_gate part of a state_dict; config.json beside it names the kind."""
    file = _file(path, ("trimkv_weights.pth",), "trimkv_weights.pth or its directory")
    tensors = _tensors(file)
    layers = _by_layer(file, tensors, r"model\.layers\.(\d+)\.self_attn\.retention_gate\.(.+)")
    config = _config(file)
    told = config.get("retention_gate")
    if told is not None and told not in GATES:
        raise PolicyWeightsError(
            f"{file}: config.json says retention_gate={told!r}, expected one of {', '.join(GATES)}"
        )
    kind = told or ("rg3" if "gate_proj.weight" in layers[0] else "rg")
    (inner, other), outer = PARTS[kind]
    wide: Shape = ("hidden", "input")
    expected: dict[str, Shape] = {
        inner: wide,
        other: wide if kind == "rg3" else ("hidden",),
        outer: ("kv heads", "hidden"),
        "bias": ("kv heads",),
    }
    sizes = _fit(file, layers, expected)
    _agree(file, config, {"num_hidden_layers": len(layers), "num_key_value_heads": sizes["kv heads"]})
    metadata = {"layers": str(len(layers)), "kv_heads": str(sizes["kv heads"]), "hidden_size": str(sizes["hidden"])}
    if told or kind == "rg3":  # rg and rg2 have the same names
        metadata["retention_gate"] = kind
    for key in ("memory_size", "buffer_size"):  # what the gates were trained for
        if isinstance(config.get(key), int):
            metadata[f"trained_{key}"] = str(config[key])
    if isinstance(config.get("base_model"), str):
        metadata["trained_for"] = config["base_model"]
    return tensors, metadata


def _duo_attention(path: Path) -> Found:
    """Reads full_attention_heads.tsv: a line per layer, a number per kv head; config.json has the training settings."""
    file = _file(path, ("full_attention_heads.tsv",), "full_attention_heads.tsv or its directory")
    if text_is_lfs(file):
        raise PolicyWeightsError(lfs_message(file))
    try:
        lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
        rows = [[float(x) for x in line] for line in lines]
    except ValueError as error:
        raise PolicyWeightsError(f"{file} is not a table of numbers: {error}") from error
    if not rows or len({len(row) for row in rows}) != 1:
        got = ", ".join(str(n) for n in sorted({len(row) for row in rows})) or "no"
        raise PolicyWeightsError(
            f"{file} has lines of {got} numbers; expected a line a layer, each with a number a kv head"
        )
    pattern = torch.tensor(rows, dtype=torch.float32)
    if not bool(torch.isfinite(pattern).all()):
        raise PolicyWeightsError(f"{file} has numbers that are not finite")
    config = _config(file)
    metadata = {"layers": str(len(rows)), "kv_heads": str(len(rows[0]))}
    for key, name in (("sink_size", "trained_sink_size"), ("recent_size", "trained_recent_size")):
        if isinstance(config.get(key), int):
            metadata[name] = str(config[key])
    if isinstance(config.get("model_name"), str):
        metadata["trained_for"] = config["model_name"]
    return {PATTERN: pattern}, metadata


IMPORTERS: dict[str, Callable[[Path], Found]] = {
    "locret": _locret,
    "locret_q": _locret,
    "kvzap": _kvzap,
    "fast_kvzip": _fast_kvzip,
    "trim_kv": _trim_kv,
    "duo_attention": _duo_attention,
}
