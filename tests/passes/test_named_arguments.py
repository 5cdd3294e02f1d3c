"""Passes address the arguments of kvrewrite's ops by name (`arg`, `named_args`, `op_args`, `set_args` of kvrewrite/ir/fx.py).

An index that is wrong after an op has got another argument is a wrong result in silence; a wrong name is an error.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import fx

import kvrewrite.ops  # noqa: F401  (registers the ops)
from kvrewrite.ir.fx import arg, named_args, op_args, set_args

PASSES = Path(__file__).resolve().parents[2] / "passes"
FILES = sorted(PASSES.rglob("*.py"))
ops = torch.ops.kvrewrite


def ours(node: ast.AST) -> bool:
    """Whether an expression names an op of kvrewrite's: `ops.x.default`, `torch.ops.kvrewrite.x`, `SOURCE`."""
    text = ast.unparse(node)
    return "SOURCE" in text.replace("SOURCES", "") or any(
        part.startswith(("ops.", "torch.ops.kvrewrite")) for part in text.replace("(", " ").replace(",", " ").split()
    )


def recognized(function: ast.AST) -> set[str]:
    """Expressions that a function takes for calls of kvrewrite's ops: `is_op(x, ops...)`, `x.target is ops...`,
    `for x in calls(gm, ops...)`, `x = calls(gm, ops...)`."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "is_op" and any(map(ours, node.args[1:])):
            found.add(ast.unparse(node.args[0]))
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == "target":
            if any(map(ours, node.comparators)):
                found.add(ast.unparse(node.left.value))
        elif isinstance(node, ast.For | ast.comprehension) and "calls(" in ast.unparse(node.iter) and ours(node.iter):
            found.add(ast.unparse(node.target))
    return found


def by_number(source: str) -> Iterator[tuple[int, str]]:
    """Lines that read or change arguments of kvrewrite's ops by their place.

    Not seen: nodes that come under another name than the one they were recognized by (parameters of a function, users, what is
    kept in a dict or a list), and arguments of calls that are built by place.
    """
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = recognized(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and node.attr == "args" and ast.unparse(node.value) in names:
                yield node.lineno, ast.unparse(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("update_arg", "insert_arg"):
            yield node.lineno, ast.unparse(node)


def test_the_search_finds_what_it_is_for() -> None:
    source = """
def f(gm):
    for node in calls(gm, ops.cache_update.default):
        node.update_arg(20, None)
        k = node.args[0]
    if is_op(user, ops.observe.default) and user.args[12] is None: pass
    if other.target is SOURCE: q, k, *rest = other.args
    if is_op(user, aten.add.Tensor): fine.args[0]
"""
    assert sorted(line for line, _ in by_number(source)) == [4, 5, 6, 7]


def test_no_argument_by_number() -> None:
    assert len(FILES) >= 20
    assert not [(str(f.relative_to(PASSES)), *found) for f in FILES for found in by_number(f.read_text())]


@pytest.fixture
def node() -> fx.Node:
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    return graph.call_function(ops.attention.default, (q, k, v, None, None, 0.5, 0.0), {"window": 3, "chunk": 0})


def test_names(node: fx.Node) -> None:
    assert arg(node, "k").name == "k" and arg(node, "window") == 3
    names = ["q", "k", "v", "sinks", "alibi", "scale", "softcap", "window", "chunk"]
    assert list(named_args(node)) == names and named_args(node)["scale"] == 0.5
    set_args(node, alibi=arg(node, "q"), chunk=4)
    assert node.args[4].name == "q" and node.args[5:] == (0.5, 0.0, 3, 4) and not node.kwargs  # type: ignore[union-attr]
    with pytest.raises(KeyError):
        arg(node, "hidden")


def test_defaults_follow_the_schema() -> None:
    given = op_args(ops.decode_attention.default, **dict.fromkeys(REQUIRED, 1))
    assert given == (1,) * len(REQUIRED)
    assert op_args(ops.decode_attention.default, **dict.fromkeys(REQUIRED, 1), early=True)[-3:] == (None, None, True)
    with pytest.raises(TypeError, match=r"no parameters \['gate'\], missing arguments \['mass'\]"):
        op_args(ops.decode_attention.default, **dict.fromkeys(REQUIRED[:-1], 1), gate=0)


REQUIRED = [a.name for a in ops.decode_attention.default._schema.arguments if not a.has_default_value()]
