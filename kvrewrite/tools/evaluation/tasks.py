"""Synthetic long-context tasks, each of any length, with answers that can be checked by string.

The tasks are RULER's (Hsieh et al., arXiv 2404.06654) where RULER has one, plus key-value retrieval (the form of "Lost in the
Middle", Liu et al., arXiv 2307.03172) and few-shot classification. They depart from both on purpose, so that a model of a few
million parameters with its own tokenizer can do them:

- keys are an adjective and a noun, values have four digits, words come from `words.py`; no UUIDs, no essays;
- an answer follows the same words in the question as in the context ("The magic number of red fox is" -> " 4821"), since
  retrieval emerges in small models only then;
- no instructions in front of the context; the question stands at its end as one line that begins with "Q:".

Each task's `summary` says what it asks; the builders' docstrings name further departures.

Filler is repeated noise sentences, prose (Python's own reference, `pydoc_data.topics`) or code (modules of the standard
library), all read from the Python that runs this: samples are the same for the same (task, tokens, seed), tokenizer and Python
version. A part that is missing there is left out of the mix.

A text is built from pieces that start with a space or a line break or are punctuation after a word, so that tokenizers which
split there give pieces joined the same ids as pieces tokenized one by one; `make` checks the length of the whole text and
builds again where a tokenizer behaves differently.
"""

from __future__ import annotations

import importlib
import re
import sysconfig
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from kvrewrite.tools.evaluation.words import ADJECTIVES, NOUNS

__all__ = ["TASKS", "UNKNOWN_TO_SMALL", "Document", "Question", "Sample", "Task", "draft", "make", "score"]

Length = Callable[[str], int]


@dataclass(frozen=True)
class Sample:
    """One question about one context.

    The prompt is `context + question`, tokenized as one text, or the context with the tokenizer's special tokens and then the
    question without (`add_special_tokens=False`): the ids are the same for the shipped model's tokenizer. The model answers
    right after it.
    """

    task: str
    context: str
    question: str
    answers: tuple[str, ...]
    rule: str
    """"all": the share of answers found counts; "any": one of them is enough."""
    target: str = ""
    """The whole reply as the shipped model learned to give it, without its end-of-text token."""


@dataclass(frozen=True)
class Question:
    """A question's pieces, the reply's pieces, and the strings that a reply is checked for."""

    pieces: tuple[str, ...]
    target: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A context as pieces, with one or more questions about it; all questions fit next to the context (see `draft`)."""

    context: list[str]
    questions: list[Question]


@dataclass(frozen=True)
class Task:
    """How a task's documents are built, and how long a reply can be."""

    name: str
    summary: str
    source: str
    build: Callable[[_Room], Document]
    rule: str = "all"
    max_new_tokens: int = 8


# ------------------------------------------------------------------------------------------------------------- filler

NOISE = (
    " The road is long.",
    " The air is clear.",
    " The day is bright.",
    " We walk on.",
    " Up and down again.",
)
_MODULES = """argparse ast asyncio.base_events asyncio.tasks bdb calendar cmd codecs collections.__init__ configparser contextlib
copy csv dataclasses datetime difflib dis doctest email.message enum fileinput fnmatch fractions ftplib functools glob
gzip heapq html.parser http.client imaplib inspect ipaddress json.decoder json.encoder locale logging.__init__ mailbox
mimetypes numbers operator optparse os pathlib pdb pickle pickletools platform plistlib posixpath pprint queue random
sched selectors shelve shlex shutil smtplib socket socketserver ssl statistics string subprocess tarfile tempfile textwrap
threading timeit tokenize trace traceback turtle types typing unittest.case unittest.mock urllib.parse urllib.request uuid
warnings weakref xml.dom.minidom zipfile"""
LONGEST_LINE = 96


