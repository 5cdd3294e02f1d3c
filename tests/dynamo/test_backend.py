"""The torch.compile backend: ordinary models with ordinary caches evict under `generate`, or say why they can't."""

from __future__ import annotations

import copy
import gc
import tomllib
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CompileConfig, DynamicCache, StaticCache

import kvrewrite
from kvrewrite.cache.eviction_cache import CACHE_NAME
from kvrewrite.dynamo import append_tokens, backend, caches, traced_call
from kvrewrite.dynamo.caches import StockState
from kvrewrite.errors import CacheError, InputError, OptionError, UnsupportedModelError
from tests.support.rewritten import build, original, rewritten
from tests.support.zoo import VOCAB

pytestmark = pytest.mark.xdist_group("llama")
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
STREAMING: dict[str, Any] = {"policy": "streaming_llm", "budget": 24, "chunk": 8}
ADDING: dict[str, Any] = {"policy": "snapkv", "budget": 44, "window": 4}  # single tokens only join
GRAPHS = "unique_graphs"


@pytest.fixture
def counted() -> None:
    """For tests that count graphs, and whose graphs later ones may go on with."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def fresh_dynamo(counted: None) -> Iterator[None]:
    """For tests that count graphs, or after whose errors torch gives up tracing some functions."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module", autouse=True)
