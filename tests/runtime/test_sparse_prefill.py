"""Sparse prefill in a whole model: what prompts give, what stays as it was, what is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvrewrite
from kvrewrite.artifact.head_patterns import FORMAT, read_patterns
from kvrewrite.errors import OptionError
from kvrewrite.ir.parallel import Peers
from kvrewrite.kernels.attention.patterns import HeadPattern
from kvrewrite.passes.insert.sparse_prefill import NAME, insert_sparse_prefill
from kvrewrite.runtime.parallel import part_of
from tests.runtime.test_invariants import OPTIONS
from tests.support import rewritten
from tests.support.sparse_oracle import visible
from tests.support.zoo import VOCAB, make

pytestmark = pytest.mark.xdist_group("sparse prefill")
LAYERS, HEADS, T = 2, 4, 250
FEW = {0: ["vertical_slash:31:33"] * HEADS, 1: ["a_shape:1:20", "block_sparse:1", "dense", "vertical_slash:35:40"]}


def model(prefill: Any, policy: str = "full", **options: Any) -> Any:
    """A tiny Llama with sparse prefill; nothing is captured twice."""
    made = rewritten.rewrite(rewritten.original("llama"), rewritten.captured("llama"), policy, None, **options)
    patterns = {layer: tuple(HeadPattern(*_split(w)) for w in heads) for layer, heads in prefill.items()}
    insert_sparse_prefill(made.graph_module, made.sites, patterns)
    return made


def _split(word: str) -> tuple[Any, ...]:
    kind, *numbers = word.split(":")
    return kind, *map(int, numbers)


def ids(rows: int = 1, length: int = T) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def run(m: Any, tokens: Tensor, pieces: list[int] | None = None, **given: Any) -> Tensor:
    cache, at, out = m.new_cache(tokens.shape[0], max_length=tokens.shape[1]), 0, []
    for n in pieces or [tokens.shape[1]]:
        out.append(m(tokens[:, at : at + n], past_key_values=cache, **given).logits)
        at += n
    return torch.cat(out, 1)


def a_shape(first: int, window: int) -> dict[int, list[str]]:
    return {layer: [f"a_shape:{first}:{window}"] * HEADS for layer in range(LAYERS)}


def masked(tokens: Tensor, seen: Tensor) -> Tensor:
    """The original's logits where query i sees the keys seen[i]."""
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return rewritten.logits(rewritten.original("llama"), tokens, attention_mask=mask[None, None])


def chunked_mask(length: int, chunk: int, first: int, window: int, start: int = 0, budget: int | None = None) -> Tensor:
    """What the tokens of a text see of it (length, length): chunk by chunk, on what streaming_llm holds before each."""
    seen, held = torch.zeros(length, length, dtype=torch.bool), list[int]()
    for begin in range(0, length, chunk):
        new = list(range(begin, min(length, begin + chunk)))
        part = visible(
            f"a_shape:{first}:{window}", torch.zeros(len(new), 1), torch.zeros(len(held + new), 1), len(held), {}
        )
        seen[begin : begin + len(new)][:, held + new] = part
        held += new
        if budget is not None and len(held) > budget:
            held = held[:start] + held[-(budget - start) :]
    return seen


@pytest.mark.parametrize(("chunk", "options"), [
    (T, {"policy": "full", "chunk": None}),
    (90, {"policy": "full", "chunk": 90}),
    (80, {"policy": "streaming_llm", "chunk": 80, "budget": 100, "start": 4, "positions": "original"}),
])  # fmt: skip
def test_logits_are_those_of_the_mask(chunk: int, options: dict[str, Any]) -> None:
    """Of the unmodified model with the mask that the patterns and the evictions together make."""
    evicting = {name: options[name] for name in ("start", "budget") if name in options}
    mask = chunked_mask(T, chunk, 3, 1, **evicting)
    assert mask.sum() < 0.9 * chunked_mask(T, chunk, 3, T, **evicting).sum()
    got = run(model(a_shape(3, 1), **options), ids())
    torch.testing.assert_close(got, masked(ids(), mask), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("policy", "options"), [
    ("full", {"chunk": 70}),
    ("streaming_llm", {"budget": 90, "chunk": 70}),
    ("h2o", {"budget": 90, "chunk": 70}),
])  # fmt: skip
def test_patterns_that_cover_everything_change_nothing(policy: str, options: dict[str, Any]) -> None:
    covering = {
        0: ["vertical_slash:999:999"] * HEADS,
        1: ["a_shape:999:1", "block_sparse:99", "dense", "a_shape:1:999"],
    }
    with pytest.warns(UserWarning, match="add up what all queries") if policy == "h2o" else contextlib.nullcontext():
        sparse = model(covering, policy, **options)
    dense = rewritten.rewritten("llama", policy, **options)
    assert torch.equal(run(sparse, ids(2)), run(dense, ids(2)))


