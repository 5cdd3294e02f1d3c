"""`kvrewrite eval` on given texts: nats per token after a compressed context, quotes, shards that are put together."""

from __future__ import annotations

import json
import random

import pytest
import torch
from click.testing import CliRunner

import kvrewrite
from kvrewrite.api import Rewriter
from kvrewrite.cli import app as cli
from kvrewrite.errors import OptionError
from kvrewrite.tools.evaluation import cells, documents, intervals, run
from kvrewrite.tools.evaluation.documents import Passage
from kvrewrite.tools.evaluation.markdown import markdown
from kvrewrite.tools.evaluation.scored import run_scored, summary
from kvrewrite.tools.evaluation.settings import Settings, plan
from kvrewrite.tools.subjects import PolicySpec, Source
from tests.support.tiny import TEXT, make_checkpoint

pytestmark = pytest.mark.xdist_group("eval")

ROWS = [{"text": TEXT[i:] * 2} for i in (0, 11, 29)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("scored") / "base")


@pytest.fixture(scope="module")
def source(base):
    return Source(base)


@pytest.fixture(scope="module")
def passages(source):
    """Three documents of different lengths, two or three questions about each."""
    rng, ids = random.Random(3), source.tokenizer(TEXT)["input_ids"]
    found = []
    for document, length in enumerate((40, 57, 48)):
        for question, answer in ((5, 7), (3, 4), (8, 5))[: 3 - document % 2]:
            part = [tuple(rng.choices(ids, k=n)) for n in (question, answer)]
            found.append(Passage(document, tuple(ids[document : document + length]), *part))
    return found


def by_hand(source, passage):
    """The unmodified model's nats of an answer."""
    ids = torch.tensor([passage.context + passage.question + passage.answer])
    logits = source.base(ids).logits.detach()[0, -len(passage.answer) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, -len(passage.answer) :], reduction="sum"))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_without_eviction_both_modes_are_the_unmodified_model(source, passages, batch_size):
    model = kvrewrite.transform(source.base, "h2o", budget=500)
    want, done = [by_hand(source, p) for p in passages], []
    for mode in ("blind", "aware"):
        cell = run_scored(model, source.tokenizer, passages, mode, batch_size, done.append)
        assert cell["nats"] == pytest.approx(want, abs=1e-4)
        assert cell["counts"] == [len(p.answer) for p in passages]
        assert cell["nll"]["mean"] == pytest.approx(sum(want) / sum(cell["counts"]), abs=1e-4)
        assert done[-1] == len(passages)


@pytest.mark.parametrize(("policy", "options"), [("streaming_llm", {"budget": 16}), ("h2o", {"budget": 12})])
def test_every_token_sees_what_the_policy_kept(source, passages, policy, options):
    """Batched over documents and questions, each passage scores as on a cache of its own."""
    model = kvrewrite.transform(source.base, policy, **options)
    for mode in ("blind", "aware"):
        want = []
        for p in passages:
            joined = p.context + p.question
            cut = len(p.context) if mode == "blind" else len(joined) - 1
            cache = model.prefill(torch.tensor([joined[:cut]]))
            rest = torch.tensor([(joined + p.answer)[cut:]])
            logits = model(rest[:, :-1], past_key_values=cache).logits[0, -len(p.answer) :]
            want.append(float(torch.nn.functional.cross_entropy(logits, rest[0, -len(p.answer) :], reduction="sum")))
        cell = run_scored(model, source.tokenizer, passages, mode, 2, lambda n: None)
        assert cell["nats"] == pytest.approx(want, abs=1e-4)
        assert cell["nats"] != pytest.approx([by_hand(source, p) for p in passages], abs=1e-3)


def test_right_tokens_are_those_that_greedy_decoding_gives(source):
    context, question = tuple(source.tokenizer(TEXT)["input_ids"][:30]), (5, 9)
    model = kvrewrite.transform(source.base, "h2o", budget=500)
    ids = torch.tensor([context + question])
    for _ in range(6):
        ids = torch.cat([ids, source.base(ids).logits[:, -1:].argmax(-1)], 1)
    answer = tuple(ids[0, -6:].tolist())
    wrong = (*answer[:3], (answer[3] + 1) % 200, *answer[4:])
    found = [Passage(0, context, question, a) for a in (answer, wrong)]
    cell = run_scored(model, source.tokenizer, found, "blind", 1, lambda n: None)
    assert cell["hits"][0] == len(answer) and cell["exact"]["mean"] == 0.5
    assert cell["hits"][1] <= len(answer) - 1


