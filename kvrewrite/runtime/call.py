"""One call of a rewritten model: what it gives each row, checked, cut into the policy's segments, and run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.cache.pages import to_device
from kvrewrite.cache.request import WIDE, Request, check_pools, row_inputs
from kvrewrite.cache.side_by_side import give_back, join
from kvrewrite.cache.slot_plan import StepPlan, slots_decoded, walk
from kvrewrite.errors import CacheError, InputError
from kvrewrite.ir.axes import AXES
from kvrewrite.ir.waits import told
from kvrewrite.policies import UNLIMITED, Policy, RowState, Segment

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel

SPAN_STEP = 4096  # graph input `span` is a multiple of this, and of an eighth of the power of two below it


# -- what is given ---------------------------------------------------------------------------------------------------
def check_tensor(name: str, value: Any) -> None:
    """Raises InputError where a tensor argument is something else, such as a list."""
    if value is not None and not isinstance(value, Tensor):
        raise InputError(
            f"{name} is a {type(value).__name__}, expected a (batch, tokens) tensor; torch.tensor([...]) makes one of lists"
        )


def check_ids_form(input_ids: Any) -> None:
    """Raises InputError where `input_ids` is no (batch, tokens) tensor of integers with at least one row and one column."""
    check_tensor("input_ids", input_ids)
    if input_ids is None or input_ids.dim() != 2:
        got = "nothing" if input_ids is None else f"shape {tuple(input_ids.shape)}"
        raise InputError(f"input_ids: got {got}, expected a (batch, tokens) tensor of token ids")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"input_ids has dtype {input_ids.dtype}, expected int64")
    if not input_ids.numel():
        raise InputError(
            f"input_ids has shape {tuple(input_ids.shape)}, expected at least one token; an empty prompt can begin with the "
            "tokenizer's BOS token"
        )


def check_embeds(inputs_embeds: Any, width: int, dtype: torch.dtype) -> None:
    """Raises InputError where `inputs_embeds` are no embeddings (batch, tokens, width) of this dtype."""
    form = f"a (batch, tokens, {width}) tensor of {dtype}"
    if not isinstance(inputs_embeds, Tensor):
        raise InputError(f"inputs_embeds is a {type(inputs_embeds).__name__}, expected {form}")
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != width or not inputs_embeds.numel():
        raise InputError(
            f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, expected {form} with at least one row and token: what "
            "get_input_embeddings()(ids) gives"
        )
    if inputs_embeds.dtype != dtype:
        raise InputError(f"inputs_embeds has dtype {inputs_embeds.dtype}, expected {dtype}, the model's; cast it")


def check_form(input_ids: Any, attention_mask: Any, position_ids: Any, logits_to_keep: Any) -> None:
    """Raises InputError for arguments that no cache could make sense of."""
    check_ids_form(input_ids)
    check_tensor("attention_mask", attention_mask)
    check_tensor("position_ids", position_ids)
    if not isinstance(logits_to_keep, int) or isinstance(logits_to_keep, bool):
        raise InputError(f"logits_to_keep is a {type(logits_to_keep).__name__}, expected an int")
    if logits_to_keep < 0:
        raise InputError(
            f"logits_to_keep is {logits_to_keep}, expected 0 (all columns) or how many of the last columns to return"
        )


def check_ids(ids: Tensor, vocab_size: int, decoding: bool) -> None:
    """Raises InputError for ids beyond the vocabulary. Single tokens on a GPU are not looked at: that would stall
    it."""
    if ids.numel() and not (decoding and ids.is_cuda):
        low, high = torch.stack(torch.aminmax(ids)).tolist()
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"token ids reach from {low} to {high}, expected 0 to {vocab_size - 1}; does the tokenizer belong to this model?"
            )


def check_positions(position_ids: Tensor, tokens: Tokens, cache: Request) -> None:
    """Raises InputError where positions that are given are not those that the cache counts."""
    rows = position_ids.expand(len(tokens.where), -1).cpu().numpy()
    for row, columns in enumerate(tokens.where):
        new = columns >= tokens.late
        expected = (cache.seen[row] + np.arange(len(columns)))[new]
        got = rows[row, columns[new] - tokens.late]
        if not np.array_equal(got, expected):
            paused = "; in this row some columns were padding, which attention_mask (batch, past + new) should say"
            raise InputError(
                f"position_ids of row {row} are {got[:8].tolist()}..., expected {expected[:8].tolist()}...: positions are "
                "counted by the cache; leave position_ids out" + (paused if cache.seen[row] < cache.columns else "")
            )


def check_cache(model: Any, cache: Any, batch: int | None) -> None:
    """Raises CacheError where a cache is not this model's, or not one of `batch` rows (None: any number)."""
    if not isinstance(cache, EvictionCache):
        raise CacheError(
            f"past_key_values is a {type(cache).__name__}, expected an EvictionCache from this model's new_cache()"
        )
    if cache.owner is not model.owner:
        raise CacheError(
            "the cache belongs to another model (a copy of a model is another one); make one with this model's new_cache()"
        )
    cache.check_finished()
    if batch is not None and cache.batch_size != batch:
        raise CacheError(
            f"the cache is for batch size {cache.batch_size}, but the input has {batch} rows; rows that go on from one text "
            "come of cache.fork() and batch_repeat_interleave(n) of that"
        )
    if cache.device != model.device:
        raise CacheError(
            f"the cache is on {cache.device}, the model on {model.device}; make one with this model's new_cache()"
        )


