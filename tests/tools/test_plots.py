"""`kvrewrite plot`: what is drawn, read back from the figures, and PNG files that are there or not at all."""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner

from kvrewrite.cli import app as cli
from kvrewrite.errors import ArtifactError, OptionError
from kvrewrite.tools import plotting
from kvrewrite.tools.evaluation import intervals, plots, run
from tests.support.tiny import TEXT, make_checkpoint

PNG = b"\x89PNG\r\n\x1a\n"


def cell(label, budget, mode, scores, *, task="one", tokens=64, kept=1.0):
    held = {"tokens": tokens, "slots": 4 * tokens * kept, "live": 100 * tokens * kept, "leased": 128 * tokens * kept}
    return {
        "policy": label, "label": label, "options": {}, "weights": None, "budget": budget, "mode": mode, "task": task,
        "tokens": tokens, "status": "ok", "scores": scores, "seconds": 1.0,
        "accuracy": dataclasses.asdict(intervals.interval(scores)),
        "memory": dict.fromkeys(("prompt",) if mode == "aware" else ("context", "prompt"), held),
    }  # fmt: skip


def results_of(*cells):
    cells = list(cells)
    run.compare(cells)
    data = {"settings": {"samples": 4}, "cells": cells, "means": run.means(cells)}
    return {"kind": "kvrewrite eval", "format": run.FORMAT, "complete": True, "versions": {}, **data}


@pytest.fixture
def results():
    made = [cell("full", None, "full", [1.0] * 4)]
    for mode, less in (("aware", 0), ("blind", 1)):
        for label in ("h2o", "tova"):
            made.append(cell(label, 0.5, mode, [1.0] * (3 - less) + [0.0] * (1 + less), kept=0.5))
            made.append(cell(label, 0.25, mode, [1.0] + [0.0] * 3, kept=0.25))
    return results_of(*made)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("plots") / "base")


def call(*args):
    return CliRunner().invoke(cli.main, ["plot", *map(str, args)])


def test_it_says_how_to_install_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = call(tmp_path / "results.json", "--out", tmp_path / "x.png")
    assert done.exit_code == 1
    assert "pip install 'matplotlib" in done.stderr


