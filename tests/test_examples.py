"""Every example runs as it is; the policy of docs/guide/own_policy.md works as it is printed."""

from __future__ import annotations

import json
import random
import re
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvrewrite
import kvrewrite.assets
from kvrewrite.artifact.companions import read_tokenizer
from kvrewrite.policies import POLICIES
from tests.support import notebooks
from tests.support.processes import environment
from tests.support.tiny import TEXT, make_checkpoint
from tests.support.zoo import make

ROOT = Path(__file__).parent.parent
# Those on Ray have tests of their own, below.
EXAMPLES = sorted(p for p in (ROOT / "examples").glob("*.py") if not p.stem.startswith("ray_"))
ENVIRONMENT = environment()


# So many tokens leave the window, the model's longest text and many pages behind as well.
ARGUMENTS = {"long_decode": ["500"]}


def test_there_are_examples():
    assert {p.stem for p in EXAMPLES} >= {"transform_and_generate", "custom_policy", "foreign_module", "many_questions"}


# Made of cells; each is a notebook, too.
NOTEBOOKS = {p.stem for p in notebooks.sources()}


def test_examples_of_what_people_ask_for_are_notebooks():
    asked = {"many_questions", "bounded_chat", "serve_and_ask", "train_heads", "peft_and_eviction", "custom_policy"}
    assert asked <= NOTEBOOKS


def test_examples_are_short():
    assert not [p.name for p in EXAMPLES if p.stem not in MAKING and len(p.read_text().splitlines()) > 60]


# How the shipped model and its data were made: long, and seldom changed.
MAKING = {"policy_training_data", "small_model_data", "train_small_model"}


# With `-m thorough`, in a process of its own: tests/dynamo does every day what it does.
DEAR = {"compile_backend"}


# The first example stands for all in a process of its own; the others run in this one, which has imported everything.
ALONE = {"transform_and_generate"}


@pytest.mark.parametrize(
    "path",
    [p if p.stem in ALONE else pytest.param(p, marks=pytest.mark.thorough) for p in EXAMPLES],
    ids=[p.stem for p in EXAMPLES],
)
def test_example(path, tmp_path):
    command = [sys.executable, str(path), *ARGUMENTS.get(path.stem, [])]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check(done.stdout, done.stderr, tmp_path)


def check(stdout, stderr, folder):
    assert stdout.strip()
    assert "deprecated and will be removed" not in stderr  # by transformers; torch says so of its own use
    assert not list(folder.iterdir())  # and leaves nothing behind


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder to run an example in; policies that it registers go again."""
    monkeypatch.chdir(tmp_path)
    policies = dict(POLICIES)
    yield tmp_path
    torch._dynamo.reset()
    for added in POLICIES.keys() - policies.keys():
        POLICIES.pop(added)


@pytest.mark.parametrize("name", sorted({p.stem for p in EXAMPLES} - MAKING - ALONE - DEAR - NOTEBOOKS))
def test_example_in_this_process(name, alone, monkeypatch, capfd):
    path = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS.get(name, [])])
    runpy.run_path(str(path), run_name="__main__")
    check(*capfd.readouterr(), alone)


def test_notebooks_are_the_examples():
    """Otherwise: python -m tests.support.notebooks"""
    assert {p.stem for p in notebooks.NOTEBOOKS.glob("*.ipynb")} == NOTEBOOKS
    assert all(notebooks.target(p).read_text() == notebooks.notebook(p) for p in notebooks.sources())


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_notebook(name, alone, capfd):
    """Cell by cell, as a kernel runs them."""
    cells = json.loads((notebooks.NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    names = {"__name__": "__main__"}
    for cell in [cell for cell in cells if cell["cell_type"] == "code"]:
        exec(compile("".join(cell["source"]), f"{name}, {cell['id']}", "exec", dont_inherit=True), names)
    check(*capfd.readouterr(), alone)


def test_policy_in_the_guide(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guide/own_policy.md").read_text(), re.DOTALL)
    block = next(b for b in blocks if "class LargestKeys" in b)
    names = {"model": make("llama"), "__name__": "builtins"}
    try:
        # Without this file's own `from __future__ import annotations`.
        exec(compile("import kvrewrite\n" + block, "own_policy.md", "exec", dont_inherit=True), names)
        small = names["small"]
        cache = small.new_cache()
        small(torch.randint(0, 97, (1, 100)), past_key_values=cache)
        kept = cache.positions()[0][0][0]
        assert len(kept) == 48
        assert kept[-16:] == list(range(84, 100))
        small.save_pretrained(tmp_path / "out")
        assert type(names["kvrewrite"].load(tmp_path / "out").policy).__name__ == "LargestKeys"
    finally:
        POLICIES.pop("largest_keys", None)


# -- on Ray ------------------------------------------------------------------------------------------------------------
TOKENS = 24  # of an answer
# A small cluster in the process itself, which ends with it; then a program, as if it were run alone.
CLUSTER = """
import ray, runpy, sys
ray.init(num_cpus=4, object_store_memory=100 << 20, include_dashboard=False, _temp_dir=sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SERVE = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen
from ray import serve
from examples.ray_serve import Settings, application

directory, port, tokens, *prompts = sys.argv[1:]
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
serve.run(application(Settings(model=directory, name="tiny", replicas=2, max_new_tokens=int(tokens))))

def ask(prompt):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": int(tokens), "temperature": 0}
    head = {"Content-Type": "application/json"}
    request = Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), head)
    answer = json.load(urlopen(request, timeout=100))
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

with ThreadPoolExecutor(len(prompts)) as threads:
    print(json.dumps(list(threads.map(ask, prompts))))
