"""A few tokens at speed: drafted tokens that are checked go through from the buffers of a decode step, on CUDA in one
graph replay.

Queueing such a pass op by op takes the host longer than a GPU needs for it. It is captured for two, four and eight
tokens, and what has fewer is padded. It is for caches that only append (`passes/lower/few.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from kvrewrite.cache.rollback import why_never
from kvrewrite.cache.slot_plan import StepPlan
from kvrewrite.ir.program import Program
from kvrewrite.kernels.limits import FEW_TOKENS
from kvrewrite.passes.lower.few import lower_few, why_not_few
from kvrewrite.policies import Policy
from kvrewrite.runtime.parts import Execution
from kvrewrite.runtime.replay import Replay

if TYPE_CHECKING:
    from kvrewrite.cache.eviction_cache import EvictionCache
    from kvrewrite.runtime.call import Tokens
    from kvrewrite.runtime.decode_graph import Step


def why_not(program: Program, policy: Policy, gm: fx.GraphModule) -> str | None:
    """The reason why a few tokens of a program don't run from static buffers, or None. What speaks against chunks
    (`prompt_graph.why_not`) does here, too."""
    if program.layout.states:
        return "it carries states besides its slots"
    return why_never(program.layout, policy) or why_not_few(gm)


def width_of(count: int) -> int:
    """The columns of the pass that takes so many tokens: a power of two."""
    return 1 << (count - 1).bit_length()


class FewTokens:
    """Passes of up to `FEW_TOKENS` tokens per row. gm: the model's graph, before `lower_few`; capture: into CUDA graphs;
    captures counts them."""

    def __init__(self, gm: fx.GraphModule, compiler: Callable[[Any], Callable[..., Any]] | None, capture: bool):
        self.capture, self.captures = capture, 0
        self._made: Callable[[], Execution] = lambda: Execution(lower_few(gm), compiler)
        self._execution: Execution | None = None

    @property
    def execution(self) -> Execution:
        """The program in parts, made when it is first needed."""
        if self._execution is None:
            self._execution = self._made()
        return self._execution

    def plan(self, cache: EvictionCache, tokens: Tokens) -> StepPlan | None:
        """What these tokens do to the slots, where every row has as many and they go through like this; else None."""
        count = tokens.ids.shape[1]
        plain = not tokens.late and tokens.real is None and tokens.embeds is None
        if not plain or not 1 < count <= FEW_TOKENS or not cache.only_appends or not all(cache.seen):
            return None
        plans = [cache.segments(row, count, False) for row in range(cache.batch_size)]
        if any(len(found) != 1 or found[0].again for found in plans):
            return None
        plan = cache.plan([found[0] for found in plans])
        return None if any(part.deals.any() for part in plan.classes) else plan

    def pass_of(self, step: Step, width: int) -> FewPass:
        """The pass of so many columns from a step's buffers."""
        found: FewPass | None = step.few.get(width)
        if found is None:
            found = step.few[width] = FewPass(self.execution, step, width)
            if self.capture:
                found.replay.capture(step.rows)
                self.captures += 1
        return found


class FewPass:
    """One pass of `width` columns from a step's buffers."""

    def __init__(self, execution: Execution, step: Step, width: int):
        self.execution, self.step = execution, step
        device = step.ids.device
        self.ids = torch.zeros(step.batch, width, dtype=torch.int64, device=device)
        self.column = torch.arange(width, device=device)
        self.index = self.column.expand(step.batch, width).contiguous()
        self.replay = Replay(self._run)

    def _run(self) -> Tensor:
        inputs, layers = self.step.inputs(self.column)
        logits = self.execution({**inputs, "input_ids": self.ids, "logit_index": self.index}, layers=layers)
        assert logits is not None
        return logits

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) of ids (B, T); rows, tables and lengths are in the step's buffers."""
        self.ids[:, : ids.shape[1]].copy_(ids)
        return self.replay()[:, : ids.shape[1]]
