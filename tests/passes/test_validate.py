"""Modules that look like what kvrewrite rewrites and compute something else are refused; the same things written in other ways
are exact. Each is compared with the unmodified module, in chunks and token by token."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvrewrite
from kvrewrite.analysis.model_card import proof_text
from kvrewrite.capture.frontend import capture
from kvrewrite.errors import KVRewriteError, OptionError, UnsupportedModelError
from kvrewrite.ir.fx import tensor_of
from kvrewrite.passes.pipeline import canonical
from tests.support.products import each, few
from tests.support.zoo import make

VOCAB, WIDTH, HEADS, DIM, MOST = 61, 16, 4, 4, 128


class Attention(nn.Module):
    core: Callable[..., Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("windows", torch.full((12,), 9), persistent=False)
        self.register_buffer("logn", (torch.arange(1, MOST + 1).log() / math.log(16)).clamp(min=1), persistent=False)
        self.bias = nn.Parameter(torch.zeros(64, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        return self.out(self.core(q, k, v).transpose(1, 2).reshape(b, s, WIDTH))


class Model(nn.Module):
    """One layer; what cases change are its parts."""

    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(MOST, WIDTH)
        self.norm, self.attention, self.mlp = nn.LayerNorm(WIDTH), attention(), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))

    def mix(self, x: Tensor) -> Tensor:
        return x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.mix(x + self.attention(self.norm(x)))
        return self.head(x + self.mlp(x).relu())


def made(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("bias") or p.dim() == 1:
                size = 1.5 * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1
                p.copy_(torch.randn(p.shape, generator=generator) * size)
    return model.eval()


def distance(s: int) -> Tensor:
    at = torch.arange(s)
    return at[:, None] - at


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * DIM**-0.5


def attend(x: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return x.masked_fill(~seen, -math.inf).softmax(-1) @ v


def with_core(core: Callable[..., Tensor]) -> nn.Module:
    return made(Model(type("Changed", (Attention,), {"core": core})))


def with_mix(mix: Callable[..., Tensor]) -> nn.Module:
    return made(type("Mixing", (Model,), {"mix": lambda self, x: mix(x)})())


def with_embedding(extra: Callable[..., Tensor]) -> nn.Module:
    return made(type("Embedding", (Model,), {"embed": lambda self, ids: Model.embed(self, ids) + extra(self, ids)})())


def causal(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


Attention.core = causal


def seen_by(allowed: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def core(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        d = distance(q.shape[2])
        return attend(scores(q, k), v, (d >= 0) & allowed(d))

    return core


def per_head(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    d = distance(q.shape[2])
    windows = torch.tensor([9, 20, 9, 1000])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=((d >= 0) & (d < windows))[None])


def chunks_per_head(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at, sizes = torch.arange(q.shape[2]), torch.tensor([8, 8, 16, 16])[:, None, None]
    return attend(scores(q, k), v, (distance(q.shape[2]) >= 0) & (at[:, None] // sizes == at // sizes))


def minus_1000(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) - 1000.0 * (distance(q.shape[2]) < 0)).softmax(-1) @ v


def log_n(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.shape[2]
    return attend(scores(q, k) * self.logn[:s, None], v, distance(s) >= 0)


def changed_scores(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def core(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        d = distance(q.shape[2])
        return attend(change(scores(q, k), d), v, d >= 0)

    return core


def changed_weights(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def core(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        d = distance(q.shape[2])
        return change(scores(q, k).masked_fill(d < 0, -math.inf).softmax(-1), d) @ v

    return core


def zero_bias(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    d = distance(q.shape[2])
    return attend(scores(q, k) + self.bias[d.clamp(0, 63)].permute(2, 0, 1), v, d >= 0)


class Grouped(nn.Module):
    """Two kv heads with two query heads each, by einsum. group_first: query head h reads kv head h % 2."""

    first, second, group_first = "bqngd,bknd->bngqk", "bngqk,bknd->bqngd", False

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 2, 2, DIM)
        k, v = self.kv(x).view(b, s, 2, 2, DIM).unbind(2)
        weights = (torch.einsum(self.first, q, k) * DIM**-0.5).masked_fill(distance(s) < 0, -math.inf).softmax(-1)
        return self.out(torch.einsum(self.second, weights, v).reshape(b, s, WIDTH))


class Broadcast(Grouped):
    """The same with matmul, the group before the kv heads."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 2, 2, DIM).permute(0, 3, 2, 1, 4)
        k, v = (t.transpose(1, 2).unsqueeze(1) for t in self.kv(x).view(b, s, 2, 2, DIM).unbind(2))
        out = attend(scores(q, k), v, distance(s) >= 0)
        return self.out(out.permute(0, 3, 2, 1, 4).reshape(b, s, WIDTH))


