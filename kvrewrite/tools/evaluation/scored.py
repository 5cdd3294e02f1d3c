"""Scores given texts after a compressed context: nats per token, and how many tokens the model would have chosen.

A context is compressed (blind: alone; aware: with its question up to the last token), then what follows runs on the
compressed cache, in one pass or (`perplexity`) token by token. So every scored token sees what the policy kept, and no
other: logits of the context's own pass, which come before its eviction, are not used. Documents go through in batches,
and all questions about those of a batch go through in one pass, on forks.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvrewrite.policies.question import join_question
from kvrewrite.tools.evaluation import intervals
from kvrewrite.tools.evaluation.ask import POINTS, Held, pad_left, prefill, question_first
from kvrewrite.tools.evaluation.documents import Passage

LOGITS = 1 << 28  # most logits that are turned into log-probabilities at once
Ids = tuple[int, ...]
Asked = tuple[int, Ids, Ids]  # its number, what goes in, and what is scored (`score`)
Score = tuple[float, int, int]  # nats, tokens that are the first choice, tokens
TOGETHER = 8  # most questions on one batch of contexts, as a multiple of its rows


def run_scored(
    model: Any,
    tokenizer: Any,
    passages: Sequence[Passage],
    mode: str,
    batch_size: int,
    progress: Callable[[int], None],
    one_by_one: bool = False,
) -> dict[str, Any]:
    """Returns a cell's results. one_by_one: see `score`.

    nll: nats per token; accuracy: share of tokens that are the model's first choice; exact: share of answers whose
    tokens all are, which is what greedy decoding would get right. Intervals are over documents.
    """
    started, first = time.perf_counter(), question_first(model.policy, mode)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    bos = tokenizer.bos_token_id
    about: dict[Ids, list[Asked]] = {}
    for i, passage in enumerate(passages):
        before, rest = passage.context, passage.question + passage.answer
        if mode == "aware":
            joined = join_question(passage.context, passage.question, first=first, bos=bos)
            before, rest = tuple(joined[:-1]), passage.question[-1:] + passage.answer
        about.setdefault(before, []).append((i, rest[:-1], passage.answer))
    held, found = Held(), {}
    for i, of_one in score_about(model, about, batch_size, pad, one_by_one, held):
        found[i] = of_one
        progress(len(found))
    ordered = [found[i] for i in range(len(passages))]
    return {
        "status": "ok",
        "resolved": {"name": model.policy.name, **model.policy.options()},
        **summary(ordered, [p.document for p in passages]),
        "memory": {POINTS[0] if mode == "blind" else POINTS[1]: held.means()},
        "seconds": round(time.perf_counter() - started, 3),
    }


def score_about(
    model: Any,
    about: Mapping[Ids, Sequence[Asked]],
    batch_size: int,
    pad: int,
    one_by_one: bool = False,
    held: Held | None = None,
) -> Iterator[tuple[int, Score]]:
    """Yields (number, score) of what is asked about contexts, each of which is compressed once. batch_size: contexts that
    go together; one_by_one: see `score`; held: what caches held before they were asked is added to it."""
    contexts = sorted(about, key=len)  # rows of equal length go together
    for at in range(0, len(contexts), batch_size):
        batch = contexts[at : at + batch_size]
        asked = [(row, *one) for row, context in enumerate(batch) for one in about[context]]
        longest = max(len(given) for _, _, given, _ in asked)
        ids, mask = pad_left(batch, pad)
        cache = prefill(model, ids, mask, ids.shape[1] + longest + 1)
        if held is not None:
            held.add(cache)
        step = TOGETHER * len(batch)
        for begin in range(0, len(asked), step):
            part = asked[begin : begin + step]
            rows = cache if begin + step >= len(asked) else cache.fork()
            rows.select([row for row, *_ in part])
            scores = score(model, rows, [given for _, _, given, _ in part], [a for *_, a in part], pad, one_by_one)
            yield from zip([i for _, i, _, _ in part], scores, strict=True)


def score(
    model: Any,
    cache: Any,
    given: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad: int,
    one_by_one: bool = False,
) -> list[Score]:
    """Returns the score of each answer. given: what goes in, the answer but for its
    last token at the end. one_by_one: each token goes in by itself, as if it had been generated; else all in one pass."""
    if one_by_one:
        return _score_one_by_one(model, cache, given, answers, pad)
    ids, mask = pad_left(given, pad)
    most = max(map(len, answers))
    out = model(
        ids.to(model.device),
        attention_mask=None if mask.all() else mask.to(model.device),
        past_key_values=cache,
        logits_to_keep=most,
    )
    logits: Tensor = out.logits
    targets, real = (x.to(model.device) for x in pad_left(answers, 0))
    step = max(1, LOGITS // (most * logits.shape[-1]))
    nats, hits = [], []
    for at in range(0, len(logits), step):
        part, wanted = logits[at : at + step].float(), targets[at : at + step]
        picked = part.gather(-1, wanted[..., None])[..., 0]
        kept = real[at : at + step].bool()
        nats.append(((torch.logsumexp(part, -1) - picked) * kept).sum(1))
        hits.append(((part.argmax(-1) == wanted) & kept).sum(1))
    sums, right = torch.cat(nats).tolist(), torch.cat(hits).tolist()
    return [(total, hit, len(answer)) for total, hit, answer in zip(sums, right, answers, strict=True)]


def _score_one_by_one(
    model: Any, cache: Any, given: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int
) -> list[Score]:
    longest = max(map(len, given))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in given], device=model.device)
    lengths = torch.tensor([len(row) for row in given], device=model.device)
    targets = torch.full_like(ids, -1)  # -1: before an answer, or after its end
    for row, (read, answer) in enumerate(zip(given, answers, strict=True)):
        targets[row, len(read) - len(answer) : len(read)] = torch.tensor(answer, device=model.device)
    nats = torch.zeros(len(ids), dtype=torch.float64, device=model.device)
    hits = torch.zeros(len(ids), dtype=torch.int64, device=model.device)
    for at in range(longest):
        goes_on = lengths > at
        mask = None if bool(goes_on.all()) else goes_on[:, None].long()
        logits = model(ids[:, at : at + 1], attention_mask=mask, past_key_values=cache).logits[:, 0].float()
        wanted = targets[:, at]
        scored = wanted >= 0
        picked = logits.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
        nats += (torch.logsumexp(logits, -1) - picked) * scored
        hits += (logits.argmax(-1) == wanted) & scored
    return [(n, h, len(a)) for n, h, a in zip(nats.tolist(), hits.tolist(), answers, strict=True)]


def summary(scores: Sequence[tuple[float, int, int]], documents: Sequence[int]) -> dict[str, Any]:
    """Returns what a cell says of the (nats, first choices, tokens) of its passages; documents: that of each."""
    nats = [round(n, 5) for n, _, _ in scores]
    hits, tokens = [h for _, h, _ in scores], [t for _, _, t in scores]
    exact = [int(hit == count) for hit, count in zip(hits, tokens)]
    return {
        "nll": dataclasses.asdict(intervals.ratio(nats, tokens, documents)),
        "accuracy": dataclasses.asdict(intervals.ratio(hits, tokens, documents)),
        "exact": dataclasses.asdict(intervals.ratio(exact, [1] * len(exact), documents)),
        "nats": nats,
        "hits": hits,
        "counts": tokens,
        "documents": list(documents),
    }


def against(cell: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Returns the paired differences of a cell to the full cache's."""
    more = [a - b for a, b in zip(cell["nats"], base["nats"], strict=True)]
    hits = [a - b for a, b in zip(cell["hits"], base["hits"], strict=True)]
    return {
        "nll": dataclasses.asdict(intervals.ratio(more, cell["counts"], cell["documents"])),
        "accuracy": dataclasses.asdict(intervals.ratio(hits, cell["counts"], cell["documents"])),
    }
