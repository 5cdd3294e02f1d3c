"""Events on their way from the engine's thread to the event loop: one wake-up for all that a step has to say."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from kvrewrite.serving.jobs import Event
from kvrewrite.serving.requests import RequestError


class Post:
    """Carries events to mailboxes of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._events: deque[tuple[Mailbox, Event]] = deque()
        self._woken = False

    def send(self, mailbox: Mailbox, event: Event) -> None:
        """Any thread may send."""
        self._events.append((mailbox, event))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # first, so that whoever sends from now on wakes the loop again
        while self._events:
            mailbox, event = self._events.popleft()
            mailbox.arrive(event)


class Mailbox:
    """Events of one request. most: tokens that may lie there unread, None: any number; what comes then is an error, and
    `overflows` is called."""

    overflows: Callable[[], None] | None = None

    def __init__(self, post: Post, most: int | None):
        self._post, self._most = post, most
        self._events: list[Event] = []
        self._there = asyncio.Event()
        self._unread, self._full = 0, False

    def put(self, event: Event) -> None:
        """Any thread may put."""
        self._post.send(self, event)

    def arrive(self, event: Event) -> None:
        """In the event loop."""
        if self._full:
            return
        self._unread += event.count
        if self._most is not None and self._unread > self._most:
            self._full = True
            error = RequestError(f"{self._unread} tokens of the answer were not read, so it has ended", code="unread")
            event = Event(error=error, last=True)
            if self.overflows is not None:
                self.overflows()
        self._events.append(event)
        self._there.set()

    async def get(self) -> list[Event]:
        """All that is there, at least one."""
        await self._there.wait()
        self._there.clear()
        found, self._events, self._unread = self._events, [], 0
        return found
