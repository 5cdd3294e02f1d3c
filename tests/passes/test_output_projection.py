"""The weight that a layer's attention goes into: found whatever the model writes, and refused where there is none."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvrewrite
from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import get_attr
from tests.support.rewritten import build, original, rewritten
from tests.support.zoo import VOCAB

POLICY: dict[str, Any] = {"policy": "criticalkv", "budget": 8, "window": 3}


class Layer(nn.Module):
    """Attention by hand; what comes between it and its projection is the test's."""

    def __init__(self, between: str):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32, bias=False) for _ in range(4))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.between == "gate":
            found = found * torch.sigmoid(q)
        if self.between == "shuffled":
            return self.out(found.permute(0, 2, 3, 1).reshape(b, t, 32))
        found = found.transpose(1, 2).reshape(b, t, 32)
        if self.between == "computed":
            return found @ (self.out.weight * 2).t()
        if self.between == "read twice":
            return self.out(found) + found
        return found @ self.out.weight if self.between == "turned" else self.out(found)


class Model(nn.Module):
    """One such layer."""

    def __init__(self, between: str = ""):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.head = nn.Embedding(VOCAB, 32), Layer(between), nn.Linear(32, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.layer(x))


def weights_of(model: Any) -> list[Tensor]:
    """What each layer's norms are computed with, (channels out, heads * channels)."""
    found = []
    for node in model.program.graph.graph.nodes:
        if node.target is torch.ops.kvrewrite.projected_norm.default:
            weight, turned = node.args[1], False
            if weight.op != "get_attr":
                assert weight.target is torch.ops.aten.t.default
                weight, turned = weight.args[0], True
            value = get_attr(model.program.graph, weight.target)
            found.append(value.t() if turned else value)
    return found


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gpt2",
        "deepseek_v3",
        *(pytest.param(f, marks=pytest.mark.thorough) for f in ("gpt_neox", "opt", "phi3")),
    ],
)
def test_found_in_models_of_transformers(family: str) -> None:
    names = ("o_proj.weight", "attn.c_proj.weight", "attention.dense.weight", "out_proj.weight")
    ours = [w for n, w in original(family).named_parameters() if n.endswith(names)]
    expected = [w.t() if family == "gpt2" else w for w in ours]  # its weights are (channels in, channels out)
    found = weights_of(rewritten(family, "criticalkv", budget=8, window=3))
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("between", ["", "turned"])
def test_found_in_a_module(between: str) -> None:
    model = Model(between)
    weight = model.layer.out.weight
    (found,) = weights_of(kvrewrite.transform(model, **POLICY))
    assert torch.equal(found, weight.t() if between == "turned" else weight)


@pytest.mark.parametrize(
    "between, reason",
    [
        ("gate", "goes into aten.mul.Tensor before it is projected"),
        ("shuffled", "another order of heads and channels"),
        ("computed", "a weight that is computed"),
        ("read twice", "is read by 2 operations"),
    ],
)
def test_refused(between: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        kvrewrite.transform(Model(between), **POLICY)
    assert "layer 0" in str(error.value) and "snapkv" in str(error.value)
    kvrewrite.transform(Model(between), policy="snapkv", budget=8, window=3)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_adapters_are_refused_until_they_are_merged() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["o_proj"]))
    with pytest.raises(UnsupportedModelError, match="merge adapters"):
        kvrewrite.transform(adapted, **POLICY)
    kvrewrite.transform(adapted.merge_and_unload(), **POLICY)
