"""Long argument lists come in groups (kernels/groups.py): how many functions still have more than eight parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 8
ALLOWED = 12  # commands of the CLI, whose parameters are its options, and functions that users call


def kernels(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is compiled by Triton."""
    return any(ast.unparse(d).split("(")[0].endswith("jit") for d in function.decorator_list)


def long_lists() -> Iterator[str]:
    """Functions with more than MOST parameters, but for self and kernels; *args and **kwargs count as one each."""
    for folder in ("kvrewrite", "passes", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder == "kvrewrite" and path.relative_to(ROOT).parts[1] in ("passes", "kernels"):
                continue  # links
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or kernels(node):
                    continue
                given = node.args
                names = [
                    a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a
                ]
                if len(names) - (names[:1] in (["self"], ["cls"])) > MOST:
                    yield f"{path.relative_to(ROOT)}:{node.name}"


def test_few_functions_have_many_parameters() -> None:
    found = list(long_lists())
    assert len(found) <= ALLOWED, found
    assert not [name for name in found if name.startswith("kernels/") or "/ops/" in name], found


def test_the_search_finds_what_there_is() -> None:
    assert "kvrewrite/api.py:convert" in list(long_lists())
