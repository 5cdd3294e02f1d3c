"""The model directory: a Hugging Face directory with the rewritten program beside the untouched base weights.

    config.json               the original's, plus a `kvrewrite` section
    *.safetensors             base weights, byte for byte those of the original (or hard links to them)
    policy.safetensors        what the policy inserted, if it has weights
    constants.safetensors     tables that the model computes when it is built, so that loading needs no model code
    graph.json                the rewritten program as data (`graph_io.py`)
    compiled/*.pt2            the steps as AOTInductor compiled them, on request only (`ahead.py`)
    README.md                 the model card; yours to edit, so nothing checks it
    kvrewrite.json            the manifest: policy, sites, layout, recipes of parameters, size and sha256 of each file

Nothing in it is a pickle, and nothing but compiled/ is code, which is loaded only on trust. It is written to a staging folder
beside its final place and renamed, so that a crash leaves either the old state or the new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvrewrite import __version__
from kvrewrite.analysis.memory import human
from kvrewrite.artifact.checkpoint import (
    Checkpoint,
    Copier,
    Recipe,
    check_recipe,
    load_parameters,
    read_header,
    some,
)
from kvrewrite.artifact.program_check import check_program
from kvrewrite.artifact.publishing import leftovers, publish, recover, staging
from kvrewrite.errors import ArtifactError
from kvrewrite.ir import schema
from kvrewrite.ir.fx import get_attr
from kvrewrite.ir.program import Program
from kvrewrite.ir.serialize import attach, graph_from_dict, graph_to_dict, read_graph
from kvrewrite.ir.site import AttentionSite

FORMAT_VERSION = 3
MANIFEST, GRAPH, POLICY, CONSTANTS = "kvrewrite.json", "graph.json", "policy.safetensors", "constants.safetensors"
CONFIG, CARD, WEIGHTS = "config.json", "README.md", "model.safetensors"
_OURS = {MANIFEST, GRAPH, POLICY, CONSTANTS, CONFIG, CARD}
_CHUNK = 8 << 20

# What belongs to a model besides config and weights. The base's README.md is not among them: the card replaces it.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model",
    "tokenizer.model.v3", "tekken.json", "spiece.model", "sentencepiece.bpe.model",
    "*.tiktoken", "generation_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
    "preprocessor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_EXECUTABLE = {".bin", ".pt", ".pth", ".pt2", ".pkl", ".pickle", ".ckpt", ".py", ".so"}

Progress = Callable[[str, int, int], None]
Compile = Callable[[Path], Mapping[str, Any]]


def companion_files(directory: str | Path) -> list[Path]:
    """Tokenizer files, generation config, chat templates and licenses of a checkpoint directory."""
    directory = Path(directory)
    return sorted({path for pattern in COMPANIONS for path in directory.glob(pattern)})


# ------------------------------------------------------------------------------------------------------------- writing
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
) -> Path:
    """Writes a model directory; returns its path.

    base: the checkpoint whose files are copied (link: hard-linked), with `recipes` for every name in `program.base`; or
    the tensors themselves under these names, for a module that came from no checkpoint. policy_tensors, constants:
    default: those in the program's graph. compile_steps: called with the staging folder once it can be read as a model
    directory; writes files there and returns what the manifest says of them under "compiled". force: replaces an existing
    model directory, which is removed only when the new one is complete. On any failure the staging folder is removed and
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
            writer = _Writer(folder)
            writer.json(CONFIG, {**config, "kvrewrite": _config_section(program)}, indent=2)
            for path in extra_files:
                writer.extra(Path(path))
            recipes = _write_base(writer, program, base, recipes, link)
            if policy_tensors:
                name = str(program.policy.get("name"))
                writer.tensors(POLICY, policy_tensors, {"policy": name, "kvrewrite": __version__})
            writer.tensors(CONSTANTS, constants, {"kvrewrite": __version__})
            writer.json(GRAPH, graph)
            # Not in the manifest: a model card is there to be edited.
            writer.text(CARD, card)
            del writer.files[CARD]
            writer.json(MANIFEST, _manifest(program, recipes, writer.files), indent=1)
            if compile_steps is not None:
                compiled = compile_steps(folder)
                (folder / MANIFEST).unlink()
                del writer.files[MANIFEST]
                for name in compiled["files"]:
                    writer.add(name)
                writer.json(MANIFEST, _manifest(program, recipes, writer.files, compiled), indent=1)
            writer.seal()
            publish(folder, out, (lambda: check_destination(out, base, force)) if force else None)
            _sync_folder(out.parent)
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
    """The tensors of one kind: those given, else those in the graph."""
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
    """Every tensor that the graph reads must be of exactly one kind, or it would be lost."""
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
    check_program(replace(program, graph=again), torch.device("cpu"), "the rewritten program can't be saved")


