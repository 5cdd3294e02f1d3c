"""Small decoders that are no transformers models, each with its own way to write attention and positions.

Every class is built without arguments, has vocabulary 97 and maps `input_ids` (batch, length) to logits.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

VOCAB, HIDDEN, HEADS, LAYERS, MAX_LENGTH = 97, 32, 4, 2, 128
HEAD_DIM = HIDDEN // HEADS


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Projections(nn.Module):
    """q, k, v of (batch, heads, length, head dim), and the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def split(self, x: Tensor) -> list[Tensor]:
        b, s, _ = x.shape
        return [y.view(b, s, HEADS, HEAD_DIM).transpose(1, 2) for y in self.qkv(x).split(HIDDEN, dim=2)]

    def merge(self, y: Tensor) -> Tensor:
        b, _, s, _ = y.shape
        return self.out(y.transpose(1, 2).contiguous().view(b, s, HIDDEN))


class SdpaAttention(Projections):
    """Causal attention through `F.scaled_dot_product_attention`, optionally with a rotation of q and k."""

    def forward(self, x: Tensor, rotary: Any = None) -> Tensor:
        q, k, v = self.split(x)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class TrilAttention(Projections):
    """The softmax written out, with a `tril` buffer as its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(MAX_LENGTH, MAX_LENGTH))[None, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        length = x.shape[1]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(HEAD_DIM))
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        return self.merge(F.softmax(scores, dim=-1) @ v)


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention` with the mask that its documentation suggests."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return self.attention(x, x, x, attn_mask=mask, need_weights=self.need_weights)[0]


def causal_score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """A flex_attention score modification that is the causal mask."""
    return torch.where(q >= kv, score, -float("inf"))


def causal_mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """A flex_attention mask function."""
    return q >= kv


class FlexAttention(Projections):
    """Causal attention through `flex_attention`, with a score function or a block mask."""

    def __init__(self, block_mask: bool) -> None:
        super().__init__()
        self.block_mask = block_mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        if not self.block_mask:
            return self.merge(flex_attention(q, k, v, score_mod=causal_score))
        length = x.shape[1]
        mask = create_block_mask(causal_mask, None, None, length, length, device=x.device.type)
        return self.merge(flex_attention(q, k, v, block_mask=mask))


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attention, self.mlp = attention, Mlp()

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        x = x + self.attention(self.norm_1(x), *args)
        return x + self.mlp(self.norm_2(x))


class Decoder(nn.Module):
    """What the models below share; each says how it makes its attention and where its positions come from."""

    has_wpe: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, HIDDEN)
        if self.has_wpe:
            self.wpe = nn.Embedding(MAX_LENGTH, HIDDEN)
        self.blocks = nn.ModuleList(Block(self.make_attention()) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def make_attention(self) -> nn.Module:
        return SdpaAttention()

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))

    def extras(self, ids: Tensor) -> tuple[Any, ...]:
        return ()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        extras = self.extras(input_ids)
        for block in self.blocks:
            x = block(x, *extras)
        return self.head(self.norm(x))


class NanoGPT(Decoder):
    """Learned positions looked up with an `arange`; `F.scaled_dot_product_attention(is_causal=True)`."""


class WpeSlice(Decoder):
    """Learned positions as the first rows of the table."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe.weight[: ids.shape[1]]


class ManualSoftmaxTril(Decoder):
    """The softmax written out, masked by a `tril` buffer."""

    def make_attention(self) -> nn.Module:
        return TrilAttention()


class TorchMHA(Decoder):
    """`nn.MultiheadAttention(need_weights=False)`."""

    def make_attention(self) -> nn.Module:
        return TorchAttention(need_weights=False)


class TorchMHAWeights(Decoder):
    """`nn.MultiheadAttention(need_weights=True)`."""

    def make_attention(self) -> nn.Module:
        return TorchAttention(need_weights=True)


class FlexScoreMod(Decoder):
    """`flex_attention` with a causal score function."""

    def make_attention(self) -> nn.Module:
        return FlexAttention(block_mask=False)


class FlexBlockMask(Decoder):
    """`flex_attention` with a causal block mask."""

    def make_attention(self) -> nn.Module:
        return FlexAttention(block_mask=True)


def angles() -> Tensor:
    """Rotary angles (positions, head dim / 2)."""
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return torch.outer(torch.arange(MAX_LENGTH).float(), inv_freq)


class RopeTable(Decoder):
    """RoPE from the first rows of cosine and sine tables."""

    has_wpe = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cos", angles().cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles().sin().repeat(1, 2), persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids)

    def extras(self, ids: Tensor) -> tuple[Any, ...]:
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]

        def rotate(x: Tensor) -> Tensor:
            one, two = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-two, one], dim=-1) * sin

        return (rotate,)


class RopeTableComplex(Decoder):
    """RoPE as in Llama's first code: a table seen as complex numbers, broadcast over (batch, length, heads, dim)."""

    has_wpe = False

    def __init__(self) -> None:
        super().__init__()
        table = torch.polar(torch.ones(MAX_LENGTH, HEAD_DIM // 2), angles())
        self.register_buffer("freqs", torch.view_as_real(table), persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids)

    def extras(self, ids: Tensor) -> tuple[Any, ...]:
        freqs = torch.view_as_complex(self.freqs[: ids.shape[1]])[None, :, None]

        def rotate(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.transpose(1, 2).reshape(*x.transpose(1, 2).shape[:-1], -1, 2))
            return torch.view_as_real(pairs * freqs).flatten(3).transpose(1, 2)

        return (rotate,)


FOREIGN: dict[str, type[Decoder]] = {
    c.__name__: c
    for c in (
        NanoGPT,
        WpeSlice,
        ManualSoftmaxTril,
        TorchMHA,
        TorchMHAWeights,
        FlexScoreMod,
        FlexBlockMask,
        RopeTable,
        RopeTableComplex,
    )
}


def make_foreign(name: str, seed: int = 0) -> Decoder:
    """A model of `FOREIGN` with weights that depend on `seed` only."""
    torch.manual_seed(seed)
    return FOREIGN[name]().eval()
