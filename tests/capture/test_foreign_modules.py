"""Modules from anywhere: which of what they return are logits, what they decide by, and what a capture leaves behind."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kvrewrite
from kvrewrite.errors import CaptureError, UnsupportedModelError
from tests.support.foreign import HEAD_DIM, HEADS, HIDDEN, MAX_LENGTH, VOCAB, Block, Decoder, Mlp, SdpaAttention


def check_exact(model: nn.Module, lengths: tuple[int, ...] = (1, 3, 12, 40)) -> kvrewrite.RewrittenModel:
    """The rewritten model gives the model's own logits, in one call and in pieces; returns it."""
    small = kvrewrite.transform(model.eval(), "full", budget=MAX_LENGTH)
    for length in lengths:
        ids = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            out = model(ids)
            expected = next(
                x for x in (out if isinstance(out, tuple) else (out,)) if x is not None and x.shape[-1] == VOCAB
            )
            torch.testing.assert_close(small(ids).logits, expected, atol=1e-5, rtol=1e-5)
            cache, parts, cuts = small.new_cache(2), [], [*range(0, length, 5), length]
            for a, b in itertools.pairwise(cuts):
                parts.append(small(ids[:, a:b], past_key_values=cache).logits)
            torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)
    return small


def make(**methods: Any) -> Decoder:
    """A decoder with some methods replaced; one block is enough for what does not depend on their number."""
    torch.manual_seed(0)
    model = type("Model", (Decoder,), methods)().eval()
    model.blocks = model.blocks[:1]
    return model


# ------------------------------------------------------------------------------------------------ vocabulary and logits
class PositionsFirst(Decoder):
    """The first embedding that is made is the positions'."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(64, HIDDEN)
        tables = self._modules.pop("wte"), self._modules.pop("wpe")
        rest = dict(self._modules)
        self._modules.clear()
        self._modules.update(wpe=tables[1], wte=tables[0], **rest)


class NoEmbeddingModule(Decoder):
    """The token table is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(self.wte.weight.detach().clone())
        del self.wte, self.wpe
        self.positions = nn.Parameter(torch.randn(1, MAX_LENGTH, HIDDEN))

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table) + self.positions[:, : ids.shape[1]]


@pytest.mark.parametrize("model", [PositionsFirst, NoEmbeddingModule])
def test_the_vocabulary_is_that_of_the_table_that_ids_go_into(model: type[Decoder]) -> None:
    torch.manual_seed(0)
    small = check_exact(model())
    assert small.config.vocab_size == VOCAB


def hidden_and_logits(self: Decoder, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    x = self.norm(self.embed(input_ids) + self.blocks[0](self.embed(input_ids)))
    return x, self.head(x)


def none_and_logits(self: Decoder, input_ids: Tensor) -> tuple[None, Tensor]:
    return None, Decoder.forward(self, input_ids)


def test_logits_are_what_has_the_vocabularys_size() -> None:
    check_exact(make(forward=hidden_and_logits))


def test_a_tuple_that_begins_with_nothing_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"expected a logits tensor.*Wrap the model"):
        kvrewrite.transform(make(forward=none_and_logits), "full", budget=64)


def test_a_dict_of_logits() -> None:
    model = make(forward=lambda self, input_ids: {"loss": None, "logits": Decoder.forward(self, input_ids)})
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(ids)["logits"]
        torch.testing.assert_close(
            kvrewrite.transform(model, "full", budget=64)(ids).logits, expected, atol=1e-5, rtol=1e-5
        )


def test_hidden_states_are_no_logits() -> None:
    with pytest.raises(CaptureError, match=f"hidden states: the token embedding has {VOCAB} rows of {HIDDEN}"):
        kvrewrite.inspect(make(forward=lambda self, input_ids: self.blocks[0](self.embed(input_ids))))


def test_a_head_of_another_size_than_the_table() -> None:
    model = make()
    model.head = nn.Linear(HIDDEN, 90)
    assert kvrewrite.transform(model, "full", budget=64)(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 90)


