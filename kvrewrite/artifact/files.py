"""Writes files of a model directory synced and hashed; reads them with a clear error if they can't be read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvrewrite.artifact.checkpoint import read_header
from kvrewrite.errors import ArtifactError

_CHUNK = 8 << 20
_EXECUTABLE = {".bin", ".pt", ".pth", ".pt2", ".pkl", ".pickle", ".ckpt", ".py", ".so"}


def json_text(data: Any, what: str, **options: Any) -> str:
    """Returns JSON text that decodes to the same data; raises ArtifactError if there is none."""

    def check(value: Any, where: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if not isinstance(key, str):  # json would turn it into a string, and reading would not turn it back
                    raise ArtifactError(
                        f"{what} can't be written: {where} has the key {key!r}, which is not a string; expected texts as keys"
                    )
                check(inner, f"{where}.{key}")
        elif isinstance(value, (list, tuple)):
            for inner in value:
                check(inner, where)

    check(data, "it")
    try:
        return json.dumps(data, ensure_ascii=False, allow_nan=False, **options)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{what} can't be written: it has data that JSON can't hold: {error}") from error


class Writer:
    """Puts files into the staging folder, syncs each to disk, and records their sizes and hashes.

    reserved: names that no copied file may have.
    """

    def __init__(self, folder: Path, reserved: Collection[str]):
        self.folder, self.reserved = folder, reserved
        self.files: dict[str, dict[str, Any]] = {}

    def text(self, name: str, text: str) -> None:
        data = text.encode()
        with (self.folder / name).open("xb") as file:
            file.write(data)
            sync(file.fileno())
        self.files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def json(self, name: str, data: Any, indent: int | None = None) -> None:
        self.text(name, json_text(data, name, indent=indent) + "\n")

    def tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        path = self.folder / name
        save_tensors(path, tensors, metadata)
        self.files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}

    def copy(self, source: Path, name: str, *, link: bool) -> None:
        """Copies byte for byte and hashes on the way; or links."""
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
            sync(write.fileno())
        self.files[name] = {"size": size, "sha256": digest.hexdigest()}

    def add(self, name: str) -> None:
        """Records a file that something else put into the folder."""
        path = self.folder / name
        with path.open("rb") as file:
            sync(file.fileno())
        self.files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}

    def extra(self, path: Path) -> None:
        """Copies a file, or a folder of files."""
        members = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for member in members:
            name = member.relative_to(path.parent).as_posix()
            if name in self.reserved or name in self.files:
                raise ArtifactError(f"{member} can't be put into the model directory: {name} is already taken there")
            if member.suffix in _EXECUTABLE:
                raise ArtifactError(f"{member} can run code or is a pickle; a model directory has neither")
            self.copy(member, name, link=False)
        if not members:
            raise ArtifactError(f"{path} does not exist or is empty; it was to be put into the model directory")

    def seal(self) -> None:
        """Syncs the folders themselves, so that the names are on disk too."""
        for folder in {self.folder, *(p for p in self.folder.rglob("*") if p.is_dir())}:
            sync_folder(folder)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, synced, with the permissions that any new file gets here."""
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        # safetensors refuses tensors that share memory; tied ones were reduced to one name before.
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
        sync(file.fileno())


def replace_tensors(out: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file to a place beside `out`, and renames it to that: it appears whole or not at all. Raises
    OSError."""
    staging = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(staging, tensors, metadata)
        os.replace(staging, out)
        sync_folder(out.parent)
    finally:
        staging.unlink(missing_ok=True)


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Returns the sha256 of a file. progress: called with the bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(done)
    return digest.hexdigest()


def sync(descriptor: int) -> None:
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of a safetensors file; raises ArtifactError if it can't be read."""
    read_header(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} can't be read: {error}") from error
