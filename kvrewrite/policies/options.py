"""The options that every policy has, and what is checked of them before any work starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kvrewrite.errors import OptionError
from kvrewrite.policies.budgets import NAMED, layer_numbers
from kvrewrite.policies.traits import Traits

QUANTIZE = ("none", "int8", "int4", "fp8")
MLA = ("expanded", "latent")
WORDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a word"}


def annotation(option: dataclasses.Field[Any]) -> str:
    """The type of an option as text, such as "int | None"."""
    kind: Any = option.type
    return kind if isinstance(kind, str) else kind.__name__ if isinstance(kind, type) else str(kind)


@dataclass(frozen=True, kw_only=True)
class Options(Traits):
    """Options as fields of a frozen dataclass.

    budget: live slots per (row, layer, kv head) after an eviction; a number between 0 and 1 is a fraction of all tokens
    that the row has seen at the end of the prompt (while decoding: so far), and at least one more than what is protected;
    None: no limit. chunk: tokens of a prompt that are processed together; None: the whole prompt at once. positions:
    "original" (keys keep their true position) or "contiguous" (keys are re-ranked among what is kept; needs RoPE).
    decode_eviction: whether single generated tokens evict too.

    layer_budgets: "equal", "pyramid" (PyramidKV's line from large to small, arXiv 2406.02069), or the slots of each layer
    that owns a cache ("96,64,32"). head_budgets: "equal" or "adakv" (Ada-KV, arXiv 2407.11550): at each eviction of a
    prompt the heads of a layer share their budget by their scores, and head_floor of it is shared out equally.

    protect_prompt: whether no token of a row's first prompt ever goes, so that what is generated, and further prompts, share
    the rest of the budget. For policies that evict while decoding; prompts that do not fit are refused.

    quantize: "none", "int8", "int4" or "fp8": how cached keys and values are stored (KIVI, arXiv 2402.02750: keys per
    channel in groups of quantize_group slots, values per token in groups of channels), but for the quantize_residual
    newest slots. merge: evicted slots are merged into their nearest kept slot (D2O, arXiv 2406.13035).

    mla: what the cache holds where a layer's keys and values are made of one compressed latent (multi-head latent attention,
    DeepSeek-V2, arXiv 2405.04434). "expanded": the keys and values of every head, each of which keeps tokens of its own, as
    policies are defined. "latent": one kv head, of the latent and the rotated key part that all heads share, so that a layer
    keeps the same tokens for all heads; only for policies with `latent_scores`, and not with quantize, merge or head_budgets.
    """

    budget: int | float | None = None
    chunk: int | None = None
    positions: str = "original"
    decode_eviction: bool = True
    layer_budgets: str = "equal"
    head_budgets: str = "equal"
    head_floor: float = 0.2
    protect_prompt: bool = False
    quantize: str = "none"
    quantize_group: int = 32
    quantize_residual: int = 128
    merge: bool = False
    mla: str = "expanded"

    def __post_init__(self) -> None:
        if isinstance(self.layer_budgets, (list, tuple)):
            object.__setattr__(self, "layer_budgets", ",".join(str(v) for v in self.layer_budgets))
        for option in dataclasses.fields(self):
            self._check_type(option)
        self._check_tokens()
        self._check_budgets()
        self._check_storage()
        if self.mla == "latent":
            self._check_latent()
        if self.protect_prompt:
            self._check_protect_prompt()
        self.validate()

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

    def check_layers(self, owners: int) -> None:
        """Raises OptionError where layer_budgets does not fit a model with `owners` layers that own a cache."""
        if self.layer_budgets in NAMED:
            return
        given = len(self.layer_list())
        if given != owners:
            raise OptionError(
                f"{self.name}: layer_budgets has {given} numbers, but the model has {owners} layers that own a cache; "
                f"expected {owners} numbers"
            )

    def layer_list(self) -> list[int]:
        """layer_budgets as numbers; OptionError where it has none."""
        numbers = layer_numbers(self.layer_budgets)
        if numbers is None:
            raise OptionError(
                f'{self.name}: layer_budgets is {self.layer_budgets!r}, expected "equal", "pyramid" or slots of each layer '
                'such as "96,64,32"'
            )
        return numbers

    def _check_type(self, option: dataclasses.Field[Any]) -> None:
        value, kinds = getattr(self, option.name), annotation(option).replace(" ", "").split("|")
        if value is None and "None" in kinds:
            return
        fits = {
            "int": isinstance(value, int) and not isinstance(value, bool),
            "float": isinstance(value, (int, float)) and not isinstance(value, bool),
            "bool": isinstance(value, bool),
            "str": isinstance(value, str),
        }
        if not any(fits.get(k, False) for k in kinds):
            expected = " or ".join(WORDS.get(k, k) for k in kinds if not (k == "int" and "float" in kinds))
            raise OptionError(f"{self.name}: {option.name} is {value!r}, expected {expected}")

    def _check_tokens(self) -> None:
        """How many tokens stay, which go together, and where they stand."""
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
        if self.whole_prompt and self.chunk is not None and not self.repeats_prompt:
            raise OptionError(
                f"{self.name}: chunk is {self.chunk}, but it evicts once, by what the end of the prompt attends to, so the "
                "prompt can't be cut; expected no chunk (a policy with chunked prefill: tova, h2o, keydiff, locret)"
            )
        seed = getattr(self, "seed", 0)
        if isinstance(seed, int) and not 0 <= seed < 1 << 63:
            raise OptionError(f"{self.name}: seed is {seed}, expected a number from 0 to 2**63 - 1")

    def _check_budgets(self) -> None:
        """How layers and heads share."""
        if self.layer_budgets not in NAMED and (low := min(self.layer_list())) <= self.sinks + self.recent:
            raise OptionError(
                f"{self.name}: layer_budgets has a layer of {low} slots, but {self.sinks + self.recent} tokens are always "
                f"kept; expected more than {self.sinks + self.recent} in every layer"
            )
        if self.head_budgets not in ("equal", "adakv"):
            raise OptionError(f'{self.name}: head_budgets is {self.head_budgets!r}, expected "equal" or "adakv"')
        if not 0 <= self.head_floor <= 1:
            raise OptionError(f"{self.name}: head_floor is {self.head_floor}, expected a share between 0 and 1")
        if self.head_budgets != "equal" and not (self.has_scores and self.scores_per_head):
            raise OptionError(
                f"{self.name}: head_budgets={self.head_budgets} needs scores by which the heads of a layer can compete, and "
                f"{self.name} has none"
            )
        if self.layer_budgets != "equal" and self.budget is None:
            raise OptionError(f"{self.name}: layer_budgets={self.layer_budgets} needs a budget, and budget is None")

    def _check_storage(self) -> None:
        """How slots are stored."""
        if self.quantize not in QUANTIZE:
            raise OptionError(f"{self.name}: quantize is {self.quantize!r}, expected one of {', '.join(QUANTIZE)}")
        if self.quantize_group < 1 or 64 % self.quantize_group:
            raise OptionError(f"{self.name}: quantize_group is {self.quantize_group}, expected a divisor of 64")
        if self.quantize_residual < 0 or self.quantize_residual % self.quantize_group:
            raise OptionError(
                f"{self.name}: quantize_residual is {self.quantize_residual}, expected a multiple of quantize_group "
                f"({self.quantize_group})"
            )
        if self.merge and (not self.has_scores or self.gates):
            raise OptionError(
                f"{self.name}: merge=True needs a policy that scores slots by their content, and {self.name} does not"
            )
        if self.mla not in MLA:
            raise OptionError(f"{self.name}: mla is {self.mla!r}, expected one of {', '.join(MLA)}")

    def _check_protect_prompt(self) -> None:
        """What can't keep a prompt and stay within a budget."""
        reasons = {
            "it evicts nothing while decoding": (not self.evicts_ever or self.whole_prompt or not self.decode_eviction),
            "how many slots each head keeps does not follow from the budget alone": (
                not self.protects_prompts or self.gates or self.data_dependent or self.head_pattern
            ),
            f"with layer_budgets={self.layer_budgets} a layer could have less than the prompt": (
                self.layer_budgets != "equal"
            ),
            f"with head_budgets={self.head_budgets} a head could have less than the prompt": (
                self.head_budgets != "equal"
            ),
            f"budget is {self.budget}, expected a number of slots": not isinstance(self.budget, int),
        }
        for reason, applies in reasons.items():
            if applies:
                raise OptionError(f"{self.name}: protect_prompt=True is not possible: {reason}")

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
