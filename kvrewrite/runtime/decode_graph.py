"""Single tokens at speed: the whole decode step from static buffers, on CUDA one graph replay per token.

A captured step belongs to a batch size and to the pools of its model, not to a request: lengths, page tables and
positions are buffers on the device that a request is bound to, so that a new request replays what another one captured.
What a policy remembers besides lies in such buffers, too, while its request is bound. A step is captured again when a
pool had to grow (its memory moved), a table became wider, or the text longer than it has room for.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from kvrewrite.cache.pages import Lease, PageStore, to_device
from kvrewrite.cache.request import WIDE, row_inputs
from kvrewrite.cache.slot_plan import StepPlan, slots_decoded
from kvrewrite.ir.layout import PAGE
from kvrewrite.ir.program import Program
from kvrewrite.kernels.quantized.tiles import why_not as why_no_kernel
from kvrewrite.ops.dispatch import fused
from kvrewrite.passes.lower.decode import lower_decode
from kvrewrite.policies import UNLIMITED, Policy
from kvrewrite.runtime.few_graph import FewTokens, width_of
from kvrewrite.runtime.key_rotation import KeyRotation, rotates_keys
from kvrewrite.runtime.parts import Execution, why_not_captured
from kvrewrite.runtime.replay import Replay, RowNumbers

if TYPE_CHECKING:
    from kvrewrite.cache.eviction_cache import EvictionCache
    from kvrewrite.runtime.model import RewrittenModel

ops = torch.ops.kvrewrite
ROOM = 4096  # slots per head that a captured step has room for beyond those at its capture, if its budget allows
SPAN_ROOM = 8192  # positions that a captured step has room for beyond those at its capture


def why_not(program: Program, policy: Policy, device: torch.device) -> str | None:
    """The reason why single tokens of this program don't run from static buffers on a device, or None."""
    if policy.recalls:
        return f"{policy.name} settles on the host what it fetches from host memory"
    if policy.merge:
        return "merging asks the device how many slots go"
    scheme = program.layout.scheme
    if scheme is not None and program.layout.contiguous:
        return f"{policy.name} rotates cached keys by their rank, and their codes can't be rotated"
    if scheme is not None and device.type == "cuda":
        # What the reference writes depends on what it reads, which a captured graph can't do.
        sample = torch.empty(0, dtype=getattr(torch, program.dtype), device=device)
        for spec in program.layout.classes:
            why = why_no_kernel(scheme, spec.k_dim, spec.v_dim)
            if not fused("cache_update_quantized", sample, why):
                why = why or f"not in {program.dtype}, or kernels are off"
                return f"there is no kernel for the update of this quantized cache ({why})"
    if policy.shares_layers and not policy.rates_prompts_only:
        return f"the layers of {policy.name} share one budget"
    if device.type != "cuda":
        return None
    if program.parallel is not None and (program.layout.ragged or policy.head_pattern):
        # Pools would grow at different times, and what one process runs to capture, the others would have to run, too.
        return f"with {policy.name}, heads of different processes keep different numbers of slots"
    return why_not_captured(program.graph)