def clean_dynamo() -> Iterator[None]:
    limits = {n: getattr(torch._dynamo.config, n) for n in ("recompile_limit", "accumulated_recompile_limit")}
    yield
    torch._dynamo.reset()
    for name, value in limits.items():
        setattr(torch._dynamo.config, name, value)


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama that compiled calls of all tests share, so that every rewrite of it is made once."""
    return build("llama")


@pytest.fixture(scope="module")
def shallow() -> Any:
    """One of one layer, for tests whose subject is not the layers: its graphs take half of the time."""
    return build("shallow_llama")


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(length: int) -> tuple[Tensor, Tensor]:
    """Two rows, and the mask of a second one that is shorter."""
    prompt = ids(2, length)
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    return prompt, mask


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"][GRAPHS]


def compiled(model: nn.Module, **options: Any) -> Any:
    """As users call it, but without Inductor, which takes a minute."""
    return torch.compile(model, backend="kvrewrite", options={"inductor": False, **options})


def run(model: Any, prompt: Tensor, steps: int, **rest: Any) -> tuple[Tensor, Any]:
    """Greedy tokens, and the cache that they leave."""
    rest.setdefault("attention_mask", torch.ones_like(prompt))
    if "past_key_values" in rest:  # what transformers calls it from 5.24 on
        rest[CACHE_NAME] = rest.pop("past_key_values")
    out = model.generate(prompt, max_new_tokens=steps, return_dict_in_generate=True, **GREEDY, **rest)
    return out.sequences, out.past_key_values


def plain(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "policy"}


def lengths(cache: Any) -> set[int]:
    return {t.shape[-2] for layer in cache.layers for t in (layer.keys, layer.values)}


# ------------------------------------------------------------------------------------------------ stock caches
@pytest.mark.parametrize("options", [ADDING, STREAMING], ids=["only adds", "evicts"])
def test_the_past_of_a_mask_is_what_went_in(shallow: Any, options: dict[str, Any]) -> None:
    user, cache, prompt = compiled(shallow, **options), DynamicCache(), ids(2, 20)
    mask = torch.ones(2, 22, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        user(prompt, attention_mask=mask[:, :20], **{CACHE_NAME: cache})
        user(prompt[:, :1], attention_mask=mask[:, :21], **{CACHE_NAME: cache})
        mask[0, 7] = 0
        with pytest.raises(InputError, match="is 0 for row 0 at column 7, expected 1"):
            user(prompt[:, :1], attention_mask=mask, **{CACHE_NAME: cache})


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("forward", STREAMING),
        pytest.param(
            "model.compile", {"policy": "h2o", "budget": 20, "chunk": 8, "recent_tokens": 4}, marks=pytest.mark.thorough
        ),
        ("torch.compile", STREAMING),  # the last one: tests after this one go on with its graphs
    ],
    ids=["forward", "model.compile", "torch.compile"],
)
def test_stock_cache_under_generate(
    counted: None, request: pytest.FixtureRequest, how: str, options: dict[str, Any]
) -> None:
    """Padded rows, a prompt longer than the budget, whole and in chunks: the tokens of `transform`, and a DynamicCache that
    stays at the budget."""
    prompt, mask = padded(31)
    model = request.getfixturevalue("shallow" if how == "forward" else "model")
    rest: dict[str, Any] = {"attention_mask": mask}
    if how == "forward":
        rest["prefill_chunk_size"] = 11
    small = rewritten("shallow_llama" if how == "forward" else "llama", options["policy"], **plain(options))
    expected, _ = run(small, prompt, 40, **rest)
    settings: dict[str, Any] = {"backend": "kvrewrite", "options": {"inductor": False, **options}}
    try:
        if how == "torch.compile":
            user: Any = torch.compile(model, **settings)
        elif how == "model.compile":
            user = model
            model.compile(**settings)
        else:
            user = model
            model.forward = torch.compile(model.forward, **settings)
        found, cache = run(user, prompt, 40, **rest)
    finally:
        model._compiled_call_impl = None
        model.__dict__.pop("forward", None)
    assert torch.equal(found, expected)
    assert type(cache) is DynamicCache and lengths(cache) == {options["budget"]}
    assert graphs() <= (5 if how == "forward" else 2)


@pytest.mark.parametrize("dense", [True, False])
def test_single_tokens_only_join(shallow: Any, monkeypatch: pytest.MonkeyPatch, dense: bool) -> None:
    """Where prompts alone are evicted from, every single token takes the short way, in both of its forms, also across pages and
    between prompts: the tokens and positions of `transform`."""
    options = plain(ADDING)
    lower, short = append_tokens.lower_append, append_tokens.AppendRunner.step
    steps: list[Any] = []
    forms: dict[int, Any] = {}  # the runner of the form that is asked for, by the rewrite's, whose form is the CPU's

    def step(runner: Any, *given: Any) -> Any:
        steps.append(runner)
        if id(runner) not in forms:
            with monkeypatch.context() as patch:
                patch.setattr(append_tokens, "lower_append", lambda gm, classes, **_: lower(gm, classes, dense=dense))
                model = runner.model
                forms[id(runner)] = append_tokens.AppendRunner(model, model.graph_module, lambda graph: graph)
        return short(forms[id(runner)], *given)

    monkeypatch.setattr(append_tokens.AppendRunner, "step", step)
    (prompt, mask), turn = padded(51), ids(2, 7, seed=3)
    user = compiled(shallow, **ADDING)
    small = rewritten("shallow_llama", "snapkv", **options)
    expected, theirs = run(small, prompt, 30, attention_mask=mask)
    found, ours = run(user, prompt, 30, attention_mask=mask)
    state = caches.state_of([t for layer in ours.layers for t in (layer.keys, layer.values)])
    assert torch.equal(found, expected) and state.positions() == theirs.positions() and len(steps) == 29
    with torch.no_grad():
        for new in (turn, turn[:, :1]):
            after = small(new, past_key_values=theirs).logits
            torch.testing.assert_close(user(new, past_key_values=ours).logits, after, rtol=0, atol=1e-5)
    assert len(steps) == 30 and state.positions() == theirs.positions()


@pytest.mark.parametrize(
    ("policy", "options", "only"),
    [
        ("snapkv", {}, True), ("pyramidkv", {}, True), ("expected_attention", {}, True), ("full", {}, True),
        ("nacl", {}, False), ("nacl", {"interval": 0}, True), ("h2o", {"decode_eviction": False}, False),
    ],
)  # fmt: skip
def test_which_policies_rate_prompts_only(policy: str, options: dict[str, Any], only: bool) -> None:
    assert kvrewrite.policies.make(policy, **options).rates_prompts_only is only


def test_original_is_left_alone(model: Any) -> None:
    """After all this the model itself computes and keeps what it did, and has nothing of ours."""
    user, before = compiled(model, **STREAMING), set(vars(model))
    prompt, mask = padded(31)
    run(user, prompt, 3, attention_mask=mask)
    expected, _ = run(original("llama"), ids(1, 31), 8)
    found, cache = run(model, ids(1, 31), 8)
    assert torch.equal(found, expected) and lengths(cache) == {38}
    assert set(vars(model)) == before


@pytest.mark.thorough  # the backend is `transform` above, what `transform` saves is it in tests/artifact
@pytest.mark.parametrize("steps", [48, 256])
def test_three_ways_are_one(shallow: Any, tmp_path: Path, steps: int) -> None:
    """`transform`, what it saves, and the backend: the same tokens."""
    prompt = ids(1, 40)
    options: dict[str, Any] = {"policy": "random", "budget": 32, "seed": 5, "chunk": 16}
    small = kvrewrite.transform(shallow, **options)
    expected, _ = run(small, prompt, steps)
    small.save_pretrained(tmp_path / "out")
    loaded, _ = run(kvrewrite.load(tmp_path / "out"), prompt, steps)
    found, cache = run(compiled(shallow, **options), prompt, steps)
    assert found.shape == (1, 40 + steps) and lengths(cache) == {32}
    assert torch.equal(loaded, expected) and torch.equal(found, expected)


def test_nothing_evicted_is_the_original(shallow: Any) -> None:
    """Logits too, prompt by prompt in chunks of the caller's, with the cache that the model makes itself."""
    user, text = compiled(shallow, policy="full"), ids(2, 30)
    with torch.no_grad():
        expected = original("shallow_llama")(text).logits
        cache, at, found = None, 0, []
        for width in (13, 1, 16):
            out = user(text[:, at : at + width], past_key_values=cache)
            cache, at = out.past_key_values, at + width
            found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-5)
        assert cache.get_seq_length() == 30
        last = user(text, use_cache=False, logits_to_keep=3)
    torch.testing.assert_close(last.logits, expected[:, -3:], rtol=0, atol=1e-5)


