"""Single tokens and chunks from static buffers: the same kept sets, logits and memory as the plain path, whatever happens in
between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from kvrewrite.passes.lower.prompt import fold, lower_prefill
from kvrewrite.runtime.decode_graph import DecodeRunner
from kvrewrite.runtime.executor import Executor
from kvrewrite.runtime.parts import Execution
from kvrewrite.runtime.prompt_graph import PrefillRunner, why_not
from tests.support.rewritten import captured, original, rewrite, rewritten

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "locret", {"budget": 16, "chunk": 8, "stabilizers": 4, "local_tail": 3, "decode_eviction": True}),
    ("llama", "streaming_llm", {"budget": 70, "chunk": 30}),
    ("llama", "nacl", {"budget": 16, "interval": 3, "positions": "contiguous"}),
    ("gemma2", "h2o", {"budget": 16}),
    ("gemma3n_text", "knorm", {"budget": 16}),
    ("llama", "adakv", {"budget": 16, "window": 6, "kernel": 3}),
    ("deepseek_v3", "tova", {"budget": 16}),
    ("llama", "kvzap", {"threshold": 0.0, "window": 6}),
    ("llama", "trim_kv", {"budget": 16, "buffer_size": 3, "retention_gate": "rg"}),
    ("llama", "sirllm", {"budget": 16, "chunk": 10, "decay": 0.5}),
    ("llama", "h2o", {"budget": 30, "quantize": "int8", "quantize_group": 4, "quantize_residual": 8}),
    ("llama", "attention_gate", {"chunk": 20, "budget": 30, "decode_eviction": True}),
]
# Whose ways through the runtime those above go, too.
MORE: list[tuple[str, str, dict[str, Any]]] = [
    ("bloom", "h2o", {"budget": 20}),
    ("gpt_oss", "snapkv", {"budget": 16, "window": 6}),
    ("llama", "scissorhands", {"budget": 16, "recent_tokens": 3, "history": 9}),
    ("llama", "tova", {"budget": 16}),
    ("llama", "locret", {"budget": 16, "chunk": 8, "stabilizers": 4, "local_tail": 3}),
    ("gemma2", "streaming_llm", {"budget": 20}),
    ("llama", "h2o", {"budget": 16, "layer_budgets": "pyramid"}),
    ("llama", "nacl", {"budget": 16, "interval": 3}),
    ("llama", "random", {"budget": 0.4}),
    ("llama", "duo_attention", {"budget": 16, "start": 4, "heads": "10,01"}),
    ("gemma2", "knorm", {"budget": 40, "quantize": "int4", "quantize_group": 16, "quantize_residual": 16}),
]


def static(family: str, policy: str, **options: Any) -> Any:
    """A model that decodes and runs chunks from static buffers, lowered as for a GPU, without torch.compile."""
    model = rewrite(original(family), captured(family), policy, None, **options)
    folded = fold(model.graph_module)
    execution = Execution(lower_prefill(folded), None)
    model.executor = Executor(execution, DecodeRunner(model, folded, None, capture=False))
    if why_not(model.program, model.policy, model.device) is None:
        model.executor.prompt = PrefillRunner(execution, capture=False)
    return model


def tokens(rows: int = 2, length: int = 90) -> Tensor:
    """Random tokens, none twice in a row's text."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(96, generator=generator)[:length] + 1 for _ in range(rows)])


def same(plain: Any, ours: Any) -> None:
    """What two caches keep, hold and count."""
    assert plain.positions() == ours.positions()
    for name in ("seen", "generated", "length", "next_rotary", "ranks_frozen", "columns"):
        assert getattr(plain, name) == getattr(ours, name), name
    assert plain.memory().live == ours.memory().live and plain.memory().leased == ours.memory().leased


