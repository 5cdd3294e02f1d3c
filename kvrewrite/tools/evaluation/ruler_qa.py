"""RULER's question answering: a question of SQuAD or HotpotQA, its documents among others of the data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from kvrewrite.errors import OptionError

ORDER = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


@dataclass(frozen=True)
class Asked:
    """A question. own: numbers of the documents that answer it; near: of others from the same article."""

    question: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class DataSet:
    documents: tuple[str, ...]
    asked: tuple[Asked, ...]


def builder(path: Path, squad: bool, seed: int) -> Callable[[Random, int, int], Any]:
    """Returns what builds question number `seed` of a file with so many documents in all."""
    data = _read(path, squad)
    asked = data.asked[seed % len(data.asked)]

    def build(rng: Random, units: int, tokens: int) -> tuple[str, str, tuple[str, ...]]:
        chosen = list(asked.own)
        chosen += rng.sample(asked.near, min(len(asked.near), max(0, units - len(chosen))))
        known = {*asked.own, *asked.near}
        rest = [i for i in range(len(data.documents)) if i not in known]
        chosen += rng.sample(rest, min(len(rest), max(0, units - len(chosen))))
        rng.shuffle(chosen)
        shown = "\n\n".join(f"Document {i}:\n{data.documents[number]}" for i, number in enumerate(chosen, 1))
        context = f"{ORDER}\n\nThe following are given documents.\n\n{shown}"
        return context, f"\n\n{ORDER}\n\nQuestion: {asked.question} Answer:", asked.answers

    return build


@cache
def _read(path: Path, squad: bool) -> DataSet:
    name = "SQuAD 2.0" if squad else "HotpotQA"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = _squad(data) if squad else _hotpot(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"--data {path}: expected {name}'s JSON file: {type(error).__name__}: {error}") from error
    if not found.asked:
        raise OptionError(f"--data {path}: {name}'s file has no question with an answer")
    return found


def _squad(data: Any) -> DataSet:
    texts = sorted({p["context"] for article in data["data"] for p in article["paragraphs"]})
    number = {text: i for i, text in enumerate(texts)}
    asked = []
    for article in data["data"]:
        all_of_it = [number[p["context"]] for p in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = number[paragraph["context"]]
            near = tuple(dict.fromkeys(i for i in all_of_it if i != own))
            for one in paragraph["qas"]:
                if not one.get("is_impossible"):
                    answers = tuple(a["text"] for a in one["answers"])
                    asked.append(Asked(one["question"], answers, (own,), near))
    return DataSet(tuple(texts), tuple(asked))


def _hotpot(data: Any) -> DataSet:
    rows = [[f"{title}\n{''.join(lines)}" for title, lines in row["context"]] for row in data]
    texts = sorted({text for row in rows for text in row})
    number = {text: i for i, text in enumerate(texts)}
    asked = [
        Asked(row["question"], (row["answer"],), tuple(dict.fromkeys(number[text] for text in shown)))
        for row, shown in zip(data, rows, strict=True)
    ]
    return DataSet(tuple(texts), tuple(asked))