# -- what is new -----------------------------------------------------------------------------------------------------
@dataclass
class Tokens:
    """What a call gives each row.

    ids (rows, columns): those of the call with, before them, `late` columns that some row has still to be given; where:
    the columns of each row's real tokens among them; real: which columns are real from then on, (rows, all columns)
    bool, or None where all that is new is; decoding: rows that go on by one token, or pause; embeds (rows, columns, D): what
    came in the place of ids, which are signatures then; axes (rows, columns, 3): the positions of each axis of the rotation,
    or None where all have the token's.
    """

    ids: Tensor
    late: int
    where: list[np.ndarray]
    real: np.ndarray | None
    decoding: list[bool]
    embeds: Tensor | None = None
    axes: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """New tokens of each row."""
        return [len(columns) for columns in self.where]


def new_tokens(ids: Tensor, mask: Tensor | None, cache: Request) -> Tokens:
    """What `ids` (rows, columns) and the mask of a call give each row of a cache. Raises InputError for a mask of
    another shape, or one that differs from what went in."""
    batch, width = ids.shape
    late, where, real = 0, [np.arange(width)] * batch, None
    if mask is not None:
        past = cache.columns
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (width, past + width):
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {past + width}) or ({batch}, {width})"
            )
        given = mask.to(torch.bool).cpu().numpy()
        new, first = given[:, given.shape[1] - width :], past
        if given.shape[1] > width:
            first = cache.history.late(given[:, :past], past)
        if first < past or not new.all():
            before = cache.history.real(past)
            real = np.concatenate([before, new], 1)
            if first < past:
                ids = torch.cat([cache.history.ids(past)[:, first:].to(ids), ids], 1)
                if bool((ids < 0).any()):
                    raise InputError(
                        f"attention_mask counts column {first} as real, in which a row paused, and some of the tokens from "
                        "there on are embeddings; give that row its tokens first, as ids"
                    )
                real, late = given, past - first
                new = np.concatenate([given[:, first:past] & ~before[:, first:], new], 1)
            where = [np.flatnonzero(row) for row in new]
    # Row by row, by its real tokens, so that a row does not depend on what else is in the batch. One that pauses keeps
    # its ranks, too.
    decoding = [len(columns) <= 1 and seen > 0 for columns, seen in zip(where, cache.seen)]
    return Tokens(ids, late, where, real, decoding)


def check_rows(tokens: Tokens, position_ids: Tensor | None, cache: Request) -> None:
    """Raises InputError or CacheError where a row can't take its new tokens."""
    for row, (count, decodes) in enumerate(zip(tokens.counts, tokens.decoding)):
        problem = cache.no_room(row, count, decodes)
        if problem is not None:
            raise problem
    if position_ids is not None and not all(tokens.decoding):
        check_positions(position_ids, tokens, cache)


