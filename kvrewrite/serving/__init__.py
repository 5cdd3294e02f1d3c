"""An HTTP server with OpenAI's API for one rewritten model: `kvrewrite serve DIR`.

Requests run one after another, in order of arrival, in one thread that owns the model and the tokenizer; others wait in
a bounded queue. So an answer does not depend on other requests, and at most one cache is alive: its pages are returned
when the request ends, also if its client has gone. There is no continuous batching and no prefix reuse. transformers'
own `generate` makes the tokens, so generation_config.json applies.

requests: checks what a client may ask. text: tokens to text, and stop strings. engine: the thread and its queue. http:
the application. server: sockets, their limits, signals.
"""

from __future__ import annotations

try:
    import jinja2  # noqa: F401  chat templates need it
    import pydantic  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(f"serving needs {error.name}: pip install 'kvrewrite[serve]'", name=error.name) from error

from kvrewrite.serving.engine import Engine, Event, Job
from kvrewrite.serving.http import make_app
from kvrewrite.serving.limits import Limits
from kvrewrite.serving.requests import Request, RequestError, read_json, read_request
from kvrewrite.serving.server import Server, make_server, serve
from kvrewrite.serving.text import TextStream

__all__ = [
    "Engine",
    "Event",
    "Job",
    "Limits",
    "Request",
    "RequestError",
    "Server",
    "TextStream",
    "make_app",
    "make_server",
    "read_json",
    "read_request",
    "serve",
]
