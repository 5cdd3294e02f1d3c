"""Embeddings in the place of ids: exact beside the unmodified model, and with evictions the same to the bit as the ids whose
embeddings they are."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvrewrite
import kvrewrite.backend  # where it is not installed, nobody else makes the backend's name known
from kvrewrite.cache.signature import HIGHEST, signatures
from kvrewrite.errors import InputError
from kvrewrite.passes.insert.embeds import embedding_graph
from tests.runtime.test_decoding import static
from tests.runtime.test_invariants import EVICTING, MORE, evicting
from tests.support.products import few
from tests.support.rewritten import build, captured, original, own, rewrite, rewritten

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
# Factors and norms after the lookup, positions of both kinds, frequencies by length, layers that carry a state.
FAMILIES = few(
    [
        "gemma3_text",
        "gpt2",
        "llama",
        "phi3",
        "gemma2",
        "xglm",
        "opt",
        "bloom",
        "falcon",
        "mixtral",
        "deepseek_v3",
        "lfm2",
    ],
    rest=["gemma2", "xglm", "opt", "bloom", "falcon", "mixtral", "deepseek_v3", "lfm2"],
)
QUICK = [("h2o", "original"), ("kvzip", "original"), ("streaming_llm", "contiguous"), ("adakv", "original")]


def ids(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def embeddings(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.get_input_embeddings()(tokens)
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_beside_the_unmodified_model(family: str) -> None:
    """Embeddings of no id at all, whole, in uneven calls and token by token."""
    model, full = original(family), rewritten(family, "full")
    given = embeddings(model, ids(23, 2)) + 0.02 * torch.randn(2, 23, 1, generator=torch.Generator().manual_seed(1))
    want = model(inputs_embeds=given).logits
    torch.testing.assert_close(full(inputs_embeds=given).logits, want, rtol=1e-4, atol=1e-4)
    cache, got = full.new_cache(2, max_length=23), []
    for part in given.split([9, 1, 6, 1, 1, 5], dim=1):
        got.append(full(inputs_embeds=part, cache=cache).logits)
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)
    table = full.get_input_embeddings()
    assert torch.equal(table(ids(23, 2)), embeddings(model, ids(23, 2)))
    assert torch.equal(full(inputs_embeds=table(ids(23, 2))).logits, full(ids(23, 2)).logits)


PAIRS = [pair for pair in [*EVICTING, *MORE] if pair[0] != "sirllm"]
CASES = [pytest.param(*p, marks=[] if p in QUICK else [pytest.mark.thorough]) for p in PAIRS]


@torch.no_grad()
@pytest.mark.parametrize(("policy", "positions"), CASES)
def test_policies_see_tokens(policy: str, positions: str) -> None:
    """Logits, slots and answers of padded rows are those of ids, to the bit; kvzip repeats embeddings."""
    small = evicting("llama", policy, positions)
    tokens, mask = ids(60, 2), torch.ones(2, 60, dtype=torch.long)
    mask[0, :7] = 0
    given = embeddings(original("llama"), tokens)
    caches = [small.new_cache(2) for _ in range(2)]
    by_ids = small(tokens, attention_mask=mask, cache=caches[0]).logits
    by_embeddings = small(inputs_embeds=given, attention_mask=mask, cache=caches[1]).logits
    assert torch.equal(by_ids, by_embeddings)
    for _ in range(2):  # single tokens, as ids and as embeddings
        more = ids(1, 2, seed=3)
        assert torch.equal(
            small(more, cache=caches[0]).logits,
            small(inputs_embeds=embeddings(original("llama"), more), cache=caches[1]).logits,
        )
    assert caches[0].positions() == caches[1].positions()
    assert min(len(head) for rows in caches[0].positions().values() for head in rows[1]) < 50
    alone = small.new_cache()
    small(inputs_embeds=given[:1, 7:], cache=alone)
    fresh = small.new_cache()
    small(tokens[:1, 7:], cache=fresh)
    assert alone.positions() == fresh.positions()


class TestGenerate:
    def test_answers(self) -> None:
        """With embeddings alone the answer comes back; with ids beside them, the text."""
        model, small = original("llama"), rewritten("llama", "h2o", budget=300)
        tokens = ids(40, 2)
        given = embeddings(model, tokens)
        want: Any = model.generate(inputs_embeds=given, max_new_tokens=6, **GREEDY)  # type: ignore[operator]
        mask = torch.ones(2, 40, dtype=torch.long)
        assert torch.equal(small.generate(inputs_embeds=given, attention_mask=mask, max_new_tokens=6, **GREEDY), want)
        both = small.generate(tokens, inputs_embeds=given, attention_mask=mask, max_new_tokens=6, **GREEDY)
        assert torch.equal(both, torch.cat([tokens, want], 1))

    def test_beams_and_sequences(self) -> None:
        model, small = original("llama"), rewritten("llama", "h2o", budget=300)
        given = embeddings(model, ids(30))
        how = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, **GREEDY}
        want: Any = model.generate(inputs_embeds=given, **how)  # type: ignore[operator]
        assert torch.equal(small.generate(inputs_embeds=given, **how), want)

    @pytest.mark.parametrize("first", ["ids", "embeddings"])
    @pytest.mark.parametrize("then", ["ids", "embeddings", "embeddings alone"])
    def test_turns(self, first: str, then: str) -> None:
        """A cache goes on from either with either: the answer is that of ids alone."""
        model, small = original("llama"), rewritten("llama", "h2o", budget=20)
        text, cache = ids(50), small.new_cache()
        given = embeddings(model, text)
        if first == "ids":
            small(text[:, :30], cache=cache)
        else:
            small(inputs_embeds=given[:, :30], cache=cache)
        plain = small.new_cache()
        small(text[:, :30], cache=plain)
        want = small.generate(text, cache=plain, max_new_tokens=5, **GREEDY)[:, 50:]
        if then == "ids":
            got = small.generate(text, cache=cache, max_new_tokens=5, **GREEDY)[:, 50:]
        elif then == "embeddings":
            got = small.generate(inputs_embeds=given, cache=cache, max_new_tokens=5, **GREEDY)
        else:
            mask = torch.ones(1, 50, dtype=torch.long)
            how = {"attention_mask": mask, "cache": cache, "max_new_tokens": 5, **GREEDY}
            got = small.generate(inputs_embeds=given[:, 30:], **how)
        assert torch.equal(got, want) and cache.positions() == plain.positions()
        held = cache.ids()[0]
        assert torch.equal(held[50:], want[0, :-1])
        assert bool((held[:30] <= HIGHEST).all()) is (first == "embeddings")

    def test_lengths_of_the_text(self) -> None:
        """max_length and min_length count the whole text, also where a cache has its beginning."""
        model, small = original("llama"), rewritten("llama", "full")
        text = ids(20)
        given = embeddings(model, text)
        for how in ({"max_length": 30}, {"max_length": 40, "min_length": 28}):
            for words in ({"inputs_embeds": given}, {"input_ids": text, "inputs_embeds": given}):
                want: Any = model.generate(**words, **how, **GREEDY)  # type: ignore[operator]
                cache = small.prefill(inputs_embeds=given[:, :15])
                assert torch.equal(small.generate(**words, **how, cache=cache, **GREEDY), want)

    def test_a_padded_row_goes_on(self) -> None:
        """The mask of a text that is handed in again as embeddings is made up where nobody gives one."""
        model, small = original("llama"), rewritten("llama", "h2o", budget=300)
        text, mask = ids(40, 2), torch.ones(2, 40, dtype=torch.long)
        mask[1, :5] = 0
        given, cache = embeddings(model, text), small.new_cache(2)
        small(inputs_embeds=given[:, :30], attention_mask=mask[:, :30], cache=cache)
        want: Any = model.generate(inputs_embeds=given, attention_mask=mask, max_new_tokens=5, **GREEDY)  # type: ignore[operator]
        assert torch.equal(small.generate(inputs_embeds=given, cache=cache, max_new_tokens=5, **GREEDY), want)

    def test_another_embedding_is_told(self) -> None:
        """By column, also where one of the two texts has ids."""
        model, small = original("llama"), rewritten("llama", "h2o", budget=20)
        text = ids(30)
        given = embeddings(model, text)
        cache = small.prefill(inputs_embeds=given[:, :20])
        changed = given.clone()
        changed[0, 11, 5] += 1e-6
        with pytest.raises(InputError, match=r"at column 11 row 0 has an embedding .* given an embedding"):
            small.generate(inputs_embeds=changed, cache=cache, max_new_tokens=2, **GREEDY)
        other = text.clone()
        other[0, 4] = (other[0, 4] + 1) % 97
        with pytest.raises(InputError, match=rf"at column 4 row 0 has token {int(other[0, 4])}, .* given an embedding"):
            small.generate(other, cache=cache, max_new_tokens=2, **GREEDY)
        with pytest.raises(InputError, match="have 20 columns, and the cache has seen 20: nothing is new"):
            small.generate(inputs_embeds=given[:, :20], cache=cache, max_new_tokens=2, **GREEDY)

    def test_recompute(self) -> None:
        model, small = original("llama"), rewritten("llama", "h2o", budget=20)
        text, cache = ids(40), small.new_cache()
        how: dict[str, Any] = {"on_mismatch": "recompute", "cache": cache, "max_new_tokens": 3, **GREEDY}
        small.generate(inputs_embeds=embeddings(model, text[:, :20]), **how)
        got = small.generate(inputs_embeds=embeddings(model, text), **how)
        plain = small.new_cache()
        small(text[:, :20], cache=plain)
        assert torch.equal(got, small.generate(text, cache=plain, max_new_tokens=3, **GREEDY)[:, 40:])


@torch.no_grad()
def test_pinned_spans() -> None:
    """Pins and embeddings are two views of a model, and one of both."""
    small = rewritten("llama", "h2o", budget=12)
    given = embeddings(original("llama"), ids(60))
    cache = small.prefill(inputs_embeds=given, pin=(3, 8))
    assert cache.positions() == small.prefill(ids(60), pin=(3, 8)).positions()
    pinned = torch.zeros(1, 60, dtype=torch.bool)
    pinned[0, 3:8] = True
    assert cache.positions() == small.prefill(inputs_embeds=given, pin=pinned).positions()
    assert all(set(range(3, 8)) <= set(head) for layer in cache.positions().values() for head in layer[0])


class TestErrors:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"inputs_embeds": torch.zeros(1, 5, 64), "input_ids": ids(5)}, "got both input_ids and inputs_embeds"),
            ({"inputs_embeds": torch.zeros(1, 5, 32)}, r"shape \(1, 5, 32\), expected a \(batch, tokens, 64\)"),
            ({"inputs_embeds": torch.zeros(5, 64)}, r"shape \(5, 64\), expected a \(batch, tokens, 64\)"),
            ({"inputs_embeds": torch.zeros(1, 0, 64)}, "at least one row and token"),
            ({"inputs_embeds": torch.zeros(1, 5, 64, dtype=torch.float64)}, "torch.float64, expected torch.float32"),
            ({"inputs_embeds": [[0.5]]}, "inputs_embeds is a list, expected a"),
            ({"inputs_embeds": torch.zeros(2, 5, 64), "attention_mask": torch.ones(2, 4)}, "attention_mask has shape"),
        ],
    )
    def test_wrong_ones(self, given: dict[str, Any], message: str) -> None:
        small = rewritten("llama", "h2o", budget=20)
        with pytest.raises(InputError, match=message):
            small(**given)

    def test_ids_that_do_not_fit(self) -> None:
        small = rewritten("llama", "h2o", budget=20)
        with pytest.raises(InputError, match=r"input_ids are \(1, 4\) and inputs_embeds \(1, 5, 64\)"):
            small.generate(ids(4), inputs_embeds=torch.zeros(1, 5, 64), max_new_tokens=2)

    def test_prompts_cut_by_generate(self) -> None:
        """transformers cuts ids; the model cuts embeddings by itself."""
        small, given = rewritten("llama", "h2o", budget=20), torch.zeros(1, 12, 64)
        with pytest.raises(
            InputError, match="prefill_chunk_size=5 cuts a prompt's ids, and this one came as inputs_embeds"
        ):
            small.generate(inputs_embeds=given, prefill_chunk_size=5, max_new_tokens=2, **GREEDY)

    def test_images_for_a_language_model(self) -> None:
        small = rewritten("llama", "h2o", budget=20)
        with pytest.raises(InputError, match=r"pixel_values is not supported .* pass inputs_embeds"):
            small(ids(4), pixel_values=torch.zeros(1, 3, 8, 8))

    @pytest.mark.parametrize(
        ("family", "policy"),
        [pytest.param("gemma3n_text", "full", marks=pytest.mark.thorough), ("llama", "sirllm")],
    )
    def test_models_and_policies_that_need_ids(self, family: str, policy: str) -> None:
        """Embeddings of each layer; surprise at the next id."""
        small = rewritten(family, policy, **({} if policy == "full" else {"budget": 20}))
        width = original(family).config.hidden_size  # type: ignore[union-attr]
        with pytest.raises(InputError, match="reads token ids beside their embeddings"):
            small(inputs_embeds=torch.zeros(1, 5, int(width)))  # type: ignore[arg-type]

    def test_a_row_that_paused(self) -> None:
        """What it has still to be given is known by its signature alone."""
        small = rewritten("llama", "h2o", budget=20)
        given, mask = embeddings(original("llama"), ids(6, 2)), torch.ones(2, 6, dtype=torch.long)
        mask[1, 4:] = 0
        cache = small.new_cache(2)
        small(inputs_embeds=given, attention_mask=mask, cache=cache)
        with pytest.raises(
            InputError, match="in which a row paused, and some of the tokens from there on are embeddings"
        ):
            small(ids(1, 2), attention_mask=torch.ones(2, 7, dtype=torch.long), cache=cache)

    def test_the_backend_refuses(self) -> None:
        """torch.compile with our backend takes calls with ids."""
        model = build("llama")
        compiled: Any = torch.compile(model, backend="kvrewrite", options={"policy": "h2o", "budget": 20})
        with torch.no_grad(), pytest.raises(Exception, match="inputs_embeds"):
            compiled(inputs_embeds=embeddings(model, ids(9)))
        torch._dynamo.reset()


class TestStored:
    def test_directories(self, tmp_path: Path) -> None:
        """A directory says where its graph makes embeddings; one of an earlier version does not, and says so."""
        small = rewrite(build("gemma3_text"), captured("gemma3_text"), "h2o", None, budget=20)
        small.save_pretrained(tmp_path / "a")
        again = kvrewrite.load(tmp_path / "a")
        given = small.get_input_embeddings()(ids(40))
        want = small(inputs_embeds=given, logits_to_keep=1).logits
        assert torch.equal(again(inputs_embeds=given, logits_to_keep=1).logits, want)
        for model in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
            assert torch.equal(model(inputs_embeds=given, logits_to_keep=1).logits, want)
        again.program.embedded = ""
        again.uncompile()
        with pytest.raises(InputError, match="convert the model again"):
            again(inputs_embeds=given)

    def test_caches(self, tmp_path: Path) -> None:
        """A saved cache goes on with the embeddings that made it, and knows them."""
        small = rewritten("llama", "h2o", budget=20)
        given = embeddings(original("llama"), ids(50))
        cache = small.prefill(inputs_embeds=given[:, :40])
        cache.save(tmp_path / "a.kvcache")
        loaded = kvrewrite.load_cache(small, tmp_path / "a.kvcache")
        assert torch.equal(loaded.ids(), cache.ids())
        want = small.generate(inputs_embeds=given, cache=cache, max_new_tokens=3, **GREEDY)
        other = loaded.fork()
        assert torch.equal(small.generate(inputs_embeds=given, cache=loaded, max_new_tokens=3, **GREEDY), want)
        with pytest.raises(InputError, match="at column 0"):
            small.generate(inputs_embeds=-given, cache=other, max_new_tokens=3, **GREEDY)


@pytest.mark.parametrize(("policy", "options"), [("h2o", {}), ("streaming_llm", {"positions": "contiguous"})])
def test_static_buffers(policy: str, options: dict[str, Any]) -> None:
    """A prompt of embeddings runs between steps from static buffers, whose cache was bound to them."""
    quick, plain = static("llama", policy, budget=20, **options), rewritten("llama", policy, budget=20, **options)
    text = ids(60)
    given = embeddings(original("llama"), text)
    found = []
    for model in (quick, plain):
        cache = model.new_cache()
        model(inputs_embeds=given[:, :40], cache=cache)
        for column in (40, 41):
            model(text[:, column : column + 1], cache=cache)
        model(inputs_embeds=given[:, 42:43], cache=cache)
        model(inputs_embeds=given[:, 43:55], cache=cache)
        out = [model(text[:, c : c + 1], cache=cache).logits for c in range(55, 60)]
        found.append((torch.cat(out, 1), cache.positions()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert found[0][1] == found[1][1]


@torch.no_grad()
def test_a_module_from_elsewhere() -> None:
    """Without `get_input_embeddings` the lookup itself is what embeddings stand for."""
    small = rewritten("RopeTable", "h2o", budget=20)
    given = small.get_input_embeddings()(ids(30))
    assert torch.equal(small(inputs_embeds=given).logits, small(ids(30)).logits)


def test_signatures() -> None:
    """Each byte counts, on any dtype; equal embeddings have equal ones, wherever they stand."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        given = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        made = signatures(given)
        assert made.shape == (2, 300) and int(made.max()) <= HIGHEST and int(made.min()) >= -(1 << 31)
        assert len(made.unique()) == 600
        assert torch.equal(signatures(given.flip(1)), made.flip(1))
        other = given.clone()
        other[0, 0, 7] = torch.nextafter(other[0, 0, 7].double(), torch.tensor(9.0).double()).to(dtype) + 0.01
        assert signatures(other)[0, 0] != made[0, 0] and torch.equal(signatures(other)[1], made[1])


