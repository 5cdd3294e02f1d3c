"""Defines the two JSON files of a model directory as types, `graph.json` and `kvrewrite.json`, and reads them.

Reading checks the kinds, ranges and lengths of everything before anything else sees it, and refuses unknown keys.
Conditions that types can't express (a node is defined before its use, a shape fits) are checked where the data is used.
The size of the files is limited, and so is the memory that reading takes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from kvrewrite.errors import ArtifactError

MAX_FILE = 64 << 20  # bytes; with 61 layers of 256 experts each, the manifest has 6 MB and the graph 10 MB
MAX_NODES = 200_000
MAX_ITEMS = 65_536  # in one argument list
MAX_STRING = 4_096
MAX_DIMS, MAX_SIZE, MAX_VALUES = 16, 1 << 40, 4096
MAX_LAYERS, MAX_WIDTH = 4096, 1 << 20

T = TypeVar("T")
Name = Annotated[str, Meta(pattern=r"\A[A-Za-z_][A-Za-z0-9_]*\Z", max_length=MAX_STRING)]
Path_ = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*\Z", max_length=MAX_STRING)]
Text = Annotated[str, Meta(max_length=MAX_STRING)]
Int64 = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Count = Annotated[int, Meta(ge=0, le=MAX_WIDTH)]
Layer = Annotated[int, Meta(ge=0, lt=MAX_LAYERS)]
Size = Annotated[int, Meta(ge=0, le=MAX_SIZE)]
Dtype = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class _Data(Struct, forbid_unknown_fields=True, gc=False):
    """An object that allows only known keys."""


# --------------------------------------------------------------------------------------------------------------- graphs
class Tagged(_Data, rename={"tuple_": "tuple", "slice_": "slice", "float_": "float"}):  # type: ignore[call-arg]
    """An argument that JSON has no kind for: an object with exactly one of these keys."""

    node: Text | UnsetType = UNSET
    tuple_: Items3 | UnsetType = UNSET
    slice_: Annotated[list[int | Tagged | None], Meta(min_length=3, max_length=3)] | UnsetType = UNSET
    float_: Literal["inf", "-inf", "nan"] | UnsetType = UNSET
    device: Literal["model"] | UnsetType = UNSET
    dtype: Text | UnsetType = UNSET
    layout: Text | UnsetType = UNSET
    memory_format: Text | UnsetType = UNSET

    def item(self) -> tuple[str, Any]:
        """Returns the one key and its value; raises ValueError if there are none or several."""
        found = [(f, value) for f in self.__struct_fields__ if (value := getattr(self, f)) is not UNSET]
        if len(found) != 1:
            raise ValueError(f"expected exactly one of {', '.join(self.__struct_encode_fields__)}, got {len(found)}")
        name, value = found[0]
        return name.rstrip("_"), value


Plain = bool | Int64 | float | Text | Tagged | None
# Real graphs nest lists at most once.
Items1 = Annotated[list[Plain], Meta(max_length=MAX_ITEMS)]
Items2 = Annotated[list[Plain | Items1], Meta(max_length=MAX_ITEMS)]
Items3 = Annotated[list[Plain | Items2], Meta(max_length=MAX_ITEMS)]
Argument = Plain | Items3

SizeFact = Annotated[int, Meta(ge=0, le=MAX_SIZE)] | Annotated[str, Meta(pattern=r"\Ad[0-9]{1,6}\Z")]


class TensorFact(_Data):
    """A graph file's statement about a tensor."""

    dtype: Text
    shape: Annotated[list[SizeFact], Meta(max_length=MAX_DIMS)]


class Node(_Data):
    """One node of a graph."""

    name: Name
    op: Literal["placeholder", "get_attr", "call_function", "output"]
    target: Text
    args: list[Argument] = []
    kwargs: dict[Name, Argument] = {}
    meta: dict[Annotated[str, Meta(pattern=r"\Akvrewrite_")], bool | int | float | Text] = {}
    val: TensorFact | SizeFact | Annotated[list[TensorFact | SizeFact | None], Meta(max_length=MAX_VALUES)] | None = (
        None
    )


