"""Decoders with something in them that a careless cut by heads or channels would get wrong in silence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.foreign import HEAD_DIM, HEADS, HIDDEN, Block, Decoder, Projections, SdpaAttention


class HeadMixing(SdpaAttention):
    """Queries of every head are mixed into every other's before attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HEADS, HEADS, bias=False)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        q, k, v = self.split(x)
        q = self.mix(q.transpose(1, 3)).transpose(1, 3)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class OutputMixing(SdpaAttention):
    """A norm over all heads' outputs together, and a gate by the layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        b, s, _ = x.shape
        y = F.scaled_dot_product_attention(*self.split(x), is_causal=True)
        return self.out(self.norm(y.transpose(1, 2).reshape(b, s, HIDDEN)) * self.gate(x).sigmoid())


class WholeNorm(SdpaAttention):
    """Keys are normed over all heads together before they are cut into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def split(self, x: Tensor) -> list[Tensor]:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).split(HIDDEN, dim=2)
        return [y.view(b, s, HEADS, HEAD_DIM).transpose(1, 2) for y in (q, self.norm(k), v)]


class Interleaved(Projections):
    """One linear gives q, k and v of head after head, and heads are counted last."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (y.permute(0, 3, 1, 2) for y in self.qkv(x).view(b, s, HEAD_DIM, HEADS, 3).unbind(-1))
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Stacked(Projections):
    """q, k and v stacked before the heads, as many a small GPT has it."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, s, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class SharedLinear(SdpaAttention):
    """The same linear makes queries and keys, and comes back after attention."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.value = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (
            y.view(b, s, HEADS, HEAD_DIM).transpose(1, 2) for y in (self.both(x), self.both(2 * x), self.value(x))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.both(y.transpose(1, 2).reshape(b, s, HIDDEN))


class RolledMlp(nn.Module):
    """Channels move between the two linears, the second of which is used with its transpose, too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.up(x).relu().roll(3, -1))
        return y + self.down((y @ self.down.weight).tanh())


class Odd(Decoder):
    """A model with one of the attentions; its table of embeddings is the head's, and its vocabulary divides."""

    attention: type[nn.Module] = SdpaAttention
    mlp: type[nn.Module] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(96, HIDDEN)
        self.head = nn.Linear(HIDDEN, 96, bias=False)
        self.head.weight = self.wte.weight
        if self.mlp is not None:
            for block in self.blocks:
                assert isinstance(block, Block)
                block.mlp = self.mlp()

    def make_attention(self) -> nn.Module:
        return self.attention()


class SharedLayers(Odd):
    """One block runs twice, each time with a cache of its own."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in (self.blocks[0], self.blocks[0], self.blocks[1]):
            x = block(x)
        return self.head(self.norm(x))


def make_odd(name: str) -> nn.Module:
    torch.manual_seed(0)
    kinds: dict[str, Any] = {"attention": SdpaAttention}
    if name == "SharedLayers":
        return SharedLayers().eval()
    part = globals()[name]
    kinds = {"mlp": part} if name == "RolledMlp" else {"attention": part}
    return type(name, (Odd,), kinds)().eval()


ODD = (
    *("HeadMixing", "OutputMixing", "WholeNorm", "Interleaved", "Stacked", "SharedLinear"),
    *("RolledMlp", "SharedLayers", "SdpaAttention"),
)
