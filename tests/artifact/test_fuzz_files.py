"""Hostile graph.json and kvrewrite.json: loading and the first forward work or raise ArtifactError, whatever is in the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fuzz_files import run
from tests.support.tiny import make_checkpoint

CHUNK = 500


@pytest.mark.parametrize("mutations", [25, pytest.param(200, marks=pytest.mark.thorough)])
def test_mutated_files_load_or_raise_artifact_errors(tmp_path: Path, mutations: int) -> None:
    # The small model's conversion takes longer than as many mutations.
    base = make_checkpoint(tmp_path / "base") if mutations < 100 else None
    counts, failures = run(range(mutations), tmp_path, base)
    assert not failures, "\n".join(failures)
    # Otherwise the mutations would not be any.
    assert counts["refused"] > mutations / 2 and counts["the same logits"] > mutations * 3 / 200, counts


@pytest.mark.thorough
@pytest.mark.parametrize("first", range(0, 10_000, CHUNK))
def test_ten_thousand_mutations(tmp_path: Path, first: int) -> None:
    counts, failures = run(range(first, first + CHUNK), tmp_path)
    print(dict(counts))
    assert not failures, "\n".join(failures)