class Graph(_Data):
    """A graph file."""

    format: int
    nodes: Annotated[list[Node], Meta(min_length=1, max_length=MAX_NODES)]


# ------------------------------------------------------------------------------------------------------------- manifest
class File(_Data):
    """The manifest's entry for a file."""

    size: Annotated[int, Meta(ge=0, lt=1 << 62)]
    sha256: Digest


class Recipe(_Data):
    """How a parameter is made; see `checkpoint.py`."""

    key: Text | UnsetType = UNSET
    stack: Parts | UnsetType = UNSET
    cat: Parts | UnsetType = UNSET
    transpose: Recipe | UnsetType = UNSET
    reshape: Recipe | UnsetType = UNSET
    narrow: Recipe | UnsetType = UNSET
    dim: Annotated[int, Meta(ge=0, lt=MAX_DIMS)] | UnsetType = UNSET
    dims: Annotated[list[Annotated[int, Meta(ge=0, lt=MAX_DIMS)]], Meta(min_length=2, max_length=2)] | UnsetType = UNSET
    shape: Annotated[list[Size], Meta(max_length=MAX_DIMS)] | UnsetType = UNSET
    start: Size | UnsetType = UNSET
    length: Size | UnsetType = UNSET
    dtype: Text | UnsetType = UNSET


Parts = Annotated[list[Recipe], Meta(min_length=1, max_length=MAX_ITEMS)]


class Site(_Data):
    """An `AttentionSite`."""

    layer: Layer
    module: Text
    heads: Count
    kv_heads: Count
    head_dim: Count
    v_head_dim: Count
    scale: float
    source: Text
    window: Size = 0
    chunk: Size = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    rope: bool = False
    latent: Count = 0
    latent_rotary: Count = 0
    latent_cached: bool = False
    expanded: Annotated[list[Count], Meta(min_length=3, max_length=3)] | None = None
    shares_kv_with: Layer | None = None
    inserted: list[Text] = []
    mask: Literal["causal", "sliding", "chunked"] = "causal"


class CacheClass(_Data):
    """Layers whose caches share one pool of pages."""

    kv_heads: Annotated[int, Meta(ge=1, le=MAX_WIDTH)]
    k_dim: Annotated[int, Meta(ge=1, le=MAX_WIDTH)]
    v_dim: Count
    layers: Annotated[list[Layer], Meta(min_length=1, max_length=MAX_LAYERS)]
    windows: Annotated[list[Size], Meta(min_length=1, max_length=MAX_LAYERS)]


class Rotary(_Data):
    """The graph that makes one rotation's tables."""

    graph: Graph
    constants: list[Path_]
    length_tables: list[Name]


class LengthTable(_Data):
    """Frequencies that depend on the length of a request."""

    input: Name
    index: Annotated[int, Meta(ge=0, lt=MAX_LAYERS)]
    threshold: int | float
    in_graph: bool


class State(_Data):
    """A tensor that a cache carries besides its slots."""

    name: Name
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=1 << 31)]], Meta(max_length=MAX_DIMS)]
    dtype: Dtype
    per_token: bool
    fill: Literal["0", "nan"] = "0"
    slots: bool = False
    carried: bool = False
    every: Annotated[int, Meta(ge=1, le=1 << 31)] = 1
    host: bool = False


class Quantize(_Data):
    """How keys and values are quantized."""

    kind: Text
    group: Annotated[int, Meta(ge=1, le=MAX_WIDTH)]
    residual: Count


