"""What goes through a model together, and what stays after it: the terms in which a policy plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

UNLIMITED = 2**31 - 1  # keep everything


@dataclass(frozen=True)
class RowState:
    """What a plan may depend on, for one row. seen: tokens so far; generated: those since the last prompt; held: most
    live slots of a head; prompt: tokens of the row's first prompt, None until it is complete."""

    seen: int = 0
    generated: int = 0
    held: int = 0
    prompt: int | None = None


NEW_ROW = RowState()


@dataclass(frozen=True)
class Segment:
    """Tokens of one row that go through the model together.

    keep: live slots per head after the segment (UNLIMITED: no eviction), before `layer_budgets`; recent: how many of
    the newest slots of each head are protected in that eviction; values: the row's values of the policy's graph
    inputs (`Policy.inputs`); prompt: whether it belongs to a prompt. again: what a repetition reads in the place of new
    tokens: ids, and ranges of places in the prompt. Its tokens see the cache and themselves, and none of them enters it.
    """

    length: int
    keep: int
    recent: int = 0
    values: Mapping[str, int] = field(default_factory=dict)
    prompt: bool = True
    again: tuple[tuple[int, ...] | range, ...] = ()

    @property
    def joins(self) -> int:
        """How many of its tokens enter the cache."""
        return 0 if self.again else self.length