def check_axes(positions: Any, tokens: Tokens, policy: Policy) -> None:
    """Raises InputError where positions of several axes can't be given to these tokens."""
    want = (*tokens.ids[:, tokens.late :].shape, AXES)
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64 or positions.shape != want:
        got = (
            f"{positions.dtype} {tuple(positions.shape)}" if isinstance(positions, Tensor) else type(positions).__name__
        )
        raise InputError(f"rope_positions is {got}, expected int64 {want}: a token's position on each axis")
    if tokens.late:
        raise InputError("a row paused before these images; give it the columns in which it did first, as ids")
    if policy.repeats_prompt:
        raise InputError(
            f"{policy.name} reads a prompt again after its end, where images of a model with M-RoPE have no positions; "
            "use another policy (snapkv, h2o)"
        )


def note_deltas(tokens: Tokens, cache: Request) -> None:
    """Notes where each row's rotation goes on after tokens with positions of several axes."""
    assert tokens.axes is not None
    highest = tokens.axes.amax(2).cpu().numpy()
    for row, columns in enumerate(tokens.where):
        if len(columns):
            cache.turn_on(row, int(highest[row, columns].max()) + 1)


# -- the passes ------------------------------------------------------------------------------------------------------
@dataclass
class Pass:
    """What one pass does for the rows of a call. parts: the columns of each row's tokens; wanted: which of them (counted from
    the segment's start) have logits that are asked for; renew: rows whose ranks are computed again (contiguous
    positions)."""

    plan: StepPlan
    parts: list[np.ndarray]
    wanted: list[list[int]]
    renew: list[bool] | None


