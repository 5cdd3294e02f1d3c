"""Reads Hugging Face checkpoint directories: lists their tensors and reads single ones.

Needs only torch and safetensors, so a saved model loads without the original's code.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvrewrite.errors import ArtifactError

# safetensors' names of the dtypes that a checkpoint may have.
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
_MAX_HEADER = 100_000_000  # safetensors' own limit
INDEX = "model.safetensors.index.json"
_LFS = b"version https://git-lfs.github.com/spec"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint: what it is and in which file. start: its first byte in the file."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int


class Block(NamedTuple):
    """A range of one dimension of a tensor."""

    dim: int
    start: int
    length: int


def read_json(path: Path, *, limit: int = 1 << 30) -> Any:
    """Returns the JSON data in a file; raises ArtifactError if it is missing, too large, or not JSON."""
    try:
        if path.stat().st_size > limit:
            raise ArtifactError(f"{path} has {path.stat().st_size} bytes; expected at most {limit} of JSON")
        text = path.read_text(encoding="utf-8")
        return json.loads(text)
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; copy the directory again") from None
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}") from error
    except RecursionError:
        raise ArtifactError(
            f"{path} is nested too deep; it was damaged or not written by kvrewrite. Copy it again"
        ) from None
    except ValueError as error:
        if text_is_lfs(path):
            raise ArtifactError(lfs_message(path)) from None
        raise ArtifactError(f"{path} is not JSON: {error}; it is damaged, copy it again") from error


def text_is_lfs(path: Path) -> bool:
    """Whether a file is a git-LFS pointer instead of the file itself."""
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def lfs_message(path: Path) -> str:
    """Returns the error message for a git-LFS pointer."""
    return (
        f"{path} is a git-LFS pointer, not the file itself; run `git lfs pull` in its directory, or download it again"
    )


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file from its header alone.

    Raises ArtifactError if the header is not whole or the file's length differs from what the header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(max(8, len(_LFS)))
            if start.startswith(_LFS):
                raise ArtifactError(lfs_message(path))
            if size < 8:
                raise ArtifactError(f"{path} has {size} bytes; a safetensors file has at least 8. Copy it again")
            (length,) = struct.unpack("<Q", start[:8])
            if length > _MAX_HEADER or 8 + length > size:
                raise ArtifactError(
                    f"{path} is not a safetensors file, or it was cut off: it announces a header of {length} bytes in "
                    f"a file of {size}. Copy it again"
                )
            file.seek(8)
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; copy the directory again") from None
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not a safetensors file: its header is not JSON. Copy it again") from error
    return _parse_header(path, header, size - 8 - length, 8 + length)


def _parse_header(path: Path, header: Any, data: int, behind: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    damaged = f"{path} has a damaged header"
    if not isinstance(header, dict):
        raise ArtifactError(f"{damaged}: it is not an object. Copy it again")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{damaged}: its metadata is not a table of strings. Copy it again")
    tensors, end = {}, 0
    for name, entry in header.items():
        if not isinstance(entry, dict):
            raise ArtifactError(f"{damaged} at {name!r}. Copy it again")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not are_sizes(shape) or not are_sizes(offsets) or len(offsets) != 2:
            raise ArtifactError(f"{damaged} at {name!r}: its shape or place is not a list of sizes. Copy it again")
        dtype = SAFETENSORS_DTYPES.get(str(entry.get("dtype")))
        if dtype is None:
            raise ArtifactError(
                f"{path}: {name!r} has dtype {entry.get('dtype')!r}, which kvrewrite does not read; expected one of "
                f"{', '.join(SAFETENSORS_DTYPES)}"
            )
        bytes_needed = dtype.itemsize
        for n in shape:
            bytes_needed *= n
        if offsets[1] - offsets[0] != bytes_needed or offsets[1] > data:
            raise ArtifactError(
                f"{path} was cut off or damaged: {name!r} should be at bytes {offsets[0]} to {offsets[1]} of {data}. "
                "Copy it again"
            )
        end = max(end, offsets[1])
        tensors[name] = TensorInfo(path.name, tuple(shape), dtype, behind + offsets[0])
    if end != data:
        raise ArtifactError(f"{path} has {data} bytes of data where its header speaks of {end}. Copy it again")
    return tensors, metadata


def are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


# ------------------------------------------------------------------------------------------------------------- reading
@dataclass
class Checkpoint:
    """A directory with safetensors files whose headers were read and checked.

    files: names of the weight files and of the index, if any, in copy order. stamps: the `stamp` of each file when it
    was read.
    """

    directory: Path
    tensors: dict[str, TensorInfo]
    files: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    stamps: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: str | Path, listed: Collection[str] | None = None) -> Checkpoint:
        """Reads the headers of a Hugging Face checkpoint directory. Raises ArtifactError that says what is wrong.

        listed: files that may be opened (those of a manifest); any other weight file is refused. Default: any.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ArtifactError(
                f"{directory} is not a directory; expected a directory with config.json and safetensors files"
            )
        if not (directory / "config.json").is_file():
            raise ArtifactError(
                f"{directory} has no config.json; expected a Hugging Face checkpoint directory (config.json next to "
                "*.safetensors). If this is a cache folder, give the snapshot inside it"
            )
        config = read_json(directory / "config.json")
        if not isinstance(config, dict):
            raise ArtifactError(f"{directory / 'config.json'} is not a JSON object; it is damaged, copy it again")
        if listed is not None:
            _refuse_unlisted(directory, listed)
        names, index = _weight_files(directory)
        files = names if index is None else [*names, INDEX]
        stamps = {name: stamp(directory / name) for name in files}
        tensors: dict[str, TensorInfo] = {}
        for name in names:
            found, _ = read_header(directory / name)
            if index is None:
                tensors.update(found)
                continue
            listed = {key for key, file in index.items() if file == name}
            if lacking := sorted(listed - found.keys()):
                raise ArtifactError(
                    f"the index of {directory} says that {name} has {some(lacking)}, but it has not; the index and "
                    "the shards are of different versions, copy them all again"
                )
            tensors.update({key: found[key] for key in sorted(listed)})
        return cls(directory, tensors, files, config, stamps)

    def check_unchanged(self, name: str) -> None:
        """Raises ArtifactError if a file is not the one whose header was read."""
        if name in self.stamps and stamp(self.directory / name) != self.stamps[name]:
            raise ArtifactError(f"{self.directory / name} changed while it was read; nothing was written. Try again")

    @contextlib.contextmanager
    def reader(self) -> Iterator[Reader]:
        """Opens the files for reading tensors one at a time."""
        reader = Reader(self)
        try:
            yield reader
        finally:
            reader.close()


