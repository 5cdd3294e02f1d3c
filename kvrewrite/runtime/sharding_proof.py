"""Proves a sharded program: all ranks run in one process, in float64, beside the program that was cut.

The ranks are threads that meet at every collective of their graphs, so the graphs are run as they are, through the
runtime that users run, caches and evictions included. No weights are needed: stand-ins take their place, each rank with
its blocks of them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.evaluate import EvaluationError, Evaluator, StandIns, ThinProduct, difference
from kvrewrite.ir.fx import get_attr, is_op, named_args
from kvrewrite.ir.parallel import Peers
from kvrewrite.ir.program import Program
from kvrewrite.ops import together
from kvrewrite.passes.shard.shard import Sharder, cut_tensor
from kvrewrite.passes.shard.write import GATHER, REDUCE, WAIT
from kvrewrite.runtime.translation import rehearsed

ops = torch.ops.kvrewrite
UPDATES = (ops.cache_update.default, ops.cache_update_quantized.default)
PER_HEAD = ("k", "v", "new_scores", "slot_scores", "select", "drop", "keep")  # arguments of updates that heads have
TOKENS, STEPS, ROWS = 21, 3, 2


@dataclass
class Trace:
    """What a program gave: the logits of each piece of a text, and what it put into its caches, in order."""

    logits: list[Tensor]
    updates: list[dict[str, Tensor]]
    kept: dict[int, Any]  # positions that each head holds at the end, by layer


class Meeting:
    """Where the ranks' threads exchange tensors."""

    def __init__(self, ranks: int):
        self._given: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks)

    def __call__(self, rank: int, value: Tensor) -> list[Tensor]:
        """What every rank gives, in order."""
        self._given[rank] = value
        self.barrier.wait()
        found = list(self._given)
        self.barrier.wait()
        return found


class Watched(Evaluator):
    """Notes what goes into the caches, and runs collectives where there are ranks to meet."""

    def __init__(
        self, gm: fx.GraphModule, stand_ins: Callable[[str, Any], Any], rank: int = 0, meeting: Meeting | None = None
    ):
        super().__init__(gm.graph, gm, stand_ins)
        self.rank, self.meeting = rank, meeting
        self.updates: list[dict[str, Tensor]] = []

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any], inputs: Mapping[str, Any]) -> Any:
        source: Any = node.args[0] if node.args else None
        if is_op(node, WAIT):
            return values[source]
        if is_op(node, REDUCE, GATHER):
            assert self.meeting is not None
            blocks = self.meeting(self.rank, values[source])
            return sum(blocks[1:], blocks[0]) if is_op(node, REDUCE) else torch.cat(blocks)
        if is_op(node, *UPDATES):
            given = {name: values.get(value) for name, value in named_args(node).items() if name in PER_HEAD}
            self.updates.append({name: x.clone() for name, x in given.items() if isinstance(x, Tensor)})
        return super()._compute(node, values, inputs)


def run(program: Program, stand_ins: Any, tokens: int, rank: int = 0, meeting: Meeting | None = None) -> Trace:
    """Runs a text through a program, in two pieces and token by token."""
    evaluator = Watched(program.graph, stand_ins, rank, meeting)
    model = rehearsed(program, stand_ins, evaluator)
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(program.vocab_size, (ROWS, tokens + STEPS), generator=generator)
    cache, logits, at = model.new_cache(ROWS, max_length=ids.shape[1]), [], 0
    pieces = [tokens] if model.policy.whole_prompt or tokens < 10 else [tokens - 8, 8]
    for length in [*pieces, *[1] * STEPS]:
        logits.append(model(ids[:, at : at + length], past_key_values=cache).logits)
        at += length
    if model.policy.head_budgets != "equal":  # what heads have won is decided before the update, or inside it
        for update in evaluator.updates:
            del update["keep"]
    return Trace(logits, evaluator.updates, cache.positions())