EVERY_DAY = ("attention_gate", "locret", "snapkv")


@pytest.mark.filterwarnings("ignore:prefill")
@pytest.mark.parametrize(
    "policy",
    [pytest.param(p.name, marks=() if p.name in EVERY_DAY else pytest.mark.thorough) for p in rewritten.ours()],
)
def test_every_policy(policy: str) -> None:
    """Patterns that cover everything keep the same tokens and give the same logits; others keep as many."""
    options = dict(OPTIONS.get(policy, {})) | ({} if policy in ("full", "attention_gate") else {"budget": 90})
    options |= {"chunk": 100} if "chunk" in options else {}
    options |= {"budget": 104} if policy == "infllm" else {}  # a window as long as a chunk
    covering = {
        0: ["vertical_slash:999:999"] * HEADS,
        1: ["a_shape:999:1", "block_sparse:99", "dense", "a_shape:1:999"],
    }
    dense = rewritten.rewritten("llama", policy, **options)
    models = [dense, model(covering, policy, **options), model(FEW, policy, **options)]
    caches = [m.new_cache(1, max_length=T) for m in models]
    with torch.no_grad():
        want, same, other = (m(ids(), past_key_values=cache).logits for m, cache in zip(models, caches, strict=True))
    assert torch.equal(same, want) and torch.isfinite(other).all() and not torch.equal(other, want)
    live = [cache.live_slots() for cache in caches]
    assert all(torch.equal(live[0][layer], live[1][layer]) for layer in live[0])
    if not dense.policy.gates and not dense.policy.data_dependent:
        assert all(int(live[0][layer].sum()) == int(live[2][layer].sum()) for layer in live[0])


def test_single_tokens_and_short_chunks_see_everything() -> None:
    sparse, dense = model(FEW), rewritten.rewritten("llama", "full")
    pieces = [64, 40, 1, 1, 30, 64]
    assert torch.equal(run(sparse, ids(), pieces), run(dense, ids(), pieces))
    assert not torch.allclose(run(sparse, ids()), run(dense, ids()), atol=1e-3)


def test_a_padded_row_is_the_row_alone() -> None:
    sparse = model(FEW, "streaming_llm", budget=90, chunk=100)
    tokens, mask = ids(2), torch.ones(2, T, dtype=torch.long)
    mask[1, :37] = 0
    together = run(sparse, tokens, attention_mask=mask)
    for row, start in ((0, 0), (1, 37)):
        alone = run(sparse, tokens[row : row + 1, start:])
        torch.testing.assert_close(together[row, start:], alone[0], rtol=1e-5, atol=1e-5)


