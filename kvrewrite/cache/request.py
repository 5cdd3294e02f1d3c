"""What one request (or a batch of requests) holds: pages, counters of its rows, states, and what went in.

A step is planned (`plan`, which changes nothing), given its pages (`hold`), run by the runtime with `inputs`, and
recorded (`commit`). A slot holds one token of one kv head: its key, its value, a score (fp32) and two positions (int32:
in the text, and the one its key is rotated by). Pages are leased from a pool per class (layers with equal shapes) and
returned as soon as eviction leaves them empty.

Threads may share a model and forks of a cache: whatever reads or writes pages holds the model's lock. A step that is
interrupted leaves its own request unfinished, which is refused until it is reset, and all others as they were.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvrewrite.cache.history import History
from kvrewrite.cache.pages import Lease, PageStore, to_device
from kvrewrite.cache.policy_state import PolicyState
from kvrewrite.cache.rollback import PROMPTS, Turn, only_appends, remembers, why_never
from kvrewrite.cache.slot_plan import Rules, SlotPlanner, StepPlan, head_budgets, pages_of, walk
from kvrewrite.cache.spans import counted
from kvrewrite.errors import CacheError, InputError, KVRewriteError, PoolFull
from kvrewrite.ir.axes import axes_node
from kvrewrite.ir.layout import PAGE, PIN_SPANS, CacheLayout, pin_inputs
from kvrewrite.ir.parallel import Peers
from kvrewrite.policies.base import Policy
from kvrewrite.policies.segments import UNLIMITED, RowState, Segment

WIDE = ("positions", "following")  # row numbers that are int64 to the graph; the others are int32
# Lists that have an entry for each row.
PER_ROW = ("seen", "generated", "length", "next_rotary", "ranks_frozen", "prompted", "first_prompt")
# All lists with an entry for each row: those that are saved, and what matters for going back only.
OF_ROWS = (*PER_ROW, "ahead", "implied", "rope_deltas")


def row_inputs(
    rows: Mapping[str, Tensor], max_positions: int | None, column: Tensor | None = None
) -> dict[str, Tensor]:
    """Graph inputs that come of `Request.row_numbers`, given as tensors (rows,). column: 0 to T - 1 where rows have T
    new tokens."""

    def count(begin: Tensor) -> Tensor:
        return begin[:, None] if column is None else begin[:, None] + column

    inputs = {**rows, "positions": count(rows["positions"])}
    inputs["position_ids"] = count(rows["following"]) if "following" in rows else inputs["positions"]
    if max_positions is not None:  # padding after a row's end may not index out of a table of positions
        inputs["position_ids"] = inputs["position_ids"].clamp(max=max_positions - 1)
    return inputs


def check_pools(steps: Sequence[tuple[Request, StepPlan]]) -> None:
    """Raises PoolFull where pools with a limit have too few pages for all these steps."""
    needs: dict[PageStore, int] = {}
    for request, plan in steps:
        for lease, part in zip(request.leases, plan.classes):
            if lease.store.limit is not None:
                needs[lease.store] = needs.get(lease.store, 0) + lease.pages_wanted(part)
    for store, need in needs.items():
        if need > store.room:
            raise PoolFull(
                f"the step needs {need} pages more, but the pool has room for {store.room:.0f} (its limit is {store.limit}); "
                "end or preempt another request, or give the pool more memory"
            )


class Owner:
    """Who a model is to its caches. lock: held by whoever is in a step of the model or changes one of its caches.

    A copy of a model, deep or pickled, is an owner of its own.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> Any:
        return Owner, ()


