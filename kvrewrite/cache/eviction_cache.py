"""`EvictionCache`: the state of one request (or batch of requests), over pools of fixed-size pages.

Nothing of a request lives in the model, so requests can be interleaved at will. A slot holds one token of one kv head:
its key, its value, a score (fp32) and two positions (int32: in the text, and the one its key is rotated by). Pages are
leased from a pool per cache class (layers with equal shapes) and returned as soon as eviction leaves them empty.

Threads may share a model and forks of a cache: whatever reads or writes pages holds the model's lock. A step that is
interrupted leaves its own cache unfinished, which is refused until it is reset, and all others as they were.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvrewrite.cache.history import History
from kvrewrite.cache.pages import SLOT_EXTRA, Lease, PageStore, to_device
from kvrewrite.errors import CacheError
from kvrewrite.ir.layout import PAGE, CacheLayout, State
from kvrewrite.policies.base import UNLIMITED, Policy, RowState, Segment

# transformers calls the cache `cache` from 5.24 on, and `past_key_values` before.
CACHE_NAME = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"


# Lists that have an entry for each row of a cache.
PER_ROW = ("seen", "generated", "length", "next_rotary", "settled", "prompted")


class Owner:
    """Who a model is to its caches. lock: held by whoever is in a step of the model or changes one of its caches.

    A copy of a model, deep or pickled, is an owner of its own.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> Any:
        return Owner, ()


