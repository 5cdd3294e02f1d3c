"""Writes a model directory (see `directory.py`): into a staging folder beside its final place, then renamed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvrewrite import __version__
from kvrewrite.artifact.checkpoint import Checkpoint
from kvrewrite.artifact.companions import GENERATION, TOKENIZER_FILES
from kvrewrite.artifact.directory import (
    CARD,
    CONFIG,
    CONSTANTS,
    FORMAT_VERSION,
    GRAPH,
    MANIFEST,
    OURS,
    POLICY,
    WEIGHTS,
    manifest_digest,
)
from kvrewrite.artifact.files import Writer, sync_folder
from kvrewrite.artifact.program_check import check_program
from kvrewrite.artifact.publishing import publish, recover, staging
from kvrewrite.artifact.recipes import Recipe, check_recipe
from kvrewrite.cache.memory import human
from kvrewrite.errors import ArtifactError
from kvrewrite.ir.fx import get_attr
from kvrewrite.ir.layout_file import layout_to_dict, read_layout
from kvrewrite.ir.program import Program
from kvrewrite.ir.serialize import attach, graph_from_dict, graph_to_dict

# A model's files besides config and weights. The base's README.md is not among them: the card replaces it.
COMPANIONS = (
    *(name.removesuffix("/*") for name in TOKENIZER_FILES),  # folders as a whole
    GENERATION,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
Compile = Callable[[Path], Mapping[str, Any]]


def companion_files(directory: str | Path) -> list[Path]:
    """Returns tokenizer files, generation config, chat templates and licenses of a checkpoint directory."""
    directory = Path(directory)
    return sorted({path for pattern in COMPANIONS for path in directory.glob(pattern)})


def write_artifact(
    out: str | Path,
    program: Program,
    *,
    base: Checkpoint | Mapping[str, Tensor],
    config: Mapping[str, Any],
    recipes: Mapping[str, Recipe] | None = None,
    extra_files: Iterable[Path] = (),
    policy_tensors: Mapping[str, Tensor] | None = None,
    constants: Mapping[str, Tensor] | None = None,
    force: bool = False,
    link: bool = False,
    card: str = "",
    compile_steps: Compile | None = None,
    vision: Collection[str] = (),
) -> Path:
    """Writes a model directory; returns its path.

    base: the checkpoint whose files are copied (link: hard-linked), with `recipes` for every name in `program.base`;
    or, for a module without a checkpoint, the tensors themselves under these names. policy_tensors, constants: default:
    those in the program's graph. compile_steps: called with the staging folder once it can be read as a model
    directory; writes files there and returns the manifest's "compiled" entry. force: replaces an existing model
    directory, which is only removed once the new one is complete. vision: parameters of the model that no graph reads,
    which turn images into embeddings; `recipes` has them, too. After a failure the staging folder is removed and
    `out` is untouched.
    """
    out = Path(out).resolve()
    check_destination(out, base, force)
    policy_tensors = _collect(program, program.policy_weights, policy_tensors, "policy weights")
    constants = _collect(program, program.constants, constants, "constants")
    _check_partition(program)
    graph = graph_to_dict(program.graph)
    _check_as_read(program, graph)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        recover(out, base.directory if isinstance(base, Checkpoint) else None)
        with staging(out) as folder:
            _check_space(folder, base, link)
            writer = Writer(folder, OURS)
            writer.json(CONFIG, {**config, "kvrewrite": _config_section(program)}, indent=2)
            for path in extra_files:
                writer.extra(Path(path))
            recipes = _write_base(writer, [*program.base, *vision], base, recipes, link)
            if policy_tensors:
                name = str(program.policy.get("name"))
                writer.tensors(POLICY, policy_tensors, {"policy": name, "kvrewrite": __version__})
            writer.tensors(CONSTANTS, constants, {"kvrewrite": __version__})
            writer.json(GRAPH, graph)
            # Not in the manifest: a model card is there to be edited.
            writer.text(CARD, card)
            del writer.files[CARD]
            seen = {"vision": list(vision)} if vision else {}
            writer.json(MANIFEST, _manifest(program, recipes, writer.files, seen), indent=1)
            if compile_steps is not None:
                compiled = compile_steps(folder)
                (folder / MANIFEST).unlink()
                del writer.files[MANIFEST]
                for name in compiled["files"]:
                    writer.add(name)
                writer.json(
                    MANIFEST, _manifest(program, recipes, writer.files, {**seen, "compiled": compiled}), indent=1
                )
            writer.seal()
            publish(folder, out, (lambda: check_destination(out, base, force)) if force else None)
            sync_folder(out.parent)
    except OSError as error:
        hint = "free some space, or use link=True (--link) if the base model is on the same file system"
        reason = f"{error.strerror or error}; {hint}" if error.errno == errno.ENOSPC else str(error)
        raise ArtifactError(f"{out} could not be written, and nothing was left there: {reason}") from error
    return out


def check_destination(out: Path, base: Checkpoint | Mapping[str, Tensor], force: bool) -> None:
    """Refuses, before any work is done, an output directory that would overwrite something."""
    out = out.resolve()
    if isinstance(base, Checkpoint):
        source = base.directory.resolve()
        if out == source or source in out.parents or out in source.parents:
            raise ArtifactError(
                f"the output {out} and the base model {source} overlap; choose another output directory"
            )
    if not out.exists():
        return
    if not out.is_dir():
        raise ArtifactError(f"{out} exists and is not a directory; choose another output directory")
    if not any(out.iterdir()):
        return
    if not force:
        raise ArtifactError(
            f"{out} is not empty; choose another output directory, or replace it with force=True (--force)"
        )
    if not (out / MANIFEST).is_file() and not (out / CONFIG).is_file():
        raise ArtifactError(f"{out} is not a model directory (no config.json), so even with force it is not replaced")


def _collect(program: Program, names: list[str], given: Mapping[str, Tensor] | None, what: str) -> dict[str, Tensor]:
    """Returns the tensors of one kind: those given, else those in the graph."""
    found = {name: _attribute(program, name) if given is None else given.get(name) for name in names}
    if lacking := [n for n, t in found.items() if not isinstance(t, Tensor) or t.is_meta]:
        raise ArtifactError(f"{what} without values can't be saved: {', '.join(lacking[:8])}; load them first")
    return {n: t.detach() for n, t in found.items() if isinstance(t, Tensor)}


def _attribute(program: Program, name: str) -> Any:
    try:
        return get_attr(program.graph, name)
    except AttributeError:
        return None


def _check_partition(program: Program) -> None:
    """Checks that every tensor the graph reads is of exactly one kind; otherwise it would be lost."""
    kinds = [set(program.base), set(program.policy_weights), set(program.constants)]
    read = {str(n.target) for n in program.graph.graph.nodes if n.op == "get_attr"}
    for name in sorted(read):
        count = sum(name in kind for kind in kinds)
        if count != 1:
            raise ArtifactError(
                f"the graph reads {name}, which is in {count} of the program's base, policy_weights and constants; "
                "expected exactly one"
            )


def _check_as_read(program: Program, graph: dict[str, Any]) -> None:
    """Refuses to write what `read_artifact` would refuse to read."""
    read = {
        str(n.target): get_attr(program.graph, str(n.target)) for n in program.graph.graph.nodes if n.op == "get_attr"
    }
    again = graph_from_dict(graph, read, "cpu")
    for name in set(program.constants) - read.keys():
        attach(again, name, get_attr(program.graph, name))
    what, cpu = "the rewritten program can't be saved", torch.device("cpu")
    layout = layout_to_dict(program.layout, program.graph)
    read_again = read_layout(layout, again, getattr(torch, program.dtype), cpu, what)
    check_program(replace(program, graph=again, layout=read_again), cpu, what)


def _config_section(program: Program) -> dict[str, Any]:
    options = program.policy.get("options") or {}
    section = {"format_version": FORMAT_VERSION, "version": __version__, "policy": program.policy}
    return {**section, "budget": options["budget"]} if "budget" in options else section


def _manifest(
    program: Program,
    recipes: Mapping[str, Recipe],
    files: dict[str, Any],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kvrewrite": __version__,
        "torch": torch.__version__,
        "transformers": _transformers_version(),
        "policy": program.policy,
        "dtype": program.dtype,
        "vocab_size": program.vocab_size,
        "max_positions": program.max_positions,
        "frontend": program.frontend,
        "sites": [site.as_dict() for site in program.sites],
        "layout": layout_to_dict(program.layout, program.graph),
        "base": program.base,
        "policy_weights": program.policy_weights,
        "constants": program.constants,
        # Which base and policy weights are parameters; the others are buffers.
        "parameters": [
            name
            for name in (*program.base, *program.policy_weights)
            if isinstance(_attribute(program, name), nn.Parameter)
        ],
        "aliases": program.aliases,
        "embedded": program.embedded,
        "recipes": dict(recipes),
        "files": files,
        **more,
    }
    return {**body, "manifest_sha256": manifest_digest(body)}


def _transformers_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def _write_base(
    writer: Writer,
    names: list[str],
    base: Checkpoint | Mapping[str, Tensor],
    recipes: Mapping[str, Recipe] | None,
    link: bool,
) -> dict[str, Recipe]:
    """Copies, links or writes the base weights; returns the recipes of these names."""
    if isinstance(base, Checkpoint):
        recipes = recipes or {}
        if lacking := [n for n in names if n not in recipes]:
            raise ArtifactError(f"no recipe says how to make {', '.join(lacking[:8])} from {base.directory}")
        for name in names:
            check_recipe(name, recipes[name], base.tensors)
        for name in base.files:
            writer.copy(base.directory / name, name, link=link)
            base.check_unchanged(name)
        return {n: recipes[n] for n in names}
    tensors: dict[str, Tensor] = {}
    made: dict[str, Recipe] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name in names:
        tensor = base.get(name)
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise ArtifactError(f"the base parameter {name} has no values to save; load the model's weights first")
        # Tied parameters are one tensor under several names; safetensors stores it once.
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        key = first.setdefault(place, name)
        tensors.setdefault(key, tensor.detach())
        made[name] = {
            "key": key,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
    writer.tensors(WEIGHTS, tensors, {"format": "pt", "kvrewrite": __version__})
    return made


def _check_space(folder: Path, base: Checkpoint | Mapping[str, Tensor], link: bool) -> None:
    if isinstance(base, Checkpoint):
        needed = 0 if link else sum((base.directory / f).stat().st_size for f in base.files)
    else:
        needed = sum(t.numel() * t.element_size() for t in base.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        message = f"the weights need {human(needed)}, {human(free)} are free"
        raise OSError(errno.ENOSPC, message)