@cache
def prose() -> tuple[str, ...]:
    """Lines of Python's reference topics in order, each a piece that starts with a line break; empty where it is missing."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return ()
    lines = (" ".join(line.split()) for name in sorted(topics) for line in topics[name].splitlines())
    return tuple("\n" + line for line in lines if line.isascii() and len(line) <= LONGEST_LINE and line.count(" ") >= 2)


@cache
def code() -> tuple[str, ...]:
    """Lines of standard library modules in order, indented as they are, each a piece that starts with a line break."""
    root = Path(sysconfig.get_path("stdlib"))
    lines: list[str] = []
    for name in _MODULES.split():
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        if path.is_file():
            lines += path.read_text(encoding="utf-8").splitlines()
    kept = (line.rstrip() for line in lines if line.isascii() and "\t" not in line and "\f" not in line)
    return tuple("\n" + line for line in kept if line.strip() and len(line) <= LONGEST_LINE)


def _repeat(lines: tuple[str, ...], start: int) -> Iterator[str]:
    while True:
        yield from lines[start:]
        yield from lines[:start]


# --------------------------------------------------------------------------------------------------------------- room


@dataclass
class _Room:
    """What a builder works in: a random stream, a length to fill, and how many questions are wanted."""

    rng: Random
    tokens: int
    """Length of the context with its questions."""
    questions: int
    """At most so many questions; 1 for a sample."""
    length: Length
    replies: bool
    """Whether `tokens` must also hold the replies, each with one token after it (training texts)."""
    filler: str | None = None
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.tokens

    def cost(self, pieces: tuple[str, ...] | list[str]) -> int:
        return sum(map(self.length, pieces))

    def reserve(self, questions: list[Question]) -> list[Question]:
        """As many of the questions as fit into half of the room, at least one; their length is taken off what is left."""
        kept: list[Question] = []
        for question in questions[: self.questions]:
            need = self.cost(question.pieces) + (self.cost(question.target) + 1 if self.replies else 0)
            if kept and self.left - need < self.tokens // 2:
                break
            self.left -= need
            kept.append(question)
        return kept

    def lines(self) -> Iterator[str]:
        """An endless run of filler of one kind."""
        kinds = [kind for kind, there in (("noise", True), ("prose", prose()), ("code", code())) if there]
        kind = self.filler if self.filler in kinds else self.rng.choice(kinds)
        lines = {"noise": NOISE, "prose": prose(), "code": code()}[kind]
        return _repeat(lines, 0 if kind == "noise" else self.rng.randrange(len(lines)))

    def spread(self, facts: list[tuple[str, ...]]) -> list[str]:
        """The facts in their order, at random places in filler that fills the room."""
        left = self.left - sum(map(self.cost, facts))
        if left < 0:
            raise ValueError(f"{self.tokens} tokens are too few for this task")
        filler: list[str] = []
        misses = 0
        for line in self.lines():
            need = self.length(line)
            if need <= left:
                filler.append(line)
                left -= need
            else:
                misses += 1
            if left < 4 or misses > 40:
                break
        places = sorted(self.rng.randrange(len(filler) + 1) for _ in facts)
        pieces: list[str] = []
        done = 0
        for place, fact in zip(places, facts, strict=True):
            pieces += filler[done:place]
            pieces += fact
            done = place
        return pieces + filler[done:]

    def pack(self, head: tuple[str, ...], fact: Callable[[], tuple[str, ...]]) -> list[tuple[str, ...]]:
        """As many facts as fit behind a heading: (heading, fact, fact, ...)."""
        facts = [head]
        left = self.left - self.cost(head)
        while True:
            new = fact()
            left -= self.cost(new)
            if left < 0:
                break
            facts.append(new)
        if len(facts) < 2:
            raise ValueError(f"{self.tokens} tokens are too few for this task")
        return facts

    def keys(self) -> Iterator[tuple[str, str]]:
        """Endless keys, (" adjective", " noun"), none twice."""
        seen = set()
        while True:
            key = (" " + self.rng.choice(ADJECTIVES), " " + self.rng.choice(NOUNS))
            if key not in seen:
                seen.add(key)
                yield key

    def value(self) -> str:
        return f" {self.rng.randrange(1000, 10000)}"

    def words(self, count: int) -> list[str]:
        return [" " + word for word in self.rng.sample(NOUNS, count)]


# -------------------------------------------------------------------------------------------------------------- needles

_NEEDLE = " The magic number of"


def _needle(key: tuple[str, str], value: str) -> tuple[str, ...]:
    return (_NEEDLE, *key, " is", value, ".")


def _ask(key: tuple[str, str], value: str) -> Question:
    return Question(("\nQ:", _NEEDLE, *key, " is"), (value,), (value.strip(),))


def _needle_single(room: _Room) -> Document:
    """RULER's NIAH single: one needle, filler of one kind (noise, prose or code)."""
    key, value = next(room.keys()), room.value()
    questions = room.reserve([_ask(key, value)])
    return Document(room.spread([_needle(key, value)]), questions)


