"""Ops of grouped arguments: the flat schemas that artifacts were written with, and groups that are added later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvrewrite.ops  # noqa: F401  (registers the ops)
from kvrewrite.kernels.groups import Eviction, Logits, Packing, Tokens, VisibleBlocks
from kvrewrite.ops.groups import Fields, define

SCHEMAS: dict[str, str] = json.loads((Path(__file__).parent / "schemas.json").read_text())


def test_schemas_are_those_of_artifacts() -> None:
    """Graphs of saved models call ops by their flat arguments. What an op gets anew comes last and has a default."""
    for name, recorded in SCHEMAS.items():
        schema = getattr(torch.ops.kvrewrite, name).default._schema
        begins, _, returns = recorded.rpartition(") -> ")
        assert str(schema).startswith(begins) and str(schema).rpartition(") -> ")[2] == returns, name
        count = len(torch._C.parse_schema(recorded).arguments)
        assert all(argument.has_default_value() for argument in schema.arguments[count:]), name
    assert len(SCHEMAS) >= 38


SUM = Fields(Logits, "extra=sinks scale")
sum_op = define("sum", Tokens, "Tensor rows", SUM, "int[] sizes", Fields(Logits, "window", optional=True),
                returns="Tensor", namespace="kvrewrite_test_groups")  # fmt: skip


@sum_op
def _sum(tokens: Tokens, rows: Tensor, logits: Logits, sizes: list[int]) -> Tensor:
    total = (tokens.q + tokens.k + tokens.v) * logits.scale + rows + logits.window + sum(sizes)
    return total if logits.sinks is None else total + logits.sinks


@sum_op.fake
def _(tokens: Tokens, rows: Tensor, logits: Logits, sizes: list[int]) -> Tensor:
    return torch.empty_like(tokens.q)


def test_groups_come_whole() -> None:
    """Some fields of a group, under other names and in two places, are one parameter; fields that are nowhere have defaults."""
    op = torch.ops.kvrewrite_test_groups.sum
    assert str(op.default._schema).partition("::")[2] == (
        "sum(Tensor q, Tensor k, Tensor v, Tensor rows, Tensor? extra, float scale, int[] sizes, SymInt window=0) -> Tensor"
    )
    one = torch.ones(2)
    assert op(one, one, one, one, None, 0.5, [1, 2]).tolist() == [5.5, 5.5]
    assert op(one, one, one, one, one, 0.5, [1, 2], window=3).tolist() == [9.5, 9.5]
    assert _sum(Tokens(one, one, one), one, Logits(scale=2.0), []).tolist() == [7.0, 7.0]
    torch.library.opcheck(op.default, (one, one, one, one, one, 0.5, [1], 4))


@pytest.mark.parametrize("reserved", [Packing, VisibleBlocks])
def test_reserved_groups_change_no_call(reserved: Any) -> None:
    """An op gets such a group as its last piece: calls without it mean what they meant."""
    names = [f"attend_{reserved.__name__.lower()}{suffix}" for suffix in ("", "_more")]
    seen: list[Any] = []

    def before(tokens: Tokens) -> Tensor:
        return tokens.q + tokens.k

    def after(tokens: Tokens, more: Any) -> Tensor:
        seen.append(more)
        return tokens.q + tokens.k

    define(names[0], Tokens, returns="Tensor", namespace="kvrewrite_test_groups")(before)
    extended = Fields(reserved, optional=True)
    define(names[1], Tokens, extended, returns="Tensor", namespace="kvrewrite_test_groups")(after)
    old, new = (getattr(torch.ops.kvrewrite_test_groups, name) for name in names)
    x = torch.ones(3)
    arguments = new.default._schema.arguments
    assert [a.name for a in arguments[:3]] == [a.name for a in old.default._schema.arguments]
    assert [a.name for a in arguments[3:]] == list(reserved._fields) and all(
        a.has_default_value() for a in arguments[3:]
    )
    assert torch.equal(old(x, x, x), new(x, x, x)) and seen == [reserved()]
    index = torch.zeros(1, dtype=torch.int32)
    new(x, x, x, index)
    assert seen[-1][0] is index


def test_writes_are_declared() -> None:
    op = define(
        "put",
        "Tensor pool",
        Fields(Eviction, "select"),
        returns="()",
        writes=["pool"],
        namespace="kvrewrite_test_groups",
    )

    @op
    def put(pool: Tensor, eviction: Eviction) -> None:
        pool.add_(1)

    target = torch.ops.kvrewrite_test_groups.put
    assert target.default._schema.is_mutable and target.default._schema.arguments[0].alias_info.is_write
    pool = torch.zeros(2)
    target(pool, None)
    assert pool.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"other writes to \['lens'\], which it does not take"):
        define("other", Tokens, returns="()", writes=["lens"], namespace="kvrewrite_test_groups")
