"""The interface of an eviction policy.

A policy is a frozen dataclass: its fields are its options. It says what a slot is worth (`score`, in torch code on the
tensors of one attention site), how a prompt is cut into segments (`plan`), and which slots are protected. Everything else
(finding attention, caches, positions, padding, batching, kernels) is the compiler's and the runtime's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from kvrewrite.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies.site import Site

UNLIMITED = 2**31 - 1  # keep everything


def annotation(option: dataclasses.Field[Any]) -> str:
    """The type of an option as text, such as "int | None"."""
    kind: Any = option.type
    return kind if isinstance(kind, str) else kind.__name__ if isinstance(kind, type) else str(kind)


QUANTIZE = ("none", "int8", "int4", "fp8")
MLA = ("expanded", "latent")


@dataclass(frozen=True)
class RowState:
    """What a plan may depend on, for one row. seen: tokens so far; generated: those since the last prompt; held: most
    live slots of a head."""

    seen: int = 0
    generated: int = 0
    held: int = 0


@dataclass(frozen=True)
class Segment:
    """Tokens of one row that go through the model together.

    keep: live slots per head after the segment (UNLIMITED: no eviction), before `layer_budgets`; recent: how many of
    the newest slots of each head are protected in that eviction; values: the row's values of the policy's graph
    inputs (`Policy.inputs`); prompt: whether it belongs to a prompt.
    """

    length: int
    keep: int
    recent: int = 0
    values: Mapping[str, int] = field(default_factory=dict)
    prompt: bool = True


@dataclass
class Scores:
    """What a policy's code computes at one site. C: cached slots, T: new tokens.

    new: (B, Hkv, T), the scores of the new tokens. slots: (B, Hkv, C), which replaces the scores of cached slots, or None
    where they stay as they were. select: (B, Hkv, C + T), what this eviction goes by where it is not the stored scores.
    keep: (B, Hkv) int32, how many slots stay where the text decides (`Policy.data_dependent`), else the budget holds.
    """

    new: Tensor
    slots: Tensor | None = None
    select: Tensor | None = None
    keep: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Policy:
    """An eviction policy.

    budget: live slots per (row, layer, kv head) after an eviction; a number between 0 and 1 is a fraction of all tokens
    that the row has seen at the end of the prompt (while decoding: so far), and at least one more than what is protected;
    None: no limit. chunk: tokens of a prompt that are processed together; None: the whole prompt at once. positions:
    "original" (keys keep their true position) or "contiguous" (keys are re-ranked among what is kept; needs RoPE).
    decode_eviction: whether single generated tokens evict too.

    layer_budgets: "equal", "pyramid" (PyramidKV's line from large to small, arXiv 2406.02069), or the slots of each layer
    that owns a cache ("96,64,32"). head_budgets: "equal" or "adakv" (Ada-KV, arXiv 2407.11550): at each eviction of a
    prompt the heads of a layer share their budget by their scores, and head_floor of it is shared out equally.

    quantize: "none", "int8", "int4" or "fp8": how cached keys and values are stored (KIVI, arXiv 2402.02750: keys per
    channel in groups of quantize_group slots, values per token in groups of channels), but for the quantize_residual
    newest slots. merge: evicted slots are merged into their nearest kept slot (D2O, arXiv 2406.13035).

    mla: what the cache holds where a layer's keys and values are made of one compressed latent (multi-head latent attention,
    DeepSeek-V2, arXiv 2405.04434). "expanded": the keys and values of every head, each of which keeps tokens of its own, as
    policies are defined. "latent": one kv head, of the latent and the rotated key part that all heads share, so that a layer
    keeps the same tokens for all heads; only for policies with `latent_scores`, and not with quantize, merge or head_budgets.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    needs_weights: ClassVar[bool] = False
    needs_question: ClassVar[bool] = False  # what it keeps depends on the question being in the prompt
    question_first: ClassVar[bool] = False  # the question stands in front of the context, too
    has_scores: ClassVar[bool] = True  # whether slots compete by content, as merging needs
    scores_per_head: ClassVar[bool] = True  # whether heads differ in what they keep, as head_budgets needs
    whole_prompt: ClassVar[bool] = False  # evicts once, when a row's first prompt is there as a whole
    after_logits: ClassVar[bool] = False  # scores need the logits of the tokens
    needs_rotary: ClassVar[bool] = False  # scores need cos and sin of the rotation
    gates: ClassVar[bool] = False  # flags tokens before attention
    head_pattern: ClassVar[bool] = False  # `head_keeps` gives the heads of a layer different budgets
    weights_are_options: ClassVar[bool] = False  # `adapt` turns given weights into options; the graph reads none
    rotary_ahead: ClassVar[int] = 0  # with needs_rotary: positions beyond the text that cos and sin must have
    latent_scores: ClassVar[bool] = False  # scores mean the same where all heads of a layer keep one latent a token
    inputs: ClassVar[tuple[str, ...]] = ()  # graph inputs (B,) int32 that `Segment.values` sets row by row

    budget: int | float | None = None
    chunk: int | None = None
    positions: str = "original"
    decode_eviction: bool = True
    layer_budgets: str = "equal"
    head_budgets: str = "equal"
    head_floor: float = 0.2
    quantize: str = "none"
    quantize_group: int = 32
    quantize_residual: int = 128
    merge: bool = False
    mla: str = "expanded"

    @property
    def sinks(self) -> int:
        """How many of the first positions of a row are never evicted."""
        return 0

    @property
    def recent(self) -> int:
        """How many of the newest slots are protected in every eviction."""
        return 0

    @property
    def capacity(self) -> int | None:
        """The most tokens that a row may have where nothing is ever evicted; None: as many as it likes."""
        return None

    @property
    def evicts_ever(self) -> bool:
        """Whether a slot can go at all."""
        return True

    @property
    def uniform_layers(self) -> bool:
        """Whether all layers keep as many slots."""
        return self.layer_budgets == "equal"

    @property
    def data_dependent(self) -> bool:
        """Whether the text decides how many slots a head keeps (`Scores.keep`), at most its budget."""
        return False

    @property
    def shares_layers(self) -> bool:
        """Whether the heads of all layers share one budget: layers are rated first (`rate`) and evict behind the last one.
        A layer's budget is then its part of the sum, and no bound for a head. Implies `data_dependent`."""
        return False

    @property
    def rates_prompts_only(self) -> bool:
        """Whether nothing goes once a row's first prompt is through, so that single tokens are only added and need no score."""
        own = type(self)
        return self.whole_prompt and own.plan is Policy.plan and own.decode_segment is Policy.decode_segment

    def recent_of(self, keep: int) -> int:
        """How many of the newest slots are protected when `keep` stay."""
        return self.recent

    # -- options -------------------------------------------------------------------------------------------------
    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value, kinds = getattr(self, option.name), annotation(option).replace(" ", "").split("|")
            if isinstance(value, (list, tuple)) and option.name == "layer_budgets":
                value = ",".join(str(v) for v in value)
                object.__setattr__(self, option.name, value)
            if value is None and "None" in kinds:
                continue
            fits = {
                "int": isinstance(value, int) and not isinstance(value, bool),
                "float": isinstance(value, (int, float)) and not isinstance(value, bool),
                "bool": isinstance(value, bool),
                "str": isinstance(value, str),
            }
            if not any(fits.get(k, False) for k in kinds):
                words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a word"}
                expected = " or ".join(words.get(k, k) for k in kinds if not (k == "int" and "float" in kinds))
                raise OptionError(f"{self.name}: {option.name} is {value!r}, expected {expected}")
        if self.positions not in ("original", "contiguous"):
            raise OptionError(f'{self.name}: positions is {self.positions!r}, expected "original" or "contiguous"')
        if isinstance(self.budget, float) and not 0 < self.budget < 1:
            raise OptionError(
                f"{self.name}: budget is {self.budget}, expected a fraction between 0 and 1 or a whole number of slots"
            )
        for name in ("budget", "chunk"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise OptionError(f"{self.name}: {name} is {value}, expected at least 1")
        if self.whole_prompt and self.chunk is not None:
            raise OptionError(
                f"{self.name}: chunk is {self.chunk}, but it evicts once, by what the end of the prompt attends to, so the "
                "prompt can't be cut; expected no chunk (a policy with chunked prefill: tova, h2o, keydiff, locret)"
            )
        seed = getattr(self, "seed", 0)
        if isinstance(seed, int) and not 0 <= seed < 1 << 63:
            raise OptionError(f"{self.name}: seed is {seed}, expected a number from 0 to 2**63 - 1")
        self._validate_shared()
        self.validate()

    def _validate_shared(self) -> None:
        if self.layer_budgets not in ("equal", "pyramid"):
            self._layer_list()
        if self.head_budgets not in ("equal", "adakv"):
            raise OptionError(f'{self.name}: head_budgets is {self.head_budgets!r}, expected "equal" or "adakv"')
        if not 0 <= self.head_floor <= 1:
            raise OptionError(f"{self.name}: head_floor is {self.head_floor}, expected a share between 0 and 1")
        if self.quantize not in QUANTIZE:
            raise OptionError(f"{self.name}: quantize is {self.quantize!r}, expected one of {', '.join(QUANTIZE)}")
        if self.head_budgets != "equal" and not (self.has_scores and self.scores_per_head):
            raise OptionError(
                f"{self.name}: head_budgets={self.head_budgets} needs scores by which the heads of a layer can compete, and "
                f"{self.name} has none"
            )
        if self.merge and (not self.has_scores or self.gates):
            raise OptionError(
                f"{self.name}: merge=True needs a policy that scores slots by their content, and {self.name} does not"
            )
        if self.mla not in MLA:
            raise OptionError(f"{self.name}: mla is {self.mla!r}, expected one of {', '.join(MLA)}")
        if self.mla == "latent":
            self._check_latent()
        if self.layer_budgets != "equal" and self.budget is None:
            raise OptionError(f"{self.name}: layer_budgets={self.layer_budgets} needs a budget, and budget is None")
        if self.quantize_group < 1 or 64 % self.quantize_group:
            raise OptionError(f"{self.name}: quantize_group is {self.quantize_group}, expected a divisor of 64")
        if self.quantize_residual < 0 or self.quantize_residual % self.quantize_group:
            raise OptionError(
                f"{self.name}: quantize_residual is {self.quantize_residual}, expected a multiple of quantize_group "
                f"({self.quantize_group})"
            )

    def _check_latent(self) -> None:
        """What a cache of latents can't have."""
        reasons = {
            "its scores are defined by the keys, values or budgets of single heads, and a latent is none of them": (
                not self.latent_scores
            ),
            "its gates hide tokens from single heads": self.gates,
            f"quantize={self.quantize} codes keys by channel and values by token, and a latent is both": (
                self.quantize != "none"
            ),
            "merge=True looks for the nearest key of a head, and a latent is none": self.merge,
            f"head_budgets={self.head_budgets} shares a budget between heads, and there is one": (
                self.head_budgets != "equal"
            ),
        }
        for reason, applies in reasons.items():
            if applies:
                raise OptionError(f"{self.name}: mla=latent is not possible: {reason}; use mla=expanded")

    def _layer_list(self) -> list[int]:
        """layer_budgets as numbers."""
        parts = [p.strip() for p in self.layer_budgets.split(",")]
        if not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
            raise OptionError(
                f'{self.name}: layer_budgets is {self.layer_budgets!r}, expected "equal", "pyramid" or slots of each layer '
                'such as "96,64,32"'
            )
        low = min(int(p) for p in parts)
        if low <= self.sinks + self.recent:
            raise OptionError(
                f"{self.name}: layer_budgets has a layer of {low} slots, but {self.sinks + self.recent} tokens are always "
                f"kept; expected more than {self.sinks + self.recent} in every layer"
            )
        return [int(p) for p in parts]

    def validate(self) -> None:
        """Raises OptionError when the options make no sense together."""
        if isinstance(self.budget, int) and self.budget <= self.sinks + self.recent:
            raise OptionError(
                f"{self.name}: budget is {self.budget}, but {self.sinks} sinks and {self.recent} recent tokens are always "
                f"kept; expected a budget above {self.sinks + self.recent}"
            )

    def require_budget(self) -> None:
        """Raises OptionError where there is no budget."""
        if self.budget is None:
            raise OptionError(f"{self.name}: budget is None, expected a number of slots")

    def options(self) -> dict[str, Any]:
        """The options as plain data; `make(name, **options)` gives the policy back."""
        return dataclasses.asdict(self)

    def adapt(self, sites: list[AttentionSite], facts: dict[str, Any]) -> Policy:
        """The policy as it fits a model; raises OptionError where it does not. facts: "activation" and other config."""
        return self

    def of_rank(self, rank: int, ranks: int) -> Policy:
        """The policy as one of several processes has it, each of which holds a block of every layer's heads (tensor
        parallelism). Raises OptionError where that is not possible."""
        if self.merge:
            raise OptionError(
                f"{self.name}: merge=True judges the tokens of all heads of a layer together, and with tensor parallelism no "
                "process has them all; use merge=False or one process"
            )
        if self.head_budgets != "equal" or self.shares_layers:
            raise OptionError(
                f"{self.name}: heads of several processes would share one budget, which is not possible; with tensor parallelism "
                'use head_budgets="equal" (fast_kvzip: scope="head")'
            )
        return self

    def check_layers(self, owners: int) -> None:
        """Raises OptionError where layer_budgets does not fit a model with `owners` layers that own a cache."""
        if self.layer_budgets in ("equal", "pyramid"):
            return
        given = len(self._layer_list())
        if given != owners:
            raise OptionError(
                f"{self.name}: layer_budgets has {given} numbers, but the model has {owners} layers that own a cache; "
                f"expected {owners} numbers"
            )

    # -- graph ---------------------------------------------------------------------------------------------------
    def weights(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the policy weights that a site which owns its keys and values needs."""
        return {}

    def gate(self, site: Site) -> Tensor:
        """With `gates`: flags new tokens to drop before attention, (B, Hkv, T) bool. Only they themselves see them, and they
        never enter the cache."""
        raise TypeError(f"{type(self).__name__} does not say which tokens to drop")

    def rate(self, site: Site) -> None:
        """With `shares_layers`: keeps what `score` will need of this site (`site.remember`), after its attention."""
        raise TypeError(f"{type(self).__name__} does not say how to rate")

    def score(self, site: Site) -> Scores | Tensor:
        """What slots are worth at one site, in torch code on its tensors; a tensor is `Scores(new)`. Called after the site's
        attention (after the logits with `after_logits`, after the last layer with `shares_layers`)."""
        raise TypeError(f"{type(self).__name__} does not say how to score")

    # -- runtime -------------------------------------------------------------------------------------------------
    def slots(self, seen: int) -> int:
        """The budget in slots for a row that has seen this many tokens."""
        if self.budget is None:
            return UNLIMITED
        if isinstance(self.budget, int):
            return self.budget
        return max(math.floor(self.budget * seen + 1e-9), self.sinks + self.recent + 1)

    def segment(self, length: int, keep: int, **rest: Any) -> Segment:
        """A segment with the window that goes with `keep`."""
        recent = self.recent if keep == UNLIMITED else self.recent_of(keep)
        return Segment(length, keep, rest.pop("recent", recent), **rest)

    def plan(self, length: int, row: RowState = RowState()) -> list[Segment]:
        """How a prompt of `length` tokens is cut; the same for every row in that state, whatever its batch."""
        keep = self.slots(row.seen + length)
        if self.whole_prompt and row.seen:
            keep = UNLIMITED
        step = self.chunk or max(1, length)
        return [self.segment(min(step, length - at), keep) for at in range(0, length, step)]

    def decode_segment(self, row: RowState = RowState()) -> Segment:
        """What one generated token does."""
        evicts = self.decode_eviction and not self.whole_prompt
        return self.segment(1, self.slots(row.seen + 1) if evicts else UNLIMITED, prompt=False)

    def evicts(self, segments: Sequence[Segment], layers: int = 1) -> bool:
        """Whether these segments of a row's first prompt lose any token; with gates that is so before any has ended. layers:
        how many layers own a cache."""
        tokens = 0
        for segment in segments:
            tokens += segment.length
            if min(self.layer_keeps(segment, tokens, layers)) < tokens:
                return True
        return self.gates or (self.data_dependent and bool(segments))

    def layer_keeps(self, segment: Segment, tokens: int, layers: int) -> list[int]:
        """Slots that each of `layers` cache owners keeps after a segment, when the row has `tokens` tokens then."""
        if self.layer_budgets == "equal" or segment.keep == UNLIMITED:
            return [segment.keep] * layers
        if self.layer_budgets == "pyramid":
            return pyramid(segment.keep, self.sinks + segment.recent, tokens, layers)
        base = self.slots(tokens)
        return [n if base == segment.keep else n * segment.keep // base for n in self._layer_list()]

    def head_keeps(self, keep: int, layer: int, heads: int) -> list[int]:
        """Slots that each of the `heads` kv heads of the layer-th cache owner keeps, where the layer's budget is `keep`."""
        return [keep] * heads

    @property
    def ragged(self) -> bool:
        """Whether the device decides which of a layer's heads keeps how many slots."""
        return self.gates or self.data_dependent or self.head_budgets != "equal"

    @property
    def renews_ranks_in_decoding(self) -> bool:
        """Contiguous positions: whether cached keys are re-ranked at every generated token."""
        return True


def pyramid(budget: int, protected: int, tokens: int, layers: int, beta: int = 20) -> list[int]:
    """Layer budgets on a line from large to small (PyramidKV, arXiv 2406.02069; code Zefan-Cai/KVCache-Factory).

    With b = budget - protected: from 2b - b // beta (or all tokens) down in equal steps to b // beta, plus what is
    protected in every layer. Prompts of fewer than 2b tokens have equal budgets.
    """
    b = budget - protected
    if tokens < 2 * b or layers < 2:
        return [budget] * layers
    low = b // beta
    high = 2 * b - low
    if high > tokens - protected:
        high = tokens - protected
        low = 2 * b - high
    step = (high - low) // (layers - 1)
    return [protected + high - layer * step for layer in range(layers)]
