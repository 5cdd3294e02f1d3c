"""`kvrewrite bench`: the arithmetic of the roofline, results that survive an interruption, tables, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from kvrewrite import policies
from kvrewrite.analysis import flops
from kvrewrite.cli import app as cli
from kvrewrite.cli.options import parse_bytes
from kvrewrite.errors import OptionError
from kvrewrite.ir.site import AttentionSite
from kvrewrite.tools.benchmark import report, roofline, run, shapes
from kvrewrite.tools.benchmark.measure import Options, spread
from kvrewrite.tools.benchmark.results import Settings
from kvrewrite.tools.subjects import PolicySpec, arms

pytestmark = pytest.mark.xdist_group("bench")
LOCRET = {"budget": 24, "chunk": 16, "stabilizers": 4, "local_tail": 4, "hidden_size": 8}
OPTIONS = Options(repeat=2, steps=3, new_tokens=3)
SETTINGS = Settings(
    "tiny", (PolicySpec("streaming_llm", {"budget": 24, "chunk": 16}), PolicySpec("locret", LOCRET)), contexts=(48,),
    batches=(1,), options=OPTIONS,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Rates from one call each, one model for all tests, each policy inserted once."""
    patch = pytest.MonkeyPatch()
    patch.setattr(roofline, "SECONDS", 0.0)
    patch.setattr(roofline, "COPY_BYTES", 1 << 20)
    base, made = shapes.ShapeSource("tiny", device="cpu").base, {}
    real = shapes.ShapeSource.rewritten

    def rewritten(self, arm):
        if str(arm) not in made:
            made[str(arm)] = real(self, arm)
        return made[str(arm)]

    patch.setattr(shapes.ShapeSource, "base", base)
    patch.setattr(shapes.ShapeSource, "rewritten", rewritten)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def results(quick, tmp_path_factory):
    """A whole run, written to a file."""
    out = tmp_path_factory.mktemp("bench") / "results.json"
    return run.bench(SETTINGS, out=out), out


# ------------------------------------------------------------------------------------------------------------- a run
def test_a_run_has_every_number(results):
    found, out = results
    assert json.loads(out.read_text()) == found
    assert found["complete"] and found["kind"] == "kvrewrite bench"
    assert {"torch", "transformers", "triton", "gpu", "python"} <= set(found["machine"])
    assert found["settings"]["seed"] == 0 and found["settings"]["random_weights"] and found["command"]
    assert [c["name"] for c in found["cells"]] == ["sdpa", "streaming_llm", "locret"]
    for cell in found["cells"]:
        assert (cell["status"], cell["reason"]) == ("ok", None)
        assert (cell["context"], cell["batch"]) == (48, 1)
        prefill, decode = cell["prefill"]["seconds"], cell["decode"]["seconds"]
        assert len(prefill["samples"]) == 2 and len(decode["samples"]) == 3
        for s in (prefill, decode):
            assert 0 < s["low"] <= s["median"] <= s["high"]
        assert cell["decode"]["tokens_per_second"] == pytest.approx(1 / decode["median"])
        assert cell["generate"]["tokens"] == 3 and cell["generate"]["seconds_per_token"] > 0
        assert cell["cold"]["first_prefill_seconds"] > 0 and len(cell["cold"]["first_steps_seconds"]) == 8
        assert cell["cache"]["leased"] >= cell["cache"]["live"] > 0
        limits, beside = cell["limits"], cell["beside"]
        assert beside["prefill_over_floor"] == pytest.approx(prefill["median"] / limits["prefill"]["floor"])
        assert beside["decode_over_limit"] == pytest.approx(decode["median"] / limits["decode"]["limit"])
        assert limits["attention"][0]["flops_per_second"] > 0 and limits["copy_bytes_per_second"] > 0
        assert cell["prefill"]["peak_bytes"] is None  # nobody counts a CPU's
    full, streaming, locret = found["cells"]
    assert full["beside"]["prefill_speedup"] == 1 and full["weights"] is None
    ratio = full["prefill"]["seconds"]["median"] / locret["prefill"]["seconds"]["median"]
    assert locret["beside"]["prefill_speedup"] == pytest.approx(ratio)
    assert locret["weights"] == "random" and streaming["weights"] is None
    assert locret["resolved"]["budget"] == 24 and locret["policy_weight_bytes"] == 2 * (8 * 128 + 2 * 8) * 4
    # The full cache: 2 layers, 2 kv heads of 16, keys and values, fp32; a prompt, or it and the steps in front of decoding.
    assert full["cache"]["live"] == 48 * 2 * 2 * 16 * 2 * 4


