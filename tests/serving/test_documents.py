"""Saved documents of a server (`kvrewrite serve --documents`): each answer is that of `generate` on the loaded cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import kvrewrite
from kvrewrite.cli import app as cli
from kvrewrite.errors import CacheError, OptionError
from kvrewrite.runtime.batch import Batch
from tests.cache.test_cache import GREEDY, check_pages, tokens
from tests.support.rewritten import build, captured, rewrite, rewritten
from tests.support.tiny import TEXT

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("pydantic")
pytest.importorskip("prometheus_client")
pytest.importorskip("jinja2")

from kvrewrite import serving
from kvrewrite.serving.documents import load_documents
from tests.support.serving_tools import Server, idle, shared_folder, shared_parts

pytestmark = pytest.mark.xdist_group("serve")

QUESTIONS = [" What?", " Who jumps over the lazy dog", " shells by the sea shore, she", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents, made by the command; the second one is shorter than the budget."""
    shared_parts()
    place = tmp_path_factory.mktemp("documents")
    for name, text in (("book", TEXT[:150]), ("note", TEXT[:9])):
        (place / f"{name}.txt").write_text(text)
        made = ["prefill", str(shared_folder() / "out"), "--document", str(place / f"{name}.txt")]
        done = CliRunner().invoke(cli.main, [*made, "--out", str(place / f"{name}.kvcache")])
        assert done.exit_code == 0, done.output
    return place


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    running = Server(serving.Engine(*shared_parts(), max_new_tokens=64, max_prompt_tokens=200, documents=folder))
    yield running
    running.stop()


def expected(folder: Path, name: str, question: str, new: int = 12) -> str:
    """What `generate` says on the loaded cache, as the command does."""
    model, tokenizer = shared_parts()
    cache = kvrewrite.load_cache(model, folder / f"{name}.kvcache")
    ids = tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"]
    text = torch.cat([cache.ids(), ids], 1)
    out = model.generate(text, attention_mask=text * 0 + 1, cache=cache, max_new_tokens=new, pad_token_id=0)
    return tokenizer.decode(out[0, text.shape[1] :], skip_special_tokens=True)  # type: ignore[no-any-return]


def by_command(folder: Path, name: str, question: str, new: int = 12) -> str:
    """What the command `kvrewrite generate --cache` says."""
    ask = ["generate", str(shared_folder() / "out"), "--cache", str(folder / f"{name}.kvcache"), "--prompt", question]
    done = CliRunner().invoke(cli.main, [*ask, "--max-new-tokens", str(new)])
    assert done.exit_code == 0, done.output
    return done.stdout.removesuffix("\n")


def test_answers_are_those_of_the_command(folder: Path, server: Server) -> None:
    for name in ("book", "note"):
        for question in QUESTIONS[:2]:
            body = {"prompt": question, "max_tokens": 12, "document": name}
            status, data = server.call("/v1/completions", body)
            assert status == 200, data
            assert data["choices"][0]["text"] == expected(folder, name, question)
    assert data["choices"][0]["text"].strip() == by_command(folder, name, question).strip()
    tokenizer = shared_parts()[1]
    document, asked = (
        tokenizer(text, add_special_tokens=special)["input_ids"]
        for text, special in ((TEXT[:9], True), (question, False))
    )
    assert data["usage"]["prompt_tokens"] == len(document) + len(asked)
    assert data["usage"]["prompt_tokens_details"] == {"cached_tokens": len(document)}
    # By the model's name, and as a stream.
    status, named = server.call("/v1/completions", {"model": "tiny@note", "prompt": question, "max_tokens": 12})
    assert named["choices"] == data["choices"] and named["model"] == "tiny@note"
    events = server.events("/v1/completions", body)
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == data["choices"][0]["text"]
    assert idle(server.engine)
    server.engine.scheduler.prefixes.clear()
    held = [d.cache.leases for d in server.engine.documents.values()]
    for i, store in enumerate(server.engine.batch.stores):
        assert store.total - 1 - len(store.free) == sum(leases[i].leased for leases in held) > 0


def test_many_at_once_and_several_answers_to_one(folder: Path, server: Server) -> None:
    """Documents, other prompts and each other disturb none; a question of one token, too."""
    wanted = {(name, q): expected(folder, name, q) for name in ("book", "note") for q in QUESTIONS}
    plain = server.call("/v1/completions", {"prompt": TEXT[:60], "max_tokens": 12})[1]["choices"][0]["text"]

    def ask(case: tuple[str, str] | None) -> bool:
        if case is None:
            body = {"prompt": TEXT[:60], "max_tokens": 12}
        else:
            body = {"prompt": case[1], "document": case[0], "max_tokens": 12, "n": 2, "temperature": 0}
        choices = server.call("/v1/completions", body)[1]["choices"]
        return all(c["text"] == (plain if case is None else wanted[case]) for c in choices)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, [*wanted, None] * 3))