def prove_shards(program: Program, ranks: int, sharder: Sharder | None = None, tokens: int = TOKENS) -> None:
    """Raises UnsupportedModelError where all ranks together do not give what the program gives. Its parameters may be on
    meta. sharder: the program's, where there is one; tokens: of the text's prompt."""
    stand_ins, group = StandIns(), "proof"
    if program.max_positions is not None:
        tokens = min(tokens, program.max_positions - STEPS)
    try:
        want = run(program, stand_ins, tokens)
        meeting = Meeting(ranks)
        sharder = sharder or Sharder(program, ranks)
        own = [sharder.part(Peers(rank, ranks, group)) for rank in range(ranks)]
        with ThreadPoolExecutor(ranks) as pool:
            found = [pool.submit(_run_rank, program, part, stand_ins, meeting, tokens) for part in own]
            errors = [e for f in found if (e := f.exception()) is not None]
            if errors:
                raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        got = [f.result() for f in found]
    except EvaluationError as error:
        raise UnsupportedModelError(f"tensor parallelism: {error}") from error
    for rank, trace in enumerate(got):
        _compare(trace, want, rank, ranks)


def _run_rank(program: Program, own: Program, stand_ins: StandIns, meeting: Meeting, tokens: int) -> Trace:
    try:
        assert own.parallel is not None
        peers, cut, known = own.parallel.peers, own.parallel.cut, dict[str, Any]()

        def blocks(name: str, value: Any) -> Any:
            if name not in cut:
                return stand_ins(name, get_attr(program.graph, name))
            if name not in known:
                known[name] = _cut(stand_ins(name, get_attr(program.graph, name)), *cut[name], peers)
            return known[name]

        with together.meeting(functools.partial(meeting, peers.rank)):
            return run(own, blocks, tokens, peers.rank, meeting)
    except BaseException:
        meeting.barrier.abort()
        raise


def _cut(value: Any, dim: int, parts: tuple[int, ...], peers: Peers) -> Any:
    if not isinstance(value, ThinProduct):
        return cut_tensor(value, dim, parts, peers)
    last = value.left.dim() - 1
    if dim == last:
        return ThinProduct(value.left, cut_tensor(value.right, dim, parts, peers))
    left = cut_tensor(value.left, dim, parts, peers)
    return ThinProduct(left, value.right if dim == last - 1 else cut_tensor(value.right, dim, parts, peers))


def _compare(got: Trace, want: Trace, rank: int, ranks: int) -> None:
    for i, (update, reference) in enumerate(zip(got.updates, want.updates, strict=True)):
        if update.keys() != reference.keys():
            raise UnsupportedModelError(f"tensor parallelism: update {i} has other arguments in rank {rank}")
        for name, whole in reference.items():
            heads = update[name].shape[1]
            if heads != whole.shape[1]:
                whole = whole.narrow(1, rank * heads, heads)
            _same(update[name], whole, f"{name} of the {i}th update of a cache")
    for i, (own, whole) in enumerate(zip(got.logits, want.logits, strict=True)):
        _same(own, whole, f"its logits of piece {i}")
    for layer, rows in want.kept.items():
        for row, per_head in enumerate(rows):
            own = got.kept[layer][row]
            first = rank * len(own) if len(own) != len(per_head) else 0
            if [list(p) for p in own] != [list(p) for p in per_head[first : first + len(own)]]:
                raise UnsupportedModelError(
                    f"tensor parallelism: over {ranks} processes, process {rank} keeps other tokens in layer {layer}"
                )


def _same(got: Tensor, want: Tensor, what: str) -> None:
    # The text's first token has the largest number as its surprisal, and infinite scores protect.
    got, want = (x.nan_to_num(posinf=0.0, neginf=0.0) for x in (got, want))
    if problem := difference(got, want):
        raise UnsupportedModelError(
            f"tensor parallelism: dealt out, the model differs from itself in one process: {what}: {problem}"
        )
