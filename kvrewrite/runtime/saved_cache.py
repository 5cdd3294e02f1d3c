"""Caches as files: a document that was compressed once, to be asked many times, also on another machine.

One safetensors file: the tensors of `kvrewrite/cache/snapshot.py`, and in its metadata under `kvrewrite_cache` a JSON text
that says what they belong to (`Head`). Nothing of a file is trusted: the JSON fits a typed schema, the cache belongs to
this model, policy and weights, the tensors are whole, and `restore` checks each number that memory is indexed with. It is
read by memory map, straight into pages.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct
from safetensors import SafetensorError, safe_open

from kvrewrite import __version__
from kvrewrite.artifact.checkpoint import read_header
from kvrewrite.artifact.files import replace_tensors
from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.cache.pages import PageStore
from kvrewrite.cache.request import exclusive
from kvrewrite.cache.snapshot import Numbers, restore, take
from kvrewrite.errors import ArtifactError, CacheError
from kvrewrite.ir import schema
from kvrewrite.runtime.call import check_cache
from kvrewrite.runtime.identity import digest, program_hash, weights_hash

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel

FORMAT_VERSION = 1
KEY = "kvrewrite_cache"
MAX_HEAD = 64 << 20  # bytes of the JSON text


class Version(Struct):
    """What every version of the file has."""

    format_version: int
    kvrewrite: schema.Text


class Head(Struct, forbid_unknown_fields=True):
    """What a cache belongs to. model: in words, for people; program, weights: hashes of the rewritten graph and of all
    tensors that it reads; ids: of the text that went in; content: of all tensors of the file; numbers: what it counts."""

    format_version: int
    kvrewrite: schema.Text
    model: schema.Text
    policy: schema.Policy
    program: schema.Digest
    weights: schema.Digest
    ids: schema.Digest
    content: schema.Digest
    numbers: Numbers


def describe(model: RewrittenModel) -> str:
    """A model in words: its family and its size."""
    program = model.program
    family = getattr(model.config, "model_type", None) or type(model.config).__name__
    return f"{family} with {len(program.sites)} attention layers, {program.vocab_size} ids, {program.dtype}"


@exclusive
def save_cache(model: RewrittenModel, cache: EvictionCache, path: str | Path, *, force: bool = False) -> None:
    """See `EvictionCache.save`, which this implements."""
    out = Path(path)
    if type(cache) is not EvictionCache:
        raise CacheError(
            f"a {type(cache).__name__} of the torch.compile backend or of a batch can't be saved; make one with prefill() or "
            "new_cache() of a model that kvrewrite.transform or load returned"
        )
    if model.program.parallel is not None:
        raise CacheError("a cache of one process's part of a model can't be saved; save one of the whole model")
    check_cache(model, cache, None)
    if not cache.columns:
        raise CacheError("nothing has gone through this cache, so there is nothing to save; prefill a text first")
    if out.is_dir() or (out.exists() and not force):
        what = "is a directory" if out.is_dir() else "exists"
        raise ArtifactError(f"{out} {what}; choose another name, or replace a file with force=True (--force)")
    numbers, tensors = take(cache)
    head = Head(
        format_version=FORMAT_VERSION,
        kvrewrite=__version__,
        model=describe(model),
        policy=schema.Policy(**model.program.policy),
        program=program_hash(model),
        weights=weights_hash(model),
        ids=digest({name: tensors[name] for name in ("ids", "real")}),
        content=digest(tensors),
        numbers=numbers,
    )
    try:
        replace_tensors(out, tensors, {KEY: msgspec.json.encode(head).decode(), "format": "pt"})
    except OSError as error:
        reason = "no space is left" if error.errno == errno.ENOSPC else str(error)
        raise ArtifactError(f"{out} could not be written, and nothing was changed: {reason}") from error


def read_head(path: Path) -> Head:
    """What a file says of itself. Raises ArtifactError."""
    if path.is_dir():
        raise ArtifactError(f"{path} is a directory; expected a file that cache.save() wrote")
    _, metadata = read_header(path)
    text = metadata.get(KEY)
    if text is None:
        raise ArtifactError(f"{path} is no saved cache: its metadata has no {KEY}; cache.save() writes such files")
    data = text.encode(errors="surrogatepass")
    if len(data) > MAX_HEAD:
        raise ArtifactError(f"{path}: its {KEY} has {len(data)} bytes; expected at most {MAX_HEAD}")
    version = schema.decode(data, Version, path)
    if version.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format {version.format_version}, written by kvrewrite {version.kvrewrite:.20}; this is kvrewrite "
            f"{__version__}, which reads format {FORMAT_VERSION}. Prefill the document again"
        )
    return schema.decode(data, Head, path)


def check_model(model: RewrittenModel, head: Head, path: Path) -> None:
    """Raises CacheError where a file's cache belongs to another model, policy or weights."""
    mine, theirs = model.program.policy, head.policy
    advice = "load the model that made it, or prefill the document again with this one"
    if (theirs.name, theirs.options) != (mine["name"], mine["options"]):
        raise CacheError(
            f"{path} was made with {_differing(theirs.name, theirs.options, mine['options'])}, and this model has "
            f"{_differing(mine['name'], mine['options'], theirs.options)}; {advice}"
        )
    if head.model != describe(model):
        raise CacheError(f"{path} belongs to a {head.model:.200}, and this is a {describe(model)}; {advice}")
    if (here := program_hash(model)) != head.program:
        raise CacheError(
            f"{path} belongs to another rewrite of a {head.model:.200}: its program is {head.program[:12]}, written by "
            f"kvrewrite {head.kvrewrite:.20}, and this model's is {here[:12]}, of kvrewrite {__version__}. Another version "
            f"of torch or transformers may capture a model otherwise, a saved model directory stays as it is; {advice}"
        )
    if (here := weights_hash(model)) != head.weights:
        raise CacheError(
            f"{path} belongs to other weights of a {head.model:.200}: theirs have the hash {head.weights[:12]}, this "
            f"model's {here[:12]}; {advice}"
        )


def _differing(name: str, options: dict[str, Any], others: dict[str, Any]) -> str:
    """A policy, with the options that another does not have so."""
    said = [f"{k}={v!r:.80}" for k, v in sorted(options.items()) if k not in others or others[k] != v]
    return f"{name:.80}({', '.join(said)})" if said else f"{name:.80}"


@exclusive
def load_cache(model: RewrittenModel, path: str | Path, *, stores: list[PageStore] | None = None) -> EvictionCache:
    """Reads a cache that `cache.save(path)` wrote, for the same model, policy and weights; it goes on with the bits that
    the saved one would have gone on with. stores: the pools that it leases from, of a batch; default: as a new cache.

    Raises CacheError where it belongs to another model, policy or weights, and ArtifactError for a file that is damaged,
    or was made by somebody to do harm.
    """
    path = Path(path)
    if model.program.parallel is not None:
        raise CacheError(
            "a saved cache is of a whole model, and this is one process's part of one; load it in one process"
        )
    head = read_head(path)
    check_model(model, head, path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} can't be read: {error}") from error
    for name, expected in (("content", head.content), ("ids", head.ids)):
        found = digest({k: v for k, v in tensors.items() if name == "content" or k in ("ids", "real")})
        if found != expected:
            raise ArtifactError(f"{path} is damaged: its {name} are not those that were written; copy it again")
    return restore(model, head.numbers, tensors, str(path), stores)
