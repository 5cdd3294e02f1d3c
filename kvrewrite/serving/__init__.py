"""An HTTP server with OpenAI's API for one rewritten model: `kvrewrite serve DIR`.

Requests run together: one thread owns the model, computes prompts piece by piece and one token of every answer at a
time; others wait in a bounded, fair queue. An answer does not depend on who else is served. generation_config.json
applies as it does to transformers' `generate`.

requests: checks what a client may ask. prompts: text to ids. text: tokens to text, and stop strings. sampling: which
token comes next. scheduler: who is next. prefixes: beginnings that prompts share. engine: the threads. jobs, mail: what
they tell the event loop. http, answers: the application. server: sockets, their limits, signals. metrics: what is counted.
"""

from __future__ import annotations

try:
    import jinja2  # noqa: F401  chat templates need it
    import prometheus_client  # noqa: F401
    import pydantic  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(f"serving needs {error.name}: pip install 'kvrewrite[serve]'", name=error.name) from error

from kvrewrite.serving.engine import Engine
from kvrewrite.serving.http import make_app
from kvrewrite.serving.jobs import Event, Job
from kvrewrite.serving.limits import Capacity, Limits, free_share
from kvrewrite.serving.requests import Request, RequestError, read_json, read_request
from kvrewrite.serving.server import Server, make_server, serve
from kvrewrite.serving.text import TextStream

__all__ = [
    "Capacity",
    "Engine",
    "Event",
    "Job",
    "Limits",
    "Request",
    "RequestError",
    "Server",
    "TextStream",
    "free_share",
    "make_app",
    "make_server",
    "read_json",
    "read_request",
    "serve",
]