# ------------------------------------------------------------------------------------------------- with matplotlib itself
class TestDrawn:
    @pytest.fixture(autouse=True)
    def needs(self):
        pytest.importorskip("matplotlib")

    def test_accuracy(self, results, tmp_path):
        figure = plots.accuracy(results, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(PNG)
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
        aware, blind = figure.axes
        assert (aware.get_title(loc="left"), blind.get_title(loc="left")) == ("question-aware", "question-blind")
        for axes, high in ((aware, 75), (blind, 50)):
            lines = {c.get_label(): c.lines[0] for c in axes.containers}
            assert set(lines) == {"h2o", "tova"}
            for line in lines.values():
                assert line.get_ydata().tolist() == [25, high]
                assert line.get_xdata() == pytest.approx([25, 50], rel=0.02)
            low, up = intervals.wilson(1, 4)
            (_, _, (bars,)) = axes.containers[0]
            assert bars.get_segments()[0][:, 1] == pytest.approx([100 * low, 100 * up])
            assert axes.lines[0].get_ydata()[0] == 100  # the full cache
            assert axes.get_xlim() == pytest.approx((20, 62.5))

    def test_a_mean_over_fewer_tasks_is_not_drawn(self, results, tmp_path):
        two = [
            cell("full", None, "full", [1.0] * 4, task="two"),
            cell("h2o", 0.5, "aware", [1.0] * 4, task="two", kept=0.5),
        ]
        both = results_of(*results["cells"], *two)
        figure = plots.accuracy(both, tmp_path / "a.png")
        assert len(figure.axes) == 1
        (h2o,) = figure.axes[0].containers
        assert h2o.lines[0].get_ydata().tolist() == [87.5]  # at 50%, of both tasks
        figure = plots.accuracy(both, tmp_path / "b.png", tasks=["one"], labels=["tova"])
        assert [c.get_label() for c in figure.axes[0].containers] == ["tova"]

    def test_names_that_are_not_there(self, results, tmp_path):
        with pytest.raises(OptionError, match="no task 'three'; they have: one"):
            plots.accuracy(results, tmp_path / "a.png", tasks=["three"])
        with pytest.raises(OptionError, match="no policy 'snapkv'; they have: full, h2o, tova"):
            plots.accuracy(results, tmp_path / "a.png", labels=["snapkv"])
        for one in results["cells"]:
            one["status"] = "refused"
        with pytest.raises(OptionError, match="nothing to draw"):
            plots.accuracy(results, tmp_path / "a.png")
        assert not list(tmp_path.iterdir())

    def test_measured_memory(self, tmp_path):
        cells = []
        for tokens in (64, 128):
            cells.append(cell("full", None, "full", [1.0], tokens=tokens))
            cells += [cell(p, 0.5, "blind", [1.0], tokens=tokens, kept=0.5) for p in ("h2o", "tova")]
            cells.append(cell("h2o", 0.25, "aware", [1.0], tokens=tokens, kept=0.25))
        figure = plots.measured_memory(results_of(*cells), tmp_path / "m.png")
        lines = {line.get_label(): line for line in figure.axes[0].lines}
        assert set(lines) == {"full cache", "50%: h2o, tova", "25%: h2o"}  # what lies on each other is one line
        assert lines["full cache"].get_xydata().tolist() == [[64, 128 * 64], [128, 128 * 128]]
        assert lines["50%: h2o, tova"].get_ydata().tolist() == [64 * 64, 64 * 128]

    def test_estimated_memory(self, base, tmp_path):
        done = call(
            base,
            "--kind",
            "memory",
            "-p",
            "h2o",
            "-b",
            64,
            "--context",
            64,
            "--context",
            256,
            "--out",
            tmp_path / "m.png",
        )
        assert done.exit_code == 0, done.output
        from kvrewrite.tools.subjects import Arm, PolicySpec, Source

        figure = plots.estimated_memory(Source(base), [Arm(PolicySpec("h2o"), 64)], [64, 256], tmp_path / "n.png")
        full, h2o = figure.axes[0].lines
        token = 2 * 2 * 2 * 8 * 4  # layers, kv heads, k and v, channels, fp32
        assert full.get_ydata().tolist() == [64 * token, 256 * token]
        assert h2o.get_ydata().tolist() == [64 * (token + 2 * 2 * 12)] * 2

    def test_retention_draws_what_is_kept(self, tmp_path):
        kept = {0: [[0, 1, 9], [0]], 2: [[2, 3], list(range(10))]}
        figure = plots.draw_retention([("some policy", kept)], 10, tmp_path / "r.png")
        (mesh,) = figure.axes[0].collections
        assert mesh.get_array().reshape(4, 10).tolist() == [
            [float(p in head) for p in range(10)] for heads in kept.values() for head in heads
        ]
        assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["0", "2"]
        assert figure.axes[0].get_title(loc="left") == "some policy: 40.0% of 10 positions kept"

    def test_long_prompts_are_binned(self, tmp_path):
        length = 3 * plots.BINS
        kept = {0: [list(range(0, length, 3)), list(range(length))]}
        figure = plots.draw_retention([("every third", kept)], length, tmp_path / "r.png")
        values = figure.axes[0].collections[0].get_array().reshape(2, plots.BINS)
        assert values[0].tolist() == pytest.approx([1 / 3] * plots.BINS)
        assert values[1].tolist() == [1.0] * plots.BINS

    def test_retention_of_a_prompt(self, base, tmp_path):
        (tmp_path / "prompt.txt").write_text(TEXT)
        out = tmp_path / "r.png"
        args = [base, "--kind", "retention", "-p", "h2o", "-p", "streaming_llm", "-b", 16, "--out", out]
        done = call(*args, "--prompt-file", tmp_path / "prompt.txt")
        assert done.exit_code == 0, done.output
        assert out.read_bytes().startswith(PNG)
        done = call(*args, "--prompt-file", tmp_path / "prompt.txt")
        assert done.exit_code == 1
        assert "--force" in done.stderr
        (tmp_path / "prompt.txt").write_text("")
        done = call(*args, "--prompt-file", tmp_path / "prompt.txt", "--force")
        assert done.exit_code == 1
        assert "expected at least 2" in done.stderr

    def test_command_line(self, results, tmp_path):
        file, out = tmp_path / "results.json", tmp_path / "a.png"
        file.write_text(json.dumps(results))
        assert call(file, "--out", out).exit_code == 0
        assert out.read_bytes().startswith(PNG)
        for args, message in (
            ([file, "--out", out], "--force"),
            ([file, "--out", tmp_path / "a.pdf"], ".png"),
            ([file, "--out", tmp_path / "no" / "a.png"], "does not exist"),
            ([file, "--out", out, "--force", "-p", "nothing"], "no policy 'nothing'"),
        ):
            done = call(*args)
            assert done.exit_code == 1, done.output
            assert message in done.stderr
        file.write_text("[]")
        assert "no results of `kvrewrite eval`" in call(file, "--out", out, "--force").stderr
        done = call("--out", out, "--force")
        assert done.exit_code == 2
        assert "kvrewrite eval --out" in done.stderr

    def test_each_line_looks_different(self):
        looks = plotting.styles([str(i) for i in range(28)])
        assert len({(s["color"], s["linestyle"]) for s in looks.values()}) == 28


def test_eviction_is_drawn_as_it_was_measured(tmp_path):
    made = [cell("full", None, "full", [1.0]), cell("attention_gate", None, "blind", [1.0])]
    made[1]["memory"] = {"context": {**made[1]["memory"]["context"], "heads": {"0": [16, 32], "3": [64, 48]}}}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results_of(*made)))
    out = tmp_path / "eviction.png"
    done = call(file, "--kind", "eviction", "--out", out)
    assert done.exit_code == 0 and out.read_bytes().startswith(PNG)
    figure = plots.eviction(results_of(*made), out)
    (image,) = figure.axes[0].images
    assert image.get_array().tolist() == [[75.0, 50.0], [0.0, 25.0]]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["0", "3"]
    assert "37.5%" in figure.axes[0].get_title()
    with pytest.raises(OptionError, match="expected one policy for a map of what is evicted; the results have none"):
        plots.eviction(results_of(made[0]), out)
    with pytest.raises(ArtifactError, match="do not say what each head held"):
        plots.eviction(results_of(made[0], cell("h2o", 0.5, "blind", [1.0])), out)
