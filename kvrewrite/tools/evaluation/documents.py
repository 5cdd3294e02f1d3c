"""Reads a user's documents, and makes of them what is asked in tokens: quotes to continue, text that follows.

A file of --data is JSON (a list), JSONL, or plain text (one document). A row has one of these forms:

- {"text": ...}: a document. `quote` draws a window of `tokens` tokens and four quotes from it, `lm` cuts it in two.
- {"context": ..., "turns": [[question, answer], ...]}: for `quote`, taken as it is.
- {"context": ..., "continuation": ...}: for `lm`, taken as it is.

`perplexity` reads the texts of a file, piece by piece.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrewrite.errors import OptionError

QUOTES = 4  # drawn from a document
KEY_WORDS, ANSWER_WORDS = 10, 8  # of a quote: shown in the question, and to be continued
PERPLEXITY = "perplexity"
CONTINUATION = 256  # tokens that `lm` scores after a context; its first follows from the context alone

TASKS = {
    "quote": "nats per token of continuing a quote from the context",
    "lm": "nats per token of the text that follows the context",
    "perplexity": "nats per token of the second half of each piece of a text, read token by token after the first half",
}


@dataclass(frozen=True)
class Passage:
    """Tokens to score after a context: `answer` follows `question`, which follows `context`.

    document: its number; intervals are over documents.
    """

    document: int
    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file; raises OptionError, naming the line, for what is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--data {path}: {error}") from error
    if path.suffix not in (".json", ".jsonl"):
        return [{"text": text}]
    try:
        lines = [line for line in text.splitlines() if line.strip()]
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    except ValueError as error:
        raise OptionError(f"--data {path} is not {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise OptionError(f"--data {path}: expected a list of rows, at least one")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not any(isinstance(row.get(name), str) for name in ("text", "context")):
            raise OptionError(f'--data {path}: row {number} is {str(row)[:60]!r}, expected "text" or "context" in it')
    return rows


def file_hash(path: Path) -> str:
    """The file's sha256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _ids(tokenizer: Any, text: str, *, special: bool = False) -> tuple[int, ...]:
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    while special and ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        ids = ids[:-1]
    return tuple(ids)


def context_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """A context's ids with the tokenizer's special tokens, but without an end."""
    return _ids(tokenizer, text, special=True)


def draw_quotes(text: str, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Draws (question, answer) pairs: ten words that occur once, and the eight that follow them; fewer than `count`
    where the text has no more."""
    flat = re.sub(r"\s+", " ", text)
    words = flat.split(" ")
    found: list[tuple[str, str]] = []
    if len(words) < 2 * (KEY_WORDS + ANSWER_WORDS):
        return found
    for _ in range(8 * count):
        at = rng.randrange(len(words) - KEY_WORDS - ANSWER_WORDS)
        key = " ".join(words[at : at + KEY_WORDS])
        answer = " ".join(words[at + KEY_WORDS : at + KEY_WORDS + ANSWER_WORDS])
        plain = len(re.findall(r"[^\W\d_]{3,}", key)) >= KEY_WORDS // 2 and re.search(r"[^\W\d_]{3}", answer)
        if plain and flat.count(key) == 1:
            found.append((f'\nContinue the quote from the text: "{key}', f' {answer}"'))
        if len(found) == count:
            break
    return found


def make_passages(
    task: str, rows: Sequence[Mapping[str, Any]], *, tokens: int, samples: int, seed: int, tokenizer: Any
) -> list[Passage]:
    """Makes the passages of the first `samples` documents; a text that no quote can be drawn from is passed over.

    tokens: most tokens of a context. Raises OptionError for rows of another form, and for documents that are too short
    or too long.
    """
    one = _quote if task == "quote" else _continuation
    if task == PERPLEXITY:
        return _pieces(rows, tokens, samples, tokenizer)
    found: list[Passage] = []
    documents = 0
    for number, row in enumerate(rows):
        if documents == samples:
            break
        try:
            parts = one(row, tokens, random.Random(f"{task}:{tokens}:{seed}:{number}"), tokenizer)
        except ValueError as error:
            raise OptionError(f"--data, row {number + 1}, {task}: {error}") from error
        found += [Passage(documents, *part) for part in parts]
        documents += bool(parts)
    if not found:
        raise OptionError(f"--data, {task}: no quote can be drawn from any of {len(rows)} rows: give longer texts")
    return found


Parts = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _quote(row: Mapping[str, Any], tokens: int, rng: random.Random, tokenizer: Any) -> list[Parts]:
    if "context" in row:
        if not isinstance(row.get("turns"), list):
            raise ValueError('expected "turns", a list of [question, answer]')
        context, turns = row["context"], [(str(q), str(a)) for q, a in row["turns"]]
    else:
        context = _window(row["text"], tokens, rng, tokenizer)
        turns = draw_quotes(context, QUOTES, rng)
    ids = context_ids(tokenizer, context)
    if len(ids) > tokens + 16:  # a cut text may have a few more tokens than it was cut from
        raise ValueError(f"its context has {len(ids):,} tokens; give --tokens {len(ids)}")
    return [(ids, _ids(tokenizer, question), _ids(tokenizer, answer)) for question, answer in turns]


def _pieces(rows: Sequence[Mapping[str, Any]], tokens: int, samples: int, tokenizer: Any) -> list[Passage]:
    """Pieces of `tokens` tokens that follow each other in the texts, at most `samples`: the first half of each is the
    context. What is left of a text is a piece if it is half as long, or the text's only one."""
    found: list[Passage] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise OptionError(f'--text, row {number}: expected "text", and got {", ".join(row)}')
        ids = context_ids(tokenizer, row["text"])
        for at in range(0, len(ids), tokens):
            piece = ids[at : at + tokens]
            half = len(piece) // 2
            if half >= 2 and (at == 0 or 2 * len(piece) >= tokens) and len(found) < samples:
                found.append(Passage(len(found), piece[:half], piece[half : half + 1], piece[half + 1 :]))
    if not found:
        raise OptionError("--text: too short, expected at least four tokens")
    return found


def _window(text: str, tokens: int, rng: random.Random, tokenizer: Any) -> str:
    """`tokens` tokens of a text from a random place, the whole text if it is shorter."""
    ids = _ids(tokenizer, text)
    room = tokens - len(context_ids(tokenizer, ""))
    if len(ids) <= room:
        return text
    at = rng.randrange(len(ids) - room + 1)
    window: str = tokenizer.decode(ids[at : at + room])
    return window


def _continuation(row: Mapping[str, Any], tokens: int, rng: random.Random, tokenizer: Any) -> list[Parts]:
    if "context" in row:
        if not isinstance(row.get("continuation"), str):
            raise ValueError('expected "continuation", a text')
        context, rest = context_ids(tokenizer, row["context"]), _ids(tokenizer, row["continuation"])
        if len(context) > tokens + 16:
            raise ValueError(f"its context has {len(context):,} tokens; give --tokens {len(context)}")
    else:
        ids = context_ids(tokenizer, row["text"])
        scored = min(CONTINUATION, len(ids) // 4)
        end = min(len(ids) - scored, tokens)
        context, rest = ids[:end], ids[end : end + scored]
    if not context or len(rest) < 2:
        raise ValueError("too short: expected a context and at least two tokens after it")
    return [(context, rest[:1], rest[1:])]