def test_cache_holds_views_of_its_state(model: Any) -> None:
    """No second copy: what the DynamicCache holds is the memory that the policy works on, and is what the policy kept."""
    prompt, mask = padded(31)
    _, cache = run(compiled(model, **STREAMING), prompt, 5, attention_mask=mask)
    state = caches.state_of([t for layer in cache.layers for t in (layer.keys, layer.values)])
    keys = cache.layers[1].keys
    assert keys.untyped_storage().data_ptr() == state.leases[0].store.k_pages.untyped_storage().data_ptr()
    read = torch.ops.kvrewrite.read_pages(state.leases[0].store.k_pages, state.leases[0].table[1])
    assert torch.equal(keys, read[:, :, :24])
    assert state.seen == [35, 30]
    assert state.positions()[1][0][0] == [*range(4), *range(15, 35)]
    assert state.positions()[1][1][0] == [*range(4), *range(10, 30)]


def test_copies_go_on_by_themselves(shallow: Any) -> None:
    user, prompt = compiled(shallow, **STREAMING), ids(1, 31)
    nexts = [ids(1, 1, seed=s) for s in (1, 2)]
    with torch.no_grad():
        alone = []
        for token in nexts:
            cache = user(prompt).past_key_values
            alone.append(user(token, past_key_values=cache).logits)
        cache = user(prompt).past_key_values
        twin, shallow = copy.deepcopy(cache), copy.copy(cache)
        shallow.layers = [copy.copy(layer) for layer in cache.layers]
        assert torch.equal(user(nexts[0], past_key_values=cache).logits, alone[0])
        assert torch.equal(user(nexts[1], past_key_values=twin).logits, alone[1])
        with pytest.raises(CacheError, match=r"older state.*deepcopy"):
            user(nexts[1], past_key_values=shallow)


