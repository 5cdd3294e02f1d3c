"""The memory plan against what a cache really leases."""

from __future__ import annotations

import pytest
import torch

from kvrewrite.analysis import memory
from kvrewrite.analysis.memory import MemoryPlan, plan_memory
from kvrewrite.analysis.model_card import model_card
from kvrewrite.cache.memory import human
from kvrewrite.cache.pages import PAGE, SLOT_EXTRA
from kvrewrite.tools.tables import memory_table
from tests.support.rewritten import original, rewritten


def test_constants_are_the_caches():
    assert (memory.PAGE, memory.SLOT_EXTRA) == (PAGE, SLOT_EXTRA)


@pytest.mark.parametrize(
    ("family", "policy", "options"),
    [
        ("llama", "streaming_llm", {"budget": 70, "chunk": 30}),
        ("llama", "full", {"chunk": 64}),
        ("gemma2", "h2o", {"budget": 80}),
        ("gemma3n_text", "streaming_llm", {"budget": 64, "chunk": 64, "positions": "original"}),
        ("deepseek_v3", "streaming_llm", {"budget": 64, "chunk": 16, "positions": "original"}),
    ],
)
def test_plan_is_what_is_leased(family, policy, options):
    small = rewritten(family, policy, **options)
    for length in (20, 150):
        cache = small.new_cache(2)
        small(torch.randint(0, 97, (2, length)), past_key_values=cache)
        plan = plan_memory(small.sites, small.policy, small.dtype.itemsize, length, batch=2)
        assert plan.evicted == cache.memory().leased
        assert plan.full == cache.memory().full
        assert cache.memory().live <= cache.memory().leased <= cache.memory().reserved
        assert plan.peak >= plan.evicted


def test_full_is_an_ordinary_cache():
    ids = torch.randint(0, 97, (2, 100))
    cache = original("llama")(ids, use_cache=True).past_key_values
    measured = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    small = rewritten("llama", "streaming_llm", budget=16)
    assert plan_memory(small.sites, small.policy, 4, 100, batch=2).full == measured


def test_report_is_one_line():
    small = rewritten("llama", "streaming_llm", budget=64, chunk=32)
    cache = small.new_cache()
    small(torch.randint(0, 97, (1, 640)), cache=cache)
    memory = cache.memory()
    assert memory.live < memory.full / 5
    assert (
        str(memory)
        == f"{human(memory.live)} live, {human(memory.leased)} leased; a full cache would take {human(memory.full)}"
    )


def test_eviction_bounds_the_plan():
    small = rewritten("llama", "streaming_llm", budget=64, chunk=32)
    plans = [plan_memory(small.sites, small.policy, 4, n) for n in (64, 1000, 100000)]
    assert len({p.evicted for p in plans}) == 1
    assert plans[2].full == 100 * plans[1].full


def test_what_is_carried_is_said():
    """In the table of the command line and on the model card; models without such layers say nothing of it."""
    program = rewritten("llama", "streaming_llm", budget=16).program
    for carried, said in ((3 << 20, True), (0, False)):
        plans = [MemoryPlan(4096, 1, 9 << 20, 5 << 20, 6 << 20, carried)]
        assert ("3.0 MiB" in str(memory_table(plans).caption)) == said
        assert ("3.0 MiB are what layers without attention carry" in model_card(program, "x", plans)) == said


def test_human():
    assert [human(n) for n in (0, 1023, 1536, 3 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
        "5120.0 GiB",
    ]
