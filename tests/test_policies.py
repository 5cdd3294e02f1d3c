"""Policies under eviction against the oracle of tests/oracle.py: same tokens kept at every step, same logits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvrewrite import policies
from kvrewrite.capture import Captured, capture
from kvrewrite.errors import OptionError
from kvrewrite.passes.pipeline import canonical
from tests.oracle import H2ORule, LocretRule, Oracle, Rule, StreamingRule
from tests.rewritten import rewrite
from tests.zoo import VOCAB, make

pytestmark = pytest.mark.xdist_group("policies")
HIDDEN = 24
DECODE = 14


@functools.cache
def llama() -> nn.Module:
    model = make("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with torch.no_grad():  # larger projections: attention that prefers some tokens clearly
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    return model


@functools.cache
def retaining_heads() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for i in range(2):
        weights[f"model.layers.{i}.self_attn.fc1.weight"] = torch.randn(HIDDEN, 64 + 32 + 32, generator=generator)
        weights[f"model.layers.{i}.self_attn.fc2.weight"] = torch.randn(2, HIDDEN, generator=generator)
    return weights


@functools.cache
def captured() -> Captured:
    found = capture(llama())
    canonical(found)
    return found


@functools.cache
def rewritten(policy: str, **options: Any) -> Any:
    return rewrite(llama(), captured(), policy, retaining_heads() if policy == "locret" else None, **options)


def locret(**options: Any) -> LocretRule:
    names = ("fc1", "fc2")
    heads = [tuple(retaining_heads()[f"model.layers.{i}.self_attn.{n}.weight"] for n in names) for i in range(2)]
    return LocretRule(**options, heads=heads)  # type: ignore[arg-type]


# name -> (policy, its options, the oracle's rule)
CASES: dict[str, tuple[str, dict[str, Any], Rule]] = {
    "full": ("full", {"chunk": 7}, Rule()),
    "streaming contiguous": ("streaming_llm", {"budget": 12, "start": 3, "chunk": 7}, StreamingRule(12, 3, 7)),
    "streaming no sinks": ("streaming_llm", {"budget": 9, "start": 0, "chunk": 16}, StreamingRule(9, 0, 16)),
    "streaming original": (
        "streaming_llm",
        {"budget": 12, "start": 3, "chunk": 7, "positions": "original"},
        StreamingRule(12, 3, 7, contiguous=False),
    ),
    "h2o whole prompt": ("h2o", {"budget": 10}, H2ORule(10, None)),
    "h2o chunks": ("h2o", {"budget": 11, "chunk": 6}, H2ORule(11, 6)),
    "h2o recent": ("h2o", {"budget": 10, "chunk": 9, "recent_tokens": 2}, H2ORule(10, 9, recent=2)),
    "h2o contiguous": (
        "h2o",
        {"budget": 10, "chunk": 8, "positions": "contiguous"},
        H2ORule(10, 8, contiguous=True),
    ),
    "locret": (
        "locret",
        {"budget": 10, "chunk": 7, "stabilizers": 4, "local_tail": 3},
        locret(budget=10, chunk=7, stabilizers=4, local_tail=3),
    ),
    "locret stabilizers beyond the chunk": (
        "locret",
        {"budget": 12, "chunk": 4, "stabilizers": 9, "local_tail": 5},
        locret(budget=12, chunk=4, stabilizers=9, local_tail=5),
    ),
    "locret no tail": (
        "locret",
        {"budget": 10, "chunk": 7, "stabilizers": 4, "local_tail": 0},
        locret(budget=10, chunk=7, stabilizers=4, local_tail=0),
    ),
    "locret original positions": (
        "locret",
        {"budget": 10, "chunk": 7, "stabilizers": 4, "local_tail": 3, "positions": "original"},
        locret(budget=10, chunk=7, stabilizers=4, local_tail=3, contiguous=False),
    ),
    "locret eviction in decoding": (
        "locret",
        {"budget": 10, "chunk": 7, "stabilizers": 4, "local_tail": 3, "decode_eviction": True},
        locret(budget=10, chunk=7, stabilizers=4, local_tail=3, decode_eviction=True),
    ),
    "locret eviction in decoding, no tail": (
        "locret",
        {"budget": 10, "chunk": 8, "stabilizers": 4, "local_tail": 0, "decode_eviction": True},
        locret(budget=10, chunk=8, stabilizers=4, local_tail=0, decode_eviction=True),
    ),
}


def tokens(rows: int, length: int, seed: int) -> Tensor:
    """Random tokens, none twice: Locret's scores in layer 0 depend on the token alone, and there must be no ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VOCAB, generator=generator)[:length] for _ in range(rows)])


