"""The model directory: a Hugging Face directory with the rewritten program beside the untouched base weights.

    config.json               the original's, plus a `kvrewrite` section
    *.safetensors             base weights, byte for byte those of the original (or hard links to them)
    policy.safetensors        what the policy inserted, if it has weights
    constants.safetensors     tables that the model computes when it is built, so that loading needs no model code
    graph.json                the rewritten program as data (`ir/serialize.py`)
    compiled/*.pt2            the steps as AOTInductor compiled them, on request only (`runtime/aot.py`)
    README.md                 the model card; yours to edit, so nothing checks it
    kvrewrite.json            the manifest: policy, sites, layout, recipes of parameters, size and sha256 of each file

Nothing in it is a pickle, and nothing but compiled/ is code, which is loaded only on trust. It is written to a staging
folder beside its final place and renamed, so that a crash leaves either the old state or the new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvrewrite import __version__
from kvrewrite.artifact.checkpoint import Checkpoint, some
from kvrewrite.artifact.copier import Copier
from kvrewrite.artifact.files import json_text, load_tensors, sha256_of
from kvrewrite.artifact.parts import empty_parameters, load_part
from kvrewrite.artifact.program_check import check_program
from kvrewrite.artifact.publishing import leftovers
from kvrewrite.artifact.recipes import load_parameters
from kvrewrite.errors import ArtifactError
from kvrewrite.ir import schema
from kvrewrite.ir.layout_file import read_layout
from kvrewrite.ir.program import Program
from kvrewrite.ir.serialize import attach, read_graph
from kvrewrite.ir.site import AttentionSite

FORMAT_VERSION = 3
MANIFEST, GRAPH, POLICY, CONSTANTS = "kvrewrite.json", "graph.json", "policy.safetensors", "constants.safetensors"
CONFIG, CARD, WEIGHTS = "config.json", "README.md", "model.safetensors"
OURS = {MANIFEST, GRAPH, POLICY, CONSTANTS, CONFIG, CARD}

Progress = Callable[[str, int, int], None]


def manifest_digest(body: Mapping[str, Any]) -> str:
    """Returns the hash of a manifest without its own hash, whatever its layout on disk."""
    text = json_text(body, MANIFEST, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def is_artifact(directory: str | Path) -> bool:
    """Whether a directory was written by `write_artifact`."""
    return (Path(directory) / MANIFEST).is_file()


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Returns the manifest of a model directory, checked against its own hash and our version."""
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
    if manifest["manifest_sha256"] != manifest_digest(body):
        raise ArtifactError(f"{damaged}: its hash is wrong; copy the directory again, or convert the model again")
    for name in manifest["files"]:
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or any(len(p) > 255 for p in parts):
            raise ArtifactError(
                f"{damaged}: its list of files has {name!r:.80}; copy the directory again, or convert the model again"
            )
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
    directory: str | Path,
    device: torch.device | str = "cpu",
    meanwhile: Callable[[], None] | None = None,
    part: Callable[[Program], Program] | None = None,
) -> tuple[Program, dict[str, Any]]:
    """Loads a model directory: returns the program, with all its tensors on `device` in its graph, and the manifest.

    part: makes of the program, whose base weights are on meta, the part that is wanted; then only what that reads of them
    is read from the files.

    Checks the manifest, the sizes of all files, the hashes of all but the base weights, and the headers of those;
    `verify_hashes` checks the rest. Needs neither the network nor the original model's code. meanwhile: called while
    the weights are being copied to the device.
    """
    directory, device = Path(directory), torch.device(device)
    manifest = read_manifest(directory)
    files = manifest["files"]
    if lacking := sorted({CONFIG, GRAPH, CONSTANTS} - files.keys()):
        raise ArtifactError(f"the manifest of {directory} does not list {', '.join(lacking)}; convert the model again")
    own = {POLICY, CONSTANTS}
    for name, entry in files.items():
        check_file(directory, name, entry, hashed=name in own or not name.endswith(".safetensors"))
    with Copier(device) as copier:  # the graph is read while the weights are being copied
        program = _read_program(directory, manifest, device, copier, part)
        if meanwhile is not None:
            meanwhile()
    return program, manifest


def _read_program(
    directory: Path,
    manifest: dict[str, Any],
    device: torch.device,
    copier: Copier,
    part: Callable[[Program], Program] | None,
) -> Program:
    checkpoint = Checkpoint.open(directory, manifest["files"])
    if part is None:
        base = load_parameters(checkpoint, manifest["recipes"], manifest["base"], device, copier=copier)
    else:
        base = empty_parameters(checkpoint, manifest["recipes"], manifest["base"])
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
        layout=read_layout(manifest["layout"], graph, getattr(torch, manifest["dtype"]), device, str(directory)),
        policy=manifest["policy"],
        dtype=manifest["dtype"],
        vocab_size=manifest["vocab_size"],
        max_positions=manifest["max_positions"],
        frontend=manifest["frontend"],
        base=manifest["base"],
        policy_weights=manifest["policy_weights"],
        constants=manifest["constants"],
        aliases=manifest["aliases"],
        embedded=manifest.get("embedded", ""),
    )
    check_program(program, device, str(directory))
    if part is not None:
        program = part(program)
        load_part(program, checkpoint, manifest["recipes"], device, copier)
    return program


def verify_hashes(directory: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Hashes every file of a model directory; raises ArtifactError that lists all missing, truncated or changed ones.

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
