"""The page docs/develop/add_a_policy.md: its policy works as it is printed; code that can't be traced is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import kvrewrite
from kvrewrite.errors import OptionError
from kvrewrite.passes.insert import policy as policy_writer
from kvrewrite.policies import POLICIES, Policy, Scores
from tests.support.rewritten import captured, original
from tests.support.rewritten import rewrite as rewrite_with
from tests.support.zoo import make

ROOT = Path(__file__).parents[2]


@pytest.fixture
def page() -> Iterator[dict[str, Any]]:
    """The names of the page's first block."""
    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs/develop/add_a_policy.md").read_text(), re.DOTALL)[0]
    names: dict[str, Any] = {"__name__": "builtins"}
    try:
        exec(compile(block, "add_a_policy.md", "exec", dont_inherit=True), names)
        yield names
    finally:
        POLICIES.pop("keys_and_attention", None)


def test_policy_of_the_page(page: dict[str, Any], tmp_path: Path) -> None:
    """transform, chunks, decoding, saved and loaded; padded rows keep what they keep alone."""
    model = make("llama")
    small = kvrewrite.transform(model, policy="keys_and_attention", budget=24, chunk=16)
    ids = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    cache = small.new_cache(2)
    small(ids, attention_mask=mask, past_key_values=cache)
    alone = small.new_cache(1)
    small(ids[1:, 11:], past_key_values=alone)
    kept = cache.positions()
    assert [layer[1] for layer in kept.values()] == [layer[0] for layer in alone.positions().values()]
    assert all(len(head) == 24 for layer in kept.values() for row in layer for head in row)
    assert kept[0][0][0][-8:] == list(range(52, 60))
    token = torch.full((2, 1), 5)
    logits = small(
        token, attention_mask=torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1), past_key_values=cache
    )
    small.save_pretrained(tmp_path / "out")
    loaded = kvrewrite.load(tmp_path / "out")
    again = loaded.new_cache(2)
    loaded(ids, attention_mask=mask, past_key_values=again)
    assert again.positions() == kept
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    torch.testing.assert_close(loaded(token, attention_mask=mask, past_key_values=again).logits, logits.logits)


def test_policy_of_the_page_in_torch_compile(page: dict[str, Any]) -> None:
    from transformers import DynamicCache

    model, ids = original("shallow_llama"), torch.randint(0, 97, (1, 50), generator=torch.Generator().manual_seed(0))
    options = {"policy": "keys_and_attention", "budget": 24, "inductor": False}
    compiled = torch.compile(model, backend="kvrewrite", options=options)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = compiled(ids, past_key_values=cache, use_cache=True)
    small = rewrite_with(model, captured("shallow_llama"), "keys_and_attention", None, budget=24)
    torch.testing.assert_close(out.logits[:, -1:], small(ids).logits[:, -1:], atol=1e-4, rtol=1e-4)


def _bad(score: Callable[[Any, Any], Any]) -> Policy:
    @dataclass(frozen=True, kw_only=True)
    class Bad(Policy):
        name = "bad"
        summary = source = "-"
        budget: int | None = 9

    Bad.score = score  # type: ignore[method-assign]
    return Bad()


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "branch on a size": (
        lambda p, s: s.position_scores() * (2.0 if s.k.shape[2] == 1 else 1.0),
        "how many rows, tokens",
    ),
    "branch on a number": (
        lambda p, s: s.position_scores() * (2.0 if s.positions.sum() > 3 else 1.0),
        "numbers in a tensor",
    ),
    "random": (
        lambda p, s: torch.rand_like(s.position_scores()),
        "rand_like.* draws random numbers.* site.ops.uniform",
    ),
    "query heads": (lambda p, s: s.q.float().norm(dim=-1), "new of its scores has 4 heads, expected one per kv head"),
    "constants": (lambda p, s: s.position_scores() * torch.tensor([2.0]), "constants"),
    "dtype": (lambda p, s: s.positions, "expected a tensor"),
    "nothing": (lambda p, s: Scores(None), "expected a tensor"),
    "not there": (lambda p, s: s.position_scores() * s.logits.sum(), "no logits"),
}


def test_what_does_the_same_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kvrewrite's own policies, also in further rewrites. Other policies' code may ask what only tracing finds out, though it
    does what other code did that asked nothing."""
    counts, names, trace = [], [], policy_writer.trace
    monkeypatch.setattr(policy_writer, "trace", lambda *given: (names.append(given[-1]), trace(*given))[1])
    monkeypatch.setattr(policy_writer, "_TRACED", {})
    for budget, kernel in ((20, 3), (30, 3), (30, 5)):
        rewrite_with(original("llama"), captured("llama"), "snapkv", None, budget=budget, window=4, kernel=kernel)
        counts.append(len(names))
    assert counts == [1, 1, 2]
    score, message = REFUSED["branch on a size"]
    good = _bad(lambda p, s: s.position_scores() * 1.0)
    monkeypatch.setitem(POLICIES, "bad", type(good))
    rewrite_with(original("llama"), captured("llama"), good, None)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=message):
        rewrite_with(original("llama"), captured("llama"), _bad(score), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    score, message = REFUSED[case]
    with pytest.raises((OptionError, kvrewrite.errors.UnsupportedModelError), match=message):
        rewrite_with(original("llama"), captured("llama"), _bad(score), None)  # type: ignore[arg-type]