class Call:
    """Runs a call: all rows side by side, one pass through the graph for each segment. `run` does it at once; or `advance`
    until it is `finished`, then `logits`, of the last `columns` columns. plans: what each row does, segment by segment;
    totals: its tokens once the call is through."""

    def __init__(self, model: RewrittenModel, tokens: Tokens, cache: Request, columns: int):
        self.model, self.tokens, self.cache, self.columns = model, tokens, cache, columns
        self.plans = [
            cache.segments(row, n, decodes) for row, (n, decodes) in enumerate(zip(tokens.counts, tokens.decoding))
        ]
        self.totals = [seen + n for seen, n in zip(cache.seen, tokens.counts)]
        self.reserve = self._reserve()
        self.passes = max(map(len, self.plans), default=0)
        self.step, self._done = 0, [0] * len(self.plans)
        self.ids, self._places = _with_ids_of_repetitions(tokens.ids, self.plans)
        self.embeds = tokens.embeds
        if self.embeds is not None and self._places:
            self.embeds = torch.cat([self.embeds, model.embed(self.ids[:, self.embeds.shape[1] :])], 1)
        self._logits: Tensor | None = None
        begin = tokens.ids.shape[1] - columns
        # Each row's first token whose logits are asked for.
        self._lowest = [int(np.searchsorted(found, begin)) for found in tokens.where]

    @property
    def finished(self) -> bool:
        """Whether all passes are through."""
        return self.step >= self.passes

    def _reserve(self) -> int:
        """Slots per head that pools should have room for: what the longest row holds on the way and in the end, and what its
        answer will add as far as its length is known."""
        most, cache = 0, self.cache
        for row, plan in enumerate(self.plans):
            after = [cache.length[row], *(held for _, held in walk(plan, cache.length[row]))]
            held = after[-1]
            seen = self.totals[row]
            coming = min(max(0, (cache.max_length or 0) - seen), held + 256)
            last = RowState(seen=seen + max(0, coming - 1), held=held)
            most = max(most, *after, int(slots_decoded(held, coming, self.model.policy.decode_segment(last).keep)))
        return most

    def run(self) -> Tensor:
        """All passes; the logits."""
        while not self.finished:
            if self.cache.before_chunk is not None:
                self.cache.before_chunk()
            with self._told() if self.passes > 1 else contextlib.nullcontext():
                advance([self])
        return self.logits

    def _told(self) -> contextlib.AbstractContextManager[None]:
        """Says where a long prompt is, if its next pass takes long: tokens of the row that has most."""
        row = max(range(len(self.totals)), key=self.totals.__getitem__)
        seen, total = self.cache.seen[row], self.totals[row]
        return told(f"pass {self.step + 1} of {self.passes}: {seen:,} of {total:,} tokens are read")

    def next_pass(self) -> Pass:
        """The next segment of every row that has one; changes nothing."""
        segments = [plan[self.step] if self.step < len(plan) else None for plan in self.plans]
        valid = [s.length if s else 0 for s in segments]
        parts = [
            self._repeated(found, s) if s and s.again else found[d : d + n]
            for found, d, n, s in zip(self.tokens.where, self._done, valid, segments)
        ]
        wanted = [
            [] if s and s.again else list(range(max(0, low - d), n))
            for low, d, n, s in zip(self._lowest, self._done, valid, segments)
        ]
        renew = None
        if self.model.program.layout.contiguous:
            always = self.model.policy.renews_ranks_in_decoding
            # A prompt's last eviction leaves gaps, so ranks that decoding keeps are made at its first token.
            frozen = self.cache.ranks_frozen
            renew = [always or not (d and f) for d, f in zip(self.tokens.decoding, frozen)]
        return Pass(self.cache.plan(segments, self.totals, renew), parts, wanted, renew)

    def _repeated(self, found: np.ndarray, segment: Segment) -> np.ndarray:
        """The columns of what a repetition reads. found: those of the row's tokens."""
        read = [
            found[p.start : p.stop] if isinstance(p, range) else [self._places[i] for i in p] for p in segment.again
        ]
        return np.concatenate([np.asarray(columns, dtype=np.int64) for columns in read])

    def begin(self, now: Pass) -> dict[str, Tensor]:
        """Leases the pages of a pass; the cache's inputs."""
        cache = self.cache
        cache.hold(now.plan, self.reserve)
        inputs = cache.inputs(now.plan)
        if now.renew is not None:
            cache.next_rotary = [n if r else p for n, p, r in zip(cache.length, cache.next_rotary, now.renew)]
            frozen = zip(self.tokens.decoding, now.plan.tokens, cache.ranks_frozen)
            cache.ranks_frozen = [d if n else f for d, n, f in frozen]
            inputs["renew"] = to_device(torch.tensor(now.renew), cache.device)
        return inputs

    def end(self, now: Pass, out: Tensor | None) -> None:
        """Records a pass. out: the logits that were asked for, left-aligned in each row, or None."""
        self.cache.commit(now.plan)
        begin = self.tokens.ids.shape[1] - self.columns
        if out is not None:
            if self._logits is None:
                self._logits = out.new_zeros(len(now.parts), self.columns, out.shape[-1])
            for row, picked in enumerate(now.wanted):
                if picked:
                    at = now.parts[row][picked[0] :] - begin
                    adjacent = at[-1] - at[0] + 1 == len(at)
                    target: Any = slice(int(at[0]), int(at[-1]) + 1) if adjacent else to_device(at, out.device)
                    self._logits[row, target] = out[row, : len(at)]
        self._done = [d + n for d, n in zip(self._done, now.plan.tokens)]
        self.step += 1

    @property
    def logits(self) -> Tensor:
        """Those of the last columns (rows, columns, vocabulary), zero where a row has no token."""
        if self._logits is None:
            shape = (len(self.plans), self.columns, self.model.program.vocab_size)
            return torch.zeros(shape, device=self.cache.device, dtype=self.model.dtype)
        return self._logits


