"""InfLLM's memory of blocks: exact where blocks cover everything, found wherever it lies, and what is refused. Equality to the
paper under retrieval is in test_policies.py (tests/support/blocks.py)."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvrewrite
from kvrewrite import policies
from kvrewrite.analysis.memory import plan_memory
from kvrewrite.assets import small_model
from kvrewrite.cache.memory import human
from kvrewrite.errors import CacheError, OptionError, UnsupportedModelError
from kvrewrite.ir.site import AttentionSite
from kvrewrite.kernels.groups import Recalling, Tokens
from kvrewrite.kernels.recall import memory
from kvrewrite.kernels.recall.lookup import settle
from kvrewrite.policies import RowState
from kvrewrite.runtime import decode_graph
from kvrewrite.runtime.batch import Batch
from kvrewrite.tools.tables import memory_table
from tests.support.products import few
from tests.support.rewritten import original, rewritten
from tests.support.zoo import VOCAB

pytestmark = pytest.mark.xdist_group("llama")
SMALL: dict[str, Any] = {"budget": 16, "block": 8, "start": 4, "blocks": 2, "block_cache": 3, "chunk": 8}
COVERING = {**SMALL, "blocks": 9, "block_cache": 9, "distant": "original"}


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model: Any, cache: Any, ids: Tensor, widths: tuple[int, ...]) -> Tensor:
    out, at = [], 0
    for width in widths:
        out.append(model(ids[:, at : at + width], past_key_values=cache).logits)
        at += width
    return torch.cat(out, 1)


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("gpt2", "gemma3_text", "gpt_oss"))]
)
def test_covering_blocks_give_the_model(name: str) -> None:
    """Every block is looked up, where it was: the unmodified model's logits, whatever went to the memory. With a rotation,
    without, beside layers with a window, and with sinks in the softmax."""
    model, ids = rewritten(name, "infllm", **COVERING), tokens(2, 50)
    with torch.no_grad():
        expected = original(name)(ids).logits
    cache = model.new_cache(2)
    got = run(model, cache, ids, (38, 1, 1, 7, 1, 1, 1))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert max(int(n.max()) for n in cache.live_slots().values()) <= 16


def test_a_text_within_the_budget_is_exact() -> None:
    model, ids = rewritten("llama", "infllm", **SMALL), tokens(2, 16)
    with torch.no_grad():
        expected = original("llama")(ids).logits
    torch.testing.assert_close(run(model, model.new_cache(2), ids, (14, 1, 1)), expected, rtol=0, atol=1e-5)


def test_what_is_away() -> None:
    """A window of budget - block tokens stays at least, what goes are the first tokens and whole blocks."""
    policy = policies.make("infllm", **SMALL)
    gone = [policy.gone(seen) for seen in range(60)]
    assert gone[:17] == [0] * 17 and gone[17] == 4
    for seen in range(17, 60):
        assert 8 < seen - gone[seen] <= 16 and (gone[seen] - 4) % 8 == 0
    segments = policy.plan(30, RowState(seen=20))
    assert [s.values["memory_before"] for s in segments] == [gone[20], gone[28], gone[36], gone[44]]
    assert [s.keep for s in segments] == [28 - gone[28], 36 - gone[36], 44 - gone[44], 50 - gone[50]]
    sometimes = policies.make("infllm", **SMALL, refresh=4)
    assert [sometimes.decode_segment(RowState(seen=n)).values["memory_looks"] for n in range(40, 45)] == [1, 0, 0, 0, 1]


def test_only_new_blocks_are_copied() -> None:
    """Three places: what was asked for longest ago makes room."""
    use = torch.zeros(3, 2, dtype=torch.int64)
    assert settle(use, [4, 7]) == ([0, 1], [(0, 4), (1, 7)])
    assert settle(use, [7, 9]) == ([1, 2], [(2, 9)])
    assert settle(use, [7, 9]) == ([1, 2], [])
    assert settle(use, [3, 9]) == ([0, 2], [(0, 3)])
    assert settle(use, [4, 7]) == ([0, 1], [(0, 4)])
    assert use[:, 0].tolist() == [5, 8, 10]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_flash_attention_is_the_reference(dtype: torch.dtype, atol: float) -> None:
    made = [torch.randn(1, h, n, 128, device="cuda", dtype=dtype) for h, n in ((8, 70), (2, 300), (2, 300))]
    tokens, how = Tokens(*made), Recalling(128**-0.5, 0.0, 8, 2)
    (out, lse), (expected, expected_lse) = memory._flash(tokens, how), memory._plain(tokens, how)
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-2)


@pytest.mark.gpu
def test_a_gpu_keeps_the_memory_in_pinned_host_memory() -> None:
    """The CPU's logits, and host memory that copies need not wait for."""
    small = kvrewrite.transform(copy.deepcopy(original("llama")).cuda(), policy="infllm", check="off", **SMALL)
    ids, rows = tokens(2, 60), []
    for model in (rewritten("llama", "infllm", **SMALL), small):
        cache = model.new_cache(2, max_length=64)
        rows.append(run(model, cache, ids.to(model.device), (45, 1, 1, 11, 1, 1)).cpu())
        assert cache.memory().host > 0
    torch.testing.assert_close(*rows, rtol=0, atol=1e-3)
    held = [state.value for state in cache.states if state.host]
    assert held and all(value.is_pinned() and value.device.type == "cpu" for value in held)


