"""What the server has for requests, and the time and memory that a connection may take before it has asked for anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvrewrite.errors import OptionError

SPARE = 16  # connections besides those that wait for an answer, so that /health can be asked


SHARE = 0.8  # of a GPU's free memory that is for pages, unless somebody says how much


@dataclass(frozen=True)
class Capacity:
    """max_requests: answers that run at once. memory: bytes for their pages, taken at the start; None: as needed.
    prompt_tokens: of prompts between two tokens of the others, at least one segment. prefixes: common beginnings of
    prompts that are kept while there is memory, 0: none."""

    max_requests: int = 64
    memory: int | None = None
    prompt_tokens: int = 2048
    prefixes: int = 64


def free_share(device: torch.device) -> int | None:
    """Bytes of a GPU that pages may have once the model is there; None on other devices."""
    return int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


@dataclass(frozen=True)
class Limits:
    """connections: open at the same time; beyond that, the one that has idled longest is closed.
    head_seconds: from the connection (or the last answer) to a whole request head; body_seconds: from there to the
    whole body. stall_seconds: how long a client may read nothing of its answer. grace_seconds: how long SIGTERM lets
    accepted requests run. bodies: how many bodies of the largest size may be read at the same time. unread: tokens of a
    stream that its client may leave unread, beyond that it ends."""

    connections: int = 256
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    stall_seconds: float = 30.0
    grace_seconds: float = 8.0
    bodies: int = 16
    unread: int = 4096

    def check(self, waiting: int, running: int) -> None:
        """Raises OptionError if so many requests that wait and run leave no connection for /health."""
        if self.connections < waiting + running + SPARE:
            raise OptionError(
                f"{self.connections} connections are too few where {waiting} requests may wait and {running} run: expected "
                f"at least {waiting + running + SPARE} (--max-connections, --waiting, --max-requests)"
            )
