"""What the pass that deals a program out over ranks makes of whole models: proved beside the program in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvrewrite
from kvrewrite.errors import OptionError, UnsupportedModelError
from kvrewrite.ir.parallel import Peers
from kvrewrite.passes.shard.placement import Split, regroup
from kvrewrite.passes.shard.rules import RULES, pointwise
from kvrewrite.passes.shard.shard import cut_tensor, shard
from kvrewrite.policies import POLICIES
from kvrewrite.runtime.sharding_proof import prove_shards
from tests.support.foreign import FOREIGN
from tests.support.odd_modules import ODD, make_odd
from tests.support.rewritten import rewritten
from tests.support.zoo import FAMILIES, WALKED

REFUSED = {"falcon": "1 kv heads"}  # one kv head for all queries
SMALL: dict[str, dict[str, Any]] = {
    "adakv": {"window": 4},
    "attention_gate": {"chunk": 8},
    "compactor": {"start": 2, "recent_tokens": 2, "sketch": 4, "block": 5},
    "criticalkv": {"window": 4},
    "duo_attention": {"start": 2, "chunk": 8},
    "fast_kvzip": {"n_sink": 1, "window": 2, "decode_window": 2},
    "finch": {"window": 4},
    "full": {},
    "keydiff": {"chunk": 8},
    "kvzap": {"threshold": 0.0, "window": 4},
    "lagkv": {"n_sink": 2, "lag_size": 3},
    "leverage": {"sketch": 4},
    "locret": {"chunk": 8, "stabilizers": 4, "local_tail": 2},
    "locret_q": {"chunk": 8, "stabilizers": 4, "local_tail": 2, "start": 2},
    "nacl": {"interval": 2},
    "infllm": {"start": 2, "block": 4, "blocks": 2, "chunk": 8},
    "non_causal_attn": {"block": 5},
    "pyramidkv": {"window": 4},
    "qfilters": {"window": 3},
    "random_attention": {"buffer": 2, "protect_prompt": False},
    "scissorhands": {"history": 8, "recent_tokens": 2},
    "sirllm": {"chunk": 8},
    "snapkv": {"window": 4},
    "trim_kv": {"buffer_size": 2, "retention_gate": "rg2"},
}
UNBOUNDED = ("attention_gate", "full", "kvzap")


def options(policy: str) -> dict[str, Any]:
    budget = {} if policy in UNBOUNDED else {"budget": 12}
    return {**budget, **SMALL.get(policy, {})}


def tiers(values: Any, often: tuple[str, ...]) -> list[Any]:
    """All values; those that prove the most with every run, the others with the thorough ones."""
    return [v if v in often else pytest.param(v, marks=pytest.mark.thorough) for v in values]


@pytest.mark.parametrize("family", tiers([*FAMILIES, *WALKED, *FOREIGN], ("phi3",)))
def test_families(family: str) -> None:
    program = rewritten(family, "h2o", budget=12).program
    if family in REFUSED:
        with pytest.raises(OptionError, match=REFUSED[family]):
            prove_shards(program, 2)
    else:
        prove_shards(program, 2)


@pytest.mark.parametrize(
    "policy",
    tiers(sorted(POLICIES.keys() - {"kvzip"}), ("tova", "nacl")),
)
def test_policies(policy: str) -> None:
    program = rewritten("llama", policy, **options(policy)).program
    refused = {"r_kv": "it carries queries", "infllm": "no process has them all"}
    if policy in refused:
        with pytest.raises(OptionError, match=refused[policy]):
            prove_shards(program, 2)
        return
    prove_shards(program, 2)


@pytest.mark.parametrize("name", tiers(ODD, ("SharedLinear",)))
def test_what_a_careless_cut_gets_wrong(name: str) -> None:
    program = kvrewrite.transform(make_odd(name), "h2o", budget=12, check="off").program
    prove_shards(program, 2)
    cut = shard(program, Peers(0, 2, "nobody")).parallel.cut
    fused = cut.get("blocks.0.attention.qkv.weight")
    whole = ("WholeNorm", "Interleaved", "SharedLinear")
    assert fused == (None if name in whole else (0, (32, 32, 32)))
    assert ("blocks.0.mlp.up.weight" in cut) == (name != "RolledMlp")
    assert cut["head.weight"] == (0, (96,))  # also the table of embeddings


def test_the_proof_finds_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    program = kvrewrite.transform(make_odd("RolledMlp"), "h2o", budget=12, check="off").program
    monkeypatch.setitem(RULES, torch.ops.aten.roll.default, pointwise)
    with pytest.raises(UnsupportedModelError, match="differs from itself in one process"):
        prove_shards(program, 2)


@pytest.mark.parametrize(
    ("split", "old", "new", "expected"),
    [
        (Split(2, (64,)), (3, 11, 64), (3, 11, 4, 16), Split(2, (4,))),  # channels into heads
        (Split(2, (4,)), (3, 11, 4, 16), (3, 11, 64), Split(2, (64,))),
        (Split(1, (64,)), (33, 64), (3, 11, 4, 16), Split(2, (4,))),
        (Split(2, (64, 32, 32)), (3, 11, 128), (3, 11, 8, 16), Split(2, (4, 2, 2))),  # fused, into heads
        (Split(2, (32, 32, 32)), (3, 11, 96), (3, 11, 3, 4, 8), Split(3, (4,))),  # fused, q, k and v apart
        (Split(2, (2, 2)), (3, 11, 4, 16), (3, 11, 64), Split(2, (32, 32))),
        (Split(2, (6,)), (3, 11, 6), (3, 11, 2, 3), Split(2, (2,))),
        (Split(2, (6,)), (3, 11, 6), (3, 11, 3, 2), None),  # a block ends inside
        (Split(1, (4,)), (3, 4, 11), (12, 11), None),  # rows stand outside of heads
        (Split(2, (4,)), (3, 11, 4), (3, 44), None),
    ],
)
def test_views(split: Split, old: tuple[int, ...], new: tuple[int, ...], expected: Split | None) -> None:
    assert regroup(split, old, new, 2) == expected
    if expected is None:
        return
    x = torch.arange(torch.Size(old).numel()).view(old)
    whole = x.view(new)
    for rank in range(2):
        own = cut_tensor(x, split.dim, split.parts, Peers(rank, 2, ""))
        sizes = list(new)
        sizes[expected.dim] //= 2
        assert torch.equal(own.reshape(sizes), cut_tensor(whole, expected.dim, expected.parts, Peers(rank, 2, "")))


def test_refusals() -> None:
    program = rewritten("llama", "h2o", budget=12).program
    with pytest.raises(
        OptionError, match="2 kv heads, which can't be dealt out over 3 processes; expected 2 processes"
    ):
        shard(program, Peers(0, 3, "nobody"))
    with pytest.raises(OptionError, match="part of a model already"):
        shard(shard(program, Peers(0, 2, "nobody")), Peers(0, 2, "nobody"))
    with pytest.raises(OptionError, match="merge=True"):
        shard(rewritten("llama", "h2o", budget=12, merge=True).program, Peers(0, 2, "nobody"))


@pytest.mark.parametrize("quantize", ["int8", pytest.param("int4", marks=pytest.mark.thorough)])
def test_quantized_caches(quantize: str) -> None:
    options = {"quantize": quantize, "quantize_residual": 8, "quantize_group": 8, "budget": 20}
    prove_shards(rewritten("llama", "h2o", **options).program, 2)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("h2o", {"head_budgets": "adakv", "head_floor": 0.0}),
        pytest.param("fast_kvzip", {**SMALL["fast_kvzip"], "interval": 1}, marks=pytest.mark.thorough),
        pytest.param("fast_kvzip", {**SMALL["fast_kvzip"], "scope": "layer"}, marks=pytest.mark.thorough),
        pytest.param("adakv", {"window": 4, "head_floor": 0.0}, marks=pytest.mark.thorough),
        pytest.param("kvzap", {**SMALL["kvzap"], "budget": None}, marks=pytest.mark.thorough),
        pytest.param("duo_attention", {"start": 2}, marks=pytest.mark.thorough),
    ],
)
def test_ranks_whose_heads_hold_different_numbers_of_pages(policy: str, options: dict[str, Any]) -> None:
    chunk = {} if policy == "adakv" else {"chunk": 70}
    program = rewritten("llama", policy, **{"budget": 90, **chunk, **options}).program
    prove_shards(program, 2, tokens=210)