def test_other_parameters_and_no_leaks(shallow: Any) -> None:
    """Another model of the same class is not taken for the first one, new parameters and submodules are followed, and the
    rewrite goes with its model."""
    first, model = shallow, build("shallow_llama")
    user = compiled(model, **STREAMING)
    with torch.no_grad():
        compiled(first, **STREAMING)(ids(1, 20))
        user(ids(1, 20))
        model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)
        twice = user(ids(1, 20)).logits
        torch.testing.assert_close(twice, original("shallow_llama")(ids(1, 20)).logits * 2, rtol=0, atol=1e-4)
        other = copy.deepcopy(
            model.model.layers[0].mlp
        )  # the same type and shapes: Dynamo goes on with the graph that it has
        other.down_proj.weight.mul_(-3)
        model.model.layers[0].mlp = other
        torch.testing.assert_close(user(ids(1, 20)).logits, model(ids(1, 20)).logits, rtol=0, atol=1e-4)
        assert not torch.allclose(user(ids(1, 20)).logits, twice, atol=1e-2)
    gone = weakref.ref(model)
    del model, user, twice, other
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------------------------------------ our own cache
def test_eviction_cache_carries_every_policy(shallow: Any) -> None:
    """Ragged heads and quantized slots, which a DynamicCache can't hold."""
    options: dict[str, Any] = {"budget": 20, "window": 4, "quantize": "int8", "quantize_residual": 0}
    prompt = ids(2, 31)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    expected, theirs = run(rewritten("shallow_llama", "adakv", **options), prompt, 12, attention_mask=mask)
    user = compiled(shallow, policy="adakv", **options)
    cache = kvrewrite.new_cache(user, 2)
    found, ours = run(user, prompt, 12, attention_mask=mask, past_key_values=cache)
    assert ours is cache and torch.equal(found, expected)
    assert cache.positions() == theirs.positions()
    with pytest.raises(CacheError, match=r"DynamicCache can't hold this.*EvictionCache.*new_cache"):
        run(user, prompt, 2, attention_mask=mask)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("adakv", {}),
        ("attention_gate", {"gate_heads": 2, "gate_dim": 8}),
        ("kvzap", {}),
        ("fast_kvzip", {}),
        ("duo_attention", {"heads": "10,01"}),
        ("h2o", {"head_budgets": "adakv", "budget": 20, "recent_tokens": 4}),
        ("h2o", {"layer_budgets": "30,20", "budget": 20, "recent_tokens": 4}),
        ("pyramidkv", {}),
        ("tova", {"quantize": "int8", "quantize_residual": 0}),
    ],
)
def test_what_a_stock_cache_can_not_carry(policy: str, options: dict[str, Any]) -> None:
    small = rewritten("llama", policy, **options)
    with pytest.raises(CacheError, match=r"can't hold this.*EvictionCache"):
        StockState(small, 1)


def test_weights_by_path_turns_and_forks(shallow: Any, tmp_path: Path) -> None:
    """A policy with trained weights, several turns on one cache, and a fork of it."""
    small = rewritten("shallow_llama", "locret", budget=24, chunk=8, stabilizers=4)
    path = tmp_path / "heads.safetensors"
    heads = {n: small.graph_module.get_parameter(n) for n in small.program.policy_weights}
    save_file({n.removeprefix("policy_weights."): t.detach().contiguous() for n, t in heads.items()}, path)
    user = compiled(shallow, policy="locret", policy_weights=str(path), budget=24, chunk=8, stabilizers=4)
    found = []
    for this, cache in ((small, small.new_cache(1)), (user, kvrewrite.new_cache(user))):
        first, _ = run(this, ids(1, 30), 5, past_key_values=cache)
        fork, text = cache.fork(), torch.cat([first, ids(1, 6, seed=2)], 1)
        found.append([run(this, text, 5, past_key_values=c)[0] for c in (cache, fork)])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and torch.equal(*found[1])


def test_sliding_windows_and_beams() -> None:
    model = build("shallow_mistral")
    user, prompt = compiled(model, policy="h2o", budget=16, recent_tokens=4, chunk=8), ids(2, 20)
    small = rewritten("shallow_mistral", "h2o", budget=16, recent_tokens=4, chunk=8)
    expected, _ = run(small, prompt, 6, num_beams=2)
    found, _ = run(user, prompt, 6, num_beams=2, past_key_values=kvrewrite.new_cache(user, 4))
    assert torch.equal(found, expected)
    with pytest.raises(CacheError, match=r"new_cache"):
        run(user, prompt, 2)


def test_compile_config(shallow: Any) -> None:
    config = CompileConfig(backend="kvrewrite", mode=None, options={"inductor": False, **STREAMING})  # type: ignore[arg-type]
    config._compile_all_devices = True
    prompt = ids(2, 31)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    expected, _ = run(rewritten("shallow_llama", "streaming_llm", **plain(STREAMING)), prompt, 12, attention_mask=mask)
    settings = {"attention_mask": mask, "compile_config": config}
    cache = kvrewrite.new_cache(shallow, 2)
    found, _ = run(shallow, prompt, 12, past_key_values=cache, prefill_chunk_size=1 << 20, **settings)
    assert torch.equal(found, expected)
    assert int(cache.live_slots()[0].max()) == 24
    with pytest.raises(CacheError, match=r"not compiled.*prefill_chunk_size.*_compile_all_devices"):
        run(shallow, prompt, 2, past_key_values=kvrewrite.new_cache(shallow, 2), **settings)
    for name in ("_compiled_call", "_last_compile_config"):
        shallow.__dict__.pop(name, None)