def _needle_multikey(room: _Room) -> Document:
    """RULER's NIAH multi-key 1, which has three distractors: here 3 to tokens/100."""
    count = room.rng.randint(4, max(4, room.tokens // 100))
    needles = [(key, room.value()) for key, _ in zip(room.keys(), range(count), strict=False)]
    asked = room.rng.sample(needles, count)
    questions = room.reserve([_ask(*needle) for needle in asked])
    return Document(room.spread([_needle(*needle) for needle in needles]), questions)


def _needle_distractors(room: _Room) -> Document:
    """RULER's NIAH multi-key 2: the filler is other needles. The last of a full context may be any of them."""
    needles: list[tuple[tuple[str, str], str]] = []
    keys = room.keys()

    def fact() -> tuple[str, ...]:
        needles.append((next(keys), room.value()))
        return _needle(*needles[-1])

    room_for = room.questions * (room.cost(_ask((" red", " fox"), " 1234").pieces) + (8 if room.replies else 0))
    room.left -= min(room_for, room.tokens // 2)
    facts = room.pack((), fact)[1:]
    asked = room.rng.sample(needles[: len(facts)], min(len(facts), room.questions))
    room.left = room.tokens
    questions = room.reserve([_ask(*needle) for needle in asked])
    return Document([piece for fact in facts for piece in fact], questions)


def _needle_multivalue(room: _Room) -> Document:
    """RULER's NIAH multi-value: four values of one key; here two keys with four values each; the
    reply of the shipped model lists them from the smallest (any order scores)."""
    groups = [(key, [room.value() for _ in range(4)]) for key, _ in zip(room.keys(), range(2), strict=False)]
    order = [0, 0, 0, 0, 1, 1, 1, 1]
    room.rng.shuffle(order)
    values = [iter(group[1]) for group in groups]
    facts = [_needle(groups[g][0], next(values[g])) for g in order]
    questions = [
        Question(
            ("\nQ:", " All four.", _NEEDLE, *key, " is"), tuple(sorted(found)), tuple(v.strip() for v in sorted(found))
        )
        for key, found in groups
    ]
    room.rng.shuffle(questions)
    questions = room.reserve(questions)
    return Document(room.spread(facts), questions)


def _needle_multiquery(room: _Room) -> Document:
    """RULER's NIAH multi-query: four keys asked in one question; four further keys are distractors where there is room."""
    count = 8 if room.tokens >= 400 else 4
    needles = [(key, room.value()) for key, _ in zip(room.keys(), range(count), strict=False)]
    questions = []
    for _ in range(2 if count == 8 else 1):
        asked = room.rng.sample(needles, 4)
        names = [part for i, (key, _) in enumerate(asked) for part in ((",",) if i else ()) + key]
        replies = [part for i, (key, v) in enumerate(asked) for part in ((",",) if i else ()) + (*key, " is", v)]
        questions.append(
            Question(("\nQ:", " The magic numbers of", *names, ":"), tuple(replies), tuple(v.strip() for _, v in asked))
        )
    questions = room.reserve(questions)
    return Document(room.spread([_needle(*needle) for needle in needles]), questions)


# ----------------------------------------------------------------------------------------------------- other retrieval


def _kv_retrieval(room: _Room) -> Document:
    """Key-value retrieval: "Lost in the Middle" has one JSON object of UUIDs; here one record a line, no quotes."""
    records: list[tuple[tuple[str, str], str]] = []
    keys = room.keys()

    def fact() -> tuple[str, ...]:
        records.append((next(keys), room.value()))
        return ("\n-", " name:", *records[-1][0], ",", " value:", records[-1][1])

    def ask(key: tuple[str, str], value: str) -> Question:
        return Question(("\nQ:", " name:", *key, ",", " value:"), (value,), (value.strip(),))

    room_for = room.questions * (room.cost(ask((" red", " fox"), " 1234").pieces) + (8 if room.replies else 0))
    room.left -= min(room_for, room.tokens // 2)
    facts = room.pack(("\nRecords:",), fact)
    asked = room.rng.sample(records[: len(facts) - 1], min(len(facts) - 1, room.questions))
    room.left = room.tokens
    questions = room.reserve([ask(*record) for record in asked])
    return Document([piece for fact in facts for piece in fact], questions)


def _variable_tracking(room: _Room) -> Document:
    """RULER's variable tracking, four hops: here 2 to tokens/512 chains (RULER: one), names are nouns, any filler."""
    chains = room.rng.randint(2, max(2, min(8, room.tokens // 512)))
    names = room.words(5 * chains)
    groups = [(room.value(), names[5 * i : 5 * i + 5]) for i in range(chains)]
    order = [i for i in range(chains) for _ in range(5)]
    room.rng.shuffle(order)
    done = [0] * chains
    facts: list[tuple[str, ...]] = []
    for i in order:
        value, chain = groups[i]
        at = done[i]
        facts.append(("\nVAR", chain[at], " =", *((" VAR", chain[at - 1]) if at else (value,))))
        done[i] += 1
    questions = [
        Question(("\nQ:", " VAR", " with", " value", value, ":"), tuple(chain), tuple(name.strip() for name in chain))
        for value, chain in groups
    ]
    room.rng.shuffle(questions)
    questions = room.reserve(questions)
    return Document(room.spread(facts), questions)


# --------------------------------------------------------------------------------------------------------- aggregation


def _list(room: _Room, count_of: Callable[[int], dict[str, int]], question: Question) -> Document:
    """A list of words, each as often as `count_of(the number of words)` says, in random order."""
    head = ("\nWords:",)
    total = room.left - room.cost(head)
    for _ in range(4):  # words may be more than one token in a tokenizer that is not ours
        counts = count_of(total)
        words = [word for word, count in counts.items() for _ in range(count)]
        over = room.cost(words) + room.cost(head) - room.left
        if over <= 0:
            break
        total -= -(-over * total // (over + room.left))
    room.rng.shuffle(words)
    return Document([*head, *words], [question])


def _common_words(room: _Room) -> Document:
    """RULER's common words extraction: the common words stand 10 times as often as the others, as there; here four of them
    (RULER: ten), no numbering, and as many others (up to 240) as there is room for at 3 each, or more often in longer texts."""
    words = room.words(244)
    common, others = sorted(words[:4]), words[4:]
    question = Question(("\nQ:", " The four most common words:"), tuple(common), tuple(word.strip() for word in common))
    room.reserve([question])

    def count_of(total: int) -> dict[str, int]:
        some = min(len(others), total // 3 - 40)
        if some < 8:
            raise ValueError(f"{room.tokens} tokens are too few for this task")
        often, rest = divmod(total, some + 40)
        counts = dict.fromkeys(common, 10 * often) | dict.fromkeys(others[:some], often)
        for word in others[: min(rest, some)]:
            counts[word] += 1
        return counts

    return _list(room, count_of, question)


def _frequent_words(room: _Room) -> Document:
    """RULER's frequent words extraction: counts follow a zeta law with exponent 2, the three most frequent are asked; here
    words for coded words, and counts are the law's own, not drawn, so that no two ranks that matter tie."""
    words = room.words(200)
    top = words[:3]
    question = Question(("\nQ:", " The three most frequent words:"), tuple(top), tuple(word.strip() for word in top))
    room.reserve([question])
    weights = [rank**-2.0 for rank in range(1, len(words) + 1)]

    def count_of(total: int) -> dict[str, int]:
        if total < 40:
            raise ValueError(f"{room.tokens} tokens are too few for this task")
        counts = {word: int(total * weight / sum(weights)) for word, weight in zip(words, weights, strict=True)}
        for word in words[4 : 4 + total - sum(counts.values())]:
            counts[word] += 1
        return counts

    return _list(room, count_of, question)


def _few_shot(room: _Room) -> Document:
    """Few-shot classification: four classes of four nouns each; an input is two adjectives and a noun, the label a word."""
    words = room.words(20)
    labels, members = words[:4], words[4:]
    seen: list[int] = []

    def line(member: int) -> tuple[str, ...]:
        return (" " + room.rng.choice(ADJECTIVES), " " + room.rng.choice(ADJECTIVES), members[member], " ->")

    def fact() -> tuple[str, ...]:
        seen.append(room.rng.randrange(16))
        return ("\nInput:", *line(seen[-1]), labels[seen[-1] // 4])

    def ask(member: int) -> Question:
        label = labels[member // 4]
        return Question(("\nQ:", " Input:", *line(member)), (label,), (label.strip(),))

    room_for = room.questions * (room.cost(ask(0).pieces) + (4 if room.replies else 0))
    room.left -= min(room_for, room.tokens // 2)
    facts = room.pack(("\nLabels:",), fact)
    shown = sorted(set(seen[: len(facts) - 1]))
    asked = [room.rng.choice(shown) for _ in range(room.questions)]
    room.left = room.tokens
    questions = room.reserve([ask(member) for member in asked])
    return Document([piece for fact in facts for piece in fact], questions)


# What stands in front of an input, and between it and its label.
_FORMS = ((" Input:", " ->"), (" Text:", " =>"), (" Example:", " ="))
_WORDS = """Input Text Example Case Line Sample Entry Record Row Data Word Thing Name Object Key Note Task Test Type Value Point
Pair Shot Turn Show Read Given Here Left Side"""
_SIGNS = """-> => = is : means <- ~ # @ & * + / % ^ $ ! ? ; == >> :: -- ... gives to as was has goes makes into under label class
answer"""
_LEADS = tuple(f" {word}:" for word in _WORDS.split())
_MARKS = tuple(f" {sign}" for sign in _SIGNS.split())
_VARIED = tuple((lead, mark) for lead in _LEADS for mark in _MARKS)
_HELD_OUT = ((" Item:", " |"),)


def _few_shot_rare(
    room: _Room, forms: tuple[tuple[str, str], ...] = _FORMS, fillers: tuple[str, ...] = ("noise", "code")
) -> Document:
    """Few-shot classification with rare classes, among filler: four classes of four nouns each take most examples; a rare class
    has one noun, stands in one example alone, and is what is asked for. An input is one to four adjectives and a noun.

    A text writes all its examples in one form. A third of the room is filler; about one example in four is of a rare class,
    up to 64.
    """
    rng = room.rng
    lead, mark = rng.choice(forms)
    room.filler = room.filler if room.filler in fillers else rng.choice(fillers)

    def line(noun: str) -> tuple[str, ...]:
        return (*(" " + rng.choice(ADJECTIVES) for _ in range(rng.randint(1, 4))), noun, mark)

    def fact(noun: str, label: str) -> tuple[str, ...]:
        return ("\n", lead.lstrip(), *line(noun), label)

    def ask(noun: str, label: str) -> Question:
        return Question(("\nQ:", lead, *line(noun)), (label,), (label.strip(),))

    words = room.words(20 + 2 * 64)
    labels, members, once = words[:4], words[4:20], words[20:]
    size = room.cost(("\n", lead.lstrip(), " red", " big", " old", members[0], mark, labels[0]))
    count = max(1, min(64, room.tokens // (6 * size)))
    rare = list(zip(once[:count], once[64 : 64 + count], strict=True))
    questions = room.reserve([ask(*pair) for pair in rng.sample(rare, count)])
    facts = [fact(*pair) for pair in rare]
    left = room.left * 2 // 3 - sum(map(room.cost, facts))
    while True:
        member = rng.randrange(16)
        new = fact(members[member], labels[member // 4])
        left -= room.cost(new)
        if left < 0:
            break
        facts.append(new)
    rng.shuffle(facts)
    return Document(room.spread(facts), questions)


def _few_shot_varied(room: _Room) -> Document:
    """`_few_shot_rare` in a thousand forms instead of three: 30 words in front, 37 marks between input and label."""
    return _few_shot_rare(room, _VARIED)


def _few_shot_held_out(room: _Room) -> Document:
    """`_few_shot_rare` in a form and among filler (prose) that neither it nor `_few_shot_varied` has: to test what was trained
    on them."""
    return _few_shot_rare(room, _HELD_OUT, ("prose",))


_RULER = "RULER, arXiv 2404.06654"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("needle_single", "one needle in noise, prose or code", _RULER, _needle_single),
        Task("needle_multikey", "one of several needles with different keys", _RULER, _needle_multikey),
        Task("needle_distractors", "one needle among nothing but needles", _RULER, _needle_distractors),
        Task("needle_multivalue", "all four values of one key", _RULER, _needle_multivalue, max_new_tokens=16),
        Task("needle_multiquery", "the values of four keys", _RULER, _needle_multiquery, max_new_tokens=32),
        Task("kv_retrieval", "one value of many records", "Lost in the Middle, arXiv 2307.03172", _kv_retrieval),
        Task(
            "variable_tracking",
            "all names that a value was passed on to",
            _RULER,
            _variable_tracking,
            max_new_tokens=10,
        ),
        Task("common_words", "the four words that stand ten times as often", _RULER, _common_words, max_new_tokens=8),
        Task("frequent_words", "the three most frequent words", _RULER, _frequent_words, max_new_tokens=8),
        Task("few_shot", "the label of a new input", "in-context classification", _few_shot, max_new_tokens=4),
        Task(
            "few_shot_rare",
            "the label of an input whose class has one example",
            "in-context classification",
            _few_shot_rare,
            max_new_tokens=4,
        ),
        Task(
            "few_shot_varied",
            "the same, written in many forms",
            "in-context classification",
            _few_shot_varied,
            max_new_tokens=4,
        ),
        Task(
            "few_shot_held_out",
            "the same in another form and among other filler",
            "in-context classification",
            _few_shot_held_out,
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
    """A document of at most `tokens` tokens with its questions (and their replies, for training), as pieces.

    length gives a piece's number of tokens; special tokens are not counted here. Raises KeyError for an unknown task and
    ValueError where `tokens` are too few for the task's facts.
    """
    if task not in TASKS:
        raise KeyError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    return TASKS[task].build(_Room(rng, tokens, questions, length, replies, filler))


_LENGTHS: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()


def _length_of(tokenizer: Any) -> Length:
    """Lengths of pieces in a transformers tokenizer, each looked up once."""
    known = _LENGTHS.setdefault(tokenizer, {})

    def length(piece: str) -> int:
        if piece not in known:
            known[piece] = len(tokenizer(piece, add_special_tokens=False)["input_ids"])
        return known[piece]

    return length


def make(task: str, *, tokens: int, seed: int, tokenizer: Any) -> Sample:
    """The sample of a task that (task, tokens, seed) names, at most `tokens` long with its question and special tokens.

    tokenizer is a transformers tokenizer (anything hashable that returns {"input_ids": list} works). The length is within
    2% or one line of a record (about 12 tokens) below `tokens`, whichever is more. Raises KeyError for an unknown task and
    ValueError where `tokens` are too few for it.
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
    """How much of a sample's answers a reply has, in [0, 1].

    RULER's string matching (case does not count), except that an answer must stand as a word or number of its own:
    "4821" is not found in "48213".
    """
    found = [
        re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None for answer in sample.answers
    ]
    return float(any(found)) if sample.rule == "any" else sum(found) / len(found)
