"""A request in a batch has the tokens and keeps the slots that it has alone, whatever the schedule and whoever is beside it."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kvrewrite.cache.request import OF_ROWS
from kvrewrite.errors import CacheError, InputError, OptionError, PoolFull
from kvrewrite.runtime.batch import Batch, Running, rows_for
from tests.runtime.test_decoding import static
from tests.runtime.test_invariants import BUDGET, OPTIONS, POLICIES, TIES
from tests.support.products import covering
from tests.support.rewritten import captured, original, ours, rewrite, rewritten
from tests.support.zoo import VOCAB

FAMILIES = ["llama", "gemma3_text", "phi3", "gpt2"]
CASES = [(name, positions) for name, positions in POLICIES if name != "full"]
CASES += [
    (p.name, "original" if p().positions == "original" else "contiguous")
    for p in ours()
    if p.name not in dict(POLICIES) and not p.recalls  # which a batch refuses (tests/policies/test_infllm.py)
]
NO_ROTATION = {"gpt2"}
ONLY_LLAMA = {
    "qfilters",
    "duo_attention",
    "fast_kvzip",
    "kvzap",
    "trim_kv",
    "attention_gate",
    "expected_attention",
    "locret_q",
}


def distinct(count: int, generator: random.Random) -> list[int]:
    """Ids without a repetition as far as there are enough: equal keys would be ties, which rounding decides."""
    ids = list(range(2, VOCAB))
    generator.shuffle(ids)
    return (ids * (1 + count // len(ids)))[:count]


def make(family: str, policy: str, positions: str, build: Callable[..., Any] = rewritten, **options: Any) -> Any:
    given = dict(OPTIONS.get(policy, {}), positions=positions, **options)
    if policy not in ("full", "kvzap", "duo_attention", "attention_gate"):
        given.setdefault("budget", BUDGET)
    return build(family, policy, **given)


@dataclass(eq=False)
class Wanted:
    """What is asked of a request, and what came of it."""

    prompt: list[int]
    count: int
    budget: int | None = None
    tokens: list[int] = field(default_factory=list)
    running: Running | None = None
    replayed: int = 0
    kept: dict[int, list[list[int]]] = field(default_factory=dict)

    def choose(self, logits: torch.Tensor) -> None:
        """The likeliest token that the text does not have yet: equal keys would be ties, which rounding decides."""
        masked = logits.clone()
        masked[self.prompt + self.tokens] = -torch.inf
        self.tokens.append(int(masked.argmax()))


def alone(model: Any, wanted: Wanted) -> Wanted:
    """The same request with nobody beside it: one call for the prompt, one for each token."""
    found = Wanted(wanted.prompt, wanted.count, wanted.budget)
    if wanted.budget is not None:
        batch = Batch(model)
        run(batch, [found], random.Random(0), most=1)
        return found
    cache = model.new_cache(1, max_length=len(wanted.prompt) + wanted.count)
    ids = torch.tensor([wanted.prompt])
    for _ in range(wanted.count):
        found.choose(model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1])
        ids = torch.tensor([found.tokens[-1:]])
    found.kept = {layer: rows[0] for layer, rows in cache.positions().items()}
    return found


def run(batch: Batch, requests: list[Wanted], generator: random.Random, most: int, preempt: float = 0.0) -> int:
    """Drives a batch by a random schedule until all have their tokens. Returns how often one was preempted."""
    waiting, active, preempted = list(requests), [], 0

    def stop(wanted: Wanted) -> None:
        assert wanted.running is not None
        batch.end(wanted.running)
        wanted.running = None
        active.remove(wanted)

    def feed(wanted: Wanted, row: torch.Tensor) -> None:
        """Takes the next token, or the one that it had before it was preempted."""
        if wanted.replayed == len(wanted.tokens):
            wanted.choose(row)
        wanted.replayed += 1
        if len(wanted.tokens) == wanted.count and wanted.replayed == wanted.count:
            wanted.kept = wanted.running.positions()  # type: ignore[union-attr]
            stop(wanted)

    while waiting or active:
        if waiting and len(active) < most and (not active or generator.random() < 0.5):
            wanted = waiting.pop(0)
            length = len(wanted.prompt) + wanted.count
            wanted.running = batch.start(wanted.prompt, max_length=length, budget=wanted.budget)
            wanted.replayed = 0
            active.append(wanted)
        try:
            begun = [w for w in active if w.running.prompt_left and generator.random() < 0.6]
            for wanted, row in zip(begun, batch.advance_together([w.running for w in begun])):
                if row is not None:
                    feed(wanted, row)
            ready = [w for w in active if not w.running.prompt_left and generator.random() < 0.8]
            generator.shuffle(ready)
            if ready:
                logits = batch.decode([w.running for w in ready], [w.tokens[w.replayed - 1] for w in ready])
                for wanted, row in zip(ready, logits):
                    feed(wanted, row)
            full = False
        except PoolFull:
            full = True
        if active and (full or generator.random() < preempt):
            wanted = generator.choice(active) if not full else active[-1]
            stop(wanted)
            waiting.insert(0, wanted)
            preempted += 1
    return preempted


@functools.cache
def asked(family: str, policy: str, positions: str) -> tuple[list[Wanted], list[Wanted]]:
    """Requests, and each alone."""
    model, generator = make(family, policy, positions), random.Random(5)
    requests = [
        Wanted(distinct(n, generator), c) for n, c in ((21, 6), (1, 9), (13, 1), (30, 8), (12, 5), (17, 12), (25, 3))
    ]
    return requests, [alone(model, w) for w in requests]


# Policies that keep something of their own beside slots, or deal slots out in their own way. One of the others stands for the
# rest, whose padded rows are in test_invariants.py every day.
OWN_WAYS = {
    "adakv",
    "attention_gate",
    "compactor",
    "duo_attention",
    "fast_kvzip",
    "finch",
    "h2o",
    "kvzip",
    "locret",
    "nacl",
    "r_kv",
    "random_attention",
    "scissorhands",
    "sirllm",
    "snapkv",
    "streaming_llm",
    "tova",
}


def skipped(case: Mapping[str, Any]) -> str | None:
    """Why there is nothing to be shown of a case."""
    family, policy, positions = case["family"], case["policy"], case["positions"]
    if (positions == "contiguous" and family in NO_ROTATION) or (policy in ONLY_LLAMA and family != "llama"):
        return "the compiler refuses this pair"
    return "its scores tie" if (family, policy) in TIES else None


@covering(
    {"family": 1, "policy": 0, "kind": 1, "positions": 1},
    apart=lambda case: skipped(case) is None,
    derived={"kind": lambda case: case["policy"] if case["policy"] in OWN_WAYS else "any"},
    prefer=lambda case: case["family"] == "llama",  # the cheapest
)
@pytest.mark.parametrize("policy, positions", CASES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_request_is_the_one_that_it_is_alone(family: str, policy: str, positions: str, seed: int) -> None:
    """Tokens and kept slots, over random schedules with joins, leaves and preemptions."""
    if reason := skipped({"family": family, "policy": policy, "positions": positions}):
        pytest.skip(reason)
    model, (requests, expected) = make(family, policy, positions), asked(family, policy, positions)
    found = [Wanted(w.prompt, w.count) for w in requests]
    batch = Batch(model)
    run(batch, found, random.Random(seed), most=5, preempt=0.05)
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f.tokens == e.tokens, i
        assert f.kept == e.kept, i
    assert batch.used == 0


@pytest.mark.parametrize(
    "policy, positions, more",
    [
        ("streaming_llm", "contiguous", {}),
        pytest.param("h2o", "original", {}, marks=pytest.mark.thorough),  # quantized below
        pytest.param("snapkv", "original", {}, marks=pytest.mark.thorough),
        ("adakv", "original", {}),
        ("h2o", "original", {"quantize": "int8", "quantize_group": 4, "quantize_residual": 4}),
        ("locret", "contiguous", {}),
    ],
)
def test_static_buffers_of_a_batch(policy: str, positions: str, more: dict[str, Any]) -> None:
    """The same where the decode step runs from static buffers, in which rows without a request rest."""
    plain, model = (make("llama", policy, positions, build, **more) for build in (rewritten, static))
    requests = [Wanted(distinct(n, random.Random(n)), c) for n, c in ((21, 6), (9, 12), (13, 1), (30, 8), (17, 5))]
    expected = [alone(plain, w) for w in requests]
    assert model.decoder is not None
    found = [Wanted(w.prompt, w.count) for w in requests]
    run(Batch(model), found, random.Random(3), most=5, preempt=0.03)
    for f, e in zip(found, expected, strict=True):
        assert f.tokens == e.tokens
        assert f.kept == e.kept


def test_rows_of_a_step() -> None:
    """Few numbers of rows, few of which rest; rows come and go as requests do."""
    sizes = sorted({rows_for(n) for n in range(1, 257)})
    assert sizes == [1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    assert all(rows_for(n) >= n and rows_for(rows_for(n)) == rows_for(n) for n in range(1, 1000))
    assert all(rows_for(n) <= 1.25 * n + 1 for n in range(64, 1000))
    batch = Batch(make("llama", "h2o", "original"))
    first = batch.start(distinct(5, random.Random(0)), max_length=40)
    batch.advance(first)
    requests = [first, *(batch.fork(first) for _ in range(32))]
    alone = batch.decode(requests, [3] * 33)
    rows = next(iter(batch._groups.values())).members
    assert len(rows) == 48
    assert all(torch.equal(row, alone[0]) for row in alone[:33])
    joined = next(iter(batch._groups.values())).rows
    assert all(len(getattr(joined, name)) == 48 for name in OF_ROWS)
    for request in requests[6:]:
        batch.end(request)
    rows = next(iter(batch._groups.values())).members
    assert len(rows) == 16 and sum(m is not None for m in rows) == 6
    assert all(len(getattr(joined, name)) == 16 for name in OF_ROWS)
    again = batch.decode(requests[:6], [5] * 6)
    assert all(torch.equal(row, again[0]) for row in again)


def test_what_is_planned_ahead_serves_a_batch() -> None:
    """Tokens of a batch whose requests stay are planned while the device works on the ones before."""
    model = copy.deepcopy(make("llama", "h2o", "original"))
    model.compile(static_decode=True, backend="eager")
    batch, planned = Batch(model), 0
    requests = [batch.start(distinct(9, random.Random(i)), max_length=40) for i in range(3)]
    tokens = [int(batch.advance(r).argmax()) for r in requests]
    for _ in range(12):
        for group in batch._groups.values():
            planned += model.decoder.has_planned(torch.zeros(4, 1, dtype=torch.int64), group.rows)
        tokens = batch.decode(requests, tokens).argmax(-1).tolist()
    assert planned >= 8


@pytest.mark.parametrize(
    "policy, positions", [("streaming_llm", "contiguous"), ("h2o", "original"), ("adakv", "original")]
)
def test_a_pool_that_is_full(policy: str, positions: str) -> None:
    """Where pages run out a step says so before it begins; whoever is preempted has the same answer later."""
    model, (requests, expected) = make("llama", policy, positions), asked("llama", policy, positions)
    page = sum(2 * 2 * s.page_bytes for s in Batch(model).stores)  # a page for each head of each layer
    batch = Batch(model, memory=3 * page)
    found = [Wanted(w.prompt, w.count) for w in requests]
    assert run(batch, found, random.Random(1), most=6) > 0
    for f, e in zip(found, expected, strict=True):
        assert f.tokens == e.tokens
        assert f.kept == e.kept
    assert batch.used == 0


def test_nobody_goes_on_alone_where_pages_are_short() -> None:
    """Requests with short and with long rotary frequencies go through the graph in two passes: both happen, or none."""
    model = make("phi3", "full", "original")
    (threshold,) = {table.threshold for table in model.program.layout.length_tables}
    page = sum(2 * 2 * s.page_bytes for s in Batch(model).stores)
    prompts, lengths = [distinct(7, random.Random(i)) for i in range(2)], (12, threshold + 12)
    tight, wide = Batch(model, memory=page), Batch(model)
    for batch in (tight, wide):
        pair = [batch.start(prompt, max_length=n) for prompt, n in zip(prompts, lengths)]
        if batch is tight:
            with pytest.raises(PoolFull):
                batch.advance_together(pair)
            assert [r.seen for r in pair] == [0, 0] and batch.used == 0
            continue
        tokens = [int(row.argmax()) for row in batch.advance_together(pair)]
        batch.decode(pair, tokens)
        assert len(batch._groups) == 2
        for store in batch.stores:
            store.limit = store.total - len(store.free) + 1
        for _ in range(8, 64):
            batch.decode(pair, tokens)
        with pytest.raises(PoolFull):  # each needs another page in each head
            batch.decode(pair, tokens)
        assert [r.seen for r in pair] == [64, 64]


def test_a_prompt_that_never_fits_is_refused_before_any_work() -> None:
    model = make("llama", "snapkv", "original")
    page = sum(2 * 2 * s.page_bytes for s in Batch(model).stores)
    batch = Batch(model, memory=2 * page)
    with pytest.raises(InputError, match="pages, but the pool has"):
        batch.start(distinct(20, random.Random(0)), max_length=210)  # every token of the answer is held
    assert batch.used == 0
    with pytest.raises(OptionError, match="one page for each head"):
        Batch(model, memory=100)
    with pytest.raises(InputError, match="no tokens"):
        batch.start([])
    with pytest.raises(InputError, match="token ids reach"):
        batch.start([VOCAB + 3])


def test_a_budget_of_its_own() -> None:
    """A request may have another budget than the policy; the others keep theirs."""
    model, generator = make("llama", "h2o", "original"), random.Random(2)
    requests = [Wanted(distinct(n, generator), 6, b) for n, b in ((21, 8), (25, None), (30, 16), (18, None))]
    expected = [
        alone(make("llama", "h2o", "original", budget=w.budget or BUDGET), Wanted(w.prompt, w.count)) for w in requests
    ]
    found = [Wanted(w.prompt, w.count, w.budget) for w in requests]
    run(Batch(model), found, random.Random(1), most=4)
    for f, e in zip(found, expected, strict=True):
        assert f.tokens == e.tokens
        assert f.kept == e.kept
    with pytest.raises(OptionError, match="budget"):
        Batch(model).start([2, 3], budget=0)


def test_several_answers_to_one_prompt() -> None:
    """Forks share the prompt's pages until they write to them."""
    model = make("llama", "h2o", "original")
    batch, prompt = Batch(model), distinct(21, random.Random(0))
    first = batch.start(prompt, max_length=30)
    while (row := batch.advance(first)) is None:
        pass
    twins = [first, batch.fork(first), batch.fork(first)]
    begins = row.topk(3).indices.tolist()  # each goes on with another token
    tokens, answers = list(begins), [[b] for b in begins]
    for _ in range(4):
        tokens = batch.decode(twins, tokens).argmax(-1).tolist()
        for answer, token in zip(answers, tokens):
            answer.append(token)
    for begin, answer in zip(begins, answers):
        cache = model.new_cache(1, max_length=30)
        model(torch.tensor([prompt]), past_key_values=cache)
        token, expected = begin, [begin]
        for _ in range(4):
            token = int(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].argmax())
            expected.append(token)
        assert answer == expected
    for twin in twins:
        batch.end(twin)
    assert batch.used == 0