def advance(calls: Sequence[Call]) -> None:
    """The next pass of these calls of one model, side by side in one pass through the graph. Several need the same pools and
    rotary frequencies. Raises PoolFull, with nothing changed, where pages are short."""
    model, specs = calls[0].model, calls[0].model.program.layout.inputs
    now = [call.next_pass() for call in calls]
    if len(calls) > 1:  # of one, its cache asks
        check_pools([(call.cache, p.plan) for call, p in zip(calls, now)])
    given = [call.begin(p) for call, p in zip(calls, now)]
    inputs = given[0] if len(calls) == 1 else join(specs, given)
    inputs.update(_token_inputs(model, calls, now))
    wants = any(any(p.wanted) for p in now)
    out = model.run_graph(inputs, logits=wants)
    if len(calls) > 1:
        give_back(specs, given, inputs)
    row = 0
    for call, p in zip(calls, now):
        rows = slice(row, row + len(p.parts))
        call.end(p, None if out is None else out[rows])
        row = rows.stop


def _token_inputs(model: RewrittenModel, calls: Sequence[Call], now: Sequence[Pass]) -> dict[str, Tensor]:
    """Inputs of the graph besides those of the caches."""
    program, device = model.program, calls[0].cache.device
    caches = [call.cache for call in calls]
    longest = max(len(part) for p in now for part in p.parts)
    counted = [cache.row_numbers(p.plan.segments) for cache, p in zip(caches, now)]
    rows = {}
    for name in counted[0]:
        values = [n for numbers in counted for n in numbers[name]]
        rows[name] = to_device(torch.tensor(values, dtype=torch.int64 if name in WIDE else torch.int32), device)
    inputs = row_inputs(rows, program.max_positions, torch.arange(longest, device=device))
    picked = [_picked(call.ids.to(device).long(), p.parts, longest) for call, p in zip(calls, now)]
    inputs["input_ids"] = torch.cat(picked) if len(picked) > 1 else picked[0]
    if (embeds := calls[0].embeds) is not None:  # such a call runs alone
        inputs["inputs_embeds"] = _picked(embeds.to(device), now[0].parts, longest)
    if (axes := calls[0].tokens.axes) is not None:
        inputs["rope_positions"] = _picked(axes.to(device), now[0].parts, longest)
    wanted = [row for p in now for row in p.wanted]
    picks = max(1, max(map(len, wanted)))
    inputs["logit_index"] = to_device(torch.tensor([w + [0] * (picks - len(w)) for w in wanted]), device)
    begins = [begin for cache in caches for begin in cache.seen]
    if program.layout.contiguous:
        begins = [begin for cache in caches for begin in cache.next_rotary]
        # The same for all chunks of a prompt, and for prompts that are about as long: captured chunks ask for one shape.
        reach = max(max(*call.totals, max(call.cache.seen) + longest) for call in calls)
        step = max(SPAN_STEP, (1 << (reach.bit_length() - 1)) // 8)
        inputs["span"] = torch.empty(0, -(-reach // step) * step, device=device)
    reach = min(max(begins) + longest + model.policy.rotary_ahead, program.max_positions or UNLIMITED)
    for i, (cos, sin) in enumerate(caches[0].rotary(reach)):
        inputs[f"rotary_cos_{i}"], inputs[f"rotary_sin_{i}"] = cos, sin
    return {**inputs, **caches[0].length_tables}


def _with_ids_of_repetitions(ids: Tensor, plans: Sequence[Sequence[Segment]]) -> tuple[Tensor, dict[int, int]]:
    """`ids` (rows, columns) with a further column for each id that repetitions read beside the prompt; and which column
    that is."""
    read = (part for plan in plans for segment in plan for part in segment.again if not isinstance(part, range))
    others = sorted({i for part in read for i in part})
    if not others:
        return ids, {}
    columns = torch.tensor(others, dtype=ids.dtype, device=ids.device).expand(ids.shape[0], -1)
    return torch.cat([ids, columns], 1), {i: ids.shape[1] + n for n, i in enumerate(others)}


def _picked(given: Tensor, parts: Sequence[np.ndarray], longest: int) -> Tensor:
    """The tokens of each row, left-aligned: ids (rows, longest), or embeddings (rows, longest, D)."""
    index = np.zeros((len(parts), longest), dtype=np.int64)
    for row, part in enumerate(parts):
        index[row, : len(part)] = part
    places = to_device(index, given.device)
    if given.dim() == 2:
        return torch.gather(given, 1, places)
    return torch.gather(given, 1, places[..., None].expand(-1, -1, given.shape[2]))
