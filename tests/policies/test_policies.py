"""Policies under eviction against the oracle of tests/support/oracle.py: same tokens kept at every step, same logits."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvrewrite import policies
from kvrewrite.capture.captured import Captured
from kvrewrite.capture.frontend import capture
from kvrewrite.errors import CacheError, OptionError
from kvrewrite.kernels.scores.reference import uniform as hashed
from kvrewrite.passes.pipeline import canonical
from tests.support import kinds, learned
from tests.support.blocks import InfLLMRule
from tests.support.learned import DuoRule, FastKVzipRule, KVzapRule, TrimKVRule
from tests.support.oracle import Entry, Layer, Moment, Oracle, Rule
from tests.support.oracle_newer import (
    CompactorRule,
    CriticalKVRule,
    FinchRule,
    LagKVRule,
    ObservedAttentionRule,
    QFiltersRule,
    RandomAttentionRule,
    RKVRule,
)
from tests.support.oracle_rules import (
    AttentionGateRule,
    ExpectedAttentionRule,
    H2ORule,
    KeyDiffRule,
    KnormRule,
    LocretRule,
    NACLRule,
    RandomRule,
    ScissorhandsRule,
    Scored,
    SirLLMRule,
    SnapKVRule,
    StreamingRule,
    TovaRule,
    uniform,
)
from tests.support.products import covering
from tests.support.repetition import KVzipRule
from tests.support.rewritten import ours, rewrite
from tests.support.zoo import VOCAB, make

pytestmark = pytest.mark.xdist_group("policies")
LAYERS, HIDDEN = 3, 24
DECODE = 14
SECOND_TURN = (17, 1, 1, 1, 1, 1, 13, 1, 1, 1)


@functools.cache
def llama() -> nn.Module:
    model = make("llama", num_hidden_layers=LAYERS, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with torch.no_grad():  # larger projections: attention that prefers some tokens clearly
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    return model


@functools.cache
def retaining_heads() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for i in range(LAYERS):
        weights[f"model.layers.{i}.self_attn.fc1.weight"] = torch.randn(HIDDEN, 64 + 32 + 32, generator=generator)
        weights[f"model.layers.{i}.self_attn.fc2.weight"] = torch.randn(2, HIDDEN, generator=generator)
    return weights


@functools.cache
def gates() -> dict[str, Tensor]:
    """Gates that flag about half of the tokens; 2 heads of 8 channels."""
    generator = torch.Generator().manual_seed(6)
    weights = {}
    for i in range(LAYERS):
        for name in "qkv":
            weights[f"model.layers.{i}.gate.{name}_proj.weight"] = torch.randn(16, 64, generator=generator) / 2
        weights[f"model.layers.{i}.gate.o_proj.weight"] = torch.randn(2, 16, generator=generator) / 8
        weights[f"model.layers.{i}.gate.o_proj.bias"] = torch.randn(2, generator=generator) / 4
    return weights


@functools.cache
def filters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {f"q_filters.{i}": torch.randn(2, 16, generator=generator) for i in range(LAYERS)}


POLICY_WEIGHTS = {
    "qfilters": filters,
    "locret": retaining_heads,
    "locret_q": retaining_heads,
    "attention_gate": gates,
    "kvzap": learned.kvzap_file,
    "fast_kvzip": learned.fast_kvzip_weights,
    "trim_kv": learned.trim_kv_file,
    "duo_attention": lambda: {"full_attention_heads": torch.tensor(learned.ALPHA)},
}


@functools.cache
def captured() -> Captured:
    found = capture(llama())
    canonical(found)
    return found


@functools.cache
def rewritten(policy: str, **options: Any) -> Any:
    weights = POLICY_WEIGHTS[policy]() if policy in POLICY_WEIGHTS else None
    if options.get("hidden_size") == 0:
        weights = learned.kvzap_file(linear=True)
    if "retention_gate" in options:
        weights = learned.trim_kv_file(options["retention_gate"])
    return rewrite(llama(), captured(), policy, weights, **options)


def locret(**options: Any) -> LocretRule:
    names = ("fc1", "fc2")
    heads = [tuple(retaining_heads()[f"model.layers.{i}.self_attn.{n}.weight"] for n in names) for i in range(LAYERS)]
    return LocretRule(**options, retaining_heads=heads)  # type: ignore[arg-type]


def attention_gate(**options: Any) -> AttentionGateRule:
    names = {
        "q": "q_proj.weight",
        "k": "k_proj.weight",
        "v": "v_proj.weight",
        "o": "o_proj.weight",
        "bias": "o_proj.bias",
    }
    layers = [{n: gates()[f"model.layers.{i}.gate.{path}"] for n, path in names.items()} for i in range(LAYERS)]
    return AttentionGateRule(gates=layers, gate_heads=2, **options)


def kvzap(linear: bool = False, **options: Any) -> KVzapRule:
    return KVzapRule(models=learned.kvzap_file(linear), **options)


def fast_kvzip(**options: Any) -> FastKVzipRule:
    return FastKVzipRule(gates=learned.fast_kvzip_file(), **options)


def trim_kv(kind: str = "rg", **options: Any) -> TrimKVRule:
    return TrimKVRule(gates=learned.trim_kv_file(kind), kind=kind, **options)


# name -> (policy, its options, the oracle's rule)
CASES: dict[str, tuple[str, dict[str, Any], Rule]] = {
    "full": ("full", {"chunk": 7}, Rule()),
    "streaming contiguous": (
        "streaming_llm",
        {"budget": 12, "start": 3, "chunk": 7},
        StreamingRule(budget=12, sinks=3, chunk=7),
    ),
    "streaming no sinks": (
        "streaming_llm",
        {"budget": 9, "start": 0, "chunk": 16},
        StreamingRule(budget=9, chunk=16),
    ),
    "streaming original": (
        "streaming_llm",
        {"budget": 12, "start": 3, "chunk": 7, "positions": "original"},
        StreamingRule(budget=12, sinks=3, chunk=7, contiguous=False),
    ),
    "streaming fraction": (
        "streaming_llm",
        {"budget": 0.3, "start": 2, "chunk": 6},
        StreamingRule(budget=0.3, sinks=2, chunk=6),
    ),
    "h2o whole prompt": ("h2o", {"budget": 10}, H2ORule(budget=10)),
    "h2o chunks": ("h2o", {"budget": 11, "chunk": 6}, H2ORule(budget=11, chunk=6)),
    "h2o recent": ("h2o", {"budget": 10, "chunk": 9, "recent_tokens": 2}, H2ORule(budget=10, chunk=9, recent=2)),
    "h2o contiguous": (
        "h2o",
        {"budget": 10, "chunk": 8, "positions": "contiguous"},
        H2ORule(budget=10, chunk=8, contiguous=True),
    ),
    "h2o fraction": ("h2o", {"budget": 0.35, "chunk": 9}, H2ORule(budget=0.35, chunk=9)),
    "h2o pyramid": (
        "h2o",
        {"budget": 12, "recent_tokens": 4, "layer_budgets": "pyramid"},
        H2ORule(budget=12, recent=4, layer_budgets="pyramid"),
    ),
    "h2o layers": ("h2o", {"budget": 10, "layer_budgets": "12,8,9"}, H2ORule(budget=10, layer_budgets=(12, 8, 9))),
    "h2o heads": ("h2o", {"budget": 10, "head_budgets": "adakv"}, H2ORule(budget=10, head_budgets="adakv")),
    "h2o heads and layers, chunks": (
        "h2o",
        {
            "budget": 10,
            "recent_tokens": 2,
            "chunk": 8,
            "head_budgets": "adakv",
            "head_floor": 0.4,
            "layer_budgets": "12,10,7",
        },
        H2ORule(budget=10, recent=2, chunk=8, head_budgets="adakv", head_floor=0.4, layer_budgets=(12, 10, 7)),
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
    "locret fraction": (
        "locret",
        {"budget": 0.4, "chunk": 7, "stabilizers": 3, "local_tail": 3},
        locret(budget=0.4, chunk=7, stabilizers=3, local_tail=3),
    ),
    "locret heads, eviction in decoding": (  # the tail leaves the heads what the last chunk gave them
        "locret",
        {
            "budget": 10,
            "chunk": 7,
            "stabilizers": 2,
            "local_tail": 3,
            "head_budgets": "adakv",
            "decode_eviction": True,
        },
        locret(budget=10, chunk=7, stabilizers=2, local_tail=3, head_budgets="adakv", decode_eviction=True),
    ),
    "locret heads and layers": (
        "locret",
        {
            "budget": 10,
            "chunk": 7,
            "stabilizers": 2,
            "local_tail": 3,
            "head_budgets": "adakv",
            "layer_budgets": "12,8,10",
        },
        locret(budget=10, chunk=7, stabilizers=2, local_tail=3, head_budgets="adakv", layer_budgets=(12, 8, 10)),
    ),
    "locret_q": (
        "locret_q",
        {"budget": 11, "chunk": 6, "stabilizers": 4, "local_tail": 3, "start": 5},
        locret(budget=11, chunk=6, stabilizers=4, local_tail=3, sinks=5),
    ),
    "tova": ("tova", {"budget": 9}, TovaRule(budget=9)),
    "tova chunks": ("tova", {"budget": 10, "chunk": 6}, TovaRule(budget=10, chunk=6)),
    "tova fraction": ("tova", {"budget": 0.4}, TovaRule(budget=0.4)),
    "tova layers": ("tova", {"budget": 9, "layer_budgets": "7,12,9"}, TovaRule(budget=9, layer_budgets=(7, 12, 9))),
    "snapkv": ("snapkv", {"budget": 10, "window": 4, "kernel": 3}, SnapKVRule(budget=10, recent=4, kernel=3)),
    "snapkv max": (
        "snapkv",
        {"budget": 12, "window": 3, "kernel": 5, "pooling": "max"},
        SnapKVRule(budget=12, recent=3, kernel=5, pooling="max"),
    ),
    "snapkv fraction": (
        "snapkv",
        {"budget": 0.5, "window": 3, "kernel": 5},
        SnapKVRule(budget=0.5, recent=3, kernel=5),
    ),
    "snapkv contiguous": (
        "snapkv",
        {"budget": 11, "window": 2, "kernel": 3, "positions": "contiguous"},
        SnapKVRule(budget=11, recent=2, kernel=3, contiguous=True),
    ),
    "snapkv heads": (
        "snapkv",
        {"budget": 10, "window": 3, "kernel": 1, "head_budgets": "adakv", "head_floor": 0.0},
        SnapKVRule(budget=10, recent=3, kernel=1, head_budgets="adakv", head_floor=0.0),
    ),
    "criticalkv": (
        "criticalkv",
        {"budget": 12, "window": 3, "kernel": 3},
        CriticalKVRule(budget=12, recent=3, kernel=3),
    ),
    "criticalkv, no first stage": (
        "criticalkv",
        {"budget": 0.5, "window": 2, "kernel": 1, "first_stage": 0.0, "epsilon": 0.02},
        CriticalKVRule(budget=0.5, recent=2, kernel=1, first_stage=0.0, epsilon=0.02),
    ),
    "criticalkv contiguous": (
        "criticalkv",
        {"budget": 11, "window": 2, "first_stage": 0.3, "pooling": "max", "positions": "contiguous"},
        CriticalKVRule(budget=11, recent=2, first_stage=0.3, pooling="max", contiguous=True),
    ),
    "pyramidkv": (
        "pyramidkv",
        {"budget": 12, "window": 4, "kernel": 3, "beta": 3},
        SnapKVRule(budget=12, recent=4, kernel=3, pooling="max", layer_budgets="pyramid", beta=3),
    ),
    "pyramidkv fraction": (
        "pyramidkv",
        {"budget": 0.4, "window": 3, "beta": 2, "pooling": "avg"},
        SnapKVRule(budget=0.4, recent=3, kernel=7, layer_budgets="pyramid", beta=2),
    ),
    "adakv": (
        "adakv",
        {"budget": 10, "window": 3, "kernel": 3},
        SnapKVRule(budget=10, recent=3, kernel=3, pooling="max", head_budgets="adakv"),
    ),
    "adakv floor": (
        "adakv",
        {"budget": 0.5, "window": 4, "head_floor": 0.5},
        SnapKVRule(budget=0.5, recent=4, kernel=7, pooling="max", head_budgets="adakv", head_floor=0.5),
    ),
    "adakv pyramid": (
        "adakv",
        {"budget": 11, "window": 4, "kernel": 3, "layer_budgets": "pyramid"},
        SnapKVRule(budget=11, recent=4, kernel=3, pooling="max", head_budgets="adakv", layer_budgets="pyramid"),
    ),
    "expected attention": (
        "expected_attention",
        {"budget": 10, "n_sink": 2, "n_future": 6},
        ExpectedAttentionRule(budget=10, sinks=2, future=6),
    ),
    "expected attention, contiguous": (
        "expected_attention",
        {"budget": 11, "n_sink": 1, "n_future": 12, "positions": "contiguous"},
        ExpectedAttentionRule(budget=11, sinks=1, future=12, contiguous=True),
    ),
    "expected attention, defaults": ("expected_attention", {"budget": 9}, ExpectedAttentionRule(budget=9)),
    "expected attention, epsilon": (
        "expected_attention",
        {"budget": 0.45, "n_future": 20, "epsilon": 0.05},
        ExpectedAttentionRule(budget=0.45, future=20, epsilon=0.05),
    ),
    "expected attention heads": (
        "expected_attention",
        {"budget": 10, "n_sink": 1, "n_future": 9, "head_budgets": "adakv"},
        ExpectedAttentionRule(budget=10, sinks=1, future=9, head_budgets="adakv"),
    ),
    "infllm": (
        "infllm",
        {"budget": 9, "chunk": 5, "start": 2, "block": 3, "blocks": 2, "representatives": 2, "block_cache": 3},
        InfLLMRule(budget=9, chunk=5, start=2, block=3, blocks=2, representatives=2),
    ),
    "infllm original, refresh": (
        "infllm",
        {
            "budget": 8,
            "chunk": 4,
            "start": 0,
            "block": 4,
            "blocks": 1,
            "representatives": 1,
            "refresh": 3,
            "distant": "original",
        },
        InfLLMRule(budget=8, chunk=4, start=0, block=4, blocks=1, representatives=1, refresh=3, constant=False),
    ),
    "keydiff": ("keydiff", {"budget": 10, "chunk": 6}, KeyDiffRule(budget=10, chunk=6)),
    "keydiff recent": (
        "keydiff",
        {"budget": 9, "chunk": 16, "recent_tokens": 3},
        KeyDiffRule(budget=9, chunk=16, recent=3),
    ),
    # Of two keys both have the same cosine with their mean: no head must come down to one.
    "keydiff heads": (
        "keydiff",
        {"budget": 0.4, "recent_tokens": 2, "chunk": 9, "head_budgets": "adakv"},
        KeyDiffRule(budget=0.4, recent=2, chunk=9, head_budgets="adakv"),
    ),
    "knorm chunks": ("knorm", {"budget": 12, "chunk": 5}, KnormRule(budget=12, chunk=5)),
    "knorm layers": ("knorm", {"layer_budgets": "12,9,6"}, KnormRule(budget=1, layer_budgets=(12, 9, 6))),
    "knorm pyramid": (  # the last layer keeps nothing: each token sees itself alone there
        "knorm",
        {"budget": 10, "layer_budgets": "pyramid"},
        KnormRule(budget=10, layer_budgets="pyramid"),
    ),
    "knorm heads": (
        "knorm",
        {"budget": 10, "head_budgets": "adakv"},
        KnormRule(budget=10, head_budgets="adakv"),
    ),
    "knorm heads, budget as long as a prompt": (  # where int(0.2 * 19) takes nothing from a head
        "knorm",
        {"budget": 19, "head_budgets": "adakv"},
        KnormRule(budget=19, head_budgets="adakv"),
    ),
    "random": ("random", {"budget": 9, "seed": 3}, RandomRule(budget=9, seed=3)),
    "random chunks, contiguous": (
        "random",
        {"budget": 11, "chunk": 6, "positions": "contiguous"},
        RandomRule(budget=11, chunk=6, contiguous=True),
    ),
    "random fraction": ("random", {"budget": 0.25, "seed": 8}, RandomRule(budget=0.25, seed=8)),
    "random layers and heads": (
        "random",
        {"budget": 10, "seed": 1, "layer_budgets": "9,13,8", "head_budgets": "adakv", "head_floor": 0.0},
        RandomRule(budget=10, seed=1, layer_budgets=(9, 13, 8), head_budgets="adakv", head_floor=0.0),
    ),
    # A history no longer than a prompt, or a chunk of it: where a turn cuts decoding short, the queries that count are
    # the last ones before the compression then, not before the one that decoding would have come to.
    "scissorhands": (
        "scissorhands",
        {"budget": 10, "recent_tokens": 2, "history": 4},
        ScissorhandsRule(budget=10, recent=2, history=4),
    ),
    "scissorhands chunks": (
        "scissorhands",
        {"budget": 11, "recent_tokens": 3, "history": 4, "chunk": 4, "drop": 0.3},
        ScissorhandsRule(budget=11, recent=3, history=4, chunk=4, drop=0.3),
    ),
    "scissorhands fraction": (
        "scissorhands",
        {"budget": 0.4, "recent_tokens": 1, "history": 3},
        ScissorhandsRule(budget=0.4, recent=1, history=3),
    ),
    "sirllm": ("sirllm", {"budget": 11, "start": 3, "chunk": 7}, SirLLMRule(budget=11, sinks=3, chunk=7)),
    "sirllm decay, recent": (
        "sirllm",
        {"budget": 12, "start": 2, "recent_tokens": 4, "decay": 0.6},
        SirLLMRule(budget=12, sinks=2, recent=4, decay=0.6, chunk=512),
    ),
    "sirllm original, no start": (
        "sirllm",
        {"budget": 9, "start": 0, "decay": 0.9, "chunk": 8, "positions": "original"},
        SirLLMRule(budget=9, sinks=0, decay=0.9, chunk=8, contiguous=False),
    ),
    "sirllm fraction": (
        "sirllm",
        {"budget": 0.3, "start": 1, "chunk": 9},
        SirLLMRule(budget=0.3, sinks=1, chunk=9),
    ),
    "nacl": ("nacl", {"budget": 11, "interval": 5, "seed": 2}, NACLRule(budget=11, interval=5, seed=2)),
    "nacl fraction": ("nacl", {"budget": 0.4, "interval": 4}, NACLRule(budget=0.4, interval=4)),
    "nacl, never in decoding": ("nacl", {"budget": 12, "interval": 0}, NACLRule(budget=12, interval=0)),
    "nacl code": (
        "nacl",
        {"budget": 10, "preset": "code", "interval": 6},
        NACLRule(budget=10, preset="code", interval=6),
    ),
    "nacl pyramid": (
        "nacl",
        {"budget": 12, "layer_budgets": "pyramid", "interval": 3},
        NACLRule(budget=12, layer_budgets="pyramid", interval=3),
    ),
    "nacl layers": (
        "nacl",
        {"budget": 10, "layer_budgets": "13,8,10", "interval": 3, "seed": 1},
        NACLRule(budget=10, layer_budgets=(13, 8, 10), interval=3, seed=1),
    ),
    "kvzap, contiguous": (
        "kvzap",
        {"threshold": -1.0, "window": 5, "positions": "contiguous"},
        kvzap(threshold=-1.0, window=5, contiguous=True),
    ),
    "kvzap linear, chunks, prompts only": (
        "kvzap",
        {"threshold": -0.5, "window": 3, "hidden_size": 0, "chunk": 6, "decode_eviction": False},
        kvzap(True, threshold=-0.5, window=3, chunk=6, decode_eviction=False),
    ),
    "kvzap, budget and threshold": (
        "kvzap",
        {"threshold": -1.5, "window": 2, "budget": 8, "chunk": 9},
        kvzap(threshold=-1.5, window=2, budget=8, chunk=9),
    ),
    "kvzip": (
        "kvzip",
        {"budget": 0.4, "n_sink": 2, "repeat_prompt": "90,91", "repeat_answer": "92"},
        KVzipRule(budget=0.4, sinks=2, prompt=(90, 91), answer=(92,)),
    ),
    "kvzip, parts": (
        "kvzip",
        {"budget": 9, "n_sink": 1, "repeat_chunk": 7, "lead": 3, "repeat_next": "93", "chunk": 8},
        KVzipRule(budget=9, sinks=1, part=7, lead=3, following=(93,), chunk=8),
    ),
    "kvzip, by head, contiguous": (
        "kvzip",
        {"budget": 10, "scope": "head", "repeat_chunk": 9, "lead": 2, "positions": "contiguous"},
        KVzipRule(budget=10, scope="head", part=9, lead=2, contiguous=True),
    ),
    "kvzip, by layer": (
        "kvzip",
        {"budget": 8, "scope": "layer", "n_sink": 0, "repeat_chunk": 12, "layer_budgets": "12,8,9"},
        KVzipRule(budget=8, scope="layer", sinks=0, part=12, layer_budgets=(12, 8, 9)),
    ),
    "fast_kvzip": (
        "fast_kvzip",
        {"budget": 0.4, "n_sink": 1, "window_ratio": 0.1, "interval": 8, "decode_window": 2},
        fast_kvzip(budget=0.4, sinks=1, ratio=0.1, interval=8, decode_window=2),
    ),
    "fast_kvzip, chunks": (
        "fast_kvzip",
        {"budget": 9, "n_sink": 2, "window": 3, "chunk": 8, "interval": 5, "decode_window": 3},
        fast_kvzip(budget=9, sinks=2, wide=3, chunk=8, interval=5, decode_window=3),
    ),
    "fast_kvzip, by layer": (
        "fast_kvzip",
        {"budget": 10, "n_sink": 1, "scope": "layer", "interval": 6, "decode_window": 2},
        fast_kvzip(budget=10, sinks=1, scope="layer", interval=6, decode_window=2),
    ),
    "trim_kv": (
        "trim_kv",
        {"budget": 9, "buffer_size": 4, "retention_gate": "rg"},
        trim_kv(budget=9, buffer=4),
    ),
    "trim_kv gated, chunks": (
        "trim_kv",
        {"budget": 0.4, "buffer_size": 1, "retention_gate": "rg3", "chunk": 9},
        trim_kv("rg3", budget=0.4, chunk=9),
    ),
    "duo_attention": (
        "duo_attention",
        {"budget": 9, "start": 3, "chunk": 7},
        DuoRule(retrieval=[[True, False], [True, False], [False, True]], start=3, recent=6, chunk=7),
    ),
    "r_kv": (
        "r_kv",
        {"budget": 11, "buffer": 3, "window": 3, "kernel": 3},
        RKVRule(budget=11, buffer=3, recent=3, kernel=3),
    ),
    "r_kv, chunks, fraction": (
        "r_kv",
        {"budget": 0.5, "buffer": 1, "window": 4, "share": 0.6, "chunk": 9},
        RKVRule(budget=0.5, buffer=1, recent=4, share=0.6, chunk=9),
    ),
    "qfilters, chunks, contiguous": (
        "qfilters",
        {"budget": 10, "window": 3, "chunk": 7, "positions": "contiguous"},
        QFiltersRule(budget=10, recent=3, chunk=7, contiguous=True, filters=list(filters().values())),
    ),
    "qfilters, heads": (
        "qfilters",
        {"budget": 0.4, "window": 2, "head_budgets": "adakv"},
        QFiltersRule(budget=0.4, recent=2, head_budgets="adakv", filters=list(filters().values())),
    ),
    "random attention, prompts evict": (
        "random_attention",
        {"budget": 11, "buffer": 3, "seed": 5, "protect_prompt": False},
        RandomAttentionRule(budget=11, buffer=3, recent=3, seed=5, protect=False),
    ),
    "random attention, chunks, contiguous": (
        "random_attention",
        {"budget": 0.4, "buffer": 2, "chunk": 8, "positions": "contiguous", "protect_prompt": False},
        RandomAttentionRule(budget=0.4, buffer=2, recent=2, chunk=8, contiguous=True, protect=False),
    ),
    "observed attention, chunks, heads": (
        "observed_attention",
        {"budget": 0.4, "chunk": 8, "head_budgets": "adakv"},
        ObservedAttentionRule(budget=0.4, chunk=8, head_budgets="adakv"),
    ),
    "finch": ("finch", {"budget": 11, "window": 4}, FinchRule(budget=11, recent=4)),
    "finch, original positions": (
        "finch",
        {"budget": 0.5, "window": 3, "normalize": False, "positions": "original"},
        FinchRule(budget=0.5, recent=3, normalize=False, contiguous=False),
    ),
    "lagkv": ("lagkv", {"budget": 12, "n_sink": 2, "lag_size": 4}, LagKVRule(budget=12, sinks=2, lag=4)),
    "lagkv across, heads": (
        "lagkv",
        {"budget": 0.6, "n_sink": 1, "lag_size": 5, "across": True, "head_budgets": "adakv"},
        LagKVRule(budget=0.6, sinks=1, lag=5, across=True, head_budgets="adakv"),
    ),
    "leverage": ("leverage", {"budget": 10, "sketch": 6}, CompactorRule(budget=10, sketch=6, part="leverage")),
    "leverage, contiguous": (
        "leverage",
        {"budget": 9, "sketch": 9, "seed": 4, "positions": "contiguous"},
        CompactorRule(budget=9, sketch=9, seed=4, part="leverage", contiguous=True),
    ),
    "non-causal attention": (
        "non_causal_attn",
        {"budget": 10, "block": 7},
        CompactorRule(budget=10, block=7, part="attention"),
    ),
    "non-causal attention, heads": (
        "non_causal_attn",
        {"budget": 0.4, "head_budgets": "adakv"},
        CompactorRule(budget=0.4, part="attention", head_budgets="adakv"),
    ),
    "compactor": (
        "compactor",
        {"budget": 12, "start": 2, "recent_tokens": 3, "sketch": 6, "block": 8},
        CompactorRule(budget=12, sinks=2, recent=3, sketch=6, block=8),
    ),
    "compactor, heads": (
        "compactor",
        {"budget": 0.5, "start": 1, "recent_tokens": 0, "blending": 0.7, "head_budgets": "adakv"},
        CompactorRule(budget=0.5, sinks=1, blending=0.7, head_budgets="adakv"),
    ),
    "attention gate": ("attention_gate", {"gate_heads": 2, "gate_dim": 8}, attention_gate()),
    "attention gate, no start": ("attention_gate", {"start": 0, "gate_heads": 2}, attention_gate(sinks=0)),
    "attention gate, budget": (
        "attention_gate",
        {"gate_heads": 2, "gate_dim": 8, "budget": 9, "chunk": 12},
        attention_gate(budget=9, chunk=12),
    ),
    "attention gate, chunks, threshold": (
        "attention_gate",
        {"gate_heads": 2, "gate_dim": 8, "chunk": 6, "threshold": 0.7},
        attention_gate(chunk=6, threshold=0.7),
    ),
    **{rule.policy: (rule.policy, {"budget": 9}, rule(budget=9)) for rule in Scored.__subclasses__() if rule.policy},
}

# With the whole first prompt protected; budgets hold prompts of 24 tokens.
PROTECT: dict[str, Any] = {"budget": 28, "protect_prompt": True}
PROTECTED: dict[str, tuple[str, dict[str, Any], Rule]] = {
    "random attention": (
        "random_attention",
        {"budget": 28, "buffer": 3},
        RandomAttentionRule(budget=28, buffer=3, recent=3),
    ),
    "h2o, prompt protected": (
        "h2o",
        {**PROTECT, "recent_tokens": 3, "chunk": 9},
        H2ORule(budget=28, recent=3, chunk=9, protect=True),
    ),
    "streaming, prompt protected": (
        "streaming_llm",
        {**PROTECT, "start": 2, "chunk": 7},
        StreamingRule(budget=28, sinks=2, chunk=7, protect=True),
    ),
    "sirllm, prompt protected": (
        "sirllm",
        {**PROTECT, "start": 1, "decay": 0.5},
        SirLLMRule(budget=28, sinks=1, decay=0.5, chunk=512, protect=True),
    ),
    "r_kv, prompt protected": (
        "r_kv",
        {**PROTECT, "buffer": 2, "window": 3},
        RKVRule(budget=28, buffer=2, recent=3, protect=True),
    ),
    "keydiff, prompt protected": ("keydiff", {**PROTECT, "chunk": 6}, KeyDiffRule(budget=28, chunk=6, protect=True)),
    "trim_kv, prompt protected": (
        "trim_kv",
        {**PROTECT, "buffer_size": 3, "retention_gate": "rg"},
        trim_kv(budget=28, buffer=3, protect=True),
    ),
}

# What needs longer prompts or answers to happen at all; with the widths of the calls.
LONG: dict[str, tuple[tuple[str, dict[str, Any], Rule], tuple[int, ...]]] = {
    **{name: (case, (21, *[1] * 12, 8, 1, 1, 6, *[1] * 4)) for name, case in PROTECTED.items()},
    "nacl code, sinks and newest tokens": (  # of which there are some from 40 slots on
        ("nacl", {"budget": 45, "preset": "code", "interval": 7}, NACLRule(budget=45, preset="code", interval=7)),
        (70, *[1] * 20),
    ),
    "nacl, half of a long prompt": (
        ("nacl", {"budget": 0.5, "interval": 6}, NACLRule(budget=0.5, interval=6)),
        (70, *[1] * 20),
    ),
    "h2o, steep pyramid": (
        ("h2o", {"budget": 32, "layer_budgets": "pyramid"}, H2ORule(budget=32, layer_budgets="pyramid")),
        (70, *[1] * 9),
    ),
    "expected attention, a quarter": (
        ("expected_attention", {"budget": 0.25}, ExpectedAttentionRule(budget=0.25)),
        (70, *[1] * 5),
    ),
    "scissorhands, long history": (
        (
            "scissorhands",
            {"budget": 16, "recent_tokens": 3, "drop": 0.4},
            ScissorhandsRule(budget=16, recent=3, drop=0.4),
        ),
        (70, *[1] * 20),
    ),
    "scissorhands, long history, chunks": (
        (
            "scissorhands",
            {"budget": 24, "recent_tokens": 3, "chunk": 10, "history": 13},
            ScissorhandsRule(budget=24, recent=3, chunk=10, history=13),
        ),
        (70, *[1] * 20),
    ),
    "kvzap top-k": (
        ("kvzap", {"threshold": None, "window": 4, "budget": 0.4}, kvzap(threshold=None, window=4, budget=0.4)),
        (31, *[1] * 5, 12, 1, 1),
    ),
    "kvzap, no window": (
        ("kvzap", {"threshold": -1.0, "window": 0}, kvzap(threshold=-1.0, window=0)),
        (31, *[1] * 5, 12, 1, 1),
    ),
    "kvzap, over all layers": (
        (
            "kvzap",
            {"threshold": None, "window": 3, "budget": 9, "chunk": 8, "scope": "model"},
            kvzap(threshold=None, window=3, budget=9, chunk=8, scope="model"),
        ),
        (31, *[1] * 6, 12, 1, 1),
    ),
    "fast_kvzip, window beyond the budget": (
        ("fast_kvzip", {"budget": 8, "chunk": 7, "interval": 0}, fast_kvzip(budget=8, chunk=7, interval=0)),
        (31, *[1] * 5, 12, 1, 1),
    ),
    "fast_kvzip, by head": (
        (
            "fast_kvzip",
            {"budget": 10, "n_sink": 1, "scope": "head", "window_ratio": 0.2, "interval": 4},
            fast_kvzip(budget=10, sinks=1, scope="head", ratio=0.2, interval=4),
        ),
        (31, *[1] * 9, 12, 1, 1),
    ),
    "trim_kv keys and values": (
        (
            "trim_kv",
            {"budget": 9, "buffer_size": 3, "retention_gate": "rg2"},
            trim_kv("rg2", budget=9, buffer=3),
        ),
        (31, *[1] * 9, 12, 1, 1),
    ),
    "duo_attention, given heads": (
        (
            "duo_attention",
            {"budget": 8, "start": 0, "heads": "00,11,01", "chunk": None},
            DuoRule(retrieval=[[False, False], [True, True], [False, True]], start=0, recent=8),
        ),
        (31, *[1] * 5, 12, 1, 1),
    ),
    "heads, a further prompt that fits": (  # after which decoding has the plain budget
        (
            "knorm",
            {"budget": 0.521, "head_budgets": "adakv", "head_floor": 0.5},
            KnormRule(budget=0.521, head_budgets="adakv", head_floor=0.5),
        ),
        (14, *[1] * 18, 5, 1, 1, 1, 2, 1),
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


def follow(case: tuple[str, dict[str, Any], Rule], ids: Tensor, calls: tuple[int, ...]) -> None:
    """Calls of these widths on one cache, compared after each."""
    policy, options, rule = case
    model = rewritten(policy, **options)
    cache, rows, at = model.new_cache(len(ids)), [Oracle(llama(), rule) for _ in ids], 0
    for i, width in enumerate(calls):
        compare(model, cache, rows, ids[:, at : at + width], f"call {i} of {width} tokens at {at}")
        cache.end_prompt()  # further calls are further prompts
        at += width


def policy_of(case: Mapping[str, Any]) -> str:
    return (CASES | PROTECTED)[case["name"]][0]


def kind_of(case: Mapping[str, Any]) -> tuple[str, ...]:
    return kinds.eviction(*(CASES | PROTECTED)[case["name"]][:2])


def positions_of(case: Mapping[str, Any]) -> str:
    return kinds.positions(*(CASES | PROTECTED)[case["name"]][:2])


def options_of(case: Mapping[str, Any]) -> list[str]:
    """The options that any policy may have, and whether its budget is a share of the text."""
    options = (CASES | PROTECTED)[case["name"]][1]
    shared = ("chunk", "positions", "layer_budgets", "head_budgets", "decode_eviction", "protect_prompt")
    return [*(name for name in shared if name in options), *["share"] * isinstance(options.get("budget"), float)]


# Every policy, each set of shared options, and each way to cut a text; `test_second_turn` has each way to evict once more.
@covering(
    {"name": 0, "policy": 1, "options": 1, ("seed", "calls"): 8},
    derived={"policy": policy_of, "options": options_of},
)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("seed", "calls"), [(0, (31,)), (1, (19, 12, 5)), (2, (2, 23)), (3, (9, 1, 1, 14))])
def test_against_oracle(name: str, seed: int, calls: tuple[int, ...]) -> None:
    """One or several prompts, then decoding; two rows side by side at times."""
    follow(CASES[name], tokens(2 - seed % 2, sum(calls) + DECODE, seed), (*calls, *[1] * DECODE))


@covering({"kind": 1, "positions": 1, "name": 0}, derived={"kind": kind_of, "positions": positions_of})
@pytest.mark.parametrize("name", [n for n in CASES if n != "full"])
def test_second_turn(name: str) -> None:
    """Prompt, answer, prompt, answer on one cache."""
    follow(CASES[name], tokens(1, 60, 9), SECOND_TURN)


@pytest.mark.parametrize("name", LONG)
def test_long(name: str) -> None:
    case, calls = LONG[name]
    follow(case, tokens(1, sum(calls), 12), calls)


def test_every_policy_has_a_case() -> None:
    assert {p.name for p in ours()} == {policy for policy, _, _ in CASES.values()}


def test_tova_is_msrnn() -> None:
    """Two papers, one method."""
    assert policies.make("msrnn", budget=9) == policies.make("tova", budget=9)


# -- batches


def left_padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Ids and mask of rows of several lengths."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return {"input_ids": ids, "attention_mask": mask}


# Every policy has its padded rows in tests/runtime/test_invariants.py.
@covering({"options": 1, "name": 0}, derived={"options": options_of})
@pytest.mark.parametrize("name", [*PROTECTED, *CASES])
def test_padded_rows_are_the_rows_alone(name: str) -> None:
    """Three prompts of different lengths, answers, three further prompts, answers: what a row keeps is its own affair."""
    policy, options, _ = (CASES | PROTECTED)[name]
    model = rewritten(policy, **options)
    texts = tokens(3, 50, 21).tolist()
    widths = [(24, 9, 17), *[(1, 1, 1)] * 4, (5, 12, 8), *[(1, 1, 1)] * 2]
    together, alone = model.new_cache(3), [model.new_cache(1) for _ in range(3)]
    at = [0, 0, 0]
    for call, width in enumerate(widths):
        rows = [text[a : a + n] for text, a, n in zip(texts, at, width)]
        at = [a + n for a, n in zip(at, width)]
        got = model(**left_padded(rows), past_key_values=together).logits
        for b, row in enumerate(rows):
            expected = model(torch.tensor([row]), past_key_values=alone[b]).logits[0]
            kept = [[cache.positions()[i][r] for i in range(LAYERS)] for cache, r in ((together, b), (alone[b], 0))]
            assert kept[0] == kept[1], f"call {call}, row {b}"
            torch.testing.assert_close(got[b, -len(row) :], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "batch"), [(n, b) for n in ("random", "nacl") for b in (1, 3)])
def test_seed(name: str, batch: int) -> None:
    """What is random depends on the seed alone, not on the batch, the run or torch's generators."""
    ids = tokens(1, 36, 5).expand(batch, -1)

    def kept(seed: int) -> list[Any]:
        model = rewritten(name, budget=10, seed=seed)
        torch.manual_seed(seed * 7 + batch)
        cache = model.new_cache(batch)
        model(ids[:, :31], past_key_values=cache)
        for t in range(31, 36):
            model(ids[:, t : t + 1], past_key_values=cache)
        rows = [[heads[b] for heads in cache.positions().values()] for b in range(batch)]
        assert all(row == rows[0] for row in rows)
        return rows[0]

    rule = RandomRule(budget=10, seed=4) if name == "random" else NACLRule(budget=10, seed=4)
    oracle = Oracle(llama(), rule)
    oracle.prompt(ids[0, :31].tolist())
    for t in ids[0, 31:].tolist():
        oracle.decode(t)
    assert kept(4) == kept(4) == list(oracle.kept().values())
    assert kept(4) != kept(5)


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5, 2**64 - 1])
def test_hash(seed: int) -> None:
    """The vectorized hash is the scalar one; below 1 in fp32 too, where 1 - 2**-25 is no number."""
    heads, positions = 3, [*range(40), 38493448, 2**31 - 1]  # the second last gives the largest of all with seed 0
    for layer in (0, 1, 77):
        got = hashed(torch.tensor(positions).expand(1, heads, -1), seed, layer)[0]
        assert got.min() > 0 and got.max() < 1
        for h in range(heads):
            expected = torch.tensor([uniform(seed, layer, h, j) for j in positions], dtype=torch.float64)
            torch.testing.assert_close(got[h].double(), expected, rtol=0, atol=2**-24)


