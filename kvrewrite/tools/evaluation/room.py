"""The space that tasks are built in: a length to fill with facts and filler; documents, questions and samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from kvrewrite.tools.evaluation.noise import NOISE, code, prose, repeat_lines
from kvrewrite.tools.evaluation.words import ADJECTIVES, NOUNS

Length = Callable[[str], int]


@dataclass(frozen=True)
class Sample:
    """One question about one context.

    The prompt is `context + question`, tokenized as one text, or the context with the tokenizer's special tokens and
    then the question without (`add_special_tokens=False`): the ids are the same for the shipped model's tokenizer. The
    model answers right after it.
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
    """A context as pieces, with one or more questions about it; all questions fit beside the context (see `draft`)."""

    context: list[str]
    questions: list[Question]


@dataclass
class Room:
    """A builder's space: a random stream, a length to fill, and the wanted number of questions."""

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
        """Returns as many questions as fit into half of the room, at least one; takes their length off what is left."""
        kept: list[Question] = []
        for question in questions[: self.questions]:
            need = self.cost(question.pieces) + (self.cost(question.target) + 1 if self.replies else 0)
            if kept and self.left - need < self.tokens // 2:
                break
            self.left -= need
            kept.append(question)
        return kept

    def lines(self) -> Iterator[str]:
        """Yields endless filler of one kind."""
        kinds = [kind for kind, there in (("noise", True), ("prose", prose()), ("code", code())) if there]
        kind = self.filler if self.filler in kinds else self.rng.choice(kinds)
        lines = {"noise": NOISE, "prose": prose(), "code": code()}[kind]
        return repeat_lines(lines, 0 if kind == "noise" else self.rng.randrange(len(lines)))

    def spread(self, facts: list[tuple[str, ...]]) -> list[str]:
        """Places the facts in their order at random places in filler that fills the room."""
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
        """Returns as many facts as fit after a heading: (heading, fact, fact, ...)."""
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
        """Yields endless distinct keys, (" adjective", " noun")."""
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
