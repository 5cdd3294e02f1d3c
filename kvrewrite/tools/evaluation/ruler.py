"""RULER's thirteen tasks (Hsieh et al., arXiv 2404.06654), by its definitions: counts, templates, scoring, lengths.

`ruler:NAME` for each name in RULER's `synthetic.yaml`. A length counts as there: prompt and the tokens that may be
generated. What differs, because nothing is downloaded: essays are Python's own reference topics (`noise.prose`), words are
those of `words.py` (for long lists also those of the standard library), and a sample has a seed of its own. `qa_1` and
`qa_2` need SQuAD's or HotpotQA's JSON file (`--data ruler:qa_1=FILE`). The prompt is cut where the question begins, so
that the context can be compressed before it is known.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from kvrewrite.tools.evaluation import ruler_qa
from kvrewrite.tools.evaluation.noise import code, prose
from kvrewrite.tools.evaluation.room import Sample
from kvrewrite.tools.evaluation.words import ADJECTIVES, NOUNS

PREFIX = "ruler:"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # where needles lie in an essay, in percent of its sentences
SHORT = 4096  # below this length, word lists have other counts

Parts = tuple[str, str, tuple[str, ...]]  # context, question, answers


@dataclass(frozen=True)
class Task:
    """build: makes a sample of so many units of haystack. max_new_tokens: of an answer. units: the least haystack."""

    build: Callable[[Random, int, int], Parts]
    max_new_tokens: int
    units: int = 10
    rule: str = "all"


# -------------------------------------------------------------------------------------------------------- haystacks
@cache
def essay() -> tuple[str, ...]:
    """The words of the essays."""
    words = " ".join("".join(prose()).split()).split(" ")
    if len(words) < 100:
        raise ValueError("this Python has no reference topics (pydoc_data.topics), which stand for essays")
    return tuple(words)


@cache
def word_list() -> tuple[str, ...]:
    """Distinct words: nouns and adjectives, then those of the standard library."""
    found = dict.fromkeys((*NOUNS, *ADJECTIVES))
    for line in (*prose(), *code()):
        found.update(dict.fromkeys(re.findall(r"\b[a-z]{4,12}\b", line)))
    return tuple(found)


def sentences(text: str) -> list[str]:
    """Splits a text after the end of each sentence."""
    return re.split(r"(?<=[.!?])\s+", text)


def in_essay(rng: Random, words: int, facts: list[str]) -> str:
    """So many words of essays, the facts at random depths between their sentences."""
    source = essay()
    start = rng.randrange(len(source))  # RULER begins at the first word; so samples of one length differ
    text = [source[(start + i) % len(source)] for i in range(words)]
    lines = sentences(" ".join(text))
    places = sorted(int(len(lines) * depth / 100) for depth in rng.sample(DEPTHS, len(facts)))
    parts, done = [], 0
    for place, fact in zip(places, facts, strict=True):
        parts += [*lines[done:place], fact]
        done = place
    return " ".join([*parts, *lines[done:]])


def in_lines(rng: Random, lines: list[str], facts: list[str]) -> str:
    """The facts in their order at random places among lines."""
    if len(lines) < len(facts):
        raise ValueError(f"{len(lines)} lines are too few for {len(facts)} facts")
    places = sorted(rng.sample(range(len(lines)), len(facts)))
    for shift, (place, fact) in enumerate(zip(places, facts, strict=True)):
        lines.insert(place + shift, fact)
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- needles
def _draw(rng: Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def niah(
    haystack: str,
    key_kind: str = "words",
    value_kind: str = "numbers",
    *,
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
) -> Callable[[Random, int, int], Parts]:
    """Needles in a haystack. haystack: "noise", "essay" or "needle"; asked: keys that the question names."""

    def build(rng: Random, units: int, tokens: int) -> Parts:
        needles: dict[str, list[str]] = {}
        while len(needles) < max(keys, asked):
            needles.setdefault(_draw(rng, key_kind), [_draw(rng, value_kind) for _ in range(values)])
        facts = [NEEDLE.format(kind=value_kind, key=k, value=v) for k, found in needles.items() for v in found]
        rng.shuffle(facts)
        if haystack == "essay":
            text = in_essay(rng, units, facts)
        elif haystack == "noise":
            text = in_lines(rng, [NOISE] * units, facts)
        else:
            others = [(_draw(rng, key_kind), _draw(rng, value_kind)) for _ in range(units)]
            others = [(k, v) if k not in needles else (f"{k}-{k}", v) for k, v in others]
            text = in_lines(rng, [NEEDLE.format(kind=value_kind, key=k, value=v) for k, v in others], facts)
        chosen = rng.sample(list(needles), asked)
        query = ", ".join(chosen[:-1]) + f", and {chosen[-1]}" if asked > 1 else chosen[0]
        one = asked * values == 1
        a, kind, is_all, is_ = ("A", value_kind[:-1], "is", "is") if one else ("Some", value_kind, "are all", "are")
        them = kind if one else value_kind
        context = (
            f"{a} special magic {them} {is_} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {them} afterwards.\n{text}"
        )
        question = (
            f"\nWhat {is_all} the special magic {them} for {query} mentioned in the provided text?"
            f" The special magic {them} for {query} mentioned in the provided text {is_}"
        )
        return context, question, tuple(v for k in chosen for v in needles[k])

    return build


# --------------------------------------------------------------------------------------------------- variable tracking
HOPS = 4


def _chain(rng: Random, letters: int, value: str) -> tuple[list[str], list[str]]:
    """Names and the lines that pass a value on from name to name."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=letters))
        names += [name] if name not in names else []
    return names, [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]


