"""Blocks of parameters: the same numbers as of the whole, and nothing else is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvrewrite.artifact.checkpoint import Block, Checkpoint, Reader
from kvrewrite.artifact.recipes import cut_recipe, load_parameters

TENSORS = {name: torch.randn(8, 12, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abcd")}
KEY: dict[str, Any] = {"key": "a"}
TRANSPOSED: dict[str, Any] = {"transpose": KEY, "dims": [0, 1]}
RECIPES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "key": (KEY, [8, 12]),
    "transposed": (TRANSPOSED, [12, 8]),
    "experts": ({"stack": [{"key": k} for k in "abcd"], "dim": 0}, [4, 8, 12]),
    "experts, transposed": (
        {"stack": [{"transpose": {"key": k}, "dims": [0, 1]} for k in "abcd"], "dim": 0},
        [4, 12, 8],
    ),
    "side by side": ({"cat": [{"key": "a"}, {"key": "b"}], "dim": 1}, [8, 24]),
    "another shape": ({"reshape": KEY, "shape": [2, 4, 12]}, [2, 4, 12]),
    "a part": ({"narrow": KEY, "dim": 0, "start": 2, "length": 4}, [4, 12]),
}
READ_WHOLE = ("another shape", 0), ("another shape", 1), ("another shape", 2), ("side by side", 1), ("a part", 1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    return Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_blocks(name: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, shape = RECIPES[name]
    recipe = {**recipe, "shape": shape, "dtype": "float32"}
    (whole,) = load_parameters(checkpoint, {"w": recipe}).values()
    assert list(whole.shape) == shape
    read = []
    original = Reader.__call__

    def counting(self: Reader, key: str, block: Block | None = None) -> torch.Tensor:
        found = original(self, key, block)
        read.append(found.numel())
        return found

    monkeypatch.setattr(Reader, "__call__", counting)
    for dim, size in enumerate(shape):
        half = size // 2
        for blocks in ([Block(dim, half, size - half)], [Block(dim, 0, size // 4), Block(dim, half, size // 4)]):
            read.clear()
            blocks = [b for b in blocks if b.length]
            if not blocks:
                continue
            (part,) = load_parameters(checkpoint, {"w": cut_recipe(recipe, blocks, tuple(shape))}).values()
            assert torch.equal(part, torch.cat([whole.narrow(*b) for b in blocks], dim))
            assert sum(read) == part.numel() or (name, dim) in READ_WHOLE
