"""Hugging Face checkpoint directories: what is in them, and building parameters from them by recipe.

Only torch and safetensors are needed here, so a saved model loads without the code of the original. The recipes are
plain JSON data that `conversion.py` made once with transformers' own code.

A recipe is {"key": name in the checkpoint}, or one of these around other recipes: {"stack": [...], "dim": d},
{"cat": [...], "dim": d}, {"transpose": r, "dims": [a, b]}, {"reshape": r, "shape": [...]}, {"narrow": r, "dim": d,
"start": s, "length": n}. The outermost object also says "shape" and "dtype", what the model has.
"""

from __future__ import annotations

import contextlib
import json
import struct
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kvrewrite.errors import ArtifactError

Recipe = dict[str, Any]

# How safetensors spells the dtypes that a checkpoint may have.
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # safetensors' own limit
_READS, _SPARE = 256, 1 << 20  # how often recipes may read everything; numbers that any files may become
_MAX_DEPTH = 8  # of a recipe; Mixtral's experts need 2
INDEX = "model.safetensors.index.json"
_LFS = b"version https://git-lfs.github.com/spec"
COPIERS = 4  # threads that copy tensors to a GPU
STAGED = 16 << 20  # bytes of each of a thread's two buffers for that
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor of a checkpoint is, and what it is. start: its first byte in the file."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int


def read_json(path: Path, *, limit: int = 1 << 30) -> Any:
    """The JSON data in a file; ArtifactError when it is missing, too large, or not JSON."""
    try:
        if path.stat().st_size > limit:
            raise ArtifactError(f"{path} has {path.stat().st_size} bytes; expected at most {limit} of JSON")
        text = path.read_text(encoding="utf-8")
        return json.loads(text)
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}") from error
    except RecursionError:
        raise ArtifactError(f"{path} is nested too deep; it was damaged or not written by kvrewrite") from None
    except ValueError as error:
        if text_is_lfs(path):
            raise ArtifactError(lfs_message(path)) from None
        raise ArtifactError(f"{path} is not JSON: {error}; it is damaged, copy it again") from error


def text_is_lfs(path: Path) -> bool:
    """Whether a file is a git-LFS pointer instead of the file itself."""
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def lfs_message(path: Path) -> str:
    """What to say about a git-LFS pointer."""
    return (
        f"{path} is a git-LFS pointer, not the file itself; run `git lfs pull` in its directory, or download it again"
    )


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, from its header alone.

    Checks that the header is whole and that the file is as long as the header says; ArtifactError otherwise.
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
        raise ArtifactError(f"{path} does not exist") from None
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
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise ArtifactError(f"{damaged} at {name!r}: its shape or place is not a list of sizes. Copy it again")
        dtype = SAFETENSORS_DTYPES.get(str(entry.get("dtype")))
        if dtype is None:
            raise ArtifactError(f"{path}: {name!r} has dtype {entry.get('dtype')!r}, which kvrewrite does not read")
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


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


# ------------------------------------------------------------------------------------------------------------- reading
@dataclass
class Checkpoint:
    """A directory with safetensors files, of which the headers were read and checked.

    files: names of the weight files and of the index, if there is one, in the order to copy them in. stamps: what the file
    system said of each of them when it was read (`stamp`).
    """

    directory: Path
    tensors: dict[str, TensorInfo]
    files: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    stamps: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: str | Path, listed: Collection[str] | None = None) -> Checkpoint:
        """Reads the headers of a Hugging Face checkpoint directory. ArtifactError says what is wrong with it.

        listed: files that may be opened (those of a manifest); weight files besides them are refused. Default: any.
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
        """ArtifactError where a file is not the one whose header was read."""
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
    """Which file a path names and when it was last written to; ArtifactError where there is none."""
    try:
        found = path.stat()
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}") from error
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _refuse_unlisted(directory: Path, listed: Collection[str]) -> None:
    """Weight files that a manifest does not list would be taken for the model's own."""
    found = sorted({p.name for p in (*directory.glob("*.safetensors"), directory / INDEX) if p.exists()} - set(listed))
    if found:
        raise ArtifactError(
            f"{directory} has weight files that its manifest does not list: {some(found)}. Take them away; they are not a "
            "part of this model"
        )


