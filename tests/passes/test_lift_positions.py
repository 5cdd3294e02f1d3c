"""Positions that a model builds in become an input, one position for every token of every row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kvrewrite.capture.captured import Captured
from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import placeholder, shape_of, symbol, tensor_of
from kvrewrite.passes.canonical.canonicalize import canonicalize
from kvrewrite.passes.canonical.lift_positions import lift_positions
from kvrewrite.passes.canonical.normalize import normalize
from tests.support.foreign import FOREIGN, HEAD_DIM, VOCAB, Decoder, make_foreign
from tests.support.rewritten import original, traced, traced_once
from tests.support.zoo import make

OFFSET = 3


def lifted(model: nn.Module | str) -> Captured:
    """The graph of a model, or of a family."""
    captured = traced(model) if isinstance(model, str) else traced_once(model)
    normalize(captured)
    canonicalize(captured)
    lift_positions(captured)
    return captured


def token_ids(rows: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))


class ArangeRope(Decoder):
    """RoPE computed in forward from an `arange`, as an outer product with the inverse frequencies."""

    has_wpe = False
    stretch = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 100.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids)

    def extras(self, ids: Tensor) -> tuple[Callable[[Tensor], Tensor]]:
        position = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        angle = torch.outer(position, self.inv_freq).repeat(1, 2)[None, None]
        cos, sin = angle.cos(), angle.sin()

        def rotate(x: Tensor) -> Tensor:
            one, two = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-two, one], dim=-1) * sin

        return (rotate,)


class BatchedPositions(Decoder):
    """Positions expanded to the batch, flattened with it, and shifted as OPT does it."""

    def embed(self, ids: Tensor) -> Tensor:
        b, s = ids.shape
        position = torch.arange(2, s + 2, device=ids.device)[None].expand(b, s)
        return self.wte(ids) + self.wpe(position.reshape(-1)).view(b, s, -1) * torch.log1p(position.float())[..., None]


class SumOfOnes(Decoder):
    """Positions counted by a running sum, one for each row."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe(torch.ones_like(ids).cumsum(-1) - 1)