def test_logits_of_the_last_token_alone() -> None:
    """As nanoGPT's forward without targets."""
    model = make(forward=lambda self, idx, targets=None: (Decoder.forward(self, idx)[:, [-1]], None))
    with pytest.raises(CaptureError, match=r"one token of each row alone, as nanoGPT's .*wrap it in a module"):
        kvrewrite.inspect(model)


# ------------------------------------------------------------------------------------------------ decisions by size
def embed(self: Decoder, ids: Tensor) -> Tensor:
    return self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))


BRANCHES = {
    "short texts": (lambda self, ids: embed(self, ids) * (2 if ids.shape[1] < 12 else 1), "11 tokens than for 17"),
    "long texts": (lambda self, ids: embed(self, ids) * (2 if ids.shape[1] > 32 else 1), "33 tokens than for 17"),
    "multiples": (lambda self, ids: embed(self, ids) * (2 if ids.shape[1] % 8 == 0 else 1), "16 tokens than for 17"),
    "rows": (lambda self, ids: embed(self, ids) * (2 if ids.shape[0] > 4 else 1), "5 rows than for 2"),
    "another table": (
        lambda self, ids: (
            self.wte(ids) + (self.wpe.weight if ids.shape[1] > 20 else self.wpe.weight * 2)[: ids.shape[1]]
        ),
        "21 tokens than for 17",
    ),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_on_sizes_is_refused(name: str) -> None:
    code, reason = BRANCHES[name]
    with pytest.raises(UnsupportedModelError, match=rf"{reason}, in test_foreign_modules.py, line \d+"):
        kvrewrite.inspect(make(embed=code))


def limited(self: Decoder, ids: Tensor) -> Tensor:
    assert ids.shape[1] <= MAX_LENGTH, "too long"
    if ids.shape[1] < 4:
        return embed(self, ids)
    return embed(self, ids)


def warned(self: Decoder, ids: Tensor) -> Tensor:
    if ids.shape[1] > 32:
        self.long = True
    return embed(self, ids)


@pytest.mark.parametrize("code", [limited, warned])
def test_a_branch_that_changes_nothing_is_harmless(code: Any) -> None:
    check_exact(make(embed=code), (1, 3, 12, 64))


# ------------------------------------------------------------------------------------------------ state
class Counting(Decoder):
    """Counts its calls; `uses` says whether the count goes into the result."""

    uses = False

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def embed(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return super().embed(ids) * (1 + 0.1 * self.calls * self.uses)


class OwnCache(SdpaAttention):
    """Keeps keys and values for calls of one token; a longer call begins anew."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: Any = None

    def forward(self, x: Tensor, rotary: Any = None) -> Tensor:
        q, k, v = self.split(x)
        if x.shape[1] > 1:
            self.cache = None
        if self.cache is not None:
            k, v = torch.cat([self.cache[0], k], 2), torch.cat([self.cache[1], v], 2)
        self.cache = (k, v)
        mask = torch.ones(x.shape[1], k.shape[2], dtype=torch.bool).tril(k.shape[2] - x.shape[1])
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Recording(SdpaAttention):
    """Keeps its weights where one can look at them."""

    def forward(self, x: Tensor, rotary: Any = None) -> Tensor:
        q, k, v = self.split(x)
        scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(
            ~torch.ones(x.shape[1], x.shape[1]).tril().bool(), float("-inf")
        )
        self.weights = scores.softmax(-1)
        return self.merge(self.weights @ v)


def test_a_counter_that_goes_into_the_result() -> None:
    model = Counting()
    model.uses = True
    with pytest.raises(UnsupportedModelError, match="keeps calls from one call for the next"):
        kvrewrite.inspect(model.eval())


def test_a_counter_that_does_not() -> None:
    model = Counting().eval()
    kvrewrite.inspect(model)
    assert model.calls == 0


def test_a_cache_of_its_own() -> None:
    with pytest.raises(UnsupportedModelError, match=r"keeps blocks.0.attention.cache from one call for the next"):
        kvrewrite.inspect(make(make_attention=lambda self: OwnCache()))


def test_a_buffer_that_forward_writes() -> None:
    def step(self: Decoder, ids: Tensor) -> Tensor:
        self.get_buffer("steps").add_(1)
        return embed(self, ids)

    model = make(embed=step)
    model.register_buffer("steps", torch.zeros((), dtype=torch.long))
    with pytest.raises(UnsupportedModelError, match=r"writes to its own state \(.*steps\)"):
        kvrewrite.inspect(model)


# ------------------------------------------------------------------------------------------------ side effects
def test_what_a_capture_leaves_behind() -> None:
    """Attributes and lists that forward and hooks write to are as before; so are the modules' flags."""
    model = make(make_attention=lambda self: Recording())
    seen: list[Any] = ["before"]
    named: dict[str, Any] = {}
    handles = [
        model.norm.register_forward_hook(lambda module, args, out: seen.append(out)),
        model.head.register_forward_hook(lambda module, args, out: named.update(out=out)),
    ]
    model.train()
    model.blocks[0].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    small = kvrewrite.transform(model, "full", budget=MAX_LENGTH)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert not hasattr(model.blocks[0].attention, "weights")
    assert seen == ["before"] and not named
    for handle in handles:
        handle.remove()
    ids = torch.arange(20)[None]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids), atol=1e-5, rtol=1e-5)
        left = model.blocks[0].attention.weights
        kvrewrite.inspect(model)
        assert model.blocks[0].attention.weights is left


