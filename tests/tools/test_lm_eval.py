"""lm-eval's tasks on rewritten models: local task files, offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kvrewrite import policies
from kvrewrite.cli import app as cli
from kvrewrite.errors import OptionError
from kvrewrite.runtime import whole_prompts
from kvrewrite.tools.evaluation import harness
from kvrewrite.tools.evaluation.settings import Settings
from kvrewrite.tools.subjects import PolicySpec
from tests.support.tiny import TEXT, make_checkpoint

pytestmark = pytest.mark.xdist_group("lm_eval")  # whose fixtures are made once


@pytest.mark.parametrize(
    ("name", "options", "length", "within", "in_prompt"),
    [
        ("h2o", {"budget": 16}, 16, False, False),
        ("h2o", {"budget": 16}, 17, False, True),  # one pass: evicts behind its logits
        ("h2o", {"budget": 16, "chunk": 8}, 24, False, True),  # the first eviction is that of the last chunk
        ("h2o", {"budget": 16, "chunk": 8}, 25, True, True),
        ("streaming_llm", {"budget": 16, "chunk": 32}, 32, False, True),
        ("streaming_llm", {"budget": 16, "chunk": 32}, 33, True, True),
        ("full", {}, 500, False, False),
        ("h2o", {"budget": 0.5}, 20, False, True),  # a fraction of the whole request
        ("h2o", {"budget": 0.5, "chunk": 8}, 20, True, True),
        ("locret", {"budget": 64, "chunk": 32, "local_tail": 16, "stabilizers": 8}, 80, False, False),
        ("locret", {"budget": 64, "chunk": 32, "local_tail": 16, "stabilizers": 8}, 81, True, True),  # before the tail
        ("attention_gate", {}, 5, True, True),
    ],
)
def test_whether_a_request_evicts(name, options, length, within, in_prompt):
    policy = policies.make(name, **options)
    assert whole_prompts.evicts_within(policy, length) is within
    assert whole_prompts.evicts_in_prompt(policy, length) is in_prompt


def test_layers_may_evict_where_others_do_not():
    policy = policies.make("h2o", budget=16, recent_tokens=4, chunk=16, layer_budgets="24,8")
    assert whole_prompts.evicts_within(policy, 17, layers=2)
    assert not whole_prompts.evicts_within(policies.make("h2o", budget=16, chunk=16), 17)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("harness") / "base")


@pytest.mark.parametrize(("options", "changes"), [({"budget": 16}, False), ({"budget": 16, "chunk": 8}, True)])
def test_logits_of_one_pass_change_only_where_the_rule_says_so(base, options, changes):
    import kvrewrite
    from kvrewrite.tools.subjects import Source

    source = Source(base)
    small = kvrewrite.transform(source.base, "h2o", **options)
    ids = torch.tensor([source.tokenizer(TEXT)["input_ids"][:40]])
    with torch.no_grad():
        difference = (small(ids).logits - source.base(ids).logits).abs().max()
    assert whole_prompts.evicts_within(small.policy, ids.shape[1]) is changes
    assert (difference > 1e-4) == changes


def test_it_says_how_to_install_lm_eval(base, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(cli.main, ["eval", str(base), "--harness", "lm_eval", "--tasks", "any"])
    assert done.exit_code == 1
    assert "pip install 'lm-eval[hf]'" in done.stderr


def test_usage(base):
    for args, message in (
        (["--harness", "lm_eval"], "--tasks"),
        (["--tasks", "x"], "--harness"),
        (["--harness", "lm_eval", "--tasks", "x", "--task", "needle_single"], "--task "),
    ):
        done = CliRunner().invoke(cli.main, ["eval", str(base), *args])
        assert done.exit_code == 2, done.output
        assert message in done.stderr


# ------------------------------------------------------------------------------------------------- with lm-eval itself
GENERATE = """
task: shells
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [" fox", " dog", " shore"]
doc_to_target: 1
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def task_files(base):
    """A task whose answers are what the unmodified model generates, so that the full cache must get all of them."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from kvrewrite.tools.subjects import Source

    source = Source(base)
    folder = base.parent / "tasks"
    folder.mkdir()
    docs = []
    for at in range(3):
        text = TEXT[at : at + 90 + 7 * at]
        ids = torch.tensor([source.tokenizer(text)["input_ids"]])
        out = source.base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        answer = source.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        docs.append({"text": text, "answer": answer.split("\n")[0]})
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps(d) for d in docs))
    (folder / "shells.yaml").write_text(GENERATE % data)
    (folder / "choice.yaml").write_text(CHOOSE % data)
    return folder


def run(base: Path, folder: Path, tasks: list[str], *specs: PolicySpec, **kwargs):
    settings = Settings(base, specs, batch_size=2)
    results = harness.run(settings, tasks, include_path=folder, **kwargs)
    return {(c["label"], c["task"]): c for c in results["cells"]}


def test_tasks_that_generate(base, task_files):
    cells = run(base, task_files, ["shells"], PolicySpec("streaming_llm", {"budget": 8, "chunk": 8}))
    full, small = cells["full", "shells"], cells["streaming_llm:budget=8,chunk=8", "shells"]
    assert full["metrics"]["exact_match"]["value"] == 1.0
    assert (full["n"], full["requests"], full["evicted"]) == (3, 3, 0)
    assert (small["requests"], small["evicted"]) == (3, 3)
    assert small["metrics"]["exact_match"]["value"] < 1.0


def test_a_converted_directory_and_a_model_that_lm_eval_is_given(base, task_files):
    """The directory's own policy through the harness, and the same model in lm-eval's own class: the same answers."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import kvrewrite

    out = base.parent / "converted"
    kvrewrite.convert(base, out, "streaming_llm", budget=8, chunk=8)
    cells = run(out, task_files, ["shells"], PolicySpec("converted"))
    assert cells["full", "shells"]["metrics"]["exact_match"]["value"] == 1.0
    small = cells["converted", "shells"]
    assert (small["requests"], small["evicted"]) == (3, 3)
    given = HFLM(pretrained=kvrewrite.load(out), batch_size=2)  # which finds the tokenizer by the model's name
    assert given.tokenizer.get_vocab() == harness_tokenizer(out).get_vocab()
    found = simple_evaluate(given, tasks=["shells"], task_manager=TaskManager(include_path=str(task_files)))
    assert found["results"]["shells"]["exact_match,none"] == small["metrics"]["exact_match"]["value"] < 1.0