class Layout(_Data):
    """What the runtime must know about a program."""

    classes: Annotated[list[CacheClass], Meta(max_length=MAX_LAYERS)]
    contiguous: bool
    rotary: Annotated[list[Rotary], Meta(max_length=MAX_LAYERS)]
    length_tables: Annotated[list[LengthTable], Meta(max_length=MAX_LAYERS)]
    states: Annotated[list[State], Meta(max_length=16 * MAX_LAYERS)]
    row_inputs: list[Name]
    rewrites_slots: bool
    ragged: bool
    quantize: Quantize | None
    inputs: list[Name]


class Policy(_Data):
    """A policy and its options."""

    name: Text
    options: dict[Name, bool | Int64 | float | Text | None]


class StepInput(_Data):
    """An input of a compiled step."""

    name: Name
    shape: Annotated[list[Size], Meta(max_length=MAX_DIMS)]
    dtype: Text
    moving: Annotated[list[Annotated[int, Meta(ge=0, lt=MAX_DIMS)]], Meta(max_length=MAX_DIMS)]


class Compiled(_Data):
    """Steps that were compiled ahead of time."""

    kind: Text
    files: list[Text]
    batch_size: Annotated[int, Meta(ge=1, le=MAX_WIDTH)]
    inputs: dict[Literal["prefill", "decode"], list[StepInput]]
    torch: Text
    kvrewrite: Text
    device: dict[Text, Text | None]


class Manifest(_Data):
    """`kvrewrite.json`."""

    format_version: int
    kvrewrite: Text
    torch: Text
    transformers: Text | None
    policy: Policy
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    vocab_size: Annotated[int, Meta(ge=1, le=1 << 31)]
    max_positions: Annotated[int, Meta(ge=1, le=1 << 40)] | None
    frontend: Text
    sites: Annotated[list[Site], Meta(max_length=MAX_LAYERS)]
    layout: Layout
    base: list[Path_]
    policy_weights: list[Path_]
    constants: list[Path_]
    parameters: list[Path_]
    aliases: dict[Text, list[Text]]
    recipes: dict[Path_, Recipe]
    files: dict[Text, File]
    manifest_sha256: Digest
    embedded: Text = ""
    vision: list[Path_] = []
    compiled: Compiled | UnsetType = UNSET


class Head(Struct):
    """What every version of the manifest has."""

    format_version: Any = None
    kvrewrite: Any = None


# -------------------------------------------------------------------------------------------------------------- reading
def read_bytes(path: Path) -> bytes:
    """Returns a whole file; raises ArtifactError if there is none or it is longer than `MAX_FILE`."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise ArtifactError(f"{path} has {size} bytes; expected at most {MAX_FILE}")
        with path.open("rb") as file:
            return file.read(MAX_FILE)
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}") from error


def decode(data: bytes, kind: type[T], what: Any) -> T:
    """Parses JSON text as `kind`. Raises ArtifactError that says where it does not fit; what: the file's name."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise ArtifactError(f"{what} is damaged or was not written by kvrewrite: {place(error)}") from error


def check(data: Any, kind: type[T], what: Any) -> T:
    """Checks decoded data as `kind`; raises the same errors."""
    try:
        return msgspec.convert(data, type=kind)
    except (msgspec.ValidationError, RecursionError, UnicodeError) as error:
        raise ArtifactError(f"{what} is damaged or was not written by kvrewrite: {place(error, data)}") from error


def place(error: Exception, data: Any = None) -> str:
    """Puts the place before an error of msgspec: "node 3 ('add').args[0]: Expected `int`, got `str`"."""
    text, _, at = str(error).partition(" - at `")
    if not at:
        return text or type(error).__name__
    at = at.rstrip("`").removeprefix("$").removeprefix(".") or "the whole file"

    def named(match: re.Match[str]) -> str:
        nodes = data.get("nodes") if isinstance(data, dict) else None
        node = nodes[int(match[1])] if isinstance(nodes, list) else None
        name = node.get("name") if isinstance(node, dict) else None
        return f"node {match[1]}" + (f" ({name!r:.80})" if isinstance(name, str) else "")

    return f"{re.sub(r'nodes.([0-9]+).', named, at)}: {text}"