def test_compiled_is_eager() -> None:
    sparse = model(FEW, "streaming_llm", budget=90, chunk=100)
    want = run(sparse, ids(), [248, 1, 1])
    sparse.compile(static_decode=True, backend="eager")
    torch.testing.assert_close(run(sparse, ids(), [248, 1, 1]), want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """The kernels give what the reference gives; graphs of whole chunks give what the kernels give."""
    options: dict[str, Any] = {"budget": 90, "chunk": 80, "prefill": FEW, "check": "off"}
    sparse = kvrewrite.transform(make("llama"), "streaming_llm", **options)
    want = run(sparse, ids())
    sparse.to("cuda")
    eager = run(sparse, ids().cuda())
    torch.testing.assert_close(eager.cpu(), want, rtol=1e-3, atol=1e-3)
    sparse.compile()
    for _ in range(3):  # a shape is captured when it comes for the second time
        torch.testing.assert_close(
            run(sparse, ids().cuda(), logits_to_keep=1)[0, -1], eager[0, -1], rtol=1e-3, atol=1e-3
        )


def test_a_directory_has_its_patterns(tmp_path: Path) -> None:
    original = make("llama")
    original.save_pretrained(tmp_path / "base")
    file = tmp_path / "patterns.json"
    file.write_text(json.dumps({"format": FORMAT, "layers": {str(layer): heads for layer, heads in FEW.items()}}))
    kvrewrite.convert(tmp_path / "base", tmp_path / "out", "full", prefill=file, check="off")
    loaded = kvrewrite.load(tmp_path / "out")
    made = kvrewrite.transform(original, "full", prefill=FEW, check="off")
    assert torch.equal(run(loaded, ids()), run(made, ids()))
    assert all(NAME in site.inserted for site in loaded.sites)
    report = kvrewrite.verify(tmp_path / "out", tokens=150)
    assert report.ok, report


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(("family", "options", "prefill", "why"), [
    ("llama", {}, {0: ["dense"] * 3 + ["a_shape:1:2"] * 2}, "layer 0 .* has 4 query heads, got patterns of 5"),
    ("llama", {}, {7: ["dense"] * 4}, "patterns of layer 7, but the model has 2 attention sites"),
    ("llama", {}, {0: ["dense"] * 4}, "every layer would stay dense"),
    ("bloom", {}, {0: ["a_shape:1:2"] * 4}, "has ALiBi"),
    ("mistral", {}, {0: ["a_shape:1:2"] * 4}, "every layer would stay dense"),
    ("deepseek_v3", {"mla": "latent"}, {0: ["a_shape:1:2"] * 4}, "caches latents"),
])  # fmt: skip
def test_what_has_no_sparse_prefill(family: str, options: dict[str, Any], prefill: Any, why: str) -> None:
    made = rewritten.rewrite(rewritten.original(family), rewritten.captured(family), "full", None, **options)
    patterns = {layer: tuple(HeadPattern(*_split(w)) for w in heads) for layer, heads in prefill.items()}
    with pytest.raises(OptionError, match=why):
        insert_sparse_prefill(made.graph_module, made.sites, patterns)


def test_no_tensor_parallelism() -> None:
    with pytest.raises(OptionError, match="patterns are of all heads of a layer"):
        part_of(model(FEW).program, Peers(0, 2, "none"))


def test_files_of_patterns(tmp_path: Path) -> None:
    """MInference's own files are read, too, with the numbers that its code makes of them."""
    file = tmp_path / "theirs.json"
    theirs = [
        {"0": ["vertical_and_slash", 10, 6096, 1.5], "1": ["stream_llm", 100, 800, 1], "2": ["block_sparse", 10, 1, 2]}
    ]
    file.write_text(json.dumps(theirs))
    expected = (
        HeadPattern("vertical_slash", 30, 6096),
        HeadPattern("a_shape", 100, 800),
        HeadPattern("block_sparse", 100),
    )
    assert read_patterns(file) == {0: expected}
    for text, why in (
        ("{", "can't be read as JSON"),
        ("{}", 'expected "format"'),
        (json.dumps({"format": FORMAT, "layers": {"x": []}}), "layer 'x' is not a number"),
        (json.dumps({"format": FORMAT, "layers": {"0": [3]}}), "layer 0: got 3, expected a pattern"),
        (json.dumps({"format": FORMAT, "layers": {"0": ["slash:1"]}}), "got 'slash', expected one of"),
        ('[{"1": ["stream_llm", 1, 2, 3]}]', "is not an object of heads from 0 on"),
        ('[{"0": ["dense", 1, 2, 3]}]', r"head 0: got \['dense'"),
    ):
        file.write_text(text)
        with pytest.raises(OptionError, match=why):
            read_patterns(file)
    with pytest.raises(OptionError, match="can't be read as JSON"):
        read_patterns(tmp_path / "none.json")