def _weight_files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the safetensors files of a directory, and the index (tensor -> file) when they are shards."""
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
    """Names for an error message: all of them when they are few."""
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

    def __call__(self, key: str) -> Tensor:
        info = self.checkpoint.tensors[key]
        path = self.checkpoint.directory / info.file
        try:
            if info.file not in self.open_files:
                self.open_files[info.file] = self.stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            return self.open_files[info.file].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{key!r} can't be read from {path}: {error}") from error


def recipe_keys(recipe: Recipe) -> list[str]:
    """The checkpoint tensors that a recipe reads."""
    if "key" in recipe:
        return [recipe["key"]]
    inner: Any = next((recipe[k] for k in ("stack", "cat", "transpose", "reshape", "narrow") if k in recipe), [])
    return [key for r in (inner if isinstance(inner, list) else [inner]) for key in recipe_keys(r)]


def check_recipe(name: str, recipe: Any, tensors: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """The shape that a recipe gives, computed from headers; ArtifactError when it can't be followed."""
    shape = _recipe_shape(name, recipe, tensors, 0)
    wanted = recipe.get("shape") if "reshape" not in recipe else None
    if wanted is not None and list(shape) != wanted:
        raise ArtifactError(f"the parameter {name} has shape {wanted} in the model, but its files give {list(shape)}")
    return shape


def _recipe_shape(name: str, recipe: Any, tensors: Mapping[str, TensorInfo], depth: int) -> tuple[int, ...]:
    bad = f"the recipe of the parameter {name} is damaged"
    if not isinstance(recipe, dict) or depth > _MAX_DEPTH:
        raise ArtifactError(f"{bad}: {str(recipe)[:80]!r}")
    if "key" in recipe:
        key = recipe["key"]
        if not isinstance(key, str) or key not in tensors:
            raise ArtifactError(f"the parameter {name} is made from {key!r:.120}, which the weight files don't have")
        return tensors[key].shape
    if "stack" in recipe or "cat" in recipe:
        parts, dim = recipe.get("stack", recipe.get("cat")), recipe.get("dim")
        if not isinstance(parts, list) or not parts:
            raise ArtifactError(f"{bad}: nothing to put together")
        shapes = [_recipe_shape(name, r, tensors, depth + 1) for r in parts]
        rank = len(shapes[0]) + ("stack" in recipe)
        if type(dim) is not int or not 0 <= dim < rank:
            raise ArtifactError(f"{bad}: there is no dimension {dim!r}")
        if "stack" in recipe:
            if len(set(shapes)) > 1:
                raise ArtifactError(f"{bad}: tensors of different shapes can't be stacked: {some(set(shapes))}")
            return (*shapes[0][:dim], len(parts), *shapes[0][dim:])
        if len({(*s[:dim], *s[dim + 1 :]) for s in shapes}) > 1 or len({len(s) for s in shapes}) > 1:
            raise ArtifactError(f"{bad}: tensors of shapes {some(set(shapes))} can't be put together along {dim}")
        return (*shapes[0][:dim], sum(s[dim] for s in shapes), *shapes[0][dim + 1 :])
    if "transpose" in recipe:
        inner, dims = _recipe_shape(name, recipe["transpose"], tensors, depth + 1), recipe.get("dims")
        if (
            not isinstance(dims, list)
            or len(dims) != 2
            or not all(type(d) is int and 0 <= d < len(inner) for d in dims)
        ):
            raise ArtifactError(f"{bad}: can't transpose {dims!r} of {list(inner)}")
        swapped = list(inner)
        swapped[dims[0]], swapped[dims[1]] = inner[dims[1]], inner[dims[0]]
        return tuple(swapped)
    if "reshape" in recipe:
        inner, shape = _recipe_shape(name, recipe["reshape"], tensors, depth + 1), recipe.get("shape")
        if not isinstance(shape, list) or not all(type(s) is int and s >= 0 for s in shape):
            raise ArtifactError(f"{bad}: {shape!r} is not a shape")
        if torch.Size(shape).numel() != torch.Size(inner).numel():
            raise ArtifactError(f"{bad}: can't reshape {list(inner)} to {shape}")
        return tuple(shape)
    if "narrow" in recipe:
        inner = _recipe_shape(name, recipe["narrow"], tensors, depth + 1)
        place = [recipe.get("dim"), recipe.get("start"), recipe.get("length")]
        if not _are_sizes(place) or place[0] >= len(inner) or place[1] + place[2] > inner[place[0]]:
            raise ArtifactError(f"{bad}: there is no dimension, start, length {place!r} in {list(inner)}")
        return (*inner[: place[0]], place[2], *inner[place[0] + 1 :])
    raise ArtifactError(f"{bad}: it has none of key, stack, cat, transpose, reshape, narrow")