def exclusive(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of something with an `owner` that no other thread may disturb. What it makes can be written to anywhere,
    also where the caller is in `torch.inference_mode`."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.owner.lock, torch.inference_mode(False), torch.no_grad():
            return method(self, *args, **kwargs)

    return guarded


class Request:
    """Rows that go through a model together. max_length: tokens that a row will have in all, where RoPE depends on it;
    stores: pools to lease from, one per class, default: the model's, or its own; policy: the model's with another budget."""

    # Called before every pass through the model, so also between the chunks of a prompt; what it raises ends the call.
    before_chunk: Callable[[], None] | None = None
    lease_type = Lease
    owner: Owner = Owner()  # until it has a model
    other_rows: str | None = None  # why rows of this kind of cache never go back in place
    _unfinished = False

    def __init__(
        self,
        model: Any,
        batch_size: int,
        *,
        max_length: int | None = None,
        stores: list[PageStore] | None = None,
        policy: Policy | None = None,
    ):
        if batch_size < 1:
            raise CacheError(f"batch_size is {batch_size}, expected at least 1")
        self.owner = model.owner
        self.layout: CacheLayout = model.program.layout
        self._policy: Policy = policy or model.policy
        parallel = model.program.parallel
        self._peers: Peers | None = None if parallel is None else parallel.peers
        self._rows = batch_size
        self.device, self.dtype = torch.device(model.device), model.dtype
        self.max_length = max_length
        self.length_tables: dict[str, Tensor] = model.length_tables(max_length)  # rotary frequencies for `max_length`
        self.axes = axes_node(model.program.graph) is not None  # whether its rotation has several
        self._make_rotary, self._save = model.make_rotary, model.save_cache
        self._max_positions: int = model.program.max_positions or UNLIMITED
        self._stores: list[PageStore] | None = stores or model.shared_stores()
        self._changes = 0
        self._reset()

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """Rows of this cache."""
        return self._rows

    @exclusive
    def _reset(self) -> None:
        self._changes += 1
        batch = self.batch_size
        self.seen = [0] * batch  # tokens of each row so far
        self.generated = [0] * batch  # of them, those since the last prompt
        self.length = [0] * batch  # most live slots of a layer without a window
        self.next_rotary = [0] * batch  # contiguous positions: that of the row's next token
        self.rope_deltas = [0] * batch  # several axes: by how much the next token's position is more than its index
        self.ranks_frozen = [False] * batch  # contiguous positions: ranks are those that the row decodes with
        # Contiguous positions: whether keys lie rotated by those ranks, and whether pages hold ranks as decoding keeps
        # them (both in kvrewrite/runtime/key_rotation.py).
        self.keys_rotated = self.ranks_held = False
        self._loose = False  # whether heads can have fewer slots than their pages are leased for
        self._unmeasured = 0  # steps since the device was asked how many
        self.prompted = [False] * batch  # whether the row's first prompt is known to be complete (`end_prompt`)
        self.first_prompt = [0] * batch  # its tokens, 0 until it is complete
        self.columns = 0  # columns of the caller's ids and masks so far, padding included
        self.history = History(batch)  # what went in, column by column
        self.pins: list[tuple[tuple[int, int], ...]] = []  # of each row, its pinned spans; [] where no row has any
        self.checkpoints: list[Any] = []  # forks of it at the ends of turns, oldest first
        # Going back in place (kvrewrite/cache/rollback.py). firm: columns that can't be taken back; ahead: of each row,
        # tokens beyond those it has now that it once had; turns: the newest steps of several tokens.
        self.why_never = self.other_rows or why_never(self.layout, self._policy)
        self.only_appends = only_appends(self._policy)
        self._leaves_traces = remembers(self.layout)
        self.firm, self._final = 0, False
        self.turns: list[Turn] = []
        self.ahead, self._before = [0] * batch, Turn(0, (0,) * batch)
        self.implied = [
            0
        ] * batch  # columns of a row when more of a text after an answer said that its first prompt was complete
        self.marking = False  # whether the next prompt's end becomes one of them
        self.ended: Tensor | None = None  # (B,) bool: rows that `generate` has ended, which pause from then on
        self.leases: list[Lease] = []
        quantize, scheme = self.layout.quantize, self.layout.scheme
        for c, spec in enumerate(self.layout.classes):
            shared = self._stores[c] if self._stores is not None else None
            device = torch.device(spec.device or self.device)
            store = shared or PageStore(spec.k_dim, spec.v_dim, self.dtype, device, scheme)
            self.leases.append(self.lease_type(spec, batch, store))
        # What heads that compete kept at their last prompt's eviction, -1 before there was one. Never changed in place.
        self._shares = [np.full_like(lease.bound, -1) for lease in self.leases]
        self._dealt: dict[int, Tensor] = {}  # tables that the device fills in during a step, by class
        tail = quantize.residual + 2 * quantize.group if quantize else 0
        self._rules = Rules(self.layout.rewrites_slots, tail)
        if self._peers is not None:
            anyone = functools.partial(self._peers.any, device=self.device)
            self._rules = replace(self._rules, ranks=self._peers.ranks, anyone=anyone)
        self._planner = SlotPlanner(self._policy, self._rules, self.leases)
        # Columns from which on layers with a window lose nothing (`keep_windows`), None: they do.
        self.windows_from: int | None = None
        self.states = [PolicyState(s, batch, torch.device(s.device or self.device)) for s in self.layout.states]
        self._rotary: list[tuple[Tensor, Tensor]] = []
        self._rotary_length = 0
        self._unfinished = False

    @exclusive
    def reset(self) -> None:
        """Forgets everything and returns the memory. Forks of this cache keep what they have."""
        self._unfinished = True
        self._touch()
        for lease in self.leases:
            lease.close()
            lease.store.end()
        self._reset()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:  # module globals may be gone by then
        if not finalizing():
            for lease in self.__dict__.get("leases", ()):
                lease.abandon()

    # -- steps, which may be interrupted ---------------------------------------------------------------------------
    def check_finished(self) -> None:
        """Raises CacheError after a step that was interrupted."""
        if self._unfinished:
            raise CacheError(
                "a step of this cache was interrupted (by an exception, Ctrl-C, or because memory ran out), so some layers have "
                "its tokens and others don't. Call reset() and pass the whole text again, or go on from a fork() made before"
            )

    def begin_step(self) -> None:
        """Until `end_step` this cache is unfinished."""
        self.check_finished()
        self._unfinished = True
        self._before = Turn(self.columns, tuple(self.generated))
        self._touch()

    def _touch(self) -> None:
        for lease in self.leases:
            lease.store.begin()

    def record(self, ids: Tensor, real: np.ndarray | None, generated: bool) -> None:
        """Ends a step that took the columns `ids` (B, T), see `History.add`."""
        if real is not None or ids.shape[1] > 1:
            self.turns = [*self.turns[1 - PROMPTS :], self._before]
            # Columns in which a row had paused have gone in late.
            self._final |= real is not None and not np.array_equal(
                real[:, : self.columns], self.history.real(self.columns)
            )
        self.history.add(ids, real, self.columns, generated)
        self.columns += ids.shape[1]
        if self._final:
            self.firm, self._final, self.turns = self.columns, False, []
        self.end_step()

    def turn_on(self, row: int, position: int) -> None:
        """The rotation of a row, which has several axes, goes on at a position. Tokens of this step can't be taken back then."""
        self.rope_deltas[row], self._final = position - self.seen[row], True

    def end_step(self) -> None:
        """The step is complete."""
        for lease in self.leases:
            lease.store.end()
        self._unfinished = False

    def end_prompt(self) -> None:
        """Says that what went through so far is a whole prompt and no piece of one: a policy that evicts once takes
        more tokens from then on, and only adds them. `model.prefill` says it, and so does `generate` after a prompt."""
        self.prompted = [done or seen > 0 for done, seen in zip(self.prompted, self.seen)]
        self.first_prompt = [known or seen for known, seen in zip(self.first_prompt, self.seen)]

    def keep_windows(self, on: bool) -> None:
        """Whether layers with a window keep, from here on, what no later token sees, so that tokens can be taken back. They
        lose it with the next step after that is over."""
        if on == (self.windows_from is not None) or not any(lease.windows.any() for lease in self.leases):
            return
        self.windows_from = self.columns if on else None
        self._planner = SlotPlanner(self._policy, replace(self._rules, windows=not on), self.leases)
        self._changes += 1

    # -- rows ----------------------------------------------------------------------------------------------------
    def row(self, row: int) -> RowState:
        """What a policy's plan may know of a row."""
        return RowState(self.seen[row], self.generated[row], self.length[row], self.first_prompt[row] or None)

    def segments(self, row: int, count: int, decoding: bool) -> list[Segment]:
        """What `count` new tokens of a row do. decoding: whether the row goes on by one token."""
        if not count:
            return []
        state, policy = self.row(row), self._policy_of(row)
        found = [policy.decode_segment(state)] if decoding else policy.passes(count, state)
        return [replace(segment, keep=UNLIMITED) for segment in found] if self.only_appends else found

    def next_token(self, row: int) -> Segment | None:
        """What one more token of a row does; None: the row rests."""
        segment = self._policy_of(row).decode_segment(self.row(row))
        return replace(segment, keep=UNLIMITED) if self.only_appends and segment.keep < UNLIMITED else segment

    def _policy_of(self, row: int) -> Policy:
        return self._policy

    def no_room(self, row: int, count: int, decoding: bool) -> KVRewriteError | None:
        """The reason why a row can't take `count` more tokens, or None."""
        policy, limit, total = self._policy_of(row), self._max_positions, self.seen[row] + count
        if limit < UNLIMITED and (reach := self._reach(row, count, decoding)) > limit:
            return InputError(
                f"row {row} would reach position {reach - 1}, but the model has {limit} positions; expected at most {limit} "
                "tokens at a time (a table of positions can't be extended)"
            )
        first = not decoding and not self.first_prompt[row]
        if first and (problem := policy.why_no_prompt(total)) is not None:
            return CacheError(f"row {row}: {problem}")
        if policy.capacity is not None and total > policy.capacity:
            return CacheError(
                f"row {row} would hold {total} tokens, but the full cache's capacity (budget) is {policy.budget}; use a "
                "larger budget or a policy that evicts"
            )
        return self._no_room_for_pins(row, count, decoding) if self.pins else None

    def _no_room_for_pins(self, row: int, count: int, decoding: bool) -> CacheError | None:
        """The reason why an eviction of `count` more tokens could not keep what is pinned in a row, or None."""
        policy, seen, held = self._policy_of(row), self.seen[row], self.length[row]
        total, order = seen + count, sorted((layer, n.kv_heads) for n in self.layout.classes for layer in n.layers)
        # Rounding may take a slot from a head where heads compete (Ada-KV).
        spare = math.ceil(1 / policy.head_floor) if policy.head_budgets != "equal" and policy.head_floor else 0
        for segment in self.segments(row, count, decoding):
            seen, held = seen + segment.joins, held + segment.joins
            keep = min(k for layer in head_budgets(policy, segment, total, [n for _, n in order]) for k in layer)
            dealt = [int(s[:, row][s[:, row] >= 0].min(initial=keep)) for s in self._shares]
            keep = keep if policy.shares_layers or segment.keep >= UNLIMITED else min(keep, *dealt)
            pinned = counted(self.pins[row], policy.sinks, max(policy.sinks, seen - segment.recent))
            if held > keep and pinned + policy.sinks + segment.recent + spare > keep:
                return CacheError(
                    f"row {row} has {pinned} pinned tokens besides {policy.sinks} first and {segment.recent} newest ones that "
                    f"{policy.name} protects{f' ({spare} spare, since heads compete)' if spare else ''}, and a head keeps "
                    f"{keep} slots; pin less, or use a larger budget"
                )
            held = min(held, segment.keep)
        return None

    def _reach(self, row: int, count: int, decoding: bool) -> int:
        """One more than the largest position that `count` new tokens of a row will have."""
        if not self.layout.contiguous:
            again = 0
            if self._policy.repeats_prompt and not decoding:  # a repetition stands after the prompt
                again = max((s.length for s in self.segments(row, count, decoding) if s.again), default=0)
            return self.seen[row] + count + again
        if decoding and self.ranks_frozen[row] and not self._policy.renews_ranks_in_decoding:
            return self.next_rotary[row] + count
        steps = walk(self.segments(row, count, decoding), self.length[row])
        return max((during for during, _ in steps), default=0)

    def row_numbers(
        self, segments: Sequence[Segment | None], following: list[int] | None = None
    ) -> dict[str, list[int]]:
        """What the host tells the graph about each row. positions: that of its first new token in the text; following:
        the one that its key is rotated by (contiguous positions; None: `next_rotary`); valid: new tokens; recent: newest
        slots that are protected; and the policy's own numbers. None among `segments`: a row that does nothing."""
        numbers = {
            "positions": self.seen,
            "valid": [s.length if s else 0 for s in segments],
            "recent": [s.recent if s else 0 for s in segments],
        }
        if self.layout.contiguous:
            numbers["following"] = self.next_rotary if following is None else following
        elif self.axes:
            numbers["following"] = [n + delta for n, delta in zip(self.seen, self.rope_deltas)]
        for name in self.layout.row_inputs:
            numbers[name] = [s.values.get(name, 0) if s else 0 for s in segments]
        if self.pins:
            for i, spec in enumerate(pin_inputs()):
                which, end = i % PIN_SPANS, i // PIN_SPANS
                numbers[spec.name] = [spans[which][end] if which < len(spans) else 0 for spans in self.pins]
        return numbers

    # -- steps: plan, hold, run, commit --------------------------------------------------------------------------
    def plan(
        self,
        segments: Sequence[Segment | None],
        totals: Sequence[int] | None = None,
        renew: Sequence[bool] | None = None,
    ) -> StepPlan:
        """What a step does to the slots; changes nothing. segments: what each row does (None: nothing); totals: its
        tokens once the prompt at hand is through, None: once this step is; renew: rows whose ranks are computed again
        (contiguous positions)."""
        if totals is None:
            totals = [seen + (s.length if s is not None else 0) for seen, s in zip(self.seen, segments)]
        return self._planner.plan(self.leases, self._shares, segments, totals, renew)

    def plan_token(self) -> StepPlan:
        """The plan of one more token of every row that does not rest, from static buffers, where ranks are computed again
        or were frozen before."""
        segments = [self.next_token(row) for row in range(self._rows)]
        anew = self.layout.contiguous and self._policy.renews_ranks_in_decoding
        return self.plan(segments, renew=[True] * self._rows if anew else None)

    def has_room(self, plan: StepPlan) -> bool:
        """Whether `hold` has nothing to lease, return or copy."""
        if self.states and not all(state.has_room(plan.longest(self.seen)) for state in self.states):
            return False
        for lease, part in zip(self.leases, plan.classes):
            if not np.array_equal(pages_of(part.during), lease.counts):
                return False
            if lease.store.is_shared and lease.shared_from(part.first_written).any():
                return False
        return True

    def hold(self, plan: StepPlan, reserve: int = 0) -> None:
        """Leases what a step needs, besides what the device deals out. reserve: slots per head that pools should have
        room for when they grow anyway. Raises PoolFull, and changes nothing, where a pool with a limit has too few."""
        check_pools([(self, plan)])
        for state in self.states:
            state.hold(plan.longest(self.seen), self.max_length or 0)
        for lease, part in zip(self.leases, plan.classes):
            if lease.store.is_shared:
                lease.unshare(part.first_written)
            lease.resize(part.during, reserve)

    def inputs(self, plan: StepPlan) -> dict[str, Tensor]:
        """The cache inputs of the program's graph for a step whose pages are held; offers pages where they are dealt
        out."""
        out: dict[str, Tensor] = {}
        policy, self._dealt = self._policy, {}
        for c, (lease, part) in enumerate(zip(self.leases, plan.classes)):
            device = lease.store.device
            if self.layout.ragged:
                spare, dealt = lease.offer(part.deals, part.dealt_slots, part.dealt_most)
                out[f"spare_{c}"], out[f"next_table_{c}"] = spare, dealt
                if part.deals.any():
                    self._dealt[c] = dealt
                floors = np.where(part.deals & (policy.head_budgets != "equal"), policy.head_floor, -1.0)
                out[f"floor_{c}"] = to_device(floors, device)
            out.update(self.class_inputs(c))
            out[f"keep_{c}"] = to_device(part.budgets.keep.astype(np.int32), device)
        # After `lens`, with which a decoding graph gives back the states, too.
        out.update({state.input: state.value for state in self.states})
        return out

    def class_inputs(self, c: int) -> dict[str, Tensor]:
        """Pools, page table and lengths of a class."""
        lease = self.leases[c]
        pools = {f"{name}_{c}": getattr(lease.store, name) for name in lease.store.shapes}
        return {**pools, f"table_{c}": lease.table, f"lens_{c}": lease.lens}

    def commit(self, plan: StepPlan) -> None:
        """Records a finished step and returns the pages that it emptied."""
        self._changes += 1
        self._final |= not self.only_appends and (self._leaves_traces or plan.limited)
        longest = [-1] * self.batch_size  # of layers without a window
        measured, shares = self._measure(plan), []
        competes = self._policy.head_budgets != "equal"
        for c, (lease, part) in enumerate(zip(self.leases, plan.classes)):
            after = part.after if measured is None else np.minimum(part.after, measured[c])
            dealt = self._dealt.pop(c, None)
            if dealt is not None:
                lease.take_dealt(dealt)
                after = part.with_dealt(after, lease.bound)
            if plan.ragged:
                given = lease.bound if dealt is not None and competes else None
                shares.append(part.next_shares(self._shares[c], given))
            lease.resize(after, 0)
            if dealt is not None and self._stores is None:
                # As much again stays: pages for decoding and for forks. A pool of the model's stays as it is, because
                # the next request needs as much, and what is captured is bound to its place.
                lease.store.compact(lease.leased)
            free = after[lease.windows == 0]
            if free.size:
                longest = [max(have, most) for have, most in zip(longest, free.max(axis=(0, 2)).tolist())]
        if plan.ragged:
            self._shares = shares
        for row, segment in enumerate(plan.segments):
            if segment is None:
                continue
            if not segment.prompt:
                self.first_prompt[row] = self.first_prompt[row] or self.seen[row]
            self.seen[row] += segment.joins
            self.generated[row] = 0 if segment.prompt else self.generated[row] + segment.joins
            if longest[row] < 0:  # every layer has a window
                longest[row] = min(self.length[row] + segment.joins, plan.most_kept(row))
            self.length[row] = longest[row]
            self.next_rotary[row] += segment.joins

    def _measure(self, plan: StepPlan) -> list[np.ndarray] | None:
        """How many slots each head has, every PAGE steps where only the device knows (and when layers that share a
        budget evict); else None. Between that, pages are leased for the most that a head can have."""
        self._loose |= plan.loose
        self._unmeasured += 1
        evicts = any(s is not None and s.keep < UNLIMITED for s in plan.segments)
        soon = self._policy.shares_layers and evicts  # much may go at once
        if not self._loose or not (soon or self._unmeasured >= PAGE):
            return None
        self._unmeasured = 0
        return [lease.lens.cpu().numpy().astype(np.int64) for lease in self.leases]

    @property
    def version(self) -> tuple[int, ...]:
        """Differs as soon as a token went through, rows moved, or pages of the stores did."""
        return (self._changes, *(lease.store.changes for lease in self.leases))

    def rotary(self, length: int) -> list[tuple[Tensor, Tensor]]:
        """cos and sin of each rotation for contiguous positions below `length`."""
        if length > self._rotary_length:
            self._rotary_length = max(length, min(2 * self._rotary_length, self._max_positions))
            self._rotary = self._make_rotary(self._rotary_length, self.length_tables)
        return self._rotary
