"""KVzip beyond its oracle (tests/policies/test_policies.py): what its second reading leaves alone, what it costs, and where it
runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvrewrite
import kvrewrite.backend  # where it is not installed, nobody else makes the backend's name known
from kvrewrite import policies
from kvrewrite.assets import small_model
from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.errors import InputError, OptionError, UnsupportedModelError
from kvrewrite.kernels.attention import reference
from kvrewrite.kernels.scores import reconstruction
from kvrewrite.policies import UNLIMITED
from kvrewrite.policies.kvzip import AUTHORS, numbers
from kvrewrite.runtime.batch import Batch
from tests.support.rewritten import build, rewritten

OPTIONS: dict[str, Any] = {"budget": 20, "n_sink": 2, "repeat_chunk": 25, "lead": 3, "chunk": 30}
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def ids(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_ids_as_text() -> None:
    assert numbers("12,7, 301") == numbers(" 12 7 301") == (12, 7, 301) and numbers("") == ()
    assert numbers("Repeat this.") is None and numbers("\n") is None and numbers("3,") is None


def test_a_repetition_adds_nothing_to_the_plan() -> None:
    """Places that are repeated: each once, after the first ones; what runs has the prompt's segments and those."""
    policy = policies.make("kvzip", budget=0.25, n_sink=3, repeat_chunk=40, lead=5, repeat_next="7,8", chunk=64)
    passes = policy.passes(150)
    assert sum(s.joins for s in passes) == 150 and [s.keep for s in passes] == [UNLIMITED] * 6 + [37]
    again = [s.again for s in passes if s.again]
    assert again == [
        (range(3, 43),),
        ((7, 8), range(38, 43), range(43, 83)),
        ((7, 8), range(78, 83), range(83, 123)),
        ((7, 8), range(118, 123), range(123, 150)),
    ]
    assert [s.length for s in passes if s.again] == [40, 47, 47, 34]
    assert policy.passes(4) == policy.plan(4)  # within the budget
    assert not any(s.again for s in policy.passes(50, policies.RowState(seen=90)))


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_second_reading_leaves_the_cache_as_it_was(family: str, quantize: str) -> None:
    """What stays has the keys, values and places that a model without eviction holds, and windows what they would hold."""
    more = {} if quantize == "none" else {"quantize": quantize, "quantize_residual": 32}
    small, full = rewritten(family, "kvzip", **OPTIONS, **more), rewritten(family, "full", chunk=30, **more)
    text, caches = ids(110), []
    for model in (small, full):
        cache = model.new_cache(1)
        torch.testing.assert_close(
            model(text, cache=cache).logits,
            full(text).logits,
            rtol=0,
            atol=2e-5,
            msg="logits are made before the eviction",
        )
        caches.append((cache, slots(cache)))
    (cache, kept), (_, everything) = caches
    windows = [bool(site.window) for site in small.sites if site.shares_kv_with is None]
    assert cache.seen == [110] and len(kept) == len(everything) == len(windows)
    for window, few, all_of_them in zip(windows, kept, everything):
        for head, whole in zip(few, all_of_them):
            assert set(head) <= set(whole) and (not window or set(head) == set(whole))
            for place in head:
                torch.testing.assert_close(head[place], whole[place], rtol=0, atol=1e-5 if quantize == "none" else 0.02)
    judged = [len(head) for window, few in zip(windows, kept) for head in few if not window]
    assert sum(judged) == 20 * len(judged)


def slots(cache: EvictionCache) -> list[list[dict[int, Tensor]]]:
    """layer -> kv head -> place in the text -> [key | value], of row 0."""
    found, states = {}, {state.input: state.value for state in cache.states}
    quantize = cache.layout.quantize
    for lease in cache.leases:
        for i, layer in enumerate(lease.layers):
            read = []
            for x in "kv":
                pool, table = getattr(lease.store, f"{x}_pages"), lease.table[i]
                if quantize is None:
                    read.append(torch.ops.kvrewrite.read_pages(pool, table))
                    continue
                stored = (pool, getattr(lease.store, f"{x}_params"), states[f"state_{x}_tail_{layer}"], table)
                how = (states[f"state_qlens_{layer}"], quantize.kind, quantize.group, x == "v")
                read.append(torch.ops.kvrewrite.read_quantized(*stored, *how))
            both = torch.cat(read, -1)
            places = torch.ops.kvrewrite.read_pages(lease.store.pos_pages, lease.table[i])[0, ..., 0].tolist()
            live = lease.lens[i][0].tolist()
            found[layer] = [{p: both[0, h, n] for n, p in enumerate(places[h][: live[h]])} for h in range(len(live))]
    return [found[layer] for layer in sorted(found)]


