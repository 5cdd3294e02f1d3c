"""Models that no honest rewrite exists for are refused, each with the layer and the reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kvrewrite
from kvrewrite.errors import CaptureError, UnsupportedModelError
from tests.zoo import REFUSED, make

REASONS = {
    "dbrx": (CaptureError, "Data-dependent control flow"),
    "doge": (UnsupportedModelError, r"layer 0 \(model.layers.0.self_attn\).*depends on the content"),
    "deepseek_v32": (UnsupportedModelError, r"layer 0 \(model.layers.0.self_attn\).*depends on the content"),
    "lfm2": (UnsupportedModelError, r"layer 0 \(model.layers.0\): no attention"),
    "bamba": (UnsupportedModelError, r"layer 0 \(model.layers.0\): no attention"),
}


def test_every_refused_family_has_its_reason_here() -> None:
    assert set(REASONS) == set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_families(name: str) -> None:
    error, reason = REASONS[name]
    with pytest.raises(error, match=reason):
        kvrewrite.inspect(make(name))


class Decoder(nn.Module):
    """One attention layer and something else that looks at other tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(97, 32)
        self.qkv = nn.Linear(32, 96)
        self.conv = nn.Conv1d(32, 32, 3, padding=2)
        self.head = nn.Linear(32, 97)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.mix(x))

    def mix(self, x: Tensor) -> Tensor:
        return x


class Convolution(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x + self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class RunningSum(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x + x.cumsum(1)


class TokenShift(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x + F.pad(x, (0, 0, 1, 0))[:, :-1]


class LinearAttention(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x + x @ (x.transpose(1, 2) @ x)


class Pooled(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


class Rolled(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x + x.roll(1, 1)


class LogSumExp(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x + torch.logsumexp(x, 1, keepdim=True)


def test_attention_alone_is_accepted() -> None:
    assert len(kvrewrite.inspect(Decoder())) == 1


@pytest.mark.parametrize("model", [Convolution, RunningSum, TokenShift, LinearAttention, Pooled, Rolled, LogSumExp])
def test_state_besides_the_cache(model: type[Decoder]) -> None:
    with pytest.raises(UnsupportedModelError, match="keeps state besides its keys and values"):
        kvrewrite.inspect(model())


def test_no_attention() -> None:
    with pytest.raises(UnsupportedModelError, match="no attention was found"):
        kvrewrite.inspect(nn.Sequential(nn.Embedding(97, 16), nn.Linear(16, 97)))


def test_bidirectional_attention() -> None:
    class Bidirectional(Decoder):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    with pytest.raises(UnsupportedModelError, match="causal"):
        kvrewrite.inspect(Bidirectional())


def test_not_logits() -> None:
    class Nothing(Decoder):
        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"loss": super().forward(input_ids).sum()}

    with pytest.raises(CaptureError, match="expected a logits tensor"):
        kvrewrite.inspect(Nothing())
