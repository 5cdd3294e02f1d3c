"""Policies whose scores come of `observe` are saved and read: its argument `newest` is a number, other ops' a state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvrewrite
from tests.support.rewritten import rewritten


@pytest.mark.parametrize(("policy", "options"), [("snapkv", {"window": 8}), ("h2o", {})])
def test_saved_and_loaded(policy: str, options: dict[str, int], tmp_path: Path) -> None:
    small = rewritten("llama", policy, budget=16, **options)
    small.save_pretrained(tmp_path / "out")
    ids = torch.randint(0, 97, (1, 40))
    assert torch.equal(kvrewrite.load(tmp_path / "out")(ids).logits, small(ids).logits)
