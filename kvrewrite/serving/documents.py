"""Documents that were compressed before, by name: saved caches whose forks requests go on from (`serve --documents`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.errors import OptionError, PoolFull
from kvrewrite.runtime.batch import Batch
from kvrewrite.serving.requests import Request, RequestError

SUFFIX = ".kvcache"


@dataclass(frozen=True)
class Document:
    """A text that prompts follow. ids: its tokens; cache: what is kept of them; entry: what clients are told of it."""

    ids: list[int]
    cache: EvictionCache
    entry: dict[str, Any]


def load_documents(batch: Batch, folder: str | Path) -> dict[str, Document]:
    """All files of kvrewrite prefill in a folder, in the pools of a batch; each one's name is that of its file without
    `.kvcache`. Raises OptionError where there is none or no memory for them, and what `Batch.load_document` raises."""
    folder = Path(folder)
    paths = sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
    if not paths:
        raise OptionError(
            f"--documents {folder} has no files *{SUFFIX}; kvrewrite prefill DIR --document TEXT --out {folder / 'NAME'}{SUFFIX} "
            "makes one"
        )
    found: dict[str, Document] = {}
    for path in paths:
        try:
            cache = batch.load_document(path)
        except PoolFull as error:
            raise OptionError(
                f"{path}: there is no memory for it beside {len(found)} of {len(paths)} documents; give more (--memory), or "
                f"serve fewer ({error})"
            ) from error
        real = cache.history.real(cache.columns)[0]
        ids = [token for token, counts in zip(cache.ids()[0].tolist(), real) if counts]
        name = path.name.removesuffix(SUFFIX)
        slots = max(int(lens.max()) for lens in cache.live_slots().values())
        entry = {"id": name, "object": "document", "created": int(path.stat().st_mtime)}
        entry |= {"tokens": len(ids), "slots": slots, "bytes": cache.memory().leased}
        found[name] = Document(ids, cache, entry)
    return found


def find_document(request: Request, model: str, documents: Mapping[str, Document]) -> Document | None:
    """The document that a request is about: its field `document`, or what follows "@" in its model's name. model: the name
    of the one that is served. Raises RequestError where it names what is not there."""
    asked, name = request.model, request.document
    if asked is not None and asked != model:
        base, sign, of_model = asked.rpartition("@")
        if not sign or base != model:
            raise no_model(asked, model)
        if name not in (None, of_model):
            raise RequestError(f"model is {asked!r:.80} and document {name!r:.80}; name one document", param="document")
        name = of_model
    if name is None:
        return None
    if name not in documents:
        raise no_document(name, documents)
    if request.budget is not None:
        raise RequestError(
            "budget: a document keeps what it was compressed to, and its answers that budget; leave budget out",
            param="budget",
        )
    return documents[name]


def no_model(asked: str, model: str) -> RequestError:
    """The error for a model that is not served."""
    return RequestError(
        f"this server has the model {model!r}, not {asked!r:.80}", status=404, param="model", code="model_not_found"
    )


def no_document(name: str, documents: Mapping[str, Document]) -> RequestError:
    """The error for a document that is not there."""
    there = ", ".join(sorted(documents)[:20]) + ", ..." * (len(documents) > 20)
    has = f"has the documents {there}" if documents else "has no documents (kvrewrite serve --documents FOLDER)"
    return RequestError(
        f"there is no document {name!r:.80}; this server {has}", status=404, param="document", code="document_not_found"
    )


def listed(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A list as OpenAI's API has it."""
    return {"object": "list", "data": entries}


def as_model(document: Document, model: dict[str, Any]) -> dict[str, Any]:
    """A document as one of the models, for clients that can name nothing else."""
    own = {"id": f"{model['id']}@{document.entry['id']}", "created": document.entry["created"]}
    return {**model, **own, "parent": model["id"]}
