"""The interface of an eviction policy.

A policy is a frozen dataclass: its fields are its options. It says what a slot is worth (`score`, as graph nodes at one
attention site), how a prompt is cut into segments (`plan`), and which slots are protected. Everything else (finding
attention, caches, positions, padding, batching, kernels) is the compiler's and the runtime's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvrewrite.errors import OptionError

if TYPE_CHECKING:
    from torch import fx

    from kvrewrite.passes.insert_policy import SiteHook
    from kvrewrite.site import AttentionSite

UNLIMITED = 2**31 - 1  # keep everything


@dataclass(frozen=True)
class Segment:
    """Tokens of one row that go through the model together.

    keep: live slots per head after the segment (UNLIMITED: no eviction); recent: how many of the newest slots of each
    head are protected in that eviction.
    """

    length: int
    keep: int
    recent: int = 0


@dataclass
class Scores:
    """What a policy's graph nodes compute at one site.

    new: (B, Hkv, T), the scores of the new tokens. slots: (B, Hkv, C), which replaces the scores of cached slots, or None
    where they stay as they were. keep: (B, Hkv) int32, a budget per head that replaces the row's, or None.
    """

    new: fx.Node
    slots: fx.Node | None = None
    keep: fx.Node | None = None


@dataclass(frozen=True, kw_only=True)
class Policy:
    """An eviction policy.

    budget: live slots per (row, layer, kv head) after an eviction; None: no limit, only for `full`. chunk: tokens of a
    prompt that are processed together; None: the whole prompt at once. positions: "original" (keys keep their true
    position) or "contiguous" (keys are re-ranked among what is kept; needs RoPE). decode_eviction: whether single
    generated tokens evict too.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    needs_weights: ClassVar[bool] = False
    needs_lse: ClassVar[bool] = False

    budget: int | None = None
    chunk: int | None = None
    positions: str = "original"
    decode_eviction: bool = True

    @property
    def sinks(self) -> int:
        """How many of the first positions of a row are never evicted."""
        return 0

    @property
    def recent(self) -> int:
        """How many of the newest slots are protected in every eviction."""
        return 0

    # -- options -------------------------------------------------------------------------------------------------
    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (
                str(field.type).startswith("int")
                and value is not None
                and (isinstance(value, bool) or not isinstance(value, int))
            ):
                raise OptionError(f"{self.name}: {field.name} is {value!r}, expected an integer")
        if self.positions not in ("original", "contiguous"):
            raise OptionError(f'{self.name}: positions is {self.positions!r}, expected "original" or "contiguous"')
        for option in ("budget", "chunk"):
            value = getattr(self, option)
            if value is not None and value <= 0:
                raise OptionError(f"{self.name}: {option} is {value}, expected at least 1")
        self.validate()

    def validate(self) -> None:
        """Raises OptionError when the options make no sense together."""
        if self.budget is not None and self.budget <= self.sinks + self.recent:
            raise OptionError(
                f"{self.name}: budget is {self.budget}, but {self.sinks} sinks and {self.recent} recent tokens are always "
                f"kept; expected a budget above {self.sinks + self.recent}"
            )

    def options(self) -> dict[str, Any]:
        """The options as plain data; `make(name, **options)` gives the policy back."""
        return dataclasses.asdict(self)

    def adapt(self, sites: list[AttentionSite], facts: dict[str, Any]) -> Policy:
        """The policy as it fits a model; raises OptionError where it does not. facts: "activation" and other config."""
        return self

    # -- graph ---------------------------------------------------------------------------------------------------
    def weights(self, sites: list[AttentionSite], hooks: list[SiteHook]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the policy weights that this model needs."""
        return {}

    def score(self, hook: SiteHook) -> Scores:
        """Adds the scoring subgraph at one site."""
        raise TypeError(f"{type(self).__name__} does not say how to score")

    # -- runtime -------------------------------------------------------------------------------------------------
    def plan(self, length: int) -> list[Segment]:
        """How a prompt of `length` tokens is cut; the same for every row of that length, whatever its batch."""
        step = self.chunk or max(1, length)
        keep = UNLIMITED if self.budget is None else self.budget
        return [Segment(min(step, length - at), keep, self.recent) for at in range(0, length, step)]

    def decode_segment(self) -> Segment:
        """What one generated token does."""
        keep = self.budget if self.decode_eviction and self.budget is not None else UNLIMITED
        return Segment(1, keep, self.recent)

    @property
    def renews_ranks_in_decoding(self) -> bool:
        """Contiguous positions: whether cached keys are re-ranked at every generated token."""
        return True
