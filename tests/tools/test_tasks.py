"""The tasks: lengths, determinism, answers that follow from the context, scores."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from kvrewrite.tools.evaluation import noise, room, tasks
from kvrewrite.tools.evaluation.room import Sample
from kvrewrite.tools.evaluation.tasks import TASKS, make, score
from kvrewrite.tools.evaluation.words import ADJECTIVES, NOUNS

NUMBER = re.compile(r"The magic number of (\w+ \w+) is (\d{4})\.")


class Splitter:
    """Words, pairs of digits and punctuation, one token each, and one special token in front: as the shipped tokenizer splits."""

    parts = re.compile(r" ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [1 + hash(p) % 1000 for p in self.parts.findall(text)]}


class Characters:
    """One token for two characters: pieces joined are not their tokens joined."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * ((len(text) + 1) // 2 + 1)}


SPLITTER = Splitter()


def count(sample: Sample, tokenizer) -> int:
    return len(tokenizer(sample.context + sample.question)["input_ids"])


@pytest.mark.parametrize("tokens", [256, 1000, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_length(task, tokens):
    for seed in range(4):
        found = count(make(task, tokens=tokens, seed=seed, tokenizer=SPLITTER), SPLITTER)
        assert max(0.98 * tokens - 12, 0.9 * tokens) <= found <= tokens


@pytest.mark.parametrize("task", TASKS)
def test_length_with_a_tokenizer_that_joins_pieces(task):
    characters = Characters()
    found = count(make(task, tokens=2000, seed=1, tokenizer=characters), characters)
    assert 0.95 * 2000 <= found <= 2000


@pytest.mark.parametrize("task", TASKS)
def test_sample_is_named_by_task_tokens_and_seed(task):
    one = make(task, tokens=512, seed=3, tokenizer=SPLITTER)
    assert make(task, tokens=512, seed=3, tokenizer=Splitter()) == one
    assert make(task, tokens=512, seed=4, tokenizer=SPLITTER) != one
    assert one.task == task
    assert one.rule == "all"
    assert one.question.startswith("\nQ:") and not one.question.endswith(" ")
    assert score(one, one.target) == 1.0
    assert score(one, "") == 0.0


def test_same_in_another_process():
    code = (
        "from tests.tools.test_tasks import *\n"
        "print(repr([make(t, tokens=300, seed=5, tokenizer=SPLITTER).context[-99:] for t in TASKS]))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr([make(t, tokens=300, seed=5, tokenizer=SPLITTER).context[-99:] for t in TASKS])


@pytest.mark.parametrize("task", ["needle_single", "needle_multikey", "needle_distractors"])
def test_needle(task):
    for seed in range(10):
        sample = make(task, tokens=1024, seed=seed, tokenizer=SPLITTER)
        needles = dict(NUMBER.findall(sample.context))
        assert len(needles) == len(NUMBER.findall(sample.context))  # no key twice
        asked = re.fullmatch(r"\nQ: The magic number of (\w+ \w+) is", sample.question)
        assert (needles[asked[1]],) == sample.answers
        if task == "needle_single":
            assert len(needles) == 1
        elif task == "needle_multikey":
            assert 4 <= len(needles) <= 10
        else:
            assert len(needles) > 70
            assert not NUMBER.sub("", sample.context).strip()  # nothing but needles


def test_needle_single_has_all_kinds_of_filler():
    kinds = set()
    for seed in range(30):
        context = make("needle_single", tokens=300, seed=seed, tokenizer=SPLITTER).context
        lines = NUMBER.sub("", context)
        start = lines.strip()[:20]
        kinds |= {
            kind
            for kind, of in (("noise", noise.NOISE), ("prose", noise.prose()), ("code", noise.code()))
            if start in "".join(of)
        }
    assert kinds == {"noise", "prose", "code"}


def test_needles_are_spread_over_the_context():
    places = []
    for seed in range(200):
        context = make("needle_single", tokens=300, seed=seed, tokenizer=SPLITTER).context
        places.append(NUMBER.search(context).start() / len(context))
    assert min(places) < 0.05
    assert max(places) > 0.85
    assert 0.4 < sum(places) / len(places) < 0.55


def test_multivalue():
    for seed in range(10):
        sample = make("needle_multivalue", tokens=1024, seed=seed, tokenizer=SPLITTER)
        asked = re.search(r"The magic number of (\w+ \w+) is$", sample.question)[1]
        values = [value for key, value in NUMBER.findall(sample.context) if key == asked]
        assert len(values) == 4
        assert sorted(values) == list(sample.answers)
        assert len(NUMBER.findall(sample.context)) == 8


def test_multiquery():
    sample = make("needle_multiquery", tokens=1024, seed=2, tokenizer=SPLITTER)
    needles = dict(NUMBER.findall(sample.context))
    keys = sample.question.removeprefix("\nQ: The magic numbers of ").removesuffix(":").split(", ")
    assert [needles[key] for key in keys] == list(sample.answers)
    assert len(keys) == 4
    assert len(needles) == 8
    assert sample.target == " " + ", ".join(f"{key} is {needles[key]}" for key in keys)


def test_kv_retrieval():
    sample = make("kv_retrieval", tokens=1024, seed=2, tokenizer=SPLITTER)
    records = dict(re.findall(r"\n- name: (\w+ \w+), value: (\d{4})", sample.context))
    assert (records[re.fullmatch(r"\nQ: name: (\w+ \w+), value:", sample.question)[1]],) == sample.answers
    assert len(records) > 80


def test_variable_tracking():
    for seed in range(10):
        sample = make("variable_tracking", tokens=2048, seed=seed, tokenizer=SPLITTER)
        value: dict[str, str] = {}
        for name, of, number in re.findall(r"\nVAR (\w+) = (?:VAR (\w+)|(\d{4}))", sample.context):
            assert name not in value
            value[name] = number or value[of]  # in the order of the text: every name is known before it is passed on
        asked = re.search(r"\d{4}", sample.question)[0]
        assert [name for name in value if value[name] == asked] == list(sample.answers)
        assert len(sample.answers) == 5
        assert len(set(value.values())) >= 2


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_common_words(tokens):
    sample = make("common_words", tokens=tokens, seed=1, tokenizer=SPLITTER)
    counts = Counter(sample.context.split()[1:]).most_common()
    assert {word for word, _ in counts[:4]} == set(sample.answers)
    assert counts[3][1] == counts[0][1]
    assert counts[3][1] >= 5 * counts[4][1]
    assert counts[3][1] == 10 * counts[-1][1]


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_frequent_words(tokens):
    sample = make("frequent_words", tokens=tokens, seed=1, tokenizer=SPLITTER)
    counts = Counter(sample.context.split()[1:]).most_common()
    assert tuple(word for word, _ in counts[:3]) == sample.answers
    assert counts[1][1] == pytest.approx(counts[0][1] / 4, rel=0.05)  # zeta with exponent 2
    assert counts[2][1] == pytest.approx(counts[0][1] / 9, rel=0.1)
    assert counts[2][1] > counts[3][1]


def test_few_shot():
    for seed in range(5):
        sample = make("few_shot", tokens=600, seed=seed, tokenizer=SPLITTER)
        labels: dict[str, str] = {}
        for word, label in re.findall(r"\nInput: \w+ \w+ (\w+) -> (\w+)", sample.context):
            assert labels.setdefault(word, label) == label
        assert (labels[sample.question.split()[-2]],) == sample.answers
        assert len(set(labels.values())) == 4


@pytest.mark.parametrize("task", ["few_shot_rare", "few_shot_varied", "few_shot_held_out"])
def test_few_shot_of_rare_classes(task):
    held_out = task == "few_shot_held_out"
    lines = set(noise.code() + tuple("\n" + line for line in noise.NOISE))
    for seed in range(5):
        sample = make(task, tokens=600, seed=seed, tokenizer=SPLITTER)
        asked = re.fullmatch(r"\nQ: (\w+): (?:\w+ )+(\w+) (\S+)", sample.question)
        lead, noun, mark = asked.groups()
        assert (lead == "Item") == (mark == "|") == held_out
        found = re.findall(rf"\n{lead}: (?:\w+ ){{1,4}}(\w+) {re.escape(mark)} (\w+)", sample.context)
        assert [label for word, label in found if word == noun] == list(sample.answers)  # one example
        classes = Counter(label for _, label in found)
        assert classes[sample.answers[0]] == 1 and sorted(classes.values())[-3] > 1
        assert len(dict(found)) == len(set(found))  # a noun has one label
        rest = re.sub(rf"\n{lead}: (?:\w+ ){{1,4}}\w+ {re.escape(mark)} \w+", "", sample.context)
        prose = rest.strip().split("\n")[0] in {line.strip() for line in noise.prose()} - {x.strip() for x in lines}
        assert prose == held_out
        assert 0.15 < len(rest) / len(sample.context) < 0.6


def test_score():
    sample = Sample("t", "", "", ("4821", "Fox"), "all")
    assert score(sample, " 4821, then a fox.") == 1.0
    assert score(sample, "48213 fox") == 0.5
    assert score(sample, "foxes 14821") == 0.0
    anyway = Sample("t", "", "", ("4821", "fox"), "any")
    assert score(anyway, "fox") == 1.0
    assert score(anyway, "none") == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_too_few_tokens(task):
    with pytest.raises(ValueError, match=r"too few|does not fit"):
        make(task, tokens=16, seed=0, tokenizer=SPLITTER)


def test_unknown_task():
    with pytest.raises(KeyError, match="needle_single"):
        make("needle", tokens=100, seed=0, tokenizer=SPLITTER)


@pytest.mark.parametrize("task", TASKS)
def test_training_documents_fit_with_their_replies(task):
    def length(piece: str) -> int:
        return len(SPLITTER(piece, add_special_tokens=False)["input_ids"])

    for seed in range(5):
        document = tasks.draft(task, tokens=700, rng=Random(seed), length=length, questions=8, replies=True)
        used = sum(map(length, document.context))
        used += sum(sum(map(length, q.pieces + q.target)) + 1 for q in document.questions)
        assert used <= 700
        assert len({q.pieces for q in document.questions}) == len(document.questions)
        whole = "".join(document.context) + "".join(document.questions[0].pieces)
        assert length(whole) == sum(map(length, document.context)) + sum(map(length, document.questions[0].pieces))


def test_missing_standard_library_leaves_noise(monkeypatch):
    monkeypatch.setattr(room, "prose", lambda: ())
    monkeypatch.setattr(room, "code", lambda: ())
    context = make("needle_single", tokens=300, seed=0, tokenizer=SPLITTER).context
    rest = NUMBER.sub("", context)
    for line in noise.NOISE:
        rest = rest.replace(line, "")
    assert not rest.strip()


def test_words():
    assert len(set(ADJECTIVES + NOUNS)) == len(ADJECTIVES) + len(NOUNS)
    assert all(re.fullmatch("[a-z]+", word) for word in ADJECTIVES + NOUNS)