serve.shutdown()
"""


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory):
    """A converted directory, prompts, and the answers of `generate`: text and number of tokens."""
    folder = tmp_path_factory.mktemp("ray")
    kvrewrite.convert(make_checkpoint(folder / "base"), folder / "small", policy="h2o", budget=48, chunk=32)
    model, tokenizer = kvrewrite.load(folder / "small"), read_tokenizer(folder / "small")
    words, chance = TEXT.split(), random.Random(0)
    prompts = [" ".join(chance.choices(words, k=chance.randint(20, 120))) for _ in range(20)]
    answers = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
        answers.append((tokenizer.decode(made, skip_special_tokens=True), len(made)))
    assert len({count for _, count in answers}) > 3  # some end early
    return folder / "small", prompts, answers


def example(name):
    """What an example defines."""
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name=name)


def run_on_ray(program, *arguments):
    """What a program prints that runs on a small cluster."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: sockets lie there
        command = [sys.executable, "-c", CLUSTER, folder, str(program), *map(str, arguments)]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", ["ray_batch", "ray_serve"])
def test_without_ray(name, monkeypatch):
    for module in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match=r"needs Ray .*pip install 'ray\["):
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "a", "prompt": "x"}', "{"], "jsonl:2: not JSON"),
        (['{"id": 1, "prompt": "x"}'], 'jsonl:1: expected an object with "id" and "prompt"'),
        (['{"id": "a"}'], 'jsonl:1: expected an object with "id" and "prompt"'),
        (["[]"], 'jsonl:1: expected an object with "id" and "prompt"'),
        (['{"id": "a", "prompt": "x"}', '{"id": "a", "prompt": "y"}'], "jsonl:2: the id 'a' was there before"),
    ],
)
def test_input_of_a_batch_job(lines, message, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit, match=message):
        example("ray_batch")["check_input"](tmp_path / "in.jsonl")


@pytest.mark.parametrize("memory", [None, 60_000])
def test_a_replica_of_a_batch_job(memory, on_ray):
    directory, prompts, expected = on_ray
    replica = example("ray_batch")["Replica"](str(directory), False, memory, TOKENS)
    begun, start = [], replica.batch.start
    replica.batch.start = lambda *args, **options: begun.append(start(*args, **options)) or begun[-1]
    rows = pytest.importorskip("pyarrow").table(
        {"id": [*map(str, range(len(prompts))), "empty"], "prompt": [*prompts, ""]}
    )
    *answers, empty = replica(rows).to_pylist()
    assert [(a["answer"], a["tokens"]) for a in answers] == expected
    assert [a["finish"] for a in answers] == ["length" if n == TOKENS else "stop" for _, n in expected]
    assert empty["finish"] == "error" and "no tokens" in empty["error"] and empty["answer"] is None
    assert (len(begun) > len(prompts)) == (memory is not None)  # some began again
    assert memory is None or replica.batch.used == 0


@pytest.mark.thorough
def test_heads_of_a_real_model_are_made_by_a_script(tmp_path):
    """examples/real_models/heads.sh, on the small model and three texts; what it made is not made again."""
    pytest.importorskip("datasets")
    rows = [json.dumps({"text": f"Box {n} is red. The key lies in box {n + 1}. " * 12}) for n in range(3)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    told = {"DEVICE": "cpu", "COLLECT": "4", "STEPS": "3", "BATCH": "2", "TOKENS": "64", "SECONDS_OF_GATES": "0"}
    script = [
        *map(str, ["bash", ROOT / "examples/real_models/heads.sh", kvrewrite.assets.small_model()]),
        str(tmp_path),
    ]
    out = tmp_path / "out"
    for _ in range(2):
        env = {**ENVIRONMENT, **told, "PYTHON": sys.executable}
        done = subprocess.run([*script, str(out)], capture_output=True, text=True, cwd=ROOT, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        made = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert set(made) == {"kvzap.safetensors", "locret.safetensors"} and "steps" not in done.stderr
    for policy in ("kvzap", "locret"):
        base = AutoModelForCausalLM.from_pretrained(kvrewrite.assets.small_model())
        weights = out / f"{policy}.safetensors"
        model = kvrewrite.transform(base, policy, policy_weights=weights, budget=0.5, check="off")
        assert model.policy.n_sink == 4


def test_batch_job_on_ray(on_ray, tmp_path):
    pytest.importorskip("ray", reason="needs ray[data]")
    directory, prompts, expected = on_ray
    rows = [json.dumps({"id": f"2020-01-{i:02}", "prompt": p, "other": i}) for i, p in enumerate(prompts)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows[:8]))
    options = ["--model", directory, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out"]
    options += ["--replicas", 2, "--rows", 4, "--max-new-tokens", TOKENS]
    run_on_ray(ROOT / "examples" / "ray_batch.py", *options)
    first = {p.name for p in (tmp_path / "out" / "answers").iterdir()}
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    run_on_ray(ROOT / "examples" / "ray_batch.py", *options)  # computes those that are new
    files = list((tmp_path / "out" / "answers").iterdir())
    assert first and first < {p.name for p in files}
    answers = [json.loads(line) for p in files for line in p.read_text().splitlines()]
    answers.sort(key=lambda a: a["id"])
    assert [a["id"] for a in answers] == [f"2020-01-{i:02}" for i in range(len(prompts))]  # each once
    assert [(a["answer"], a["tokens"]) for a in answers] == expected


def test_serve_on_ray(on_ray, tmp_path):
    pytest.importorskip("ray.serve", reason="needs ray[serve]")
    directory, prompts, expected = on_ray
    (tmp_path / "program.py").write_text(SERVE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    printed = run_on_ray(tmp_path / "program.py", directory, port, TOKENS, *prompts)
    found = next(line for line in printed.splitlines() if line.startswith("[["))
    assert [tuple(answer) for answer in json.loads(found)] == expected