class Step:
    """The buffers of a decode step of one batch size, and the step. few: passes of a few tokens from the same buffers, by
    their number (kvrewrite/runtime/few_graph.py)."""

    def __init__(self, runner: DecodeRunner, cache: EvictionCache, widths: list[int], span: int):
        self.runner, self.batch, self.widths, self.span = runner, cache.batch_size, widths, span
        device, batch = cache.device, cache.batch_size
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        names = list(cache.row_numbers([None] * batch))
        self.rows = RowNumbers(names, batch, device)
        self.tables, self.lens, self.keeps, self.pools = [], [], [], []
        for lease, width in zip(cache.leases, widths):
            shape = (len(lease.layers), batch, lease.kv_heads)
            self.tables.append(torch.zeros(*shape, width, dtype=torch.int32, device=device))
            # Tensors of their own: see Execution._views.
            self.lens.append([torch.zeros(shape[1:], dtype=torch.int32, device=device) for _ in lease.layers])
            self.keeps.append(torch.full(shape, UNLIMITED, dtype=torch.int32, device=device))
            self.pools.append({name: getattr(lease.store, name) for name in lease.store.shapes})
        self.states = [state.room(span) for state in cache.states]
        self.fixed = {
            "logit_index": torch.zeros(batch, 1, dtype=torch.int64, device=device),
            "renew": torch.ones(batch, dtype=torch.bool, device=device),
            "span": torch.empty(0, span, device=device),
            **cache.length_tables,
        }
        for i, (cos, sin) in enumerate(cache.rotary(self.reach(cache))):
            self.fixed[f"rotary_cos_{i}"], self.fixed[f"rotary_sin_{i}"] = cos, sin
        self.few: dict[int, Any] = {}
        self.one = Replay(self._run)
        if runner.capture:
            self.one.capture(self.rows)
            runner.captures += 1

    def reach(self, cache: EvictionCache) -> int:
        """Positions that tables of cos and sin need here: those that keys or queries are rotated by."""
        if self.runner.rotates_keys:
            return 1  # nothing is rotated by tables
        return min(self.span, self.runner.model.program.max_positions or self.span)

    def fits(self, cache: EvictionCache, count: int = 1) -> bool:
        """Whether this step's buffers and pools are those that `cache` needs for `count` more tokens."""
        same = all(
            getattr(lease.store, name) is pool
            for lease, pools in zip(cache.leases, self.pools)
            for name, pool in pools.items()
        )
        wide = all(lease.table.shape[-1] <= width for lease, width in zip(cache.leases, self.widths))
        lengths = all(self.fixed[name] is table for name, table in cache.length_tables.items())
        return same and wide and lengths and max(cache.seen) + count <= self.span

    def inputs(self, column: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the program reads, and what each layer has of inputs that all share. column: see `row_inputs`."""
        wide, narrow = self.rows.device, self.rows.device.to(torch.int32)  # one launch for all
        rows = {name: (wide if name in WIDE else narrow)[i] for i, name in enumerate(self.rows.names)}
        limit = self.runner.model.program.max_positions
        inputs = {"input_ids": self.ids, **self.fixed, **row_inputs(rows, limit, column)}
        for spec, state in zip(self.runner.model.program.layout.states, self.states, strict=True):
            inputs[spec.input] = state
        layers: dict[str, Any] = {}
        for c, (table, lens, keep) in enumerate(zip(self.tables, self.lens, self.keeps)):
            layers[f"table_{c}"], layers[f"keep_{c}"] = table.unbind(0), keep.unbind(0)
            layers[f"lens_{c}"] = lens
            for name, pool in self.pools[c].items():
                inputs[f"{name}_{c}"] = pool
        for c, table in enumerate(self.tables):
            if f"spare_{c}" in self.runner.sources:
                none = torch.full((self.batch, table.shape[3]), -1, dtype=torch.int32, device=table.device)
                layers[f"spare_{c}"] = [none] * len(table)
                layers[f"next_table_{c}"] = [torch.zeros_like(t) for t in table]
                inputs[f"floor_{c}"] = torch.full((self.batch,), -1.0, dtype=torch.float64, device=table.device)
        return inputs, layers

    def _run(self) -> Tensor:
        inputs, layers = self.inputs()
        logits = self.runner.execution(inputs, layers=layers)
        assert logits is not None
        return logits


@dataclass
class _Ahead:
    """The next token of a cache, planned while the device was at work on the one before. Its row numbers are on the
    device.

    version: the cache's, then; next_rotary: what the cache's becomes, or None.
    """

    cache: weakref.ref[EvictionCache]
    version: tuple[int, ...]
    step: Step
    plan: StepPlan
    next_rotary: list[int] | None


class DecodeRunner:
    """Decode steps of one model, by batch size. gm: its graph, before `lower_decode`; capture: into CUDA graphs;
    captures counts them."""

    def __init__(
        self,
        model: RewrittenModel,
        gm: fx.GraphModule,
        compiler: Callable[[Any], Callable[..., Any]] | None,
        capture: bool,
    ):
        self.model, self.capture, self.captures = model, capture, 0
        self.rotates_keys = rotates_keys(model.program, model.policy)
        self.key_rotation = KeyRotation(model) if model.program.layout.contiguous else None
        self.execution = Execution(lower_decode(gm, self.rotates_keys), compiler, rows_move=False)
        self.sources = self.execution.partition.sources
        self._steps: dict[int, Step] = {}
        self._bound: weakref.ref[EvictionCache] | None = None  # a cache that is gone gives its pages back
        self._lease: weakref.ref[Lease] | None = (
            None  # its first lease, which another takes the place of when it is reset
        )
        self._seen_tables: list[Tensor | None] = []
        self._seen_states: list[
            Tensor | None
        ] = []  # what the bound cache's states are while they lie in the step's buffers
        self._seen_keeps: list[Any] = []
        self._ahead: _Ahead | None = None
        self.few: FewTokens | None = None

    @functools.cached_property
    def stores(self) -> list[PageStore]:
        """The pools that all of the model's caches lease from, one for each cache class."""
        model, layout = self.model, self.model.program.layout
        return [
            PageStore(spec.k_dim, spec.v_dim, model.dtype, model.device, layout.scheme, lasting=True)
            for spec in layout.classes
        ]

    def step(self, ids: Tensor, cache: EvictionCache) -> Tensor:
        """One token (B, 1) of every row; logits (B, 1, vocabulary)."""
        if self.key_rotation is not None and self.rotates_keys and not cache.keys_rotated:
            self.key_rotation.rotate(cache)
        if self.key_rotation is not None and not self.rotates_keys and not cache.ranks_held:
            self.key_rotation.hold_ranks(cache)
        plan = cache.plan_token()
        step = self._held(cache, plan, 1)
        self._bind(step, cache, plan)
        next_rotary = self._send_rows(step, cache, plan)
        return self._launch(step, ids, cache, plan, next_rotary)

    def few_step(self, ids: Tensor, cache: EvictionCache, plan: StepPlan) -> Tensor:
        """A few tokens (B, T) of every row, which `FewTokens.plan` has planned; logits (B, T, vocabulary)."""
        assert self.few is not None
        count = ids.shape[1]
        step = self._held(cache, plan, width_of(count))
        run = self.few.pass_of(step, width_of(count))
        self._bind(step, cache, plan)
        step.rows.send(cache.row_numbers(plan.segments))
        logits = run(ids)
        cache.commit(plan)
        return logits

    def _held(self, cache: EvictionCache, plan: StepPlan, count: int) -> Step:
        """The step of a cache whose pages for a plan of `count` tokens are leased."""
        self._ahead = None
        cache.hold(plan)
        step = self._steps.get(cache.batch_size)
        if step is None or not step.fits(cache, count):
            self.release()
            self._steps.pop(cache.batch_size, None)
            step = self._steps[cache.batch_size] = self._make(cache, plan)
        return step

    def _send_rows(self, step: Step, cache: EvictionCache, plan: StepPlan) -> list[int] | None:
        """The numbers of each row for the next token. Returns the positions of the new tokens, where they are made
        again."""
        anew = self.key_rotation is not None and not self.rotates_keys
        following = list(cache.length) if anew else None
        step.rows.send(cache.row_numbers(plan.segments, following))
        return following

    def _launch(
        self, step: Step, ids: Tensor, cache: EvictionCache, plan: StepPlan, next_rotary: list[int] | None
    ) -> Tensor:
        """Runs the step; what the host can do about the token after it is done while the device is at work."""
        step.ids.copy_(ids)
        logits = step.one()
        if next_rotary is not None:
            cache.next_rotary, cache.ranks_frozen = next_rotary, [True] * cache.batch_size
        cache.commit(plan)
        self._ahead = self._look_ahead(step, cache)
        return logits

    def _look_ahead(self, step: Step, cache: EvictionCache) -> _Ahead | None:
        """Plans one more token of every row; None where pages have to change for it, or something is to be refused."""
        if any(cache.no_room(row, 1, True) for row in range(cache.batch_size)) or not step.fits(cache):
            return None
        plan = cache.plan_token()
        if not cache.has_room(plan) or self._bound is None or self._bound() is not cache:
            return None
        self._bind(step, cache, plan)
        next_rotary = self._send_rows(step, cache, plan)
        return _Ahead(weakref.ref(cache), cache.version, step, plan, next_rotary)

    def has_planned(self, ids: Tensor | None, cache: EvictionCache | None) -> bool:
        """Whether `ids` can be the token that was planned: of that cache, and nothing happened to it in between."""
        ahead, bound = self._ahead, self._bound
        if ahead is None or bound is None or cache is None or ahead.cache() is not cache or bound() is not cache:
            return False
        same_shape = isinstance(ids, Tensor) and ids.shape == ahead.step.ids.shape
        return same_shape and ahead.version == cache.version

    def planned_step(self, ids: Tensor, cache: EvictionCache) -> Tensor:
        """The same as `step`, where `has_planned`."""
        ahead, self._ahead = self._ahead, None
        assert ahead is not None
        return self._launch(ahead.step, ids, cache, ahead.plan, ahead.next_rotary)

    def _make(self, cache: EvictionCache, plan: StepPlan) -> Step:
        """A step with room to grow: tables as wide as the budgets ask for, or as the answer may, if nothing bounds
        it."""
        widths = []
        for lease, part in zip(cache.leases, plan.classes):
            held = int(lease.bound.max())
            coming = max(ROOM, (cache.max_length or 0) - max(cache.seen), held // 2)
            most = part.budgets.most[:, np.flatnonzero(plan.tokens)]  # rows that rest have no budget
            slots = int(slots_decoded(held, coming, most.max()))
            widths.append(max(2, lease.table.shape[-1], -(-slots // PAGE)) + 1)
        span = max(max(cache.seen) + SPAN_ROOM, cache.max_length or 0)
        return Step(self, cache, widths, -(-span // SPAN_ROOM) * SPAN_ROOM)

    def _bind(self, step: Step, cache: EvictionCache, plan: StepPlan) -> None:
        """Puts a cache's tables, lengths and budgets into the step's buffers, as far as they are not there."""
        if self._bound is None or self._bound() is not cache or not self._is_bound(cache):
            self.release()
            for c, lease in enumerate(cache.leases):
                torch._foreach_copy_(step.lens[c], list(lease.lens.unbind(0)))
                lease.fetch_lens = functools.partial(self._give_back, weakref.ref(cache))
            self._bound, self._lease = weakref.ref(cache), weakref.ref(cache.leases[0])
            self._seen_tables, self._seen_keeps = [None] * len(cache.leases), [None] * len(cache.leases)
            self._seen_states = [None] * len(cache.states)
        for c, (lease, part) in enumerate(zip(cache.leases, plan.classes)):
            keep = part.budgets.keep
            if self._seen_tables[c] is not lease.table:
                step.tables[c][..., : lease.table.shape[-1]].copy_(lease.table)
                self._seen_tables[c] = lease.table
            if self._seen_keeps[c] is not keep:
                step.keeps[c].copy_(to_device(keep.astype(np.int32), cache.device))
                self._seen_keeps[c] = keep
        for i, (state, room) in enumerate(zip(cache.states, step.states)):
            if self._seen_states[i] is not state.value:
                mine = room[:, : state.value.shape[1]] if state.per_token else room
                mine.copy_(state.value)
                state.value = self._seen_states[i] = mine

    def _is_bound(self, cache: EvictionCache) -> bool:
        """Whether the cache that is bound still has what was bound."""
        return self._lease is not None and self._lease() is cache.leases[0]

    def _give_back(self, cache: weakref.ref[EvictionCache]) -> None:
        """Gives a cache its lengths back, if it is bound."""
        if self._bound is not None and self._bound() is cache():
            self.release()

    def release(self) -> None:
        """Gives the bound cache its lengths and states back. It is bound until it has them all: the step of another
        cache for which this is done may be interrupted."""
        cache = None if self._bound is None else self._bound()
        if cache is None or not self._is_bound(cache):  # gone, or reset
            self._bound = None
            return
        step = self._steps[cache.batch_size]
        for lease, lens in zip(cache.leases, step.lens):
            lease._lens.copy_(torch.stack(lens))
        for state, seen in zip(cache.states, self._seen_states):
            if state.value is seen:
                state.value = state.value.clone()
        self._bound = None
        for lease in cache.leases:
            lease.fetch_lens = None
