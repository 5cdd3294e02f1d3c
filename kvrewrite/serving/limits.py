"""Limits the server time and memory that a connection may take before it has asked for anything."""

from __future__ import annotations

from dataclasses import dataclass

from kvrewrite.errors import OptionError

SPARE = 16  # connections besides those that wait for an answer, so that /health can be asked


@dataclass(frozen=True)
class Limits:
    """connections: open at the same time; beyond that, the one that has idled longest is closed.
    head_seconds: from the connection (or the last answer) to a whole request head; body_seconds: from there to the
    whole body. stall_seconds: how long a client may read nothing of its answer. grace_seconds: how long SIGTERM lets
    accepted requests run. bodies: how many bodies of the largest size may be read at the same time."""

    connections: int = 256
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    stall_seconds: float = 30.0
    grace_seconds: float = 8.0
    bodies: int = 16

    def check(self, waiting: int) -> None:
        """Raises OptionError if `waiting` requests leave no connection for /health."""
        if self.connections < waiting + SPARE:
            raise OptionError(
                f"{self.connections} connections are too few where {waiting} requests may wait: expected at least "
                f"{waiting + SPARE} (--max-connections, --waiting)"
            )