def test_forks_and_rows_go_on_by_themselves() -> None:
    model, ids = rewritten("llama", "infllm", **SMALL), tokens(2, 60)
    expected = run(model, model.new_cache(2), ids, (45, 15))[:, 45:]
    cache = model.new_cache(2)
    model(ids[:, :45], past_key_values=cache)
    twin = cache.fork()
    run(model, cache, tokens(2, 20, seed=1), (18, 1, 1))
    twin.select([1, 0, 1])
    got = model(ids[[1, 0, 1], 45:], past_key_values=twin).logits
    torch.testing.assert_close(got, expected[[1, 0, 1]], rtol=0, atol=1e-5)


def test_saved_and_loaded(tmp_path: Path) -> None:
    small = kvrewrite.transform(original("llama"), policy="infllm", **SMALL)
    assert small.policy.distant == "constant"
    small.save_pretrained(tmp_path / "small")
    loaded, ids = kvrewrite.load(tmp_path / "small"), tokens(1, 50)
    assert torch.equal(small(ids).logits, loaded(ids).logits)
    both = [m.generate(ids, max_new_tokens=12, do_sample=False) for m in (small, loaded)]
    assert torch.equal(*both) and both[0].shape == (1, 62)


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    """The shipped model, with a window of 64 tokens and at most 6 blocks of 32 on the device; and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)
    options = {
        "budget": 96,
        "block": 32,
        "blocks": 6,
        "chunk": 16,
        "start": 16,
        "block_cache": 6,
        "representatives": 32,
    }
    return kvrewrite.transform(model, policy="infllm", check="off", **options), AutoTokenizer.from_pretrained(
        small_model()
    )


FACT = "The magic number of black wine is 5035."


def with_fact(tokenizer: Any, depth: float) -> tuple[str, int]:
    """A text with a fact at about this depth, within one block (docs/infllm.md says why); and where the fact ends, in tokens."""
    filler = ["The road is long.", "The air is clear.", "The day is bright.", "We walk on.", "Up and down again."] * 22
    for at in range(int(depth * len(filler)), len(filler)):
        text = " ".join([*filler[:at], FACT, *filler[at:]])
        begin, end = (len(tokenizer(text[: text.index(part)]).input_ids) for part in (FACT, FACT[-5:]))
        if (begin - 16) // 32 == (end + 2 - 16) // 32:
            return text, end + 2
    raise AssertionError("no place")


@pytest.mark.xdist_group("small_model")
@pytest.mark.parametrize("depth", few([0.0, 0.2, 0.4, 0.6, 0.8], rest=(0.2, 0.4, 0.8)))
def test_the_passkey_is_found_at_any_depth(small: tuple[Any, Any], depth: float) -> None:
    """It lies in a block that has left the device when the question comes: the memory brings it back."""
    model, tokenizer = small
    text, end = with_fact(tokenizer, depth)
    ids = tokenizer(f"{text}\nQ: {FACT[:-6]}", return_tensors="pt").input_ids
    cache = model.new_cache()
    out = model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache)
    reply = tokenizer.decode(out[0, ids.shape[1] :])
    assert re.search(r"\b5035\b", reply), reply
    assert all(head[0] > end for heads in cache.positions().values() for head in heads[0]) and ids.shape[1] > 5 * 96


def test_the_plan_is_what_is_held() -> None:
    """Device and host, for texts within the budget and beyond; what grows with the text is counted without room to spare."""
    model, itemsize = rewritten("llama", "infllm", **SMALL), 4
    for length in (12, 150):
        cache = model.new_cache(2, max_length=length)
        model(tokens(2, length), past_key_values=cache)
        plan, held = plan_memory(model.sites, model.policy, itemsize, length, batch=2), cache.memory()
        marks = [state.value for state in cache.states if "_marks_" in state.input]
        spare = sum(x[:, -(-length // 8) :].numel() * itemsize for x in marks)
        assert (plan.evicted, plan.host) == (held.leased - spare, held.host) and plan.peak > plan.evicted
    table = memory_table([plan])
    assert str(table.columns[-1].header) == "host memory" and list(table.columns[-1].cells) == [human(plan.host)]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no budget": ({"budget": None}, "budget is None, expected a number of slots above block"),
    "budget of a block": ({"budget": 8}, "above block"),
    "start beyond a block": ({"start": 9}, "start is 9, expected 0 to block"),
    "chunk beyond the window": ({"chunk": 9}, "chunk is 9, expected a number up to the window"),
    "whole prompt": ({"chunk": None}, "chunk is None"),
    "fewer places than blocks": ({"blocks": 4}, "a block_cache of at least blocks"),
    "more representatives than tokens": ({"representatives": 9}, "representatives of at most block"),
    "no refresh": ({"refresh": 0}, "refresh is 0, expected at least 1"),
    "a distance of its own": ({"distant": "near"}, "expected one of auto, constant, original"),
    "contiguous": ({"positions": "contiguous"}, "positions is 'contiguous', expected 'original'"),
    "quantized": ({"quantize": "int8"}, "quantize is 'int8', expected 'none'"),
    "no eviction in decoding": ({"decode_eviction": False}, "decode_eviction is False"),
    "protect_prompt": ({"protect_prompt": True}, "protect_prompt=True is not possible"),
    "merge": ({"merge": True}, "merge=True needs"),
    "heads": ({"head_budgets": "adakv"}, "head_budgets"),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_that_are_refused(name: str) -> None:
    options, reason = WRONG[name]
    with pytest.raises(OptionError, match=reason):
        policies.make("infllm", **{**SMALL, **options})


def site(layer: int = 0, **facts: Any) -> AttentionSite:
    return AttentionSite(layer, f"layers.{layer}", 4, 2, 16, 16, 0.25, "interface", **facts)


@pytest.mark.parametrize(
    ("sites", "reason"),
    [
        ([site(window=5), site(1, chunk=4)], "every layer of this model has a sliding window or a chunk"),
        ([site(), site(1, alibi=True)], r"layer 1 \(layers.1\) has ALiBi"),
        ([site(), site(1, shares_kv_with=0)], "reads the keys and values of layer 0"),
        ([site(), site(1, window=9)], "looks back 9 tokens.*use a budget of at least 17"),
    ],
)
def test_models_that_are_refused(sites: list[AttentionSite], reason: str) -> None:
    with pytest.raises((OptionError, UnsupportedModelError), match=reason):
        policies.make("infllm", **SMALL).adapt(sites, {})


def test_where_distant_tokens_stand() -> None:
    """At one distance where the rotation is known, where they were if there is none or it is not understood."""
    policy = policies.make("infllm", **SMALL)
    cases = ((True, {}, "constant"), (False, {}, "original"), (True, {"rope_problem": "odd"}, "original"))
    for rope, facts, expected in cases:
        assert getattr(policy.adapt([site(rope=rope)], facts), "distant") == expected  # noqa: B009


def test_what_it_can_not_do_yet(tmp_path: Path) -> None:
    model, ids = rewritten("llama", "infllm", **SMALL), tokens(1, 30)
    cache = model.new_cache()
    model(ids, past_key_values=cache)
    with pytest.raises(CacheError, match="keeps every token, in pages or in its memory, so none can be pinned"):
        cache.pin(0, 4)
    with pytest.raises(CacheError, match="none can be dropped"):
        cache.drop(0, 4)
    with pytest.raises(CacheError, match="has put tokens into its memory"):
        cache.crop(-1)
    with pytest.raises(CacheError, match="loses nothing as it is"):
        cache.append_only()
    with pytest.raises(CacheError, match="most of it lies in host memory"):
        cache.save(tmp_path / "cache")
    with pytest.raises(OptionError, match="serve a policy that evicts"):
        Batch(model)
    with pytest.raises(OptionError, match="no process has them all"):
        model.policy.of_rank(0, 2)
    assert "on the host" in (decode_graph.why_not(model.program, model.policy, model.device) or "")