def _track(rng: Random, units: int, letters: int) -> Parts:
    value = str(rng.randint(10000, 99998))
    names, facts = _chain(rng, letters, value)
    text = in_lines(rng, [NOISE] * units, facts)
    context = f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}"
    question = (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
        f"chain(s) of variable assignment in the text above, {len(names)} variables are assigned the value {value}, "
        "they are: "
    )
    return context, question, tuple(names)


def variable_tracking(rng: Random, units: int, tokens: int) -> Parts:
    """One chain of four hops in noise, after a worked example with names of three letters (5 lines of noise)."""
    before, asked, names = _track(rng, 5, 3)
    context, question, answers = _track(rng, units, 5)
    return f"{before}{asked} {' '.join(names)}\n\n{context}", question, answers


# -------------------------------------------------------------------------------------------------------------- words
def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _common(rng: Random, count: int, often: int, seldom: int) -> Parts:
    if count > len(word_list()):
        raise ValueError(f"{count} different words are needed, and there are {len(word_list())}")
    known = len(NOUNS) + len(ADJECTIVES)
    drawn = rng.sample(word_list()[:known] if count <= known else word_list(), count)
    words = drawn[:10] * often + drawn[10:] * seldom
    rng.shuffle(words)
    context = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{_numbered(words)}"
    )
    question = (
        "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often "
        "in the list are:"
    )
    return context, question, tuple(drawn[:10])


def common_words(rng: Random, units: int, tokens: int) -> Parts:
    """Ten words 30 times among words that are there 3 times (6 and 1 in short prompts), after a worked example."""
    count = max(units, 11)
    shown = _common(rng, 20, 3, 1) if tokens < SHORT else _common(rng, 40, 10, 3)
    asked = _common(rng, count, 6, 1) if tokens < SHORT else _common(rng, count, 30, 3)
    return f"{shown[0]}{shown[1]} {_numbered(list(shown[2]))}\n{asked[0]}", asked[1], asked[2]


def frequent_words(rng: Random, units: int, tokens: int) -> Parts:
    """Coded words whose counts follow a zeta law with exponent 2; the most frequent one is dots, which do not count."""
    words: dict[str, None] = {}
    while len(words) < max(4, (tokens - 50) // 50):
        words["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))] = None
    coded = ["...", *list(words)[1:]]
    zeta = math.pi**2 / 6
    drawn = [word for rank, word in enumerate(coded, 1) for _ in range(int(units * rank**-2.0 / zeta))]
    if len(set(drawn)) < 4:
        raise ValueError(f"{units} words are too few")
    rng.shuffle(drawn)
    context = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(drawn)}"
    )
    question = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:"
    )
    return context, question, tuple(coded[1:4])


# -------------------------------------------------------------------------------------------------------------- tasks
_NAMED = {
    "niah_single_1": Task(niah("noise"), 128, 2),
    "niah_single_2": Task(niah("essay"), 128),
    "niah_single_3": Task(niah("essay", value_kind="uuids"), 128),
    "niah_multikey_1": Task(niah("essay", keys=4), 128),
    "niah_multikey_2": Task(niah("needle"), 128, 2),
    "niah_multikey_3": Task(niah("needle", "uuids", "uuids"), 128, 2),
    "niah_multivalue": Task(niah("essay", values=4), 128),
    "niah_multiquery": Task(niah("essay", asked=4), 128),
    "vt": Task(variable_tracking, 30, HOPS + 1),
    "cwe": Task(common_words, 120, 11),
    "fwe": Task(frequent_words, 50, 40),
    "qa_1": Task(lambda *_: ("", "", ()), 32, 1, "any"),
    "qa_2": Task(lambda *_: ("", "", ()), 32, 1, "any"),
}
TASKS: dict[str, Task] = {PREFIX + name: task for name, task in _NAMED.items()}
WITH_DATA = (f"{PREFIX}qa_1", f"{PREFIX}qa_2")


def make(task: str, *, tokens: int, seed: int, tokenizer: Any, data: Path | None = None) -> Sample:
    """Makes a sample with as much haystack as fits: prompt and answer have at most `tokens` tokens.

    data: the file of `qa_1` or `qa_2`. Raises ValueError where `tokens` are too few.
    """
    made = TASKS[task]
    build = made.build if data is None else ruler_qa.builder(data, task == WITH_DATA[0], seed)
    room = tokens - made.max_new_tokens

    def sample(units: int) -> tuple[Parts, int]:
        parts = build(Random(f"{task}:{tokens}:{seed}"), units, tokens)
        return parts, len(tokenizer(parts[0] + parts[1])["input_ids"])

    units, best = _fit(lambda n: sample(n)[1], made.units, room)
    if not best:
        raise ValueError(f"{made.max_new_tokens} tokens of answer and the least haystack do not fit into {tokens}")
    context, question, answers = sample(units)[0]
    return Sample(task, context, question, answers, made.rule)


def _fit(length: Callable[[int], int], least: int, room: int) -> tuple[int, int]:
    """Returns the units whose length comes closest to `room` from below, and that length; (least, 0) if none fits."""
    low, size = least, length(least)
    if size > room:
        return least, 0
    step = max(1, (room - size) * least // (2 * size))
    high = low + step
    while (found := length(high)) <= room:
        if found <= size:  # there is no more: a list of words or documents has an end
            return low, size
        low, size = high, found
        high = low + max(1, min(low, (room - found) * low // found or 1))
    while high - low > max(1, low // 200):
        middle = min(high - 1, max(low + 1, low + (high - low) // 2))
        found = length(middle)
        if found <= room:
            low, size = middle, found
        else:
            high = middle
    return low, size


def score(sample: Sample, text: str) -> float:
    """RULER's string matching: the share of answers that the reply has, or for questions whether it has any."""
    found = [answer.lower() in text.lower() for answer in sample.answers]
    return float(any(found)) if sample.rule == "any" else sum(found) / len(found)