class SumOfOnesOnce(Decoder):
    """The same for all rows."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe(torch.ones(ids.shape[1], dtype=torch.long, device=ids.device).cumsum(0) - 1)


class WrittenSinusoids(Decoder):
    """Sines and cosines written into a tensor of zeros."""

    def embed(self, ids: Tensor) -> Tensor:
        position = torch.arange(ids.shape[1], device=ids.device).float()[:, None]
        frequency = torch.exp(torch.arange(0, 32, 2) * -0.3)
        table = torch.zeros(ids.shape[1], 32)
        table[:, 0::2] = (position * frequency).sin()
        table[:, 1::2] = (position * frequency).cos()
        return self.wte(ids) + table


class FlatTokens(Decoder):
    """An arange over all tokens of the batch, which is no position."""

    def embed(self, ids: Tensor) -> Tensor:
        x = self.wte(ids).flatten(0, 1)
        order = torch.arange(x.shape[0], device=ids.device)
        return x[order].view(*ids.shape, -1)


def shifted(model: Decoder) -> Decoder:
    """The model with its tables moved, so that its position 0 is position OFFSET of the original."""
    for name in ("cos", "sin", "freqs"):
        if hasattr(model, name):
            setattr(model, name, getattr(model, name).roll(-OFFSET, 0))
    if hasattr(model, "wpe"):
        model.wpe.weight.data = model.wpe.weight.data.roll(-OFFSET, 0)
    return model


@pytest.mark.parametrize("name", FOREIGN)
def test_rows_at_different_positions(name: str) -> None:
    """Row 0 begins at 0, row 1 at OFFSET, row 2 has every position doubled."""
    model, moved = original(name), shifted(make_foreign(name))
    captured = lifted(name)
    for length in (1, 4, 21):
        ids = token_ids(2, length)
        positions = torch.stack([torch.arange(length), torch.arange(length) + OFFSET])
        with torch.no_grad():
            got = captured.graph(ids, positions)
            expected = torch.cat([model(ids[:1]), moved(ids[1:])])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    if name not in ("RopeTable", "RopeTableComplex"):  # RoPE only sees differences
        with torch.no_grad():
            assert (captured.graph(ids, positions + 1) - got).abs().max() > 1e-3
    with torch.no_grad():
        assert (captured.graph(ids, positions * 2) - got).abs().max() > 1e-3


def test_rope_from_an_arange() -> None:
    torch.manual_seed(0)
    model = ArangeRope().eval()
    captured = lifted(model)
    ids = token_ids(3, 19)
    positions = torch.arange(19) + torch.tensor([[0], [7], [200]])
    halved = torch.arange(19).repeat(3, 1) * 2
    with torch.no_grad():
        torch.testing.assert_close(captured.graph(ids, positions), model(ids), rtol=0, atol=1e-4)
        model.inv_freq *= 2
        doubled = model(ids)
        model.inv_freq /= 2
        torch.testing.assert_close(captured.graph(ids, halved), doubled, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [SumOfOnes, SumOfOnesOnce, WrittenSinusoids])
def test_other_ways_to_make_positions(kind: type[Decoder]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    captured = lifted(model)
    ids = token_ids(3, 19)
    positions = torch.arange(19).repeat(3, 1)
    with torch.no_grad():
        torch.testing.assert_close(captured.graph(ids, positions), model(ids), rtol=0, atol=1e-4)
        order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
        given = model.embed(ids) - model.wte(ids)  # what each position adds
        model.embed = lambda ids: model.wte(ids) + given[..., order, :]  # type: ignore[method-assign]
        torch.testing.assert_close(captured.graph(ids, order.repeat(3, 1)), model(ids), rtol=0, atol=1e-4)


def test_positions_with_a_batch_dim() -> None:
    torch.manual_seed(0)
    model = BatchedPositions().eval()
    captured = lifted(model)
    for length in (1, 5, 22):
        ids = token_ids(3, length)
        with torch.no_grad():
            got = captured.graph(ids, torch.arange(length).repeat(3, 1))
            torch.testing.assert_close(got, model(ids), rtol=0, atol=1e-4)
    # Token 5 of a row is what it is whatever the other rows' positions are.
    mixed = torch.arange(length) + torch.tensor([[0], [4], [9]])
    with torch.no_grad():
        torch.testing.assert_close(captured.graph(ids, mixed)[:1], got[:1], rtol=0, atol=1e-4)
        assert (captured.graph(ids, mixed)[1:] - got[1:]).abs().max() > 1e-3


def test_aranges_over_tokens_stay() -> None:
    torch.manual_seed(0)
    model = FlatTokens().eval()
    captured = lifted(model)
    assert placeholder(captured.graph, "position_ids") is None or model.has_wpe
    assert any("arange" in str(n.target) for n in captured.graph.graph.nodes)


@pytest.mark.xdist_group("NanoGPT")
def test_metadata_is_kept() -> None:
    for name in ("NanoGPT", "RopeTable", "RopeTableComplex"):
        captured = lifted(name)
        positions = placeholder(captured.graph, "position_ids")
        assert positions is not None and tensor_of(positions).dtype == torch.int64  # type: ignore[union-attr]
        wanted = [captured.batch_symbol, captured.length_symbol]
        assert [symbol(s) for s in shape_of(positions)] == wanted
        for node in captured.graph.graph.nodes:
            assert node.op == "output" or node.meta.get("val") is not None, node
        assert not any("arange" in str(n.target) for n in captured.graph.graph.nodes)


@pytest.mark.xdist_group("llama")
def test_models_with_positions_are_left_alone() -> None:
    captured = traced("llama")
    normalize(captured)
    canonicalize(captured)
    before = [n.name for n in captured.graph.graph.nodes]
    lift_positions(captured)
    assert [n.name for n in captured.graph.graph.nodes] == before


def test_positions_given_and_built_in() -> None:
    """llama4 has position_ids, and an arange for its temperature besides."""
    model = make(
        "llama4_text",
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=8,
        num_hidden_layers=4,
        no_rope_layers=[1, 1, 1, 0],
        floor_scale=4,
        attn_scale=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    captured = lifted(model)
    ids, positions = token_ids(3, 20), torch.arange(20).repeat(3, 1)
    with torch.no_grad():
        torch.testing.assert_close(captured.graph(ids, positions), model(ids).logits, rtol=0, atol=1e-4)
        moved = captured.graph(ids, positions + torch.tensor([[0], [0], [40]]))
    assert (moved[:2] - model(ids).logits[:2]).abs().max() < 1e-4 < (moved[2] - model(ids).logits[2]).abs().max()


class Powers(Decoder):
    """Numbers that grow along the text, and not by the same each token."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + torch.full_like(ids, 2.0, dtype=torch.float32).cumprod(1)[..., None]


class Gathered(Decoder):
    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids)[:, torch.arange(ids.shape[1], device=ids.device)]


class Mixed(Decoder):
    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)).cumsum(0)


class OverLength(Decoder):
    """Positions as a part of the text's length: with more tokens, those before would be others."""

    def embed(self, ids: Tensor) -> Tensor:
        part = torch.arange(ids.shape[1], device=ids.device) / ids.shape[1]
        return self.wte(ids) + torch.sin(part[:, None] * torch.arange(1, 33))


class LastRows(Decoder):
    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe.weight[: ids.shape[1]].mean(0)


@pytest.mark.parametrize(
    "model, reason",
    [
        (Powers, "something else than an arange"),
        (Gathered, "does not treat every position by itself"),
        (Mixed, "depends on the others"),
        (OverLength, "or on how many there are"),
        (LastRows, "over all positions at once"),
    ],
)
def test_refusals(model: type[Decoder], reason: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match=reason):
        lifted(model().eval())
