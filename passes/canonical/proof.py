"""What is asked of a rewrite, and what was proved about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvrewrite.errors import OptionError

CHECKS = ("full", "sites", "off")


@dataclass
class Proof:
    """What was proved about a rewrite, for the report and the model card."""

    check: str
    sites: int = 0  # attention sites that were compared with what they replaced
    distinct: int = 0  # how many of these are different
    lengths: list[int] = field(default_factory=list)  # lengths of the texts that sites were run on
    rest: list[int] = field(default_factory=list)  # lengths of the texts that the rest was run on
    masks: int = 0  # distance up to which masks were compared; 0: there is none but the causal one
    whole: list[int] = field(default_factory=list)  # pieces that the whole was run in; 0 stands for padding

    def as_dict(self) -> dict[str, Any]:
        """Returns the proof as plain data."""
        return dict(self.__dict__)


def require_check(check: str) -> None:
    """Raises OptionError if `check` is not in `CHECKS`."""
    if check not in CHECKS:
        raise OptionError(f"check is {check!r}, expected one of {', '.join(map(repr, CHECKS))}")
