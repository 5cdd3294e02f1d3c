"""A rewritten model shares its parameters: what other weights would change stays live in the graph, or the model is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import kvrewrite
from kvrewrite.capture import export
from kvrewrite.errors import UnsupportedModelError
from tests.support.foreign import HEAD_DIM, HEADS, MAX_LENGTH, VOCAB, Decoder, Projections
from tests.support.products import few


@pytest.fixture(autouse=True)
def one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these modules looks at how many tokens there are: what `capture` traces for one token and one row is left out."""
    monkeypatch.setattr(export, "why_not_single", lambda *_: None)


Core = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def distance(x: Tensor) -> Tensor:
    at = torch.arange(x.shape[2])
    return at[:, None] - at


def softmax(q: Tensor, k: Tensor, v: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Causal attention with something done to the scores."""
    scores = change(q @ k.mT * HEAD_DIM**-0.5)
    return scores.masked_fill(distance(q) < 0, -math.inf).softmax(-1) @ v


def decoder(core: Core, **state: Tensor) -> Decoder:
    """A layer of attention `core(self, q, k, v)`; state: its parameters (those of requires_grad) and persistent buffers."""

    class Attention(Projections):
        def __init__(self) -> None:
            super().__init__()
            for name, value in state.items():
                if value.requires_grad:
                    self.register_parameter(name, nn.Parameter(value.detach().clone()))
                else:
                    self.register_buffer(name, value.clone())

        def forward(self, x: Tensor) -> Tensor:
            return self.merge(core(self, *self.split(x)))

    class Model(Decoder):
        def make_attention(self) -> nn.Module:
            return Attention()

    torch.manual_seed(0)
    model = Model().eval()
    model.blocks = model.blocks[:1]
    return model


def learned(value: Any) -> Tensor:
    return torch.as_tensor(value).clone().requires_grad_()


def changed(model: Decoder, names: set[str]) -> dict[str, Tensor]:
    """A state dict in which the values of these names are others."""
    generator = torch.Generator().manual_seed(7)
    return {
        n: v + 0.3 + torch.rand(v.shape, generator=generator) if n.split(".")[-1] in names else v
        for n, v in model.state_dict().items()
    }


def flex(change: Callable[..., Tensor]) -> Core:
    def core(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def score(x: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i >= j, change(s, x, h, i - j), -math.inf)

        return flex_attention(q, k, v, score_mod=score)

    return core


def alibi_sdpa(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = -s.slopes.view(-1, 1, 1) * distance(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(distance(q) < 0, -math.inf))


LIVE: dict[str, Decoder] = {
    "temperature": decoder(lambda s, *qkv: softmax(*qkv, lambda x: x * s.t), t=learned(1.0)),
    "its exponential": decoder(lambda s, *qkv: softmax(*qkv, lambda x: x * s.t.exp()), t=learned(0.2)),
    "a divisor": decoder(lambda s, *qkv: softmax(*qkv, lambda x: x / F.softplus(s.t)), t=learned(0.2)),
    "one a head, as in Swin-V2": decoder(
        lambda s, q, k, v: softmax(
            F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, lambda x: x * s.t.clamp(max=math.log(100)).exp()
        ),
        t=learned(torch.full((HEADS, 1, 1), math.log(10.0))),
    ),
    "two of them": decoder(
        lambda s, *qkv: softmax(*qkv, lambda x: x * s.t * s.u.view(1, -1, 1, 1)), t=learned(1.0), u=learned(torch.ones(HEADS))
    ),
    "before a softcap": decoder(lambda s, *qkv: softmax(*qkv, lambda x: 5 * torch.tanh(x * s.t / 5)), t=learned(2.0)),
    "temperature in a buffer": decoder(lambda s, *qkv: softmax(*qkv, lambda x: x * s.t), t=torch.tensor(1.0)),
    "zero slopes": decoder(
        lambda s, *qkv: softmax(*qkv, lambda x: x - s.slopes.view(-1, 1, 1) * distance(qkv[0])),
        slopes=learned(torch.zeros(HEADS)),
    ),
    "slopes in a buffer": decoder(
        lambda s, *qkv: softmax(*qkv, lambda x: x - s.slopes.view(-1, 1, 1) * distance(qkv[0])),
        slopes=2.0 ** -torch.arange(1.0, HEADS + 1),
    ),
    "slopes and temperature": decoder(
        lambda s, *qkv: softmax(*qkv, lambda x: x * s.t - s.slopes.view(-1, 1, 1) * distance(qkv[0])),
        slopes=learned(torch.zeros(HEADS)),
        t=learned(1.5),
    ),
    "zero slopes for sdpa": decoder(alibi_sdpa, slopes=learned(torch.zeros(HEADS))),
    "temperature for flex_attention": decoder(flex(lambda s, x, h, d: x * s.t), t=learned(1.0)),
    "zero slopes for flex_attention": decoder(
        flex(lambda s, x, h, d: x - s.slopes[h] * d), slopes=learned(torch.zeros(HEADS))
    ),
    "a key factor a head after the repeat": decoder(
        lambda s, q, k, v: softmax(q, k[:, :1].repeat(1, HEADS, 1, 1) * s.u, v, lambda x: x), u=learned(torch.ones(HEADS, 1, 1))
    ),
}  # fmt: skip


# The same places with other formulas: in the thorough tier.
MORE = {
    "temperature", "its exponential", "a divisor", "two of them", "temperature in a buffer", "zero slopes",
    "zero slopes for flex_attention",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.thorough) if n in MORE else n for n in LIVE])
def test_it_stays_live(name: str) -> None:
    """Other weights loaded into the original change the rewritten model alike, in one call and in pieces."""
    model = LIVE[name]
    small = kvrewrite.transform(model, "full", budget=MAX_LENGTH)
    ids = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids)
        torch.testing.assert_close(small(ids).logits, before, atol=1e-5, rtol=1e-5)
        model.load_state_dict(changed(model, {"t", "u", "slopes"}))
        expected = model(ids)
        assert float((expected - before).abs().max()) > 1e-3
        torch.testing.assert_close(small(ids).logits, expected, atol=1e-5, rtol=1e-5)
        cache = small.new_cache(2)
        parts = [small(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 9), (9, 10), (10, 20))]
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)


REFUSED: dict[str, tuple[Decoder, str]] = {
    "relative bias that is zero": (
        decoder(
            lambda s, *qkv: softmax(*qkv, lambda x: x + s.rel[distance(qkv[0]).clamp(0, 63)].permute(2, 0, 1)),
            rel=learned(torch.zeros(64, HEADS)),
        ),
        "parameter blocks.0.attention.rel",
    ),
    "the same for sdpa": (
        decoder(
            lambda s, q, k, v: F.scaled_dot_product_attention(
                q, k, v, s.rel[distance(q).clamp(0, 63)].permute(2, 0, 1).masked_fill(distance(q) < 0, -math.inf)
            ),
            rel=learned(torch.zeros(64, HEADS)),
        ),
        "parameter blocks.0.attention.rel",
    ),
    "softcap": (
        decoder(lambda s, *qkv: softmax(*qkv, lambda x: s.cap * torch.tanh(x / s.cap)), cap=learned(5.0)),
        "parameter blocks.0.attention.cap",
    ),
    "temperature of scores and bias": (
        decoder(lambda s, *qkv: softmax(*qkv, lambda x: (x - 0.5 * distance(qkv[0])) * s.t), t=learned(1.0)),
        "parameter blocks.0.attention.t",
    ),
    "window": (
        decoder(
            lambda s, *qkv: softmax(*qkv, lambda x: x.masked_fill(distance(qkv[0]) > s.w, -math.inf)), w=torch.tensor(5.0)
        ),
        "buffer blocks.0.attention.w.*persistent=False",
    ),
    "factor of the weights that is one": (
        decoder(
            lambda s, q, k, v: (q @ k.mT).masked_fill(distance(q) < 0, -math.inf).softmax(-1) * s.t @ v,
            t=learned(torch.ones(HEADS, 1, 1)),
        ),
        "weights are changed between the softmax",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    model, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=reason):
        kvrewrite.inspect(model)


MASKS: dict[str, tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
    "ones and zeros": (torch.ones(MAX_LENGTH, MAX_LENGTH).tril(), lambda x, m: x.masked_fill(m == 0, -math.inf)),
    "-inf": (torch.full((MAX_LENGTH, MAX_LENGTH), -math.inf).triu(1), lambda x, m: x + m),
    "-1e9 times": (torch.ones(MAX_LENGTH, MAX_LENGTH).tril(), lambda x, m: x * m - 1e9 * (1 - m)),
    "booleans": (
        torch.ones(MAX_LENGTH, MAX_LENGTH, dtype=torch.bool).tril(),
        lambda x, m: x.masked_fill(~m, -math.inf),
    ),
}


@pytest.mark.parametrize("name", few(MASKS, rest=("ones and zeros", "-inf")))
def test_a_mask_in_the_state_dict_is_a_constant(name: str) -> None:
    table, mask = MASKS[name]

    def core(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mask(q @ k.mT * HEAD_DIM**-0.5, s.table[: q.shape[2], : q.shape[2]]).softmax(-1) @ v

    assert [site.window for site in kvrewrite.inspect(decoder(core, table=table))] == [0]


def test_conversion_without_weights(tmp_path: Path) -> None:
    """Parameters have no values there, so none may be read off."""
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Config(PretrainedConfig):
        model_type = "kvrewrite_test_temperature"

    class Model(PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.decoder = decoder(lambda s, *qkv: softmax(*qkv, lambda x: x * s.t.exp()), t=learned(0.0))
            self.post_init()

        def get_input_embeddings(self) -> nn.Module:
            return self.decoder.wte

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
            return CausalLMOutputWithPast(logits=self.decoder(input_ids))

    AutoConfig.register("kvrewrite_test_temperature", Config)
    AutoModelForCausalLM.register(Config, Model)
    torch.manual_seed(0)
    model = Model(Config(vocab_size=VOCAB)).eval()
    with torch.no_grad():
        for block in model.decoder.blocks:
            block.attention.t.fill_(1.3)
    model.save_pretrained(tmp_path / "model")
    kvrewrite.convert(tmp_path / "model", tmp_path / "out", "full", budget=MAX_LENGTH)
    small = kvrewrite.load(tmp_path / "out")
    ids = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
