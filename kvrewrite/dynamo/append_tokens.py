"""Fast decoding for stock caches in the torch.compile backend when the policy never evicts while decoding.

Such a policy only adds tokens while it decodes. So a step needs neither scores nor updates: it is one compiled graph
that reads the cache and returns each layer's new key and value, which are then written for all layers at once. All
heads of a row have the same number of slots (`refuse_stock`), so the place to write to is one number per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.cache.pages import to_device
from kvrewrite.cache.request import exclusive, row_inputs
from kvrewrite.dynamo.caches import StockState
from kvrewrite.ir.layout import spec_of
from kvrewrite.ir.program import Program
from kvrewrite.passes.lower.append import lower_append
from kvrewrite.policies import Policy
from kvrewrite.runtime.model import RewrittenModel, on_its_device
from kvrewrite.runtime.parts import dynamic_sizes, mark_moving


def why_not(program: Program, policy: Policy) -> str | None:
    """The reason why single tokens of this program are not simply appended, or None."""
    layout = program.layout
    if not policy.rates_prompts_only:
        return f"{policy.name} scores or evicts single tokens"
    if layout.contiguous or layout.length_tables:
        return "cached keys are rotated at every token"
    if layout.quantize or policy.merge or policy.ragged:
        return "slots are quantized, merged, or different in number from head to head"
    if layout.states:
        return "something besides slots is carried"
    if any(not c.v_dim for c in layout.classes) or any(s.alibi or s.window or s.chunk for s in program.sites):
        return "latents, windows or ALiBi"
    return None


class AppendRunner:
    """Runs steps of one model. gm: its graph; compiler: compiles the lowered one (`torch.compile` with its options)."""

    def __init__(
        self, model: RewrittenModel, gm: fx.GraphModule, compiler: Callable[[fx.GraphModule], Callable[..., Any]]
    ):
        self.model = model
        lowered = lower_append(gm, model.program.layout.classes, dense=model.device.type != "cuda")
        for node in [n for n in lowered.graph.find_nodes(op="placeholder") if not n.users]:
            lowered.graph.erase_node(node)
        specs = [spec for n in lowered.graph.find_nodes(op="placeholder") if (spec := spec_of(n)) is not None]
        self._names, self._moving = [s.name for s in specs], [s.moving for s in specs]
        self._run = compiler(fx.GraphModule(lowered, lowered.graph))  # Dynamo does not trace lazily generated code
        self._ones: dict[int, Tensor] = {}
        self.gpu, self.owner = model.gpu, model.owner  # for the decorators of `step`

    @exclusive
    @on_its_device
    def step(self, ids: Tensor, cache: StockState) -> Tensor:
        """Decodes one token (B, 1) per row; returns logits (B, 1, vocabulary)."""
        for row in range(cache.batch_size):
            problem = cache.no_room(row, 1, True)
            if problem is not None:
                raise problem
        cache.begin_step()
        plan = cache.plan_token()
        cache.hold(plan)
        inputs = self._inputs(ids, cache)
        arguments = [inputs[name] for name in self._names]
        mark_moving(arguments, self._moving)
        with dynamic_sizes():
            logits, *new = self._run(*arguments)
        cache.append(new[: len(new) // 2], new[len(new) // 2 :])
        cache.commit(plan)
        cache.record(ids, None, generated=False)
        return logits

    def _inputs(self, ids: Tensor, cache: StockState) -> dict[str, Tensor]:
        device, batch = cache.device, cache.batch_size
        if batch not in self._ones:
            self._ones[batch] = torch.ones(batch, dtype=torch.int32, device=device)
        rows = {"positions": to_device(cache.seen, device), "valid": self._ones[batch]}
        inputs = {"input_ids": ids.long(), **row_inputs(rows, None)}
        for c, lease in enumerate(cache.stock_leases):
            inputs.update(cache.class_inputs(c))
            inputs[f"k_slots_{c}"], inputs[f"v_slots_{c}"] = lease.dense("k_pages"), lease.dense("v_pages")
            inputs[f"live_slots_{c}"] = cache.live(c)
        return inputs