def test_a_prompt_that_can_not_be_protected() -> None:
    """Refused before anything is computed, also where its pieces come one by one; what fits goes on."""
    model, ids = rewritten("h2o", **PROTECT, recent_tokens=3), tokens(1, 40, 3)
    cache = model.new_cache(1)
    with pytest.raises(CacheError, match=r"prompt of 25 tokens.*budget of at least 29"):
        model(ids[:, :25], past_key_values=cache)
    model(ids[:, :20], past_key_values=cache)
    with pytest.raises(CacheError, match="prompt of 25 tokens"):
        model(ids[:, 20:25], past_key_values=cache)
    cache.end_prompt()
    model(ids[:, 20:], past_key_values=cache)
    assert all(len(head) == 28 and head[:20] == list(range(20)) for head in cache.positions()[0][0])


# -- the oracle itself


def test_oracle_without_eviction_is_the_model() -> None:
    """The oracle itself: with nothing evicted it is the model, whatever the policy."""
    ids = tokens(1, 26, 4)
    with torch.no_grad():
        expected = llama()(ids, use_cache=False).logits[0]
    for rule in (
        Rule(),
        StreamingRule(budget=99, sinks=4, chunk=5),
        H2ORule(budget=99),
        locret(budget=99, chunk=4, stabilizers=3, local_tail=2),
        TovaRule(budget=99, chunk=6),
        SnapKVRule(budget=99, recent=4, head_budgets="adakv", layer_budgets="pyramid"),
        ExpectedAttentionRule(budget=99),
        KeyDiffRule(budget=99, chunk=7),
        ScissorhandsRule(budget=99),
        SirLLMRule(budget=99, chunk=6),
        NACLRule(budget=99, interval=2),
        attention_gate(threshold=0.0, chunk=5),
        FinchRule(budget=99, recent=4),
        LagKVRule(budget=99, lag=5),
        CompactorRule(budget=99, recent=2),
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
    "name", [n for n, (_, _, rule) in CASES.items() if isinstance(rule, Scored) and not isinstance(rule, LocretRule)]
)
def test_oracle_keeps_within_the_budget(name: str) -> None:
    """The oracle itself: sizes after a prompt, in order, sinks and newest tokens there."""
    _, _, rule = CASES[name]
    assert isinstance(rule, Scored)
    oracle, recent = Oracle(llama(), rule), rule.recent or 0
    oracle.prompt(tokens(1, 31, 3)[0].tolist())
    sizes = []
    for heads in oracle.kept().values():
        for kept in heads:
            assert kept == sorted(set(kept)) and kept[: rule.sinks] == list(range(rule.sinks))
            assert kept[len(kept) - recent :] == list(range(31 - recent, 31))
            sizes.append(len(kept))
    budget = rule.budget if isinstance(rule.budget, int) else int(31 * rule.budget + 1e-9)
    most = budget * len(sizes)
    if isinstance(rule.layer_budgets, tuple):
        most = 2 * sum(rule.layer_budgets)
    # Ada-KV rounds each head's slots to the nearest number, and the certain share down before that.
    more, less = (len(sizes) // 2, 3 * len(sizes) // 2) if rule.head_budgets == "adakv" else (0, 0)
    if isinstance(rule, ScissorhandsRule):
        assert all(budget - int(rule.drop * budget) <= n <= budget for n in sizes)
    elif rule.layer_budgets == "pyramid":
        assert sizes[0] + sizes[1] > sizes[2] + sizes[3] > sizes[4] + sizes[5]
        assert sum(sizes) <= most + more
    else:
        assert most - less <= sum(sizes) <= most + more


def test_oracle_head_budgets() -> None:
    """Four slots for two heads. One has all the high scores: the other is left with its share of the floor."""
    entries = [Entry(torch.zeros(2), torch.zeros(2), n, n) for n in range(9)]
    layer = Layer(0, [list(entries), list(entries)], 1.0, [{}, {}])
    scores = [[9.0 + n for n in range(9)], [float(n) for n in range(9)]]
    moment = Moment("prompt", 9, 9, 9, True, 0, 1)
    for floor, expected in ((0.0, [4, 0]), (0.2, [3, 0]), (0.5, [3, 1]), (1.0, [2, 2])):
        rule = RandomRule(budget=2, head_budgets="adakv", head_floor=floor)
        none = [[False] * 9, [False] * 9]
        assert rule.per_head(layer, moment, 2, scores, none) == expected


def test_oracle_samples_by_softmax() -> None:
    """NACL's sample of one among four, over seeds: as often as softmax says (three standard deviations)."""
    attention = {0: {0: 0.1, 1: 2.0, 2: 0.0, 3: 1.3}}
    entries = [Entry(torch.zeros(2), torch.zeros(2), n, n) for n in range(4)]
    count, draws = [0] * 4, 3000
    for seed in range(draws):
        layer = Layer(1, [list(entries)], 1.0, [attention])
        (kept,) = NACLRule(budget=1, preset="code", seed=seed).sample(layer, 0, 1, 0, range(1))
        count[kept.position] += 1
    for n, p in zip(count, torch.softmax(torch.tensor(list(attention[0].values())), dim=0).tolist()):
        assert abs(n - draws * p) < 3 * (draws * p * (1 - p)) ** 0.5


def test_oracle_hash() -> None:
    """In (0, 1), different in every argument, and even."""
    values = [uniform(s, i, h, j) for s in (0, 1) for i in range(3) for h in range(2) for j in range(200)]
    assert len(set(values)) == len(values) and min(values) > 0 and max(values) < 1
    for lower in range(10):
        share = sum(lower / 10 <= v < (lower + 1) / 10 for v in values) / len(values)
        assert abs(share - 0.1) < 0.02


def test_oracle_gate_flags_half() -> None:
    """The gates of these tests evict some and keep some in every layer and head."""
    oracle = Oracle(llama(), attention_gate())
    oracle.prompt(tokens(1, 31, 0)[0].tolist())
    assert all(6 <= len(head) <= 29 for heads in oracle.kept().values() for head in heads)


# -- options


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
        # What a fraction may be.
        *[("knorm", {"budget": b}, "budget is") for b in (0.0, 1.0, 1.5, -0.5, float("nan"), 0, -3, True)],
        ("knorm", {"budget": None}, "budget"),
        ("knorm", {"budget": "10"}, "budget"),
        # Budgets of layers and heads.
        ("knorm", {"layer_budgets": "12,x"}, "layer_budgets"),
        ("knorm", {"layer_budgets": "pyramids"}, "layer_budgets"),
        ("knorm", {"layer_budgets": "12,0,5"}, "layer_budgets"),
        ("h2o", {"layer_budgets": "12,4,9", "recent_tokens": 4}, "layer_budgets"),
        ("knorm", {"head_budgets": "ada"}, "head_budgets"),
        ("knorm", {"head_budgets": "adakv", "head_floor": 1.5}, "head_floor"),
        ("knorm", {"head_budgets": "adakv", "head_floor": -0.1}, "head_floor"),
        ("h2o", {"head_budgets": "adakv", "budget": 6, "recent_tokens": 6}, "budget is 6"),
        ("adakv", {"budget": 32, "window": 32}, "budget is 32"),
        ("streaming_llm", {"head_budgets": "adakv"}, "head_budgets"),
        ("full", {"head_budgets": "adakv"}, "head_budgets"),
        ("tova", {"head_budgets": "adakv"}, "head_budgets"),  # one set for all heads
        ("sirllm", {"head_budgets": "adakv"}, "head_budgets"),
        ("attention_gate", {"head_budgets": "adakv"}, "head_budgets"),
        *[("scissorhands", {"layer_budgets": b}, "layer_budgets") for b in ("pyramid", "1000,900,800")],
        ("scissorhands", {"head_budgets": "adakv"}, "head_budgets"),
        ("nacl", {"head_budgets": "adakv"}, "head_budgets"),  # part of what stays is drawn by lot
        ("streaming_llm", {"merge": True}, "merge"),
        ("full", {"merge": True}, "merge"),
        ("knorm", {"quantize": "int3"}, "quantize"),
        # The policies' own.
        *[(p, {"chunk": 7}, "chunk") for p in ("snapkv", "pyramidkv", "adakv", "expected_attention", "nacl", "lagkv")],
        ("snapkv", {"kernel": 4}, "kernel is 4"),
        ("criticalkv", {"first_stage": 1.2}, "first_stage is 1.2"),
        ("criticalkv", {"epsilon": -1.0}, "epsilon is -1.0"),
        ("criticalkv", {"head_budgets": "adakv"}, "criticalkv has none"),
        ("snapkv", {"kernel": 0}, "kernel is 0"),
        ("snapkv", {"pooling": "sum"}, "pooling"),
        ("snapkv", {"budget": 20, "window": 20}, "budget is 20"),
        ("snapkv", {"window": 0}, "window is 0"),
        ("pyramidkv", {"beta": 0}, "beta is 0"),
        ("expected_attention", {"budget": 4, "n_sink": 4}, "budget is 4"),
        ("expected_attention", {"n_future": 0}, "n_future is 0"),
        ("expected_attention", {"n_sink": -1}, "n_sink is -1"),
        ("keydiff", {"budget": 5, "recent_tokens": 5}, "budget is 5"),
        ("scissorhands", {"drop": 0.0}, "drop is 0"),
        ("scissorhands", {"drop": 1.0}, "drop is 1"),
        ("scissorhands", {"history": 0}, "history is 0"),
        ("scissorhands", {"budget": 20, "recent_tokens": 10}, "recent"),  # what stays must be more than the recent
        ("sirllm", {"decay": -1.0}, "decay"),
        ("sirllm", {"budget": 6, "start": 4, "recent_tokens": 2}, "budget is 6"),
        ("nacl", {"preset": "papers"}, "preset"),
        ("nacl", {"interval": -1}, "interval is -1"),
        *[(p, {"budget": None}, "budget is None") for p in ("observed_attention", "leverage", "lagkv", "compactor")],
        ("random_attention", {"buffer": 0}, "buffer is 0"),
        ("random_attention", {"budget": 0.5}, "budget is 0.5"),
        ("random_attention", {"layer_budgets": "pyramid"}, "layer_budgets"),
        *[
            (p, {"protect_prompt": True}, "protect_prompt")
            for p in ("snapkv", "locret", "kvzap", "attention_gate", "full")
        ],
        *[
            ("h2o", {"protect_prompt": True, **more}, "protect_prompt")
            for more in (
                {"decode_eviction": False},
                {"head_budgets": "adakv"},
                {"layer_budgets": "pyramid"},
                {"budget": 0.5},
            )
        ],
        ("qfilters", {"window": -1}, "window is -1"),
        ("r_kv", {"kernel": 4}, "kernel is 4"),
        ("r_kv", {"share": 1.5}, "share is 1.5"),
        ("r_kv", {"buffer": 0}, "buffer is 0"),
        ("r_kv", {"positions": "contiguous"}, "positions contiguous"),
        ("finch", {"window": 0}, "window is 0"),
        ("finch", {"budget": 32}, "budget is 32"),
        ("lagkv", {"n_sink": -1}, "n_sink is -1"),
        ("lagkv", {"lag_size": 1}, "lag_size is 1"),
        ("leverage", {"sketch": 0}, "sketch is 0"),
        ("non_causal_attn", {"block": 0}, "block is 0"),
        ("compactor", {"sketch": 0}, "sketch is 0"),
        ("compactor", {"blending": -0.5}, "blending is -0.5"),
        ("compactor", {"budget": 12}, "budget is 12"),
        ("kvzap", {"threshold": None}, "budget is None"),
        ("kvzap", {"threshold": float("inf")}, "threshold is inf"),
        ("kvzap", {"window": -1}, "window is -1"),
        ("kvzap", {"budget": 128}, "128 recent tokens"),
        ("kvzap", {"head_budgets": "adakv"}, "head_budgets"),
        ("kvzap", {"scope": "model", "budget": 200}, "scope"),
        ("kvzip", {"budget": None}, "budget is None"),
        ("kvzip", {"scope": "heads"}, "scope"),
        ("kvzip", {"n_sink": -1}, "n_sink is -1"),
        ("kvzip", {"lead": 0}, "lead is 0"),
        ("kvzip", {"repeat_chunk": 0}, "repeat_chunk is 0"),
        ("kvzip", {"budget": 4}, "budget is 4"),
        ("fast_kvzip", {"budget": None}, "budget is None"),
        ("fast_kvzip", {"budget": 12}, "budget is 12"),
        ("fast_kvzip", {"scope": "models"}, "scope"),
        ("fast_kvzip", {"interval": -1}, "interval is -1"),
        ("fast_kvzip", {"window_ratio": 2.0}, "window_ratio"),
        ("fast_kvzip", {"head_budgets": "adakv"}, "head_budgets"),
        ("fast_kvzip", {"layer_budgets": "20,30"}, "layer_budgets"),
        ("fast_kvzip", {"merge": True}, "merge"),
        ("trim_kv", {"buffer_size": 0}, "buffer_size is 0"),
        ("trim_kv", {"retention_gate": "rg4"}, "retention_gate"),
        ("trim_kv", {"layer_budgets": "pyramid"}, "layer_budgets"),
        ("duo_attention", {"sparsity": 1.5}, "sparsity"),
        ("duo_attention", {"heads": "10,2"}, "heads is"),
        ("duo_attention", {"budget": 64}, "budget is 64"),
        ("duo_attention", {"head_budgets": "adakv"}, "head_budgets"),
        ("duo_attention", {"merge": True}, "merge"),
        ("attention_gate", {"threshold": 1.5}, "threshold"),
        ("attention_gate", {"gate_heads": 0}, "gate_heads is 0"),
    ],
)
def test_senseless_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        policies.make(name, **options)


@pytest.mark.parametrize("given", ["12,9", "12,9,8,7", (5, 5)])
def test_layer_budgets_must_fit_the_model(given: Any) -> None:
    """Refused before any work: the model has three layers."""
    with pytest.raises(OptionError, match="layer_budgets"):
        rewritten("knorm", layer_budgets=given)


@pytest.mark.parametrize("name", policies.POLICIES)
def test_options_are_plain_data(name: str) -> None:
    policy = policies.make(name)
    assert policies.make(name, **policy.options()) == policy
    assert policy.summary and policy.source
    # No prompt loses or repeats a token.
    for length in (1, 5, 100, 101, 3072, 3173, 7000):
        plan = policy.plan(length)
        assert sum(s.length for s in plan) == length and all(s.length > 0 for s in plan)