# ------------------------------------------------------------------------------------------------ compiling
@pytest.mark.parametrize(
    "options",
    [
        {"policy": "streaming_llm", "budget": 24, "positions": "original"},
        pytest.param({"policy": "snapkv", "budget": 24, "window": 4}, marks=pytest.mark.thorough),
    ],
    ids=["evicts", "only adds"],
)
def test_with_inductor_and_one_graph(options: dict[str, Any]) -> None:
    model: Any = build("shallow_llama")
    user: Any = torch.compile(model, backend="kvrewrite", options=options, fullgraph=True)
    expected, _ = run(rewritten("shallow_llama", **options), ids(1, 27), 8)
    found, cache = run(user, ids(1, 27), 8)
    assert torch.equal(found, expected) and lengths(cache) == {24 if options["policy"] == "streaming_llm" else 31}


def test_recompiles_are_few(fresh_dynamo: None, shallow: Any) -> None:
    """Neither lengths nor further requests compile again; batch sizes do once."""
    user, counts = compiled(shallow, **STREAMING), []
    for rows, length, steps in ((1, 31, 4), (1, 9, 20), (2, 31, 4), (5, 40, 4)):
        run(user, ids(rows, length), steps)
        counts.append(graphs())
    assert counts[0] == 2 and counts[-1] <= 8 and counts[-1] == counts[-2]


def test_torchs_limit_of_recompiles_is_no_way_out(fresh_dynamo: None, shallow: Any) -> None:
    """Beyond it torch.compile would run the unmodified model, with positions and masks that it does not know."""
    with torch._dynamo.config.patch(recompile_limit=1):
        user = torch.compile(shallow, backend="kvrewrite", options={"inductor": False, **STREAMING}, dynamic=False)
        small = rewritten("shallow_llama", "streaming_llm", **plain(STREAMING))
        for rows in (1, 3):
            expected, _ = run(small, ids(rows, 25 + rows), 2)
            assert torch.equal(run(user, ids(rows, 25 + rows), 2)[0], expected)


def test_graph_without_attention(model: Any) -> None:
    traced_call.told.discard("no attention")

    def route(x: Tensor, experts: Tensor) -> Tensor:
        return (torch.softmax(x, -1) * experts).sum()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for function in (route, lambda x, y: x + y):
            fast = torch.compile(function, backend="kvrewrite", options={"inductor": False})
            x, y = torch.randn(3), torch.randn(3)
            assert torch.equal(fast(x, y), function(x, y))
    assert len([w for w in said if "a graph without attention runs as it is" in str(w.message)]) == 1


def test_rewritten_models_need_no_backend(model: Any) -> None:
    small = rewritten("shallow_llama", "streaming_llm", budget=24, chunk=8)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="rewritten already: compile it"):
        compiled(small, **STREAMING)(ids(1, 9))


