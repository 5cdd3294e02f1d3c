"""The search for patterns: heads that were made to need one kind get it, within the work that they may take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import kvrewrite
from kvrewrite.artifact.head_patterns import read_patterns
from kvrewrite.cli.app import main
from kvrewrite.errors import InputError, OptionError
from kvrewrite.kernels.attention.patterns import HeadPattern
from kvrewrite.kernels.groups import Logits, Tokens
from kvrewrite.tools.pattern_search import _Site, read_ids, search_patterns
from tests.support import rewritten
from tests.support.tiny import make_checkpoint
from tests.support.zoo import VOCAB

T = 700


def window_head(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The logit of query i on key j falls with (i - j) ** 2."""
    at = torch.arange(T) / 10.0
    q, k = torch.zeros(T, 16), torch.zeros(T, 16)
    q[:, 0], q[:, 1], k[:, 0], k[:, 1] = at, 1.0, 2 * at, -at.square()
    return q, k


def column_head(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """All queries attend to the same twenty keys."""
    k = torch.randn(T, 16, generator=g) * 0.01
    k[torch.randperm(T, generator=g)[:20], 0] = 12.0
    q = torch.zeros(T, 16)
    q[:, 0] = 1.0
    return q, k


def block_head(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each block of queries attends to one earlier block of keys, all of which point in directions of their own."""
    ways = torch.nn.functional.normalize(torch.randn(12, 16, generator=g), dim=1)
    k = ways.repeat_interleave(64, 0)[:T] + torch.randn(T, 16, generator=g) * 0.02
    target = torch.tensor([0, 1, 0, 5, 2, 8])
    return ways[target].repeat_interleave(128, 0)[:T] * 25, k


HEADS = {"a_shape": window_head, "vertical_slash": column_head, "block_sparse": block_head}


def test_heads_get_the_pattern_that_they_need() -> None:
    g = torch.Generator().manual_seed(2)
    made = [make(g) for make in HEADS.values()]
    q, k = (torch.stack([head[i] for head in made])[None] for i in range(2))
    site = _Site(Tokens(q, k, torch.randn(1, 3, T, 8, generator=g)), Logits(scale=1.0))
    patterns, errors, shares = site.search(0.45)
    assert max(errors) < 0.02, (patterns, errors)
    # A window is among the diagonals and the nearest blocks, too.
    assert errors[0] < 1e-3 and [p.kind for p in patterns[1:]] == list(HEADS)[1:]
    assert min(shares) > 0.1 and max(shares) <= 0.45
    off = (site.attend(site.visible(patterns)) - site.exact).double().square().sum((0, 2, 3)).sqrt()
    assert errors == pytest.approx((off / site.exact.double().square().sum((0, 2, 3)).sqrt()).tolist(), abs=1e-6)
    wrong = site.attend(site.visible([HeadPattern("a_shape", 64, 200)] * 3))
    assert (wrong - site.exact)[0, 1:].norm() > 0.2 * site.exact[0, 1:].norm()


def test_of_a_model() -> None:
    """Patterns for all sites with a causal mask; the model takes them."""
    ids = torch.randint(VOCAB, (1, 200), generator=torch.Generator().manual_seed(0))
    found = search_patterns(rewritten.original("gemma3_text"), ids, 0.7)
    assert sorted(found.patterns) == sorted(found.errors) == [1, 3]  # the others have a window
    assert all(len(heads) == 4 for heads in found.patterns.values())
    made = kvrewrite.transform(rewritten.original("gemma3_text"), "full", prefill=found.patterns, check="off")
    assert torch.isfinite(made(ids).logits).all()


def test_wrong_texts(tmp_path: Path) -> None:
    ids = torch.zeros(1, 64, dtype=torch.long)
    with pytest.raises(InputError, match="expected rows of more than 64 tokens"):
        search_patterns(rewritten.original("llama"), ids)
    with pytest.raises(OptionError, match=r"share is 1\.5"):
        search_patterns(rewritten.original("llama"), ids, 1.5)
    with pytest.raises(OptionError, match=r"none\.txt can't be read"):
        read_ids(None, [tmp_path / "none.txt"], 100)


def test_the_command(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    rows = [{"context": "the cat sat on the mat " * 20, "turns": [["where?", "there " * 40]]}, {"text": "a b c " * 40}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ["search-patterns", str(base), "-d", str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "patterns.json")]
    done = CliRunner().invoke(main, [*args, "--tokens", "150", "--share", "0.9", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tokens"] == 150 and json.loads(done.stdout)["share"] <= 1
    patterns = read_patterns(tmp_path / "patterns.json")
    assert len(patterns) >= 1 and all(patterns.values())
    again = CliRunner().invoke(main, args)
    assert again.exit_code == 1 and "exists; choose another name" in again.stderr
    given = ["--prefill", "minference", "--patterns", str(tmp_path / "patterns.json"), "--check", "off"]
    made = CliRunner().invoke(
        main, ["convert", str(base), "-p", "full", "--out", str(tmp_path / "out"), *given, "--json"]
    )
    assert made.exit_code == 0, made.output
    assert any("sparse_prefill" in site["inserted"] for site in json.loads(made.stdout)["sites"])
    wrong = CliRunner().invoke(main, ["convert", str(base), "--dry-run", "--patterns", str(tmp_path / "patterns.json")])
    assert wrong.exit_code == 2 and "--patterns needs --prefill" in wrong.stderr
