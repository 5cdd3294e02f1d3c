"""Questions in LongBench's form: prompts, contexts that lose their middle, metrics."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from kvrewrite.cli import app as cli
from kvrewrite.tools.evaluation import asked
from kvrewrite.tools.evaluation.cells import read_results
from kvrewrite.tools.subjects import Source
from tests.support.tiny import TEXT, make_checkpoint

pytestmark = pytest.mark.xdist_group("eval")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("asked") / "base")


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_taken_in_turn(base, tmp_path):
    tokenizer = Source(base).tokenizer
    long = {"context": TEXT, "input": "\nWho?", "answers": ["fox"], "before": "Read.\n", "max_new_tokens": 5}
    data = write(
        tmp_path / "rows.jsonl",
        long,
        {"context": "The fox.", "input": "\nWhat?", "answers": ["A", "B"], "metric": "exact"},
    )
    first = asked.make("longbench", tokens=80, seed=0, tokenizer=tokenizer, data=data)
    second = asked.make("longbench", tokens=80, seed=3, tokenizer=tokenizer, data=data)
    assert first.context.startswith("Read.\nThe quick") and first.context.endswith(TEXT[-12:])
    used = len(tokenizer(first.context)["input_ids"]) + len(tokenizer(first.question)["input_ids"]) + first.limit
    assert 74 <= used <= 80
    assert (second.context, second.question, second.answers) == ("The fox.", "\nWhat?", ("A", "B"))
    assert (first.rule, first.limit, second.rule, second.limit) == ("f1", 5, "exact", asked.LIMIT)


def test_metrics():
    def score(metric, reply, *answers):
        return asked.score(asked.Asked("longbench", "", "", answers, metric), reply)

    assert score("f1", "The red fox, it was", "a red fox") == pytest.approx(2 * 2 / (4 + 2))
    assert score("f1", "nothing", "a red fox", "Nothing!") == 1.0
    assert score("rouge_l", "x b y c z", "b c a1") == pytest.approx(2 * 2 / (5 + 3))
    assert score("rouge_l", "c b", "b c") == 0.5
    assert score("exact", "The Fox.", "fox") == 1.0 and score("exact", "fox cub", "fox") == 0.0
    assert (
        score("contains", "It is sports news", "Sports") == 1.0
        and score("contains", "It is sportsnews", "Sports") == 0.0
    )
    assert score("f1", "", "fox") == 0.0


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"context": "x", "input": "y"}, "answers"),
        ({"context": "x", "input": "y", "answers": ["z"], "metric": "bleu"}, "metric is 'bleu'"),
        ({"context": "x", "input": TEXT, "answers": ["z"]}, "do not fit"),
    ],
)
def test_rows_of_another_form_are_named(base, tmp_path, row, words):
    data = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(ValueError, match=f"row 1 of .*{words}"):
        asked.make("longbench", tokens=80, seed=0, tokenizer=Source(base).tokenizer, data=data)


def test_the_command(base, tmp_path):
    rows = [
        {"context": TEXT[i:120], "input": "\nThe quick", "answers": ["brown fox"], "max_new_tokens": 3}
        for i in range(2)
    ]
    data, out = write(tmp_path / "rows.jsonl", *rows), tmp_path / "out.json"
    arguments = (
        f"eval {base} -t longbench --data {data} --tokens 80 --samples 2 --check off -p h2o:budget=500 --out {out}"
    )
    done = CliRunner().invoke(cli.main, arguments.split())
    assert done.exit_code == 0, done.output
    cells = read_results(out)["cells"]
    assert [c["mode"] for c in cells] == ["full", "aware", "blind"]
    assert len({tuple(c["answers"]) for c in cells}) == 1  # nothing is evicted
    assert len(read_results(out)["means"]) == 3