def check_cost(recipes: Mapping[str, Recipe], tensors: Mapping[str, TensorInfo]) -> None:
    """ArtifactError where recipes make much more than the files hold, or read it over and over: a few lines can ask for that."""
    held = sum(torch.Size(info.shape).numel() for info in tensors.values())
    made, read = 0, 0
    for name, recipe in {json.dumps(r, sort_keys=True): (n, r) for n, r in recipes.items()}.values():
        made += torch.Size(check_recipe(name, recipe, tensors)).numel()
        read += sum(torch.Size(tensors[key].shape).numel() for key in recipe_keys(recipe))
        largest = max(_sizes(name, recipe, tensors))
        if max(made, largest) > 2 * held + _SPARE or read > _READS * held + _SPARE:
            raise ArtifactError(
                f"the recipes up to that of the parameter {name} make {made} numbers, {largest} of them at once, from the {held} "
                f"that the files hold, and read {read}; the manifest is damaged"
            )


def _sizes(name: str, recipe: Recipe, tensors: Mapping[str, TensorInfo]) -> Iterator[int]:
    """How many numbers a recipe and each one in it give."""
    yield torch.Size(_recipe_shape(name, recipe, tensors, 0)).numel()
    inner: Any = next((recipe[k] for k in ("stack", "cat", "transpose", "reshape", "narrow") if k in recipe), [])
    for part in inner if isinstance(inner, list) else [inner]:
        yield from _sizes(name, part, tensors)


def follow(name: str, recipe: Recipe, reader: Reader, out: Tensor) -> None:
    """Writes what a recipe gives into `out`, a view of the result: only one checkpoint tensor is held beside it."""
    tensors = reader.checkpoint.tensors
    if "key" in recipe:
        out.copy_(reader(recipe["key"]))
    elif "stack" in recipe:
        for i, part in enumerate(recipe["stack"]):
            follow(name, part, reader, out.select(recipe["dim"], i))
    elif "cat" in recipe:
        start = 0
        for part in recipe["cat"]:
            length = _recipe_shape(name, part, tensors, 0)[recipe["dim"]]
            follow(name, part, reader, out.narrow(recipe["dim"], start, length))
            start += length
    elif "transpose" in recipe:
        follow(name, recipe["transpose"], reader, out.transpose(*recipe["dims"]))
    else:  # a part or another shape of something: that something is made first
        inner = recipe.get("reshape", recipe.get("narrow"))
        whole = torch.empty(_recipe_shape(name, inner, tensors, 0), dtype=out.dtype)
        follow(name, inner, reader, whole)  # type: ignore[arg-type]
        if "narrow" in recipe:
            whole = whole.narrow(recipe["dim"], recipe["start"], recipe["length"])
        out.copy_(whole.reshape(out.shape))


def load_parameters(
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    names: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    copier: Copier | None = None,
) -> dict[str, Tensor]:
    """Builds parameters from a checkpoint, one checkpoint tensor at a time.

    names: which; default: all that have a recipe. dtype: instead of the recipes' own, for floating parameters. copier: of
    the caller, for `device`; on a GPU, tensors may be filled only when it is left. Names whose recipes are the same get the
    same tensor (tied weights).
    """
    device = torch.device(device)
    names = list(recipes if names is None else names)
    check_cost({name: recipes[name] for name in names if name in recipes}, checkpoint.tensors)
    out: dict[str, Tensor] = {}
    made: dict[tuple[str, torch.dtype], Tensor] = {}
    with checkpoint.reader() as reader, contextlib.ExitStack() as stack:
        copy = copier or stack.enter_context(Copier(device))
        for name in names:
            if name not in recipes:
                raise ArtifactError(f"there is no recipe for the parameter {name}; the directory is incomplete")
            recipe = recipes[name]
            shape = check_recipe(name, recipe, checkpoint.tensors)
            own = getattr(torch, str(recipe.get("dtype")), None) or checkpoint.tensors[recipe_keys(recipe)[0]].dtype
            if not isinstance(own, torch.dtype):
                raise ArtifactError(f"the recipe of the parameter {name} has no dtype but {recipe.get('dtype')!r:.40}")
            wanted = dtype if dtype is not None and own.is_floating_point else own
            signature = (json.dumps(recipe, sort_keys=True), wanted)
            if signature not in made:
                if "key" in recipe:
                    made[signature] = copy(reader, recipe["key"], wanted)
                else:
                    result = torch.empty(shape, dtype=wanted, device=device)
                    follow(name, recipe, reader, result)
                    made[signature] = result
            out[name] = made[signature]
    return out


