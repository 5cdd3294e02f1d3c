"""What kind of policy a policy is: what the compiler, the runtime and the tools ask about it beside its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from kvrewrite.policies.published import Published


class Traits:
    """Class attributes that a policy sets, and properties that it overrides where its options decide."""

    # -- for people
    name: ClassVar[str]
    summary: ClassVar[str]  # what is kept
    source: ClassVar[str]
    evicts_when: ClassVar[str] = ""  # "chunks, decoding"
    aliases: ClassVar[tuple[str, ...]] = ()  # what other papers call it

    # -- what it needs
    needs_weights: ClassVar[bool] = False
    weights_are_options: ClassVar[bool] = False  # `adapt` turns given weights into options; the graph reads none
    published: ClassVar[str] = ""  # the file that its authors publish, which `read_published` reads
    published_as: ClassVar[tuple[str, ...]] = ()  # names of that file in a directory
    needs_question: ClassVar[bool] = False  # what it keeps depends on the question being in the prompt
    question_first: ClassVar[bool] = False  # the question stands before the context, too
    after_logits: ClassVar[bool] = False  # scores need the logits of the tokens
    inputs: ClassVar[tuple[str, ...]] = ()  # graph inputs (B,) int32 that `Segment.values` sets per row

    # -- how it evicts
    evicts_ever: ClassVar[bool] = True  # False: nothing goes, and `budget` is a capacity
    whole_prompt: ClassVar[bool] = False  # evicts once, when a row's first prompt is there as a whole
    repeats_prompt: ClassVar[bool] = False  # reads the first prompt twice (`Segment.again`) before it evicts from it
    has_scores: ClassVar[bool] = True  # whether slots compete by content, as merging needs
    scores_per_head: ClassVar[bool] = True  # heads differ in what they keep, as head_budgets needs
    protects_prompts: ClassVar[bool] = True  # can have protect_prompt, if it evicts while decoding
    latent_scores: ClassVar[bool] = False  # scores mean the same where a layer's heads keep one latent
    gates: ClassVar[bool] = False  # flags tokens before attention
    head_pattern: ClassVar[bool] = False  # `head_keeps` gives the heads of a layer different budgets
    recalls: ClassVar[bool] = False  # what leaves the cache goes to a memory, and `ask` and `recall` attend to it

    @property
    def needs_rotary(self) -> bool:
        """Whether scores need cos and sin of the rotation."""
        return False

    @property
    def rotary_ahead(self) -> int:
        """With needs_rotary: positions beyond the text that they must have."""
        return 0

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
    def data_dependent(self) -> bool:
        """Whether the text decides how many slots each head keeps (`Scores.keep`), at most its budget."""
        return False

    @property
    def shares_layers(self) -> bool:
        """Whether the heads of all layers share one budget: every layer is scored first (`rate`), and all evict after the
        last one. A layer's budget is then its part of the sum, and no bound for a head. Implies `data_dependent`."""
        return False

    @property
    def renews_ranks_in_decoding(self) -> bool:
        """Contiguous positions: whether cached keys are re-ranked at every generated token."""
        return True

    @classmethod
    def read_published(cls, file: Published) -> tuple[dict[str, Tensor], dict[str, str]]:
        """With `published`: the policy's weights in such a file, and metadata. PolicyWeightsError where it does not fit."""
        raise TypeError(f"{cls.__name__} has published weights, but no read_published(file); define it")
