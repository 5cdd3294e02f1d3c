"""torch.compile and torch.export of rewritten graphs: the mutations of caches survive, shapes stay dynamic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvrewrite.cache.pages import PAGE
from tests.support.rewritten import captured, original, rewrite, rewritten

pytestmark = pytest.mark.xdist_group("llama")
POLICIES: dict[str, dict[str, Any]] = {
    "streaming_llm": {"budget": 70, "chunk": 7},
    "h2o": {"budget": 70, "chunk": 40},
}
# Inductor takes long; Dynamo, which is before it, is in test_compiles_a_few_times_only, too.
CASES: list[Any] = [
    pytest.param("streaming_llm", {"backend": "aot_eager", "fullgraph": True}, marks=pytest.mark.thorough),
    pytest.param("streaming_llm", {"fullgraph": True}, marks=pytest.mark.thorough),
    ("h2o", {}),
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(96, generator=generator)[:length] + 1 for _ in range(rows)])


def same_state(a: Any, b: Any) -> None:
    """Every live slot of two caches, and what is leased."""
    assert a.positions() == b.positions() and a.memory() == b.memory()
    for ours, theirs in zip(a.leases, b.leases):
        assert torch.equal(ours.lens, theirs.lens) and torch.equal(ours.table, theirs.table)
        live = torch.arange(ours.table.shape[-1] * PAGE) < ours.lens[..., None]
        for name in ("k_pages", "v_pages", "score_pages"):
            x, y = (getattr(p.store, name)[p.table.long()].flatten(3, 4)[live] for p in (ours, theirs))
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("policy", "mode"), CASES)
def test_compiled_is_eager(policy: str, mode: dict[str, Any]) -> None:
    """Prefill in chunks and decoding, across a border of pages, with eviction, for two batch sizes and with padding."""
    family = "llama" if mode.get("fullgraph") else "shallow_llama"  # with Inductor each layer takes seconds
    eager = rewritten(family, policy, **POLICIES[policy])
    compiled = rewrite(original(family), captured(family), policy, None, **POLICIES[policy])
    compiled.compile(**mode)
    for batch in (2, 3):
        ids, mask = tokens(batch, 90), torch.ones(batch, 90, dtype=torch.long)
        mask[1, :5] = 0
        caches, at = [m.new_cache(batch) for m in (eager, compiled)], 0
        for width in (19, 1, 1, 46, 1, 1, 19, 1, 1):
            part = {"input_ids": ids[:, at : at + width], "attention_mask": mask[:, at : at + width]}
            expected, got = (m(**part, past_key_values=c).logits for m, c in zip((eager, compiled), caches))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
            same_state(*caches)
            at += width
        assert int(caches[1].live_slots()[0].max()) == 70


def test_compiles_a_few_times_only() -> None:
    """Neither lengths nor batch sizes recompile, also where they happen to be the number of heads or layers."""
    model = rewrite(original("llama"), captured("llama"), "h2o", None, **POLICIES["h2o"])
    model.compile(backend="eager")  # what compiles again, or does not, is Dynamo
    torch._dynamo.utils.counters.clear()
    graphs = []
    for batch in (2, 3, 4):
        cache = model.new_cache(batch)
        for width in (9, 17, 1, 1, 33, 12, 1, 1, 1):
            model(tokens(batch, width), past_key_values=cache)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # A prologue (one token or several) and three parts (one token or several, one page or several).
    assert graphs == [graphs[0]] * 3 and graphs[0] <= 2 + 3 * 4


def graph_inputs(model: Any, cache: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """What one call gives the graph, copied before the graph runs."""
    seen: list[tuple[Tensor, ...]] = []
    hook = model.graph_module.register_forward_pre_hook(lambda _, args: seen.append(tuple(a.clone() for a in args)))
    try:
        model(ids, past_key_values=cache)
    finally:
        hook.remove()
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("width", [1, 6])
def test_graph_can_be_exported(policy: str, width: int) -> None:
    """The graph is an ordinary one: torch.export takes it, declares the mutated pools, and computes the same."""
    model = rewritten("llama", policy, **POLICIES[policy])
    cache = model.new_cache(2)
    model(tokens(2, 69), past_key_values=cache)
    inputs = graph_inputs(model, cache, tokens(2, width, seed=3))
    with torch.no_grad():
        program = torch.export.export(model.graph_module, tuple(x.clone() for x in inputs), strict=False)
        mine, theirs = (tuple(x.clone() for x in inputs) for _ in range(2))
        expected, got = model.graph_module(*mine), program.module()(*theirs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    names = model.program.layout.input_names
    changed = {n for n, before, after in zip(names, inputs, mine) if not torch.equal(before, after)}
    assert {"k_pages_0", "v_pages_0", "score_pages_0", "pos_pages_0"} <= changed <= {
        "k_pages_0", "v_pages_0", "score_pages_0", "pos_pages_0", "lens_0"
    }  # fmt: skip
    for name, a, b in zip(names, mine, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=f"{name} differs")
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {"kvrewrite.cached_attention.default", "kvrewrite.cache_update.default"} <= targets