def harness_tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def test_tasks_that_never_generate(base, task_files):
    """Choices are scored on the compressed context, whether the policy takes prompts whole or in chunks."""
    one_pass = PolicySpec("h2o", {"budget": 8})
    chunked = PolicySpec("streaming_llm", {"budget": 8, "chunk": 8})
    cells = run(base, task_files, ["choice"], one_pass, chunked, PolicySpec("h2o", {"budget": 500}))
    assert cells["full", "choice"]["evicted"] == cells["h2o:budget=500", "choice"]["evicted"] == 0
    assert cells["h2o:budget=500", "choice"]["metrics"] == cells["full", "choice"]["metrics"]
    for label in ("h2o:budget=8", "streaming_llm:budget=8,chunk=8"):
        found = cells[label, "choice"]
        assert found["evicted"] == found["requests"] == 9  # 3 samples x 3 choices


PAIRS = [(TEXT[i : i + 80 + 30 * i], ending) for i in range(3) for ending in (" fox", " lazy dog", "s", "t")]


def sharp(base):
    """A source whose model looks at some tokens more than at others: fresh weights hardly care what is kept."""
    from kvrewrite.tools.subjects import Source

    source = Source(base)
    with torch.no_grad():
        for name, parameter in source.base.named_parameters():
            parameter.mul_(30 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1)
    return source


def requests_of(pairs):
    from types import SimpleNamespace

    return [SimpleNamespace(args=pair) for pair in pairs]


