"""Training texts: rows of JSON lines or parquet files, streamed by `datasets`, as token ids and labels.

A row has one of: `messages` (a chat whose last message is the assistant's answer), `prompt` and `answer`, `context`,
`question` and `answer`, `context` and `turns` (several [question, answer], one after the other), or `text`. Other
columns are ignored.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from kvrewrite.errors import TrainingError
from kvrewrite.policies.question import join_question
from kvrewrite.tools.training.trainer import IGNORED

KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
WITH_ANSWER = "messages; prompt and answer; context, question and answer; or context and turns"
BUFFER = 2000  # rows that are shuffled together


# ---------------------------------------------------------------------------------------------------------------- files
def check_files(files: Sequence[str | Path]) -> tuple[str, list[Path]]:
    """Returns the kind of the files ("json" or "parquet") and their paths; raises TrainingError."""
    paths = [Path(f) for f in files]
    if not paths:
        raise TrainingError("no training data was given; expected .jsonl or .parquet files")
    for path in paths:
        if path.suffix not in KINDS:
            raise TrainingError(f"{path}: expected a file that ends in .jsonl (one JSON object per line) or .parquet")
        if not path.is_file():
            raise TrainingError(f"{path} does not exist or is not a file; expected .jsonl or .parquet")
        if path.stat().st_size == 0:
            raise TrainingError(f"{path} is empty; expected rows with {WITH_ANSWER}; or text")
    kinds = {KINDS[p.suffix] for p in paths}
    if len(kinds) > 1:
        raise TrainingError("training data is JSON lines and parquet mixed; give files of one kind")
    return kinds.pop(), paths


def fingerprint(paths: Sequence[Path]) -> str:
    """Returns the sha256 of the files' content, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def rows(kind: str, paths: Sequence[Path], seed: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows once, in the files' order, or shuffled in a buffer if there is a seed."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        stream = load_dataset(kind, data_files=[str(p.resolve()) for p in paths], split="train", streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=BUFFER)
        # Not `iter(stream)`, which would split the rows among the workers a second time.
        for batch in stream.iter(batch_size=32):
            names = list(batch)
            for values in zip(*(batch[n] for n in names), strict=True):
                yield {n: v for n, v in zip(names, values, strict=True) if v is not None}
    except (DatasetGenerationError, ValueError, OSError) as error:  # pyarrow's errors are ValueErrors
        if isinstance(error, TrainingError):
            raise
        cause = error.__cause__ or error
        what = "JSON lines (one object per line, all with the same columns)" if kind == "json" else "parquet"
        reason = str(cause).splitlines()[0][:200] if str(cause) else type(cause).__name__
        raise TrainingError(f"{', '.join(map(str, paths))} could not be read as {what}: {reason}") from error


# ----------------------------------------------------------------------------------------------------------- tokenizing
@dataclass
class Counts:
    """Counts of what happened to the texts, over all worker processes."""

    read: Any = field(default_factory=lambda: multiprocessing.Value("q", 0))
    cut: Any = field(default_factory=lambda: multiprocessing.Value("q", 0))

    @staticmethod
    def add(counter: Any) -> None:
        """Adds one."""
        with counter.get_lock():
            counter.value += 1


