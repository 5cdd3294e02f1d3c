"""Builds the documents of each task: facts in a room, and questions about them."""

from __future__ import annotations

from collections.abc import Callable

from kvrewrite.tools.evaluation.room import Document, Question, Room
from kvrewrite.tools.evaluation.words import ADJECTIVES

_NEEDLE = " The magic number of"


def _needle(key: tuple[str, str], value: str) -> tuple[str, ...]:
    return (_NEEDLE, *key, " is", value, ".")


def _ask(key: tuple[str, str], value: str) -> Question:
    return Question(("\nQ:", _NEEDLE, *key, " is"), (value,), (value.strip(),))


def needle_single(room: Room) -> Document:
    """RULER's NIAH single: one needle, filler of one kind (noise, prose or code)."""
    key, value = next(room.keys()), room.value()
    questions = room.reserve([_ask(key, value)])
    return Document(room.spread([_needle(key, value)]), questions)


def needle_multikey(room: Room) -> Document:
    """RULER's NIAH multi-key 1, which has three distractors: here 3 to tokens/100."""
    count = room.rng.randint(4, max(4, room.tokens // 100))
    needles = [(key, room.value()) for key, _ in zip(room.keys(), range(count), strict=False)]
    asked = room.rng.sample(needles, count)
    questions = room.reserve([_ask(*needle) for needle in asked])
    return Document(room.spread([_needle(*needle) for needle in needles]), questions)


def needle_distractors(room: Room) -> Document:
    """RULER's NIAH multi-key 2: the filler is other needles. Any of them may be asked for."""
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


def needle_multivalue(room: Room) -> Document:
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


def needle_multiquery(room: Room) -> Document:
    """RULER's NIAH multi-query: four keys in one question; four other keys are distractors if there is room."""
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


def kv_retrieval(room: Room) -> Document:
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


def variable_tracking(room: Room) -> Document:
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


def _list(room: Room, count_of: Callable[[int], dict[str, int]], question: Question) -> Document:
    """Makes a list of words in random order, each as often as `count_of(the number of words)` says."""
    head = ("\nWords:",)
    total = room.left - room.cost(head)
    for _ in range(4):  # words may be more than one token in a foreign tokenizer
        counts = count_of(total)
        words = [word for word, count in counts.items() for _ in range(count)]
        over = room.cost(words) + room.cost(head) - room.left
        if over <= 0:
            break
        total -= -(-over * total // (over + room.left))
    room.rng.shuffle(words)
    return Document([*head, *words], [question])


def common_words(room: Room) -> Document:
    """RULER's common words extraction: common words occur 10 times as often as others, like there; here four of them
    (RULER: ten), no numbering, and as many others (up to 240) as fit at 3 each, or more often in longer texts."""
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


def frequent_words(room: Room) -> Document:
    """RULER's frequent words extraction: counts follow a zeta law with exponent 2, and the three most frequent words
    are asked for; here with real instead of coded words, and counts that are the law's own, not drawn, so that no
    important ranks tie."""
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


def few_shot(room: Room) -> Document:
    """Few-shot classification: four classes of four nouns each; an input is two adjectives and a noun, a label a
    word."""
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


# What comes before an input, and between it and its label.
_FORMS = ((" Input:", " ->"), (" Text:", " =>"), (" Example:", " ="))
_WORDS = """Input Text Example Case Line Sample Entry Record Row Data Word Thing Name Object Key Note Task Test Type Value Point
Pair Shot Turn Show Read Given Here Left Side"""


_SIGNS = """-> => = is : means <- ~ # @ & * + / % ^ $ ! ? ; == >> :: -- ... gives to as was has goes makes into under label class
answer"""


_LEADS = tuple(f" {word}:" for word in _WORDS.split())
_MARKS = tuple(f" {sign}" for sign in _SIGNS.split())
_VARIED = tuple((lead, mark) for lead in _LEADS for mark in _MARKS)
_HELD_OUT = ((" Item:", " |"),)


def few_shot_rare(
    room: Room, forms: tuple[tuple[str, str], ...] = _FORMS, fillers: tuple[str, ...] = ("noise", "code")
) -> Document:
    """Few-shot classification with rare classes among filler: four classes of four nouns each have most examples. A
    rare class has one noun and one example, and is what is asked for. An input is one to four adjectives and a noun.

    All examples of a text have the same form. A third of the room is filler; about one example in four is of a rare
    class, up to 64.
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


def few_shot_varied(room: Room) -> Document:
    """`few_shot_rare` in a thousand forms, not three: 30 words before an input, 37 marks between it and its label."""
    return few_shot_rare(room, _VARIED)


def few_shot_held_out(room: Room) -> Document:
    """`few_shot_rare` in a form and among filler (prose) that neither it nor `few_shot_varied` uses: tests what was
    trained on them."""
    return few_shot_rare(room, _HELD_OUT, ("prose",))
