"""The dependency rules: what importing costs, and which part may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    p
    for folder in ("kvrewrite", "passes", "kernels", "tests", "examples")
    for p in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in p.parents)
]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, names imported from packages included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def run(code: str) -> str:
    """What a fresh interpreter prints, the checkout first on its path."""
    lines = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_sources_are_found() -> None:
    folders = {p.relative_to(ROOT).parts[0] for p in SOURCES}
    assert {"kvrewrite", "passes", "kernels", "tests"} <= folders and len(SOURCES) > 40


def test_import_is_light() -> None:
    """`import kvrewrite` takes neither transformers nor triton, nor torch."""
    code = (
        "import kvrewrite; print(*sorted(m for m in ('torch', 'transformers', 'triton', 'rich') if m in sys.modules))"
    )
    assert run(code) == ""


def test_ops_take_neither_transformers_nor_triton() -> None:
    code = "import torch; before = set(sys.modules); import kvrewrite.ops; print(*set(sys.modules) - before)"
    assert not {"transformers", "triton"} & {name.split(".")[0] for name in run(code).split()}


def test_links_are_not_packages_of_their_own() -> None:
    """Hugging Face has a package `kernels`; a top-level one would shadow it and break transformers."""
    code = """
import kvrewrite.ops, kvrewrite.passes.pipeline, kvrewrite.api, kvrewrite.kernels.attention.reference
bad = [m for m in sys.modules if m.split(".")[0] in ("kernels", "passes") and str(getattr(
    sys.modules[m], "__file__", None) or "").startswith(sys.path[0])]
assert not bad, bad
from transformers import LlamaForCausalLM
print("fine")
"""
    assert run(code).endswith("fine")


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_linked_folders(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    link = ROOT / "kvrewrite" / folder
    assert link.is_symlink() and link.resolve() == ROOT / folder


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_who_imports_whom(path: Path) -> None:
    found = list(imports(path))
    assert not [n for n in found if within(n, "kernels", "passes")], "import kvrewrite.kernels and kvrewrite.passes"
    folder = path.relative_to(ROOT).parts[0]
    ours = [n for n in found if within(n, "kvrewrite")]
    others = {n.split(".")[0] for n in found} - {"kvrewrite"} - set(sys.stdlib_module_names)
    if folder == "kernels":
        assert others <= {"torch", "triton"}
        assert all(within(n, "kvrewrite.kernels") for n in ours)
    if folder == "passes":
        forbidden = ("api", "cli", "model", "cache", "artifact", "checkpoint", "conversion", "verification", "train")
        assert not [n for n in ours if within(n, *(f"kvrewrite.{f}" for f in forbidden))]
        assert "transformers" not in others and "triton" not in others
    if folder in ("kvrewrite", "passes", "kernels", "examples"):
        assert "tests" not in others and "pytest" not in others


def test_public_names_are_the_same_at_every_access() -> None:
    """A submodule of the same name would take a function's place once it is imported."""
    code = """
import importlib, pkgutil, types, kvrewrite
first = {name: getattr(kvrewrite, name) for name in kvrewrite.__all__}
again = {name: getattr(kvrewrite, name) for name in kvrewrite.__all__}
for module in pkgutil.iter_modules(kvrewrite.__path__):
    assert module.name not in first, module.name
    try:
        importlib.import_module(f"kvrewrite.{module.name}")
    except ModuleNotFoundError as error:  # what an extra would install
        assert not error.name.startswith("kvrewrite"), error
for name, value in first.items():
    assert not isinstance(value, types.ModuleType), name
    assert value is again[name] and value is getattr(kvrewrite, name), name
print("fine")
"""
    assert run(code).endswith("fine")
