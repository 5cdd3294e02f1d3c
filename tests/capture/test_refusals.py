"""Models that no honest rewrite exists for are refused, each with the layer and the reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kvrewrite
from kvrewrite.capture.attention_interface import InterfaceCalls
from kvrewrite.capture.frontend import capture
from kvrewrite.errors import CaptureError, UnsupportedModelError
from kvrewrite.ir.fx import placeholder, shape_of
from kvrewrite.passes.canonical.canonicalize import canonicalize
from kvrewrite.passes.canonical.check import check
from kvrewrite.passes.canonical.normalize import normalize
from tests.support.zoo import REFUSED, make

REASONS = {
    "dbrx": (CaptureError, r"data-dependent control flow.*modeling_dbrx, line \d+, in forward"),
    "doge": (UnsupportedModelError, r"layer 0 \(model.layers.0.self_attn\).*depends on the content"),
    "deepseek_v32": (UnsupportedModelError, r"layer 0 \(model.layers.0.self_attn\).*depends on the content"),
}


def test_every_refused_family_has_its_reason_here() -> None:
    assert set(REASONS) == set(REFUSED)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.thorough) if n == "deepseek_v32" else n for n in REFUSED],  # refused as doge is
)
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
    """It looks at the two tokens that follow."""

    def mix(self, x: Tensor) -> Tensor:
        return x + self.conv(x.transpose(1, 2))[..., 2:].transpose(1, 2)


class RunningSum(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x + x.cumsum(1)


class ShiftedBack(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x + F.pad(x, (0, 0, -1, 1))


class FirstToken(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x + x[:, :1]


class EinsumAttention(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x + torch.einsum("btc,bcd->btd", x, torch.einsum("bsc,bsd->bcd", x, x))


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


OTHERS = [
    Convolution, RunningSum, ShiftedBack, FirstToken, EinsumAttention, LinearAttention, Pooled, Rolled, LogSumExp,
]  # fmt: skip


@pytest.mark.parametrize("model", OTHERS)
def test_state_besides_the_cache(model: type[Decoder]) -> None:
    with pytest.raises(UnsupportedModelError, match="keeps state besides its keys and values"):
        kvrewrite.inspect(model())


def test_a_length_that_became_a_number() -> None:
    """Sequences are found by their symbolic size: without one the check would find nothing wrong with anything."""
    captured = capture(RunningSum())
    normalize(captured)
    sites = canonicalize(captured)
    with pytest.raises(UnsupportedModelError, match="keeps state besides its keys and values"):
        check(captured, sites)
    ids = placeholder(captured.graph, "input_ids")
    assert ids is not None and int(shape_of(ids)[1]) == 17  # torch takes that for all such sizes
    with pytest.raises(CaptureError, match=r"the length of the text, s.*, became 17"):
        check(captured, sites)


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


class Branches(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class WrongShape(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x @ torch.ones(5, 5)


class NeedsAPackage(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        import a_package_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401

        return x


class NeedsAnImage(Decoder):
    def forward(self, input_ids: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids) + image


LIBRARY = torch.library.Library("kvrewrite_test_refusals", "DEF")
LIBRARY.define("opaque(Tensor x) -> Tensor")
LIBRARY.impl("opaque", torch.clone, "CPU")


class OpaqueOp(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return torch.ops.kvrewrite_test_refusals.opaque(x)


class OneLength(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x + torch.tensor(list(range(x.shape[1])))[:, None]


class TakesAlong(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return torch.take_along_dim(x, x.argsort(-1), -1)


class Recurrent(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 32, batch_first=True)

    def mix(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class SomeRows(Decoder):
    def mix(self, x: Tensor) -> Tensor:
        return x[x[:, 0, 0] > 0]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Branches, r"decides by the values in a tensor.*in mix: `return x if x.sum\(\) > 0 else -x`"),
        (WrongShape, r"raised RuntimeError: .*in mix: `return x @ torch.ones\(5, 5\)`.*model\(input_ids\)"),
        (NeedsAPackage, "package that is not installed.*a_package_that_is_not_there"),
        (NeedsAnImage, "calling its forward with token ids raised TypeError.*missing 1 required.*'image'"),
        (OpaqueOp, "no rule for shapes without data.*in mix.*opaque.*register_fake"),
        (
            OneLength,
            r"the length size became the constant 17 .*test_refusals.py.*in mix: `return x \+ torch.tensor\(list",
        ),
        (TakesAlong, r"batch size became the constant 2 .*in take_along_dim, in test_refusals.py, line \d+, in mix"),
        (Recurrent, r"length size became the constant 17 .*in lstm, in test_refusals.py, line \d+, in mix"),
        (SomeRows, "the logits have the shape"),
    ],
)
def test_the_error_says_what_kept_it_from_being_traced(model: type[Decoder], reason: str) -> None:
    with pytest.raises(CaptureError, match=reason) as caught:
        kvrewrite.inspect(model())
    assert model is Branches or "data-dependent" not in str(caught.value)


def test_masks_may_be_sliced_to_their_whole_size_only() -> None:
    """Models slice the mask of our tracing; what is still all of it counts, and anything else is refused."""
    calls = InterfaceCalls(nn.Module())
    mask = calls.mask(2, 9, 9, mask_function=lambda b, h, q, kv: kv <= q)
    calls.mask(2, 9, 9, mask_function=lambda b, h, q, kv: kv <= q)
    for whole in (mask, mask[:, :, slice(0, None), :], mask[:, :, :, : mask.shape[-1]]):
        assert calls._window_and_chunk(whole) == (0, 0)
    for edited in (mask[:, :, -1:], mask[..., 1:], mask.mT, mask.clone(), ~mask, mask.expand(2, 4, 9, 9), mask[1:]):
        assert calls._window_and_chunk(edited) is None
    mask[0] = True
    assert calls._window_and_chunk(mask) is None