def test_resume_runs_what_is_missing_and_what_failed(results, tmp_path, monkeypatch):
    found, _ = results
    earlier = json.loads(json.dumps(found))
    earlier["cells"][1] |= {"status": "out of memory", "reason": "no room"}
    earlier["cells"][2] |= {"seconds": -1.0}
    out = tmp_path / "r.json"
    out.write_text(json.dumps(earlier))
    ran = []
    real = run._Runner.run
    monkeypatch.setattr(
        run._Runner, "run", lambda self, what, cell, cells: (ran.append(cell["name"]), real(self, what, cell, cells))
    )
    again = run.bench(SETTINGS, out=out, resume=True)
    assert ran == ["streaming_llm"] and again["complete"]
    assert [c["status"] for c in again["cells"]] == ["ok"] * 3 and again["cells"][2]["seconds"] == -1.0
    other = Settings("tiny", SETTINGS.policies, contexts=(48,), options=Options(repeat=2, steps=4, new_tokens=3))
    with pytest.raises(OptionError, match=r"another steps \(3 there, 4 now\)"):
        run.bench(other, out=out, resume=True)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "out of memory", "CUDA out of memory"),
        (ValueError("odd\nlines"), "failed", "ValueError: odd"),
        (OptionError("no such thing"), "refused", "no such thing"),
    ],
)
def test_a_cell_that_fails_says_why_and_the_run_goes_on(monkeypatch, error, status, reason):
    def fail(subject, cell, *rest):
        cell["notes"] = []
        raise error

    monkeypatch.setattr(run, "measure", fail)
    found = run.bench(Settings("tiny", contexts=(32,), baselines=("sdpa", "eager"), options=OPTIONS))
    assert [c["status"] for c in found["cells"]] == [status] * 2 and reason in found["cells"][0]["reason"]
    _, notes = report.tables(found)
    assert any(reason in n for n in notes)


def test_a_broken_gpu_ends_the_run(monkeypatch, tmp_path):
    def fail(subject, cell, *rest):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(run, "measure", fail)
    with pytest.raises(run.DeviceBroken, match="illegal memory access"):
        run.bench(Settings("tiny", contexts=(32,), options=OPTIONS), out=tmp_path / "x.json")
    assert not json.loads((tmp_path / "x.json").read_text())["complete"]


def test_what_would_take_too_long_is_left_out(monkeypatch):
    def slow(subject, cell, *rest):
        cell["prefill"] = {"seconds": spread([200.0])}

    monkeypatch.setattr(run, "measure", slow)
    found = run.bench(Settings("tiny", contexts=(32, 64), options=OPTIONS))
    assert [c["status"] for c in found["cells"]] == ["ok", "skipped"]
    assert "at least 400 s a prefill" in found["cells"][1]["reason"]


def test_eager_attention_that_does_not_fit_and_no_kvpress(monkeypatch):
    monkeypatch.setattr("kvrewrite.tools.benchmark.baselines._free_bytes", lambda device, limit: 1 << 10)
    monkeypatch.setattr("kvrewrite.tools.benchmark.baselines.has_kvpress", lambda: False)
    found = run.bench(
        Settings("tiny", SETTINGS.policies[:0], contexts=(32,), baselines=("eager", "kvpress"), options=OPTIONS)
    )
    assert [c["status"] for c in found["cells"]] == ["skipped"] * 3
    assert "32 x 32 scores" in found["cells"][0]["reason"] and "pip install kvpress" in found["cells"][1]["reason"]


def test_kvpress_gets_the_budgets_of_the_policies():
    chosen = arms([PolicySpec("snapkv"), PolicySpec("h2o"), PolicySpec("full")], [0.25, 512])
    assert run._press_budgets(chosen, 4096) == [1024, 512]
    assert run._press_budgets(chosen, 256) == [64]  # 512 slots would hold all
    assert run._press_budgets([], 256) == [None]


