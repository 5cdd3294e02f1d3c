"""The documentation builds as a site, without a warning, where mkdocs is installed (`pip install -e '.[docs]'`)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MKDOCS = shutil.which("mkdocs")


def test_every_page_is_in_the_navigation() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in sorted((ROOT / "docs").rglob("*.md"))]
    assert len(pages) > 20
    assert not [page for page in pages if f": {page}\n" not in settings]


@pytest.mark.skipif(MKDOCS is None, reason="needs mkdocs")
def test_site_builds(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(MKDOCS), "build", "--strict", "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "reference/command_line/index.html").read_text()
    assert "--policy-weights" in commands  # of click
    assert "shares the parameters" in (tmp_path / "reference/api/index.html").read_text()  # of a docstring