def test_a_prefix_that_requests_share() -> None:
    """A fork of a cache at a chunk's end stands for the beginning of the prompt."""
    model, generator = make("llama", "h2o", "original"), random.Random(4)
    batch, chunk = Batch(model), OPTIONS["h2o"]["chunk"]
    prompt = distinct(2 * chunk + 7, generator)
    lone = alone(model, Wanted(prompt, 5))
    begun = batch.start(prompt[: 2 * chunk])
    while batch.advance(begun) is None:
        pass
    prefix = begun.cache
    assert prefix is not None
    running = batch.start(prompt, max_length=len(prompt) + 5, prefix=prefix)
    while (row := batch.advance(running)) is None:
        pass
    found = Wanted(prompt, 5)
    found.choose(row)
    for _ in range(4):
        found.choose(batch.decode([running], found.tokens[-1:])[0])
    assert found.tokens == lone.tokens
    assert running.positions() == lone.kept


def test_misuse_is_named() -> None:
    batch = Batch(make("llama", "h2o", "original"))
    request = batch.start(distinct(20, random.Random(0)))
    with pytest.raises(CacheError, match="expected a request whose prompt is through"):
        batch.decode([request], [3])
    with pytest.raises(CacheError, match="no request"):
        batch.decode([], [])
    with pytest.raises(CacheError, match="before its first token"):
        batch.fork(request)
    batch.end(request)
    assert request.ended
    with pytest.raises(CacheError, match="ended"):
        batch.advance(request)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "policy, positions, more",
    [
        ("streaming_llm", "contiguous", {}),
        ("h2o", "original", {}),
        ("snapkv", "original", {}),
        ("adakv", "original", {}),
        ("locret", "contiguous", {}),
        ("attention_gate", "original", {}),
        ("h2o", "original", {"budget": 50, "quantize": "int8", "quantize_group": 16, "quantize_residual": 16}),
    ],
)
def test_a_batch_on_a_gpu(policy: str, positions: str, more: dict[str, Any]) -> None:
    """Captured steps of 1, 2, 4 and 8 rows, some of which rest, and prompts side by side, beside lone requests on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    given = dict(OPTIONS.get(policy, {}), positions=positions, **more)
    if policy != "attention_gate":
        given.setdefault("budget", 16)
    plain = rewritten("llama", policy, **given)
    model = rewrite(original("llama"), captured("llama"), policy, None, **given)
    model.graph_module = model.program.graph = copy.deepcopy(model.graph_module)
    model.to("cuda").compile()
    requests = [
        Wanted(distinct(n, random.Random(n)), c) for n, c in ((41, 6), (9, 12), (13, 1), (30, 8), (17, 5), (60, 7))
    ]
    expected = [alone(plain, w) for w in requests]
    batch = Batch(model, memory=64 << 20)
    for seed in range(3):
        found = [Wanted(w.prompt, w.count) for w in requests]
        run(batch, found, random.Random(seed), most=6, preempt=0.03)
        for f, e in zip(found, expected, strict=True):
            assert f.tokens == e.tokens
            assert f.kept == e.kept
        assert batch.used == 0
    assert model.decoder.captures <= 4