# -------------------------------------------------------------------------------------------------------------- tables
def test_tables_fit_80_columns(results):
    found, _ = results
    cells = json.loads(json.dumps(found["cells"]))
    for cell in cells:  # numbers as a large model has them
        for part in ("prefill", "decode"):
            cell[part]["seconds"] |= {"median": 11.84, "low": 11.81, "high": 11.93}
            cell[part]["peak_bytes"] = 31 << 30
        cell["decode"]["seconds"] = {"median": 0.1234, "low": 0.1201, "high": 0.1302, "samples": []}
        cell["decode"]["tokens_per_second"] = 12345.6
        cell["cache"]["leased"] = 17 << 30
    shown, notes = report.tables({**found, "cells": cells}, 80)
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        for table in shown:
            console.print(table)
    text = captured.get()
    assert max(len(line) for line in text.splitlines()) <= 80
    for word in ("48 tokens, batch 1", "11.8–11.9", "120–130", "12,346", "31.0", "17.0", "GiB"):
        assert word in text
    assert "…" not in text and notes == ["random policy weights"]
    assert "random weights" in report.explanation(found)


def test_plot(results, tmp_path):
    pytest.importorskip("matplotlib")
    from kvrewrite.tools.benchmark.plot import draw

    figure = draw(results[0], tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert [a.get_title(loc="left") for a in figure.axes] == ["prefill, s", "decode step, ms"]
    assert all(a.get_xscale() == a.get_yscale() == "log" for a in figure.axes)


# ----------------------------------------------------------------------------------------------------------- roofline
def site(layer=0, window=0, chunk=0, shares=None):
    return AttentionSite(layer, "", 4, 2, 16, 16, 0.25, "test", window, chunk, shares_kv_with=shares)


def test_pairs():
    assert flops.visible_pairs(4, 0) == 1 + 2 + 3 + 4
    assert flops.visible_pairs(3, 10) == 11 + 12 + 13
    assert flops.visible_pairs(4, 0, 0, window=2) == 1 + 2 + 2 + 2
    assert flops.visible_pairs(3, 6, 6, chunk=4) == 3 + 4 + 1  # positions 6, 7, 8


def test_attention_of_chunks():
    policy = policies.make("streaming_llm", budget=8, chunk=4)
    found = flops.attention_of([site(0), site(1, window=6)], 10, policy)
    wide = (1 + 2 + 3 + 4) + (5 + 6 + 7 + 8) + (9 + 10)  # 0, 4 and 8 slots are cached
    narrow = (1 + 2 + 3 + 4) + (5 + 6 + 6 + 6) + (6 + 6)
    assert found.flops == [2 * 32 * 4 * wide, 2 * 32 * 4 * narrow]
    assert found.call[0] == (4, 4) and found.held == [8, 6]
    full = flops.attention_of([site(0), site(1, shares=0)], 10)
    assert full.flops == [2 * 32 * 4 * 55] * 2 and full.call == [(10, 0)] * 2 and full.held == [10, 10]


def test_heads_with_different_budgets():
    """A head that retrieves attends to everything, one that streams to its budget; each is half of the layer."""
    policy = policies.make("duo_attention", budget=8, start=2, chunk=4, heads="10")
    found = flops.attention_of([site(0)], 12, policy)
    alone = [flops.attention_of([site(0)], 12, policies.make("streaming_llm", budget=n, chunk=4)) for n in (99, 8)]
    assert found.flops[0] == (alone[0].flops[0] + alone[1].flops[0]) / 2
    assert found.held == [10] and found.read == [4 + 8 + 12] and found.call == [(4, 8)]


def test_floor_and_limit():
    work = flops.Work(linear_flops=1000, head_flops=100, weight_bytes=4000)
    floor = roofline.prefill_floor(work, 10, 2, 1e4, [(500, 1e3), (300, 1e2)])
    assert floor == {"linear": 2 * 10100 / 1e4, "attention": 2 * (0.5 + 3.0), "floor": 2.02 + 7.0}
    slow = roofline.decode_limit(work, 600, 2, 1e3, 1e6)
    assert slow["limit"] == pytest.approx(4.0 + 1.2)  # the weights' bytes
    busy = roofline.decode_limit(work, 600, 50, 1e3, 1e4)
    assert busy["limit"] == pytest.approx(50 * 1100 / 1e4 + 30.0)  # the FLOPs


def test_slots_and_bytes_of_a_step():
    sites = [site(0), site(1, window=6)]
    policy = policies.make("streaming_llm", budget=8, chunk=4)
    attention = flops.attention_of(sites, 10, policy)
    assert flops.decode_slots(attention, sites, 5, 10, policy) == [9, 7]
    full = flops.attention_of(sites, 10)
    assert flops.decode_slots(full, sites, 5, 10, None) == [16, 7]
    assert flops.kv_bytes(sites, [16, 7], 2) == 2 * 32 * 2 * 23
    int8 = policies.make("snapkv", quantize="int8", quantize_residual=0)
    assert flops.kv_bytes(sites[:1], [64], 2, int8) < flops.kv_bytes(sites[:1], [64], 2) * 0.75


def test_work_of_the_named_shapes():
    """As shared/notes/roofline.py has them: layer weights and the output layer, once each."""
    expected = {
        "llama-3.1-8b": 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
        "phi-3-mini": 32 * (4 * 3072 * 3072 + 3 * 3072 * 8192),
        "qwen3-8b": 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288),
    }
    from transformers import AutoModelForCausalLM

    for name, weights in expected.items():
        config = shapes.SHAPES[name]()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        work, head = flops.work_of(model), config.vocab_size * config.hidden_size
        assert (work.linear_flops, work.head_flops) == (2 * weights, 2 * head)
        assert work.weight_bytes == 2 * (weights + head)
        sites = flops.sites_of(config)
        assert len(sites) == config.num_hidden_layers and not sites[0].window
        assert (sites[0].kv_heads, sites[0].head_dim) == ((32, 96) if name == "phi-3-mini" else (8, 128))


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "samples": [3.0, 1.0, 2.0]}
    many = spread([float(i) for i in range(101)])
    assert (many["low"], many["median"], many["high"]) == (10.0, 50.0, 90.0)


