"""`kvrewrite doctor`: what this machine can run, and what would be slow and why."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import kvrewrite
from kvrewrite.cli import app
from kvrewrite.tools import doctor
from tests.support.tiny import make_checkpoint


def states(found: list[doctor.Finding], area: str) -> dict[str, str]:
    return {finding.text: finding.state for finding in found if finding.area == area}


def test_this_machine() -> None:
    done = CliRunner().invoke(app.main, ["doctor"])
    assert done.exit_code == 0, done.output
    have = f"torch {importlib.metadata.version('torch')}"  # torch.__version__ may say what it was built for, too
    assert f"kvrewrite {kvrewrite.__version__}" in done.output and have in done.output
    assert max(map(len, done.output.splitlines())) <= 100
    found = json.loads(CliRunner().invoke(app.main, ["doctor", "--json"]).output)
    assert {"area": "versions", "state": "ok", "text": have} in found


def test_busy_cores_are_told() -> None:
    """Only where threads would wait for each other."""
    found = [doctor._processor(2, threads, load) for threads, load in ((2, 1.5), (2, 3.8), (1, 3.8))]
    assert [f.state for f in found] == ["ok", "slow", "ok"] and "OMP_NUM_THREADS=1" in found[1].text


def test_versions_that_are_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.0" if name == "torch" else real(name))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2.11,<2.14", "msgspec; extra == 'x'"])
    said = states(doctor.examine(), "versions")
    wrong = [text for text, state in said.items() if state == "wrong"]
    assert len(wrong) == 1 and "torch 2.1.0: kvrewrite was made for" in wrong[0] and "pip install" in wrong[0]
    assert CliRunner().invoke(app.main, ["doctor"]).exit_code == 1


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("KVREWRITE_KERNELS", "reference")
    found = doctor.examine()
    assert any("no GPU" in text and state == "slow" for text, state in states(found, "devices").items())
    assert any("unset it" in text and state == "slow" for text, state in states(found, "kernels").items())


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = type("Facts", (), {"name": "Tesla T4", "major": 7, "minor": 5})()
    for name, answer in {
        "is_available": True,
        "device_count": 1,
        "get_device_properties": facts,
        "mem_get_info": (15 << 30, 16 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    found = doctor.examine()
    assert any("Tesla T4" in t and "7.5" in t and s == "slow" for t, s in states(found, "devices").items())
    assert any("TORCHINDUCTOR_CACHE_DIR" in text for text in states(found, "caches"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "h2o", "merge": True}, "merging asks the device"),
        (
            {"policy": "streaming_llm", "quantize": "int8", "positions": "contiguous"},
            "rotates cached keys by their rank",
        ),
    ],
)
def test_a_model_that_would_be_slow(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kvrewrite.convert(make_checkpoint(tmp_path / "base"), out, budget=16, chunk=8, check="off", **options)
    slow = [text for text, state in states(doctor.examine(out), "model").items() if state == "slow"]
    assert any(said in text and "single tokens" in text for text in slow), slow


def test_a_directory_that_is_not_converted(tmp_path: Path) -> None:
    done = CliRunner().invoke(app.main, ["doctor", str(tmp_path)])
    assert done.exit_code == 1 and "kvrewrite.json" in done.output
