"""Makes rows for `kvrewrite eval -t quote -t lm` of two Debian packages, and texts to train on.

    apt-get download linux-doc-6.1 debian-handbook
    for d in *.deb; do dpkg -x "$d" packages; done
    python examples/real_models/documents.py packages TOKENIZER OUT

TOKENIZER: a model's directory, which says what a token is. OUT/quote.jsonl: windows of 3,800 tokens with four quotes each.
OUT/lm.jsonl: windows of 3,840 tokens and the 256 that follow. Both are of the last 15% of the kernel's documents (in a fixed
shuffle) and of the handbook, in turn. OUT/train.jsonl: the other kernel documents, as {"text": ...}.
"""

from __future__ import annotations

import gzip
import html
import json
import random
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from kvrewrite.tools.evaluation.documents import QUOTES, draw_quotes

LEAST = 6000  # characters
HELD_OUT = 0.15
WINDOWS = 60  # of each kind of document
QUOTED, READ, FOLLOWS = 3800, 3840, 256  # tokens


def kernel(root: Path) -> Iterator[str]:
    """The kernel's documentation, without translations."""
    for path in sorted(root.glob("usr/share/doc/linux-doc-*/Documentation/**/*.rst.gz")):
        if "translations" not in path.parts:
            with gzip.open(path, "rt", encoding="utf-8", errors="ignore") as file:
                yield file.read()


def handbook(root: Path) -> Iterator[str]:
    """The chapters of the Debian handbook, without their markup."""
    for path in sorted(root.glob("usr/share/doc/debian-handbook/html/en-US/*.html")):
        text = re.sub(r"(?s)<(script|style).*?</\1>", " ", path.read_text(encoding="utf-8", errors="ignore"))
        text = re.sub(r"<p[^>]*>|<br */?>|</div>|</h\d>", "\n", text)
        text = re.sub(r"[ \t]+", " ", html.unescape(re.sub(r"<[^>]+>", "", text)))
        yield re.sub(r"\n\s*\n+", "\n", text)


def windows(texts: list[str], tokens: int, tokenizer: Any, rng: random.Random) -> Iterator[list[int]]:
    """Endless windows at random places of random texts, as ids."""
    known: dict[str, list[int]] = {}
    while True:
        text = rng.choice(texts)
        if text not in known:
            known[text] = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = known[text]
        if len(ids) >= tokens:
            start = rng.randrange(len(ids) - tokens + 1)
            yield ids[start : start + tokens]


def quotes(texts: list[str], tokenizer: Any, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows for `quote`."""
    for ids in windows(texts, QUOTED, tokenizer, rng):
        context = tokenizer.decode(ids)
        turns = draw_quotes(context, QUOTES, rng)
        if len(turns) == QUOTES:
            yield {"context": context, "turns": turns}


def continuations(texts: list[str], tokenizer: Any, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows for `lm`."""
    for ids in windows(texts, READ + FOLLOWS, tokenizer, rng):
        yield {"context": tokenizer.decode(ids[:READ]), "continuation": tokenizer.decode(ids[READ:])}


def main(root: Path, tokenizer_directory: Path, out: Path) -> None:
    """Writes the three files."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory, local_files_only=True)
    documents = [text for text in kernel(root) if len(text) > LEAST]
    random.Random(0).shuffle(documents)
    cut = int(len(documents) * (1 - HELD_OUT))
    kinds = documents[cut:], [text for text in handbook(root) if len(text) > LEAST]
    files: dict[str, list[Any]] = {"train": [{"text": text} for text in documents[:cut]]}
    for name, make in (("quote", quotes), ("lm", continuations)):
        rows = [islice(make(texts, tokenizer, random.Random(f"{name} {i}")), WINDOWS) for i, texts in enumerate(kinds)]
        files[name] = [row for pair in zip(*rows, strict=True) for row in pair]
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