class OneKv(Grouped):
    """Multi-query attention by einsum."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, HEADS, DIM)
        k, v = self.kv(x)[..., : 2 * DIM].chunk(2, -1)
        weights = (torch.einsum("bqhd,bkd->bhqk", q, k) * DIM**-0.5).masked_fill(distance(s) < 0, -math.inf)
        return self.out(torch.einsum("bhqk,bkd->bqhd", weights.softmax(-1), v).reshape(b, s, WIDTH))


def einsum(first: str, second: str) -> nn.Module:
    return made(Model(type("Einsum", (Grouped,), {"first": first, "second": second})))


EXACT: dict[str, Callable[[], nn.Module]] = {
    "multi-query einsum": lambda: made(Model(OneKv)),
    "grouped einsum": lambda: made(Model(Grouped)),
    "grouped einsum, group before kv head": lambda: einsum("bqngd,bknd->bgnqk", "bgnqk,bknd->bqngd"),
    "grouped matmul, group before kv head": lambda: made(Model(Broadcast)),
    "window by a float": lambda: with_core(seen_by(lambda d: d.float() <= 40.5)),
    "window by a shift": lambda: with_core(seen_by(lambda d: d >> 5 == 0)),
    "window by a logarithm": lambda: with_core(seen_by(lambda d: (d.clamp(min=0) + 1.0).log2() < 5.3)),
    "attention of attention's result": lambda: with_core(
        lambda self, q, k, v: causal(self, causal(self, q, k, v), k, v)
    ),
    "chunks of two sizes": lambda: with_core(chunks_per_head),
    "a mask of -1000": lambda: with_core(
        lambda self, q, k, v: (scores(q, k) - 1000.0 * (distance(q.shape[2]) < 0)).softmax(-1) @ v
    ),
    "a window for each head": lambda: with_core(per_head),
    "a number for each head": lambda: with_core(changed_scores(lambda x, d: x * torch.arange(1, 5)[:, None, None])),
    "log-n scaling of the scores": lambda: with_core(log_n),
}

REFUSED: dict[str, Callable[[], nn.Module]] = {
    "blocks that look four back": lambda: with_core(
        lambda self, q, k, v: attend(
            scores(q, k), v, (distance(q.shape[2]) >= 0) & (distance(q.shape[2] // 1) % 40 < 33)
        )
    ),
    "ALiBi that ends": lambda: with_core(changed_scores(lambda x, d: x - 0.3 * d.clamp(max=60).float())),
    "a scale by the length": lambda: with_core(changed_scores(lambda x, d: x * 5 / d.shape[0] ** 0.5)),
    "top-16": lambda: with_core(
        changed_scores(lambda x, d: x.masked_fill(x < x.topk(min(16, x.shape[-1]), -1).values[..., -1:], -1e9))
    ),
    "weights cut after the softmax": lambda: with_core(changed_weights(lambda w, d: w * (d < 16))),
    "a bias that is zero now": lambda: with_core(zero_bias),
    "GroupNorm over the sequence": lambda: with_mix(lambda x: F.group_norm(x.mT, 4).mT),
    "Fourier transform": lambda: with_mix(lambda x: x + torch.fft.fft(x, dim=1).real),
    "a norm of all": lambda: with_mix(lambda x: x / x.norm()),
    "roll by two": lambda: with_mix(lambda x: x + x.roll(2, 1)),
    "running maximum": lambda: with_mix(lambda x: x + x.cummax(1).values),
    "the length": lambda: with_mix(lambda x: x / x.shape[1] * 30),
    "one token is another matter": lambda: with_mix(lambda x: x * (2 if x.shape[1] == 1 else 1)),
    "one row is another matter": lambda: with_mix(lambda x: x * (2 if x.shape[0] == 1 else 1)),
    "the batch size": lambda: with_mix(lambda x: x / x.shape[0]),
    "tokens seen as heads": lambda: with_mix(lambda x: x.reshape(x.shape[0], WIDTH, -1).mT),
    "rows mixed": lambda: with_mix(lambda x: x - x.mean(0, keepdim=True)),
    "all tokens mixed, flat": lambda: with_mix(lambda x: x - x.flatten(0, 1).mean(0)),
    "the first token": lambda: with_embedding(lambda m, ids: m.wte(ids[:, 0])[:, None]),
    "the token before": lambda: with_embedding(lambda m, ids: m.wte(ids.roll(1, 1))),
    "whether a token is there": lambda: with_embedding(lambda m, ids: m.wte((ids == 5).any(1).long())[:, None]),
    "positions over the length": lambda: with_embedding(
        lambda m, ids: torch.sin((torch.arange(ids.shape[1]) / ids.shape[1])[:, None] * torch.arange(1, WIDTH + 1))
    ),
}


@pytest.mark.parametrize(
    "name",
    few(
        EXACT,
        rest=(
            "multi-query einsum", "grouped einsum, group before kv head", "window by a shift", "window by a logarithm",
            "a number for each head",
        ),
    ),
)  # fmt: skip
def test_other_ways_to_write_attention_are_exact(name: str) -> None:
    model = EXACT[name]()
    small = kvrewrite.transform(model, "full", budget=200)
    ids = torch.randint(VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(ids)
        cache, out, at = small.new_cache(2), [], 0
        for n in (29, 7, *[1] * 24):
            out.append(small(ids[:, at : at + n], past_key_values=cache).logits)
            at += n
    assert float((torch.cat(out, 1) - want).abs().max()) <= 1e-4 * float(want.abs().max())


@pytest.mark.parametrize(
    "name",
    few(
        REFUSED,
        rest=(
            "a scale by the length", "weights cut after the softmax", "Fourier transform", "a norm of all", "roll by two",
            "running maximum", "one row is another matter", "the batch size", "rows mixed", "the token before",
            "whether a token is there", "ALiBi that ends", "the length",
        ),
    ),
)  # fmt: skip
def test_what_is_no_attention_over_a_cache_is_refused(name: str) -> None:
    with pytest.raises(KVRewriteError):
        kvrewrite.transform(REFUSED[name](), "full", budget=200)


def test_a_mixing_op_is_named_with_its_module_and_how_it_was_seen() -> None:
    with pytest.raises(UnsupportedModelError, match=r"cummax.* must depend on one token .* 2 tokens and 1 row"):
        kvrewrite.transform(REFUSED["running maximum"](), "full", budget=200)


def test_what_was_proved_is_said() -> None:
    small = kvrewrite.transform(EXACT["window by a float"](), "streaming_llm", budget=16)
    proof = small.program.proof
    assert proof is not None and proof["check"] == "full" and proof["sites"] == proof["distinct"] == 1
    assert {1, 2, 3, 40, 41, 42, MOST} <= set(proof["lengths"]) and MOST in proof["rest"] and 1 in proof["whole"]
    assert proof["masks"] == MOST and f"recognized, at every distance up to {MOST} tokens" in proof_text(proof)


def test_what_is_done_for_one_token_id_alone_is_seen() -> None:
    """Of a large vocabulary random ids hardly ever hit the one that a model asks for."""

    class Large(Model):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(50_000, WIDTH)

        def embed(self, ids: Tensor) -> Tensor:
            seen = (ids == 31_999).any(1, keepdim=True)
            return super().embed(ids) + seen[..., None] * self.wte.weight[7]

    with pytest.raises(UnsupportedModelError, match="must depend on one token"):
        kvrewrite.transform(made(Large()), "full", budget=200)


def test_less_can_be_checked() -> None:
    model = with_mix(lambda x: x + x.cummax(1).values)
    sites = kvrewrite.transform(model, "full", budget=200, check="sites").program.proof
    assert sites is not None and sites["sites"] == 1 and not sites["rest"] and not sites["whole"]
    assert kvrewrite.transform(model, "full", budget=200, check="off").program.proof is None
    with pytest.raises(OptionError, match="expected one of 'full', 'sites', 'off'"):
        kvrewrite.transform(model, "full", budget=200, check="some")


def test_weights_without_data_are_stood_in_for() -> None:
    """On meta nothing is known of the parameters; what mixes tokens is found all the same, and the model stays on meta."""
    with torch.device("meta"):
        meta = Model()
    for name, value in Model().named_buffers():
        meta.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = value
    from kvrewrite.capture.fake_parameters import capture_on_meta

    captured = capture_on_meta(meta)
    canonical(captured)
    assert captured.proof.sites == 1 and all(p.is_meta for p in meta.parameters())
    meta.mix = lambda x: x + x.cummax(1).values  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="cummax"):
        canonical(capture_on_meta(meta))


def test_large_weights_are_never_multiplied_out() -> None:
    """A weight of 1.6 GB in float64 is stood in for by two thin matrices."""
    with torch.device("meta"):
        wide = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 200_000), nn.Linear(200_000, 1000))
    from kvrewrite.ir.evaluate import Evaluator, StandIns, ThinProduct

    traced = torch.fx.symbolic_trace(_Functional(wide))
    stand_ins = StandIns()
    run = Evaluator(traced.graph, wide, stand_ins)
    out = run.result({"ids": torch.arange(5)[None]})
    assert out.shape == (1, 5, 1000) and bool(torch.isfinite(out).all())
    thin = stand_ins("2.weight", wide[2].weight)
    assert isinstance(thin, ThinProduct) and thin.left.shape == (1000, 8)


class _Routed(Model):
    """Sends each token to one of four experts, and counts how many each has as transformers does: elsewhere than on the CPU in
    integers, for which the CPU has no kernel."""

    def __init__(self) -> None:
        super().__init__()
        del self.attention.windows, self.attention.logn
        self.router, self.experts = nn.Linear(WIDTH, 4), nn.Parameter(torch.zeros(4, WIDTH, WIDTH))

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))

    def mix(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        expert, order = self.router(rows).argmax(-1).sort(stable=True)
        counted = expert.float() if x.device.type == "cpu" else expert.int()
        ends = torch.histc(counted, bins=4, min=0, max=3).cumsum(0, dtype=torch.int32)
        mine = torch.searchsorted(ends, torch.arange(rows.shape[0], device=x.device), right=True)
        out = torch.bmm(rows[order].unsqueeze(1), self.experts[mine]).squeeze(1)
        return x + out[order.argsort()].view_as(x)


def test_experts_counted_in_integers_run_on_the_cpu() -> None:
    """Captured on meta, where it counts in integers as on a GPU; run on the CPU, where the module itself counts in floats."""
    model = made(_Routed())
    small = kvrewrite.transform(copy.deepcopy(model).to("meta"), "full", budget=200)
    weights = {f"graph_module.{name}": value for name, value in model.state_dict().items()}
    small.load_state_dict({name: weights[name] for name in small.state_dict()}, assign=True)
    small.to("cpu")
    ids = torch.randint(VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, cache = model(ids), small.new_cache(2)
        out = [small(part, past_key_values=cache).logits for part in ids.split([29, 7, *[1] * 24], 1)]
        model.experts.zero_()
        assert not torch.allclose(model(ids), want, atol=1e-2)  # experts matter
    assert float((torch.cat(out, 1) - want).abs().max()) <= 1e-4 * float(want.abs().max())


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_families_with_experts_elsewhere_than_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    """On other devices experts are counted in integers, and in bf16 multiplied by another op; meta stands for a GPU here."""
    captured = capture(make(name).to("meta", dtype))
    assert canonical(captured) and captured.proof.check == "full"
    counts = [n for n in captured.graph.graph.nodes if n.target is torch.ops.aten.histc.default]
    assert counts and all(tensor_of(n.args[0]).dtype == torch.float64 for n in counts)  # which every device can


def test_differences() -> None:
    from kvrewrite.ir.evaluate import TOLERANCE, difference

    want = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert difference(want * (1 + TOLERANCE / 2), want) == ""
    assert "off by 4e-05 (the largest number is 4)" in difference(want * (1 + 10 * TOLERANCE), want)
    assert "off by nan" in difference(want * float("nan"), want)
    assert "not finite" in difference(want, want / 0)
    assert "gives (1,) where the model gives (2,)" in difference(want[:1], want)
    assert "gives NoneType" in difference(None, want)
    assert difference(want > 0, want > 0) == "" and difference(want > 0, want < 0) == "its integers differ"
    assert difference(want * 1e-9, want * 0) and difference(want * 1e-9, want * 0, least=1.0) == ""


def _counting(meta: Tensor | None) -> tuple[torch.fx.Graph, torch.fx.Node]:
    """A graph that counts ids in four bins; meta: what its result is in the model."""
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.histc.default, (graph.placeholder("ids"), 4, 0, 3))
    node.meta["val"] = meta
    graph.output(node)
    return graph, node


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_ops_without_a_kernel_for_integers_are_computed_in_floats(dtype: torch.dtype) -> None:
    from kvrewrite.ir.evaluate import EvaluationError, Evaluator
    from kvrewrite.passes.canonical.probe import run_op

    ids = torch.tensor([0, 3, 3, 1, 7, 3, 0], dtype=dtype)
    graph, node = _counting(torch.empty(4, dtype=dtype, device="meta"))
    with pytest.raises(NotImplementedError, match="not implemented for"):
        torch.histc(ids, 4, 0, 3)
    got = Evaluator(graph, nn.Module(), lambda _, value: value).result({"ids": ids})
    assert got.dtype == dtype and got.tolist() == [2, 1, 0, 3]
    assert torch.equal(run_op(node, (ids, 4, 0, 3), {}), got)
    # Not where that is not exact, nor where the result's own dtype is not known.
    for given, value in ((ids, None), (torch.tensor([2**53 + 1]), torch.empty(4, dtype=torch.int64))):
        graph, _ = _counting(value)
        with pytest.raises(EvaluationError, match="not implemented for"):
            Evaluator(graph, nn.Module(), lambda _, value: value).result({"ids": given})


def test_products_of_groups_are_computed_in_float64() -> None:
    """Those of the experts of a bf16 model, which torch itself rounds to bf16."""
    from kvrewrite.ir.evaluate import Evaluator, ThinProduct

    x, left, right = (
        torch.randn(n, generator=torch.Generator().manual_seed(0)).double() for n in ((6, 16), (3, 16, 2), (3, 2, 8))
    )
    ends = torch.tensor([1, 1, 5], dtype=torch.int32)
    want = torch.cat([x[:1] @ left[0] @ right[0], x[1:5] @ left[2] @ right[2]])
    for weights in (left @ right, ThinProduct(left, right)):
        graph = torch.fx.Graph()
        given = [graph.placeholder(n) for n in ("x", "weights", "ends")]
        graph.output(graph.call_function(torch.ops.aten._grouped_mm.default, tuple(given)))
        run = Evaluator(graph, nn.Module(), lambda _, value: value)
        got = run.result({"x": x, "weights": weights, "ends": ends})
        torch.testing.assert_close(got[:5], want, rtol=1e-12, atol=1e-12)


class _Functional(nn.Module):
    """The three layers as the ops that a captured graph has."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        for name, layer in layers.named_children():
            self.add_module(name, layer)

    def forward(self, ids: Tensor) -> Tensor:
        aten = torch.ops.aten
        layers = dict(self.named_children())
        x = aten.embedding.default(layers["0"].weight, ids)
        for name in ("1", "2"):
            x = aten.linear.default(x, layers[name].weight, layers[name].bias)
        return x


@pytest.mark.parametrize("name", ["window by a float", pytest.param("grouped einsum", marks=pytest.mark.thorough)])
def test_layers_that_compute_the_same_are_run_once(name: str) -> None:
    class Two(Model):
        def __init__(self, attention: nn.Module) -> None:
            super().__init__()
            self.attention = nn.Sequential(attention, type(attention)())

    captured = capture(made(Two(EXACT[name]().attention)))  # type: ignore[arg-type]
    canonical(captured)
    assert (captured.proof.sites, captured.proof.distinct) == (2, 1)
