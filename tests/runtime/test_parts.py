"""Programs in parts: they compute what the whole does, and layers that repeat share a graph."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kvrewrite.capture.captured import Captured
from kvrewrite.capture.frontend import capture
from kvrewrite.errors import OptionError
from kvrewrite.ir.fx import is_op
from kvrewrite.ops.dispatch import fused, kernels
from kvrewrite.passes.lower.match import half_split
from kvrewrite.passes.lower.partition import partition
from kvrewrite.passes.lower.prompt import fold, lower_prefill, without_logits
from kvrewrite.passes.pipeline import canonical
from kvrewrite.runtime.executor import Executor
from kvrewrite.runtime.parts import Execution
from tests.support.rewritten import captured, original, rewrite, rewritten


@functools.cache
def five_layers() -> tuple[nn.Module, Captured]:
    """Layers that repeat."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256,
        )
    )  # fmt: skip
    found = capture(model)
    canonical(found)
    return model, found


# One process makes them.
repeating = pytest.mark.xdist_group("five layers")


@repeating
@pytest.mark.parametrize("policy", ["h2o", "streaming_llm"])
def test_equal_layers_share_a_graph(policy: str) -> None:
    """A prologue, four layers with the next one's projections, and what is behind the last attention."""
    model = rewrite(*five_layers(), policy, None, budget=16)
    found = partition(model.graph_module)
    assert len(found.parts) == 6 and len(found.distinct) == 3
    assert len({id(part.graph) for part in found.parts[1:-1]}) == 1
    freed = [name for part in found.parts for name in part.last_use]
    assert len(freed) == len(set(freed)) and found.result not in freed
    assert not any(node.op == "get_attr" for graph in found.distinct for node in graph.graph.nodes)


@repeating
def test_layers_that_differ_do_not() -> None:
    """The layer's number is part of `random`'s hash."""
    model = rewrite(*five_layers(), "random", None, budget=16)
    assert len(partition(model.graph_module).distinct) == 6


CASES: list[Any] = [
    pytest.param("gemma3n_text", "h2o", {"budget": 16}, marks=pytest.mark.thorough),
    pytest.param("gemma2", "streaming_llm", {"budget": 16, "chunk": 8}, marks=pytest.mark.thorough),
    ("llama", "sirllm", {"budget": 16, "chunk": 8}),
    ("gpt2", "snapkv", {"budget": 16, "window": 6}),
    ("deepseek_v3", "h2o", {"budget": 16}),
    ("llama", "attention_gate", {"chunk": 20}),
    ("llama", "kvzap", {"threshold": 0.0, "window": 4, "chunk": 20}),
    ("gemma3_text", "fast_kvzip", {"budget": 16, "n_sink": 1, "interval": 3, "chunk": 20}),
    ("llama", "h2o", {"budget": 16, "quantize": "int8", "quantize_group": 8, "quantize_residual": 8}),
]


@pytest.mark.parametrize(("family", "policy", "options"), CASES)
def test_parts_are_the_whole(family: str, policy: str, options: dict[str, Any]) -> None:
    """The same bits, prompt and tokens; also where only the last logits are wanted, and chunks before them run without any."""
    whole = rewritten(family, policy, **options)
    parts = rewrite(original(family), captured(family), policy, None, **options)
    parts.executor = Executor(Execution(parts.graph_module, None))
    ids = torch.randint(1, 96, (2, 36), generator=torch.Generator().manual_seed(0))
    for keep in (0, 1):
        caches = [m.new_cache(2) for m in (whole, parts)]
        for at, width in ((0, 30), *((t, 1) for t in range(30, 36))):
            new = ids[:, at : at + width]
            expected, got = [
                m(new, past_key_values=c, logits_to_keep=keep).logits for m, c in zip((whole, parts), caches)
            ]
            assert torch.equal(got, expected)
        assert caches[0].positions() == caches[1].positions()


@repeating
def test_without_logits() -> None:
    """The last layer is its keys, values and scores alone; the others are the same graphs. Where scores come from attention or
    from the logits, both stay."""
    model = rewrite(*five_layers(), "streaming_llm", None, budget=16, chunk=8)
    execution = Execution(model.graph_module, None)
    attention = torch.ops.kvrewrite.cached_attention.default

    def count(program: Any) -> int:
        return sum(is_op(n, attention) for part in program.parts for n in part.graph.graph.nodes)

    silent = execution.silent
    assert silent.result is None and (count(execution.partition), count(silent)) == (5, 4)
    assert "lm_head.weight" in execution.partition.parts[-1].inputs and "lm_head.weight" not in silent.parts[-1].inputs
    assert [part.graph for part in silent.parts[:-1]] == [part.graph for part in execution.partition.parts[:-1]]
    attended = Execution(rewritten("llama", "h2o", budget=16).graph_module, None)
    assert count(attended.silent) == count(attended.partition)
    spoken = Execution(rewritten("llama", "sirllm", budget=16).graph_module, None)
    assert any("lm_head" in name for name in spoken.silent.parts[-1].inputs)