def compare(model: Any, cache: Any, rows: list[Oracle], ids: Tensor, step: str) -> None:
    got = model(ids, past_key_values=cache).logits
    for b, oracle in enumerate(rows):
        row = ids[b].tolist()
        expected = oracle.decode(row[0]) if len(row) == 1 and oracle.seen > 0 else oracle.prompt(row)
        kept = {layer: heads[b] for layer, heads in cache.positions().items()}
        assert kept == oracle.kept(), f"{step}, row {b}"
        torch.testing.assert_close(got[b], expected, rtol=0, atol=1e-4, msg=lambda m: f"{step}, row {b}: {m}")  # noqa: B023


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("seed", "calls"), [(0, (31,)), (1, (19, 12, 5)), (2, (2, 23)), (3, (9, 1, 1, 14))])
def test_against_oracle(name: str, seed: int, calls: tuple[int, ...]) -> None:
    """Two rows side by side: a prompt in one or several calls, then decoding."""
    policy, options, rule = CASES[name]
    model = rewritten(policy, **options)
    ids = tokens(2, sum(calls) + DECODE, seed)
    cache, rows, at = model.new_cache(2), [Oracle(llama(), rule) for _ in range(2)], 0
    for i, width in enumerate((*calls, *[1] * DECODE)):
        compare(model, cache, rows, ids[:, at : at + width], f"call {i} of {width} tokens at {at}")
        at += width


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c[0] != "full"])
def test_second_turn(name: str) -> None:
    """Prompt, answer, prompt, answer on one cache."""
    policy, options, rule = CASES[name]
    model = rewritten(policy, **options)
    ids = tokens(1, 60, 9)
    cache, rows, at = model.new_cache(1), [Oracle(llama(), rule)], 0
    for width in (17, 1, 1, 1, 1, 1, 13, 1, 1, 1):
        compare(model, cache, rows, ids[:, at : at + width], f"{width} tokens at {at}")
        at += width


def test_oracle_without_eviction_is_the_model() -> None:
    """The oracle itself: with nothing evicted it is the model, whatever the policy."""
    ids = torch.randint(VOCAB, (1, 26), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = llama()(ids, use_cache=False).logits[0]
    for rule in (
        Rule(),
        StreamingRule(99, 4, 5),
        H2ORule(99, None),
        locret(budget=99, chunk=4, stabilizers=3, local_tail=2),
    ):
        oracle = Oracle(llama(), rule)
        got = [oracle.prompt(ids[0, :20].tolist()), *(oracle.decode(t) for t in ids[0, 20:].tolist())]
        torch.testing.assert_close(torch.cat(got), expected, rtol=0, atol=1e-5)


def test_cases_are_told_apart() -> None:
    """The cases are sharp enough: policies and position modes give different logits under eviction."""
    ids = tokens(1, 31, 0)
    last = {}
    for name, (_, _, rule) in CASES.items():
        oracle = Oracle(llama(), rule)
        oracle.prompt(ids[0].tolist())
        last[name] = oracle.decode(3)[0]
    names = [n for n in last if "decoding" not in n]  # without and with decode_eviction the first step is the same
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert (last[a] - last[b]).abs().max() > 1e-3, (a, b)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("streaming_llm", {"budget": 4, "start": 4}, "budget is 4"),
        ("streaming_llm", {"budget": None}, "expected a number"),
        ("streaming_llm", {"start": -1}, "start is -1"),
        ("streaming_llm", {"positions": "relative"}, "positions"),
        ("h2o", {"budget": 8, "recent_tokens": 8}, "budget is 8"),
        ("h2o", {"budget": 8, "recent_tokens": -2}, "recent_tokens is -2"),
        ("h2o", {"budget": 8, "chunk": 0}, "chunk is 0"),
        ("h2o", {"budgett": 8}, "did you mean 'budget'"),
        ("locret", {"budget": 10, "stabilizers": 10}, "budget above the stabilizers"),
        ("locret", {"local_tail": -1}, "local_tail"),
        ("locret", {"chunk": True}, "expected an integer"),
        ("h20", {}, "did you mean 'h2o'"),
    ],
)
def test_senseless_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        policies.make(name, **options)


@pytest.mark.parametrize("name", policies.POLICIES)
def test_options_are_plain_data(name: str) -> None:
    policy = policies.make(name)
    assert policies.make(name, **policy.options()) == policy
    assert policy.summary and policy.source
    # No prompt loses or repeats a token.
    for length in (1, 5, 100, 101, 3072, 3173, 7000):
        plan = policy.plan(length)
        assert sum(s.length for s in plan) == length and all(s.length > 0 for s in plan)