# ------------------------------------------------------------------------------------------------ layers
class MlpOnly(nn.Module):
    """A layer whose attention was pruned away."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(HIDDEN), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def test_layers_without_attention() -> None:
    model = make()
    model.blocks = nn.ModuleList([Block(SdpaAttention()), MlpOnly(), Block(SdpaAttention()), MlpOnly()])
    assert len(check_exact(model).sites) == 2


def test_an_upper_half_that_shares_keys_written_inline() -> None:
    """YOCO: the upper layers attend to keys and values that one projection makes, in the model's own forward."""

    class Yoco(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.kv = nn.Linear(HIDDEN, 2 * HIDDEN)
            self.upper = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(HIDDEN, HIDDEN), "mlp": Mlp()}) for _ in range(2))

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            heads = lambda y: y.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)  # noqa: E731
            k, v = map(heads, self.kv(x).chunk(2, -1))
            for layer in self.upper:
                y = F.scaled_dot_product_attention(heads(layer["q"](x)), k, v, is_causal=True)
                x = x + y.transpose(1, 2).flatten(2)
                x = x + layer["mlp"](x)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    assert [site.shares_kv_with for site in check_exact(Yoco()).sites] == [None, None, None, 2]


# ------------------------------------------------------------------------------------------------ spellings
class Spelled(SdpaAttention):
    """Attention written out by `weigh(scores of q and k) of v`."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT

    def weigh(self, w: Tensor, v: Tensor) -> Tensor:
        return w @ v

    def forward(self, x: Tensor, rotary: Any = None) -> Tensor:
        q, k, v = self.split(x)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.merge(
            self.weigh((self.scores(q, k) * HEAD_DIM**-0.5).masked_fill(later, float("-inf")).softmax(-1), v)
        )


class EinsumDots(Spelled):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("...qd,...kd->...qk", q, k)

    def weigh(self, w: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("... q k, ... k d -> ... q d", w, v)


class ValuesFirst(Spelled):
    def weigh(self, w: Tensor, v: Tensor) -> Tensor:
        return (v.mT @ w.transpose(-1, -2)).mT


@pytest.mark.parametrize("kind", [EinsumDots, ValuesFirst])
def test_products_in_other_spellings(kind: type[Spelled]) -> None:
    assert len(check_exact(make(make_attention=lambda self: kind())).sites) == 1


def test_the_encoder_of_torch_is_told_that_it_is_causal() -> None:
    """As in PyTorch's tutorial; torch looks into the mask where it is not told."""

    class Encoder(nn.Module):
        told = False

        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, 64, dropout=0.0)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.encoder(x.transpose(0, 1), mask, is_causal=self.told or None).transpose(0, 1)

    model = make()
    model.blocks = nn.ModuleList([Encoder()])
    with pytest.raises(CaptureError, match=r"nn.TransformerEncoder looks into the mask .*pass is_causal=True"):
        kvrewrite.inspect(model)
    model.blocks[0].told = True
    assert len(kvrewrite.inspect(model)) == 2
