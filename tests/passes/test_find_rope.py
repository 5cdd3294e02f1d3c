"""Rotations found by dependence, and read off as y = cos * x + sin * x[partner]."""

from __future__ import annotations

import pytest
import torch

from kvrewrite.ir.fx import placeholder, tensor_of
from kvrewrite.passes.canonical.find_rope import NoRope, Rope, find_rope
from kvrewrite.passes.insert.cache import site_nodes
from tests.support.foreign import FOREIGN
from tests.support.rewritten import captured
from tests.support.zoo import FAMILIES

ROTARY = [
    "llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "gpt_neox", "mixtral", "qwen3_moe", "gpt_oss",
    "gemma3n_text", "RopeTable", "RopeTableComplex",
]  # fmt: skip
UNROTATED = ["gpt2", "opt", "bloom", "falcon", "NanoGPT"]


def rope_of(name: str) -> Rope | NoRope:
    found = captured(name)
    node = site_nodes(found.graph)[0]
    site, position_ids = node.meta["kvrewrite_site"], placeholder(found.graph, "position_ids")
    return find_rope(found.graph, node.args[1], site.kv_heads, position_ids, found.max_positions)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [n for n in ROTARY if n in FAMILIES or n in FOREIGN])
def test_rotation_is_found_and_is_a_rotation(name: str) -> None:
    rope = rope_of(name)
    assert isinstance(rope, Rope), rope.reason
    value = tensor_of(rope.pre)
    assert value is not None and value.dim() == 4
    lengths = [n for n in rope.table.graph.nodes if n.op == "placeholder"][1:]
    assert not lengths  # tables by length become inputs only when a cache is inserted
    cos, sin = rope.table(torch.arange(9))
    dim = len(rope.partner)
    assert cos.shape == sin.shape == (9, dim)
    # No position, no rotation (up to a scaling factor); pairs turn by the same angle in opposite directions.
    assert torch.allclose(sin[0], torch.zeros(dim), atol=1e-6)
    assert torch.allclose(cos, cos[:, rope.partner], atol=1e-6)
    turned = rope.partner != torch.arange(dim)
    assert torch.allclose(sin[:, turned], -sin[:, rope.partner][:, turned], atol=1e-6)
    assert torch.equal(rope.partner[rope.partner], torch.arange(dim))
    length = (cos**2 + sin**2)[:, turned]
    assert torch.allclose(length, length[:1].expand_as(length), atol=1e-4)


@pytest.mark.parametrize("name", [n for n in UNROTATED if n in FAMILIES or n in FOREIGN])
def test_no_rotation(name: str) -> None:
    rope = rope_of(name)
    assert not rope and isinstance(rope, NoRope) and not rope.rotated


def test_partial_rotation() -> None:
    rope = rope_of("gpt_neox")
    assert isinstance(rope, Rope)
    assert int((rope.partner != torch.arange(len(rope.partner))).sum()) == len(rope.partner) // 4  # rotary_pct 0.25


def test_llama_against_the_formula() -> None:
    rope = rope_of("qwen2")
    assert isinstance(rope, Rope)
    cos, sin = rope.table(torch.arange(50))
    dim = len(rope.partner)
    angle = torch.outer(torch.arange(50.0), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    assert torch.allclose(cos, torch.cat([angle.cos(), angle.cos()], 1), atol=1e-5)
    assert torch.allclose(sin, torch.cat([-angle.sin(), angle.sin()], 1), atol=1e-5)


def test_latent_attention_is_refused_with_its_reason() -> None:
    rope = rope_of("deepseek_v3")
    assert isinstance(rope, NoRope) and rope.rotated and "MLA" in rope.reason
