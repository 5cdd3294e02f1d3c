"""`python -m build` makes a wheel that has everything: every module, the small model, and nothing of the tests."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.thorough
def test_wheel(tmp_path: Path) -> None:
    pytest.importorskip("build", reason="needs build")
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert list((tmp_path / "dist").glob("*.tar.gz"))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "kvrewrite", "kernels", "passes"], cwd=ROOT, capture_output=True, text=True
    )
    wanted = {path if path.startswith("kvrewrite/") else f"kvrewrite/{path}" for path in listed.stdout.split()}
    wanted -= {"kvrewrite/kernels", "kvrewrite/passes"}  # links
    assert not wanted - names
    assert not [name for name in names if name.startswith("tests")]


def test_citation_names_this_version() -> None:
    import kvrewrite

    assert f"version: {kvrewrite.__version__}\n" in (ROOT / "CITATION.cff").read_text()
