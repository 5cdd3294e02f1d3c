"""Asks kvrewrite's policies and kvpress's presses the same quotes, each in its own environment, and compares them.

    python -m benchmarks.beside_kvpress ours MODEL quote.jsonl OUT        # kvrewrite: writes the quotes as tokens, and its nats
    KVPRESS/bin/python benchmarks/beside_kvpress.py theirs MODEL OUT      # an environment with kvpress 0.5.5
    python -m benchmarks.beside_kvpress table OUT

Blind: a document is compressed alone, to a quarter, in fp32; then each quote about it runs on that cache.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch

KEPT, DOCUMENTS, TOKENS = 0.25, 8, 400
PRESSES = {
    "full": None,
    "snapkv": "SnapKVPress",
    "tova": "TOVAPress",
    "knorm": "KnormPress",
    "keydiff": "KeyDiffPress",
    "expected_attention": "ExpectedAttentionPress",
    "lagkv": "LagKVPress",
    "streaming_llm": "StreamingLLMPress",
}
OPTIONS = {"snapkv": {"window": 64}}  # kvpress's default, where ours is the authors' other one


def ours(model: Path, data: Path, out: Path) -> None:
    """kvrewrite's nats of each answer, by policy."""
    from kvrewrite.tools.evaluation.documents import make_passages, read_rows
    from kvrewrite.tools.evaluation.scored import run_scored
    from kvrewrite.tools.subjects import FULL_CACHE, Arm, PolicySpec, Source

    out.mkdir(parents=True, exist_ok=True)
    source = Source(model, check="off")
    rows = [{"text": row["context"]} for row in read_rows(data)]
    chosen = {"tokens": TOKENS, "samples": DOCUMENTS, "seed": 0}
    passages = make_passages("quote", rows, **chosen, tokenizer=source.tokenizer)
    (out / "passages.json").write_text(json.dumps([(p.context, p.question, p.answer, p.document) for p in passages]))
    found = {}
    for name in PRESSES:
        rewritten = source.rewritten(
            FULL_CACHE if name == "full" else Arm(PolicySpec(name, OPTIONS.get(name, {})), KEPT)
        )
        found[name] = run_scored(rewritten, source.tokenizer, passages, "blind", 1, lambda _: None)["nats"]
        (out / "ours.json").write_text(json.dumps(found))


@torch.no_grad()
def theirs(model: Path, out: Path) -> None:
    """The same of kvpress."""
    import kvpress
    from transformers import AutoModelForCausalLM, DynamicCache

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    passages = json.loads((out / "passages.json").read_text())
    found: dict[str, list[float]] = {}
    for name, press in PRESSES.items():
        context: list[int] | None = None
        cache, nats = DynamicCache(), []
        for before, question, answer, _ in passages:
            if before != context:
                context, cache = before, DynamicCache()
                made: Any = contextlib.nullcontext() if press is None else getattr(kvpress, press)(1 - KEPT)(base)
                with made:
                    base.model(torch.tensor([before]), past_key_values=cache)
            rest = torch.tensor([(question + answer)[:-1]])
            places = torch.arange(len(before), len(before) + rest.shape[1])[None]
            logits = base(rest, past_key_values=copy.deepcopy(cache), position_ids=places).logits[0, -len(answer) :]
            nats.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")))
        found[name] = nats
        (out / "theirs.json").write_text(json.dumps(found))


def table(out: Path) -> None:
    """Nats per token of both, the largest difference of an answer, and how many answers agree within 0.01 nats."""
    mine, other = (json.loads((out / f"{who}.json").read_text()) for who in ("ours", "theirs"))
    counts = [len(answer) for _, _, answer, _ in json.loads((out / "passages.json").read_text())]
    print("| policy | kvrewrite | kvpress | answers within 0.01 nats | largest difference |")
    print("|---|---|---|---|---|")
    for name in (n for n in PRESSES if n in mine and n in other):
        apart = [abs(a - b) for a, b in zip(mine[name], other[name], strict=True)]
        means = [sum(x[name]) / sum(counts) for x in (mine, other)]
        near = sum(x < 0.01 for x in apart)
        print(f"| `{name}` | {means[0]:.3f} | {means[1]:.3f} | {near} of {len(apart)} | {max(apart):.3f} |")


if __name__ == "__main__":
    what, *places = sys.argv[1:]
    {"ours": ours, "theirs": theirs, "table": table}[what](*map(Path, places))
