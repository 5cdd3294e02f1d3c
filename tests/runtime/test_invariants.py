"""What every policy must keep on every model: exact without eviction, and the same whatever else is in the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvrewrite.errors import OptionError, UnsupportedModelError
from tests.support.foreign import FOREIGN
from tests.support.products import covering, daily
from tests.support.rewritten import build, captured, logits, original, ours, rewritten
from tests.support.zoo import FAMILIES, VOCAB, WALKED

ALL = [*FAMILIES, *WALKED, *FOREIGN]
# Each of these goes through the compiler and the cache in its own way.
CORE = [
    "llama",  # plain
    "mistral",  # a window in every layer
    "phi3", # fused projections, frequencies by length
    "gemma3_text",  # windows in some layers, two rotations
    "gpt2",  # learned positions
    "gpt_oss",  # sinks, experts, a window
    "deepseek_v3",  # MLA
    "gemma3n_text",  # layers that share keys and values
    "bloom",  # ALiBi, found in the traced graph
    "NanoGPT",  # not from transformers
]  # fmt: skip

# What can't be had, and the words that say so. Nothing else may be refused.
NO_ROTATION = "needs rotary embeddings"
CONTIGUOUS_REFUSED = {
    **dict.fromkeys(["gpt2", "opt", "bloom", "falcon", "gpt_neo", "mpt", "xglm"], NO_ROTATION),
    **dict.fromkeys([n for n in FOREIGN if not n.startswith("RopeTable")], NO_ROTATION),
    "deepseek_v3": "MLA",
    "falcon_rope": "before the rotation its keys never have",  # keys are repeated for their group first
}
REFUSED = {
    "locret": {"deepseek_v3": "latent attention"},
    "locret_q": {"deepseek_v3": "latent attention"},
    "expected_attention": {"deepseek_v3": "MLA"},
    "leverage": {"deepseek_v3": "MLA"},
    "compactor": {"deepseek_v3": "MLA"},
    "attention_gate": {"deepseek_v3": "latent attention"},
    "kvzip": {"mistral": "every layer of this model has a sliding window"},
}

# (policy, positions): options that differ from full_budget() / evicting() below
POLICIES = [
    ("full", "original"),
    ("streaming_llm", "contiguous"),
    ("streaming_llm", "original"),
    ("h2o", "original"),
    ("h2o", "contiguous"),
    ("locret", "contiguous"),
    ("locret", "original"),
]
EVICTING = [p for p in POLICIES if p[0] != "full"]
# These go through parts of the compiler that the ones above exercise on all families; so the core families are enough.
MORE = sorted(
    [
        (p.name, "original" if p().positions == "original" else "contiguous")
        for p in ours()
        if p.name not in dict(POLICIES)
    ]
    + [("sirllm", "original")]
)
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {"chunk": 7},
    "streaming_llm": {"start": 2, "chunk": 7},
    "h2o": {"chunk": 9},
    "locret": {"chunk": 8, "stabilizers": 3, "local_tail": 4},
    "adakv": {"window": 4, "kernel": 3},
    "attention_gate": {"chunk": 9},
    "compactor": {"start": 2, "recent_tokens": 2, "sketch": 5, "block": 7},
    "duo_attention": {"start": 3, "chunk": 9},
    "expected_attention": {"n_sink": 2, "n_future": 6},
    "fast_kvzip": {"n_sink": 1, "interval": 4, "decode_window": 2, "window": 5, "chunk": 9},
    "finch": {"window": 4},
    "keydiff": {"chunk": 6},
    "knorm": {},
    "kvzip": {"n_sink": 1, "repeat_chunk": 10, "lead": 3, "chunk": 9},
    "kvzap": {"threshold": -9.0, "window": 3, "chunk": 9},
    "lagkv": {"n_sink": 2, "lag_size": 4},
    "leverage": {"sketch": 5},
    "locret_q": {"chunk": 8, "stabilizers": 3, "local_tail": 4, "start": 5},
    "nacl": {"interval": 4},
    "non_causal_attn": {"block": 7},
    "pyramidkv": {"window": 4, "kernel": 3, "beta": 4},
    "qfilters": {"window": 3},
    "r_kv": {"buffer": 3, "window": 3, "kernel": 3},
    "random": {},
    "random_attention": {"buffer": 3, "protect_prompt": False},
    "scissorhands": {"recent_tokens": 3},
    "sirllm": {"chunk": 7},
    "snapkv": {"window": 4, "kernel": 3},
    "tova": {},
    "trim_kv": {"buffer_size": 3, "retention_gate": "rg"},
}
BUDGET = 12
# What these need beyond the others (the layer's input, windows without gates, shared keys and values) is in these families.
LEARNED = {"duo_attention", "fast_kvzip", "kvzap", "qfilters", "trim_kv"}
LEARNED_FAMILIES = {"llama", "gemma3_text", "gemma3n_text", "bloom"}
# Equal scores, where rounding decides: keys of one norm (RMSNorm with fresh weights), and equal keys of equal tokens in
# the first layer of a model without RoPE.
TIES = {("gemma3_text", "knorm"), ("gemma3n_text", "knorm"), ("bloom", "keydiff"), ("bloom", "knorm")}


def families(names: list[str]) -> list[Any]:
    """One process per family, so that each is captured once."""
    return [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in names]


def in_core(chosen: list[tuple[str, str]]) -> list[Any]:
    """(family, policy, positions) for the core families."""
    pairs = [(n, *p) for n in CORE for p in chosen if p[0] not in LEARNED or n in LEARNED_FAMILIES]
    return [pytest.param(*pair, marks=pytest.mark.xdist_group(pair[0])) for pair in pairs]


def refused(case: Mapping[str, Any]) -> bool:
    """Whether the compiler refuses this family with this policy."""
    name, policy, positions = case["name"], case["policy"], case["positions"]
    return (positions == "contiguous" and name in CONTIGUOUS_REFUSED) or name in REFUSED.get(policy, {})


def ties(case: Mapping[str, Any]) -> bool:
    return (case["name"], case["policy"]) in TIES


# What is refused is chosen by itself. See test_what_runs_every_day for what all of these come to.
families_and_policies = covering({"name": 2, ("policy", "positions"): 3}, apart=refused)


def pair(case: Mapping[str, Any]) -> tuple[str, str, str]:
    return case["name"], case["policy"], case.get("positions", "original")


def every_policy(beside: Callable[[], list[Any]] = list) -> Any:
    """Each once, if possible with a family that tests beside this one do not take for it."""

    @functools.cache
    def taken() -> set[tuple[str, str, str]]:
        return {pair(case) for test in beside() for case in daily(test)}

    once = {"name": 1, ("policy", "positions"): 1}
    return covering(once, apart=lambda case: refused(case) or ties(case), prefer=lambda case: pair(case) not in taken())


def get(name: str, policy: str, positions: str, **options: Any) -> Any:
    """The rewritten family; skips what is known to be refused, with the compiler's reason."""
    expected = []
    if positions == "contiguous" and name in CONTIGUOUS_REFUSED:
        expected.append(CONTIGUOUS_REFUSED[name])
    if name in REFUSED.get(policy, {}):
        expected.append(REFUSED[policy][name])
    if not expected:
        return rewritten(name, policy, positions=positions, **{**OPTIONS.get(policy, {}), **options})
    with pytest.raises((OptionError, UnsupportedModelError)) as refusal:
        rewritten(name, policy, positions=positions, **{**OPTIONS.get(policy, {}), **options})
    assert any(words in str(refusal.value) for words in expected)
    pytest.skip(str(refusal.value))