@pytest.mark.parametrize(
    ("family", "policy", "options"), [*CASES, *(pytest.param(*case, marks=pytest.mark.thorough) for case in MORE)]
)
def test_same_as_plain(family: str, policy: str, options: dict[str, Any]) -> None:
    """A padded prompt, tokens across a border of pages, another prompt, and tokens again."""
    models = [rewritten(family, policy, **options), static(family, policy, **options)]
    caches = [m.new_cache(2) for m in models]
    ids, mask, at = tokens(), torch.ones(2, 90, dtype=torch.long), 0
    mask[1, :5] = 0
    for width in (54, *[1] * 13, 9, *[1] * 5):
        part = {"input_ids": ids[:, at : at + width], "attention_mask": mask[:, at : at + width]}
        keep = 1 if width == 54 else 0  # chunks without logits are run by what captures them
        expected, got = [m(**part, past_key_values=c, logits_to_keep=keep).logits for m, c in zip(models, caches)]
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
        at += width
        if at % 6 == 0 or width > 1:
            same(*caches)
    same(*caches)
    run = models[1].executor.prompt
    assert not isinstance(run, PrefillRunner) or "chunk" not in options or run._chunks  # chunks did run from buffers


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("locret", {"budget": 16, "chunk": 8, "stabilizers": 4, "local_tail": 3, "decode_eviction": True}),
        ("sirllm", {"budget": 16, "chunk": 10}),
        ("attention_gate", {"chunk": 20}),
    ],
    ids=["locret", "sirllm", "attention_gate"],
)
def test_requests_take_turns_and_fork(policy: str, options: dict[str, Any]) -> None:
    """Two requests one token each in turn, and a fork of one of them: nobody disturbs the others."""
    plain, ours = rewritten("llama", policy, **options), static("llama", policy, **options)
    ids = tokens(2, 60)
    # The fork goes on with other tokens of its row: one that its text has already would tie with itself in Locret's first layer.
    texts = [ids[:1], ids[1:], torch.cat([ids[:1, :36], ids[:1, 48:]], 1)]
    pairs = []
    for text in texts[:2]:
        pair = [m.new_cache(1) for m in (plain, ours)]
        for model, cache in zip((plain, ours), pair):
            model(text[:, :30], past_key_values=cache)
        pairs.append(pair)
    for t in range(30, 42):
        if t == 36:
            pairs.append([cache.fork() for cache in pairs[0]])
        for text, pair in zip(texts, pairs):
            token = text[:, t : t + 1]
            expected, got = [m(token, past_key_values=c).logits for m, c in zip((plain, ours), pair)]
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    for pair in pairs:
        same(*pair)


@pytest.mark.parametrize("policy", ["h2o", "knorm"])
def test_every_prompt_deals_anew(policy: str) -> None:
    """Heads that compete go on with what their last prompt gave them, not the one before."""
    options = {"budget": 16, "head_budgets": "adakv"}
    plain, ours = rewritten("llama", policy, **options), static("llama", policy, **options)
    caches = [m.new_cache(2) for m in (plain, ours)]
    for begin, end in ((0, 30), (30, 31), (31, 32), (32, 60), *((t, t + 1) for t in range(60, 64))):
        part = tokens()[:, begin:end]
        expected, got = [m(part, past_key_values=c).logits for m, c in zip((plain, ours), caches)]
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
        same(*caches)


@pytest.mark.parametrize("quantize", ["none", "fp8"])
def test_states_and_lengths_follow_the_request(quantize: str) -> None:
    """Another request takes its turn, one is forked while it is bound, and one begins anew."""
    options = {"budget": 24, "quantize": quantize, "quantize_group": 4, "quantize_residual": 8}
    plain, ours = rewritten("llama", "h2o", **options), static("llama", "h2o", **options)
    ids = tokens(2, 60)

    def check(pair: tuple[Any, Any], row: int, at: int, width: int) -> None:
        token = ids[row : row + 1, at : at + width]
        expected, got = [m(token, past_key_values=c).logits for m, c in zip((plain, ours), pair)]
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)

    first, second = [(plain.new_cache(1), ours.new_cache(1)) for _ in range(2)]
    check(first, 0, 0, 30)
    check(second, 1, 0, 21)
    for t in (30, 31):
        check(first, 0, t, 1)
        check(second, 1, t, 1)
    forks = (second[0].fork(), second[1].fork())
    check(second, 1, 32, 1)
    check(forks, 1, 40, 1)
    for cache in forks:
        cache.reset()
    check(forks, 0, 0, 12)
    check(forks, 0, 12, 1)
    for pair in (first, second, forks):
        same(*pair)


