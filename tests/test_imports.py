"""The dependency rules: what importing costs, and which part may import which."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import kvrewrite

pytestmark = pytest.mark.xdist_group("imports")  # whose sources are parsed once
ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    p
    for folder in ("kvrewrite", "passes", "kernels", "tests", "examples")
    for p in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in p.parents)
]


@cache
def nodes(path: Path) -> list[ast.AST]:
    """What the tests here look at, of the whole tree of a file: imports, attributes and constants."""
    kinds = (ast.Import, ast.ImportFrom, ast.Attribute, ast.Constant)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, names imported from packages included."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


# One interpreter for four questions, asked in this order: each one imports more than the one before.
IN_ANOTHER_INTERPRETER = """
import json, sys
sys.path.insert(0, {root!r})
found = {{}}

import kvrewrite
found["heavy"] = [m for m in ("torch", "transformers", "triton", "rich") if m in sys.modules]

import torch
before = set(sys.modules)
import kvrewrite.ops
found["with ops"] = sorted(set(sys.modules) - before)

first = {{name: getattr(kvrewrite, name) for name in kvrewrite.__all__}}
import kvrewrite.passes.pipeline, kvrewrite.api, kvrewrite.kernels.attention.reference
found["top level"] = [m for m in sys.modules if m.split(".")[0] in ("kernels", "passes") and str(getattr(
    sys.modules[m], "__file__", None) or "").startswith(sys.path[0])]
from transformers import LlamaForCausalLM

import importlib, pkgutil, types
again = {{name: getattr(kvrewrite, name) for name in kvrewrite.__all__}}
found["hidden"], found["missing"], found["changed"] = [], [], []
for module in pkgutil.iter_modules(kvrewrite.__path__):
    found["hidden"] += [module.name] * (module.name in first)
    try:
        importlib.import_module(f"kvrewrite.{{module.name}}")
    except ModuleNotFoundError as error:
        found["missing"].append(error.name)
for name, value in first.items():
    same = value is again[name] and value is getattr(kvrewrite, name)
    found["changed"] += [name] * (isinstance(value, types.ModuleType) or not same)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def fresh() -> dict[str, list[str]]:
    """What another interpreter finds, the checkout first on its path."""
    code = IN_ANOTHER_INTERPRETER.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_sources_are_found() -> None:
    folders = {p.relative_to(ROOT).parts[0] for p in SOURCES}
    assert {"kvrewrite", "passes", "kernels", "tests"} <= folders and len(SOURCES) > 40


def test_import_is_light(fresh: dict[str, list[str]]) -> None:
    """`import kvrewrite` takes neither transformers nor triton, nor torch."""
    assert fresh["heavy"] == []


def test_ops_take_neither_transformers_nor_triton(fresh: dict[str, list[str]]) -> None:
    assert "kvrewrite.ops" in fresh["with ops"]
    assert not {"transformers", "triton"} & {name.split(".")[0] for name in fresh["with ops"]}


