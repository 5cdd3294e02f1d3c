"""Training texts: what rows become, how they stream, and what is refused."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrewrite.errors import TrainingError
from kvrewrite.tools.training.data import Encoder, Texts, check_files, fingerprint, rows
from kvrewrite.tools.training.trainer import IGNORED, batch_of_all, collate
from tests.support.tiny import make_checkpoint

pytestmark = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs kvrewrite[train]")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("model")))


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def encode(tokenizer: Any, row: dict[str, Any], **options: Any) -> dict[str, list[int]]:
    return Encoder(tokenizer, **{"needs": "answer", "max_tokens": 100, **options})(row, 0)


def test_prompt_and_answer(tokenizer: Any) -> None:
    made = encode(tokenizer, {"prompt": "The quick", "answer": " brown fox", "other": 3})
    prompt, answer = (tokenizer(t).input_ids for t in ("The quick", " brown fox"))
    assert made == {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def test_context_and_question(tokenizer: Any) -> None:
    row = {"context": "The quick brown fox", "question": " jumps?", "answer": " over"}
    context, question, answer = (tokenizer(row[n]).input_ids for n in ("context", "question", "answer"))
    assert encode(tokenizer, row)["input_ids"] == context + question + answer
    assert encode(tokenizer, row, question_first=True)["input_ids"] == question + context + question + answer
    last = encode(tokenizer, row, question_first=True, question_tokens=1)["input_ids"]
    assert last == question[-1:] + context + question + answer
    short = Encoder(tokenizer, "answer", len(question) + 2)
    assert short(row, 0)["input_ids"] == context[:2] + question + answer  # the question stays
    assert short.counts.cut.value == 1
    with pytest.raises(TrainingError, match="columns answer, prompt; expected context, question and answer"):
        encode(tokenizer, {"prompt": "a", "answer": "b"}, question_first=True)


def test_turns(tokenizer: Any) -> None:
    row = {"context": "The quick brown fox", "turns": [[" jumps?", " over"], [" the", " lazy dog"]]}
    context, *parts = (tokenizer(t).input_ids for t in (row["context"], " jumps?", " over", " the", " lazy dog"))
    end, labels = [tokenizer.eos_token_id], [IGNORED]
    made = encode(tokenizer, row, end=True)
    assert made["input_ids"] == context + parts[0] + parts[1] + end + parts[2] + parts[3] + end
    asked = [labels * len(part) for part in (context + parts[0], parts[2])]
    assert made["labels"] == asked[0] + parts[1] + end + asked[1] + parts[3] + end
    turns = sum(map(len, parts))
    short = Encoder(tokenizer, "answer", turns + 2)
    assert short(row, 0)["input_ids"] == context[:2] + [token for part in parts for token in part]  # the turns stay
    assert short.counts.cut.value == 1
    with pytest.raises(TrainingError, match=f"turns of {turns} tokens, which leave no room for a context"):
        encode(tokenizer, row, max_tokens=turns)
    for bad in ([], [["a"]], [["a", ""]], "text"):
        with pytest.raises(TrainingError, match=r"row 0: expected context, a text, and turns"):
            encode(tokenizer, {**row, "turns": bad})


def test_chats(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "The quick"}, {"role": "assistant", "content": "brown fox"}]
    with pytest.raises(TrainingError, match="no chat template"):
        encode(tokenizer, {"messages": chat})
    tokenizer.chat_template = TEMPLATE
    try:
        made = encode(tokenizer, {"messages": chat})
        answer = [t for t, label in zip(made["input_ids"], made["labels"]) if label != IGNORED]
        assert tokenizer.decode(answer) == "brown fox\n"
        assert tokenizer.decode(made["input_ids"]) == "user:\nThe quick\nassistant:\nbrown fox\n"
        with pytest.raises(TrainingError, match="ends with an answer of the assistant"):
            encode(tokenizer, {"messages": chat[:1]})
        tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
        with pytest.raises(TrainingError, match="writes a prompt otherwise"):
            encode(tokenizer, {"messages": chat})
    finally:
        tokenizer.chat_template = None


def test_long_texts_are_cut_and_counted(tokenizer: Any) -> None:
    made = Encoder(tokenizer, "text", 5)
    assert (
        made({"text": "The quick brown fox jumps over the lazy dog"}, 0)["input_ids"]
        == (tokenizer("The quick brown fox jumps over the lazy dog").input_ids[:5])
    )
    assert len(made({"text": "The quick"}, 1)["input_ids"]) <= 5
    assert (made.counts.read.value, made.counts.cut.value) == (2, 1)


def test_bad_rows_are_named(tokenizer: Any) -> None:
    for row, words in (
        ({"prompt": "a"}, "row 0 has the columns prompt; expected messages"),
        ({"prompt": "a", "answer": ""}, "row 0 has an empty answer"),
        ({"prompt": "", "answer": "a"}, "row 0 has an empty prompt"),
        ({}, "row 0 has no columns"),
        ({"messages": ["The quick", "brown fox"]}, "row 0: messages should be a list"),
        ({"text": "a b"}, "row 0 has the columns text; expected messages"),
    ):
        with pytest.raises(TrainingError, match=words):
            encode(tokenizer, row)
    with pytest.raises(TrainingError, match="expected text"):
        encode(tokenizer, {"prompt": "a", "answer": "b"}, needs="text")
    with pytest.raises(TrainingError, match="expected at least 2"):
        encode(tokenizer, {"text": ""}, needs="text")


def test_prompt_and_answer_fit_the_model(tokenizer: Any) -> None:
    row = {"prompt": "The quick brown fox jumps over", "answer": " the lazy dog"}
    answer = tokenizer(row["answer"]).input_ids
    made = encode(tokenizer, row, longest=len(answer) + 3, end=True)
    assert made["input_ids"] == tokenizer(row["prompt"]).input_ids[:2] + answer + [tokenizer.eos_token_id]
    with pytest.raises(TrainingError, match="leaves no room for a prompt"):
        encode(tokenizer, row, longest=len(answer))


def test_bad_files_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    good = write(tmp_path / "good.jsonl", [{"text": "a"}])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "x.csv").write_text("a")
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    (tmp_path / "blank.jsonl").write_text("\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    for files, words in (
        ([], "no training data"),
        ([tmp_path / "x.csv"], "ends in .jsonl"),
        ([tmp_path / "none.jsonl"], "does not exist"),
        ([tmp_path / "empty.jsonl"], "is empty"),
        ([good, tmp_path / "bad.parquet"], "mixed"),
    ):
        with pytest.raises(TrainingError, match=words):
            check_files(files)
    for name in ("bad.jsonl", "bad.parquet", "blank.jsonl"):
        with pytest.raises(TrainingError, match=rf"{name}.*(could not be read as|no rows)"):
            Texts([tmp_path / name], Encoder(tokenizer, "text", 9), 0)


def test_parquet_is_read_like_json(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = [{"prompt": f"p{i}", "answer": f"a{i}"} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "x.parquet")
    write(tmp_path / "x.jsonl", lines)
    kind, paths = check_files([tmp_path / "x.parquet"])
    assert list(rows(kind, paths)) == lines == list(rows("json", [tmp_path / "x.jsonl"]))
    assert fingerprint(paths) != fingerprint([tmp_path / "x.jsonl"])


def test_texts_never_end_and_shuffle_by_seed(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": f"The quick {i}"} for i in range(6)])

    def first(count: int, seed: int) -> list[str]:
        texts = Texts([path], Encoder(tokenizer, "text", 50), seed)
        return [tokenizer.decode(r["input_ids"]) for r in itertools.islice(texts, count)]

    found = first(18, 0)
    assert found == first(18, 0) and found != first(18, 1)
    for epoch in range(3):
        assert sorted(found[6 * epoch : 6 * epoch + 6]) == [f"The quick {i}" for i in range(6)]
    assert found[:6] != found[6:12]


def test_workers_share_the_rows(tmp_path: Path, tokenizer: Any) -> None:
    from torch.utils.data import DataLoader

    path = write(tmp_path / "x.jsonl", [{"text": f"The quick {i}"} for i in range(8)])
    texts = Texts([path], Encoder(tokenizer, "text", 50), 0)
    loader = DataLoader(texts, batch_size=1, num_workers=2, collate_fn=lambda batch: batch[0]["input_ids"])
    found = [tokenizer.decode(ids) for ids in itertools.islice(loader, 8)]
    assert sorted(found) == [f"The quick {i}" for i in range(8)]
    assert texts.encode.counts.read.value >= 8


def test_first_batch_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh gates are fitted to the first batch, so every process has to see all of it, and in one order."""
    texts = [{"input_ids": list(range(1, n + 1)), "labels": [IGNORED] * (n - 1) + [n]} for n in (3, 5, 2, 7)]
    halves = [collate(texts[:2]), collate(texts[2:])]

    def gather(found: list[Any], mine: dict[str, torch.Tensor]) -> None:
        assert any(
            all(torch.equal(mine[n], half[n]) for n in half)
            for half in halves
            if half["real"].shape == mine["real"].shape
        )
        found[:] = halves

    assert batch_of_all(halves[0]).keys() == halves[0].keys()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    whole = collate(texts)
    for half in halves:
        made = batch_of_all(half)
        assert made.keys() == whole.keys() and all(torch.equal(made[n], whole[n]) for n in whole)
