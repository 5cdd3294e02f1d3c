"""The passes know no models: what they do follows from the graph alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvrewrite

# First words of model types that are also words of the field: data2vec, flex_olmo, prompt_depth_anything, seed_oss, ...
WORDS = {"data", "embedding", "fast", "flex", "mask", "prompt", "recurrent", "seed", "step", "table", "time"}
PASSES = sorted((Path(kvrewrite.__file__).parent.parent / "passes").rglob("*.py"))


def names() -> set[str]:
    """Every model type of the installed transformers, and their first words without the number of the version."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    found = set(CONFIG_MAPPING_NAMES)
    found |= {re.split(r"[-_.\d]", name)[0] for name in found}
    return {name.lower() for name in found if len(name) > 3} - WORDS


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Every word of the code with its line: identifiers, attributes, arguments and strings, without docstrings."""
    tree = ast.parse(path.read_text())
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        texts = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
        if isinstance(node, ast.Constant) and id(node) not in docs:
            texts.append(node.value)
        for text in texts:
            if isinstance(text, str):
                yield from ((node.lineno, w) for w in re.findall(r"[a-z][a-z0-9_\-.]+", text.lower()))


def test_passes_are_found() -> None:
    assert len(PASSES) > 20


@pytest.mark.parametrize("path", PASSES, ids=lambda p: p.name)
def test_no_model_names(path: Path) -> None:
    """No identifier and no string of a pass is a model type, nor has one as a part."""
    known = names()
    found = [
        (line, word)
        for line, word in words(path)
        if word in known or any(part in known for part in re.split(r"[_.\-]", word))
    ]
    assert not found


@pytest.mark.parametrize("attribute", ["model_type", "architectures"])
def test_no_questions_about_the_kind_of_model(attribute: str) -> None:
    """Passes don't ask what kind of model they are given."""
    assert [p.name for p in PASSES if any(w == attribute for _, w in words(p))] == []


def test_a_name_would_be_found(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text('def f(config):\n    """llama"""\n    return config.kind == "qwen3_moe"\n')
    assert {w for _, w in words(bad)} & names() == {"qwen3_moe"}
