"""What the pass that deals a program out over ranks makes of whole models: proved beside the program in one process."""

from __future__ import annotations

from typing import Any

import pytest

from kvrewrite.errors import OptionError
from kvrewrite.ir.parallel import Peers
from kvrewrite.passes.shard.shard import shard
from kvrewrite.policies import POLICIES
from kvrewrite.runtime.sharding_proof import prove_shards
from tests.support.foreign import FOREIGN
from tests.support.rewritten import rewritten
from tests.support.zoo import FAMILIES, WALKED

REFUSED = {"falcon": "1 kv heads"}  # one kv head for all queries
SMALL: dict[str, dict[str, Any]] = {
    "adakv": {"window": 4},
    "attention_gate": {"chunk": 8},
    "duo_attention": {"start": 2, "chunk": 8},
    "fast_kvzip": {"n_sink": 1, "window": 2, "decode_window": 2, "scope": "head"},
    "full": {},
    "keydiff": {"chunk": 8},
    "kvzap": {"threshold": 0.0, "window": 4},
    "locret": {"chunk": 8, "stabilizers": 4, "local_tail": 2},
    "locret_q": {"chunk": 8, "stabilizers": 4, "local_tail": 2, "start": 2},
    "nacl": {"interval": 2},
    "pyramidkv": {"window": 4},
    "scissorhands": {"history": 8, "recent_tokens": 2},
    "sirllm": {"chunk": 8},
    "snapkv": {"window": 4},
    "trim_kv": {"buffer_size": 2, "retention_gate": "rg2"},
}
UNBOUNDED = ("attention_gate", "full", "kvzap")


def options(policy: str) -> dict[str, Any]:
    budget = {} if policy in UNBOUNDED else {"budget": 12}
    return {**budget, **SMALL.get(policy, {})}


def cut(name: str, policy: str = "h2o", ranks: int = 2, **changes: Any) -> Any:
    program = rewritten(name, policy, **{**options(policy), **changes}).program
    return shard(program, Peers(0, ranks, "nobody"))


def tiers(values: Any, often: tuple[str, ...]) -> list[Any]:
    """All values; those that prove the most with every run, the others with the thorough ones."""
    return [v if v in often else pytest.param(v, marks=pytest.mark.thorough) for v in values]


@pytest.mark.parametrize(
    "family", tiers([*FAMILIES, *WALKED, *FOREIGN], ("gpt2", "phi3", "gemma2", "mixtral", "deepseek_v3", "TorchMHA"))
)
def test_families(family: str) -> None:
    program = rewritten(family, "h2o", budget=12).program
    if family in REFUSED:
        with pytest.raises(OptionError, match=REFUSED[family]):
            prove_shards(program, 2)
    else:
        prove_shards(program, 2)


@pytest.mark.parametrize(
    "policy",
    tiers(sorted(POLICIES), ("streaming_llm", "tova", "nacl", "locret", "attention_gate", "duo_attention", "sirllm")),
)
def test_policies(policy: str) -> None:
    program = rewritten("llama", policy, **options(policy)).program
    if policy == "adakv":
        with pytest.raises(OptionError, match="share one budget"):
            prove_shards(program, 2)
    else:
        prove_shards(program, 2)