@pytest.mark.parametrize("scope", ["model", pytest.param("head", marks=pytest.mark.thorough)])
def test_it_runs_everywhere(scope: str) -> None:
    """The same tokens from a batch of rows of several lengths, single rows, buffers, requests side by side and beside others."""
    model = rewritten("llama", "kvzip", scope=scope, **OPTIONS)
    texts = [ids(n, seed=n)[0].tolist() for n in (90, 37, 12)]
    alone = [
        model.generate(torch.tensor([text]), max_new_tokens=6, **GREEDY)[0, len(text) :].tolist() for text in texts
    ]
    width = max(map(len, texts))
    padded = torch.tensor([[0] * (width - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
    together = model.generate(padded, attention_mask=mask, max_new_tokens=6, **GREEDY)[:, width:].tolist()
    assert together == alone
    batch = Batch(model)
    requests, out = [batch.start(text, max_length=len(text) + 6) for text in texts], [[] for _ in texts]  # type: ignore[var-annotated]
    logits: dict[int, Tensor] = {}
    while len(logits) < len(texts):
        waiting = [i for i in range(len(texts)) if i not in logits]
        for i, found in zip(waiting, batch.advance_together([requests[i] for i in waiting])):
            if found is not None:
                logits[i] = found
    rows = torch.stack([logits[i] for i in range(len(texts))])
    for _ in range(6):
        chosen = rows.argmax(-1).tolist()
        for row, token in zip(out, chosen):
            row.append(token)
        rows = batch.decode(requests, chosen)
    assert out == alone
    buffers = kvrewrite.transform(build("llama"), "kvzip", scope=scope, check="off", **OPTIONS)
    buffers.compile(backend="eager", static_decode=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert buffers.generate(torch.tensor([texts[0]]), max_new_tokens=6, **GREEDY)[0, 90:].tolist() == alone[0]
    assert buffers.decoder is not None


def test_the_backend_evicts_as_transform_does() -> None:
    expected = rewritten("shallow_llama", "kvzip", scope="head", **OPTIONS).generate(
        ids(60, 2), max_new_tokens=6, **GREEDY
    )
    options = {"policy": "kvzip", "scope": "head", "inductor": False, **OPTIONS}
    model = torch.compile(build("shallow_llama"), backend="kvrewrite", options=options)  # type: ignore[call-overload]
    assert torch.equal(model.generate(ids(60, 2), max_new_tokens=6, **GREEDY), expected)


def test_what_is_looked_at_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that a repetition is compared with: the first ones, its part and itself, however long the prompt is."""
    model, widths = rewritten("llama", "kvzip", **OPTIONS), []

    def noted(tokens: Any, *args: Any) -> Tensor:
        widths.append(tokens.k.shape[2])
        return reference.largest_weights(tokens, *args)

    monkeypatch.setattr(reconstruction, "largest_weights", noted)
    model.prefill(ids(300))
    parts, layers = -(-298 // 25), len(model.sites)
    assert len(widths) == parts * layers and max(widths) == 2 + 25 + (3 + 25)


def test_pages_while_the_prompt_is_there_and_after() -> None:
    """The memory plan and `Batch` count the whole prompt, and what is left is the budget."""
    model = rewritten("llama", "kvzip", **OPTIONS)
    cache = model.new_cache(1)
    most, store = [], cache.leases[0].store
    cache.before_chunk = lambda: most.append(cache.leases[0].leased)
    model(ids(640), cache=cache)
    heads = 2 * len(model.sites)
    assert max(most) == heads * 10  # pages of 64 slots; the repetition takes none
    assert cache.leases[0].leased <= heads * 2 and store.total >= heads * 10
    during, later = Batch(model).pages_needed(640, 650)
    assert during[0] >= heads * 10 > later[0]


def test_saved_and_loaded(tmp_path: Path) -> None:
    """Texts become ids with the directory's tokenizer, in `convert` and `transform` alike; the model that is loaded evicts the
    same."""
    asked = {"repeat_prompt": "authors", "repeat_answer": "\nAnswer: ", "repeat_chunk": 40}
    done = kvrewrite.convert(small_model(), tmp_path / "out", "kvzip", budget=30, check="off", **asked)
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    options = done.program.policy["options"]
    for name, text in (*AUTHORS.items(), ("repeat_answer", "\nAnswer: ")):
        found = numbers(options[name])
        assert found == tuple(tokenizer.encode(text, add_special_tokens=False)) and found
    text = torch.tensor([tokenizer("The door key is in the red box. " * 8)["input_ids"]])
    base = AutoModelForCausalLM.from_pretrained(small_model())
    transformed = kvrewrite.transform(base, "kvzip", budget=30, check="off", **asked)
    kept = []
    for model in (transformed, kvrewrite.load(tmp_path / "out")):
        cache = model.prefill(text)
        kept.append(cache.positions())
        held = [len(head) for rows in cache.positions().values() for head in rows[0]]
        assert sum(held) == 30 * len(held) and max(held) > 30 > min(held)
    assert kept[0] == kept[1]


def test_refusals() -> None:
    with pytest.raises(OptionError, match="no directory with a tokenizer; expected token ids"):
        kvrewrite.transform(build("llama"), "kvzip", repeat_prompt="Repeat this.")
    with pytest.raises(OptionError, match="repeat_answer has token 97, but the model has 97 tokens"):
        rewritten("llama", "kvzip", repeat_answer="4,97")
    with pytest.raises(OptionError, match="repeat_next is 'Again', and there is no tokenizer"):
        rewritten("llama", "kvzip", repeat_next="Again")
    with pytest.raises(OptionError, match="not possible with tensor parallelism"):
        policies.make("kvzip").of_rank(0, 2)
    with pytest.raises(OptionError, match="mla=latent is not possible"):
        policies.make("kvzip", mla="latent")
    with pytest.raises(UnsupportedModelError, match="every layer of this model has a sliding window"):
        rewritten("mistral", "kvzip", **OPTIONS)


def test_layers_with_a_state_are_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match="reads the prompt a second time, and the model has layers whose state"
    ):
        rewritten("lfm2", "kvzip", **OPTIONS)


def test_a_table_of_positions_must_have_room_for_the_repetition() -> None:
    model = rewritten("gpt2", "kvzip", **OPTIONS)
    most = model.program.max_positions
    assert model(ids(most - 28)).logits.shape[1] == most - 28
    with pytest.raises(InputError, match=f"would reach position {most}, but the model has {most} positions"):
        model(ids(most - 27))
