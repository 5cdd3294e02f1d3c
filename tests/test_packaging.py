"""`python -m build` makes an sdist and a wheel that have everything and work outside the checkout; versions agree."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.thorough
def test_sdist_and_wheel_work_outside_the_checkout(tmp_path: Path) -> None:
    try:
        importlib.metadata.version("build")  # a folder of this name may stand beside the tests
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs build")
    source, dist = tmp_path / "source", tmp_path / "dist"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    # Builds the sdist, and the wheel from it: what the sdist lacks, the wheel lacks, too.
    run(sys.executable, "-m", "build", "--outdir", str(dist), str(source))
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "kvrewrite", "kernels", "passes"], cwd=ROOT, capture_output=True, text=True
    )
    wanted = {path if path.startswith("kvrewrite/") else f"kvrewrite/{path}" for path in listed.stdout.split()}
    wanted -= {"kvrewrite/kernels", "kvrewrite/passes"}  # links
    assert not wanted - names
    assert not [name for name in names if name.startswith("tests")]
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "pyproject.toml"} <= packed

    # A fresh environment that sees torch and the rest, but not the checkout.
    fresh, outside = tmp_path / "fresh", tmp_path / "outside"
    outside.mkdir()
    venv.create(fresh, with_pip=True)
    run(str(fresh / "bin" / "pip"), "install", "-q", "--no-deps", str(wheel))
    (folder,) = fresh.glob("lib/python*/site-packages")
    (folder / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(str(fresh / "bin" / "python"), "-c", "import kvrewrite; print(kvrewrite.__file__)", cwd=outside)
    assert Path(where.strip()).is_relative_to(fresh)
    said = run(str(fresh / "bin" / "kvrewrite"), "demo", cwd=outside)
    assert "proved by running it beside the original" in said and "saved: 80" in said
    assert max(map(len, said.splitlines())) <= 100


def run(*command: str, cwd: Path | None = None) -> str:
    """What a command prints, without the checkout on its path."""
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_citation_names_this_version() -> None:
    import kvrewrite

    assert f"version: {kvrewrite.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_changelog_has_this_version() -> None:
    import kvrewrite

    headings = re.findall(r"(?m)^## (.*)", (ROOT / "CHANGELOG.md").read_text())
    assert headings[0].split()[0] == kvrewrite.__version__, headings
