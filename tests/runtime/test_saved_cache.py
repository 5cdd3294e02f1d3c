"""Caches as files: what is loaded goes on with the bits of what was saved, and nothing of a file is trusted."""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import kvrewrite
from kvrewrite.artifact import files
from kvrewrite.cache.eviction_cache import EvictionCache
from kvrewrite.errors import ArtifactError, CacheError
from kvrewrite.runtime.identity import digest
from kvrewrite.runtime.model import RewrittenModel
from kvrewrite.runtime.saved_cache import KEY, load_cache
from tests.cache.test_cache import GREEDY, check_pages, tokens
from tests.cache.test_fork import CASES, ask
from tests.support.rewritten import build, captured, rewrite, rewritten
from tests.support.tiny import TEXT, make_checkpoint

pytestmark = pytest.mark.xdist_group("llama")
ROOT = Path(__file__).parents[2]

ALIKE = {"snapkv", "kvzap", "duo_attention"}  # a file has of these what it has of others
MORE: list[Any] = [
    ("llama", "streaming_llm", {"budget": 90, "chunk": 40, "positions": "contiguous"}),
    pytest.param("llama", "h2o", {"budget": 90, "positions": "contiguous"}, marks=pytest.mark.thorough),
    pytest.param(
        "llama", "h2o", {"budget": 90, "quantize": "int8", "quantize_residual": 32}, marks=pytest.mark.thorough
    ),
    ("llama", "adakv", {"budget": 90, "window": 8, "quantize": "int4", "quantize_residual": 32}),
    ("llama", "tova", {"budget": 90, "quantize": "fp8", "quantize_residual": 32}),
    ("llama", "h2o", {"budget": 90, "merge": True}),
    pytest.param("gemma3_text", "h2o", {"budget": 90}, marks=pytest.mark.thorough),  # windows
    pytest.param("lfm2", "h2o", {"budget": 90}, marks=pytest.mark.thorough),  # layers that carry a state
    pytest.param("deepseek_v3", "tova", {"budget": 90, "mla": "latent"}, marks=pytest.mark.thorough),
]
STATIC: list[Any] = [
    ("streaming_llm", {"budget": 90, "chunk": 40, "positions": "contiguous"}),
    pytest.param("h2o", {"budget": 90}, marks=pytest.mark.thorough),
    pytest.param("h2o", {"budget": 90, "quantize": "int8", "quantize_residual": 32}, marks=pytest.mark.thorough),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted directory with a tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    kvrewrite.convert(make_checkpoint(folder / "base"), folder / "model", "h2o", budget=24)
    return folder / "model"


def filled(model: Any, rows: int = 2) -> EvictionCache:
    """A document of 150 tokens, rows padded to the left, and three tokens after it."""
    mask = torch.ones(rows, 150, dtype=torch.int64)
    mask[0, :11] = 0
    cache = model.new_cache(rows)
    model(tokens(rows, 150), attention_mask=mask, past_key_values=cache)
    cache.end_prompt()
    for t in range(3):
        model(tokens(rows, 1, seed=70 + t), past_key_values=cache)
    return cache


def check_loaded(model: Any, cache: EvictionCache, path: Path) -> None:
    """Saves, loads, and asks both."""
    cache.save(path)
    loaded = kvrewrite.load_cache(model, path)
    assert loaded.memory() == cache.memory() or loaded.memory().live == cache.memory().live
    assert loaded.positions() == cache.positions() and loaded.seen == cache.seen
    check_pages(loaded)
    for seed in (1, 2):
        got, positions = ask(model, loaded.fork(), seed)
        expected, kept = ask(model, cache.fork(), seed)
        assert torch.equal(got, expected) and positions == kept
    got, _ = ask(model, loaded, 3)
    assert torch.equal(got, ask(model, cache, 3)[0])


@pytest.mark.parametrize(
    ("family", "policy", "options"),
    [*(pytest.param("llama", p, o, marks=[pytest.mark.thorough] * (p in ALIKE)) for p, o in CASES), *MORE],
    ids=lambda v: str(v),
)
def test_it_goes_on_with_the_same_bits(tmp_path: Path, family: str, policy: str, options: dict[str, Any]) -> None:
    model = rewritten(family, policy, **options)
    check_loaded(model, filled(model), tmp_path / "doc.kvcache")


def test_rows_that_share_pages_still_do(tmp_path: Path) -> None:
    model = rewritten("llama", "full")
    cache = model.prefill(tokens(1, 200))
    cache.batch_repeat_interleave(3)
    cache.save(tmp_path / "a")
    loaded = kvrewrite.load_cache(model, tmp_path / "a")
    assert loaded.memory().leased == cache.memory().leased == cache.memory().shared
    check_pages(loaded)
    question = tokens(3, 5, seed=4)
    assert torch.equal(model(question, cache=loaded).logits, model(question, cache=cache).logits)


def test_what_only_appends_still_does(tmp_path: Path) -> None:
    model = rewritten("llama", "h2o", budget=24)
    cache = filled(model)
    cache.append_only()
    slots = int(cache.live_slots()[0].max())
    cache.save(tmp_path / "a")
    loaded = kvrewrite.load_cache(model, tmp_path / "a")
    for t in range(4):
        one = tokens(2, 1, seed=t)
        assert torch.equal(model(one, cache=loaded).logits, model(one, cache=cache).logits)
    assert int(loaded.live_slots()[0].max()) == slots + 4 and loaded.positions() == cache.positions()


@pytest.mark.parametrize(("policy", "options"), STATIC)
def test_while_decoding_from_static_buffers(tmp_path: Path, policy: str, options: dict[str, Any]) -> None:
    """Lengths, states and rotated keys lie in a step's buffers; pools are the model's."""
    model = rewrite(build("llama"), captured("llama"), policy, None, **options)
    model.compile(static_decode=True, backend="eager")
    cache = filled(model)
    cache.save(tmp_path / "a")
    loaded = kvrewrite.load_cache(model, tmp_path / "a")
    assert loaded.leases[0].store is cache.leases[0].store
    check_pages(loaded, cache)
    got, positions = ask(model, loaded, 1)
    expected, kept = ask(model, cache, 1)
    assert torch.equal(got, expected) and positions == kept


def test_generate_in_a_second_process(tmp_path: Path, directory: Path) -> None:
    """The model as a directory, the document as a file; what the other process makes of it is the same to the bit."""
    model = kvrewrite.load(directory)
    document, question = tokens(1, 90), tokens(1, 7, seed=1)
    cache = model.prefill(document)
    cache.save(tmp_path / "doc.kvcache")
    text = torch.cat([document, question], 1)
    answer = model.generate(text, cache=cache.fork(), max_new_tokens=8, **GREEDY)
    logits = model(question, cache=cache).logits
    torch.save({"text": text, "question": question}, tmp_path / "asked.pt")
    code = (
        "import sys, torch, kvrewrite\n"
        "at, model = sys.argv[1:]\n"
        "asked = torch.load(f'{at}/asked.pt')\n"
        "model = kvrewrite.load(model)\n"
        "cache = kvrewrite.load_cache(model, f'{at}/doc.kvcache')\n"
        "answer = model.generate(asked['text'], cache=cache.fork(), max_new_tokens=8, do_sample=False,"
        " eos_token_id=None, pad_token_id=0)\n"
        "logits = model(asked['question'], cache=cache).logits\n"
        "torch.save({'answer': answer, 'logits': logits}, f'{at}/answered.pt')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(directory)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "answered.pt")
    assert torch.equal(found["answer"], answer) and torch.equal(found["logits"], logits)


def test_a_directory_has_the_model_that_it_was_saved_from(tmp_path: Path) -> None:
    model = rewritten("llama", "h2o", budget=90)
    filled(model).save(tmp_path / "a")
    model.save_pretrained(tmp_path / "model")
    other = kvrewrite.load(tmp_path / "model")
    assert kvrewrite.load_cache(other, tmp_path / "a").seen == [142, 153]


# ------------------------------------------------------------------------------------------------------------- refusals
def test_other_policies_models_and_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    filled(rewritten("llama", "h2o", budget=90)).save(path)
    with pytest.raises(CacheError, match=r"made with h2o\(budget=90\), and this model has h2o\(budget=80\)"):
        kvrewrite.load_cache(rewritten("llama", "h2o", budget=80), path)
    with pytest.raises(CacheError, match=r"made with h2o.*this model has tova"):
        kvrewrite.load_cache(rewritten("llama", "tova", budget=90), path)
    model = rewritten("llama", "h2o", budget=90)
    other = RewrittenModel(dataclasses.replace(model.program, vocab_size=98), model.config)
    with pytest.raises(CacheError, match=r"a llama with 2 attention layers, 97 ids.*this is a llama with.*98 ids"):
        kvrewrite.load_cache(other, path)
    other = RewrittenModel(dataclasses.replace(model.program, max_positions=9999), model.config)
    with pytest.raises(CacheError, match=r"another rewrite of a llama.*its program is [0-9a-f]{12}.*this model's is"):
        kvrewrite.load_cache(other, path)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(twin.graph_module.parameters()).reshape(-1)[5] += 1e-3
    with pytest.raises(CacheError, match=r"other weights of a llama.*theirs have the hash [0-9a-f]{12}, this model's"):
        kvrewrite.load_cache(twin, path)


def test_what_can_not_be_saved(tmp_path: Path) -> None:
    model = rewritten("llama", "h2o", budget=90)
    with pytest.raises(CacheError, match="nothing has gone through"):
        model.new_cache(1).save(tmp_path / "a")
    cache = filled(model)
    cache.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match="exists; choose another name"):
        cache.save(tmp_path / "a")
    cache.save(tmp_path / "a", force=True)
    with pytest.raises(ArtifactError, match="is a directory"):
        cache.save(tmp_path, force=True)
    with pytest.raises(ArtifactError, match="no saved cache"):
        save_file({"x": torch.zeros(1)}, tmp_path / "b")
        load_cache(model, tmp_path / "b")
    with pytest.raises(ArtifactError, match="does not exist"):
        load_cache(model, tmp_path / "c")


def test_a_full_disk_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(rewritten("llama", "h2o", budget=90))
    cache.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(ArtifactError, match="no space is left"):
        cache.save(tmp_path / "a", force=True)
    assert (tmp_path / "a").read_bytes() == before and os.listdir(tmp_path) == ["a"]


# ------------------------------------------------------------------------------------------------------------- hostility
Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def rewrite_file(path: Path, change: Change) -> None:
    """Changes what a file says, and signs it."""
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        head = msgspec.json.decode(file.metadata()[KEY])
    change(head["numbers"], found)
    head["content"] = digest(found)
    head["ids"] = digest({name: found[name] for name in ("ids", "real") if name in found})
    save_file(found, path, {KEY: msgspec.json.encode(head).decode()})


def put(name: str, *at: int, value: Any) -> Change:
    def change(_: dict[str, Any], found: dict[str, Tensor]) -> None:
        found[name][at] = value

    return change


def count(name: str, value: Any) -> Change:
    return lambda numbers, _: numbers.__setitem__(name, value)


BAD: list[tuple[str, Change, str]] = [
    ("page", put("table_0", 0, 0, 0, 0, value=99), "table_0 names pages that are not there"),
    ("page_0", put("table_0", 0, 0, 0, 0, value=0), "table_0 names pages that are not there"),
    ("negative_page", put("table_0", 0, 0, 0, 0, value=-1), "table_0 names pages that are not there"),
    ("page_of_another_head", put("table_0", 0, 0, 0, 0, value=3), "table_0 does not name each page once"),
    ("lens", put("lens_0", 0, 0, 0, value=5000), "lens_0 or bound_0"),
    ("negative_lens", put("lens_0", 0, 0, 0, value=-1), "lens_0 or bound_0"),
    ("bound", put("bound_0", 0, 0, 0, value=1 << 40), "lens_0 or bound_0"),
    ("share", put("shares_0", 0, 0, 0, value=1 << 40), "shares_0 is out of range"),
    ("position", put("pos_pages_0", 0, 0, 0, value=153), "a position is not in the text"),
    ("negative_position", put("pos_pages_0", 0, 0, 0, value=-3), "a position is not in the text"),
    ("twice", lambda _, f: f["pos_pages_0"][0, 1].copy_(f["pos_pages_0"][0, 0]), "holds a position twice"),
    ("rotary", put("pos_pages_0", 0, 0, 1, value=1 << 30), "a rotary position is out of range"),
    ("id", put("ids", 0, 0, value=97), "ids are not below 97"),
    ("negative_id", put("ids", 0, 0, value=-1), "ids are not below 97"),
    ("mask", put("real", 0, 0, value=True), "rows have not seen as many tokens"),
    ("infinite", put("k_pages_0", 0, 0, 0, value=float("inf")), "k_pages_0 is not finite"),
    ("nan", put("v_pages_0", 0, 63, 0, value=float("nan")), "v_pages_0 is not finite"),
    ("dtype", lambda _, f: f.update(lens_0=f["lens_0"].long()), "lens_0 is torch.int64"),
    ("shape", lambda _, f: f.update(lens_0=f["lens_0"][:1].clone()), "lens_0 is torch.int32"),
    ("pool", lambda _, f: f.update(k_pages_0=f["k_pages_0"][:, :32].clone()), "k_pages_0 is torch.float32"),
    ("missing", lambda _, f: f.pop("lens_0"), "other tensors"),
    ("extra", lambda _, f: f.update(x=torch.zeros(1)), "other tensors"),
    ("rows", count("rows", 3), "entries"),
    ("many_rows", count("rows", 1 << 40), "rows"),
    ("columns", count("columns", 900), "ids is torch.int32"),
    ("seen", count("seen", [142, 1000]), "more tokens than there are columns"),
    ("seen_type", count("seen", [1.5, 2]), "seen"),
    ("length", count("length", [0, 0]), "length is less than what a head holds"),
    ("long", count("length", [1000, 1000]), "length is more than the row's tokens"),
    ("ranks", count("next_rotary", [1000, 1000]), "next_rotary is more than"),
    ("rotated", count("keys_rotated", True), "ranks of another model"),
    ("hint", count("max_length", 1 << 30), "max_length"),
    ("unknown", count("hello", 1), "hello"),
]


@pytest.mark.parametrize(("change", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_nothing_of_a_file_is_trusted(tmp_path: Path, change: Change, message: str) -> None:
    model = rewritten("llama", "h2o", budget=90)
    filled(model).save(tmp_path / "a")
    rewrite_file(tmp_path / "a", change)
    with pytest.raises(ArtifactError, match=message):
        load_cache(model, tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "options", "change", "message"),
    [
        ("h2o", {"quantize": "int8", "quantize_residual": 32}, put("state_qlens_0", 0, 0, value=-1), "state_qlens_0"),
        ("h2o", {"quantize": "int8", "quantize_residual": 32}, put("state_qlens_1", 1, 0, value=0), "state_qlens_1"),
        ("tova", {"quantize": "fp8", "quantize_residual": 32}, put("k_pages_0", 0, 9, 0, value=0xFF), "no number"),
        ("streaming_llm", {"positions": "contiguous"}, put("pos_pages_0", 0, 0, 1, value=153), "rotary position"),
        ("sirllm", {}, put("state_last_logits", 0, 0, value=float("nan")), "not finite"),
    ],
)
def test_nor_what_other_caches_have(
    tmp_path: Path, name: str, options: dict[str, Any], change: Change, message: str
) -> None:
    model = rewritten("llama", name, budget=90, **options)
    filled(model).save(tmp_path / "a")
    rewrite_file(tmp_path / "a", change)
    with pytest.raises(ArtifactError, match=message):
        load_cache(model, tmp_path / "a")


def test_bits_that_fell_over_are_found(tmp_path: Path) -> None:
    """A byte changed anywhere, and a file cut anywhere: refused, or (in padding of the header) as it was."""
    model = rewritten("llama", "h2o", budget=90)
    cache = filled(model)
    cache.save(tmp_path / "a")
    whole, chance = (tmp_path / "a").read_bytes(), random.Random(5)
    places = [*range(8), *(chance.randrange(len(whole)) for _ in range(60))]
    for at in places:
        spoiled = bytearray(whole)
        spoiled[at] ^= 1 << chance.randrange(8)
        (tmp_path / "b").write_bytes(spoiled)
        with pytest.raises((ArtifactError, CacheError)):
            load_cache(model, tmp_path / "b")
        (tmp_path / "b").write_bytes(whole[:at])
        with pytest.raises(ArtifactError):
            load_cache(model, tmp_path / "b")


# ------------------------------------------------------------------------------------------------------------ the command
def test_commands(tmp_path: Path, directory: Path) -> None:
    from click.testing import CliRunner

    from kvrewrite.cli.app import main

    (tmp_path / "book.txt").write_text(TEXT)
    book, out = str(tmp_path / "book.txt"), str(tmp_path / "book.kvcache")
    command = ["prefill", str(directory), "--document", book, "--out", out]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "saved" in done.stderr
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1 and "exists" in again.stderr
    ask = ["generate", str(directory), "--max-new-tokens", "6"]
    answers = [CliRunner().invoke(main, [*ask, "--cache", out, "--prompt", " What?"]) for _ in range(2)]
    assert answers[0].exit_code == 0, answers[0].output
    assert answers[0].stdout == answers[1].stdout and "new tokens" in answers[0].stderr
    model = kvrewrite.load(directory)
    from kvrewrite.artifact.companions import read_tokenizer

    tokenizer = read_tokenizer(str(directory))
    cache = model.prefill(tokenizer(TEXT, return_tensors="pt")["input_ids"])
    question = tokenizer(" What?", add_special_tokens=False, return_tensors="pt")["input_ids"]
    text = torch.cat([tokenizer(TEXT, return_tensors="pt")["input_ids"], question], 1)
    made = model.generate(text, cache=cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(made[0, text.shape[1] :], skip_special_tokens=True).strip() == answers[0].stdout.strip()
    refused = CliRunner().invoke(main, [*ask, "--cache", out, "--prompt", "x", "--chat"])
    assert refused.exit_code == 2