def test_lists_and_refusals(folder: Path, server: Server) -> None:
    _, found = server.call("/v1/documents")
    assert [d["id"] for d in found["data"]] == ["book", "note"] and found["object"] == "list"
    book = found["data"][0]
    assert book["tokens"] == len(shared_parts()[1](TEXT[:150])["input_ids"]) > book["slots"] == 16 and book["bytes"] > 0
    assert server.call("/v1/documents/book") == (200, book)
    assert [m["id"] for m in server.call("/v1/models")[1]["data"]] == ["tiny", "tiny@book", "tiny@note"]
    assert server.call("/v1/models/tiny@note")[1]["parent"] == "tiny"
    for path in ("/v1/documents/bible", "/v1/models/tiny@bible"):
        assert server.call(path)[0] == 404
    ask = {"prompt": "x", "max_tokens": 2}
    for more, status, code, said in (
        (
            {"document": "bible"},
            404,
            "document_not_found",
            "no document 'bible'; this server has the documents book, note",
        ),
        ({"model": "tiny@bible"}, 404, "document_not_found", "book, note"),
        ({"model": "other@book"}, 404, "model_not_found", "this server has the model 'tiny'"),
        ({"model": "tiny@book", "document": "note"}, 400, None, "name one document"),
        ({"document": "book", "budget": 12}, 400, None, "leave budget out"),
        ({"document": 7}, 400, None, "document is 7"),
        ({"document": "book", "prompt": TEXT * 6}, 400, "context_length_exceeded", "at most 200"),
    ):
        got, data = server.call("/v1/completions", {**ask, **more})
        assert got == status and data["error"]["code"] == code and said in data["error"]["message"], data
    without = Server(serving.Engine(*shared_parts()))
    try:
        _, data = without.call("/v1/completions", {**ask, "document": "book"})
        assert "serve --documents" in data["error"]["message"]
        assert without.call("/v1/documents")[1]["data"] == []
    finally:
        without.stop()


