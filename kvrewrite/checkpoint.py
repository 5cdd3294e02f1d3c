"""Hugging Face checkpoint directories: what is in them, how each parameter is built from it, and reading it.

Three steps that need less and less. `build_on_meta` and `parameter_sources` run once, at conversion, with transformers'
modeling code; they leave recipes, which are plain JSON data. `load_parameters` follows recipes with safetensors alone,
so a saved model loads without the code of the original.

A recipe is {"key": name in the checkpoint}, or one of these around other recipes: {"stack": [...], "dim": d},
{"cat": [...], "dim": d}, {"transpose": r, "dims": [a, b]}, {"reshape": r, "shape": [...]}, {"narrow": r, "dim": d,
"start": s, "length": n}. The outermost object also says "shape" and "dtype", what the model has.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kvrewrite.errors import ArtifactError
from kvrewrite.graph import get_attr, set_attr

if TYPE_CHECKING:
    from kvrewrite.capture import Captured

Recipe = dict[str, Any]

# How safetensors spells the dtypes that a checkpoint may have.
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # safetensors' own limit
_MAX_DEPTH = 8  # of a recipe; Mixtral's experts need 2
_LFS = b"version https://git-lfs.github.com/spec"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor of a checkpoint is, and what it is."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


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
    return _parse_header(path, header, size - 8 - length)


def _parse_header(path: Path, header: Any, data: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
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
        tensors[name] = TensorInfo(path.name, tuple(shape), dtype)
    if end != data:
        raise ArtifactError(f"{path} has {data} bytes of data where its header speaks of {end}. Copy it again")
    return tensors, metadata


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


# ------------------------------------------------------------------------------------------------------------- reading
@dataclass
class Checkpoint:
    """A directory with safetensors files, of which the headers were read and checked.

    files: names of the weight files and of the index, if there is one, in the order to copy them in.
    """

    directory: Path
    tensors: dict[str, TensorInfo]
    files: list[str]
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Reads the headers of a Hugging Face checkpoint directory. ArtifactError says what is wrong with it."""
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
        names, index = _weight_files(directory)
        tensors: dict[str, TensorInfo] = {}
        for name in names:
            found, _ = read_header(directory / name)
            if index is None:
                tensors.update(found)
                continue
            listed = {key for key, file in index.items() if file == name}
            if lacking := sorted(listed - found.keys()):
                raise ArtifactError(
                    f"the index of {directory} says that {name} has {_some(lacking)}, but it has not; the index and "
                    "the shards are of different versions, copy them all again"
                )
            tensors.update({key: found[key] for key in sorted(listed)})
        files = names if index is None else [*names, "model.safetensors.index.json"]
        return cls(directory, tensors, files, config)

    @contextlib.contextmanager
    def reader(self) -> Iterator[_Reader]:
        """Opens the files for reading tensors one at a time."""
        reader = _Reader(self)
        try:
            yield reader
        finally:
            reader.close()


