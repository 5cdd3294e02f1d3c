"""Every front end ends in the same canonical graph, which computes what the model computes."""

from __future__ import annotations

import functools
import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvrewrite.capture.attention_interface import transformers_tracing
from kvrewrite.capture.captured import Captured
from kvrewrite.capture.export import export_model
from kvrewrite.errors import UnsupportedModelError
from kvrewrite.ir.fx import ancestors, tensor_of
from kvrewrite.ir.site import AttentionSite
from kvrewrite.passes.canonical.biases import classify, fit
from kvrewrite.passes.canonical.canonicalize import SOURCE, canonicalize, check_no_scores
from kvrewrite.passes.canonical.normalize import normalize
from kvrewrite.passes.canonical.operands import NoAttention
from tests.support.foreign import FOREIGN, HEAD_DIM, HEADS, HIDDEN, Decoder, Projections
from tests.support.products import few
from tests.support.rewritten import original, traced, traced_once
from tests.support.zoo import CONTENT_DEPENDENT, FAMILIES, VOCAB, WALKED, make

LENGTHS = (1, 5, 23)


def canonical(model: nn.Module | str) -> tuple[Captured, list[AttentionSite]]:
    """The sites of a model, or of a family."""
    captured = traced(model) if isinstance(model, str) else traced_once(model)
    normalize(captured)
    sites = canonicalize(captured)
    check_no_scores(captured)
    return captured, sites