def test_foreign_module() -> None:
    model = build("NanoGPT")
    with torch.no_grad():
        found = compiled(model, policy="streaming_llm", budget=16, chunk=8)(ids(2, 30))
        expected = rewritten("NanoGPT", "streaming_llm", budget=16, chunk=8)(ids(2, 30)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["torch_dynamo_backends"]["kvrewrite"].partition(":")
    assert module == backend.__name__ and getattr(backend, name) is backend.kvrewrite_backend
    assert "kvrewrite" in torch.compiler.list_backends()


# ------------------------------------------------------------------------------------------------ refusals
class TestRefused:
    """Each with its reason, when the graph runs; also where torch.compile is told to fall back in silence."""

    @pytest.fixture(autouse=True)
    def suppressed(self) -> Iterator[None]:
        with torch._dynamo.config.patch(suppress_errors=True), torch.no_grad():
            yield

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"policy": "streaming_lm"}, "did you mean 'streaming_llm'"),
            ({"bugdet": 12}, "no option 'bugdet'.*did you mean 'budget'.*policy_weights, inductor"),
            ({"budget": 2}, "budget is 2"),
            ({"policy": 7}, "expected a name"),
            ({"policy_weights": 7}, "expected a path"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            torch.compile(torch.neg, backend="kvrewrite", options=options)(torch.ones(2))

    def test_gradients(self, shallow: Any) -> None:
        user = compiled(shallow, **STREAMING)
        with torch.enable_grad(), pytest.raises(InputError, match=r"gradients are enabled.*no_grad"):
            user(ids(1, 8))
        assert user(ids(1, 8)).logits.shape == (1, 8, VOCAB)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"labels": ids(1, 8)}, InputError, "labels is not supported"),
            ({"output_hidden_states": True}, (InputError, UnsupportedModelError), "not supported|whole calls"),
            ({"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, InputError, "not a causal mask"),
            ({"position_ids": torch.arange(3, 11)[None]}, InputError, "positions are counted by the cache"),
        ],
    )
    def test_arguments(
        self, fresh_dynamo: None, shallow: Any, arguments: dict[str, Any], error: Any, message: str
    ) -> None:
        with pytest.raises(error, match=message):
            compiled(shallow, **STREAMING)(**{"input_ids": ids(1, 8), **arguments})

    def test_parts_of_a_model(self, fresh_dynamo: None, shallow: Any) -> None:
        with pytest.raises(UnsupportedModelError, match="whole calls"):
            compiled(shallow.model.layers[0].self_attn, **STREAMING)(
                torch.zeros(1, 5, 64), (torch.ones(1, 5, 16), torch.ones(1, 5, 16)), None
            )

        def step(model: Any, tokens: Tensor) -> Tensor:
            return model(tokens).logits * 2

        with pytest.raises(UnsupportedModelError, match=r"step, not the forward of a model"):
            torch.compile(step, backend="kvrewrite", options={"inductor": False})(shallow, ids(1, 5))

    def test_graph_breaks(self, fresh_dynamo: None) -> None:
        """A graph with a part of the model is never run, and neither is what comes after the break."""
        model: Any = build("shallow_llama")
        module = model.model.layers[0].mlp
        inner = module.forward

        def forward(x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return inner(x)

        module.forward = forward
        with pytest.raises(UnsupportedModelError, match="fullgraph=True"):
            compiled(model, **STREAMING)(ids(1, 8))

    def test_caches(self, fresh_dynamo: None, shallow: Any) -> None:
        user = compiled(shallow, **STREAMING)
        filled = shallow(ids(1, 8)).past_key_values
        with pytest.raises(CacheError, match=r"did not leave there.*new_cache"):
            user(ids(1, 1), past_key_values=filled)
        static = StaticCache(config=shallow.config, max_cache_len=20)
        with pytest.raises(CacheError, match=r"StaticCache.*new_cache"):
            user(ids(1, 8), past_key_values=static)
        with pytest.raises(CacheError, match=r"beam search.*new_cache"):
            user.generate(ids(1, 8), num_beams=2, max_new_tokens=3, **GREEDY)
        with pytest.raises(CacheError, match="not compiled"):
            shallow(ids(1, 8), past_key_values=kvrewrite.new_cache(shallow))
        other = torch.compile(shallow, backend="eager")
        with pytest.raises(CacheError, match="another backend"):
            other(ids(1, 8), past_key_values=kvrewrite.new_cache(other))
        cache = rewritten("shallow_llama", "streaming_llm").new_cache(1)
        with pytest.raises(CacheError, match="EvictionCache"):
            user(ids(1, 8), past_key_values=cache)

    def test_another_policys_cache(self, shallow: Any) -> None:
        cache = kvrewrite.new_cache(compiled(shallow, **STREAMING))
        compiled(shallow, **STREAMING)(ids(1, 8), past_key_values=cache)
        with pytest.raises(CacheError, match="belongs to another model"):
            compiled(shallow, policy="full")(ids(1, 1), past_key_values=cache)

    def test_second_turn_on_a_stock_cache(self, shallow: Any) -> None:
        """transformers takes the length of a DynamicCache for the length of the text."""
        user = compiled(shallow, **STREAMING)
        first, cache = run(user, ids(1, 31), 4)
        with pytest.raises(InputError):
            run(user, torch.cat([first, ids(1, 5)], 1), 4, past_key_values=cache)