def stamp(path: Path) -> tuple[int, ...]:
    """Identifies a path's file and its last write; raises ArtifactError if there is none."""
    try:
        found = path.stat()
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}") from error
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _refuse_unlisted(directory: Path, listed: Collection[str]) -> None:
    """Refuses weight files that a manifest does not list: they would be taken for the model's own."""
    found = sorted({p.name for p in (*directory.glob("*.safetensors"), directory / INDEX) if p.exists()} - set(listed))
    if found:
        raise ArtifactError(
            f"{directory} has weight files that its manifest does not list: {some(found)}. Take them away; they are not a "
            "part of this model"
        )


def _weight_files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Returns the names of a directory's safetensors files, and the index (tensor -> file) if they are shards."""
    single, index_path = directory / "model.safetensors", directory / INDEX
    if single.is_file():
        return [single.name], None
    if not index_path.is_file():
        pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
        if pickles:
            raise ArtifactError(
                f"{directory} has its weights as pickles only ({some(pickles)}), which kvrewrite does not read, as "
                "they can run code. Convert them once: AutoModelForCausalLM.from_pretrained(directory)"
                ".save_pretrained(new_directory), which writes safetensors"
            )
        others = sorted(p.name for p in directory.glob("*.safetensors"))
        hint = f"; found {some(others)}, but no model.safetensors.index.json that lists them" if others else ""
        raise ArtifactError(f"{directory} has no weights: expected model.safetensors or shards with an index{hint}")
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ArtifactError(f"{index_path} has no weight_map of tensor names to files; it is damaged, copy it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        # The names come from a file; they must stay in its directory.
        if Path(name).name != name or not name.endswith(".safetensors") or len(name) > 255 or "\0" in name:
            raise ArtifactError(
                f"{index_path} names the file {name!r:.120}; expected *.safetensors in the same directory"
            )
        if not (directory / name).is_file():
            raise ArtifactError(
                f"{directory} lacks the shard {name}, one of {len(names)} in its index; the download is incomplete"
            )
    return names, weight_map


def some(names: Iterable[Any], limit: int = 8) -> str:
    """Joins names for an error message; all of them if there are few."""
    names = [str(n) for n in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class Reader:
    """Reads tensors of a checkpoint; keeps its files open."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.stack = contextlib.ExitStack()
        self.open_files: dict[str, Any] = {}

    def close(self) -> None:
        """Closes the files."""
        self.stack.close()
        self.open_files.clear()

    def __call__(self, key: str, block: Block | None = None) -> Tensor:
        """Returns a tensor, or a block of it; nothing else of the file is read."""
        info = self.checkpoint.tensors[key]
        path = self.checkpoint.directory / info.file
        try:
            if info.file not in self.open_files:
                self.open_files[info.file] = self.stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            file = self.open_files[info.file]
            if block is None:
                return file.get_tensor(key)
            rest = (slice(None),) * block.dim
            found: Tensor = file.get_slice(key)[*rest, slice(block.start, block.start + block.length)]
            return found
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{key!r} can't be read from {path}: {error}") from error
