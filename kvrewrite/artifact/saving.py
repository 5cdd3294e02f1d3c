"""Writes a rewritten model as a directory."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from kvrewrite.analysis.model_card import model_card
from kvrewrite.artifact.checkpoint import Checkpoint, read_json
from kvrewrite.artifact.directory import read_manifest
from kvrewrite.artifact.parameter_sources import parameter_sources
from kvrewrite.artifact.writing import Compile, check_destination, companion_files, write_artifact
from kvrewrite.capture.attention_interface import is_transformers_model
from kvrewrite.capture.third_party import has_adapters, quantized_weights
from kvrewrite.errors import ArtifactError
from kvrewrite.ir.program import Program


def save(
    program: Program,
    out: str | Path,
    *,
    source: object,
    config: Any,
    force: bool = False,
    compile_steps: Compile | None = None,
    vision: Collection[str] = (),
) -> Path:
    """Writes a rewritten model as a directory that `load` reads, and that stock transformers reads as the original.

    source: the model or model directory that the program was rewritten from. config: for a module that is not from
    transformers. compile_steps, vision: as for `write_artifact`. Raises ArtifactError.
    """
    if program.parallel is not None:
        raise ArtifactError("one process's part of a model can't be saved; save the whole model, in one process")
    out = Path(out).resolve()
    card = model_card(program, "", [])
    if isinstance(source, Path):
        manifest = read_manifest(source)
        checkpoint = Checkpoint.open(source, manifest["files"])
        return write_artifact(
            out,
            program,
            base=checkpoint,
            config={k: v for k, v in read_json(source / "config.json").items() if k != "kvrewrite"},
            recipes=manifest["recipes"],
            extra_files=[p for p in companion_files(source) if _is_listed(p, source, manifest)],
            force=force,
            card=(source / "README.md").read_text() if (source / "README.md").exists() else card,
            compile_steps=compile_steps,
            vision=vision,
        )
    if program.layout.devices is not None:
        raise ArtifactError(
            "the model lies on several devices, and transfers between them are part of its graph. Convert the original's "
            "directory instead (kvrewrite convert), for which no weights are loaded"
        )
    if not isinstance(source, nn.Module):
        raise ArtifactError(
            "this model was made from a program alone; there is no original to save with it. Convert a model's "
            "directory (kvrewrite convert)"
        )
    if has_adapters(source):
        raise ArtifactError(
            "the model has adapters of peft in its layers, and stock transformers could not open such a directory as the "
            "original. Merge them first: kvrewrite.transform(model.merge_and_unload(), ...)"
        )
    if (what := quantized_weights(source)) is not None:
        raise ArtifactError(
            f"the model's weights are quantized ({what}), which a model directory can't hold. Convert the checkpoint "
            "as it was before it was quantized, or transform the quantized model where it is used"
        )
    if is_transformers_model(source):
        check_destination(out, {}, force)
        with _temporary_next_to(out) as folder:
            try:
                source.save_pretrained(folder)  # type: ignore[operator]
            except (OSError, SafetensorError) as error:  # a full disk raises the latter
                raise ArtifactError(
                    f"{out} could not be written, and nothing was left there: {error}; free some space"
                ) from error
            checkpoint = Checkpoint.open(folder)
            sources = parameter_sources(source, source.config, checkpoint)
            return write_artifact(
                out,
                program,
                base=checkpoint,
                config=read_json(folder / "config.json"),
                recipes=sources,
                extra_files=companion_files(folder),
                link=True,
                force=force,
                card=card,
                compile_steps=compile_steps,
                vision=vision,
            )
    tensors: dict[str, Tensor] = dict(source.named_parameters(remove_duplicate=False))
    tensors.update(source.named_buffers(remove_duplicate=False))
    return write_artifact(
        out,
        program,
        base=tensors,
        config=json.loads(config.to_json_string()),
        force=force,
        card=card,
        compile_steps=compile_steps,
    )


def _is_listed(path: Path, source: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest lists a file, or one in a folder."""
    name = path.relative_to(source).as_posix()
    return any(listed == name or listed.startswith(f"{name}/") for listed in manifest["files"])


@contextmanager
def _temporary_next_to(out: Path) -> Any:
    """Makes a folder on the file system of `out` and removes it afterwards."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.base-", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise ArtifactError(f"{out} could not be written, and nothing was left there: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