def _config_section(program: Program) -> dict[str, Any]:
    options = program.policy.get("options") or {}
    section = {"format_version": FORMAT_VERSION, "version": __version__, "policy": program.policy}
    return {**section, "budget": options["budget"]} if "budget" in options else section


def _manifest(
    program: Program,
    recipes: Mapping[str, Recipe],
    files: dict[str, Any],
    compiled: Mapping[str, Any] | None = None,
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
        "layout": program.layout,
        "base": program.base,
        "policy_weights": program.policy_weights,
        "constants": program.constants,
        # Which of base and policy weights are parameters; the others are buffers.
        "parameters": [
            name
            for name in (*program.base, *program.policy_weights)
            if isinstance(_attribute(program, name), nn.Parameter)
        ],
        "aliases": program.aliases,
        "recipes": dict(recipes),
        "files": files,
    }
    if compiled is not None:
        body["compiled"] = dict(compiled)
    return {**body, "manifest_sha256": _digest(body)}


def _digest(body: Mapping[str, Any]) -> str:
    """The hash of a manifest without its own hash, whatever its layout on disk."""
    text = _dump(body, MANIFEST, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _transformers_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def _write_base(
    writer: _Writer,
    program: Program,
    base: Checkpoint | Mapping[str, Tensor],
    recipes: Mapping[str, Recipe] | None,
    link: bool,
) -> dict[str, Recipe]:
    """Copies, links or writes the base weights; returns the recipes of the names in `program.base`."""
    if isinstance(base, Checkpoint):
        recipes = recipes or {}
        if lacking := [n for n in program.base if n not in recipes]:
            raise ArtifactError(f"no recipe says how to make {', '.join(lacking[:8])} from {base.directory}")
        for name in program.base:
            check_recipe(name, recipes[name], base.tensors)
        for name in base.files:
            writer.copy(base.directory / name, name, link=link)
            base.check_unchanged(name)
        return {n: recipes[n] for n in program.base}
    tensors: dict[str, Tensor] = {}
    made: dict[str, Recipe] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name in program.base:
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


def _dump(data: Any, what: str, **options: Any) -> str:
    """JSON text that gives the same data when it is read; ArtifactError when there is none."""

    def check(value: Any, where: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if not isinstance(key, str):  # json would turn it into a string, and reading would not turn it back
                    raise ArtifactError(f"{what} can't be written: {where} has the key {key!r}, which is not a string")
                check(inner, f"{where}.{key}")
        elif isinstance(value, (list, tuple)):
            for inner in value:
                check(inner, where)

    check(data, "it")
    try:
        return json.dumps(data, ensure_ascii=False, allow_nan=False, **options)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{what} can't be written: it has data that JSON can't hold: {error}") from error


class _Writer:
    """Puts files into the staging folder, each synced to disk, and notes their sizes and hashes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}

    def text(self, name: str, text: str) -> None:
        data = text.encode()
        with (self.folder / name).open("xb") as file:
            file.write(data)
            _sync(file.fileno())
        self.files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def json(self, name: str, data: Any, indent: int | None = None) -> None:
        self.text(name, _dump(data, name, indent=indent) + "\n")

    def tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        path = self.folder / name
        save_tensors(path, tensors, metadata)
        self.files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}

    def copy(self, source: Path, name: str, *, link: bool) -> None:
        """Copies byte for byte, hashing on the way; or links."""
        source, target = source.resolve(), self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                os.link(source, target)
            except OSError as error:
                raise ArtifactError(
                    f"{source} can't be hard-linked into {self.folder.parent}: {error.strerror}; leave link out"
                ) from error
            self.files[name] = {"size": target.stat().st_size, "sha256": sha256_of(target)}
            return
        digest, size = hashlib.sha256(), 0
        with source.open("rb") as read, target.open("xb") as write:
            while chunk := read.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                write.write(chunk)
            _sync(write.fileno())
        self.files[name] = {"size": size, "sha256": digest.hexdigest()}

    def add(self, name: str) -> None:
        """Takes in a file that something else put into the folder."""
        path = self.folder / name
        with path.open("rb") as file:
            _sync(file.fileno())
        self.files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}

    def extra(self, path: Path) -> None:
        """Copies a file, or a folder of files."""
        members = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for member in members:
            name = member.relative_to(path.parent).as_posix()
            if name in _OURS or name in self.files:
                raise ArtifactError(f"{member} can't be put into the model directory: {name} is already taken there")
            if member.suffix in _EXECUTABLE:
                raise ArtifactError(f"{member} can run code or is a pickle; a model directory has neither")
            self.copy(member, name, link=False)
        if not members:
            raise ArtifactError(f"{path} does not exist or is empty; it was to be put into the model directory")

    def seal(self) -> None:
        """Syncs the folders themselves, so that the names are on disk too."""
        for folder in {self.folder, *(p for p in self.folder.rglob("*") if p.is_dir())}:
            _sync_folder(folder)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, synced, with the permissions that any new file gets here."""
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        # safetensors refuses tensors that share memory; what is meant to be shared was made one name before.
        place = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if tensor.numel() and place in storages else tensor
        storages.add(place)
    try:
        path.touch(exist_ok=False)
        mode = stat.S_IMODE(path.stat().st_mode)
        save_file(plain, path, metadata)
    except SafetensorError as error:
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, f"{path.name}: {error}") from error
    # safetensors may write through a temporary file that only its owner can read.
    path.chmod(mode)
    with path.open("rb") as file:
        _sync(file.fileno())


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file. progress: called with the bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(done)
    return digest.hexdigest()


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(folder: Path, base: Checkpoint | Mapping[str, Tensor], link: bool) -> None:
    if isinstance(base, Checkpoint):
        needed = 0 if link else sum((base.directory / f).stat().st_size for f in base.files)
    else:
        needed = sum(t.numel() * t.element_size() for t in base.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        message = f"the weights need {human(needed)}, {human(free)} are free"
        raise OSError(errno.ENOSPC, message)


# ------------------------------------------------------------------------------------------------------------- reading
def is_artifact(directory: str | Path) -> bool:
    """Whether a directory was written by `write_artifact`."""
    return (Path(directory) / MANIFEST).is_file()


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a model directory, checked against its own hash and our version."""
    directory = Path(directory)
    if not directory.is_dir():
        old = leftovers(directory)[1]
        aside = f". A run that replaced it was killed: {some(old)} is the former one, rename it" if old else ""
        raise ArtifactError(f"{directory} is not a directory; expected a model directory that kvrewrite wrote{aside}")
    if not is_artifact(directory):
        raise ArtifactError(
            f"{directory} has no {MANIFEST}, so kvrewrite did not write it, or it is incomplete. To convert a model: "
            "kvrewrite convert MODEL --out DIRECTORY"
        )
    path = directory / MANIFEST
    data = schema.read_bytes(path)
    damaged = f"{path} is damaged or was edited"
    head = schema.decode(data, schema.Head, path)
    if type(head.format_version) is not int:
        raise ArtifactError(
            f"{damaged}: it has no format_version; copy the directory again, or convert the model again"
        )
    if head.format_version != FORMAT_VERSION:
        newer = head.format_version > FORMAT_VERSION
        raise ArtifactError(
            f"{directory} has format {head.format_version}, written by kvrewrite {head.kvrewrite!s:.20}; this is kvrewrite "
            f"{__version__}, which reads {'up to ' if newer else ''}format {FORMAT_VERSION}. "
            + ("Upgrade: pip install --upgrade kvrewrite" if newer else "Convert the model again")
        )
    schema.decode(data, schema.Manifest, path)
    manifest: dict[str, Any] = schema.decode(data, dict[str, Any], path)
    body = {k: v for k, v in manifest.items() if k != "manifest_sha256"}
    if manifest["manifest_sha256"] != _digest(body):
        raise ArtifactError(f"{damaged}: its hash is wrong; copy the directory again, or convert the model again")
    for name in manifest["files"]:
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or any(len(p) > 255 for p in parts):
            raise ArtifactError(f"{damaged}: its list of files has {name!r:.80}")
    return manifest


def check_file(directory: Path, name: str, entry: Mapping[str, Any], hashed: bool) -> None:
    path = directory / name
    if not path.is_file():
        raise ArtifactError(f"{directory} lacks {name}, which its manifest lists; copy the directory again")
    size = path.stat().st_size
    if size != entry["size"]:
        raise ArtifactError(
            f"{path} has {size} bytes; expected {entry['size']}. It was cut off or edited; copy it again"
        )
    if hashed and sha256_of(path) != entry["sha256"]:
        raise ArtifactError(f"{path} is damaged or was edited (its sha256 differs from the manifest's); copy it again")


def read_artifact(
    directory: str | Path, device: torch.device | str = "cpu", meanwhile: Callable[[], None] | None = None
) -> tuple[Program, dict[str, Any]]:
    """Loads a model directory: the program, with all its tensors on `device` in its graph, and the manifest.

    Checks the manifest, the sizes of all files, the hashes of all but the base weights, and the headers of those;
    `verify_hashes` checks the rest. Needs neither the network nor the original model's code. meanwhile: called while the
    weights are on their way to the device.
    """
    directory, device = Path(directory), torch.device(device)
    manifest = read_manifest(directory)
    files = manifest["files"]
    if lacking := sorted({CONFIG, GRAPH, CONSTANTS} - files.keys()):
        raise ArtifactError(f"the manifest of {directory} does not list {', '.join(lacking)}; convert the model again")
    own = {POLICY, CONSTANTS}
    for name, entry in files.items():
        check_file(directory, name, entry, hashed=name in own or not name.endswith(".safetensors"))
    with Copier(device) as copier:  # the graph is read while the weights are on their way
        program = _read_program(directory, manifest, device, copier)
        if meanwhile is not None:
            meanwhile()
    return program, manifest


def _read_program(directory: Path, manifest: dict[str, Any], device: torch.device, copier: Copier) -> Program:
    checkpoint = Checkpoint.open(directory, manifest["files"])
    base = load_parameters(checkpoint, manifest["recipes"], manifest["base"], device, copier=copier)
    own = {CONSTANTS: manifest["constants"], POLICY: manifest["policy_weights"]}
    tensors: dict[str, Tensor] = dict(base)
    for file, names in own.items():
        if not names and file not in manifest["files"]:
            continue
        found = load_tensors(directory / file)
        if found.keys() != set(names):
            raise ArtifactError(
                f"{directory / file} has {len(found)} tensors where the manifest lists {len(names)}; convert it again"
            )
        tensors.update({name: found[name].to(device) for name in names})
    if lacking := [
        name for name in manifest["parameters"] if name not in base and name not in manifest["policy_weights"]
    ]:
        raise ArtifactError(f"{directory / MANIFEST}: there are no weights {some(lacking)}; convert the model again")
    # Names that share a tensor share the parameter.
    wrapped = {id(t): nn.Parameter(t, requires_grad=False) for t in map(tensors.__getitem__, manifest["parameters"])}
    parameters = {name: wrapped[id(tensors[name])] for name in manifest["parameters"]}
    graph = read_graph(directory / GRAPH, {**tensors, **parameters}, device)
    # Tables that the runtime reads and no node does (rotary tables, frequencies by length).
    for name in set(manifest["constants"]) - {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}:
        attach(graph, name, tensors[name])
    program = Program(
        graph=graph,
        sites=[AttentionSite.from_dict(site) for site in manifest["sites"]],
        layout=manifest["layout"],
        policy=manifest["policy"],
        dtype=manifest["dtype"],
        vocab_size=manifest["vocab_size"],
        max_positions=manifest["max_positions"],
        frontend=manifest["frontend"],
        base=manifest["base"],
        policy_weights=manifest["policy_weights"],
        constants=manifest["constants"],
        aliases=manifest["aliases"],
    )
    check_program(program, device, str(directory))
    return program


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; ArtifactError when it can't be read."""
    read_header(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} can't be read: {error}") from error


def verify_hashes(directory: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Hashes every file of a model directory; ArtifactError lists all that are missing, cut off or changed.

    progress: called with (file, bytes done, bytes of all files). Returns the manifest.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    total = sum(entry["size"] for entry in manifest["files"].values())
    done, problems = 0, []
    for name, entry in manifest["files"].items():
        try:
            check_file(directory, name, entry, hashed=False)
            start = done
            report = None if progress is None else lambda n, f=name, s=start: progress(f, s + n, total)
            if sha256_of(directory / name, report) != entry["sha256"]:
                problems.append(f"{directory / name} is damaged or was edited (its sha256 differs from the manifest's)")
        except ArtifactError as error:
            problems.append(str(error))
        done += entry["size"]
    if problems:
        raise ArtifactError("\n".join(problems))
    return manifest