def test_random_models_are_repeatable_and_have_their_tables():
    config = shapes.SHAPES["tiny"]()
    a, b, c = (shapes.build(config, torch.device("cpu"), torch.float32, seed) for seed in (0, 0, 1))
    wide = [n for n, p in a.named_parameters() if p.dim() > 1]
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not any(torch.equal(a.get_parameter(n), c.get_parameter(n)) for n in wide)
    assert a.get_parameter(wide[0]).std().item() == pytest.approx(0.02, rel=0.05)
    assert a.model.rotary_emb.inv_freq[0] == 1 and math.isfinite(a(torch.tensor([[1, 2]])).logits.sum())


# ------------------------------------------------------------------------------------------------------------ refusals
def call(*args):
    return CliRunner().invoke(cli.main, ["bench", *map(str, args)])


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (
            ("llama-9b",),
            1,
            "neither a directory nor a named shape; give a checkpoint directory, or one of: llama-3.1-8b",
        ),
        (("tiny", "-c", "9000"), 1, "tiny was made for 8,192 tokens"),
        (("tiny", "--baselines", "sdpa,flash"), 1, "unknown baseline 'flash'; there are: sdpa, eager, static, kvpress"),
        (("tiny", "--baselines", "none"), 1, "there is nothing to measure"),
        (("tiny", "-p", "snapkw"), 1, "snapkv"),
        (("tiny", "--memory-limit", "much"), 1, "expected a size such as 24GiB"),
        (("tiny", "--memory-limit", "1GiB", "--device", "cpu"), 1, "only a GPU's memory can be limited"),
        (("tiny", "--resume"), 2, "--resume needs --out"),
        (("tiny", "-p", "converted"), 1, "tiny is no converted model"),
    ],
)
def test_bad_input(args, status, message):
    done = call(*args)
    assert done.exit_code == status and message in " ".join(done.stderr.split())


def test_an_existing_file_is_not_replaced(tmp_path):
    out = tmp_path / "r.json"
    out.write_text("{}")
    done = call("tiny", "--out", out)
    assert done.exit_code == 1 and "continue it with --resume, or replace it with --force" in done.stderr
    assert "has no results of `kvrewrite bench`" in call("tiny", "--out", out, "--resume").stderr
    assert out.read_text() == "{}"


def test_the_command(tmp_path):
    out = tmp_path / "r.json"
    done = call(
        "tiny", "-c", 32, "--repeat", 1, "--steps", 2, "--new-tokens", 0, "--profile", "--out", out, "--device", "cpu"
    )
    assert done.exit_code == 0, done.output
    assert "32 tokens, batch 1" in done.stdout and "sdpa" in done.stdout
    cell = json.loads(out.read_text())["cells"][0]
    step = cell["profile"]["decode_step"]
    assert step["top"] and math.isclose(sum(r["seconds"] for r in step["top"]), step["busy_seconds"], rel_tol=0.3)
    assert "generate" not in cell


def test_sizes():
    assert parse_bytes("24GiB", "--memory") == 24 << 30 and parse_bytes("1.5 gb", "--memory") == 1_500_000_000