@dataclass(frozen=True)
class Encoder:
    """Encodes rows as {"input_ids", "labels"}.

    needs: "answer": labels are the answer's tokens; "text": labels are all tokens; "any": as the row has it.
    max_tokens: of a prompt, or of a
    text; a longer one keeps its first tokens, as Locret's authors do (they compute labels first; here the answer
    follows what is left). longest: tokens that the model takes, prompt and answer together (None: any). end: whether an
    answer without the token that ends a text gets one. question_first: the question also comes before the context
    (Locret-Q); question_tokens: only its last so many tokens do (0: all).
    """

    tokenizer: Any
    needs: str
    max_tokens: int
    question_first: bool = False
    question_tokens: int = 0
    longest: int | None = None
    end: bool = False
    counts: Counts = field(default_factory=Counts)

    def __call__(self, row: dict[str, Any], number: int) -> dict[str, list[int]]:
        """number: of the row, for errors."""
        Counts.add(self.counts.read)
        if self.needs == "text" or (self.needs == "any" and "text" in row):
            return self._text(row, number)
        if "turns" in row and not self.question_first:
            return self._turns(row, number)
        prompt, answer = self._parts(row, number)
        if not answer:
            raise TrainingError(f"row {number} has an empty answer; expected at least one token")
        if not prompt:
            raise TrainingError(f"row {number} has an empty prompt; expected at least one token")
        answer = self._ended(answer)
        room = self.max_tokens if self.longest is None else min(self.max_tokens, self.longest - len(answer))
        if room < 1:
            raise TrainingError(
                f"row {number} has an answer of {len(answer)} tokens, which leaves no room for a prompt: the model takes "
                f"{self.longest}"
            )
        if len(prompt) > room:
            Counts.add(self.counts.cut)
            prompt = prompt[:room]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    def _ended(self, answer: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [*answer, end] if self.end and end is not None and answer[-1] != end else answer

    def _turns(self, row: dict[str, Any], number: int) -> dict[str, list[int]]:
        """Labels are the answers of all turns; the questions after the first also belong to what is asked."""
        context, turns = row.get("context"), row["turns"]
        fine = isinstance(turns, list) and all(
            isinstance(t, list) and len(t) == 2 and all(isinstance(x, str) and x for x in t) for t in turns
        )
        if not isinstance(context, str) or not turns or not fine:
            raise TrainingError(
                f"row {number}: expected context, a text, and turns, a list of [question, answer], none of them empty"
            )
        ids, labels = [], []
        for question, answer in turns:
            asked = self._ids(question, special=False)
            replied = self._ended(self._ids(answer, special=False))
            ids += asked + replied
            labels += [IGNORED] * len(asked) + replied
        room = self.max_tokens if self.longest is None else min(self.max_tokens, self.longest)
        room -= len(ids)
        start = self._ids(context)
        if room < 1:
            raise TrainingError(
                f"row {number} has turns of {len(ids)} tokens, which leave no room for a context: the limit is {room + len(ids)}"
            )
        if len(start) > room:
            Counts.add(self.counts.cut)
            start = start[:room]
        return {"input_ids": start + ids, "labels": [IGNORED] * len(start) + labels}

    def _text(self, row: dict[str, Any], number: int) -> dict[str, list[int]]:
        text = row.get("text")
        if not isinstance(text, str):
            raise TrainingError(f"row {number} has {self._columns(row)}; expected text")
        ids = self._ids(text)
        if len(ids) < 2:
            raise TrainingError(f"row {number} has a text of {len(ids)} tokens; expected at least 2")
        if len(ids) > self.max_tokens:
            Counts.add(self.counts.cut)
            ids = ids[: self.max_tokens]
        return {"input_ids": ids, "labels": list(ids)}

    def _ids(self, text: str, special: bool = True) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        # A prompt continues, so it must not end with the token that ends a text.
        while special and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return ids

    def _parts(self, row: dict[str, Any], number: int) -> tuple[list[int], list[int]]:
        if "messages" in row and not self.question_first:
            return self._chat(row["messages"], number)
        answer = row.get("answer")
        if isinstance(row.get("context"), str) and isinstance(row.get("question"), str) and isinstance(answer, str):
            context, question = self._ids(row["context"]), self._ids(row["question"], special=False)
            if self.question_first:
                front = question[-self.question_tokens :]
                context = join_question(context, [], first=True, bos=self.tokenizer.bos_token_id, front=front)
            room = self.max_tokens - len(question)
            if len(context) > room > 0:
                Counts.add(self.counts.cut)
                context = context[:room]
            return context + question, self._ids(answer, special=False)
        if self.question_first:
            raise TrainingError(
                f"row {number} has {self._columns(row)}; expected context, question and answer, for the question is to stand "
                "before the context"
            )
        if isinstance(row.get("prompt"), str) and isinstance(answer, str):
            return self._ids(row["prompt"]), self._ids(answer, special=False)
        raise TrainingError(f"row {number} has {self._columns(row)}; expected {WITH_ANSWER}")

    def _chat(self, messages: Any, number: int) -> tuple[list[int], list[int]]:
        fine = isinstance(messages, list) and len(messages) > 1 and all(isinstance(m, dict) for m in messages)
        if not fine or messages[-1].get("role") != "assistant":
            raise TrainingError(
                f'row {number}: messages should be a list of {{"role", "content"}} that ends with an answer of the assistant'
            )
        if not getattr(self.tokenizer, "chat_template", None):
            raise TrainingError(
                "the data has messages, but the model's tokenizer has no chat template; expected prompt and answer"
            )
        whole = self._template(messages, False)
        prompt = self._template(messages[:-1], True)
        if whole[: len(prompt)] != prompt:
            raise TrainingError(
                f"row {number}: the chat template writes a prompt otherwise than the beginning of the whole chat; give prompt "
                "and answer instead"
            )
        return prompt, whole[len(prompt) :]

    def _template(self, messages: list[dict[str, str]], generation: bool) -> list[int]:
        made = self.tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=generation, return_dict=True
        )
        return list(made["input_ids"])

    @staticmethod
    def _columns(row: dict[str, Any]) -> str:
        return "the columns " + ", ".join(sorted(row)) if row else "no columns"


class Texts(IterableDataset):  # type: ignore[type-arg]
    """Endless encoded rows: the files again and again, shuffled again each time; the same for the same seed.

    Resuming skips what was seen, so an epoch is no unit here. Workers share the rows among themselves.
    """

    def __init__(self, files: Sequence[str | Path], encode: Encoder, seed: int):
        self.kind, self.paths = check_files(files)
        self.encode, self.seed = encode, seed
        # Errors in the first row are raised before any training.
        first = next(rows(self.kind, self.paths), None)
        if first is None:
            raise TrainingError(f"{', '.join(map(str, self.paths))}: no rows; expected {WITH_ANSWER}; or text")
        encode(first, 0)
        encode.counts.read.value = encode.counts.cut.value = 0

    def once(self) -> Iterator[dict[str, list[int]]]:
        """Yields all rows once, in the files' order, without counting them."""
        counts = self.encode.counts
        before = counts.read.value, counts.cut.value
        for number, row in enumerate(rows(self.kind, self.paths)):
            yield self.encode(row, number)
            counts.read.value, counts.cut.value = before

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for epoch in itertools.count():
            for number, row in enumerate(rows(self.kind, self.paths, self.seed + epoch)):
                if number % workers == mine:
                    yield self.encode(row, number)
