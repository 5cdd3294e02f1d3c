"""Names the node of a graph from a file that failed when it ran."""

from __future__ import annotations

import linecache
import re
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from kvrewrite.errors import ArtifactError, KVRewriteError

_ASSIGNS = re.compile(r"\s*(\w+)(?:\s*:[^=]*)? = ")  # a line of the code that torch.fx generates for a node


def named_failure(error: Exception, source: Any) -> ArtifactError | None:
    """An ArtifactError with the node for what torch raised while a graph from the directory `source` ran.

    None for errors of other graphs (source is no path), and of a GPU that is out of memory.
    """
    node = _node(error.__traceback__)
    if isinstance(error, (KVRewriteError, torch.OutOfMemoryError)) or not isinstance(source, Path) or node is None:
        return None
    lines = str(error).strip().splitlines()
    return ArtifactError(
        f"{source}/graph.json: node {node!r} failed: {type(error).__name__}: {lines[0][:300] if lines else ''}. The file is "
        "damaged or was not written by kvrewrite, or memory ran out; `kvrewrite verify` tells"
    )


def _node(traceback: TracebackType | None) -> str | None:
    """Returns the node whose line of generated code was running."""
    found = None
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if file.startswith("<eval_with_key>"):
            match = _ASSIGNS.match(linecache.getline(file, traceback.tb_lineno, traceback.tb_frame.f_globals))
            found = match[1] if match else "output"
        traceback = traceback.tb_next
    return found
