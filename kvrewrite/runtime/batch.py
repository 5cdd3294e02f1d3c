"""Many requests on one model, each with an answer that does not depend on the others.

A `Batch` leases the pages of all its requests from one pool. Each request computes its prompt by itself, segment by segment of
its own policy, so that what is kept does not depend on a schedule; then it decodes together with the others, one row each
(`kvrewrite/cache/joined.py`), from static buffers where the model is compiled. Whoever drives it decides who is next:
`kvrewrite/serving/scheduler.py` does, and the vLLM plug-in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.cache.joined import JoinedRows
from kvrewrite.cache.pages import PageStore, to_device
from kvrewrite.cache.request import check_pools, exclusive
from kvrewrite.cache.slot_plan import pages_of, prompt_slots, slots_decoded
from kvrewrite.errors import CacheError, InputError, KVRewriteError, OptionError, PoolFull
from kvrewrite.policies import UNLIMITED, Policy, RowState, Segment
from kvrewrite.runtime.call import Call, Tokens, advance, check_ids
from kvrewrite.runtime.key_rotation import KeyRotation
from kvrewrite.runtime.model import RewrittenModel, on_its_device
from kvrewrite.runtime.saved_cache import load_cache


def _tables(cache: EvictionCache) -> tuple[int, ...]:
    """Which rotary frequencies a cache has: those with the same can go through the graph together."""
    return tuple(id(table) for table in cache.length_tables.values())


def rows_for(requests: int) -> int:
    """Rows of the step that so many requests decode in: 1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128, 160, ... A step is captured
    for each number of rows, so there are few, and it costs what its rows cost, so few of them rest."""
    size = 1 << max(0, requests - 1).bit_length()  # the power of two that is enough
    step = max(16, size // 8)
    return size if size <= 16 else -(-requests // step) * step


# Segments of at most so many tokens go through the model with others that are about as long: they cost less together. Longer ones
# do not: their passes are captured one by one only (four of 1024 tokens took twice the time together, on an H200).
SHORT, TOGETHER = 512, 8


def side_by_side(length: int) -> int:
    """How many prompts' segments of `length` tokens should at most go through the model together."""
    return TOGETHER if length <= SHORT else 1


def goes_on_by_a_token(count: int) -> bool:
    """Whether so many tokens after a document are decoded, and no prompt: as in `forward`."""
    return count == 1


def first_segments(document: EvictionCache, tokens: int) -> list[Segment]:
    """What the tokens of a text of `tokens` that begins with a document do after it."""
    count = tokens - document.seen[0]
    return document.segments(0, count, goes_on_by_a_token(count))


class Running:
    """A request in a `Batch`. cache: what it holds while its prompt is computed; prompt_left: segments still to come."""

    def __init__(self, cache: EvictionCache, call: Call | None):
        self.cache: EvictionCache | None = cache
        self.call = call
        self.group: _Group | None = None  # where it decodes
        self.row = -1

    @property
    def prompt_left(self) -> int:
        """Segments of its prompt that are still to be computed."""
        return 0 if self.call is None else self.call.passes - self.call.step

    @property
    def next_segment(self) -> int:
        """Tokens of the segment that comes next, 0 once its prompt is through."""
        return 0 if self.call is None else self.call.plans[0][self.call.step].length

    @property
    def ended(self) -> bool:
        """Whether it has left its batch."""
        return self.cache is None and self.group is None

    @property
    def seen(self) -> int:
        """Tokens that went through."""
        if self.group is not None:
            return self.group.rows.seen[self.row]
        return 0 if self.cache is None else self.cache.seen[0]

    def no_room(self) -> KVRewriteError | None:
        """The reason why it can't have another token, or None."""
        if self.group is not None:
            return self.group.rows.no_room(self.row, 1, True)
        return None if self.cache is None else self.cache.no_room(0, 1, True)

    def positions(self) -> dict[int, list[list[int]]]:
        """Positions in the text that are kept: layer -> kv head -> sorted positions."""
        if self.group is not None:
            return {layer: rows[self.row] for layer, rows in self.group.rows.positions().items()}
        return {} if self.cache is None else {layer: rows[0] for layer, rows in self.cache.positions().items()}