def test_half_split() -> None:
    """Halves over all channels or over the first ones; interleaved pairs are none."""
    assert half_split(torch.tensor([2, 3, 0, 1])) == 2
    assert half_split(torch.tensor([1, 0, 2, 3])) == 1
    assert half_split(torch.tensor([1, 0, 3, 2])) == 0
    assert half_split(torch.tensor([0, 1, 2, 3])) == 0


def test_kernels_are_chosen_in_the_open(caplog: pytest.LogCaptureFixture) -> None:
    """auto is the reference on a CPU; fused never falls back; each choice is logged once."""
    x = torch.zeros(1)
    with caplog.at_level(logging.INFO, "kvrewrite.kernels"):
        assert not fused("an op", x) and not fused("an op", x)
        with kernels("fused"):
            assert fused("an op", x)
            with pytest.raises(OptionError, match="kernels=fused: an op has no kernel here: merging"):
                fused("an op", x, "merging")
            with pytest.raises(OptionError, match=r"not in torch\.float64"):
                fused("an op", x.double())
        with kernels("reference"):
            assert not fused("an op", x)
    assert sum("an op on cpu" in record.message for record in caplog.records) == 1
    with pytest.raises(OptionError, match="expected one of auto, reference, fused"), kernels("fast"):
        pass


@pytest.mark.parametrize(
    ("family", "policy", "options"),
    [
        pytest.param(
            "llama",
            "locret",
            {"budget": 16, "chunk": 8, "stabilizers": 4, "local_tail": 3},
            marks=pytest.mark.thorough,
        ),
        pytest.param("gemma2", "h2o", {"budget": 16, "chunk": 9}, marks=pytest.mark.thorough),
        ("gpt_oss", "snapkv", {"budget": 16, "window": 6}),
        pytest.param(
            "llama", "duo_attention", {"budget": 16, "start": 4, "chunk": 9, "heads": "10,01"}, marks=pytest.mark.slow
        ),
        pytest.param(
            "llama", "trim_kv", {"budget": 12, "buffer_size": 2, "retention_gate": "rg"}, marks=pytest.mark.slow
        ),
    ],
)
def test_kernels_together(family: str, policy: str, options: dict[str, Any]) -> None:
    """A prompt and tokens through the lowered program and the kernels (Triton's interpreter) keep what the reference keeps."""
    plain = rewritten(family, policy, **options)
    lowered = rewrite(original(family), captured(family), policy, None, **options)
    lowered.executor = Executor(Execution(lower_prefill(fold(lowered.graph_module)), None))
    ids = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(s))[:40] + 1 for s in range(2)])
    caches = [plain.new_cache(2), lowered.new_cache(2)]
    for at, width in ((0, 22), (22, 1), (23, 5), (28, 1)):
        new = ids[:, at : at + width]
        expected = plain(new, past_key_values=caches[0], logits_to_keep=1).logits
        with kernels("auto" if torch.cuda.is_available() else "fused"):
            got = lowered(new, past_key_values=caches[1], logits_to_keep=1).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert caches[0].positions() == caches[1].positions()


@pytest.mark.parametrize(
    ("policy", "options", "together"),
    [
        ("locret", {"chunk": 8, "stabilizers": 4}, 2),
        ("keydiff", {"chunk": 8}, 0),
        ("h2o", {}, 0),
        ("streaming_llm", {}, 2),
    ],
)
def test_updates_beside_attention(policy: str, options: dict[str, Any], together: int) -> None:
    """Only updates that need nothing of attention, nor of the cache behind it, run beside it; and without logits the last layer's
    runs alone."""
    graph = fold(rewritten("llama", policy, budget=16, **options).graph_module)
    lowered = lower_prefill(graph)

    def count(gm: Any, target: Any) -> int:
        return sum(is_op(n, target) for n in gm.graph.nodes)

    ops = torch.ops.kvrewrite
    both, update, attention = [op.default for op in (ops.attend_and_update, ops.cache_update, ops.cached_attention)]
    assert [count(lowered, op) for op in (both, update, attention)] == [together, 2 - together, 2 - together]
    if together:
        silent = without_logits(lowered)
        assert [count(silent, op) for op in (both, update, attention)] == [1, 1, 0]
        assert count(lowered, ops.turn_both.default) == 2 and count(silent, ops.turn_both.default) == 1