def test_links_are_not_packages_of_their_own(fresh: dict[str, list[str]]) -> None:
    """Hugging Face has a package `kernels`; a top-level one would shadow it and break transformers."""
    assert fresh["top level"] == []


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_linked_folders(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    link = ROOT / "kvrewrite" / folder
    assert link.is_symlink() and link.resolve() == ROOT / folder


def test_folders_are_named_by_their_path_in_the_package() -> None:
    """`import kernels` would find another copy of the module, or Hugging Face's package."""
    found = [f"{p}: {n}" for p in SOURCES for n in imports(p) if within(n, "kernels", "passes")]
    assert not found, "import kvrewrite.kernels and kvrewrite.passes"


def test_packages_that_folders_do_without() -> None:
    for path in SOURCES:
        folder = path.relative_to(ROOT).parts[0]
        others = {n.split(".")[0] for n in imports(path)} - {"kvrewrite"} - set(sys.stdlib_module_names)
        if folder == "kernels":
            assert others <= {"torch", "triton"}, path
        if folder == "passes":
            assert not others & {"transformers", "triton"}, path
        if folder in ("kvrewrite", "passes", "kernels", "examples"):
            assert not others & {"tests", "pytest"}, path


# ------------------------------------------------------------------------------------------------------ the layer table
# From low to high. A module imports from its own room and from rows that stand before its own, be it inside a function or
# for types only. Rooms of one row do not import each other, so there are no cycles between rooms. A row may name a
# folder or a module of a room; the longest name counts.
LAYERS = (
    ("errors", "assets"),
    ("kernels",),
    ("ops",),  # torch ops over kernels, with the way to a kernel
    ("ir",),  # graphs call ops, and their checks know them
    ("capture",),
    ("policies",),
    ("cache",),
    ("analysis",),  # before artifact: a model directory has a model card
    ("artifact", "passes.canonical"),  # a directory's program is checked against its policy and its cache's pages
    ("passes.insert",),
    ("passes.lower", "passes.shard"),
    ("passes",),
    ("runtime",),
    ("compiler", "vision"),  # passes, then the proof of the whole, which runs the program
    ("api", "serving"),
    ("dynamo", "verification", "vllm"),
    ("", "backend", "exporting"),  # the public names: `kvrewrite` itself and two faces
    ("tools",),  # modules that all tools share
    ("tools.evaluation",),
    ("tools.benchmark", "tools.inspection", "tools.training", "tools.demo"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, row in enumerate(LAYERS) for room in row}


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `kvrewrite`; "" is the package itself."""
    found = {}
    for path in SOURCES:
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[0] not in ("kvrewrite", "passes", "kernels"):
            continue
        parts = parts[1:] if parts[0] == "kvrewrite" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    """The name in the layer table that a module belongs to."""
    parts = module.split(".")
    return next(name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in FLOOR)


@cache
def arrows() -> dict[str, set[str]]:
    """Which of our modules each module imports. Names in strings, for importlib, count; "" is the package as a whole."""
    known, found = modules(), {}
    for module, path in known.items():
        names = {*imports(path)}
        names |= {n.value for n in nodes(path) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        ours = {n.removeprefix("kvrewrite.") for n in names if n.startswith("kvrewrite.")}
        # `from kvrewrite import convert` takes it from where it is; `__version__` is the package's own.
        ours = {kvrewrite._WHERE.get(n, n).removeprefix("kvrewrite.") for n in ours}
        if any(isinstance(n, ast.Import) and any(a.name == "kvrewrite" for a in n.names) for n in nodes(path)):
            ours.add("")
        found[module] = (ours & known.keys()) - {module}
    return found


def test_every_module_has_a_layer() -> None:
    assert not [m for m in modules() if m and m.split(".")[0] not in {room.split(".")[0] for room in FLOOR}]


def test_modules_import_from_lower_layers() -> None:
    wrong = []
    for module, imported in arrows().items():
        here = room_of(module)
        wrong += [(module, m) for m in imported if (there := room_of(m)) != here and FLOOR[there] >= FLOOR[here]]
    assert not wrong, "imports of a higher layer, or of a room beside"


def test_no_module_reaches_a_higher_layer() -> None:
    """Through any chain of imports."""
    direct = arrows()
    for module in direct:
        came_from, todo = {module: ""}, [module]
        while todo:
            at = todo.pop()
            found = direct[at] - came_from.keys()
            came_from |= dict.fromkeys(found, at)
            todo += found
        highest = max(came_from, key=lambda m: FLOOR[room_of(m)])
        chain = [highest]
        while chain[-1] != module:
            chain.append(came_from[chain[-1]])
        assert FLOOR[room_of(highest)] <= FLOOR[room_of(module)], " <- ".join(chain)


def test_private_names_stay_in_their_folder() -> None:
    known, wrong = modules(), []
    for path in known.values():
        aliases: dict[str, Path] = {}
        used: list[tuple[Path, str]] = []
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and within(str(node.module), "kvrewrite"):
                source = str(node.module).removeprefix("kvrewrite").removeprefix(".")
                for alias in node.names:
                    whole = f"{source}.{alias.name}".removeprefix(".")
                    if whole in known:
                        aliases[alias.asname or alias.name] = known[whole]
                    else:
                        used.append((known[source], alias.name))
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                used.append((aliases[node.value.id], node.attr))
        for source_path, name in used:
            if is_private(name) and folder_of(source_path) != folder_of(path):
                wrong.append(f"{path}: {name} of {source_path}")
    assert not wrong, wrong


def folder_of(path: Path) -> Path:
    """Its folder; a module that lies in no folder of the package stands for itself."""
    return path if path.parent in (ROOT / "kvrewrite", ROOT / "passes", ROOT / "kernels") else path.parent


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_public_names_are_the_same_at_every_access(fresh: dict[str, list[str]]) -> None:
    """A submodule of the same name would take a function's place once it is imported."""
    assert fresh["hidden"] == [] and fresh["changed"] == []
    assert not [name for name in fresh["missing"] if name.startswith("kvrewrite")]  # only what an extra would install
