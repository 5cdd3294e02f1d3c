"""Questions of the user's about long contexts, in the form of LongBench (arXiv 2308.14508): `longbench`.

A row: {"context", "input" (the question, or the instruction that ends the prompt), "answers": [...]}; and, if wanted,
"metric" ("f1", "rouge_l", "exact" or "contains"; default f1), "max_new_tokens" (default 64), "before" (text that begins the
prompt). A context that is too long loses its middle, as in LongBench. A reply counts for the best of the answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvrewrite.tools.evaluation.documents import read_rows
from kvrewrite.tools.evaluation.room import Sample

TASK = "longbench"
LIMIT = 64
TASKS = {TASK: SimpleNamespace(max_new_tokens=0)}  # each row says how many


@dataclass(frozen=True)
class Asked(Sample):
    """A row as a sample; `rule` is its metric."""

    limit: int = LIMIT


@cache
def _rows(path: Path) -> list[dict[str, Any]]:
    return read_rows(path)


def make(task: str, *, tokens: int, seed: int, tokenizer: Any, data: Path) -> Asked:
    """Returns row number `seed` of a file (again from the first after the last), at most `tokens` long with its reply.

    Raises ValueError for a row of another form.
    """
    rows = _rows(data)
    number = seed % len(rows)
    row = rows[number]
    answers, metric, limit = row.get("answers"), row.get("metric", "f1"), row.get("max_new_tokens", LIMIT)
    asked, named = row.get("input"), f"row {number + 1} of {data}"
    if (
        not isinstance(row.get("context"), str)
        or not isinstance(asked, str)
        or not isinstance(answers, list)
        or not answers
    ):
        raise ValueError(f'{named}: expected "context" and "input", texts, and "answers", a list of texts')
    if metric not in METRICS or not isinstance(limit, int) or limit < 1:
        raise ValueError(
            f"{named}: metric is {metric!r} and max_new_tokens {limit!r}, expected one of {', '.join(METRICS)}"
        )
    before = str(row.get("before", ""))
    room = tokens - limit - sum(len(tokenizer(text)["input_ids"]) for text in (before, asked))
    if room < 1:
        raise ValueError(f"{named}: question and reply do not fit into {tokens} tokens")
    return Asked(
        task, before + cut_middle(row["context"], room, tokenizer), asked, tuple(map(str, answers)), metric, "", limit
    )


def cut_middle(text: str, room: int, tokenizer: Any) -> str:
    """A text of at most `room` tokens: its two ends, where it is longer."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= room:
        return text
    first = room // 2
    return str(tokenizer.decode(ids[:first]) + tokenizer.decode(ids[len(ids) - (room - first) :]))


# -------------------------------------------------------------------------------------------------------------- scores
def words(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f(common: int, given: int, wanted: int) -> float:
    return 2 * common / (given + wanted) if common else 0.0


def f1(reply: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of the words that both have."""
    return _f(sum((Counter(reply) & Counter(answer)).values()), len(reply), len(answer))


def rouge_l(reply: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of the longest common subsequence."""
    best = [0] * (len(answer) + 1)
    for word in reply:
        before = list(best)
        for i, other in enumerate(answer, 1):
            best[i] = before[i - 1] + 1 if word == other else max(before[i], best[i - 1])
    return _f(best[-1], len(reply), len(answer))


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "f1": f1,
    "rouge_l": rouge_l,
    "exact": lambda reply, answer: float(list(reply) == list(answer)),
    "contains": lambda reply, answer: float(f" {' '.join(answer)} " in f" {' '.join(reply)} "),
}


def score(sample: Sample, text: str) -> float:
    """The best score of a reply over the answers, in [0, 1]."""
    return max(METRICS[sample.rule](words(text), words(answer)) for answer in sample.answers)
