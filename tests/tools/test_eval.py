"""`kvrewrite eval`: prompts, pairing, intervals, results that survive an interruption, and what is refused."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from kvrewrite.cli import app as cli
from kvrewrite.cli.options import parse_budget, parse_policies, split_policy
from kvrewrite.errors import OptionError
from kvrewrite.policies import POLICIES
from kvrewrite.policies.question import join_question
from kvrewrite.tools.evaluation import intervals, run
from kvrewrite.tools.evaluation.ask import Question, ask_aware, ask_blind, encode, pad_left
from kvrewrite.tools.evaluation.settings import Settings
from kvrewrite.tools.subjects import Arm, PolicySpec, Source, arms, beside_baseline
from tests.support.tiny import TEXT, make_checkpoint

pytestmark = pytest.mark.xdist_group("eval")  # whose fixtures are made once

NEW = 4


# ------------------------------------------------------------------------------------------------- a model that is right
@dataclass(frozen=True)
class Sample:
    task: str
    context: str
    question: str
    answers: tuple[str, ...]
    rule: str = "all"
    target: str = ""


class Oracle:
    """Tasks about nothing, whose answers are what the unmodified model generates: the full cache gets all of them."""

    def __init__(self, source):
        self.source, self.made = source, []
        self.TASKS = {"one": SimpleNamespace(max_new_tokens=NEW), "two": SimpleNamespace(max_new_tokens=NEW)}

    def make(self, task, *, tokens, seed, tokenizer):
        self.made.append((task, tokens, seed))
        if tokens < 20:
            raise ValueError(f"{tokens} tokens are too few for this task")
        at = random.Random(f"{task} {seed}").randrange(40)
        ids = tokenizer(TEXT[at:])["input_ids"][: tokens - 8 - seed % 3]  # prompts of different lengths
        context, question = tokenizer.decode(ids), TEXT[at + 5 : at + 12 + seed % 3]
        encoded = encode(Sample(task, context, question, ()), tokenizer)
        ids = torch.tensor([encoded.context + encoded.question])
        out = self.source.base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip().split("\n")[0].strip()
        return Sample(task, context, question, (answer,), target="x")

    @staticmethod
    def score(sample, text):
        text = text.rstrip("\ufffd")  # a character that was cut
        return float(sample.answers[0].startswith(text) and bool(text or not sample.answers[0]))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("eval") / "base")


@pytest.fixture(scope="module")
def source(base):
    return Source(base)


@pytest.fixture(scope="module", autouse=True)
def rewritten_once(source):
    """Models are made once for all tests here, whatever asks for them: nothing of a request stays in them."""
    real, made = Source.rewritten, {}

    def rewritten(self, arm):
        if self.directory != source.directory or arm.spec.weights is not None:
            return real(self, arm)
        if str(arm) not in made:
            made[str(arm)] = real(source, arm)
        return made[str(arm)]

    patch = pytest.MonkeyPatch()
    patch.setattr(Source, "rewritten", rewritten)
    yield
    patch.undo()


@pytest.fixture
def oracle(source, monkeypatch):
    made = Oracle(source)
    monkeypatch.setattr(run, "task_module", lambda: made)
    return made


def settings(base, *specs, **changes):
    given = {"tokens": (48,), "samples": 3, "batch_size": 2, **changes}
    return Settings(base, tuple(specs), **given)


def by_name(results):
    return {(c["label"], c["budget"], c["mode"], c["task"]): c for c in results["cells"]}


# --------------------------------------------------------------------------------------------------------------- scores
def test_the_full_cache_answers_as_the_original_does(base, oracle):
    results = run.evaluate(settings(base, PolicySpec("streaming_llm", {"chunk": 8}), budgets=(8,)))
    cells = by_name(results)
    assert results["complete"]
    for task in oracle.TASKS:
        assert cells["full", None, "full", task]["scores"] == [1.0, 1.0, 1.0]
    for mode in ("aware", "blind"):
        found = [cells["streaming_llm:chunk=8", 8, mode, task] for task in oracle.TASKS]
        assert sum(sum(c["scores"]) for c in found) < 6  # 8 slots of 48 cannot be the same
        assert found[0]["against_full"]["accuracy"]["mean"] == pytest.approx(found[0]["accuracy"]["mean"] - 1)
    assert len(results["means"]) == 3
    assert results["means"][0]["accuracy"]["mean"] == 1.0


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_both_modes_without_eviction_are_the_original(base, oracle, batch_size):
    """Padding, pausing between context and question, and rows of different lengths change nothing."""
    spec = PolicySpec("h2o", {"budget": 500})
    results = run.evaluate(settings(base, spec, batch_size=batch_size))
    for cell in results["cells"]:
        assert cell["scores"] == [1.0, 1.0, 1.0], (cell["mode"], cell["task"], cell["answers"])


def test_every_policy_gets_the_same_samples(base, oracle):
    specs = PolicySpec("h2o"), PolicySpec("streaming_llm", {"chunk": 8})
    run.evaluate(settings(base, *specs, budgets=(16, 24), seed=5))
    assert sorted(set(oracle.made)) == sorted(oracle.made)  # made once
    assert {s for _, _, s in oracle.made} == {5 * run.SEED_STEP + i for i in range(3)}


def test_memory_is_what_the_cache_holds(base, oracle, source):
    results = run.evaluate(settings(base, PolicySpec("streaming_llm", {"chunk": 8}), budgets=(16,), tasks=("one",)))
    cells = by_name(results)
    full = cells["full", None, "full", "one"]["memory"]
    slot = 2 * 8 * 4 + 12  # k and v of 8 channels in fp32, score and positions
    for point in ("context", "prompt"):
        assert full[point]["slots"] == full[point]["tokens"] * 4  # 2 layers, 2 kv heads
        assert full[point]["heads"] == {layer: [full[point]["tokens"]] * 2 for layer in "01"}
        assert full[point]["live"] == full[point]["slots"] * slot
    assert full["prompt"]["tokens"] > full["context"]["tokens"]
    aware = cells["streaming_llm:chunk=8", 16, "aware", "one"]
    blind = cells["streaming_llm:chunk=8", 16, "blind", "one"]
    assert aware["memory"]["prompt"]["slots"] == 16 * 4
    assert "context" not in aware["memory"]
    assert blind["memory"]["context"]["slots"] == 16 * 4
    assert aware["against_full"]["measured_at"] == "prompt"
    assert aware["against_full"]["kept"] == 16 * 4 / full["prompt"]["slots"]
    assert blind["against_full"]["measured_at"] == "context"
    assert blind["against_full"]["kept"] == 16 * 4 / full["context"]["slots"]
    assert blind["against_full"]["full_live"] == full["context"]["live"]
    assert aware["memory"]["prompt"]["leased"] >= aware["memory"]["prompt"]["live"]


# -------------------------------------------------------------------------------------------------------------- prompts
def test_questions_about_one_context_share_its_cache(base, source, oracle):
    """Three questions about one document and one about another: each is answered as if it were alone."""
    import kvrewrite

    model = kvrewrite.transform(source.base, "h2o", budget=500)
    prefills = []
    new_cache = model.new_cache
    model.__dict__["new_cache"] = lambda *a, **k: prefills.append(1) or new_cache(*a, **k)
    texts = [(TEXT[:80], "She sells"), (TEXT[:80], "The"), (TEXT[7:70], "over the lazy"), (TEXT[:80], "fox jumps")]
    questions = [encode(Sample("x", c, q, ("1234",)), source.tokenizer, NEW) for c, q in texts]
    done, together = list(ask_blind(model, source.tokenizer, questions, 2))[-1]
    assert done == 4
    assert len(prefills) == 1
    alone = [list(ask_blind(model, source.tokenizer, [q], 1))[-1][1].texts[0] for q in questions]
    assert together.texts == alone
    _, aware = list(ask_aware(model, source.tokenizer, questions, 3))[-1]
    assert aware.texts == alone


def test_the_answer_ends_with_its_line(source):
    class Talks:
        """Generates a given text, whatever it is asked."""

        device = "cpu"
        generation_config = SimpleNamespace(eos_token_id=1)

        def __init__(self, text):
            self.ids = source.tokenizer(text)["input_ids"]

        def new_cache(self, rows, max_length=None):
            return SimpleNamespace(
                batch_size=rows, seen=[0], live_slots=dict, memory=lambda: SimpleNamespace(live=0, leased=0)
            )

        def generate(self, ids, *, generation_config, stopping_criteria, **kwargs):
            for n in range(generation_config.max_new_tokens):
                token = self.ids[n] if n < len(self.ids) else 1
                ids = torch.cat([ids, torch.full((len(ids), 1), token)], 1)
                if bool(stopping_criteria(ids, None).all()):
                    break
            self.made = n + 1
            return ids

    def answer(text, limit=30):
        model = Talks(text)
        question = Question(None, (5, 6), (7,), limit)
        _, answers = list(ask_aware(model, source.tokenizer, [question], 1))[-1]
        return answers.texts[0], model.made

    assert answer(" 4821\nQ: and more")[0] == "4821"
    assert answer("\n\n 4821\nQ: and more")[0] == "4821"
    assert answer(" sea shells<eos> by")[0] == "sea shells"
    long = "the lazy dog " * 20
    assert answer(long, 3) == (source.tokenizer.decode(source.tokenizer(long)["input_ids"][:3]).strip(), 3)


def test_padding_is_on_the_left():
    ids, mask = pad_left([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_question_in_front():
    question = Question(None, (2, 10, 11), (20, 21), 4)
    assert join_question(question.context, question.question, first=False, bos=None) == [2, 10, 11, 20, 21]
    assert join_question(question.context, question.question, first=True, bos=None) == [20, 21, 2, 10, 11, 20, 21]
    assert join_question(question.context, question.question, first=True, bos=2) == [2, 20, 21, 10, 11, 20, 21]


# ------------------------------------------------------------------------------------------------------------ intervals
def test_wilson():
    # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I: 81 of 263, 15 of 148, 0 of 20 and 1 of 29
    for found, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert intervals.wilson(found, n) == pytest.approx((low, high), abs=5e-5)


def test_which_interval():
    exact = intervals.interval([1.0, 0.0, 1.0, 1.0])
    assert (exact.mean, exact.n, exact.method) == (0.75, 4, "wilson")
    parts = [0.25, 0.5, 1.0, 0.75, 0.0] * 8
    spread = intervals.interval(parts)
    assert spread.method == "bootstrap"
    assert spread == intervals.interval(parts)  # no state
    half = 1.96 * math.sqrt(0.125 / 40)
    assert (spread.low, spread.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.015)
    both = intervals.interval([1.0] * 10, [0.0] * 10)
    assert (both.mean, both.n, both.method) == (0.5, 20, "wilson")
    assert intervals.interval([1.0] * 10, [0.0] * 5).method == "bootstrap"  # unequal tasks weigh the same
    assert intervals.interval([1.0] * 10, [0.0] * 5).mean == 0.5
    same = intervals.interval([0.5] * 8)
    assert (same.low, same.high) == intervals.wilson(4, 8)  # not of no width


def test_paired_differences_have_narrower_intervals():
    random.seed(0)
    base = [random.random() for _ in range(100)]
    worse = [b - 0.1 for b in base]
    found = intervals.difference(worse, base)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.1, -0.1, -0.1))
    with pytest.raises(ValueError):
        intervals.difference([1.0], base)


def test_tables_fit_their_terminal(base, oracle):
    """Tasks that do not fit go into further tables; the means are in the last."""
    import io

    from rich.console import Console

    from kvrewrite.tools.evaluation.report import tables

    results = run.evaluate(settings(base, PolicySpec("h2o", {"budget": 500}), modes=("aware",)))
    for width, count in ((100, 1), (70, 2)):
        shown, _ = tables(results, width)
        assert len(shown) == count
        console = Console(file=io.StringIO(), width=width)
        for table in shown:
            console.print(table)
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= width
        for words in ("h2o:budget=500", "full", "100.0", "44–100", "61–100", "live", " one ", " two "):
            assert words in text


# -------------------------------------------------------------------------------------------------------------- resumes
def test_an_interrupted_run_keeps_what_is_done(base, oracle, tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    chosen = settings(base, PolicySpec("h2o"), budgets=(16, 24))
    whole = run.evaluate(chosen)
    ran, real = [], run.run_cell

    def interrupted(model, *args):
        if len(ran) == 5:
            raise KeyboardInterrupt
        ran.append(model.policy.budget)
        return real(model, *args)

    monkeypatch.setattr(run, "run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(chosen, out=out)
    kept = json.loads(out.read_text())
    assert not kept["complete"]
    assert len(kept["cells"]) == 5
    ran.clear()
    monkeypatch.setattr(run, "run_cell", lambda *args: ran.append(1) or real(*args))
    resumed = run.evaluate(chosen, out=out, resume=True)
    assert len(ran) == len(whole["cells"]) - 5
    assert json.loads(out.read_text()) == resumed
    assert not [p for p in tmp_path.iterdir() if p != out]
    for ours, theirs in zip(resumed["cells"], whole["cells"], strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
    ran.clear()
    run.evaluate(settings(base, PolicySpec("h2o"), budgets=(16, 32)), out=out, resume=True)
    assert len(ran) == 4  # a new budget: 2 tasks, 2 modes


def test_resuming_something_else_is_refused(base, oracle, tmp_path):
    out = tmp_path / "results.json"
    run.evaluate(settings(base, tasks=("one",)), out=out)
    before = out.read_text()
    with pytest.raises(OptionError, match="another seed"):
        run.evaluate(settings(base, tasks=("one",), seed=1), out=out, resume=True)
    other = make_checkpoint(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(OptionError, match="another the model's files"):
        run.evaluate(settings(other, tasks=("one",)), out=out, resume=True)
    assert out.read_text() == before
    out.write_text("{}")
    with pytest.raises(Exception, match="no results of `kvrewrite eval`"):
        run.evaluate(settings(base, tasks=("one",)), out=out, resume=True)


def test_changed_policy_weights_are_another_cell(base, oracle, tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"1")
    arm = Arm(PolicySpec("locret", {}, file))
    before = run.cell_key(run.cell_of(arm, "aware", "one", 48))
    assert before == run.cell_key(run.cell_of(arm, "aware", "one", 48))
    file.write_bytes(b"2")
    assert before != run.cell_key(run.cell_of(arm, "aware", "one", 48))


# -------------------------------------------------------------------------------------------------------------- refused
def test_cells_that_are_refused_say_why(base, oracle):
    specs = (PolicySpec("h2o", {"recent_tokens": 20}), PolicySpec("locret"))
    results = run.evaluate(settings(base, *specs, budgets=(16, 24)))
    cells = by_name(results)
    refused = cells["h2o:recent_tokens=20", 16, "aware", "one"]
    assert refused["status"] == "refused"
    assert "expected a budget above 20" in refused["reason"]
    assert cells["h2o:recent_tokens=20", 24, "aware", "one"]["status"] == "ok"
    assert cells["locret", 16, "blind", "two"]["reason"] == "locret needs trained weights: --policy-weights locret=FILE"
    assert results["complete"]
    assert {m["label"] for m in results["means"]} == {"full", "h2o:recent_tokens=20"}


def test_samples_that_cannot_be_made_are_refused(base, oracle):
    results = run.evaluate(settings(base, tokens=(16,)))
    assert {c["status"] for c in results["cells"]} == {"refused"}
    assert "one at 16 tokens: 16 tokens are too few" in results["cells"][0]["reason"]
    assert results["means"] == []


def test_a_policy_with_the_question_in_front_has_no_blind_mode(base, oracle, monkeypatch):
    monkeypatch.setattr(POLICIES["h2o"], "question_first", True)
    results = by_name(run.evaluate(settings(base, PolicySpec("h2o", {"budget": 500}), tasks=("one",))))
    assert results["h2o:budget=500", None, "aware", "one"]["status"] == "ok"
    assert "no blind mode" in results["h2o:budget=500", None, "blind", "one"]["reason"]


def test_warnings(base, oracle, monkeypatch):
    said = []
    chosen = settings(base, PolicySpec("tova", {"budget": 16}), tasks=("one",), samples=1)
    run.evaluate(chosen, warn=said.append)
    assert len(said) == 1
    assert said[0].startswith("tova: made to see the question")
    said.clear()
    run.evaluate(
        settings(base, PolicySpec("tova", {"budget": 16}), tasks=("one",), samples=1, modes=("aware",)),
        warn=said.append,
    )
    assert said == []
    run.evaluate(settings(base, tasks=("one",), samples=1, tokens=(300,)), warn=said.append)
    assert said == ["--tokens 300: the model was made for 256 tokens"]


# --------------------------------------------------------------------------------------------------- the command's words
def test_budgets():
    assert [parse_budget(t) for t in ("0.25", "12.5%", "1024", "1_024", ".5")] == [0.25, 0.125, 1024, 1024, 0.5]
    for text in ("0", "1.0", "1.5", "-3", "half", "100%", "nan", ""):
        with pytest.raises(OptionError, match="expected a fraction"):
            parse_budget(text)


def test_policies():
    assert split_policy("h2o") == ("h2o", [])
    assert split_policy("x:layers=9,8,7,chunk=4") == ("x", ["layers=9,8,7", "chunk=4"])
    (spec,) = parse_policies(("h2o:recent_tokens=none,budget=64",), ())
    assert (spec.name, spec.options) == ("h2o", {"recent_tokens": None, "budget": 64})
    assert spec.label == "h2o:recent_tokens=None,budget=64"
    assert [s.name for s in parse_policies(("msrnn",), ())] == ["tova"]
    names = [s.name for s in parse_policies(("all",), ())]
    assert {"streaming_llm", "h2o"} <= set(names)
    assert not {"full", "locret"} & set(names)
    assert len(set(names)) == len(names)
    with pytest.raises(OptionError, match="did you mean 'streaming_llm'"):
        parse_policies(("streming_llm",), ())
    with pytest.raises(OptionError, match="did you mean 'recent_tokens'"):
        parse_policies(("h2o:recent_token=4",), ())
    with pytest.raises(OptionError, match="which --policy does not name"):
        parse_policies(("h2o",), ("locret=w.safetensors",))
    with pytest.raises(OptionError, match="NAME=FILE"):
        parse_policies(("locret",), ("w.safetensors",))


def test_arms():
    specs = (PolicySpec("full"), PolicySpec("h2o"), PolicySpec("h2o", {"budget": 9}), PolicySpec("h2o"))
    assert [str(a) for a in arms(specs, (0.5, 64))] == ["full", "h2o at 50%", "h2o at 64", "h2o:budget=9"]
    assert [str(a) for a in beside_baseline(specs, (0.5, 64))] == ["h2o at 50%", "h2o at 64", "h2o:budget=9"]
    assert [str(a) for a in beside_baseline(specs, ())] == ["h2o", "h2o:budget=9"]
    assert [str(a) for a in beside_baseline((PolicySpec("full", {"quantize": "int8"}),), (0.5,))] == [
        "full:quantize=int8"
    ]


# ----------------------------------------------------------------------------------------------------- the command line
def call(*args):
    return CliRunner().invoke(cli.main, ["eval", *map(str, args)])


def test_command_line(base, oracle, tmp_path):
    out = tmp_path / "results.json"
    args = [
        base,
        "-p",
        "streaming_llm:chunk=8",
        "-p",
        "locret",
        "-b",
        "16",
        "--samples",
        "2",
        "--tokens",
        "48",
        "--out",
        out,
    ]
    done = call(*args)
    assert done.exit_code == 0, done.output
    for words in (
        "question-aware",
        "question-blind",
        "streaming_llm:chunk=8",
        "refused [1]",
        "100.0",
        "[1] locret needs",
    ):
        assert words in done.stdout
    data = json.loads(out.read_text())
    assert data["settings"]["budgets"] == [16]
    assert {"kvrewrite", "torch", "transformers", "python"} <= set(data["versions"])
    again = call(*args)
    assert again.exit_code == 1
    assert "--resume" in again.stderr
    shown = call(*args, "--resume", "--json")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["cells"][0] == data["cells"][0]
    assert call(*args, "--force", "--mode", "aware", "-t", "one").exit_code == 0
    assert {c["mode"] for c in json.loads(out.read_text())["cells"]} == {"full", "aware"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-t", "on"], "did you mean 'one'"),
        (["-p", "h20"], "did you mean 'h2o'"),
        (["-p", "h2o:recent=4"], "has no option 'recent'"),
        (["-p", "h2o:recent_tokens=four"], "expected an integer"),
        (["-b", "2.5"], "--budget 2.5"),
        (["--device", "nonsense"], "nonsense"),
        (["--out", "no/such/place.json"], "does not exist"),
        (["-p", "converted"], "is no converted model"),
    ],
)
def test_mistakes(base, oracle, args, message):
    done = call(base, *args, "--tokens", 48, "--samples", 1)
    if "converted" in args:  # a refused cell, as it is known only when the directory is read
        assert message in done.stdout
        return
    assert done.exit_code == 1, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_resume_without_a_file(base):
    done = call(base, "--resume")
    assert done.exit_code == 2
    assert "--out" in done.stderr


def test_a_converted_directory_runs_its_own_policy(base, oracle, tmp_path):
    import kvrewrite

    small = tmp_path / "small"
    kvrewrite.convert(base, small, "streaming_llm", budget=16, chunk=8)
    done = call(small, "--samples", 2, "--tokens", 48, "-t", "one", "--json")
    assert done.exit_code == 0, done.output
    cells = json.loads(done.stdout)["cells"]
    assert [(c["policy"], c["mode"]) for c in cells] == [
        ("full", "full"),
        ("converted", "aware"),
        ("converted", "blind"),
    ]
    assert cells[0]["scores"] == [1.0, 1.0]
    assert cells[1]["resolved"]["name"] == "streaming_llm"
    assert cells[1]["memory"]["prompt"]["slots"] == 16 * 4


def test_real_tasks_on_a_tiny_model(base):
    """The project's own tasks go through: random weights answer nothing, and that is a result."""
    done = call(
        base, "-p", "h2o:chunk=64", "-b", "64", "-t", "needle_single", "--tokens", 200, "--samples", 2, "--json"
    )
    assert done.exit_code == 0, done.output
    cells = json.loads(done.stdout)["cells"]
    assert {c["status"] for c in cells} == {"ok"}
    assert all(0 <= c["accuracy"]["mean"] <= 1 for c in cells)


def test_the_small_model_is_the_default():
    """The model that is part of the project answers with the full cache; what a policy sees of the question matters."""
    done = call("-p", "snapkv", "-b", "0.25", "-t", "needle_single", "--tokens", 512, "--samples", 2, "--json")
    assert done.exit_code == 0, done.output
    assert "snapkv: made to see the question" in done.stderr
    cells = {c["label"] + " " + c["mode"]: c for c in json.loads(done.stdout)["cells"]}
    assert cells["full full"]["scores"] == [1.0] * 2
    assert cells["snapkv aware"]["scores"] == [1.0] * 2
    assert 0.24 < cells["snapkv aware"]["against_full"]["kept"] < 0.26
    assert 0.24 < cells["snapkv blind"]["against_full"]["live"] < 0.26
