"""Trains Locret's retaining heads for a model, and uses them: a few steps, to see how it goes.

Runs offline on a CPU with the small model: python examples/train_heads.py (needs pip install 'kvrewrite[train]').
What a real training takes and buys: docs/training.md.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

import kvrewrite
from kvrewrite.assets import small_model
from kvrewrite.tools.evaluation import tasks
from kvrewrite.tools.training import FitOptions, train


def write_texts(path: Path, count: int) -> None:
    """Rows of a context, a question and its answer, which are what heads learn from."""
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    with path.open("w") as file:
        for seed in range(count):
            sample = tasks.make("needle_single", tokens=200, seed=seed, tokenizer=tokenizer)
            row = {"context": sample.context, "question": sample.question, "answer": " " + sample.answers[0]}
            file.write(json.dumps(row) + "\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "texts.jsonl", count=8)
        fitting = FitOptions(steps=4, warmup=1, batch_size=2, log_every=1, quiet=True)
        trained = train(
            small_model(),
            "locret",
            [folder / "texts.jsonl"],
            folder / "heads.safetensors",
            options={"hidden_size": 16, "label": "log_probability"},
            fitting=fitting,
        )
        print(f"{trained.trained_parameters:,} parameters trained in {trained.fitted.seconds:.0f} s")
        out = folder / "small"
        weights = folder / "heads.safetensors"
        done = kvrewrite.convert(small_model(), out, "locret", policy_weights=weights, budget=0.25, chunk=64)
        print(f"converted with them: {done.program.policy['name']}, {len(done.program.sites)} layers")


if __name__ == "__main__":
    main()
