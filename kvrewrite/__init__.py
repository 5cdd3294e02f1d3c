"""kvrewrite: a compiler that puts KV-cache eviction into any decoder LLM.

    small = kvrewrite.transform(model, policy="streaming_llm", budget=1024)
    small.generate(**tokens, max_new_tokens=200)
    small.save_pretrained("out"); small = kvrewrite.load("out")

Importing this package imports neither transformers nor triton; the functions do when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from kvrewrite.api import convert, inspect, load, speculate, transform
    from kvrewrite.cache.eviction_cache import EvictionCache
    from kvrewrite.dynamo.backend import new_cache
    from kvrewrite.runtime.chat import chat
    from kvrewrite.runtime.model import RewrittenModel
    from kvrewrite.runtime.saved_cache import load_cache
    from kvrewrite.verification import verify

_WHERE = {
    "transform": "kvrewrite.api",
    "load": "kvrewrite.api",
    "convert": "kvrewrite.api",
    "inspect": "kvrewrite.api",
    "speculate": "kvrewrite.api",
    "chat": "kvrewrite.runtime.chat",
    "load_cache": "kvrewrite.runtime.saved_cache",
    "verify": "kvrewrite.verification",
    "new_cache": "kvrewrite.dynamo.backend",
    "EvictionCache": "kvrewrite.cache.eviction_cache",
    "RewrittenModel": "kvrewrite.runtime.model",
}

__all__ = [
    "EvictionCache",
    "RewrittenModel",
    "__version__",
    "chat",
    "convert",
    "inspect",
    "load",
    "load_cache",
    "new_cache",
    "speculate",
    "transform",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'kvrewrite' has no attribute {name!r}")
