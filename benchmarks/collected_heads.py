"""Trains heads of a real model on texts that are read once (`kvrewrite train --collect`), for benchmarks/real_models.py.

What is kept of the texts takes, on the GPU, texts x kept tokens x layers x (width x 2 + kv heads x 4) bytes: 14.7 GB for
SmolLM2, 1,400 texts and 300 tokens of each. Reading 8 texts of 1,900 tokens takes 2.7 GiB more (by what a CPU took for one
text and for two), a step of 8,192 tokens and 1,024 hidden units about as much. Files of weights say what is done: what is
there is not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.train_heads import COLLECTED, contexts, judge, read
from kvrewrite.tools.training.collected import Examples, collect, learn
from kvrewrite.tools.training.trainer import FitOptions

GIB = 1 << 30


def weights_of(out: Path, model: str, kind: str) -> Path:
    """Where heads are, once they are trained."""
    return out / f"{model}_{kind}.safetensors"


def train(given: argparse.Namespace, name: str) -> None:
    """Trains the heads of one model, those that read the same on the same texts; figures in MODEL_KIND.heads."""
    torch.set_float32_matmul_precision("high")
    kinds = [kind for kind in given.kinds if not weights_of(given.out, name, kind).exists()]
    if not kinds:
        return
    torch.manual_seed(0)
    dtype = torch.bfloat16 if given.device != "cpu" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(given.real / name, dtype=dtype).to(given.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.real / name)
    rows = read(given.real / "train.jsonl", tokenizer, given.texts + given.judged, given.text_tokens)
    judged, texts = ([contexts(row) for row in part] for part in (rows[: given.judged], rows[given.judged :]))
    options = options_of(given)
    examples: dict[
        bool, tuple[Examples, Examples]
    ] = {}  # by what is read: Locret's heads read queries, keys and values
    for kind in kinds:
        begun = time.perf_counter()
        task = COLLECTED[kind](base)
        told: dict[str, Any] = {"captured": time.perf_counter() - begun}
        own = kind == "locret"
        if own not in examples:
            examples.clear()  # what others read is not kept beside it
            examples[own] = collect(task, until(texts, time.perf_counter() + given.read_seconds), options)
        told |= {"collected": time.perf_counter() - begun, "tokens": len(examples[own][0].labels[-1])}
        told["kept_gib"] = sum(map(gib, examples[own]))
        print(name, kind, "texts are read", json.dumps(told), flush=True)
        told["log"] = learn(task, *examples[own], options)
        told["seconds"] = time.perf_counter() - begun
        part = given.out / f"{name}_{kind}.part.safetensors"
        task.save(part, {"data": "train.jsonl", "steps": str(given.steps)})
        part.replace(weights_of(given.out, name, kind))
        if given.device != "cpu":
            told["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        told |= judge(task, judged)
        (given.out / f"{name}_{kind}.heads").write_text(json.dumps(told))
        print(name, kind, json.dumps(told), flush=True)


def options_of(given: argparse.Namespace) -> FitOptions:
    """How heads are trained."""
    return FitOptions(
        steps=given.steps,
        warmup=min(50, given.steps // 4),
        batch_size=given.batch,
        collect=given.texts,
        collect_tokens=given.kept_tokens,
        rows=given.rows,
        schedule="cosine",
        clip_value=0.0,
        clip_norm=1.0,
        log_every=max(1, given.steps // 8),
        quiet=True,
    )


def until(texts: Iterable[dict[str, list[int]]], end: float) -> Iterator[dict[str, list[int]]]:
    """Texts as long as there is time (of `time.perf_counter`)."""
    for text in texts:
        if time.perf_counter() > end:
            return
        yield text


def gib(examples: Examples) -> float:
    """What examples take."""
    return sum(x.numel() * x.element_size() for x in (*examples.reads, *examples.labels)) / GIB