@functools.cache
def reference(name: str, frequencies: str = "long") -> nn.Module:
    """The unmodified model; its rotary frequencies pinned where they depend on the length (phi3's longrope)."""
    tables = captured(name).rotary_tables
    if not tables:
        return original(name)
    model = build(name)
    rotary = model.model.rotary_emb  # type: ignore[union-attr]
    rotary.inv_freq.copy_(getattr(tables[0], frequencies))
    rotary.rope_type = "default"
    return model


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, none twice in a row of the batch, so that no two scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VOCAB - 1, generator=generator)[:length] + 1 for _ in range(rows)])


def feed(model: Any, cache: Any, ids: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Logits of all tokens, given in calls of these widths (the last one as often as it takes)."""
    out, at, i = [], 0, 0
    while at < ids.shape[1]:
        width = widths[min(i, len(widths) - 1)]
        out.append(model(ids[:, at : at + width], past_key_values=cache).logits)
        cache.end_prompt()  # further calls are further prompts
        at, i = at + width, i + 1
    return torch.cat(out, dim=1)


def same(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------ without eviction
@families_and_policies
@pytest.mark.parametrize(("policy", "positions"), POLICIES)
@pytest.mark.parametrize("name", families(ALL))
def test_exact_without_eviction(name: str, policy: str, positions: str) -> None:
    """Budget >= length: the original's logits, for the whole prompt, in uneven calls, and token by token at both ends."""
    model = get(name, policy, positions, **({} if policy == "full" else {"budget": 64}))
    ids = tokens(2, 26)
    expected = logits(reference(name), ids)
    for widths in ((26,), (5, 1, 11, 2, 7), (1, 1, 1, 17, 1)):
        cache = model.new_cache(2)
        same(feed(model, cache, ids, widths), expected, 1e-4)
        assert cache.seen == [26, 26] and cache.get_seq_length() == 26


@every_policy(
    lambda: [
        test_padded_rows_are_the_rows_alone,
        test_reset_and_interleaved_requests,
        test_a_row_without_any_token,
    ]
)
@pytest.mark.parametrize(("name", "policy", "positions"), in_core([p for p in MORE if p[0] != "attention_gate"]))
def test_more_are_exact_without_eviction(name: str, policy: str, positions: str) -> None:
    """The same for the other policies; gates evict whatever the budget, see test_attention_gate.py."""
    model = get(name, policy, positions, budget=64)
    ids = tokens(2, 26)
    same(feed(model, model.new_cache(2), ids, (9, 11, 1)), logits(reference(name), ids), 1e-4)


@pytest.mark.parametrize("name", families([n for n in ALL if n not in FOREIGN]))
def test_generate_is_the_originals(name: str) -> None:
    """Greedy generation at full budget: each row as the unmodified model generates it alone, also left-padded."""
    model, plain = get(name, "full", "original"), reference(name, "short")
    rows = [tokens(1, n, seed=n) for n in (14, 9)]
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [plain.generate(r, attention_mask=torch.ones_like(r), **settings)[0, r.shape[1] :] for r in rows]  # type: ignore[operator]
    ids, mask = torch.zeros(2, 14, dtype=torch.long), torch.zeros(2, 14, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 14 - row.shape[1] :], mask[i, 14 - row.shape[1] :] = row[0], 1
    got = model.generate(ids, attention_mask=mask, **settings)[:, 14:]
    assert got.tolist() == [e.tolist() for e in expected]


@pytest.mark.xdist_group("phi3")
@pytest.mark.parametrize(("max_length", "frequencies"), [(None, "long"), (32, "short"), (33, "long")])
@pytest.mark.parametrize(("policy", "positions"), [("full", "original"), ("streaming_llm", "contiguous")])
def test_longrope(policy: str, positions: str, max_length: int | None, frequencies: str) -> None:
    """Frequencies go by the request's longest length, not by how far a call has come."""
    model = get("phi3", policy, positions, **({} if policy == "full" else {"budget": 64}))
    ids = tokens(1, 30)
    for widths in ((30,), (13, 1)):
        got = feed(model, model.new_cache(1, max_length=max_length), ids, widths)
        same(got, logits(reference("phi3", frequencies), ids), 1e-4)
    other = "short" if frequencies == "long" else "long"
    assert (got - logits(reference("phi3", other), ids)).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------ with eviction
class Row:
    """What one row got out: its logits token by token, and what was kept after each call that gave it tokens."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.kept: list[Any] = []

    def check(self, alone: Row) -> None:
        assert self.kept == alone.kept
        same(torch.cat(self.logits), torch.cat(alone.logits), 1e-5)


def drive(model: Any, cache: Any, calls: list[list[tuple[list[int], str]]]) -> list[Row]:
    """Runs calls of (tokens, side of the padding) per row on one cache."""
    rows = [Row() for _ in calls[0]]
    for call in calls:
        width = max(len(t) for t, _ in call)
        ids, mask = torch.zeros(len(call), width, dtype=torch.long), torch.zeros(len(call), width, dtype=torch.long)
        spans = []
        for b, (row, side) in enumerate(call):
            start = width - len(row) if side == "left" else 0
            spans.append(slice(start, start + len(row)))
            ids[b, spans[b]], mask[b, spans[b]] = torch.tensor(row, dtype=torch.long), 1
        out = model(ids, attention_mask=mask, past_key_values=cache).logits
        positions = cache.positions()
        for b, (row, _) in enumerate(call):
            if row:
                rows[b].logits.append(out[b, spans[b]])
                rows[b].kept.append({layer: heads[b] for layer, heads in positions.items()})
    return rows


def decoding(prompts: list[list[int]], steps: int) -> list[list[tuple[list[int], str]]]:
    """Answers of `steps` tokens for every row."""
    return [[([(p[0] * 7 + 13 * i) % (VOCAB - 1) + 1], "left") for p in prompts] for i in range(steps)]


def evicting(name: str, policy: str, positions: str, **options: Any) -> Any:
    return get(name, policy, positions, **({} if policy == "attention_gate" else {"budget": BUDGET}), **options)


def check_rows_alone(model: Any, calls: list[list[tuple[list[int], str]]], must_evict: bool = True) -> None:
    """Every row of a batch is what it is alone, without padding."""
    together = drive(model, model.new_cache(len(calls[0])), calls)
    for b, row in enumerate(together):
        mine = [[(call[b][0], "left")] for call in calls if call[b][0]]
        alone = drive(model, model.new_cache(1), mine)[0]
        given = sum(len(t) for call in mine for t, _ in call)
        kept = [len(head) for heads in alone.kept[-1].values() for head in heads]
        assert min(kept) < given or not must_evict, "nothing was evicted"
        row.check(alone)


@every_policy(lambda: [test_reset_and_interleaved_requests, test_a_row_without_any_token])
@pytest.mark.parametrize(("name", "policy", "positions"), in_core(EVICTING + MORE))
def test_padded_rows_are_the_rows_alone(name: str, policy: str, positions: str) -> None:
    if (name, policy) in TIES:
        pytest.skip("its scores tie")
    model = evicting(name, policy, positions)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (26, 17, 20)]
    prompt = [(prompts[0], "left"), (prompts[1], "left"), (prompts[2], "right")]
    # Some head may keep everything that passes its gate.
    check_rows_alone(model, [prompt, *decoding(prompts, 6)], must_evict=policy != "attention_gate")


@covering({"name": 1, ("policy", "positions", "decode_eviction"): 1})
@pytest.mark.parametrize("decode_eviction", [True, False])
@pytest.mark.parametrize(("policy", "positions"), [("streaming_llm", "contiguous"), ("h2o", "original"),
                                                   ("locret", "contiguous")])  # fmt: skip
@pytest.mark.parametrize("name", families(["llama", "gemma3_text", "gpt2"]))
def test_rows_that_start_late(name: str, policy: str, positions: str, decode_eviction: bool) -> None:
    """Rows that are all padding for a while, in prompts and in decoding; rows that pause."""
    model = evicting(name, policy, positions, decode_eviction=decode_eviction)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (23, 15, 19)]
    steps = decoding(prompts, 9)
    nothing: tuple[list[int], str] = ([], "left")
    calls = [
        [(prompts[0], "left"), nothing, nothing],
        [steps[0][0], (prompts[1], "right"), nothing],
        [steps[1][0], steps[1][1], nothing],
        [nothing, steps[2][1], (prompts[2][:1], "left")],
        [steps[3][0], nothing, (prompts[2][1:], "left")],
        *steps[4:],
    ]
    # Locret without eviction in decoding keeps whole prompts that are shorter than its budget and tail.
    check_rows_alone(model, calls, must_evict=decode_eviction or policy != "locret")


@covering({"name": 1, "policy": 1})
@pytest.mark.parametrize("policy", [p.name for p in ours()])
@pytest.mark.parametrize("name", families(["llama", "gpt2"]))
def test_a_row_without_any_token(name: str, policy: str) -> None:
    """A row that stays empty harms nobody, not even itself."""
    model = get(name, policy, "original") if policy == "full" else evicting(name, policy, "original")
    prompt = tokens(1, 20)[0].tolist()
    calls = [[(prompt, "left"), ([], "left")], *[[s[0], ([], "left")] for s in decoding([prompt], 5)]]
    cache = model.new_cache(2)
    together = drive(model, cache, calls)
    together[0].check(drive(model, model.new_cache(1), [call[:1] for call in calls])[0])
    assert cache.seen == [25, 0] and all(int(live[1].sum()) == 0 for live in cache.live_slots().values())
    out = model(torch.zeros(2, 3, dtype=torch.long), attention_mask=torch.zeros(2, 3), past_key_values=cache).logits
    assert bool(torch.isfinite(out).all()) and cache.seen == [25, 0]


@every_policy()
@pytest.mark.parametrize(
    ("name", "policy", "positions"),
    [pytest.param(n, *p, marks=pytest.mark.xdist_group(n)) for n in CORE for p in EVICTING]
    + [pytest.param(n, *p, marks=pytest.mark.xdist_group(n)) for n in ("llama", "gemma3_text", "gpt2") for p in MORE],
)
def test_reset_and_interleaved_requests(name: str, policy: str, positions: str) -> None:
    """A cache that was reset is as good as new, and two requests on two caches do not know of each other."""
    model = evicting(name, policy, positions)
    first, second = tokens(2, 30, seed=1), tokens(2, 30, seed=2)
    alone, used = [], model.new_cache(2)
    for ids in (first, second):
        cache = model.new_cache(2)
        alone.append((feed(model, cache, ids, (19, 4, 1)), cache.positions()))
        used.reset()
        assert used.memory().leased == used.memory().live == 0
        got = feed(model, used, ids, (19, 4, 1))
        assert torch.equal(got, alone[-1][0]) and used.positions() == alone[-1][1]
    caches, outs, at = [model.new_cache(2), model.new_cache(2)], ([], []), 0  # type: ignore[var-annotated]
    for width in (19, 4, *[1] * 7):
        for ids, cache, out in zip((first, second), caches, outs):
            out.append(model(ids[:, at : at + width], past_key_values=cache).logits)
            cache.end_prompt()
        at += width
    for (expected, kept), cache, out in zip(alone, caches, outs):
        assert torch.equal(torch.cat(out, dim=1), expected) and cache.positions() == kept


@every_policy()
@pytest.mark.parametrize(("policy", "positions"), EVICTING)
@pytest.mark.parametrize("name", families(["llama", "gemma3_text", "gpt2", "gemma3n_text"]))
def test_a_long_answer_stays_within_the_budget(name: str, policy: str, positions: str) -> None:
    """Live slots never exceed the budget, and neither pages nor pools grow, across borders of pages."""
    budget = 70
    options: dict[str, Any] = {"decode_eviction": True, "budget": budget}
    model = get(name, policy, positions, **options)
    cache = model.new_cache(2)
    out = model(tokens(2, 90), past_key_values=cache, logits_to_keep=1).logits
    reports = []
    for _ in range(60):
        out = model(out.argmax(-1), past_key_values=cache).logits
        live = cache.live_slots()
        assert all(int(slots.max()) <= budget for slots in live.values())
        assert any(int(slots.min()) == budget for slots in live.values())
        memory = cache.memory()
        reports.append((memory.live, memory.leased, memory.reserved))
    assert cache.seen == [150, 150] and len(set(reports)) == 1
    spans = {s.layer: s.window or s.chunk or budget for s in model.sites}
    assert all(int(slots.max()) <= spans[layer] for layer, slots in cache.live_slots().items())


def test_what_runs_every_day() -> None:
    """Of the products above the default tests have every family with two policies, and every policy with three families."""
    every = (
        test_exact_without_eviction,
        test_more_are_exact_without_eviction,
        test_padded_rows_are_the_rows_alone,
        test_reset_and_interleaved_requests,
    )
    cases = [case for test in every for case in daily(test) if not refused(case) and not ties(case)]
    ran = {pair(case) for case in [*cases, *daily(test_a_row_without_any_token)]}
    assert {name for name, _, _ in ran} == set(ALL)
    few = [name for name in ALL if sum(n == name for n, _, _ in ran) < 2]
    few += [str(p) for p in POLICIES + MORE if sum(tuple(rest) == p for _, *rest in ran) < 3]
    assert not few
