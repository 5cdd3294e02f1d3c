"""Runs what a call gives each row: cut into the policy's segments, all rows side by side, one pass through the graph each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.cache.pages import to_device
from kvrewrite.cache.request import WIDE, row_inputs
from kvrewrite.cache.slot_plan import slots_decoded, walk
from kvrewrite.policies import RowState, Segment
from kvrewrite.runtime.inputs import Tokens

if TYPE_CHECKING:
    from kvrewrite.runtime.model import RewrittenModel

SPAN_STEP = 4096  # graph input `span` is a multiple of this, and of an eighth of the power of two below it


class SegmentedCall:
    """One call. plans: what each row does, segment by segment; totals: its tokens once the call is through."""

    def __init__(self, model: RewrittenModel, tokens: Tokens, cache: EvictionCache):
        self.model, self.tokens, self.cache = model, tokens, cache
        self.plans = [
            cache.segments(row, n, decodes) for row, (n, decodes) in enumerate(zip(tokens.counts, tokens.decoding))
        ]
        self.totals = [seen + n for seen, n in zip(cache.seen, tokens.counts)]
        self.reserve = self._reserve()

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

    def run(self, columns: int) -> Tensor:
        """The logits of the last `columns` columns (rows, columns, vocabulary), zero where a row has no token."""
        rows, begin = range(len(self.plans)), self.tokens.ids.shape[1] - columns
        logits: Tensor | None = None
        done = [0] * len(rows)
        # Each row's first token whose logits are asked for.
        lowest = [int(np.searchsorted(found, begin)) for found in self.tokens.where]
        for step in range(max(map(len, self.plans), default=0)):
            if self.cache.before_chunk is not None:
                self.cache.before_chunk()
            segments = [plan[step] if step < len(plan) else None for plan in self.plans]
            valid = [s.length if s else 0 for s in segments]
            parts = [found[d : d + n] for found, d, n in zip(self.tokens.where, done, valid)]
            # Which of each row's tokens (counted from the segment's start) have logits that are asked for.
            wanted = [list(range(max(0, low - d), n)) for low, d, n in zip(lowest, done, valid)]
            out = self._pass(segments, parts, wanted)
            if out is not None:
                if logits is None:
                    logits = out.new_zeros(len(rows), columns, out.shape[-1])
                for row in rows:
                    if wanted[row]:
                        at = parts[row][wanted[row][0] :] - begin
                        adjacent = at[-1] - at[0] + 1 == len(at)
                        target: Any = slice(int(at[0]), int(at[-1]) + 1) if adjacent else to_device(at, out.device)
                        logits[row, target] = out[row, : len(at)]
            done = [d + n for d, n in zip(done, valid)]
        if logits is None:
            vocab_size, dtype = self.model.program.vocab_size, self.model.dtype
            return torch.zeros(len(rows), columns, vocab_size, device=self.cache.device, dtype=dtype)
        return logits

    def _pass(self, segments: list[Segment | None], parts: list[np.ndarray], wanted: list[list[int]]) -> Tensor | None:
        """One pass through the graph: the same segment number of every row, left-aligned. parts: the columns of its tokens in
        each row. None where no logits are wanted, and what runs the graph can do without them."""
        cache, renew = self.cache, None
        if self.model.program.layout.contiguous:
            always = self.model.policy.renews_ranks_in_decoding
            # A prompt's last eviction leaves gaps, so ranks that decoding keeps are made at its first token.
            renew = [always or not (d and settled) for d, settled in zip(self.tokens.decoding, cache.settled)]
        plan = cache.plan(segments, self.totals, renew)
        cache.hold(plan, self.reserve)
        inputs = cache.inputs(plan)
        if renew is not None:
            cache.next_rotary = [n if r else p for n, p, r in zip(cache.length, cache.next_rotary, renew)]
            cache.settled = [d if n else s for d, n, s in zip(self.tokens.decoding, plan.tokens, cache.settled)]
            inputs["renew"] = to_device(torch.tensor(renew), cache.device)
        inputs.update(self._inputs(segments, parts, wanted))
        out = self.model.run_graph(inputs, logits=any(wanted))
        cache.commit(plan)
        return out

    def _inputs(
        self, segments: list[Segment | None], parts: list[np.ndarray], wanted: list[list[int]]
    ) -> dict[str, Tensor]:
        """Inputs of the graph besides those of the cache."""
        cache, program, device = self.cache, self.model.program, self.cache.device
        longest = max(len(part) for part in parts)
        rows = {
            name: to_device(torch.tensor(values, dtype=torch.int64 if name in WIDE else torch.int32), device)
            for name, values in cache.row_numbers(segments).items()
        }
        inputs = row_inputs(rows, program.max_positions, torch.arange(longest, device=device))
        index = np.zeros((len(parts), longest), dtype=np.int64)
        for row, part in enumerate(parts):
            index[row, : len(part)] = part
        inputs["input_ids"] = torch.gather(self.tokens.ids.to(device).long(), 1, to_device(index, device))
        picks = max(1, max(len(w) for w in wanted))
        inputs["logit_index"] = to_device(torch.tensor([w + [0] * (picks - len(w)) for w in wanted]), device)
        begins = cache.seen
        if program.layout.contiguous:
            begins = cache.next_rotary
            # The same for all chunks of a prompt, and for prompts that are about as long: captured chunks ask for one shape.
            reach = max(max(self.totals), max(cache.seen) + longest)
            step = max(SPAN_STEP, (1 << (reach.bit_length() - 1)) // 8)
            inputs["span"] = torch.empty(0, -(-reach // step) * step, device=device)
        reach = max(begins) + longest + self.model.policy.rotary_ahead
        for i, (cos, sin) in enumerate(cache.rotary(min(reach, program.max_positions or reach))):
            inputs[f"rotary_cos_{i}"], inputs[f"rotary_sin_{i}"] = cos, sin
        return {**inputs, **cache.length_tables}