def exclusive(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of something with an `owner` that no other thread may disturb. What it makes can be written to anywhere, also
    where the caller is in `torch.inference_mode`."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.owner.lock, torch.inference_mode(False), torch.no_grad():
            return method(self, *args, **kwargs)

    return guarded


@dataclass
class MemoryReport:
    """Bytes of a cache, those of pages that its rows share counted once. live: slots that hold a token; leased: pages in use;
    reserved: what the pools hold; shared: the part of leased that forks of this cache (or rows of it) have, too. text: besides
    these, the ids of what went in, 4 bytes a token, which later calls are compared with; reports are equal without it."""

    live: int
    leased: int
    reserved: int
    shared: int = 0
    text: int = field(default=0, compare=False)


class _State:
    """What a policy remembers beside the slots: a tensor (B, ...) a row, or (B, capacity, ...) that grows with the text."""

    def __init__(self, spec: State, batch: int, device: torch.device):
        self.input, self.per_token, self.slots = spec.input, spec.per_token, spec.slots
        self.shape = tuple(spec.shape)
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.fill, self.batch = float(spec.fill), batch
        lead = (batch, 0) if self.per_token else (0,)  # nothing is held before the first token
        self.value = torch.empty(*lead, *self.shape, dtype=self.dtype, device=device)

    def hold(self, tokens: int) -> None:
        """Makes room for `tokens` tokens of every row."""
        if not self.per_token:
            if not len(self.value):
                self.value = self.value.new_full((self.batch, *self.shape), self.fill)
            return
        have = self.value.shape[1]
        if tokens <= have:
            return
        grown = self.value.new_zeros(self.value.shape[0], max(tokens, have + have // 2, PAGE), *self.shape)
        grown[:, :have] = self.value
        self.value = grown

    def has_room(self, tokens: int) -> bool:
        """Whether `hold` has nothing to do."""
        return self.value.shape[1] >= tokens if self.per_token else bool(len(self.value))

    def room(self, tokens: int) -> Tensor:
        """Another tensor like the one that holds this, for so many tokens."""
        lead = (self.batch, tokens) if self.per_token else (self.batch,)
        return torch.zeros(*lead, *self.shape, dtype=self.dtype, device=self.value.device)

    def live(self, seen: Sequence[int]) -> int:
        """Bytes that mean something, but for slots, which are counted as such."""
        if self.slots:
            return 0
        rows = sum(seen) if self.per_token else sum(n > 0 for n in seen)
        return rows * math.prod(self.shape) * self.dtype.itemsize


class EvictionCache(Cache):
    """A bounded cache for a rewritten model. Make one with `model.new_cache(batch_size)`.

    Passed as `cache` (or `past_key_values`, its older name); transformers' `generate` makes one by itself. `max_length` (tokens
    of prompt and answer) chooses between short and long rotary frequencies where a model has both.
    """

    # Called before every pass through the model, so also between the chunks of a prompt; what it raises ends the call.
    before_chunk: Callable[[], None] | None = None

    is_compileable = False
    is_croppable = False
    lease_type = Lease
    owner: Owner = Owner()  # until it has a model
    _unfinished = False

    def __init__(self, model: Any, batch_size: int, *, max_length: int | None = None):
        Cache.__init__(self, layers=[])  # not that of a class between (`type_for` in backend_cache.py)
        if batch_size < 1:
            raise CacheError(f"batch_size is {batch_size}, expected at least 1")
        self.owner = model.owner
        self.layout: CacheLayout = model.program.layout
        self._rows = batch_size
        self.device, self.dtype = torch.device(model.device), model.dtype
        self.max_length = max_length
        self._model_tables = model.length_tables(max_length)
        self._make_rotary = model.make_rotary
        self._max_positions: int = model.program.max_positions or UNLIMITED
        self._stores: list[PageStore] | None = model.shared_stores()
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
        self.settled = [False] * batch  # contiguous positions: ranks are those that the row decodes with
        self.keys_settled = (
            False  # contiguous positions: keys lie rotated by those ranks (kvrewrite/runtime/decode_graph.py)
        )
        self.ranks_held = False  # contiguous positions: pages hold ranks as decoding keeps them (`Settling.hold_ranks`)
        self._token: tuple[Any, list[np.ndarray]] | None = None  # what the last single token kept, and its budgets
        self._loose = False  # whether heads can have fewer slots than their pages are leased for
        self._unmeasured = 0  # steps since the device was asked how many
        self.prompted = [False] * batch  # whether the row's first prompt is known to be complete (`end_prompt`)
        self.columns = 0  # columns of the caller's ids and masks so far, padding included
        self.history = History(batch)  # what went in, column by column
        self.ended: Tensor | None = None  # (B,) bool: rows that `generate` has ended, which pause from then on
        self.leases: list[Lease] = []
        quantize, scheme = self.layout.quantize, self.layout.scheme
        # Quantized caches: slots from the end of a head that the next token may write to.
        self._rewritten_slots = quantize.residual + 2 * quantize.group if quantize else 0
        for spec in self.layout.classes:
            at = len(self.leases)
            shared = self._stores[at] if self._stores is not None else None
            device = torch.device(spec.device or self.device)
            store = shared or PageStore(spec.k_dim, spec.v_dim, self.dtype, device, scheme)
            self.leases.append(self.lease_type(spec, batch, store))
        # Ragged policies: what each head kept at its last prompt eviction, -1 before there was one.
        self._head_keep = [np.full_like(lease.bound, -1) for lease in self.leases]
        self.states = [_State(s, batch, torch.device(s.device or self.device)) for s in self.layout.states]
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
        self._touch()

    def _touch(self) -> None:
        for lease in self.leases:
            lease.store.begin()

    def record(self, ids: Tensor, real: np.ndarray | None, generated: bool) -> None:
        """Ends a step that took the columns `ids` (B, T), see `History.add`."""
        self.history.add(ids, real, self.columns, generated)
        self.columns += ids.shape[1]
        self.end_step()

    def end_step(self) -> None:
        """The step is complete."""
        for lease in self.leases:
            lease.store.end()
        self._unfinished = False

    @exclusive
    def fork(self) -> EvictionCache:
        """An independent copy that shares this cache's pages until one of the two writes to them (copy on write).

        So a document is compressed once and asked many times: `cache = model.prefill(document)`, then
        `model.generate(..., cache=cache.fork())` for every question.
        """
        self.check_finished()
        self._touch()
        twin: EvictionCache = object.__new__(type(self))
        # Should what follows fail, it must not return this cache's pages.
        twin.__dict__.update(self.__dict__, leases=[])
        for name in PER_ROW:
            setattr(twin, name, list(getattr(self, name)))
        twin.leases = [lease.fork() for lease in self.leases]
        twin.history, twin.ended = self.history.fork(), None
        twin._head_keep = [keep.copy() for keep in self._head_keep]
        twin.states = []
        for state in self.states:
            copied: _State = object.__new__(_State)
            copied.__dict__.update(state.__dict__)
            copied.value = state.value.clone()
            twin.states.append(copied)
        for lease in self.leases:
            lease.store.end()
        return twin

    __copy__ = fork

    def __deepcopy__(self, memo: dict[int, Any]) -> EvictionCache:
        """The same as `fork`: what people do with a cache of transformers to use a prefix again."""
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Not picklable: pages belong to a store that forks share."""
        raise CacheError("an EvictionCache can't be pickled; keep the text and prefill it again")

    def end_prompt(self) -> None:
        """Says that what went through so far is a whole prompt and no piece of one: a policy that evicts once takes more tokens
        from then on, and only adds them. `model.prefill` says it, and so does `generate` after a prompt."""
        self.prompted = [done or seen > 0 for done, seen in zip(self.prompted, self.seen)]

    def row(self, row: int) -> RowState:
        """What a policy's plan may know of a row."""
        return RowState(self.seen[row], self.generated[row], self.length[row])

    # -- what the runtime needs for a step -----------------------------------------------------------------------
    def prepare(
        self, policy: Policy, segments: list[Segment | None], totals: list[int], reserve: int, renew: list[bool] | None
    ) -> dict[str, Tensor]:
        """Leases pages for one step and gives its cache inputs. segments: what each row does (None: nothing); totals: its
        tokens once the prompt at hand is through; renew: rows whose ranks are made anew (contiguous positions)."""
        valid = np.array([s.length if s else 0 for s in segments], dtype=np.int64)
        layers = sum(len(lease.layers) for lease in self.leases)
        order = sorted((layer, c, i) for c, lease in enumerate(self.leases) for i, layer in enumerate(lease.layers))
        keeps = [np.zeros(lease.bound.shape, dtype=np.int64) for lease in self.leases]
        for b, segment in enumerate(segments):
            wanted = [UNLIMITED] * layers
            if segment is not None:
                wanted = policy.layer_keeps(segment, totals[b], layers)
            for number, ((_, c, i), keep) in enumerate(zip(order, wanted, strict=True)):
                keeps[c][i, b] = policy.head_keeps(keep, number, self.leases[c].kv_heads)
        prompt = np.array([s is not None and s.prompt for s in segments])
        self._segments, self._kept_most = segments, [int(max(k[:, b].max() for k in keeps)) for b in range(len(valid))]
        self._after: list[np.ndarray] = []
        self._dealt: list[Tensor | None] = []
        self._dealt_rows: list[np.ndarray] = []
        self._chosen: list[np.ndarray] = []
        self._equal_again: list[np.ndarray] = []
        self._adapts = policy.head_budgets != "equal"
        self._prompt = prompt & policy.ragged
        self._loose |= policy.data_dependent
        if policy.shares_layers and any(s is not None and s.keep < UNLIMITED for s in segments):
            self._unmeasured = PAGE  # much may go at once
        out: dict[str, Tensor] = {}
        for c, lease in enumerate(self.leases):
            out.update(self._prepare_class(c, lease, policy, valid, keeps[c], reserve, renew))
        for state in self.states:
            state.hold(max(n + int(v) for n, v in zip(self.seen, valid)))
            out[state.input] = state.value
        return out

    def _prepare_class(
        self, c: int, lease: Lease, policy: Policy, valid: np.ndarray, keep: np.ndarray, reserve: int,
        renew: list[bool] | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        bound, batch = lease.bound, self.batch_size
        budget = np.minimum(keep, UNLIMITED).astype(np.int32)
        if policy.shares_layers:  # a head may keep more than its part of the sum
            keep = np.full_like(keep, UNLIMITED)
        keep_heads = keep
        fixed = (self._head_keep[c] >= 0) & ~self._prompt[None, :, None] & (keep_heads < UNLIMITED)
        keep_heads = np.where(fixed, self._head_keep[c], keep_heads)
        new = valid[None, :, None]
        window = np.where(lease.windows > 0, lease.windows, UNLIMITED)[:, None, None]
        evicts = (new > 0) & (bound + new > np.minimum(keep_heads, window))
        after = np.where(new > 0, np.minimum(np.minimum(bound + new, keep_heads), window), bound)
        # Prompts whose eviction is ragged: the device deals out pages.
        deals = self._prompt & (valid > 0) & (evicts.any((0, 2)) | policy.gates | policy.data_dependent)
        self._dealt_rows.append(deals)
        # Layers that have to evict: what their heads get holds from then on.
        self._chosen.append(deals[None, :, None] & evicts.any(2, keepdims=True))
        tried = (self._prompt & (valid > 0))[None, :, None] & (keep < UNLIMITED)
        self._equal_again.append(tried & ~evicts.any(2, keepdims=True))
        rewrites = evicts | (lease.windows > 0)[:, None, None] | self.layout.rewrites_slots | policy.data_dependent
        rewrites = rewrites & ~deals[None, :, None]
        if renew is not None:
            rewrites = rewrites | np.array(renew)[None, :, None]
        appends = np.maximum(bound - self._rewritten_slots, 0)
        first = np.where(new > 0, np.where(rewrites, 0, np.where(deals[None, :, None], UNLIMITED, appends)), UNLIMITED)
        lease.unshare(first)
        during = np.where(deals[None, :, None], bound, np.maximum(bound, after))
        lease.resize(during, reserve)
        names = lease.store.shapes
        out = {f"{name}_{c}": getattr(lease.store, name) for name in names}
        if self.layout.ragged:
            most = np.minimum((bound + new).sum(-1), (np.minimum(keep, UNLIMITED // 256) + 1).sum(-1))
            spare, dealt = lease.offer(
                deals, np.where(deals[None], most, 0), int((bound + new)[:, deals].max(initial=0))
            )
            out = {f"{name}_{c}": getattr(lease.store, name) for name in names}  # offering may have grown them
            out[f"spare_{c}"], out[f"next_table_{c}"] = spare, dealt
            self._dealt.append(dealt if deals.any() else None)
            floors = np.where(deals & (policy.head_budgets != "equal"), policy.head_floor, -1.0)
            out[f"floor_{c}"] = to_device(floors, lease.store.device)
        self._after.append(after)
        out[f"table_{c}"], out[f"lens_{c}"] = lease.table, lease.lens
        if not policy.shares_layers:
            budget = np.minimum(keep_heads, UNLIMITED).astype(np.int32)
        out[f"keep_{c}"] = to_device(budget, lease.store.device)
        assert out[f"keep_{c}"].shape == (len(lease.layers), batch, lease.kv_heads)
        return out

    def commit(self) -> None:
        """Records a finished step and returns the pages that it emptied."""
        self._changes += 1
        longest = [-1] * self.batch_size
        measured = self._measure()
        for c, lease in enumerate(self.leases):
            after = self._after[c] if measured is None else np.minimum(self._after[c], measured[c])
            dealt = self._dealt[c] if self._dealt else None
            # A prompt that fits a layer's budget gives its heads equal shares again.
            self._head_keep[c][np.broadcast_to(self._equal_again[c], lease.bound.shape)] = -1
            if dealt is not None:
                lease.settle(dealt)
                after = np.where(self._dealt_rows[c][None, :, None], lease.bound, after)
                if self._adapts:
                    self._head_keep[c] = np.where(self._chosen[c], lease.bound, self._head_keep[c])
            lease.resize(after, 0)
            if dealt is not None and self._stores is None:
                # As much again stays: pages for decoding and for forks. A pool of the model's stays as it is, because the next
                # request needs as much, and what is captured is bound to its place.
                lease.store.compact(lease.leased)
            free = lease.windows == 0
            for b in range(self.batch_size):
                longest[b] = max(longest[b], int(after[free, b].max(initial=-1)))
        for b, segment in enumerate(self._segments):
            if segment is None:
                continue
            self.seen[b] += segment.length
            self.generated[b] = 0 if segment.prompt else self.generated[b] + segment.length
            held = min(self.length[b] + segment.length, self._kept_most[b])
            self.length[b] = held if longest[b] < 0 else longest[b]  # every layer may have a window
            self.next_rotary[b] += segment.length

    def _measure(self) -> list[np.ndarray] | None:
        """How many slots each head has, every PAGE steps where only the device knows (and when layers that share a budget
        evict); else None. Between that, pages are leased for the most that a head can have."""
        self._unmeasured += 1
        if not self._loose or self._unmeasured < PAGE:
            return None
        self._unmeasured = 0
        return [lease.lens.cpu().numpy().astype(np.int64) for lease in self.leases]

    # -- a single token of every row, without inputs for a graph (kvrewrite/runtime/decode_graph.py) --------------------------
    def begin_token(self, policy: Policy, segments: list[Segment]) -> list[np.ndarray]:
        """Leases what one more token of every row needs. Returns the budgets (layers, rows, kv heads) of each class, the same
        arrays as before where nothing has changed."""
        keeps = self._token_keeps(policy, segments)
        self._loose |= policy.data_dependent
        for state in self.states:
            state.hold(max(self.seen) + 1)
        self._after_token: list[np.ndarray] = []
        for lease, keep in zip(self.leases, keeps):
            first, after = self._token_slots(lease, policy, keep)
            if lease.store.is_shared:
                lease.unshare(first)
            lease.resize(np.maximum(lease.bound, after), 0)
            self._after_token.append(after)
        return keeps

    def _token_slots(self, lease: Lease, policy: Policy, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first slot that one more token may write to, and the slots that are held then, both (layers, rows, kv heads)."""
        windows = np.where(lease.windows > 0, lease.windows, UNLIMITED)[:, None, None]
        after = np.minimum(np.minimum(lease.bound + 1, keep), windows)
        rewrites = (lease.bound + 1 > np.minimum(keep, windows)) | (lease.windows > 0)[:, None, None]
        rewrites |= self.layout.rewrites_slots | policy.data_dependent
        rewrites |= self.layout.contiguous and policy.renews_ranks_in_decoding
        return np.where(rewrites, 0, np.maximum(lease.bound - self._rewritten_slots, 0)), after

    def look_ahead(self, policy: Policy, segments: list[Segment]) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
        """What `begin_token` would return, and the slots held after the token, without leasing anything; None where pages have
        to be leased, returned or copied for it."""
        if not all(state.has_room(max(self.seen) + 1) for state in self.states):
            return None
        keeps, held = self._token_keeps(policy, segments), []
        for lease, keep in zip(self.leases, keeps):
            first, after = self._token_slots(lease, policy, keep)
            need = -(-np.maximum(lease.bound, after) // PAGE)
            if not np.array_equal(need, lease.counts) or (lease.store.is_shared and lease.shared_from(first).any()):
                return None
            held.append(after)
        return keeps, held

    @property
    def version(self) -> tuple[int, ...]:
        """Differs as soon as a token went through, rows moved, or pages of the stores did."""
        return (self._changes, *(lease.store.changes for lease in self.leases))

    def begin_planned_token(self, held: list[np.ndarray]) -> None:
        """The same as `begin_token`, with what `look_ahead` found and nothing has changed since."""
        self._after_token = held

    def _token_keeps(self, policy: Policy, segments: list[Segment]) -> list[np.ndarray]:
        """Budgets of every head for this token."""
        steady = policy.layer_budgets == "equal" and type(policy).layer_keeps is Policy.layer_keeps
        key = tuple((s.keep, s.recent) for s in segments)
        steady |= all(s.keep >= UNLIMITED for s in segments)
        if steady and self._token is not None and self._token[0] == key:
            return self._token[1]
        layers = sum(len(lease.layers) for lease in self.leases)
        order = sorted((layer, c, i) for c, lease in enumerate(self.leases) for i, layer in enumerate(lease.layers))
        found = [np.zeros(lease.bound.shape, dtype=np.int64) for lease in self.leases]
        for b, segment in enumerate(segments):
            wanted = policy.layer_keeps(segment, self.seen[b] + 1, layers)
            for number, ((_, c, i), keep) in enumerate(zip(order, wanted, strict=True)):
                found[c][i, b] = policy.head_keeps(keep, number, self.leases[c].kv_heads)
        for budgets, chosen in zip(found, self._head_keep):
            fixed = (chosen >= 0) & (budgets < UNLIMITED)
            budgets[fixed] = chosen[fixed]
        self._token = (key, found)
        return found

    def end_token(self, segments: list[Segment]) -> None:
        """Records that token."""
        self._changes += 1
        free = [-1] * self.batch_size
        measured = self._measure()
        for c, (lease, after) in enumerate(zip(self.leases, self._after_token)):
            after = after if measured is None else np.minimum(after, measured[c])
            lease.resize(after, 0)
            open_layers = lease.windows == 0
            if open_layers.any():
                most = after[open_layers].max(axis=(0, 2))
                free = [max(f, int(m)) for f, m in zip(free, most)]
        for b, segment in enumerate(segments):
            self.seen[b] += 1
            self.generated[b] += 1
            if free[b] < 0:  # every layer has a window
                assert self._token is not None
                most = int(max(keep[:, b].max() for keep in self._token[1]))
                free[b] = min(self.length[b] + segment.length, most)
            self.length[b] = free[b]
            self.next_rotary[b] += 1

    def rotary(self, length: int) -> list[tuple[Tensor, Tensor]]:
        """cos and sin of each rotation for contiguous positions below `length`."""
        if length > self._rotary_length:
            self._rotary_length = max(length, min(2 * self._rotary_length, self._max_positions))
            self._rotary = self._make_rotary(self._rotary_length, self._model_tables)
        return self._rotary

    @property
    def length_tables(self) -> dict[str, Tensor]:
        """Rotary frequencies chosen for this cache's `max_length`."""
        return self._model_tables

    # -- reports -------------------------------------------------------------------------------------------------
    @exclusive
    def memory(self) -> MemoryReport:
        """Bytes that hold tokens, that are leased, that the pools have reserved, and that are shared with forks."""
        self._return_gone()
        live = leased = reserved = shared = 0
        for lease in self.leases:
            live += self._live_bytes(lease)
            leased += lease.leased * lease.store.page_bytes
            reserved += lease.store.total * lease.store.page_bytes
            shared += lease.shared * lease.store.page_bytes
        for state in self.states:
            size = state.value.numel() * state.value.element_size()
            live, leased, reserved = live + state.live(self.seen), leased + size, reserved + size
        return MemoryReport(live, leased, reserved, shared, self.history.nbytes)

    def _return_gone(self) -> None:
        """So that reports do not count pages of caches that are gone. Repairs are left to the next step."""
        for lease in self.leases:
            if lease.store.settled:
                lease.store.begin()
                lease.store.end()

    def _live_bytes(self, lease: Lease) -> int:
        """Bytes of the slots that hold a token: a part of a page, or in a quantized cache's tail."""
        in_pages, tail = lease.lens.cpu().numpy().astype(np.int64), 0
        if self.layout.quantize:
            held = {s.input: s.value for s in self.states}
            quantized = [held[f"state_qlens_{layer}"].cpu().numpy().astype(np.int64) for layer in lease.layers]
            quantized = [
                n if n.size else np.zeros_like(in_pages[0]) for n in quantized
            ]  # nothing before the first token
            tail = int((in_pages - np.stack(quantized)).sum())
            in_pages = np.stack(quantized)
        slots = lease.slots_in_pages(in_pages)
        return slots * lease.store.page_bytes // PAGE + tail * (lease.store.dense_bytes + SLOT_EXTRA)

    @exclusive
    def live_slots(self) -> dict[int, Tensor]:
        """Live slots of each layer that owns a cache: layer -> (B, Hkv) int32."""
        found = {layer: lease.lens[i] for lease in self.leases for i, layer in enumerate(lease.layers)}
        return dict(sorted(found.items()))

    @exclusive
    def positions(self) -> dict[int, list[list[list[int]]]]:
        """Positions in the text that are kept: layer -> row -> kv head -> sorted positions."""
        found = {}
        for lease in self.leases:
            for i, layer in enumerate(lease.layers):
                dense = torch.ops.kvrewrite.read_pages(lease.store.pos_pages, lease.table[i])[..., 0].cpu()
                lens = lease.lens[i].cpu()
                found[layer] = [
                    [sorted(dense[b, h, : lens[b, h]].tolist()) for h in range(lease.kv_heads)]
                    for b in range(self.batch_size)
                ]
        return dict(sorted(found.items()))

    def __repr__(self) -> str:
        memory = self.memory()
        return (
            f"EvictionCache(batch_size={self.batch_size}, seen={self.seen}, live={memory.live} B, leased={memory.leased} "
            f"B, reserved={memory.reserved} B)"
        )

    # -- transformers' Cache -------------------------------------------------------------------------------------
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` that went through, evicted or not: what `generate` slices its ids by."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Sizes for mask code that wants them; the rewritten model builds no masks."""
        return self.columns + query_length, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No limit in columns: eviction bounds the memory."""
        return -1

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not for ordinary models."""
        raise CacheError("an EvictionCache works with a model that kvrewrite made; this one is an ordinary model")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Evicted tokens can't come back, so nothing can be cropped."""
        raise CacheError(
            "an EvictionCache can't be cropped (assisted decoding and prompt lookup need that): evicted tokens are gone"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues from what row beam_idx[i] holds."""
        source = beam_idx.tolist()
        if len(source) != self.batch_size:
            raise CacheError(
                f"reorder_cache: got rows {source}, expected {self.batch_size} numbers below {self.batch_size}"
            )
        self._select(source)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Row i becomes `repeats` rows, which share its pages until they write to them. On a fork, where the rows that there
        are should remain: `rows = cache.fork(); rows.batch_repeat_interleave(3)`."""
        if not isinstance(repeats, int) or repeats < 1:
            raise CacheError(f"batch_repeat_interleave: repeats is {repeats!r}, expected a whole number from 1 on")
        self._select([row for row in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices`, int64 or bool, in that order."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self._select(indices.tolist())

    @exclusive
    def _select(self, source: list[int]) -> None:
        """Row i continues from what row source[i] holds, for as many rows as `source` has."""
        if not source or not all(0 <= s < self.batch_size for s in source):
            raise CacheError(f"got rows {source}, expected at least one, and numbers below {self.batch_size}")
        self.begin_step()
        self._changes += 1
        for i, lease in enumerate(self.leases):
            lease.select(source)
            self._head_keep[i] = self._head_keep[i][:, source]
        for state in self.states:
            state.batch = len(source)
            if len(state.value):
                state.value = state.value[source]
        for name in PER_ROW:
            values = getattr(self, name)
            setattr(self, name, [values[s] for s in source])
        self.history.select(source, self.columns)
        self._rows, self._token, self.ended = len(source), None, None
        self.end_step()

    @property
    def is_initialized(self) -> bool:
        """Whether tokens have gone through."""
        return self.columns > 0

    @property
    def is_sliding(self) -> list[bool]:
        """For code that asks per layer; no layer of it is transformers' own."""
        return []

    @property
    def is_linear(self) -> list[bool]:
        """It holds keys and values, no recurrent state. (transformers takes an empty list for one without any.)"""
        return [False]
