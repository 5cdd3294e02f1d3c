"""The policy and the budget for a given memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvrewrite
from kvrewrite import policies
from kvrewrite.analysis.choose import MEASURED, MEASURED_FULL, REAL, MemoryGoal, choose
from kvrewrite.analysis.memory import plan_memory
from kvrewrite.errors import OptionError
from kvrewrite.ir.site import AttentionSite
from kvrewrite.policies.default import DEFAULT
from tests.support.tiny import make_checkpoint
from tests.support.zoo import make

REAL_MODELS = Path(__file__).parents[2] / "docs" / "results" / "real_models.md"
MEASURING = Path(__file__).parents[2] / "docs" / "measuring.md"
SITES = [AttentionSite(i, f"layers.{i}", 32, 8, 128, 128, 0.1, "interface") for i in range(32)]
CONTEXT = 131_072


@pytest.mark.parametrize("gib", [0.5, 2, 8])
@pytest.mark.parametrize("batch", [1, 4])
def test_budget_is_the_largest_that_fits(gib: float, batch: int) -> None:
    memory = int(gib * 2**30)
    choice = choose(SITES, 2, MemoryGoal(memory, CONTEXT, batch))
    assert choice.policy.name == DEFAULT
    assert choice.plan.peak <= memory
    budget = choice.policy.budget
    assert isinstance(budget, int)
    more = plan_memory(SITES, policies.make(DEFAULT, budget=budget + 64), 2, CONTEXT, batch)
    assert more.peak > memory
    assert f"{budget:,} slots" in " ".join(choice.why)


def test_full_cache_where_it_fits() -> None:
    choice = choose(SITES, 2, MemoryGoal(20 << 30, CONTEXT))  # 16 GiB of keys and values, and 12 bytes a slot
    assert choice.policy.name == "full"
    assert "nothing is evicted" in choice.why[0]


def test_a_policy_that_was_named_gets_a_budget() -> None:
    choice = choose(SITES, 2, MemoryGoal(20 << 30, CONTEXT), lambda budget: policies.make("snapkv", budget=budget))
    assert choice.policy.name == "snapkv"
    assert not any("right" in sentence for sentence in choice.why)


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(OptionError, match=r"131,072 tokens in 1\.0 MiB: even 64 slots"):
        choose(SITES, 2, MemoryGoal(1 << 20, CONTEXT))


def test_quality_is_that_of_the_page() -> None:
    text = MEASURING.read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| `{DEFAULT}` |"))
    found = [int(cell) for cell in re.findall(r"\d+", row)]
    assert found == [aware for aware, _ in MEASURED.values()] + [blind for _, blind in MEASURED.values()]
    assert f"the full cache has {MEASURED_FULL} " in text


@pytest.mark.parametrize("name", REAL)
def test_quality_of_a_real_model_is_that_of_the_page(name: str) -> None:
    tables = REAL_MODELS.read_text().split("**SmolLM2, quote, ")
    rows = {table.split("*")[0]: table for table in tables[1:]}
    for mode, wanted in zip(("aware", "blind"), REAL[name], strict=True):
        row = next(line for line in rows[mode].splitlines() if line.startswith(f"| `{name}` |"))
        assert float(row.split("|")[-2]) == wanted
    why = choose(SITES, 2, MemoryGoal(8 << 30, CONTEXT)).why
    assert any("SmolLM2" in sentence and f"{REAL[name][0]:.0f}%" in sentence for sentence in why)


@pytest.mark.parametrize(("memory", "said"), [(8 << 30, "at 0.25 of"), (400 << 20, "not measured")])
def test_quality_is_named(memory: int, said: str) -> None:
    assert said in choose(SITES, 2, MemoryGoal(memory, CONTEXT)).why[-1]


def test_convert_chooses(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    whole = kvrewrite.convert(base, None, memory=1 << 30, contexts=[4096], check="off")
    assert whole.choice is not None and whole.program.policy["name"] == "full"
    memory = whole.plans[0].peak // 2
    half = kvrewrite.convert(base, None, memory=memory, contexts=[4096], check="off")
    assert half.choice is not None and half.program.policy["name"] == DEFAULT
    assert half.plans[0].peak <= memory
    assert half.program.policy["options"]["budget"] == half.choice.policy.budget
    named = kvrewrite.convert(base, None, "streaming_llm", memory=memory, contexts=[4096], start=2, check="off")
    assert named.program.policy["options"]["start"] == 2
    assert named.plans[0].peak <= memory


@pytest.mark.parametrize(
    ("options", "said"),
    [({"budget": 64}, "memory and budget"), ({"recent_tokens": 4}, "got recent_tokens, which")],
)
def test_what_does_not_go_together(options: dict[str, int], said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=said):
        kvrewrite.convert(tmp_path, None, memory=1 << 30, **options)


def test_transform_says_what_it_does_without_a_policy() -> None:
    with pytest.warns(UserWarning, match="no policy was named, so keydiff keeps 2048 tokens per head"):
        small = kvrewrite.transform(make("llama"), check="off")
    assert (small.policy.name, small.policy.budget) == (DEFAULT, 2048)
    with pytest.warns(UserWarning, match="keydiff keeps 32 tokens per head"):
        assert kvrewrite.transform(make("llama"), budget=32, check="off").policy.budget == 32
