"""The torch.compile backend, models of other kinds than plain decoders, and threads: what it must take, and what must not run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, LlamaForCausalLM, LogitsProcessor

import kvrewrite
from kvrewrite.cache.eviction_cache import CACHE_NAME
from kvrewrite.dynamo import rewrites, traced_call
from kvrewrite.dynamo.caches import BackendCache, type_for
from kvrewrite.dynamo.graphs import is_token_wise
from kvrewrite.errors import CacheError, UnsupportedModelError
from tests.coverage import measure
from tests.dynamo.test_backend import GREEDY, compiled, ids
from tests.support.foreign import HIDDEN, VOCAB, Decoder, Projections
from tests.support.rewritten import build, original, rewritten
from tests.support.zoo import make

STREAMING: dict[str, Any] = {"policy": "streaming_llm", "budget": 12, "chunk": 8}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """As users must call compiled models; and each test counts on nothing that others compiled."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ states beside attention
def test_short_convolutions_under_generate() -> None:
    """Padded rows and single tokens, past the budget: the tokens of `transform`."""
    prompt = ids(2, 20)
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, **GREEDY}
    expected = rewritten("lfm2", "streaming_llm", budget=12, chunk=8).generate(prompt, **settings)
    user = compiled(build("lfm2"), **STREAMING)
    found = user.generate(prompt, **{CACHE_NAME: kvrewrite.new_cache(user, 2)}, **settings)
    assert torch.equal(found, expected)


