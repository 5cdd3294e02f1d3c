"""Reads GGUF files through transformers: a file becomes a checkpoint directory with unpacked weights.

What transformers does not take from a file is compared with the model's configuration: it would be wrong in silence.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kvrewrite.artifact.checkpoint import some
from kvrewrite.errors import ArtifactError

NEEDS = "pip install 'kvrewrite[gguf]' (packages gguf and accelerate)"
_ADVICE = "take the model's safetensors checkpoint instead"
# What transformers' readers raise; all mean that they can't read the file.
_WRONG = (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, OSError)
# Extra tensors that hold RoPE's frequencies. transformers ignores them.
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Settings of attention that a file may have, and their names in a configuration.
_SETTINGS = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


@contextlib.contextmanager
def unpacked(file: Path, out: Path | None = None) -> Iterator[Path]:
    """Opens a GGUF file as a checkpoint directory, which is deleted at the end.

    The whole model is in memory for a moment. Its weights keep their dtype; quantized ones become bfloat16.

    Args:
        file: the GGUF file.
        out: where a model directory will be written: the checkpoint directory is made beside it, so that links work.

    Raises ArtifactError: the file can't be read, or says something that transformers ignores, or a package is missing.
    """
    _require_packages(file)
    beside = None if out is None else out.resolve().parent
    if beside is not None and not beside.is_dir():
        raise ArtifactError(f"{out}: its parent directory does not exist; make it first")
    with tempfile.TemporaryDirectory(prefix=".kvrewrite-gguf-", dir=beside) as folder:
        directory = Path(folder) / file.stem
        _unpack(file, directory)
        yield directory


def _require_packages(file: Path) -> None:
    from transformers.utils.import_utils import is_accelerate_available, is_gguf_available

    if not (is_gguf_available() and is_accelerate_available()):
        raise ArtifactError(f"{file} is a GGUF file, and what reads those is not installed: {NEEDS}")


def _unpack(file: Path, directory: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file to `directory`, as `save_pretrained` does."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fields, tensors = _contents(file)
    how: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    unpack: dict[str, Any] = {}
    if config_class := getattr(transformers, "GgufConfig", None):  # newer versions leave weights packed by default
        unpack["quantization_config"] = config_class(dequantize=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=_dtype(tensors), output_loading_info=True, **how, **unpack
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **how)
    except _WRONG as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ArtifactError(
            f"transformers can't read {file} (architecture {fields.get('general.architecture')}): {reason}; {_ADVICE}"
        ) from error
    if missing := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise ArtifactError(
            f"{file} lacks weights that transformers' {type(model).__name__} needs: {some(missing)}; {_ADVICE}"
        )
    _check_settings(file, fields, tensors, model.config)
    for name, key in (("bos_token", "bos_token_id"), ("eos_token", "eos_token_id"), ("pad_token", "padding_token_id")):
        number = fields.get(f"tokenizer.ggml.{key}")
        if number is not None:  # some versions of transformers take one for the other
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:  # the weights are plain now
        quantizer.remove_quantization_config(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _contents(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The single values in a GGUF file, and its tensors' types by name."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, OverflowError, MemoryError, KeyError) as error:
        raise ArtifactError(
            f"{file} is not a whole GGUF file ({str(error).strip()[:200]}); download it again"
        ) from error
    fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
    return fields, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


def _dtype(tensors: Mapping[str, str]) -> torch.dtype:
    """The dtype of the unpacked weights: that of the file's plain tensors, bfloat16 where some are quantized."""
    kinds = set(tensors.values())
    if kinds <= {"F32"}:
        return torch.float32
    return torch.float16 if kinds <= {"F32", "F16"} else torch.bfloat16


def _check_settings(file: Path, fields: Mapping[str, Any], tensors: Mapping[str, str], config: Any) -> None:
    """Raises ArtifactError where a file says something of attention or RoPE that the configuration does not have."""
    architecture = fields.get("general.architecture")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)}
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    extra = [name for name in _ROPE_TENSORS if name in tensors]
    if kinds <= {"default"} and (scaling != "none" or extra):
        what = f"scales RoPE ({', '.join(extra)})" if extra else f"scales RoPE ({scaling})"
        raise ArtifactError(f"{file} {what}, which transformers does not read; {_ADVICE}")
    base = fields.get(f"{architecture}.rope.freq_base")
    bases = {part["rope_theta"] for part in (rope, *rope.values()) if isinstance(part, dict) and "rope_theta" in part}
    if base is not None and bases and base not in bases:
        raise ArtifactError(
            f"{file} says rope.freq_base={base}, of which transformers makes {sorted(bases)}; {_ADVICE}"
        )
    for key, name in _SETTINGS.items():
        said, read = fields.get(f"{architecture}.{key}"), getattr(config, name, None)
        if said and said != read:
            raise ArtifactError(f"{file} says {key}={said}, of which transformers makes {name}={read}; {_ADVICE}")
