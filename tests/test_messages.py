"""What users read is plain: errors, warnings, helps and docstrings say "per row", "before" and "after"; errors go on to say
what was expected or what to do."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

import kvrewrite
from kvrewrite.cli import app

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [p for folder in ("kvrewrite", "passes", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]
UNIT = r"\b(slots|tokens|bytes|numbers?|logits?|entry|entries|objects?) a (head|row|layer|token|line|step)\b"
HALTING = re.compile(rf"\bin front of\b|\bbehind\b|{UNIT}")
SAYS_WHAT_TO_DO = re.compile(
    r"expected|give|use |leave|choose|call|load|convert|install|copy|replace|pass|take |make|train|set|try|give|there are|"
    r"measure|needs?|run|merge|put|add|free|name|begin|upgrade|delete|say|export|prefill|reads|save|shard|transform|--|\(",
    re.IGNORECASE,
)


@cache
def errors() -> list[tuple[str, str, str]]:
    """Place, class and text of each error that names its class and text; what is computed is "{}"."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and call.args and (text := written(call.args[0])):
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(call.func), text))
    return found


def written(node: ast.AST) -> str:
    """The text of a string, or of parts that are put together."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) or "{}" for part in node.values)
    return written(node.left) + written(node.right) if isinstance(node, ast.BinOp) else ""


def commands() -> Iterator[tuple[str, str]]:
    """Name and whole help of each command."""
    for name, command in app.main.commands.items():
        yield name, command.get_help(click.Context(command))


def public() -> list[tuple[str, str]]:
    """Public functions and classes of the package, and methods of these, with their docstrings."""
    found = []
    for name in kvrewrite.__all__:
        thing = getattr(kvrewrite, name)
        if isinstance(thing, str):
            continue
        found.append((name, thing))
        if inspect.isclass(thing):
            members = inspect.getmembers(thing, lambda m: inspect.isfunction(m) or isinstance(m, property))
            ours = [(n, m) for n, m in members if not n.startswith("_")]
            found += [
                (f"{name}.{n}", m) for n, m in ours if (getattr(m, "__module__", None) or "").startswith("kvrewrite")
            ]
    return [(name, inspect.getdoc(thing) or "") for name, thing in found]


def test_errors_are_found() -> None:
    assert len(errors()) > 400


def test_errors_are_plain() -> None:
    assert not [(place, text) for place, _, text in errors() if HALTING.search(text)]


@pytest.mark.parametrize("name", ["OptionError", "ArtifactError", "InputError", "CacheError", "PolicyWeightsError"])
def test_errors_say_what_to_do(name: str) -> None:
    """Those that a caller can mend. Only short ones are looked at, as a long one may name it in another word, and only
    those that do not end with a text that is computed."""
    ours = [(place, text) for place, cls, text in errors() if cls == name and not place.startswith("kvrewrite/ir/")]
    assert len(ours) > 10
    assert not [
        (place, text)
        for place, text in ours
        if len(text) < 90 and not text.strip().endswith("{}") and not SAYS_WHAT_TO_DO.search(text)
    ]


def test_helps_are_plain() -> None:
    assert not [name for name, text in commands() if HALTING.search(text)]


@pytest.mark.parametrize(("name", "text"), public(), ids=[name for name, _ in public()])
def test_public_docstrings(name: str, text: str) -> None:
    assert text.strip(), f"{name} has no docstring"
    assert not HALTING.search(text), name


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]), ids=lambda p: p.name)
def test_pages_are_plain(page: Path) -> None:
    found = [line for line in page.read_text().splitlines() if re.search(rf"\bin front of\b|{UNIT}", line)]
    assert not found