# ------------------------------------------------------------------------------------------------------------ intervals
def test_intervals_draw_whole_documents():
    """Four quotes of one document that score alike are one observation, not four."""
    rng = random.Random(1)
    documents_ = [d for d in range(20) for _ in range(4)]
    alike = [rng.gauss(2, 1) for _ in range(20)]
    sums = [alike[d] for d in documents_]
    found = intervals.ratio(sums, [1] * 80, documents_)
    alone = intervals.ratio(sums, [1] * 80, list(range(80)))
    assert found.n == 20 and found.mean == pytest.approx(sum(alike) / 20)
    assert 1.6 < (found.high - found.low) / (alone.high - alone.low) < 2.4
    one = intervals.ratio([6.0, 2.0], [3, 1], [0, 0])
    assert (one.mean, one.low, one.high) == (2.0, 2.0, 2.0)


# ------------------------------------------------------------------------------------------------------------ documents
def test_quotes_are_drawn_from_the_text():
    words = [f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in ("lmn", "rst", "xyz")]
    text = " ".join(words) + ".\n\n" + " ".join(reversed(words))
    found = documents.draw_quotes(text, 4, random.Random(0))
    assert len(found) == 4
    flat = " ".join(text.split())
    for question, answer in found:
        key = question.removeprefix('\nContinue the quote from the text: "')
        assert len(key.split()) == 10 and len(answer.split()) == 8
        assert flat.count(key) == 1 and (key + answer.rstrip('"')) in flat
    assert found == documents.draw_quotes(text, 4, random.Random(0))
    assert documents.draw_quotes(TEXT, 4, random.Random(0)) == []  # every line is there four times


def test_rows_as_they_are_and_texts_that_are_cut(source):
    rows = [
        {"context": TEXT[:90], "turns": [["\nContinue:", " the lazy dog"], ["\nGo on:", " sea"]]},
        {"context": TEXT[:50], "turns": [["\nContinue:", " shore"]]},
    ]
    given = {"tokens": 64, "samples": 5, "seed": 0, "tokenizer": source.tokenizer}
    found = documents.make_passages("quote", rows, **given)
    assert [p.document for p in found] == [0, 0, 1]
    assert source.tokenizer.decode(found[1].context + found[1].question + found[1].answer) == TEXT[:90] + "\nGo on: sea"
    whole = source.tokenizer(ROWS[0]["text"])["input_ids"]
    (cut,) = documents.make_passages("lm", ROWS[:1], **given)
    assert list(cut.context + cut.question + cut.answer) == whole[: len(cut.context) + 1 + len(cut.answer)]
    assert len(cut.context) == 64 and len(cut.question) == 1 and len(cut.answer) == min(256, len(whole) // 4) - 1
    (own,) = documents.make_passages("lm", [{"context": TEXT[:50], "continuation": TEXT[50:80]}], **given)
    assert source.tokenizer.decode(own.question + own.answer) == TEXT[50:80]


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("quote", {"context": "x"}, "turns"),
        ("quote", {"context": TEXT * 2, "turns": [["a", "b"]]}, "give --tokens"),
        ("lm", {"context": "x"}, "continuation"),
        ("lm", {"text": "x"}, "too short"),
    ],
)
def test_rows_that_do_not_fit_are_named(source, task, row, words):
    with pytest.raises(OptionError, match=f"row 1, {task}.*{words}"):
        documents.make_passages(task, [row], tokens=64, samples=1, seed=0, tokenizer=source.tokenizer)


def test_texts_without_quotes_are_passed_over(source):
    given = {"tokens": 400, "samples": 1, "seed": 0, "tokenizer": source.tokenizer}
    words = " ".join(f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in ("lmn", "rst", "xyz"))
    found = documents.make_passages("quote", [{"text": TEXT}, {"text": words}, {"text": words}], **given)
    assert len(found) == 4 and {p.document for p in found} == {0}
    with pytest.raises(OptionError, match="from any of 1 rows"):
        documents.make_passages("quote", [{"text": TEXT}], **given)


# --------------------------------------------------------------------------------------------------------- the command
def settings(base, path, **changes):
    given = {"tasks": ("lm",), "tokens": (64,), "samples": 3, "batch_size": 2, "data": (("lm", path),), "check": "off"}
    specs = (PolicySpec("streaming_llm"), PolicySpec("h2o"))
    return Settings(base, specs, (16, 32), **{**given, **changes})


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def without_time(results):
    return sorted(
        ({k: v for k, v in c.items() if k != "seconds"} for c in results["cells"]), key=lambda c: cells.cell_key(c)
    )