def by_hand(logits, ids):
    return float(-torch.nn.functional.cross_entropy(logits, ids, reduction="sum"))


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("h2o", {"budget": 500}),
        ("h2o", {"budget": 8}),
        ("streaming_llm", {"budget": 8, "chunk": 8}),
        ("snapkv", {"budget": 8, "window": 2}),
    ],
)
def test_scores_are_what_the_cache_gives(base, task_files, policy, options):
    """In batches, rows of different lengths: each pair's continuation after the context on a cache of its own. Where
    nothing goes, the unmodified model's."""
    import kvrewrite

    source = sharp(base)
    model = kvrewrite.transform(source.base, policy, check="off", **options)
    scores = {}
    for size in (1, 3):
        lm = harness._model_class()(model, source.tokenizer, size, None)
        scores[size] = lm.loglikelihood(requests_of(PAIRS), disable_tqdm=True)
        assert lm.counts == {"requests": 12, "evicted": 12 * (options["budget"] == 8)}
    differ = 0
    for (context, continuation), (one, first), (other, again) in zip(PAIRS, scores[1], scores[3], strict=True):
        head, tail = lm._encode_pair(context, continuation)
        cache = model.new_cache(1)
        with torch.no_grad():
            model(torch.tensor([head[:-1]]), cache=cache, logits_to_keep=1)
            cache.end_prompt()
            logits = model(torch.tensor([head[-1:] + tail[:-1]]), cache=cache).logits[0]
            whole = source.base(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        expected, unmodified = by_hand(logits, torch.tensor(tail)), by_hand(whole, torch.tensor(tail))
        assert one == pytest.approx(expected, abs=1e-3) and other == pytest.approx(one, abs=1e-3)
        assert first == again == bool((logits.argmax(-1) == torch.tensor(tail)).all())
        differ += abs(expected - unmodified) > 1e-2
    assert bool(differ) == (options["budget"] == 8)


@pytest.mark.parametrize(("policy", "options"), [("h2o", {"budget": 8}), ("snapkv", {"budget": 8, "window": 2})])
def test_whole_texts_are_read_token_by_token(base, task_files, policy, options):
    """loglikelihood_rolling: each token after what was kept before it; a policy that evicts once has no prompt to evict from."""
    import kvrewrite

    source = sharp(base)
    model = kvrewrite.transform(source.base, policy, check="off", **options)
    lm = harness._model_class()(model, source.tokenizer, 2, None)
    texts = [TEXT[:120], TEXT[7:90], TEXT[:40]]
    found = lm.loglikelihood_rolling(requests_of([(text,) for text in texts]), disable_tqdm=True)
    for text, got in zip(texts, found, strict=True):
        ids = [lm.prefix_token_id, *lm.tok_encode(text)]
        with torch.no_grad():
            full = by_hand(source.base(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]))
            cache, steps = model.new_cache(1), []
            for token in ids[:-1]:
                steps.append(model(torch.tensor([[token]]), cache=cache).logits[0])
        expected = full if policy == "snapkv" else by_hand(torch.cat(steps), torch.tensor(ids[1:]))
        assert got == pytest.approx(expected, abs=2e-3)
        assert policy == "snapkv" or abs(expected - full) > 1e-2
    assert lm.counts["evicted"] == 3 * (policy == "h2o")


def test_a_model_that_lm_eval_is_given_says_what_scores_are(base, task_files):
    """In one pass they are the full cache's, with a warning; with chunk=1 every token sees what was kept before it."""
    from lm_eval.models.huggingface import HFLM

    import kvrewrite

    source = sharp(base)
    request = requests_of([(TEXT[:120], " lazy dog")])

    def score(policy: str, **options) -> float:
        model = kvrewrite.transform(source.base, policy, **options)
        lm = HFLM(pretrained=model, tokenizer=source.tokenizer, batch_size=1)
        return lm.loglikelihood(request, disable_tqdm=True)[0][0]

    full = score("full")
    with pytest.warns(UserWarning, match="h2o evicts after the logits of this call.*full cache.*chunk=1"):
        assert score("h2o", budget=8) == pytest.approx(full, abs=1e-3)
    assert abs(score("h2o", budget=8, chunk=1) - full) > 1e-2


def test_command_line(base, task_files, tmp_path):
    out = tmp_path / "results.json"
    args = ["eval", str(base), "--harness", "lm_eval", "--tasks", "shells", "--include-path", str(task_files)]
    done = CliRunner().invoke(
        cli.main, [*args, "-p", "h2o", "-b", "8", "-p", "locret", "--limit", "2", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "exact_match" in done.stdout
    assert "2 of 2" in done.stdout
    assert "[1] locret needs trained weights: --policy-weights locret=FILE" in done.stdout
    data = json.loads(out.read_text())
    assert data["settings"]["output_types"] == {"shells": "generate_until"}
    assert [c["status"] for c in data["cells"]] == ["ok", "ok", "refused"]
    done = CliRunner().invoke(cli.main, [*args[:5], "shels", *args[6:]])
    assert done.exit_code == 1
    assert "did you mean 'shells'" in done.stderr


def test_a_directory_of_task_files_that_is_not_there(base, tmp_path):
    pytest.importorskip("lm_eval")
    done = CliRunner().invoke(
        cli.main, ["eval", str(base), "--harness", "lm_eval", "--tasks", "x", "--include-path", str(tmp_path / "no")]
    )
    assert done.exit_code == 1
    assert "expected a directory" in done.stderr


def test_unknown_policies_are_refused_first(base):
    with pytest.raises(OptionError, match="did you mean 'h2o'"):
        PolicySpec("h20").check()
