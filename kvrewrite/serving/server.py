"""Handles sockets: time limits and number of connections, and signals."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvrewrite.errors import KVRewriteError
from kvrewrite.serving.engine import Engine
from kvrewrite.serving.http import make_app
from kvrewrite.serving.limits import Limits

ANSWER_SECONDS = 2.0  # after the engine has stopped, for its last answers to be sent
BACKLOG = 128  # connections accepted at once, before any of them is counted
SWITCH_SECONDS = 5e-4  # Python's 5 ms would keep the thread that runs the model waiting for a step's time at every op
logger = logging.getLogger("uvicorn.error")


class Connection(H11Protocol):
    """uvicorn's connection, closed if its client stalls: uvicorn itself waits for ever for a request's head, for a body
    and for a client that reads nothing of its answer."""

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.limits = limits
        self._watch: asyncio.TimerHandle | None = None
        self._stage: tuple[str, Any] = ("head", None)
        self._since = self.opened = self.loop.time()
        self._seconds = {
            "head": limits.head_seconds,
            "body": limits.body_seconds,
            "served": math.inf,
            "stalled": limits.stall_seconds,
            "closing": limits.stall_seconds,
        }
        self._period = min(1.0, min(self._seconds.values()) / 4)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Counts the connection; if there are too many, closes the one that has idled longest."""
        super().connection_made(transport)
        self._look()
        others: list[Connection] = [c for c in self.connections if isinstance(c, Connection) and c is not self]
        others = [c for c in others if not c.transport.is_closing()]
        if len(others) < self.limits.connections:
            return
        idle = [c for c in others if c.stage() in ("head", "body")]
        min(idle, key=lambda c: c.opened, default=self).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the timer."""
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def stage(self) -> str:
        """The connection's stage: waiting for a request ("head"), for its body, for its answer ("served"), for the
        client to read it ("stalled"), or for the client to go."""
        if self.transport.is_closing():
            return "closing"
        if self.flow.write_paused:
            return "stalled"
        if self.cycle is None or self.cycle.response_complete:
            return "head"
        return "body" if self.cycle.more_body else "served"

    def _look(self) -> None:
        """Aborts the connection if it has been at one stage of one request for too long."""
        stage, now = (self.stage(), self.cycle), self.loop.time()
        if stage != self._stage:
            self._stage, self._since = stage, now
        # The application answers a late body (408); this is for the rest of bodies that it does not read.
        late = self._since + self._seconds[stage[0]] + (self._period * 4 if stage[0] == "body" else 0)
        if now >= late:
            self.transport.abort()
            return
        self._watch = self.loop.call_later(self._period, self._look)


class Server(uvicorn.Server):
    """uvicorn's server, which ends in bounded time. The first signal ends half-sent requests, gives accepted ones
    grace_seconds, and then answers the rest with an error. A second signal ends at once."""

    def __init__(self, config: uvicorn.Config, engine: Engine, bodies: Any, limits: Limits):
        super().__init__(config)
        self.engine, self.bodies, self.limits = engine, bodies, limits

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        again = self.should_exit
        super().handle_exit(sig, frame)
        self.force_exit = self.force_exit or again

    async def on_tick(self, counter: int) -> bool:
        """Returns whether to end: also if the engine can't serve any more."""
        return await super().on_tick(counter) or not self.engine.alive

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shuts down; see the class."""
        self.engine.drain()
        self.bodies.close()
        ending = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end(self) -> None:
        await self._wait(self.limits.grace_seconds)
        self.engine.stop()
        await self._wait(ANSWER_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def _wait(self, seconds: float) -> None:
        """Waits until all connections are closed, at most `seconds`, and not after a second signal."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self.server_state.connections and loop.time() < end and not self.force_exit:
            await asyncio.sleep(0.05)


def make_server(
    engine: Engine,
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    log_level: str = "info",
    limits: Limits | None = None,
) -> Server:
    """Makes a server for an engine; `run()` serves until a signal comes. name: the model's name."""
    limits = limits or Limits()
    limits.check(engine.max_waiting, engine.max_requests)
    app = make_app(engine, name, limits)
    http: Any = functools.partial(Connection, limits=limits)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level=log_level,
        http=http,
        ws="none",
        backlog=BACKLOG,
        timeout_keep_alive=math.ceil(limits.head_seconds),
        timeout_graceful_shutdown=math.ceil(limits.grace_seconds + 2 * ANSWER_SECONDS),
    )
    return Server(config, engine, app.state.bodies, limits)


def serve(engine: Engine, name: str, **settings: Any) -> None:
    """Serves until it is interrupted; settings: those of `make_server`. Raises KVRewriteError if the engine failed."""
    server = make_server(engine, name, **settings)
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has ended
            server.run()
    finally:
        engine.close()
    if not server.should_exit:
        raise KVRewriteError("the thread that runs the model has ended; what it printed says why")