def test_weights_are_not_copied() -> None:
    small = rewritten("gemma3_text", "h2o", budget=20)
    small(inputs_embeds=small.get_input_embeddings()(ids(9)))
    view = small.embedding()
    assert view is small.embedding() and view.owner is small.owner
    shared = {p.data_ptr() for p in small.graph_module.parameters()}
    assert {p.data_ptr() for p in view.graph_module.parameters()} <= shared
    assert isinstance(small.get_input_embeddings(), nn.Embedding)


def test_the_graph_of_embeddings_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And anew where weights have moved, and for a copy of the model."""
    small = rewrite(*own("llama"), "h2o", None, budget=20)  # whose weights are changed below
    made: list[Any] = []

    def counted(program: Any) -> Any:
        made.append(embedding_graph(program))
        return made[-1]

    monkeypatch.setattr("kvrewrite.runtime.model.embedding_graph", counted)
    want = small.get_input_embeddings()(ids(7))
    for count, view in (
        (1, lambda: small),
        (1, lambda: small),
        (1, lambda: copy.copy(small)),
        (2, small.pinning),
        (2, small.pinning),
    ):
        assert torch.equal(view().embed(ids(7)), want) and len(made) == count
    twin = copy.deepcopy(small)
    with torch.no_grad():
        small.get_input_embeddings().weight.mul_(2)
    assert torch.equal(small.embed(ids(7)), 2 * want) and torch.equal(twin.embed(ids(7)), want)
    assert (
        torch.equal(small.to("cpu").embed(ids(7)), 2 * want) and len(made) == 4
    )  # the twin's, and where weights may have moved