def test_a_cache_that_is_gone_is_not_held() -> None:
    """Pools belong to the model, pages to the caches that live."""
    model = static("llama", "h2o", budget=16)
    stores = model.shared_stores()
    for _ in range(3):
        cache = model.new_cache(1)
        model(tokens(1, 30), past_key_values=cache)
        model(tokens(1, 1), past_key_values=cache)
        del cache
    (store,) = stores
    model.new_cache(1).memory()  # whoever comes next returns the pages
    assert len(store.free) == store.total - 1 and not store.references.any()


@pytest.mark.parametrize("options", [{"budget": 200}, {"budget": None}])
def test_tables_have_room(options: dict[str, Any]) -> None:
    """A cache that grows over a border of pages needs new buffers only where the pool grows; the next request needs none."""
    policy = "h2o" if options["budget"] else "full"
    model = static("llama", policy, **{k: v for k, v in options.items() if v})
    steps = []
    for _ in range(2):
        cache = model.new_cache(1)
        model(tokens(1, 30), past_key_values=cache)
        for t in range(80):
            model(tokens(1, 90)[:, t : t + 1], past_key_values=cache)
            steps.append(model.decoder._steps[1].tables[0])
        del cache
    assert len({id(table) for table in steps}) <= 2
    assert all(table is steps[79] for table in steps[80:])


def test_rotated_keys_come_back() -> None:
    """Rotating cached keys for decoding and taking that back gives the keys of before."""
    model = static("llama", "locret", budget=16, chunk=8, stabilizers=4, local_tail=3)
    cache = model.new_cache(2)
    model(tokens()[:, :30], past_key_values=cache)
    lease = cache.leases[0]
    before = lease.store.k_pages.clone()
    model.decoder.key_rotation.rotate(cache)
    assert not torch.allclose(lease.store.k_pages, before, atol=1e-3)
    model.decoder.key_rotation.undo(cache)
    live = torch.unique(lease.table)[1:].long()
    torch.testing.assert_close(lease.store.k_pages[live], before[live], rtol=0, atol=1e-6)


