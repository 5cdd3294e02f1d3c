"""The pages in README.md, CONTRIBUTING.md and docs/ name files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from kvrewrite.cli import app
from tests.support.policy_tables import BLOCKS, written
from tests.support.rewritten import ours

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "kvrewrite|passes|kernels|tests|examples|benchmarks|docs"


def named(text: str) -> set[str]:
    """Paths of this repository that a text mentions, without those with a placeholder in them."""
    found = re.findall(rf"(?<![\w/.~-])((?:{FOLDERS})/[\w./*<>-]*)", text)
    return {path.rstrip(".") for path in found if not set("<>") & set(path)}


def test_pages_are_found() -> None:
    assert len(PAGES) > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_exist(page: Path) -> None:
    missing = [
        p for p in sorted(named(page.read_text())) if not (list(ROOT.glob(p)) if "*" in p else (ROOT / p).exists())
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_exist(page: Path) -> None:
    """`python -m a.b` names a module of this repository or an installed one."""
    modules = re.findall(r"python3? -m ((?:kvrewrite|tests|benchmarks)[\w.]*)", page.read_text())
    missing = []
    for module in modules:
        path = ROOT / module.rstrip(".").replace(".", "/")
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            missing.append(module)
    assert not missing


def test_tables_of_policies_are_the_registry() -> None:
    """Otherwise: python -m tests.support.policy_tables"""
    assert all(written(page) == page.read_text() for page in BLOCKS)
    assert all(p.evicts_when and p.summary and p.source for p in ours())


def test_what_is_missing_would_be_found() -> None:
    assert named("see `kvrewrite/nothing.py` and passes/lower/decode.py.") == {
        "kvrewrite/nothing.py",
        "passes/lower/decode.py",
    }


def test_commands_and_options_in_the_docs_exist() -> None:
    """Every `kvrewrite COMMAND --option` in a page is one that the command line takes."""
    found = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text().replace("\\\n", " ")
        blocks = re.findall(r"(?m)^ *(?:[A-Z_]+=\S+ )*kvrewrite ([a-z-]+) ?(.*)$", text)
        for name, rest in [*blocks, *re.findall(r"`kvrewrite ([a-z-]+) ?([^`\n]*)`", text)]:
            if name == "is":  # "kvrewrite is a compiler"
                continue
            command = app.main.get_command(click.Context(app.main), name)
            assert command is not None, f"{page}: kvrewrite {name}"
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            words = [word.partition("=")[0] for word in rest.partition(" #")[0].split() if re.match(r"--?[a-z]", word)]
            assert set(words) <= known, f"{page}: kvrewrite {name} {rest}"
            found += 1
    assert found > 100
