"""RULER's tasks are made by its definitions: counts, places, templates, lengths; answers are in the text."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from kvrewrite.assets import small_model
from kvrewrite.errors import OptionError
from kvrewrite.tools.evaluation import ruler
from kvrewrite.tools.evaluation.ask import encode
from kvrewrite.tools.evaluation.cells import reads_file

TOKENS = 2048
SELF_CONTAINED = [task for task in ruler.TASKS if not reads_file(task)]
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?=\s|$)")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small_model(), local_files_only=True)


@pytest.fixture(scope="module")
def make(tokenizer):
    made = {}

    def one(name, tokens=TOKENS, seed=0, data=None):
        key = name, tokens, seed, data
        if key not in made:
            made[key] = ruler.make(f"ruler:{name}", tokens=tokens, seed=seed, tokenizer=tokenizer, data=data)
        return made[key]

    return one


def test_there_are_thirteen():
    assert len(ruler.TASKS) == 13 and len(SELF_CONTAINED) == 11
    limits = Counter(task.max_new_tokens for task in ruler.TASKS.values())
    assert limits == {128: 8, 30: 1, 120: 1, 50: 1, 32: 2}


@pytest.mark.parametrize("task", SELF_CONTAINED)
def test_prompt_and_answer_fill_the_length(make, tokenizer, task):
    sample = make(task.removeprefix("ruler:"))
    used = len(tokenizer(sample.context + sample.question)["input_ids"]) + ruler.TASKS[task].max_new_tokens
    assert 0.9 * TOKENS < used <= TOKENS
    assert encode(sample, tokenizer, ruler.TASKS[task].max_new_tokens).limit >= ruler.TASKS[task].max_new_tokens
    assert encode(sample, tokenizer, one_line=False).one_line is False
    again = ruler.make(task, tokens=TOKENS, seed=0, tokenizer=tokenizer)
    assert again == sample
    assert make(task.removeprefix("ruler:"), seed=1).answers != sample.answers
    for answer in sample.answers:
        assert answer in sample.context and answer not in sample.question


# name: (facts of the asked keys, keys asked, values of a key, pattern of keys, pattern of values, other needles)
WORDS, NUMBERS = r"[a-z]+-[a-z]+", r"[1-9]\d{6}"
UUIDS = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NIAH = {
    "niah_single_1": (1, 1, WORDS, NUMBERS, 1),
    "niah_single_2": (1, 1, WORDS, NUMBERS, 1),
    "niah_single_3": (1, 1, WORDS, UUIDS, 1),
    "niah_multikey_1": (1, 1, WORDS, NUMBERS, 4),
    "niah_multikey_2": (1, 1, WORDS, NUMBERS, None),
    "niah_multikey_3": (1, 1, UUIDS, UUIDS, None),
    "niah_multivalue": (1, 4, WORDS, NUMBERS, 4),
    "niah_multiquery": (4, 1, WORDS, NUMBERS, 4),
}


@pytest.mark.parametrize("name", NIAH)
def test_needles(make, name):
    asked, values, key_form, value_form, needles = NIAH[name]
    sample = make(name)
    found = NEEDLE.findall(sample.context)
    assert len(found) == needles if needles else len(found) > 20  # a haystack of needles
    kinds = {kind for kind, _, _ in found}
    assert kinds == {"uuids" if value_form is UUIDS else "numbers"}
    for _, key, value in found:
        assert re.fullmatch(key_form, key) and re.fullmatch(value_form, value)
    by_key = {}
    for _, key, value in found:
        by_key.setdefault(key, []).append(value)
    query = re.search(r"for (.*?) mentioned in the provided text\?", sample.question)[1]
    keys = re.split(r", and |, ", query)
    assert len(keys) == asked and sorted(sample.answers) == sorted(v for key in keys for v in by_key[key])
    assert len(sample.answers) == asked * values
    one = asked * values == 1
    kind = kinds.pop()[: -1 if one else None]
    assert sample.context.startswith(f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} hidden")
    verb = "is" if one else "are"
    assert sample.question == (
        f"\nWhat {'is' if one else 'are all'} the special magic {kind} for {query} mentioned in the provided text?"
        f" The special magic {kind} for {query} mentioned in the provided text {verb}"
    )
    if name == "niah_single_1":
        lines = [line for line in sample.context.split("\n")[1:] if not NEEDLE.fullmatch(line)]
        assert set(lines) == {ruler.NOISE} and len(lines) > 20


def test_needles_of_essays_lie_at_forty_depths():
    assert len(ruler.DEPTHS) == 40 and ruler.DEPTHS[0] == 0 and ruler.DEPTHS[-1] == 100
    assert all(2 <= b - a <= 3 for a, b in zip(ruler.DEPTHS, ruler.DEPTHS[1:]))


def test_variable_tracking(make):
    sample = make("vt")
    example, asked = sample.context.split("\n\nMemorize")
    value = re.search(r"assigned the value (\d{5}) in", sample.question)[1]
    chain = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", asked, re.MULTILINE)
    assert [len(name) for name, _ in chain] == [5] * 5
    assert chain[0][1] == value and [b for _, b in chain[1:]] == [a for a, _ in chain[:-1]]
    assert sample.answers == tuple(name for name, _ in chain)
    assert f"5 variables are assigned the value {value}, they are: " in sample.question
    shown = re.findall(r"^VAR (\w+) = ", example, re.MULTILINE)
    assert [len(name) for name in shown] == [3] * 5 and example.endswith(" ".join(shown))


@pytest.mark.parametrize(
    ("tokens", "often", "seldom", "example"), [(2048, 6, 1, (3, 1, 20)), (4608, 30, 3, (10, 3, 40))]
)
def test_common_words(make, tokens, often, seldom, example):
    sample = make("cwe", tokens)
    _, first, second = sample.context.split("Below is a numbered list of words.")
    counts = Counter(re.findall(r"\d+\. (\S+)", second))
    assert Counter(counts.values()) == {often: 10, seldom: len(counts) - 10}
    assert {word for word, n in counts.items() if n == often} == set(sample.answers)
    shown = Counter(re.findall(r"\d+\. (\S+)", first.split("\nQuestion")[0]))
    assert Counter(shown.values()) == {example[0]: 10, example[1]: example[2] - 10}
    numbers = [int(n) for n in re.findall(r"(\d+)\. ", second)]
    assert numbers == list(range(1, sum(counts.values()) + 1))


def test_frequent_words(make):
    sample = make("fwe")
    counts = Counter(sample.context.split("coded words. ")[1].split())
    ranked = [word for word, _ in counts.most_common()]
    assert ranked[0] == "..." and tuple(ranked[1:4]) == sample.answers
    assert all(re.fullmatch("[a-z]{6}", word) for word in ranked[1:])
    first = counts["..."]
    for rank in (2, 3, 4):  # a zeta law with exponent 2, cut to whole numbers
        assert abs(counts[ranked[rank - 1]] - first / rank**2) <= 1
    assert len(counts) <= (TOKENS - 50) // 50


def test_question_answering(make, tmp_path, tokenizer):
    """Documents that answer the question are there, then those of the same article, then others."""
    paragraphs = [
        {"context": f"Article {a}, part {p}: the colour is hue{a}{p}. " * 4, "qas": [
            {"question": f"Which colour has part {p} of article {a}?", "is_impossible": p == 3,
             "answers": [{"text": f"hue{a}{p}"}, {"text": f"the hue{a}{p}"}]}
        ]}
        for a in range(4) for p in range(4)
    ]  # fmt: skip
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"data": [{"paragraphs": paragraphs[4 * a : 4 * a + 4]} for a in range(4)]}))
    sample = make("qa_1", 480, 1, squad)
    assert sample.answers == ("hue01", "the hue01") and "part 1 of article 0?" in sample.question
    parts = re.findall(r"Document (\d+):\nArticle (\d), part (\d)", sample.context)
    assert [int(n) for n, _, _ in parts] == list(range(1, len(parts) + 1)) and 1 < len(parts) < 16
    assert ("0", "1") in {(a, p) for _, a, p in parts}
    assert sum(a == "0" for _, a, _ in parts) == min(4, len(parts))
    assert ruler.score(sample, "It is HUE01.") == 1.0 and ruler.score(sample, "hue0 1") == 0.0
    hotpot = tmp_path / "hotpot.json"
    rows = [{"question": f"Q{i}?", "answer": f"A{i}", "context": [[f"T{i}", ["x. ", "y."]], ["T0", ["x. ", "y."]]]}
            for i in range(6)]  # fmt: skip
    hotpot.write_text(json.dumps(rows))
    sample = make("qa_2", 400, 3, hotpot)
    assert sample.answers == ("A3",) and "T3\nx. y." in sample.context and "T0\nx. y." in sample.context
    with pytest.raises(OptionError, match="expected HotpotQA's JSON file"):
        make("qa_2", 400, 0, squad)


def test_scores_are_shares_of_answers(make):
    sample = make("niah_multivalue")
    assert ruler.score(sample, " ".join(sample.answers[:3])) == 0.75
    assert ruler.score(make("cwe"), " 1. " + "\n2. ".join(w.upper() for w in make("cwe").answers)) == 1.0


def test_too_few_tokens_are_refused(tokenizer):
    with pytest.raises(ValueError, match="do not fit into 150"):
        ruler.make("ruler:niah_single_1", tokens=150, seed=0, tokenizer=tokenizer)