def test_shards_put_together_are_the_whole(base, data, tmp_path):
    whole = run.evaluate(settings(base, data))
    assert [c["mode"] for c in whole["cells"]] == ["full"] + ["blind"] * 4  # lm has no question
    parts = [run.evaluate(settings(base, data, shard=(i, 3), breadth_first=True)) for i in range(3)]
    assert [len(p["cells"]) for p in parts] == [3, 1, 1]
    joined = cells.join_results(parts, ["a", "b", "c"])
    assert without_time(joined) == without_time(whole)
    assert all("nll" in c["against_full"] for c in joined["cells"])
    assert joined["complete"]


def test_a_cell_that_fails_is_told_and_the_others_run(base, data, monkeypatch):
    real, said = run.run_scored, []

    def failing(model, *arguments):
        if model.policy.name == "h2o" and model.policy.budget == 16:
            raise RuntimeError("out of shared memory\nmore")
        return real(model, *arguments)

    monkeypatch.setattr(run, "run_scored", failing)
    results = run.evaluate(settings(base, data), warn=said.append)
    refused = [c for c in results["cells"] if c["status"] == "refused"]
    assert [(c["label"], c["budget"]) for c in refused] == [("h2o", 16)] and len(results["cells"]) == 5
    assert refused[0]["reason"] == "RuntimeError: out of shared memory"
    assert any("h2o at 16" in text and "out of shared memory" in text for text in said)


def test_a_resumed_run_asks_for_the_same_documents(base, data, tmp_path):
    out = tmp_path / "out.json"
    run.evaluate(settings(base, data), out=out)
    data.write_text(data.read_text().replace("quick", "quiet"))
    with pytest.raises(OptionError, match="other documents"):
        run.evaluate(settings(base, data), out=out, resume=True)


def test_breadth_first_is_by_mode_then_budget(base, data):
    found = plan(settings(base, data, breadth_first=True))
    assert [(str(arm), mode) for arm, mode in found][1:4] == [
        ("streaming_llm at 16", "aware"),
        ("h2o at 16", "aware"),
        ("streaming_llm at 32", "aware"),
    ]


def test_the_command(base, data, tmp_path):
    def call(*arguments):
        return CliRunner().invoke(cli.main, [str(a) for a in arguments])

    common = ("eval", base, "-t", "lm", "--tokens", 64, "--samples", 2, "--check", "off", "-p", "h2o", "-b", 16)
    done = call(*common, "--data", data)
    assert done.exit_code == 0, done.output
    assert "nats a token" in done.output and "h2o" in done.output
    for arguments, words in (
        ((), "lm needs your documents"),
        (("--data", tmp_path / "none.jsonl"), "no such file"),
        (("--data", f"quote={data}"), "named by --task"),
        (("--data", data, "--shard", "3/3"), "expected I/N"),
    ):
        done = call(*common, *arguments)
        assert done.exit_code == 1 and words in done.output