def run(captured: Captured, ids: Tensor) -> Tensor:
    inputs = [ids]
    if any(n.op == "placeholder" and n.target == "position_ids" for n in captured.graph.graph.nodes):
        inputs.append(torch.arange(ids.shape[1]).repeat(len(ids), 1))
    with torch.no_grad():
        return captured.graph(*inputs)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def check_same(model: nn.Module, captured: Captured) -> None:
    for length in LENGTHS:
        ids = torch.randint(VOCAB, (3, length), generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(run(captured, ids), logits(model, ids), rtol=0, atol=1e-4)
    for node in captured.graph.graph.nodes:
        value = tensor_of(node)
        assert value is None or isinstance(value, Tensor), node
    sources = [n for n in captured.graph.graph.nodes if n.target is SOURCE]
    assert all(isinstance(n.meta["kvrewrite_site"], AttentionSite) for n in sources)
    assert all(tensor_of(n) is not None and "nn_module_stack" in n.meta for n in sources)


# layers, heads, kv heads, head dim, v head dim
SHAPES = {
    "phi3": (2, 4, 2, 96, 96),
    "gemma3_text": (4, 4, 2, 16, 16),
    "gemma3n_text": (5, 4, 2, 16, 16),
    "deepseek_v3": (2, 4, 4, 24, 16),
    "gpt2": (2, 4, 4, 16, 16),
    "gpt_neox": (2, 4, 4, 16, 16),
    "opt": (2, 4, 4, 16, 16),
    "bloom": (2, 4, 4, 16, 16),
    "falcon": (2, 4, 1, 16, 16),
    "lfm2": (1, 4, 2, 16, 16),
}
WINDOWS = {
    "mistral": [8, 8],
    "gemma2": [8, 0],
    "gemma3_text": [8, 0, 8, 0],
    "gpt_oss": [8, 0],
    "gemma3n_text": [8, 8, 0, 8, 0],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    model = original(name)
    captured, sites = canonical(name)
    layers, *shape = SHAPES.get(name, (2, 4, 2, 16, 16))
    assert [[s.heads, s.kv_heads, s.head_dim, s.v_head_dim] for s in sites] == [shape] * layers
    assert [s.layer for s in sites] == list(range(layers))
    assert [s.window for s in sites] == WINDOWS.get(name, [0] * layers)
    assert all(s.softcap == (5.0 if name == "gemma2" else 0.0) for s in sites)
    assert all(s.sinks == (name == "gpt_oss") for s in sites)
    assert all(s.alibi == (name in ("bloom", "falcon")) for s in sites)
    assert len({s.module for s in sites}) == layers and all(hasattr_path(model, s.module) for s in sites)
    check_same(model, captured)


def hasattr_path(model: nn.Module, path: str) -> bool:
    return path in dict(model.named_modules())


@pytest.mark.parametrize("name", WALKED)
def test_families_without_the_interface(name: str) -> None:
    model = original(name)
    captured, sites = canonical(name)
    # GPT-J has it from transformers 5.24 on.
    source = "interface" if "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(model).__module__]) else "softmax"
    assert [(s.source, s.heads, s.kv_heads, s.head_dim) for s in sites] == [(source, 4, 4, 16)] * 2
    assert [s.window for s in sites] == [0, 8 if name == "gpt_neo" else 0]
    assert all(s.alibi == (name == "mpt") for s in sites)
    check_same(model, captured)


@pytest.mark.xdist_group("gemma3n_text")
def test_shared_kv() -> None:
    _, sites = canonical("gemma3n_text")
    assert [s.shares_kv_with for s in sites] == [None, None, None, 1, 2]


@pytest.mark.parametrize(
    "name",
    few(["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"], rest=["llama", "mistral", "gemma2", "gpt_oss"]),
)
def test_walker_agrees_with_the_interface(name: str) -> None:
    """The walker, on the softmax of the model's own eager code, finds what the interface says."""
    model = make(name)
    _, told = canonical(name)
    with transformers_tracing(model, "eager"):
        captured = export_model(model, "trace", None)
    normalize(captured)
    found = canonicalize(captured)
    assert {s.source for s in found} == {"softmax"}
    for one, other in zip(found, told, strict=True):
        assert one.scale == pytest.approx(other.scale, rel=1e-6)
        assert {**one.as_dict(), "scale": 0, "source": ""} == {**other.as_dict(), "scale": 0, "source": ""}
    check_same(model, captured)


SOURCES = {
    "ManualSoftmaxTril": "softmax",
    "TorchMHAWeights": "softmax",
    "FlexScoreMod": "flex_attention",
    "FlexBlockMask": "flex_attention",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign(name: str) -> None:
    model = original(name)
    captured, sites = canonical(name)
    assert [(s.heads, s.kv_heads, s.head_dim, s.mask) for s in sites] == [(HEADS, HEADS, HEAD_DIM, "causal")] * 2
    assert {s.source for s in sites} == {SOURCES.get(name, "sdpa")}
    check_same(model, captured)


# ------------------------------------------------------------------------------------------------ other ways
class Custom(Projections):
    """Attention whose middle is a function of q, k, v."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.randn(HEADS))
        self.learned = nn.Parameter(torch.randn(HEADS, 64))
        self.gains = nn.Parameter(torch.randn(HEADS))

    def causal(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[1], x.shape[1], device=x.device, dtype=torch.bool).tril()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.merge(self.attend(x, q, k, v))

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("subclasses say how")


class EinsumGqa(Custom):
    """Grouped heads through einsum, a window from a constant, -1e4 for what is hidden."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, ::2].transpose(1, 2), v[:, ::2].transpose(1, 2)
        grouped = q.reshape(q.shape[0], 2, 2, -1, HEAD_DIM)
        scores = torch.einsum("bkgid,bjkd->bkgij", grouped, k) / math.sqrt(HEAD_DIM)
        keep = self.causal(x) & ~self.causal(x).tril(-9)
        weights = (scores + (1.0 - keep.float()) * -10000.0).softmax(-1)
        return torch.einsum("bkgij,bjkd->bkgid", weights, v).reshape(q.shape)


class Repeated(Custom):
    """kv heads repeated with repeat_interleave; scores capped, then masked with the smallest float."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, :1].repeat_interleave(HEADS, dim=1), v[:, :1].repeat_interleave(HEADS, dim=1)
        scores = 3.0 * torch.tanh((q @ k.mT) * 0.5 / 3.0)
        return scores.masked_fill(~self.causal(x), torch.finfo(scores.dtype).min).softmax(-1) @ v


class Chunked(Custom):
    """sdpa with a boolean mask of chunks."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(x.shape[1]) // 6
        return F.scaled_dot_product_attention(q, k, v, self.causal(x) & (position[:, None] == position), scale=0.7)


class Sink(Custom):
    """A learned extra logit per head, with the maximum taken off first."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~self.causal(x), -math.inf)
        sink = self.sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
        return (scores - scores.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


class LearnedSlopes(Custom):
    """ALiBi with learned slopes, relative to the query."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(x.shape[1])
        bias = self.sink[:, None, None] * (position[:, None] - position)
        return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(~self.causal(x), -math.inf)[None])


class PerHeadScale(Custom):
    """A learned factor of the scores a head, which becomes one of the queries."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT) * self.gains.abs()[:, None, None]
        return scores.masked_fill(~self.causal(x), -math.inf).softmax(-1) @ v


def custom(attention: type[Custom]) -> Decoder:
    class Model(Decoder):
        def make_attention(self) -> nn.Module:
            return attention()

    torch.manual_seed(0)
    model = Model().eval()
    model.blocks = model.blocks[:1]
    return model


@functools.cache
def written(attention: type[Custom]) -> tuple[Decoder, Captured, list[AttentionSite]]:
    """A model with this attention and its canonical graph, which tests leave as they are."""
    model = custom(attention)
    return model, *canonical(model)


@pytest.mark.xdist_group("custom attention")
@pytest.mark.parametrize(
    "attention, expected",
    [
        (EinsumGqa, {"kv_heads": 2, "window": 9}),
        (Repeated, {"kv_heads": 1, "softcap": 3.0, "scale": 0.5}),
        (Chunked, {"chunk": 6, "scale": 0.7}),
        (Sink, {"sinks": True, "scale": 1.0}),
        (LearnedSlopes, {"alibi": True}),
        (PerHeadScale, {"scale": 1.0}),
    ],
)
def test_other_ways_to_write_it(attention: type[Custom], expected: dict[str, object]) -> None:
    model, captured, sites = written(attention)
    known = {"kv_heads": HEADS, "window": 0, "chunk": 0, "softcap": 0.0, "sinks": False, "alibi": False, **expected}
    for site in sites:
        assert {k: site.as_dict()[k] for k in known} == pytest.approx(known)
    check_same(model, captured)


@pytest.mark.xdist_group("custom attention")
def test_slopes_and_sinks_stay_parameters() -> None:
    for attention, argument in ((Sink, 3), (LearnedSlopes, 4)):
        _, captured, _ = written(attention)
        nodes = [n for n in captured.graph.graph.nodes if n.target is SOURCE]
        for layer, node in enumerate(nodes):
            read = [n.target for n in ancestors([node.args[argument]]) if n.op == "get_attr"]
            assert read == [f"blocks.{layer}.attention.sink"]


@pytest.mark.xdist_group("custom attention")
def test_repeat_is_not_computed() -> None:
    _, captured, _ = written(Repeated)
    assert not [n for n in captured.graph.graph.nodes if "repeat" in str(n.target) or "index_select" in str(n.target)]


# ------------------------------------------------------------------------------------------------ refusals
class Bidirectional(Custom):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Prefix(Custom):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = self.causal(x) | (torch.arange(x.shape[1]) < 3)
        return F.scaled_dot_product_attention(q, k, v, keep)


class LearnedBias(Custom):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(x.shape[1])
        bias = self.learned[:, (position[:, None] - position).clamp(0, 63)]
        return ((q @ k.mT) + bias).masked_fill(~self.causal(x), -math.inf).softmax(-1) @ v


class ContentMask(Custom):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = self.causal(x) & ((x[:, :, 0] > 0)[:, None, None] | torch.eye(x.shape[1], dtype=torch.bool))
        return (q @ k.mT).masked_fill(~keep, -math.inf).softmax(-1) @ v


class Talking(Custom):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).masked_fill(~self.causal(x), -math.inf).softmax(-1)
        return (weights * self.gains[:, None, None]) @ v


class Leaky(Custom):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).masked_fill(~self.causal(x), -math.inf).softmax(-1)
        return weights @ v + weights.sum(-1, keepdim=True).cumsum(2)


class Dropping(Custom):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)


class NoSoftmax(Custom):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * self.causal(x)) @ v


@pytest.mark.parametrize(
    "attention, reason",
    [
        (Bidirectional, "not causal"),
        (Prefix, "tokens see later ones"),
        (LearnedBias, r"made of the parameter .*learned bias"),
        (ContentMask, "content"),
        (Talking, "weights are changed"),
        (Leaky, "used for something else"),
        (Dropping, "dropout"),
        (NoSoftmax, "between all pairs of tokens"),
    ],
)
def test_refusals_name_layer_module_and_reason(attention: type[Custom], reason: str) -> None:
    model = custom(attention)
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        canonical(model)
    if attention is not NoSoftmax:
        assert "layer 0 (blocks.0.attention)" in str(error.value)


@pytest.mark.thorough  # tests/capture/test_refusals.py has one through `inspect`
@pytest.mark.parametrize("name", CONTENT_DEPENDENT)
def test_content_dependent_families(name: str) -> None:
    model = make(name, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"layer 0 \(model.layers.0.self_attn\).*(content|indices)"):
        canonical(model)


# ------------------------------------------------------------------------------------------------ masks and scores
def mask(keep: Tensor) -> Tensor:
    return (
        torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -math.inf)[None, None].expand(2, HEADS, -1, -1)
    )


LENGTH = 20
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
DISTANCE = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).double()


@pytest.mark.parametrize("size", [1, 2, 7, LENGTH - 1])
def test_classify_windows_and_chunks(size: int) -> None:
    window = classify(mask(CAUSAL & (size > DISTANCE)))
    assert (window.window, window.chunk, window.slopes) == (size, 0, None)
    chunks = torch.arange(LENGTH) // size
    chunk = classify(mask(CAUSAL & (chunks[:, None] == chunks)))
    # Chunks of one token are windows of one token.
    assert (chunk.window, chunk.chunk) == ((1, 0) if size == 1 else (0, size))


def test_classify_tells_heads_apart() -> None:
    found = classify(torch.cat([mask(CAUSAL)[:, :2], mask(CAUSAL & (DISTANCE < 4))[:, 2:]], 1))
    assert found.by_head == [(0, 0)] * 2 + [(4, 0)] * (HEADS - 2)


def test_classify_takes_alibi_up_to_a_row() -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    bias = slopes[:, None, None] * torch.arange(LENGTH) + torch.randn(LENGTH, 1, dtype=torch.float64)
    found = classify(mask(CAUSAL) + bias)
    assert found.slopes is not None and torch.allclose(found.slopes.double(), slopes)


@pytest.mark.parametrize(
    "added, reason",
    [
        (mask(CAUSAL) - DISTANCE.abs().sqrt(), "not linear"),
        (mask(CAUSAL.tril(-1)), "from itself"),
        (mask(CAUSAL & ((DISTANCE % 3 == 0) | (DISTANCE < 2))), "neither causal"),
        (torch.cat([mask(CAUSAL)[:1], mask(CAUSAL & (DISTANCE < 4))[1:]], 0), "rows of a batch"),
    ],
)
def test_classify_refuses(added: Tensor, reason: str) -> None:
    with pytest.raises(NoAttention, match=reason):
        classify(added)


def test_fit_checks_the_whole_curve() -> None:
    shape = (2, HEADS, 7, 7)
    assert (fit(lambda x: x * 0.3, shape, 7).scale, fit(lambda x: x * 0.3, shape, 7).softcap) == (0.3, 0.0)
    capped = fit(lambda x: 20 * torch.tanh(x * 0.125 / 20), shape, 7)
    assert (capped.scale, capped.softcap) == pytest.approx((0.125, 20.0))
    for change in (
        lambda x: x.clamp(-5, 5),
        lambda x: x + 0.1 * x.roll(1, -1),
        lambda x: F.softsign(x),
        lambda x: x * x,
    ):
        with pytest.raises(NoAttention, match="not a scale and a softcap"):
            fit(change, shape, 7)


@pytest.mark.xdist_group("mixtral")
def test_routers_are_not_attention() -> None:
    captured, sites = canonical("mixtral")
    softmaxes = [n for n in captured.graph.graph.nodes if "softmax" in str(n.target)]
    assert len(sites) == 2 and len(softmaxes) == 2


def test_meta_model() -> None:
    """Sizes of a model that is not loaded: found without any weights."""
    with torch.device("meta"):
        model = Decoder.__subclasses__()[0]().eval()
    captured, sites = canonical(model)
    assert [s.kv_heads for s in sites] == [HEADS] * 2 and HIDDEN == HEADS * HEAD_DIM
    assert all(p.device.type == "meta" for p in captured.graph.parameters())