def _weight_files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the safetensors files of a directory, and the index (tensor -> file) when they are shards."""
    single, index_path = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single.name], None
    if not index_path.is_file():
        pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
        if pickles:
            raise ArtifactError(
                f"{directory} has its weights as pickles only ({_some(pickles)}), which kvrewrite does not read, as "
                "they can run code. Convert them once: AutoModelForCausalLM.from_pretrained(directory)"
                ".save_pretrained(new_directory, safe_serialization=True)"
            )
        others = sorted(p.name for p in directory.glob("*.safetensors"))
        hint = f"; found {_some(others)}, but no model.safetensors.index.json that lists them" if others else ""
        raise ArtifactError(f"{directory} has no weights: expected model.safetensors or shards with an index{hint}")
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ArtifactError(f"{index_path} has no weight_map of tensor names to files; it is damaged, copy it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        # The names come from a file; they must stay in its directory.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ArtifactError(f"{index_path} names the file {name!r}; expected *.safetensors in the same directory")
        if not (directory / name).is_file():
            raise ArtifactError(
                f"{directory} lacks the shard {name}, one of {len(names)} in its index; the download is incomplete"
            )
    return names, weight_map


def _some(names: Iterable[Any], limit: int = 8) -> str:
    """Names for an error message: all of them when they are few."""
    names = [str(n) for n in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class _Reader:
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
                raise ArtifactError(f"{bad}: tensors of different shapes can't be stacked: {_some(set(shapes))}")
            return (*shapes[0][:dim], len(parts), *shapes[0][dim:])
        if len({(*s[:dim], *s[dim + 1 :]) for s in shapes}) > 1 or len({len(s) for s in shapes}) > 1:
            raise ArtifactError(f"{bad}: tensors of shapes {_some(set(shapes))} can't be put together along {dim}")
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


def _follow(name: str, recipe: Recipe, reader: _Reader, out: Tensor) -> None:
    """Writes what a recipe gives into `out`, a view of the result: only one checkpoint tensor is held beside it."""
    tensors = reader.checkpoint.tensors
    if "key" in recipe:
        out.copy_(reader(recipe["key"]))
    elif "stack" in recipe:
        for i, part in enumerate(recipe["stack"]):
            _follow(name, part, reader, out.select(recipe["dim"], i))
    elif "cat" in recipe:
        start = 0
        for part in recipe["cat"]:
            length = _recipe_shape(name, part, tensors, 0)[recipe["dim"]]
            _follow(name, part, reader, out.narrow(recipe["dim"], start, length))
            start += length
    elif "transpose" in recipe:
        _follow(name, recipe["transpose"], reader, out.transpose(*recipe["dims"]))
    else:  # a part or another shape of something: that something is made first
        inner = recipe.get("reshape", recipe.get("narrow"))
        whole = torch.empty(_recipe_shape(name, inner, tensors, 0), dtype=out.dtype)
        _follow(name, inner, reader, whole)  # type: ignore[arg-type]
        if "narrow" in recipe:
            whole = whole.narrow(recipe["dim"], recipe["start"], recipe["length"])
        out.copy_(whole.reshape(out.shape))


def load_parameters(
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    names: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Builds parameters from a checkpoint, one checkpoint tensor at a time.

    names: which; default: all that have a recipe. dtype: instead of the recipes' own, for floating parameters. Names
    whose recipes are the same get the same tensor (tied weights).
    """
    device = torch.device(device)
    out: dict[str, Tensor] = {}
    made: dict[tuple[str, torch.dtype], Tensor] = {}
    with checkpoint.reader() as reader:
        for name in recipes if names is None else names:
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
                    made[signature] = reader(recipe["key"]).to(device=device, dtype=wanted)
                else:
                    result = torch.empty(shape, dtype=wanted, device=device)
                    _follow(name, recipe, reader, result)
                    made[signature] = result
            out[name] = made[signature]
    return out


# ---------------------------------------------------------------------------------------------------------- conversion
class _EmptyOnMeta(TorchFunctionMode):
    """Makes `torch.empty`, which is what parameters are made of before they are initialized, allocate nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device, and their buffers with real values."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_on_meta(directory: str | Path, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """The model of a checkpoint directory with its parameters on the meta device and its buffers real; and its config.

    dtype: default: the config's, else that of the checkpoint's first floating tensor. Uses transformers' own classes
    only; models whose code lies in the checkpoint are refused.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, initialization

    checkpoint = Checkpoint.open(directory)
    config = _read_config(checkpoint, CONFIG_MAPPING, AutoConfig)
    if dtype is None:
        dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if dtype is None:
        stored = [t.dtype for t in checkpoint.tensors.values() if t.dtype.is_floating_point and t.dtype.itemsize > 1]
        dtype = stored[0] if stored else torch.float32
    try:
        with _parameters_on_meta(), initialization.no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, ImportError) as error:
        raise ArtifactError(
            f"transformers has no causal language model for {checkpoint.directory} (model_type "
            f"{config.model_type!r}): {str(error).strip().splitlines()[0][:300]}"
        ) from error
    # Tying is a part of the initialization that was skipped.
    model.tie_weights()
    _keep_in_fp32(model, dtype)
    if unknown := [n for n, b in _plain_buffers(model) if b.is_meta]:
        raise ArtifactError(
            f"{type(model).__name__} makes its buffers {_some(unknown)} in a way that kvrewrite can't follow without "
            "loading the model; load it with from_pretrained and give kvrewrite.transform the model"
        )
    return model.eval(), config


