"""MInference's patterns, slow and obvious, in float64: from the paper's text, on lists of keys. Does not import kvrewrite.

A row's keys are its live slots, then its real new tokens; a key's rank is its place among them. Blocks are 128 queries by
64 keys, slots and new tokens each counted from their first.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def ranked_logits(q: Tensor, keys: Tensor, live: int, how: dict[str, Any]) -> Tensor:
    """Logits (T, live + T) of one head's real queries on its real keys, -inf where a query does not see."""
    logits = q.double() @ keys.double().T * how.get("scale", 1.0)
    if how.get("softcap"):
        logits = how["softcap"] * torch.tanh(logits / how["softcap"])
    own = torch.eye(len(q), dtype=torch.bool)
    seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    if how.get("hidden") is not None:
        seen &= ~how["hidden"][: len(q)] | own
    logits[:, live:] = logits[:, live:].masked_fill(~seen, -math.inf)
    return logits


def block_of(rank: int, live: int) -> tuple[str, int]:
    return ("slots", rank // 64) if rank < live else ("new", (rank - live) // 64)


def best(scores: dict[int, float], count: int, forced: set[int]) -> list[int]:
    order = sorted(scores, key=lambda i: (i not in forced, i if i in forced else -scores[i]))
    return order[:count]


def visible(word: str, q: Tensor, keys: Tensor, live: int, how: dict[str, Any]) -> Tensor:
    """Which keys each query sees: (T, live + T) bool. q (T, D) and keys (live + T, D) of one head, without padding."""
    kind, *numbers = word.split(":")
    count, total = len(q), len(keys)
    logits = ranked_logits(q, keys, live, how)
    causal = torch.ones(count, total, dtype=torch.bool).tril(live)
    if kind == "dense" or count <= 64:
        return causal
    blocks: set[tuple[int, tuple[str, int]]] = set()  # (block of queries, block of keys)
    single: list[int] = []
    for i in range(count):  # every query sees its own block of queries
        blocks.add((i // 128, block_of(live + i, live)))

    def add_diagonal(distance: int) -> None:
        for i in range(count):
            if live + i >= distance:
                blocks.add((i // 128, block_of(live + i - distance, live)))

    if kind == "a_shape":
        first, window = map(int, numbers)
        blocks |= {(i // 128, block_of(rank, live)) for i in range(count) for rank in range(total)
                   if rank < first and rank <= live + i}  # fmt: skip
        for distance in range(min(window, total)):
            add_diagonal(distance)
    elif kind == "vertical_slash":
        last = range(max(0, count - 64), count)
        norm = [torch.logsumexp(logits[i], 0) for i in last]
        if how.get("sink") is not None:
            norm = [torch.logaddexp(x, torch.tensor(float(how["sink"]), dtype=torch.float64)) for x in norm]
        weights = [torch.exp(logits[i] - x).tolist() for i, x in zip(last, norm)]
        columns = {rank: sum(w[rank] for w in weights) for rank in range(total)}
        diagonals = dict.fromkeys(range(total), 0.0)
        for i, w in zip(last, weights):
            for rank in range(live + i + 1):
                diagonals[live + i - rank] += w[rank]
        single = best(columns, int(numbers[0]), set(range(30)))
        for distance in best(diagonals, int(numbers[1]), set(range(30))):
            add_diagonal(distance)
    else:
        names = sorted({block_of(rank, live) for rank in range(total)}, key=lambda n: (n[0] != "slots", n[1]))
        means = {
            n: torch.stack([keys[r].double() for r in range(total) if block_of(r, live) == n]).mean(0) for n in names
        }
        for start in range(0, count, 128):
            mean = q[start : start + 128].double().mean(0)
            seen = [n for n in names if n[0] == "slots" or n[1] * 64 <= start + 127]
            chosen = sorted(seen, key=lambda n: -float(mean @ means[n]))[: int(numbers[0])]
            blocks |= {(start // 128, n) for n in chosen}
    found = [
        [rank in single or (i, block_of(rank, live)) in blocks for rank in range(total)]
        for i in range(-(-count // 128))
    ]
    return torch.tensor(found).repeat_interleave(128, 0)[:count] & causal


def attend(
    q: Tensor, keys: Tensor, values: Tensor, live: int, seen: Tensor, how: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output (T, Dv) and log-sum-exp (T,) of one head in float64 on the keys that are seen."""
    logits = ranked_logits(q, keys, live, how).masked_fill(~seen, -math.inf)
    norm = torch.logsumexp(logits, 1)
    if how.get("sink") is not None:
        norm = torch.logaddexp(norm, torch.tensor(float(how["sink"]), dtype=torch.float64))
    return torch.exp(logits - norm[:, None]) @ values.double(), norm