class _Group:
    """Requests that decode in one step: those with the same rotary frequencies."""

    def __init__(self, rows: JoinedRows):
        self.rows = rows
        self.members: list[Running | None] = [None] * rows.batch_size
        self._index: tuple[list[int], Tensor] = ([], torch.empty(0, dtype=torch.int64))

    def index(self, rows: list[int]) -> Tensor:
        """Numbers of rows on the device; they are sent once as long as they stay."""
        if self._index[0] != rows:
            self._index = (rows, to_device(rows, self.rows.device))
        return self._index[1]

    def free_row(self) -> int:
        """A row without a request; there are more rows if none is left."""
        if None not in self.members:
            size = rows_for(len(self.members) + 1)
            self.members.extend([None] * (size - len(self.members)))
            self.rows.widen(size)
        return self.members.index(None)

    def choose(self, taking: list[int]) -> None:
        """The rows of the next step; the others rest."""
        chosen = set(taking)
        self.rows.rest([row not in chosen for row in range(self.rows.batch_size)])

    def check_room(self, taking: list[int]) -> None:
        """Raises what the cache says where one of these rows can't take a token."""
        for row in taking:
            if problem := self.rows.no_room(row, 1, True):
                raise problem

    def shrink(self) -> None:
        """Fewer rows, where a quarter of them would do: a step costs what its rows cost. As many again stay free, so that
        rows don't come and go with every request."""
        taken = sum(m is not None for m in self.members)
        size = rows_for(max(1, 2 * taken))
        if 4 * taken > len(self.members) or size >= len(self.members):
            return
        holding = [row for row, m in enumerate(self.members) if m is not None]
        free = [row for row, m in enumerate(self.members) if m is None]
        source = (holding + free)[:size]
        self.rows.narrow(source)
        self.members = [self.members[row] for row in source]
        for row, member in enumerate(self.members):
            if member is not None:
                member.row = row


