"""The command line: directories in, directories out, and what users get wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kvrewrite.cli import app as cli
from kvrewrite.cli.options import parse_options, parse_value
from kvrewrite.errors import OptionError
from kvrewrite.tools import demo
from tests.support.processes import environment
from tests.support.tiny import make_checkpoint

pytestmark = pytest.mark.xdist_group("cli")  # whose fixtures are made once

ROOT = Path(__file__).parents[2]
CONVERT = ("--policy", "streaming_llm", "--budget", "16", "--chunk", "8")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "base")


@pytest.fixture(scope="module")
def converted(base):
    out = base.parent / "converted"
    done = call("convert", str(base), *CONVERT, "--out", str(out), "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(out)
    return out


def call(*args):
    return CliRunner().invoke(cli.main, list(args))


def process(*command, **kwargs):
    command = [sys.executable, *command]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, **kwargs)


# ----------------------------------------------------------------------------------------------------- the whole path
def test_convert_leaves_the_weights_alone(base, converted):
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        assert (converted / shard.name).read_bytes() == shard.read_bytes()
    assert (converted / "tokenizer.json").exists()
    assert not [p for p in base.parent.iterdir() if p.name.startswith(".")]


@pytest.fixture(scope="module")
def in_a_new_process(converted):
    """`generate` and then `verify` in a process that has neither captured nor converted."""
    script = (
        "import sys\n"
        "from kvrewrite.cli.app import main\n"
        "main(['generate', sys.argv[1], '--prompt', 'The quick brown fox ' * 6, '--max-new-tokens', '5'],"
        " standalone_mode=False)\n"
        "found = [m for m in sys.modules if m.startswith('transformers.models.') and '.modeling_' in m]\n"
        "found = [m for m in found if not m.startswith('transformers.models.auto.')]\n"
        "assert not found, found\n"
        "print('\\nVERIFY')\n"
        "main(['verify', sys.argv[1], '--json', '--tokens', '24'], standalone_mode=False)\n"
    )
    done = process("-c", script, str(converted))
    assert done.returncode == 0, done.stderr
    answer, _, report = done.stdout.partition("\nVERIFY\n")
    return answer, report, done.stderr


def test_generate_in_a_new_process_needs_no_model_code(in_a_new_process):
    answer, _, stderr = in_a_new_process
    assert "5 new tokens" in stderr
    assert "leased" in stderr
    assert "fox fox" not in answer  # the prompt is not repeated


def test_verify_in_a_new_process(in_a_new_process):
    report = json.loads(in_a_new_process[1])
    assert report["ok"]
    assert {c["name"]: c["ok"] for c in report["checks"]}["original, full budget"] is True


def test_verify_says_what_is_broken(converted, tmp_path):
    broken = shutil.copytree(converted, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    done = call("verify", str(broken))
    assert done.exit_code == 1
    assert "tokenizer.json" in re.sub(r"[\s│]", "", done.stdout)  # a long path is broken into lines
    assert "verification failed: hashes" in done.stderr


def test_generate_samples_from_a_file(converted, tmp_path):
    (tmp_path / "prompt.txt").write_text("She sells sea shells")
    flags = ["--sample", "--temperature", "1.0", "--top-p", "0.9", "--seed", "3", "--max-new-tokens", "4"]
    runs = [call("generate", str(converted), "--prompt-file", str(tmp_path / "prompt.txt"), *flags) for _ in range(2)]
    assert [r.exit_code for r in runs] == [0, 0], runs[0].output
    assert runs[0].stdout == runs[1].stdout


def test_inspect(base, converted):
    done = call("inspect", str(base), "--json")
    assert done.exit_code == 0, done.output
    sites = json.loads(done.stdout)["sites"]
    assert [s["layer"] for s in sites] == [0, 1]
    assert {s["kv_heads"] for s in sites} == {2}
    done = call("inspect", str(base), "--graph")
    assert "2 attention sites" in done.stdout
    assert "kvrewrite.attention" in done.stdout
    data = json.loads(call("inspect", str(converted), "--json", "--graph").stdout)
    assert data["policy"]["name"] == "streaming_llm"
    assert "cached_attention" in data["graph"]
    assert "streaming_llm" in data["sites"][0]["inserted"]


def test_dry_run_writes_nothing(base, tmp_path):
    before = sorted(p.name for p in base.parent.iterdir())
    args = ["convert", str(base), *CONVERT, "--dry-run", "--context", "100", "--context", "5000", "--batch", "2"]
    done = call(*args, "--out", str(tmp_path / "out"), "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["out"] is None
    assert [(p["context"], p["batch"]) for p in data["memory"]] == [(100, 2), (5000, 2)]
    assert not list(tmp_path.iterdir())
    assert sorted(p.name for p in base.parent.iterdir()) == before
    shown = call(*args)
    assert "nothing was written" in shown.stdout
    assert "5,000" in shown.stdout


def test_link(base, tmp_path):
    done = call("convert", str(base), *CONVERT, "--out", str(tmp_path / "out"), "--link")
    assert done.exit_code == 0, done.output
    shard = next(base.glob("*.safetensors"))
    assert (tmp_path / "out" / shard.name).stat().st_ino == shard.stat().st_ino


# ------------------------------------------------------------------------------------------------------ what is wrong
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--policy", "streming_llm"], "did you mean 'streaming_llm'"),
        (["-o", "sinks=4"], "has no option 'sinks'"),
        (["--policy", "streaming_llm", "-o", "start=four"], "expected an integer"),
        (["-o", "decode_eviction=maybe"], "expected true or false"),
        (["--budget", "0"], "expected a fraction such as 0.25 or a whole number of slots"),
        (["--policy", "streaming_llm", "--budget", "4"], "expected a budget above 4"),
        (["--policy", "h2o", "--budget", "8", "-o", "recent_tokens=8"], "expected a budget above 8"),
        (["--policy", "locret", "--budget", "64", "-o", "stabilizers=8"], "policy weights"),
        (["--policy-weights", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_options_that_make_no_sense(base, tmp_path, args, message):
    done = call("convert", str(base), "--out", str(tmp_path / "out"), "--json", *args)
    assert done.exit_code == 1, done.output
    assert message in json.loads(done.stdout)["error"]
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convert", "."], "--out"),
        (["convert", ".", "--dry-run", "-o", "start"], "key=value"),
        (["convert", ".", "--out", "out", "--compile-device", "cuda"], "need --compile aot"),
        (["convert", ".", "--dry-run", "--budget", "9", "-o", "budget=8"], "given twice"),
        (["generate", "."], "--prompt"),
        (["generate", ".", "--prompt", "x", "--top-p", "0.5"], "--sample"),
        (["nothing"], "nothing"),
    ],
)
def test_wrong_usage(args, message):
    done = call(*args)
    assert done.exit_code == 2
    assert message in done.stderr


def test_models_that_are_no_directory(base, tmp_path):
    for command in (["convert", "--dry-run"], ["inspect"]):
        done = call(*command, "someone/some-model-8b")
        assert done.exit_code == 1
        assert "hf download someone/some-model-8b" in done.stderr
        done = call(*command, str(tmp_path / "no" / "such" / "place"))
        assert done.exit_code == 1
        assert "does not exist" in done.stderr
        done = call(*command, str(base / "config.json"))
        assert done.exit_code == 1
        assert "is a file" in done.stderr


def test_checkpoints_that_cannot_be_read(base, tmp_path):
    for name, change in {"no_config": "config.json", "bin_only": "*.safetensors*"}.items():
        broken = shutil.copytree(base, tmp_path / name)
        for path in broken.glob(change):
            path.unlink()
        if name == "bin_only":
            torch.save({}, broken / "pytorch_model.bin")
        done = call("convert", str(broken), *CONVERT, "--out", str(tmp_path / "out"))
        assert done.exit_code == 1, done.output
        assert ("config.json" if name == "no_config" else "pickles") in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()


def test_existing_output(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    done = call("convert", str(base), *CONVERT, "--out", str(out))
    assert done.exit_code == 1
    assert "not empty" in done.stderr
    done = call("convert", str(base), *CONVERT, "--out", str(out), "--force")
    assert done.exit_code == 1  # not a model directory
    assert (out / "mine.txt").read_text() == "precious"
    shutil.rmtree(out)
    for extra in ([], ["--force"]):
        assert call("convert", str(base), *CONVERT, "--out", str(out), *extra).exit_code == 0


def test_models_without_attention(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4))
    model.save_pretrained(tmp_path / "base")
    done = call("inspect", str(tmp_path / "base"), "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_directories_that_are_not_converted(base, command):
    flags = ["--prompt", "x"] if command == "generate" else []
    done = call(command, str(base), *flags)
    assert done.exit_code == 1
    assert "kvrewrite convert" in done.stderr


def test_generate_without_a_chat_template(converted):
    done = call("generate", str(converted), "--prompt", "x", "--chat")
    assert done.exit_code == 1
    assert "no chat template" in done.stderr


def test_unknown_device(converted):
    done = call("generate", str(converted), "--prompt", "x", "--device", "nonsense")
    assert done.exit_code == 1
    assert "nonsense" in done.stderr


# ------------------------------------------------------------------------------------------------------------ the rest
def test_policies():
    names = [p["name"] for p in json.loads(call("policies", "--json").stdout)]
    assert {"full", "streaming_llm", "h2o", "locret"} <= set(names)
    assert json.loads(call("policies", "streaming_llm", "--json").stdout)["options"]["start"]["default"] == 4
    assert "2309.17453" in call("policies").stdout
    assert "decode_eviction" in call("policies", "h2o").stdout
    done = call("policies", "h20")
    assert done.exit_code == 1
    assert "did you mean 'h2o'" in done.stderr


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        ("int | None", "none", None),
        ("int | None", "12", 12),
        ("bool", "yes", True),
        ("bool", "false", False),
        ("float", "1e-3", 1e-3),
        ("str", "12", "12"),
    ],
)
def test_values_of_options(hint, text, value):
    assert parse_value(text, hint) == value


def test_values_that_do_not_fit():
    for pair in ("budget=much", "start=none", "decode_eviction=2"):
        with pytest.raises(OptionError, match=pair.split("=")[0]):
            parse_options("streaming_llm", [pair])
    assert parse_options("streaming_llm", ["decode-eviction=off"], budget=8, chunk=None) == {
        "budget": 8,
        "decode_eviction": False,
    }


def test_import_weights(tmp_path):
    torch.save({"layer": {"weight": torch.ones(2, 3)}}, tmp_path / "x.bin")
    args = ["import-weights", str(tmp_path / "x.bin"), "--out", str(tmp_path / "y.safetensors"), "--json"]
    done = call(*args)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tensors"] == {"layer.weight": {"shape": [2, 3], "dtype": "float32"}}
    again = call(*args)
    assert again.exit_code == 1
    assert "exists" in json.loads(again.stdout)["error"]
    assert call(*args, "--force").exit_code == 0
    (tmp_path / "bad.bin").write_bytes(b"nonsense")
    done = call("import-weights", str(tmp_path / "bad.bin"), "--out", str(tmp_path / "z.safetensors"))
    assert done.exit_code == 1
    assert "Traceback" not in done.stderr


def test_import_published(tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_text("1.0\t0.25\n0.5\t0.0\n")
    args = ["import-weights", str(tmp_path), "--policy", "duo_attention", "--out", str(tmp_path / "y.safetensors")]
    done = call(*args)
    assert done.exit_code == 0, done.output
    assert "policy duo_attention, layers 2, kv_heads 2" in done.stdout and "1 tensors, 4 values" in done.stdout
    done = call(*args, "--force", "--json")
    assert json.loads(done.stdout)["metadata"]["layers"] == "2"
    done = call("import-weights", str(tmp_path), "--policy", "h2o", "--out", str(tmp_path / "z.safetensors"))
    assert done.exit_code == 1 and "expected one of duo_attention, " in done.stderr and "locret" in done.stderr


def test_interruption_leaves_nothing(base, tmp_path, monkeypatch):
    from kvrewrite.artifact import writing

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "publish", interrupted)
    done = call("convert", str(base), *CONVERT, "--out", str(tmp_path / "out"))
    assert done.exit_code == 130
    assert "interrupted" in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_loads_neither_torch_nor_transformers():
    script = (
        "import sys\nfrom kvrewrite.cli.app import main\n"
        "main(['convert', '--help'], standalone_mode=False)\nmain(['policies'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)\n"
    )
    done = process("-c", script)
    assert done.returncode == 0, done.stderr


def test_demo(tmp_path, capsys):
    demo.run(tmp_path / "demo", questions=0)
    shown = capsys.readouterr().out
    assert "trained to find things" in shown
    answer = re.search(r"the answer is (\d+)", shown)
    assert answer and shown.count(answer[1]) == 3  # by both caches, too
    assert "saved: " in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo"]
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["converted", "original"]
    refused = call("demo", "--out", str(tmp_path / "demo" / "converted"), "--force")
    assert refused.exit_code == 1
    assert "not empty" in refused.stderr
