"""Reads the files of a model directory that transformers reads: configuration, generation settings, tokenizer.

Nothing in them runs: `trust_remote_code=False` is always given, so that transformers does not ask on the terminal. In a
directory that kvrewrite wrote, only files of its manifest are opened, after their hashes were checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from kvrewrite.artifact.checkpoint import read_json, some
from kvrewrite.errors import ArtifactError

GENERATION = "generation_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")  # one of them must be there
# What transformers looks for when it opens a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*",
)
# What transformers' own checks of such files raise; all mean that the file is wrong.
_WRONG = (ValueError, TypeError, KeyError, OSError, AttributeError, IndexError, RuntimeError, ImportError)


def refuse_unlisted(directory: Path, listed: Iterable[str], patterns: Iterable[str]) -> None:
    """Raises ArtifactError if a directory has files of these kinds that its manifest does not list: they would be
    used."""
    known, patterns = set(listed), tuple(patterns)
    if found := sorted(
        name
        for path in (*directory.glob("*"), *directory.glob("additional_chat_templates/*"))
        if path.is_file()
        and (name := path.relative_to(directory).as_posix()) not in known
        and any(fnmatch(name, pattern) for pattern in patterns)
    ):
        raise ArtifactError(
            f"{directory} has {some(found)}, which its manifest does not list, so nobody can tell where they come from. Take "
            "them away; to have them in the model directory, put them beside the original model and convert it again"
        )


def read_config(directory: str | Path) -> Any:
    """Returns the configuration of a model directory as transformers has it; a plain one if it has no model type.

    Raises ArtifactError if it is damaged or transformers does not know the model type.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    path = Path(directory) / "config.json"
    data = read_json(path)
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} is not a JSON object; it is damaged, copy it again")
    kind = data.get("model_type")
    try:
        if not kind:
            return PreTrainedConfig.from_dict({k: v for k, v in data.items() if k not in ("kvrewrite", "auto_map")})
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            code = "; the code in its auto_map is never run" if data.get("auto_map") else ""
            raise ArtifactError(
                f"{path}: transformers does not know model_type {kind!r:.80}{code}. Install the version of transformers that "
                "the model was converted with (kvrewrite.json names it)"
            )
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (*_WRONG, StrictDataclassError) as error:
        raise ArtifactError(f"{path} is not a valid config of {kind!r:.80}: {str(error).strip()[:400]}") from error


def read_generation_config(directory: str | Path, listed: Mapping[str, Any]) -> Any:
    """Returns the generation settings of a model directory, None if its manifest lists none. Raises ArtifactError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import GenerationConfig

    directory = Path(directory)
    refuse_unlisted(directory, listed, [GENERATION])
    if GENERATION not in listed:
        return None
    path = directory / GENERATION
    if not isinstance(read_json(path), dict):
        raise ArtifactError(f"{path} is not a JSON object; it is damaged, copy it again")
    try:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)  # reads JSON and nothing else
    except (*_WRONG, StrictDataclassError) as error:
        raise ArtifactError(f"{path} is not valid: {str(error).strip()[:400]}") from error


def read_tokenizer(directory: str | Path) -> Any:
    """Returns the tokenizer of a model directory, from kvrewrite or not. Raises ArtifactError.

    In a directory that kvrewrite wrote, manifest and hashes are checked first, and only listed files are opened.
    """
    from transformers import AutoTokenizer

    from kvrewrite.artifact import directory as artifact

    directory = Path(directory)
    if artifact.is_artifact(directory):
        files = artifact.read_manifest(directory)["files"]
        refuse_unlisted(directory, files, TOKENIZER_FILES)
        for name in files:
            if name == artifact.CONFIG or any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES):
                artifact.check_file(directory, name, files[name], hashed=True)
    if not any((directory / name).exists() for name in TOKENIZERS):
        raise ArtifactError(
            f"{directory} has no tokenizer; put the tokenizer's files beside the original model and convert it again"
        )
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except _WRONG as error:
        code = "" if "trust_remote_code" not in str(error) else " (its own code, which kvrewrite does not run)"
        raise ArtifactError(
            f"the tokenizer in {directory} can't be opened{code}: {str(error).strip()[:400]}"
        ) from error


def auto_model(config: Any) -> Any:
    """The class of transformers that opens a model with this configuration: AutoModelForCausalLM, and for a vision-language model
    that it does not know AutoModelForImageTextToText."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    seeing = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if seeing else AutoModelForCausalLM


def read_original(directory: Path, dtype: str, advice: str, tokenizer: Any = None) -> tuple[Any, Any]:
    """The model of a directory that save_pretrained wrote, and its tokenizer where none is given. advice: what to do with one
    that kvrewrite wrote, which is refused. Raises ArtifactError."""
    from transformers import AutoConfig

    from kvrewrite.artifact.directory import is_artifact

    if not (directory / "config.json").is_file():
        raise ArtifactError(f"{directory} has no config.json; expected a directory that save_pretrained wrote")
    if is_artifact(directory):
        raise ArtifactError(f"{directory} is a converted model; {advice}")
    wanted: Any = dtype
    try:
        own: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        model = auto_model(AutoConfig.from_pretrained(directory, **own)).from_pretrained(directory, dtype=wanted, **own)
        return model, tokenizer or read_tokenizer(directory)
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{directory}: {str(error).splitlines()[0]}") from error