def test_what_is_not_captured_says_why() -> None:
    """What asks the device, and what has no kernels for single tokens."""
    for policy, options, reason in (
        ("h2o", {"budget": 16, "merge": True}, "merging asks the device"),
        ("streaming_llm", {"budget": 40, "quantize": "int8", "quantize_residual": 0}, "codes can't be rotated"),
        ("fast_kvzip", {"budget": 16}, "layers of fast_kvzip share one budget"),
    ):
        model = rewrite(original("llama"), captured("llama"), policy, None, **options)
        with pytest.warns(UserWarning, match=reason):
            model.compile(static_decode=True, backend="eager")
        assert model.decoder is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("h2o", {"budget": 16}),
        ("kvzip", {"budget": 16, "repeat_chunk": 20}),
        ("adakv", {"budget": 16, "window": 6, "kernel": 3}),
        ("kvzap", {"threshold": 0.0, "window": 6}),
        ("streaming_llm", {"budget": 16, "chunk": 10}),
        ("sirllm", {"budget": 16, "chunk": 10}),
        ("attention_gate", {"chunk": 20}),
        ("h2o", {"budget": 50, "quantize": "int8", "quantize_group": 16, "quantize_residual": 16}),
    ],
    ids=["h2o", "kvzip", "adakv", "kvzap", "streaming_llm", "sirllm", "attention_gate", "int8"],
)
def test_new_requests_replay_what_was_captured(policy: str, options: dict[str, Any]) -> None:
    """One capture for a batch size; a second request of it replays; another batch size has its own. (The larger one comes first:
    a pool that has to grow for it moves, and all is captured anew.)"""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = rewrite(original("llama"), captured("llama"), policy, None, **options)
    # Its parameters are the original's own, which the other tests want where they are.
    model.graph_module = model.program.graph = copy.deepcopy(model.graph_module)
    model.to("cuda").compile()
    plain = rewritten("llama", policy, **options)
    # What is rounded differently before may get another code: one step of a channel then.
    limit = 2e-3 if "quantize" in options else 1e-4
    for batch, captures in ((2, 1), (2, 1), (1, 2), (2, 2)):
        ids = tokens(batch, 60)
        caches = [plain.new_cache(batch), model.new_cache(batch)]
        for at, width in ((0, 40), *((t, 1) for t in range(40, 60))):
            expected = plain(ids[:, at : at + width], past_key_values=caches[0], logits_to_keep=1).logits
            got = model(ids[:, at : at + width].to("cuda"), past_key_values=caches[1], logits_to_keep=1).logits
            torch.testing.assert_close(got.cpu(), expected, rtol=limit, atol=limit)
        assert caches[0].positions() == caches[1].positions()
        del caches
        assert model.decoder.captures == captures


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("locret", {"budget": 16, "chunk": 8, "stabilizers": 4, "local_tail": 3}),
        ("streaming_llm", {"budget": 16, "chunk": 8, "positions": "original"}),
        ("streaming_llm", {"budget": 16, "chunk": 8}),
        ("h2o", {"budget": 16, "chunk": 8}),
        ("h2o", {"budget": 16, "head_budgets": "adakv", "chunk": 8}),
        ("sirllm", {"budget": 16, "chunk": 8}),
        ("attention_gate", {"budget": 16, "chunk": 8}),
    ],
    ids=["locret", "streaming_llm", "contiguous", "h2o", "ragged", "sirllm", "attention_gate"],
)
def test_chunks_are_captured(policy: str, options: dict[str, Any]) -> None:
    """Chunks of a shape are captured when it comes again, a second prompt replays them; cache and answer are those of the plain
    path. Rows are padded, and between the prompts another cache makes the pools grow."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = rewrite(original("llama"), captured("llama"), policy, None, **options)
    model.graph_module = model.program.graph = copy.deepcopy(model.graph_module)
    model.to("cuda").compile()
    plain = rewritten("llama", policy, **options)
    ids, mask = tokens(2, 80), torch.ones(2, 70, dtype=torch.long)
    mask[1, :5] = 0
    captures = []
    for request in range(3):
        caches = [plain.new_cache(2), model.new_cache(2)]
        outs = []
        for m, cache in zip((plain, model), caches):
            given = [x.to(m.device) for x in (ids, mask)]
            out = [m(given[0][:, :70], attention_mask=given[1], past_key_values=cache, logits_to_keep=1).logits]
            out += [m(given[0][:, t : t + 1], past_key_values=cache).logits for t in range(70, 73)]
            outs.append(torch.cat(out, 1).cpu())
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
        assert caches[0].positions() == caches[1].positions()
        captures.append(model.executor.prompt.captures)
        if request == 1:
            lease = caches[1].leases[0]
            del caches, cache
            lease.store._grow(lease.store.total + 7)
    assert 0 < captures[0] <= captures[1] < captures[2]


def test_a_cache_outlives_compile() -> None:
    """A request that began compiled goes on where the model is not compiled any more."""
    options = {"budget": 16, "chunk": 8, "stabilizers": 4, "local_tail": 3}
    models = [rewritten("llama", "locret", **options), static("llama", "locret", **options)]
    caches = [m.new_cache(2) for m in models]
    for at, width in ((0, 30), (30, 1), (31, 1), (32, 1), (33, 5), (38, 1)):
        if at == 32:
            models[1].uncompile()
        expected, got = [m(tokens()[:, at : at + width], past_key_values=c).logits for m, c in zip(models, caches)]
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    same(*caches)
