"""Turns tokens into text as they come, up to a stop string, in time linear in the text for any stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HELD_TOKENS = 8  # more than a character has; longer runs without text are checked ever more rarely


class StopFinder:
    """Finds the first stop string in a text that comes in pieces (Knuth, Morris and Pratt's automaton for each string).

    held: characters at the end of the text that may begin a stop string.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [s for s in stops if s]
        self._tables = [_borders(s) for s in self._stops]
        self._matched = [0] * len(self._stops)  # the longest prefix of each that the text ends with

    @property
    def held(self) -> int:
        return max(self._matched, default=0)

    def feed(self, text: str) -> tuple[int, int] | None:
        """Takes text. If a stop string ends in it, returns the index (in `text`) after it and its length: the first
        that ends, and the longest of several that end there."""
        if not self._stops:
            return None
        for at, char in enumerate(text):
            longest = 0
            for i, (stop, table) in enumerate(zip(self._stops, self._tables)):
                n = self._matched[i]
                while n and stop[n] != char:
                    n = table[n]
                n += stop[n] == char
                if n == len(stop):
                    longest = max(longest, n)
                    n = table[n]
                self._matched[i] = n
            if longest:
                return at + 1, longest
        return None


def _borders(text: str) -> list[int]:
    """Returns for every n the length of the longest proper prefix of text[:n] that is also its suffix."""
    table = [0] * (len(text) + 1)
    n = 0
    for i in range(1, len(text)):
        while n and text[i] != text[n]:
            n = table[n]
        n += text[i] == text[n]
        table[i + 1] = n
    return table


class TextStream:
    """Turns tokens into text as they come; returns only the part that later tokens and stop strings can't change.

    stopped: whether one of `stops` was found; it and all text after it are left out.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self._tokenizer, self._finder = tokenizer, StopFinder(stops)
        self._ids: list[int] = []
        self._begin = self._read = 0  # tokens before `begin` do not influence the text after `read`
        self._held = ""
        self.stopped = False

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is final now."""
        if self.stopped:
            return ""
        self._ids.append(token)
        unread = len(self._ids) - self._read
        if unread > HELD_TOKENS and unread & (unread - 1):
            return ""  # a long run without text is only decoded at powers of two, so its time stays linear
        before = self._decode(self._ids[self._begin : self._read])
        now = self._decode(self._ids[self._begin :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""  # the middle of a character, or a special token
        self._begin, self._read = self._read, len(self._ids)
        return self._release(now[len(before) :])

    def _release(self, text: str) -> str:
        whole = self._held + text
        found = self._finder.feed(text)
        if found is not None:
            end, length = found
            self.stopped = True
            released, self._held = whole[: len(self._held) + end - length], ""
            return released
        cut = len(whole) - self._finder.held
        self._held = whole[cut:]
        return whole[:cut]

    def end(self) -> str:
        """Returns the text that was held back."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._begin : self._read])
        released = self._release(self._decode(self._ids[self._begin :])[len(before) :])
        return released + self._held