class Batch:
    """Requests of one model that join and leave between steps. memory: bytes for pages, taken at once; None: as they are
    needed, without a limit."""

    def __init__(self, model: RewrittenModel, *, memory: int | None = None):
        heads_differ = model.program.layout.ragged or model.policy.head_pattern
        if memory is not None and model.program.parallel is not None and heads_differ:
            raise OptionError(
                f"with {model.policy.name}, heads of different processes keep different numbers of slots, so one process's "
                "memory would be full before the others'; a batch of it takes no memory limit with tensor parallelism"
            )
        if model.policy.recalls:
            raise OptionError(
                f"{model.policy.name} has a memory of every row in host memory, which requests that join and leave would "
                "move; use `generate`, or serve a policy that evicts"
            )
        if not model.on_one_device:
            raise OptionError("a batch of requests needs a model on one device, and this one lies on several")
        self.model, self.owner = model, model.owner
        layout = model.program.layout
        self.stores = model.shared_stores() or [
            PageStore(c.k_dim, c.v_dim, model.dtype, model.device, layout.scheme, lasting=True) for c in layout.classes
        ]
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._running: set[Running] = set()
        self._documents = [0] * len(self.stores)  # pages of documents, which stay
        if memory is not None:
            self._limit(memory)

    @property
    def gpu(self) -> int | None:
        """The number of the model's GPU, if it has one."""
        return self.model.gpu

    # -- memory ------------------------------------------------------------------------------------------------------
    def _limit(self, memory: int) -> None:
        """Divides memory among the pools, so that each has room for as many slots of its heads."""
        classes = self.model.program.layout.classes
        heads = [len(c.layers) * c.kv_heads for c in classes]
        least = sum(n * store.page_bytes for n, store in zip(heads, self.stores))
        each = memory // max(1, least)
        if each < 1:
            raise OptionError(
                f"memory is {memory} bytes, expected at least {least}: one page for each head of the model"
            )
        for n, store in zip(heads, self.stores):
            store.limit = 1 + n * each
            store.reserve(store.limit)

    @property
    def used(self) -> float:
        """The share of its pages that is leased, of the fullest pool."""
        return max((1 - len(s.free) / max(1, s.total - 1) for s in self.stores), default=0.0)

    @property
    def room(self) -> list[float]:
        """Pages of each pool that there are for requests."""
        return [np.inf if s.limit is None else s.limit - 1 - kept for s, kept in zip(self.stores, self._documents)]

    def pages_needed(
        self, prompt: int, total: int, policy: Policy | None = None, document: EvictionCache | None = None
    ) -> tuple[list[int], list[int]]:
        """Pages of each pool that a request alone needs at most: while its prompt of so many tokens is computed, and from
        then on until it has `total` tokens. document: what the prompt begins with, whose pages a request has copies of
        as soon as it evicts."""
        policy = policy or self.model.policy
        classes = self.model.program.layout.classes
        order = sorted((layer, c, w) for c, k in enumerate(classes) for layer, w in zip(k.layers, k.windows))
        heads, windows = [classes[c].kv_heads for _, c, _ in order], [w for *_, w in order]
        if document is None:
            segments = policy.passes(prompt)
            slots = prompt_slots(policy, segments, heads, windows)
        else:
            segments = first_segments(document, prompt)
            bound = {layer: lease.bound[i, 0] for lease in document.leases for i, layer in enumerate(lease.layers)}
            begun = [bound[layer] for layer, *_ in order]
            slots = prompt_slots(policy, segments, heads, windows, begun, document.seen[0])
        keep = policy.decode_segment(RowState(seen=max(prompt, total - 1))).keep
        lengths = np.array([s.joins for s in segments])[:, None]
        most, later = [0] * len(classes), [0] * len(classes)
        for (_, c, window), held in zip(order, slots):
            before, after = held[:-1], held[1:]
            end = slots_decoded(held[-1] + 1, max(0, total - prompt), min(keep, UNLIMITED), window or UNLIMITED)
            if policy.ragged:  # by layers, where the last page of each head may be nearly empty
                joined = before + lengths if policy.shares_layers or window else np.minimum(before + lengths, after + 1)
                held_pages, dealt, decoding = (
                    pages_of(np.atleast_2d(x).sum(-1)) + held.shape[1] for x in (before, joined, end)
                )
                during, decoding = int((held_pages + dealt).max(initial=0)), int(decoding.max())
            else:  # what goes is never in the pool: a step writes what stays
                during, decoding = (int(pages_of(np.atleast_2d(x)).sum(-1).max(initial=0)) for x in (held, end))
            most[c] += max(during, decoding)
            later[c] += decoding
        return most, later

    def check_fits(
        self, prompt: int, total: int, policy: Policy | None = None, document: EvictionCache | None = None
    ) -> None:
        """Raises InputError for a request that would not fit if it were alone. Arguments: those of `pages_needed`."""
        for need, room in zip(self.pages_needed(prompt, total, policy, document)[0], self.room):
            if need > room:
                raise InputError(
                    f"a prompt of {prompt} tokens and {total} in all need {need} pages, but the pool has {room:.0f}; "
                    "shorten it, use a smaller budget or chunk, or give the pool more memory"
                )

    # -- documents -----------------------------------------------------------------------------------------------------
    @exclusive
    @on_its_device
    def load_document(self, path: str | Path) -> EvictionCache:
        """A saved cache of one row in the pools of this batch, where it stays: what requests can begin with.

        Raises CacheError for one that requests can't go on from, and what `load_cache` raises.
        """
        cache = load_cache(self.model, path, stores=self.stores)
        if cache.batch_size != 1:
            raise CacheError(f"{path} has {cache.batch_size} rows, and a request goes on from one; save each by itself")
        if cache.pins:
            raise CacheError(
                f"{path} has pinned spans, and a request with pins can't decode together with others; unpin() them before it "
                "is saved, or ask it with kvrewrite generate --cache"
            )
        if self.model.policy.whole_prompt and not (cache.prompted[0] or cache.generated[0]):
            raise CacheError(
                f"{path} ends in the middle of a prompt, which {self.model.policy.name} reads whole; save what prefill() returns"
            )
        if cache.keys_rotated:
            KeyRotation(self.model).undo(cache)
        cache.ranks_held = False
        self._documents = [kept + lease.leased for kept, lease in zip(self._documents, cache.leases)]
        return cache

    # -- requests ------------------------------------------------------------------------------------------------------
    @exclusive
    @on_its_device
    def start(
        self,
        ids: Sequence[int] | Tensor,
        *,
        max_length: int | None = None,
        budget: int | None = None,
        prefix: EvictionCache | None = None,
        document: EvictionCache | None = None,
    ) -> Running:
        """A request with this prompt; nothing is computed yet. max_length: tokens of prompt and answer, where RoPE depends on
        it; budget: instead of the policy's; prefix: a cache that holds the beginning of the prompt, of which a fork is used;
        document: the same, of `load_document`: what follows is a prompt of its own, as `generate` reads it.

        Raises InputError for ids that the model can't take, OptionError for a budget that the policy can't have.
        """
        policy = self.policy(budget)
        tokens = torch.as_tensor(ids, dtype=torch.int64).reshape(1, -1)
        if not tokens.shape[1]:
            raise InputError("the prompt has no tokens, expected at least one")
        # On the host, where it has them: looking at them on a GPU waits for the prompt before this one.
        check_ids(tokens, self.model.program.vocab_size, decoding=False)
        if tokens.device != self.model.device:
            tokens = to_device(tokens, self.model.device)
        self.check_fits(tokens.shape[1], max(max_length or 0, tokens.shape[1]), policy, document)
        begun = prefix if document is None else document
        if begun is None:
            cache = EvictionCache(self.model, 1, max_length=max_length, stores=self.stores, policy=policy)
        else:
            cache = begun.fork()
            if not cache.length_tables:  # otherwise it has those that the beginning was computed with
                cache.max_length = max_length
            tokens = tokens[:, cache.seen[0] :]
        count = tokens.shape[1]
        decodes = document is not None and goes_on_by_a_token(count)
        if problem := cache.no_room(0, count, decodes):
            raise problem
        call = Call(self.model, Tokens(tokens, 0, [np.arange(count)], None, [decodes]), cache, 1)
        running = Running(cache, call)
        self._running.add(running)
        return running

    def policy(self, budget: int | None) -> Policy:
        """The model's policy with another budget, None: its own. Raises OptionError where a request can't have one."""
        policy = self.model.policy
        if budget is None or budget == policy.budget:
            return policy
        if policy.layer_budgets not in ("equal", "pyramid") or policy.head_pattern:
            raise OptionError(
                f"budget={budget}: the model's policy has budgets for each layer or head, which a request can't change"
            )
        return dataclasses.replace(policy, budget=budget)

    def advance(self, request: Running) -> Tensor | None:
        """`advance_together` of one request."""
        return self.advance_together([request])[0]

    @exclusive
    @on_its_device
    def advance_together(self, requests: Sequence[Running]) -> list[Tensor | None]:
        """Computes the next segment of each of these prompts, side by side; of each the logits (vocabulary) after its last
        segment, else None. Rows of unequal length are filled up, so segments of similar length should go together.
        Raises PoolFull, with nothing changed, where pages are short."""
        calls: dict[tuple[int, ...], list[Call]] = {}
        for request in requests:
            if request.cache is None or request.call is None:
                raise CacheError("expected a request whose prompt is not through yet and that has not ended")
            calls.setdefault(_tables(request.cache), []).append(request.call)
        if len(calls) > 1:  # so that nobody has gone on if pages are short for some
            check_pools([(call.cache, call.next_pass().plan) for group in calls.values() for call in group])
        for group in calls.values():
            for call in group:
                call.cache.begin_step()
            try:
                advance(group)
            except PoolFull:
                for call in group:
                    call.cache.end_step()
                raise
            for call in group:
                call.cache.end_step()
        return [self._prompt_logits(request) for request in requests]

    @staticmethod
    def _prompt_logits(request: Running) -> Tensor | None:
        call = request.call
        if call is None or not call.finished:
            return None
        request.call = None
        call.cache.end_prompt()
        return call.logits[0, -1]

    @exclusive
    def fork(self, running: Running) -> Running:
        """Another request that goes on from the same prompt, before either decodes."""
        if running.cache is None or running.call is not None:
            raise CacheError(
                "expected a request whose prompt is through, before its first token; others can't be forked"
            )
        twin = Running(running.cache.fork(), None)
        self._running.add(twin)
        return twin

    @exclusive
    def end(self, running: Running) -> None:
        """A request leaves; its pages are free."""
        if running.group is not None:
            running.group.rows.clear(running.row)
            running.group.members[running.row] = None
            running.group.shrink()
        elif running.cache is not None:
            running.cache.reset()
        running.cache = running.group = running.call = None
        self._running.discard(running)

    # -- one token of each ---------------------------------------------------------------------------------------------
    @exclusive
    @on_its_device
    def decode(self, requests: Sequence[Running], tokens: Sequence[int] | Tensor) -> Tensor:
        """One token of each of these requests, whose prompts are through: logits (requests, vocabulary). tokens: their ids, on
        the device where they need not come to the host. Raises PoolFull, with nothing changed, where pages are short. After
        any other error the requests that were joined with these have ended."""
        for request in requests:
            if request.group is None:
                self._join(request)
        if not requests:
            raise CacheError("decode was given no request; expected at least one")
        places: dict[_Group, list[int]] = {}
        for i, request in enumerate(requests):
            assert request.group is not None
            places.setdefault(request.group, []).append(i)
        rows = {group: [requests[i].row for i in at] for group, at in places.items()}
        if len(places) == 1:
            ((group, of_all),) = rows.items()
            return self._step(group, of_all, tokens)
        for group, taking in rows.items():
            group.choose(taking)
            group.check_room(taking)
        check_pools([(group.rows, group.rows.plan_token()) for group in places])  # so that none has gone on alone
        found: Tensor | None = None
        for group, at in places.items():
            index = to_device(at, self.model.device)
            part = tokens.index_select(0, index) if isinstance(tokens, Tensor) else [tokens[i] for i in at]
            logits = self._step(group, rows[group], part)
            if found is None:
                found = logits.new_empty(len(requests), logits.shape[-1])
            found.index_copy_(0, index, logits)
        assert found is not None
        return found

    def _join(self, request: Running) -> None:
        cache, decoder = request.cache, self.model.decoder
        if cache is None or request.call is not None:
            raise CacheError("expected a request whose prompt is through and that has not ended")
        if problem := cache.no_room(0, 1, True):
            raise problem
        if decoder is not None and decoder.key_rotation is not None:
            if decoder.rotates_keys and not cache.keys_rotated:
                decoder.key_rotation.rotate(cache)
            if not decoder.rotates_keys and not cache.ranks_held:
                decoder.key_rotation.hold_ranks(cache)
        key = _tables(cache)
        if key not in self._groups:
            rows = JoinedRows(self.model, 1, max_length=cache.max_length, stores=self.stores)
            self._groups[key] = _Group(rows)
        group = self._groups[key]
        row = group.free_row()
        group.rows.put(row, cache)
        group.members[row], request.group, request.row, request.cache = request, group, row, None

    def _step(self, group: _Group, rows: list[int], tokens: Sequence[int] | Tensor) -> Tensor:
        cache, decoder = group.rows, self.model.decoder
        size = cache.batch_size
        taking, everyone = set(rows), rows == list(range(size))
        group.choose(rows)  # before it is asked what was planned
        if isinstance(tokens, Tensor):
            ids = tokens[:, None]
            if not everyone:
                ids = ids.new_zeros(size, 1).index_copy_(0, group.index(rows), ids)
        else:
            host = torch.zeros(size, 1, dtype=torch.int64)
            host[rows, 0] = torch.as_tensor(tokens, dtype=torch.int64)
            ids = to_device(host, self.model.device)
        planned = decoder is not None and decoder.has_planned(ids, cache)
        if not planned:  # what was planned has room
            group.check_room(rows)
        cache.begin_step()
        try:
            if decoder is None:
                where = [np.arange(int(row in taking)) for row in range(size)]
                logits = Call(self.model, Tokens(ids, 0, where, None, [True] * size), cache, 1).run()
            elif planned:
                logits = decoder.planned_step(ids, cache)
            else:
                logits = decoder.step(ids, cache)
        except PoolFull:
            cache.end_step()
            raise
        except BaseException:
            self._drop(group)
            raise
        cache.end_step()
        return logits[:, 0] if everyone else logits[:, 0].index_select(0, group.index(rows))

    def _drop(self, group: _Group) -> None:
        """A step was interrupted, so that nobody knows which layers have its tokens: its requests have ended."""
        for member in group.members:
            if member is not None:
                member.cache = member.group = None
                self._running.discard(member)
        self._groups = {key: other for key, other in self._groups.items() if other is not group}
        group.rows.reset()
