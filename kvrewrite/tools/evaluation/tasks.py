"""Synthetic long-context tasks, each of any length, with answers that can be checked by string.

The tasks are RULER's (Hsieh et al., arXiv 2404.06654) where RULER has one, plus key-value retrieval (the form of "Lost
in the Middle", Liu et al., arXiv 2307.03172) and few-shot classification. They differ from both on purpose, so that a
model of a few million parameters with its own tokenizer can do them:

- keys are an adjective and a noun, values have four digits, words come from `words.py`; no UUIDs, no essays;
- an answer follows the same words in the question as in the context ("The magic number of red fox is" -> " 4821"), since
  otherwise small models do not learn retrieval;
- no instructions before the context; the question is at its end, as one line that begins with "Q:".

Each task's `summary` says what it asks; the docstrings in `builders.py` name further differences.

Filler is repeated noise sentences, prose (Python's own reference, `pydoc_data.topics`) or code (modules of the standard
library), all read from the Python that runs this (`noise.py`): samples are the same for the same (task, tokens, seed),
tokenizer and Python version. A part that is missing there is left out of the mix.

A text is built from pieces that start with a space or a line break, or are punctuation after a word. So tokenizers that
split there give the same ids for joined pieces as for single ones; `make` checks the length of the whole text and
builds again if a tokenizer behaves differently.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from kvrewrite.tools.evaluation.builders import (
    common_words,
    few_shot,
    few_shot_held_out,
    few_shot_rare,
    few_shot_varied,
    frequent_words,
    kv_retrieval,
    needle_distractors,
    needle_multikey,
    needle_multiquery,
    needle_multivalue,
    needle_single,
    variable_tracking,
)
from kvrewrite.tools.evaluation.room import Document, Length, Question, Room, Sample

__all__ = ["TASKS", "UNKNOWN_TO_SMALL", "Document", "Question", "Sample", "Task", "draft", "make", "score"]


@dataclass(frozen=True)
class Task:
    """How a task's documents are built, and how long a reply can be."""

    name: str
    summary: str
    source: str
    build: Callable[[Room], Document]
    rule: str = "all"
    max_new_tokens: int = 8


# --------------------------------------------------------------------------------------------------------- aggregation


_RULER = "RULER, arXiv 2404.06654"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("needle_single", "one needle in noise, prose or code", _RULER, needle_single),
        Task("needle_multikey", "one of several needles with different keys", _RULER, needle_multikey),
        Task("needle_distractors", "one needle among nothing but needles", _RULER, needle_distractors),
        Task("needle_multivalue", "all four values of one key", _RULER, needle_multivalue, max_new_tokens=16),
        Task("needle_multiquery", "the values of four keys", _RULER, needle_multiquery, max_new_tokens=32),
        Task("kv_retrieval", "one value of many records", "Lost in the Middle, arXiv 2307.03172", kv_retrieval),
        Task(
            "variable_tracking",
            "all names that a value was passed on to",
            _RULER,
            variable_tracking,
            max_new_tokens=10,
        ),
        Task("common_words", "the four words that stand ten times as often", _RULER, common_words, max_new_tokens=8),
        Task("frequent_words", "the three most frequent words", _RULER, frequent_words, max_new_tokens=8),
        Task("few_shot", "the label of a new input", "in-context classification", few_shot, max_new_tokens=4),
        Task(
            "few_shot_rare",
            "the label of an input whose class has one example",
            "in-context classification",
            few_shot_rare,
            max_new_tokens=4,
        ),
        Task(
            "few_shot_varied",
            "the same, written in many forms",
            "in-context classification",
            few_shot_varied,
            max_new_tokens=4,
        ),
        Task(
            "few_shot_held_out",
            "the same in another form and among other filler",
            "in-context classification",
            few_shot_held_out,
            max_new_tokens=4,
        ),
    )
}

UNKNOWN_TO_SMALL = ("few_shot_rare", "few_shot_varied", "few_shot_held_out")
"""Tasks that the shipped model was not trained on: for fine-tuning (docs/training.md)."""


# ------------------------------------------------------------------------------------------------------------- samples


def draft(
    task: str,
    *,
    tokens: int,
    rng: Random,
    length: Length,
    questions: int = 1,
    replies: bool = False,
    filler: str | None = None,
) -> Document:
    """Returns a document of at most `tokens` tokens with its questions (and their replies, for training), as pieces.

    length gives a piece's number of tokens; special tokens are not counted here. Raises KeyError for an unknown task
    and ValueError if `tokens` are too few for the task's facts.
    """
    if task not in TASKS:
        raise KeyError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    return TASKS[task].build(Room(rng, tokens, questions, length, replies, filler))


_LENGTHS: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()


def _length_of(tokenizer: Any) -> Length:
    """Returns a function for the lengths of pieces in a transformers tokenizer; each is looked up once."""
    known = _LENGTHS.setdefault(tokenizer, {})

    def length(piece: str) -> int:
        if piece not in known:
            known[piece] = len(tokenizer(piece, add_special_tokens=False)["input_ids"])
        return known[piece]

    return length


def make(task: str, *, tokens: int, seed: int, tokenizer: Any) -> Sample:
    """Makes the sample of a task for (task, tokens, seed), at most `tokens` long with its question and special tokens.

    tokenizer is a transformers tokenizer (anything hashable that returns {"input_ids": list} works). The length is
    within 2% or one line of a record (about 12 tokens) below `tokens`, whichever is more. Raises KeyError for an
    unknown task and ValueError if `tokens` are too few for it.
    """
    length = _length_of(tokenizer)
    room = tokens - len(tokenizer("")["input_ids"])
    best: Sample | None = None
    longest = 0
    for _ in range(8):
        document = draft(task, tokens=room, rng=Random(f"{task}:{tokens}:{seed}"), length=length)
        asked = document.questions[0]
        sample = Sample(
            task,
            "".join(document.context),
            "".join(asked.pieces),
            asked.answers,
            TASKS[task].rule,
            "".join(asked.target),
        )
        found = len(tokenizer(sample.context + sample.question)["input_ids"])
        if found <= tokens and found > longest:
            best, longest = sample, found
        if 0.98 * tokens - 12 <= found <= tokens:
            break
        room = int(room * (tokens - 4) / found)
    if best is None:
        raise ValueError(f"{task} does not fit into {tokens} tokens with this tokenizer")
    return best


def score(sample: Sample, text: str) -> float:
    """Returns the share of a sample's answers that a reply has, in [0, 1].

    RULER's string matching (case does not count), except that an answer must be a word or number of its own: "4821" is
    not found in "48213".
    """
    found = [
        re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None for answer in sample.answers
    ]
    return float(any(found)) if sample.rule == "any" else sum(found) / len(found)