def test_the_openai_client(folder: Path, server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    text = expected(folder, "book", QUESTIONS[0])
    asked = {"prompt": QUESTIONS[0], "max_tokens": 12}
    assert client.completions.create(model="tiny", extra_body={"document": "book"}, **asked).choices[0].text == text
    assert client.completions.create(model="tiny@book", **asked).choices[0].text == text
    with pytest.raises(openai.NotFoundError, match="book, note"):
        client.completions.create(model="tiny", extra_body={"document": "bible"}, **asked)


# ------------------------------------------------------------------------------------------------ what begins a server
def test_folders_that_can_not_be_served(folder: Path, tmp_path: Path) -> None:
    model, _ = shared_parts()
    with pytest.raises(OptionError, match=r"has no files \*\.kvcache; kvrewrite prefill"):
        load_documents(Batch(model), tmp_path)
    rewritten("llama", "h2o", budget=40).prefill(tokens(1, 60)).save(tmp_path / "other.kvcache")
    with pytest.raises(CacheError, match=r"other\.kvcache was made with h2o"):
        load_documents(Batch(model), tmp_path)
    batch = Batch(model)
    a_page_each = sum(
        k.kv_heads * len(k.layers) * s.page_bytes for k, s in zip(model.program.layout.classes, batch.stores)
    )
    with pytest.raises(OptionError, match=r"note.*no memory for it beside 1 of 2 documents.*--memory"):
        load_documents(Batch(model, memory=a_page_each), folder)
    for name, change in (("rows", lambda c: c.batch_repeat_interleave(2)), ("pins", lambda c: c.pin(0, 3))):
        (tmp_path / name).mkdir()
        cache = model.prefill(tokens(1, 40) + 2)
        change(cache)
        cache.save(tmp_path / name / "a.kvcache")
        with pytest.raises(CacheError, match="2 rows" if name == "rows" else "pinned spans"):
            load_documents(Batch(model), tmp_path / name)
    done = CliRunner().invoke(
        cli.main, ["serve", str(shared_folder() / "out"), "--documents", str(tmp_path / "nothing")]
    )
    assert done.exit_code == 1 and "kvrewrite prefill" in done.stderr


# ------------------------------------------------------------------------------------------------------------ the batch
CASES: list[Any] = [
    ("h2o", {"budget": 40, "chunk": 32}),
    ("snapkv", {"budget": 40, "window": 8}),
    ("streaming_llm", {"budget": 40, "chunk": 32, "positions": "contiguous"}),
    ("adakv", {"budget": 40, "window": 8}),
    ("full", {}),
    pytest.param("h2o", {"budget": 70, "quantize": "int8", "quantize_residual": 32}, marks=pytest.mark.thorough),
    pytest.param("keydiff", {"budget": 0.5, "chunk": 32}, marks=pytest.mark.thorough),
    pytest.param("h2o", {"budget": 48, "protect_prompt": True, "chunk": 8}, marks=pytest.mark.thorough),
    pytest.param("kvzap", {"budget": 40, "window": 16, "chunk": 32}, marks=pytest.mark.thorough),
]


def answer(model: Any, text: Tensor, cache: Any, new: int = 9) -> list[int]:
    out = model.generate(text, attention_mask=torch.ones_like(text), cache=cache.fork(), max_new_tokens=new, **GREEDY)
    return out[0, text.shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("policy", "options"), CASES, ids=lambda v: str(v))
def test_requests_go_on_from_a_file(tmp_path: Path, policy: str, options: dict[str, Any], static: bool) -> None:
    """A limit of memory holds what `pages_needed` says: of the documents, and of each request beside them."""
    if static and policy not in ("h2o", "streaming_llm"):
        pytest.skip("one kind of decoding for each of these")
    model = rewritten("llama", policy, **options)
    if static:
        model = rewrite(build("llama"), captured("llama"), policy, None, **options)
        model.compile(static_decode=True, backend="eager")
    length = 20 if options.get("protect_prompt") else 100
    document = tokens(1, length)
    saved = model.prefill(document)
    answer(model, torch.cat([document, tokens(1, 3)], 1), saved)
    saved.save(tmp_path / "a.kvcache")
    questions = [tokens(1, n, seed=n) for n in (1, 7, 40)]
    texts = [torch.cat([document, q], 1) for q in questions]
    wanted = [answer(model, text, kvrewrite.load_cache(model, tmp_path / "a.kvcache")) for text in texts]
    batch = Batch(model)
    loaded = batch.load_document(tmp_path / "a.kvcache")
    held = [lease.leased for lease in loaded.leases]
    for text, expect in zip(texts, wanted):
        total = text.shape[1] + 9
        needed, _ = batch.pages_needed(text.shape[1], total, None, loaded)
        request = batch.start(text[0], max_length=total, document=loaded)
        logits, made, most = None, [], [0] * len(needed)
        while logits is None:
            logits = batch.advance(request)
            most = [max(m, le.leased) for m, le in zip(most, request.cache.leases)]  # type: ignore[union-attr]
        while True:
            made.append(int(logits.argmax()))
            if len(made) == len(expect):
                break
            logits = batch.decode([request], [made[-1]])[0]
            assert request.group is not None
            most = [max(m, le.leased) for m, le in zip(most, request.group.rows.leases)]
        batch.end(request)
        assert made == expect
        assert all(m <= n for m, n in zip(most, needed)), (most, needed)
    assert [lease.leased for lease in loaded.leases] == held
    check_pages(loaded, *[saved] * static)  # pools of a compiled model are its own


def test_a_pool_that_is_nearly_full_of_documents(folder: Path) -> None:
    """What documents take is not promised to requests; many answers that do not fit at once come one after the other."""
    model, tokenizer = shared_parts()
    need = sum(store.page_bytes for store in Batch(model).stores)
    free = Batch(model)
    cache = load_documents(free, folder)["book"].cache
    pages = sum(lease.leased for lease in cache.leases)
    memory = need * (4 * pages)
    engine = serving.Engine(
        model, tokenizer, capacity=serving.Capacity(memory=memory, max_requests=8), documents=folder, max_new_tokens=32
    )
    try:
        assert all(a < s.limit - 1 for a, s in zip(engine.batch.room, engine.batch.stores) if s.limit is not None)
        wanted, found, done = expected(folder, "book", QUESTIONS[1]), [], threading.Event()

        def emit(event: serving.Event) -> None:
            assert event.error is None, event.error
            if event.last:
                found.append(event.text)
                if len(found) == 12:
                    done.set()

        for _ in range(12):
            request = serving.read_request({"prompt": QUESTIONS[1], "max_tokens": 12, "document": "book"}, chat=False)
            engine.submit(serving.Job(request, emit), engine.documents["book"])
        assert done.wait(60) and found == [wanted] * 12
    finally:
        engine.close()