def _read_config(checkpoint: Checkpoint, known: Any, auto: Any) -> Any:
    """The transformers config of a checkpoint, without running code from it and without asking the user anything."""
    raw, where = checkpoint.config, checkpoint.directory / "config.json"
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        if raw.get("auto_map"):
            raise ArtifactError(
                f"{where}: model_type {kind!r} is not part of transformers; its code is in the checkpoint (auto_map), which "
                "kvrewrite does not run. Load the model yourself, if you trust it, and give it to kvrewrite.transform"
            )
        raise ArtifactError(
            f"{where}: transformers does not know model_type {kind!r}; upgrade transformers, or load the model yourself and "
            "give it to kvrewrite.transform"
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise ArtifactError(
            f"{where}: the checkpoint is quantized ({method!s:.40}), which kvrewrite can't read; convert it to bfloat16 "
            "first (load it with dequantize=True in its quantization config, then save_pretrained)"
        )
    try:
        return auto.from_pretrained(str(checkpoint.directory), trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError, AttributeError) as error:
        # transformers' checks of a config raise many types; all mean that config.json is wrong.
        raise ArtifactError(f"{where} is not a valid config of {kind!r}: {str(error).strip()[:400]}") from error


def _plain_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that no checkpoint holds."""
    persistent = model.state_dict().keys()
    return [(n, b) for n, b in model.named_buffers() if n not in persistent]


def _keep_in_fp32(model: Any, dtype: torch.dtype) -> None:
    """Gives fp32 to the parameters that transformers loads in fp32 whatever the model's dtype (routers, norms)."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern = re.compile("|".join(f"(?:{glob.replace('*', '.*')})" for glob in plan))
    changed: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and pattern.search(f"{path}.{leaf}") and parameter.is_floating_point():
                wide = nn.Parameter(parameter.detach().to(torch.float32), requires_grad=parameter.requires_grad)
                module._parameters[leaf] = changed.setdefault(id(parameter), wide)


def capture_on_meta(model: nn.Module, **options: Any) -> Captured:
    """`capture` of a model from `build_on_meta`: parameters of the graph are on meta, buffers and literals are real.

    The trace sees fake parameters on the CPU. Tracing on meta would do otherwise than the model does: transformers' code
    asks for the device's type (routers count in integers elsewhere than on the CPU), and literals would lose their values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kvrewrite.capture import capture

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    real: dict[int, nn.Parameter] = {}
    stands_for: dict[int, nn.Parameter] = {}
    undo: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None or not parameter.is_meta:
                    continue
                if id(parameter) not in stands_for:
                    with fake:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                        stand_in = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    stands_for[id(parameter)] = stand_in
                    real[id(stand_in)] = parameter
                undo.append((module, leaf, parameter))
        for module, leaf, parameter in undo:
            module._parameters[leaf] = stands_for[id(parameter)]
        captured = capture(model, **options)
    finally:
        for module, leaf, parameter in undo:
            module._parameters[leaf] = parameter
    originals = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    for node in captured.graph.graph.nodes:
        if node.op == "get_attr" and node.target in originals:
            set_attr(captured.graph, node.target, originals[node.target])
        elif node.op == "get_attr" and id(get_attr(captured.graph, node.target)) in real:
            set_attr(captured.graph, node.target, real[id(get_attr(captured.graph, node.target))])
    return captured


class _Recorded(Tensor):
    """A tensor without values that knows by which recipe it was made.

    transformers converts checkpoints with ordinary tensor ops; running its conversion on these gives the recipes, so
    nothing here has to know how transformers describes the conversion of each architecture.
    """

    recipe: Recipe
    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor, recipe: Recipe) -> _Recorded:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, plain.shape, strides=plain.stride(), dtype=plain.dtype, device="meta"
        )
        made.plain, made.recipe = plain, recipe
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"_Recorded({list(self.shape)}, {self.recipe})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}

        def unwrap(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(unwrap(v) for v in value)
            return value.plain if isinstance(value, _Recorded) else value

        result = func(*unwrap(args), **unwrap_values(kwargs, unwrap))
        recipes = _record(func, args, kwargs, result)
        if isinstance(result, Tensor):
            return cls(result, recipes[0])
        return [cls(r, recipe) for r, recipe in zip(result, recipes, strict=True)]


def unwrap_values(kwargs: Mapping[str, Any], unwrap: Any) -> dict[str, Any]:
    """`kwargs` with `unwrap` applied to its values."""
    return {k: unwrap(v) for k, v in kwargs.items()}


def _record(func: Any, args: Any, kwargs: Any, result: Any) -> list[Recipe]:
    """The recipes of what a tensor op returned."""
    aten = torch.ops.aten
    packet = func.overloadpacket
    first = args[0]
    # A cast is no step: the recipe's dtype is applied on the way, and these ops only move values.
    if packet in (aten.alias, aten.detach, aten.clone, aten._to_copy, aten.contiguous, aten.lift_fresh):
        return [first.recipe]
    if packet in (aten.stack, aten.cat):
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        kind = "stack" if packet is aten.stack else "cat"
        return [{kind: [t.recipe for t in first], "dim": dim % result.dim()}]
    if packet is aten.transpose:
        return [{"transpose": first.recipe, "dims": [d % first.dim() for d in args[1:3]]}]
    if packet is aten.t:
        return [{"transpose": first.recipe, "dims": [0, 1]} if first.dim() == 2 else first.recipe]
    if packet is aten.permute:
        return [_permutation(first.recipe, [d % first.dim() for d in args[1]])]
    if packet in (aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.squeeze, aten.unsqueeze):
        return [{"reshape": first.recipe, "shape": list(result.shape)}]
    if packet in (aten.split, aten.split_with_sizes, aten.chunk):
        dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % first.dim()
        recipes, start = [], 0
        for part in result:
            recipes.append({"narrow": first.recipe, "dim": dim, "start": start, "length": part.shape[dim]})
            start += part.shape[dim]
        return recipes
    if packet is aten.unbind:
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % first.dim()
        return [_selected(first.recipe, dim, i, part) for i, part in enumerate(result)]
    if packet is aten.select:
        return [_selected(first.recipe, args[1] % first.dim(), args[2] % first.shape[args[1]], result)]
    if packet is aten.slice and (len(args) < 5 or args[4] == 1):
        dim = (args[1] if len(args) > 1 else 0) % first.dim()
        start = min(max((args[2] or 0) if len(args) > 2 else 0, -first.shape[dim]), first.shape[dim]) % (
            first.shape[dim] + 1
        )
        return [{"narrow": first.recipe, "dim": dim, "start": start, "length": result.shape[dim]}]
    raise ArtifactError(f"the checkpoint is converted with {func}, which kvrewrite can't turn into a recipe")


def _selected(recipe: Recipe, dim: int, index: int, result: Tensor) -> Recipe:
    return {
        "reshape": {"narrow": recipe, "dim": dim, "start": index, "length": 1},
        "shape": list(result.shape),
    }


def _permutation(recipe: Recipe, order: list[int]) -> Recipe:
    """A permutation of dimensions as swaps of two."""
    now = list(range(len(order)))
    for i, wanted in enumerate(order):
        j = now.index(wanted)
        if i != j:
            recipe = {"transpose": recipe, "dims": [i, j]}
            now[i], now[j] = now[j], now[i]
    return recipe


def parameter_sources(model: nn.Module, config: Any, checkpoint: Checkpoint) -> dict[str, Recipe]:
    """How every parameter and persistent buffer of a model is built from a checkpoint.

    Runs transformers' own conversion of the checkpoint on tensors without values (renamed keys, base-model prefixes,
    merged experts), so `model` may be on meta and nothing is read but headers; only where the checkpoint has two versions
    of a tied parameter both are read, and the model's tie is cut, as transformers does, when they differ. ArtifactError
    lists all parameters that are missing, of another shape, or can't be converted, and tensors that nothing takes.
    """
    values = {
        k: _Recorded(torch.empty(i.shape, dtype=i.dtype, device="meta"), {"key": k})
        for k, i in checkpoint.tensors.items()
    }
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    found, info = _convert(model, values)
    _untie(model, found, checkpoint)
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    recipes: dict[str, Recipe] = {}
    missing, mismatched = [], []
    for name, tensor in state.items():
        source = next((n for n in (name, *groups[id(tensor)]) if n in found), None)
        if source is None:
            missing.append(name)
        elif found[source].shape != tensor.shape:
            mismatched.append(
                f"{name}: {list(found[source].shape)} in the checkpoint, {list(tensor.shape)} in the model"
            )
        else:
            dtype = str(tensor.dtype).removeprefix("torch.")
            recipes[name] = {**found[source].recipe, "shape": list(tensor.shape), "dtype": dtype}
    info.missing_keys, info.unexpected_keys = set(missing), set(info.unexpected_keys)
    model._adjust_missing_and_unexpected_keys(info)  # type: ignore[operator]
    problems = [f"can't convert {name}: {_last_line(text)}" for name, text in sorted(info.conversion_errors.items())]
    problems += [f"missing: {_some(missing, 20)}"] if missing else []
    problems += [f"wrong shape: {line}" for line in mismatched]
    problems += [f"unexpected: {_some(sorted(info.unexpected_keys), 20)}"] if info.unexpected_keys else []
    if problems:
        raise ArtifactError(
            f"the weights in {checkpoint.directory} are not those of {type(model).__name__} with its config.json:\n  "
            + "\n  ".join(problems)
        )
    return recipes


def _last_line(text: str) -> str:
    """The exception in a traceback that transformers turned into text."""
    lines = [line for line in str(text).splitlines() if "Error" in line]
    return (lines[0] if lines else str(text)).strip()[:300]


def _convert(model: Any, values: dict[str, _Recorded]) -> tuple[dict[str, _Recorded], Any]:
    """Runs transformers' conversion without touching the model; returns what it would have set, and its report."""
    from transformers import conversion_mapping, core_model_loading
    from transformers.modeling_utils import LoadStateDictConfig

    found: dict[str, _Recorded] = {}

    def keep(model: Any, target_name: str, param_value: Tensor, *_: Any, **__: Any) -> None:
        if not isinstance(param_value, _Recorded):
            raise ArtifactError(f"{target_name} is made by transformers in a way that kvrewrite can't follow")
        found[target_name] = param_value

    load_config = LoadStateDictConfig(
        device_map={"": "meta"}, weight_mapping=conversion_mapping.get_model_conversion_mapping(model)
    )
    setter, conversions = core_model_loading.set_param_for_module, getattr(model, "_weight_conversions", None)
    level = core_model_loading.logger.level
    core_model_loading.set_param_for_module = keep
    try:
        info, _ = core_model_loading.convert_and_load_state_dict_in_model(model, dict(values), load_config, None)
    finally:
        core_model_loading.set_param_for_module = setter
        core_model_loading.logger.setLevel(level)
        if conversions is None:
            vars(model).pop("_weight_conversions", None)
        else:
            model._weight_conversions = conversions
    return found, info


def _untie(model: nn.Module, found: Mapping[str, _Recorded], checkpoint: Checkpoint) -> None:
    """Cuts the tie of parameters of which the checkpoint has two different versions, as transformers does."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        present = [n for n in names if n in found]
        if len(present) < 2:
            continue
        with checkpoint.reader() as reader:
            first = _materialize(present[0], found[present[0]], reader)
            for name in present[1:]:
                if found[name].recipe == found[present[0]].recipe:
                    continue
                if torch.equal(first, _materialize(name, found[name], reader)):
                    continue
                path, _, leaf = name.rpartition(".")
                module = model.get_submodule(path)
                own = module._parameters[leaf]
                assert own is not None
                module._parameters[leaf] = nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad)


def _materialize(name: str, recorded: _Recorded, reader: _Reader) -> Tensor:
    out = torch.empty(recorded.shape, dtype=recorded.dtype)
    _follow(name, recorded.recipe, reader, out)
    return out