class Copier:
    """Copies tensors of a checkpoint to a device. To a GPU, from several threads that read the file into pinned buffers: one
    alone reads and sends by turns, and mapped files are read page by page.

    What a call returns for a GPU is filled when the context ends, which raises what went wrong.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = ThreadPoolExecutor(COPIERS) if device.type == "cuda" else None
        self._pending: list[Future[None]] = []
        self._threads = threading.local()

    def __enter__(self) -> Copier:
        return self

    def __call__(self, reader: Reader, key: str, dtype: torch.dtype) -> Tensor:
        """The tensor `key` in `dtype`."""
        if self._pool is None:
            return reader(key).to(device=self._device, dtype=dtype)
        info = reader.checkpoint.tensors[key]
        target = torch.empty(info.shape, dtype=dtype, device=self._device)
        stream = torch.cuda.current_stream(self._device)
        if info.dtype == dtype and target.nbytes >= STAGED:
            path = reader.checkpoint.directory / info.file
            self._pending.append(self._pool.submit(self._fill, target, path, info.start, stream))
        else:
            self._pending.append(self._pool.submit(self._fill, target, reader(key), 0, stream))
        return target

    def _fill(self, target: Tensor, source: Tensor | Path, start: int, made_on: torch.cuda.Stream) -> None:
        stream = torch.cuda.Stream(target.device)
        stream.wait_stream(made_on)  # its memory may have been another tensor's, which kernels still read there
        with torch.cuda.stream(stream):
            if isinstance(source, Tensor):
                target.copy_(source.to(target.dtype))  # waits, as the source is not pinned
            else:
                self._stage(target.view(-1).view(torch.uint8), source, start, stream)
        stream.synchronize()

    def _stage(self, target: Tensor, path: Path, start: int, stream: torch.cuda.Stream) -> None:
        """The bytes behind `start` by turns through this thread's two buffers: one is filled while the other is sent."""
        if not hasattr(self._threads, "buffers"):
            self._threads.buffers = [torch.empty(STAGED, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        sent: list[torch.cuda.Event | None] = [None, None]
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                for turn, at in enumerate(range(0, target.numel(), STAGED)):
                    piece, before = target[at : at + STAGED], sent[turn % 2]
                    if before is not None:
                        before.synchronize()
                    buffer = self._threads.buffers[turn % 2][: piece.numel()]
                    left = memoryview(buffer.numpy())
                    while left:
                        count = file.readinto(left)
                        if not count:
                            raise ArtifactError(
                                f"{path} ended {len(left)} bytes early while it was read; copy it again"
                            )
                        left = left[count:]
                    piece.copy_(buffer, non_blocking=True)
                    sent[turn % 2] = stream.record_event()
        except OSError as error:
            raise ArtifactError(f"{path} can't be read: {error.strerror}") from error

    def __exit__(self, *error: object) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=True, cancel_futures=error[0] is not None)
        if error[0] is None:
            for copied in self._pending:
                copied.result()


def put_tensors(gm: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts loaded tensors into a graph module in place of its attributes of these names, where it has them.

    Parameters stay parameters (without gradients), and names that share a tensor share the parameter.
    """
    wrapped: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        try:
            module = gm.get_submodule(path)
        except AttributeError:
            continue
        if leaf in module._parameters:
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            module._parameters[leaf] = wrapped.setdefault(id(tensor), parameter)
        elif leaf in module._buffers:
            module._buffers[leaf] = tensor
