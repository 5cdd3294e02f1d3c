"""Ops of a model that several processes (ranks) run: heads of all ranks share one budget.

Each rank gives what its own heads hold, learns what the others' hold, and computes what all heads keep, as one process
would; it returns what its own keep. Nothing is exchanged where nothing is shared out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from kvrewrite.kernels import pages
from kvrewrite.kernels.groups import Cache, Eviction, NewTokens, Rows
from kvrewrite.kernels.scores import reference as scores_reference
from kvrewrite.kernels.update.reference import head_budgets, priorities, visible_later
from kvrewrite.ops.groups import Fields, define
from kvrewrite.ops.scores import slot_positions
from kvrewrite.ops.update import EVICTION

Gather = Callable[[Tensor], list[Tensor]]
_MEETING: ContextVar[Gather | None] = ContextVar("meeting", default=None)


@contextlib.contextmanager
def meeting(gather: Gather) -> Iterator[None]:
    """Inside, this thread stands for a rank, which meets the others by `gather` instead of torch.distributed."""
    token = _MEETING.set(gather)
    try:
        yield
    finally:
        _MEETING.reset(token)


def gather_ranks(x: Tensor, ranks: int, group: str) -> list[Tensor]:
    """The tensors of all ranks, in order; they have the same shape."""
    found = _MEETING.get()
    if found is not None:
        return found(x)
    comm = torch.ops._c10d_functional
    whole = comm.wait_tensor(comm.all_gather_into_tensor(x.contiguous(), ranks, group))
    return list(whole.chunk(ranks))


def _all_heads(x: Tensor, ranks: int, group: str, fill: float) -> Tensor:
    """The heads (B, Hkv, N) of all ranks side by side; ranks whose tables are narrower are filled up."""
    widths = gather_ranks(torch.tensor([x.shape[2]], device=x.device), ranks, group)
    most = int(torch.cat(widths).max())
    return torch.cat(gather_ranks(torch.nn.functional.pad(x, (0, most - x.shape[2]), value=fill), ranks, group), 1)


shared_budgets_op = define(
    "shared_budgets",
    Fields(NewTokens, "new_scores slot_scores"),
    Rows,
    Fields(Cache, "score_pages pos_pages table lens"),
    EVICTION,
    "Tensor floor",
    "SymInt rank",
    "SymInt ranks",
    "str group",
    returns="Tensor",
)


@shared_budgets_op
def shared_budgets(
    new: NewTokens, rows: Rows, cache: Cache, eviction: Eviction, floor: Tensor, rank: int, ranks: int, group: str
) -> Tensor:
    """What each head of this rank keeps (B, Hkv) int32 where the heads of a layer compete for its budget, as `cache_update`
    with `floor` has it; `keep` in rows where they do not."""
    shares = (floor >= 0) & (rows.valid > 0)
    if not bool((floor >= 0).any()):
        return rows.keep.clone()
    cached = pages.read(cache.score_pages, cache.table) if new.slot_scores is None else new.slot_scores
    by = torch.cat([cached.float(), new.new_scores.float()], -1) if eviction.select is None else eviction.select
    places = slot_positions(cache.pos_pages, cache.table, cache.lens, rows.positions, rows.valid)
    by, places = _all_heads(by.float(), ranks, group, 0.0), _all_heads(places, ranks, group, -1)
    keep = torch.cat(gather_ranks(rows.keep.contiguous(), ranks, group), 1)
    live, newest = places >= 0, places.amax((1, 2))
    seen = visible_later(places, live, newest, eviction.window, eviction.chunk)
    first = (seen & (places < eviction.protected_first)).sum(-1)
    safe = torch.minimum(rows.recent[:, None].long(), (keep.long() - first).clamp(min=0))
    worth = priorities(by, places, live, newest, safe, eviction.protected_first, eviction.window, eviction.chunk)
    won = head_budgets(worth, places, keep, floor.clamp(min=0)).to(torch.int32)
    found = torch.where(shares[:, None], won, keep)
    return found.chunk(ranks, 1)[rank].contiguous()


@shared_budgets_op.fake
def _(
    new: NewTokens, rows: Rows, cache: Cache, eviction: Eviction, floor: Tensor, rank: int, ranks: int, group: str
) -> Tensor:
    return torch.empty_like(rows.keep)


@torch.library.custom_op("kvrewrite::share_layers_together", mutates_args=())
def share_layers_together(
    scores: list[Tensor],
    places: list[Tensor],
    keep: list[Tensor],
    recent: Tensor,
    sinks: int,
    rank: int,
    ranks: int,
    group: str,
) -> list[Tensor]:
    """`share_layers` among the heads of all ranks."""
    held = torch.stack([(p >= 0).sum((1, 2)) for p in places]).sum(0)
    budget = torch.stack([k.long().sum(-1) for k in keep]).sum(0)
    held, budget = (torch.stack(gather_ranks(x, ranks, group)).sum(0) for x in (held, budget))
    if bool((held <= budget).all()):
        return [(p >= 0).sum(-1).to(torch.int32) for p in places]
    everything = (
        [_all_heads(s.float(), ranks, group, 0.0) for s in scores],
        [_all_heads(p, ranks, group, -1) for p in places],
        [torch.cat(gather_ranks(k.contiguous(), ranks, group), 1) for k in keep],
    )
    found = scores_reference.share_layers(*everything, recent, sinks)
    return [k.chunk(ranks, 1)[rank].contiguous() for k in found]


@share_layers_together.register_fake
def _(scores, places, keep, recent, sinks, rank, ranks, group):  # type: ignore[no-untyped-def]
    return [torch.empty_like(k) for k in keep]