def test_report_of_several_files(base, data, tmp_path):
    """Tables of policies over budgets, the full cache first, then from the best on."""
    files = []
    for i in range(2):
        files.append(tmp_path / f"{i}.json")
        run.evaluate(settings(base, data, shard=(i, 2)), out=files[-1])
    text = tmp_path / "tables.md"
    arguments = ["report", *files, "--markdown", text, "--out", tmp_path / "all.json"]
    done = CliRunner().invoke(cli.main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    whole = cells.read_results(tmp_path / "all.json")
    assert len(whole["cells"]) == 5
    lines = text.read_text().splitlines()
    assert lines[0] == "**lm, blind, 64 tokens: nats per token**"
    assert lines[2] == "| policy | 16 | 32 |"
    assert lines[4].startswith("| `full` |")
    found = {(c["label"], c["budget"]): c["nll"]["mean"] for c in whole["cells"]}
    better = min(("h2o", "streaming_llm"), key=lambda label: found[label, 16])
    assert lines[5].startswith(f"| `{better}` | {found[better, 16]:.3f} (")
    done = CliRunner().invoke(cli.main, [str(a) for a in arguments])
    assert done.exit_code == 1 and "--force" in done.output


# ------------------------------------------------------------------------------------------------------------ rewriting
@pytest.mark.parametrize("check", ["full", "off"])
def test_one_capture_for_many_policies_is_transform(source, check):
    rewriter, ids = Rewriter(source.base, check=check), torch.tensor([source.tokenizer(TEXT)["input_ids"][:60]])
    for policy, options in (("h2o", {"budget": 16}), ("adakv", {"budget": 40}), ("h2o", {"budget": 24})):
        ours = rewriter.rewrite(policy, **options)
        theirs = kvrewrite.transform(source.base, policy, check=check, **options)
        assert ours.program.proof == theirs.program.proof
        ours_cache, theirs_cache = ours.prefill(ids), theirs.prefill(ids)
        assert ours_cache.positions() == theirs_cache.positions()
        assert torch.equal(
            ours(ids[:, :9], past_key_values=ours_cache).logits, theirs(ids[:, :9], past_key_values=theirs_cache).logits
        )


def test_a_table_of_paired_differences() -> None:
    """Over the same answers, so what all answers share drops out of the interval; full caches and other budgets stay out."""
    documents_of = [n // 2 for n in range(40)]
    hard = [3.0 * (n % 7) for n in range(40)]

    def cell(label: str, more: float, budget: float = 0.25) -> dict:
        scores = [(nats + 4 * more + 0.4 * (n % 2), 1, 4) for n, nats in enumerate(hard)]
        base = {"policy": label, "label": label, "options": {}, "weights": None, "budget": budget, "tokens": 64}
        return {**base, "mode": "blind", "task": "quote", "status": "ok", **summary(scores, documents_of)}

    found = [cell("h2o", 1.0), cell("sirllm", 0.5), cell("kvzip", 0.0), cell("kvzip", 0.0, 0.5)]
    text = markdown({"cells": found}, "sirllm")
    table = text[text.index("nats per token more than `sirllm`") :]
    assert "| `kvzip` | -0.500 (-0.500 to -0.500) |" in table and "| `h2o` | +0.500 (+0.500 to +0.500) |" in table
    assert table.index("kvzip") < table.index("h2o") and "`sirllm` |" not in table and "50%" not in table
    assert "more than" not in markdown({"cells": found})
    with pytest.raises(OptionError, match=r"snapkv has no cells in nats; there are: h2o, sirllm, kvzip"):
        markdown({"cells": found}, "snapkv")


# ------------------------------------------------------------------------------------------------------------ perplexity
def test_pieces_of_a_text(source):
    ids = documents.context_ids(source.tokenizer, TEXT)
    found = documents.make_passages(
        "perplexity", [{"text": TEXT}], tokens=50, samples=99, seed=0, tokenizer=source.tokenizer
    )
    read = [p.context + p.question + p.answer for p in found]
    assert sum(read, ()) == ids[: sum(map(len, read))] and len(ids) - sum(map(len, read)) < 25
    assert all(len(p.context) == 25 and len(p.answer) == 24 for p in found[:-1]) and len(found) > 1
    assert [p.document for p in found] == list(range(len(found)))
    for rows, words in (([{"context": "a"}], "row 1"), ([{"text": "a"}], "at least four tokens")):
        with pytest.raises(OptionError, match=words):
            documents.make_passages("perplexity", rows, tokens=50, samples=9, seed=0, tokenizer=source.tokenizer)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("h2o", {"budget": 500}),
        ("h2o", {"budget": 9}),
        ("streaming_llm", {"budget": 9}),
        ("snapkv", {"budget": 9, "window": 2}),
    ],
)
def test_perplexity_is_that_of_single_tokens(source, policy, options):
    """Pieces of different lengths side by side: each token after what was kept before it, as in generating."""
    model = kvrewrite.transform(source.base, policy, check="off", **options)
    found = documents.make_passages(
        "perplexity", [{"text": TEXT}, {"text": TEXT[:70]}], tokens=50, samples=5, seed=0, tokenizer=source.tokenizer
    )
    cell = run_scored(model, source.tokenizer, found, "blind", 3, lambda _: None, one_by_one=True)
    for passage, nats, count in zip(found, cell["nats"], cell["counts"], strict=True):
        cache = model.new_cache(1)
        model(torch.tensor([passage.context]), cache=cache, logits_to_keep=1)
        cache.end_prompt()
        total = 0.0
        for given, wanted in zip(passage.question + passage.answer[:-1], passage.answer, strict=True):
            logits = model(torch.tensor([[given]]), cache=cache).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor([wanted])))
        assert nats == pytest.approx(total, abs=1e-3) and count == len(passage.answer)
        if options["budget"] == 500:
            assert nats == pytest.approx(by_hand(source, passage), abs=1e-3)


def test_the_perplexity_of_a_file(base, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    command = ["eval", str(base), "--task", "perplexity", "--text", str(tmp_path / "book.txt"), "--tokens", "64"]
    done = CliRunner().invoke(
        cli.main, [*command, "-p", "h2o", "-b", "16", "--check", "off", "--out", str(tmp_path / "o.json")]
    )
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.stdout and "all right" not in done.stdout
    cells_ = json.loads((tmp_path / "o.json").read_text())["cells"]
    assert [c["policy"] for c in cells_] == ["full", "h2o"] and cells_[1]["nll"]["mean"] != cells_[0]["nll"]["mean"]
    wrong = CliRunner().invoke(cli.main, ["eval", str(base), "--task", "lm", "--text", str(tmp_path / "book.txt")])
    assert wrong.exit_code == 2 and "--task perplexity" in wrong.stderr