@pytest.mark.thorough  # test_short_convolutions_under_generate is the same kind
@pytest.mark.parametrize("name", ["nemotron_h", "minimax"])
def test_recurrences(name: str) -> None:
    """A recurrent state, and a cache class of the model's own: a prompt and a single token are the model in one call."""
    model: Any = measure.make(name)
    user, text = (
        compiled(model, policy="full"),
        torch.randint(3, 96, (1, 14), generator=torch.Generator().manual_seed(0)),
    )
    expected, cache = model(text, use_cache=False).logits, kvrewrite.new_cache(user)
    found = [user(piece, past_key_values=cache, use_cache=True).logits for piece in text.split([13, 1], 1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


class OwnCache(DynamicCache):
    """What a model may define beside itself, and ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.more: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.more)


def test_cache_classes_of_a_models_own_module() -> None:
    kind = type_for(nn.Linear(2, 2))
    assert kind is BackendCache
    own = type_for(build("llama"))
    assert own is BackendCache
    made: Any = type_for(type("Model", (nn.Module,), {"__module__": __name__})())(2, torch.device("cpu"))
    assert isinstance(made, OwnCache) and isinstance(made, Cache)
    assert len(made) == 0 and made.get_seq_length() == 0
    with pytest.raises(CacheError, match="not compiled"):
        made.update_recurrent_state(torch.ones(1), 0)


# ------------------------------------------------------------------------------------------------ attention that is not seen
class ByHand(Projections):
    """Attention written out, with weights that are no softmax unless they are divided by their sum."""

    softmax = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if self.softmax:
            return self.merge(scores.masked_fill(later, float("-inf")).softmax(-1).mul(1.0) @ v)
        return self.merge(scores.sigmoid().masked_fill(later, 0) @ v)


class Hidden(ByHand):
    """A softmax whose weights pass through one more op."""

    softmax = True


class Disabled(Projections):
    """Attention that no graph shows."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Shifted(Projections):
    """No attention, but every token gets the one before."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.pad(x, (0, 0, 1, 0))[:, :-1])


class Encoder(Decoder):
    """torch's own encoder as a decoder; without gradients it is one op."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, 4, 64, dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList([nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)])  # type: ignore[list-item]

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        return self.head(self.norm(self.blocks[0](self.embed(input_ids), mask=mask, is_causal=True)))


def decoder(attention: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return type("Model", (Decoder,), {"make_attention": lambda self: attention()})().eval()


@pytest.mark.parametrize(
    "make_model",
    [
        pytest.param(lambda: decoder(Hidden), id="softmax"),
        pytest.param(Encoder, id="nn.TransformerEncoder", marks=pytest.mark.thorough),
    ],
)
def test_rewritten_where_no_op_says_attention(make_model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, text = make_model().eval(), ids(2, 30)
    found = compiled(model, **STREAMING)(text)
    expected = kvrewrite.transform(model, **STREAMING)(text).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((found - model(text)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (ByHand, r"mixes tokens, so it is not run as it is.*can't be rewritten.*another backend"),
        (Shifted, r"mixes tokens, so it is not run as it is"),
        (Disabled, r"broke the graph of forward.*fullgraph=True"),
    ],
)
def test_refused_where_tokens_mix(attention: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        compiled(decoder(attention), **STREAMING)(ids(2, 9))


class Recurrent(nn.Module):
    """Dynamo leaves functions with such layers out altogether, and says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.layer, self.head = nn.Embedding(VOCAB, HIDDEN), nn.LSTM(HIDDEN, HIDDEN), nn.Linear(HIDDEN, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.wte(tokens))[0])


def test_nothing_compiled_is_no_success() -> None:
    with pytest.raises(UnsupportedModelError, match=r"compiled nothing of Recurrent.*ran unmodified.*fullgraph=True"):
        compiled(Recurrent(), **STREAMING)(ids(1, 9))
    user, text = compiled(build("llama"), **STREAMING), ids(1, 9)
    with torch.compiler.set_stance("force_eager"), pytest.raises(UnsupportedModelError, match="force_eager"):
        user.generate(text, max_new_tokens=2, **GREEDY)
    with pytest.raises(UnsupportedModelError, match="generate_batch runs the model with a cache of its own"):
        user.generate_batch([[1, 2]])


def test_layers_for_single_tokens_run_as_they_are() -> None:
    """From token ids and from hidden states, also with random numbers."""
    model = nn.Sequential(nn.Embedding(VOCAB, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB))
    assert torch.equal(compiled(model, **STREAMING)(ids(2, 9)), model(ids(2, 9)))
    layer, x = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Dropout(0.5)), torch.randn(2, 5, 8)
    assert compiled(layer, **STREAMING)(x).shape == (2, 5, 4)


@pytest.mark.parametrize(
    ("function", "token_wise"),
    [
        (lambda x, ids: x.softmax(-1), True),
        (lambda x, ids: F.dropout(x * ids[..., None], 0.5), True),
        (lambda x, ids: x.mul_(2), True),
        (lambda x, ids: x.cumsum(1), False),
        (lambda x, ids: x - x.mean(), False),
        (lambda x, ids: x + ids[:, :1, None], False),
        (lambda x, ids: x + (ids == 3).any(1)[:, None, None], False),
        (lambda x, ids: x.flatten(0, 1), False),
        (lambda x, ids: F.batch_norm(x.mT, None, None, training=True).mT, False),
    ],
)
def test_token_wise(function: Callable[..., Tensor], token_wise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(2, 7, 4, generator=generator), torch.randint(5, (2, 7), generator=generator)
    kept = x.clone()
    assert is_token_wise(lambda *inputs: (function(*inputs),), (x, tokens), set()) is token_wise
    assert torch.equal(x, kept)


# ------------------------------------------------------------------------------------------------ whole models or parts
class Headless(LlamaForCausalLM):
    """A model of the user's own that does not say which of its layers makes logits."""

    def get_output_embeddings(self) -> None:  # type: ignore[override]
        return None


def test_own_class_without_output_embeddings() -> None:
    model: Any = make("shallow_llama")
    model.__class__ = Headless
    out = compiled(model, policy="full")(ids(1, 9))
    torch.testing.assert_close(out.logits, model(ids(1, 9)).logits, rtol=0, atol=1e-5)
    with pytest.raises(UnsupportedModelError, match=r"took LlamaModel, which does not go from token ids to logits"):
        compiled(model.model, policy="full")(ids(1, 9))


# ------------------------------------------------------------------------------------------------ models that change
def double(module: nn.Module, args: Any, out: Any) -> Any:
    out.logits = out.logits * 2
    return out


@pytest.mark.parametrize("how", [pytest.param("torch.compile", marks=pytest.mark.thorough), "model.compile", "forward"])
def test_a_models_own_hooks_run_once(how: str) -> None:
    """torch runs them around what Dynamo traces."""
    model: Any = make("llama", num_hidden_layers=1)
    expected = model((ids(1, 9) + 1) % VOCAB).logits * 2
    model.register_forward_hook(double)
    model.register_forward_pre_hook(lambda m, args, rest: (((args[0] + 1) % VOCAB,), rest), with_kwargs=True)
    settings: dict[str, Any] = {"backend": "kvrewrite", "options": {"inductor": False, "policy": "full"}}
    user = model
    if how == "torch.compile":
        user = torch.compile(model, **settings)
    elif how == "model.compile":
        model.compile(**settings)
    else:
        model.forward = torch.compile(model.forward, **settings)
    torch.testing.assert_close(user(ids(1, 9)).logits, expected, rtol=0, atol=1e-5)


def test_changes_after_the_first_call_are_followed() -> None:
    """Numbers, flags and hooks of its layers: a rewrite that was made before is not run for them, but is when they are undone."""
    model: Any = make("llama", num_hidden_layers=1)
    user, layer, text = compiled(model, policy="full"), model.model.layers[0], ids(1, 9)

    def check() -> Tensor:
        found = user(text).logits
        torch.testing.assert_close(found, model(text).logits, rtol=0, atol=1e-5)
        return found

    first = check()
    model.model.norm.variance_epsilon = 5.0
    assert not torch.allclose(check(), first, atol=1e-2)
    model.model.norm.variance_epsilon = 1e-6
    check()
    hook = layer.mlp.register_forward_hook(lambda m, args, out: out * 3)
    assert not torch.allclose(check(), first, atol=1e-2)
    hook.remove()
    assert torch.equal(check(), first)
    assert len(rewrites._rewrites[model]) == 3


# ------------------------------------------------------------------------------------------------ threads
class Waits(LogitsProcessor):
    """Holds a request up at its first token."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.reached.set()
        assert self.go_on.wait(60)
        return scores


def test_requests_of_several_threads() -> None:
    """One that is in `generate` while another one begins and ends goes on with what was compiled; the model has nothing of it."""
    model: Any = make("shallow_llama")
    user, text, waits, found = compiled(model, **STREAMING), ids(1, 20), Waits(), []
    expected = user.generate(text, max_new_tokens=5, **GREEDY)
    before = dict(vars(model))

    def request() -> None:
        with torch.no_grad():
            found.append(user.generate(text, max_new_tokens=5, logits_processor=[waits], **GREEDY))

    thread = threading.Thread(target=request)
    thread.start()
    assert waits.reached.wait(60)
    assert vars(model) == before
    other = user.generate(text, max_new_tokens=3, **GREEDY)
    waits.go_on.set()
    thread.join()
    assert torch.equal(other, expected[:, :23]) and len(found) == 1 and torch.equal(found[0], expected)
    assert vars(model) == before


def test_first_calls_of_several_threads() -> None:
    """The rewrite is made once, and while it is made no other thread runs the model as it is."""
    model: Any = make("shallow_llama")
    user, texts, found = compiled(model, **STREAMING), [ids(1, 20, seed) for seed in range(3)], {}
    small = rewritten("shallow_llama", "streaming_llm", budget=12, chunk=8)
    model.load_state_dict(original("shallow_llama").state_dict())

    def request(i: int) -> None:
        with torch.no_grad():
            found[i] = user(texts[i], use_cache=False).logits

    threads = [threading.Thread(target=request, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, text in enumerate(texts):
        torch.testing.assert_close(found[i], small(text).logits, rtol=0, atol=1e-5)
    assert len(rewrites._rewrites[model]) == 1


def test_limits_of_recompiling_hold_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps settings of threads apart, and beyond the limit it would run the unmodified model."""
    config: Any = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit")
    limits = {name: (getattr(config, name), config._config[name].default) for name in names}
    monkeypatch.setattr(traced_call, "_debug_get_cache_entry_list", lambda code: [None] * 300)
    monkeypatch.setattr(traced_call, "told", set())
    seen: list[int] = []
    try:
        with pytest.warns(UserWarning, match="has made 300 graphs"):
            traced_call._keep_compiling(test_first_calls_of_several_threads.__code__)
        thread = threading.Thread(target=lambda: seen.extend(getattr(config, name) for name in names))
        thread.start()
        thread.join()
    finally:
        for name, (value, default) in limits.items():
            setattr(config, name, value)
            config._config[name].default = default
    assert len(seen) == 2 and min(seen) > 300
