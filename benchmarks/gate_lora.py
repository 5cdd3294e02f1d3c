"""Fine-tunes a model by LoRA, and by LoRA together with Attention-Gates, and compares what they keep.

    python -m benchmarks.gate_lora MODEL train.jsonl quote.jsonl OUT --seconds 65
    python -m benchmarks.gate_lora MODEL train.jsonl quote.jsonl OUT --device cpu --jobs 1 --steps 2 \\
        --batch 1 --tokens 256 --samples 4

Task: after a document, "Continue the quote from the text:" and ten of its words; the answer is the
eight that follow. Rows of both files have a `context` or a `text`; windows of --tokens tokens and
quotes are drawn from them, in training anew each time. The files must have no document in common
(examples/real_models/documents.py).

Trained are `lora` (adapters alone) and `gates` (the same adapters, and gates; loss: cross-entropy of
the answers, and the distance of the kept share from --keep-target; straight-through), side by side,
each for as long. Judged, on held-out documents and blind: the model as it is, `lora` with its full
cache, `gates` with what its gates let pass and with its gates open, and `lora` with policies that
need no training, at the share of a context that the gates were found to keep. The question goes
through in one pass, then the answer's tokens one by one, as if they were generated.

OUT gets a folder for each training and a JSON file for each cell; what is there is not made again.
Needs peft.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvrewrite.api import Rewriter
from kvrewrite.errors import OptionError
from kvrewrite.policies import make
from kvrewrite.tools.evaluation import documents, intervals
from kvrewrite.tools.evaluation.ask import Held, pad_left, prefill
from kvrewrite.tools.evaluation.scored import summary
from kvrewrite.tools.subjects import write_json
from kvrewrite.tools.training.gate import GateOptions, GateTraining
from kvrewrite.tools.training.trainer import IGNORED, collate

TRAINED = ("lora", "gates")
POLICIES = ("h2o", "snapkv", "keydiff", "sirllm", "streaming_llm", "random")
LORA = {"mode": "finetune", "lora_rank": 16, "lora_lr": 5e-4, "merge": True, "plot": False}
GATES = {"level": "model", "eviction": 5.0, "ramp": 0.7, "initial_bias": 3.0, "lr": 2e-3, "bias_lr": 0.05}
WARMUP = 10  # steps
GATED, OPEN, ALONE, BEFORE = "gates:attention_gate", "gates:full", "lora:full", "base:full"


# -- training ----------------------------------------------------------------------------------------------------------
class Quotes(IterableDataset):
    """Endless rows {"input_ids", "labels"}: a window of a random document, and its quotes one after the other."""

    def __init__(self, path: Path, tokenizer: Any, tokens: int):
        self.texts = [{"text": row.get("context") or row["text"]} for row in documents.read_rows(path)]
        self.tokenizer, self.tokens = tokenizer, tokens

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        worker = get_worker_info()
        rng = random.Random(f"quotes {worker.id if worker else 0}")
        while True:
            seed, picked = rng.randrange(1 << 30), rng.choice(self.texts)
            yield from encoded([picked], self.tokens, seed, self.tokenizer)


def encoded(rows: list[dict[str, str]], tokens: int, seed: int, tokenizer: Any) -> list[dict[str, list[int]]]:
    """One training row for each document from which quotes can be drawn."""
    try:
        found = documents.make_passages("quote", rows, tokens=tokens, samples=len(rows), seed=seed, tokenizer=tokenizer)
    except OptionError:  # a window of tables or code, without a quote
        return []
    ids, labels = list(found[0].context), [IGNORED] * len(found[0].context)
    for passage in found:
        ids += passage.question + passage.answer
        labels += [IGNORED] * len(passage.question) + list(passage.answer)
    return [{"input_ids": ids, "labels": labels}]


def options(name: str, given: argparse.Namespace) -> GateOptions:
    """What is trained: `lora` or `gates`."""
    more: dict[str, Any] = {**GATES, "keep_target": given.keep_target} if name == "gates" else {"gates": False}
    return GateOptions(**LORA, **more)


def train(name: str, given: argparse.Namespace) -> None:
    """AdamW with a cosine schedule over --steps or --seconds; the merged model goes to OUT/NAME-model."""
    torch.manual_seed(0)
    tokenizer, begun = AutoTokenizer.from_pretrained(given.model), time.perf_counter()
    training = GateTraining(load(given.model, given), options(name, given))
    groups = training.parameter_groups()
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    rows = Quotes(given.data, tokenizer, given.tokens)
    batches = iter(DataLoader(rows, given.batch, collate_fn=collate, num_workers=given.workers))
    told: dict[str, Any] = {"capture": time.perf_counter() - begun, "log": []}
    if given.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    done, begun = 0, time.perf_counter()
    while True:
        passed = done / given.steps if given.steps else (time.perf_counter() - begun) / given.seconds
        if passed >= 1:
            break
        batch = {name: value.to(given.device) for name, value in next(batches).items()}
        if not done and training.options.gates:
            training.calibrate(batch["input_ids"], batch["real"])
        for group, rate in zip(groups, rates):
            group["lr"] = rate * min(1.0, (done + 1) / WARMUP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * passed)))
        optimizer.zero_grad(set_to_none=True)
        loss = training.loss(**batch, progress=passed)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        done += 1
        if done % 10 == 1:
            entry = {"step": done, "task": float(loss.task.detach()), "kept": float(loss.kept.detach().mean())}
            if not math.isfinite(entry["task"]):
                raise SystemExit(f"{name}: the loss is {entry['task']} at step {done}; a lower rate may help")
            told["log"].append(entry)
            print(name, json.dumps(entry), flush=True)
    told |= {"steps": done, "seconds": time.perf_counter() - begun, "batch": given.batch}
    told["parameters"] = sum(p.numel() for group in groups for p in group["params"])
    if given.device != "cpu":
        told["peak_bytes"] = torch.cuda.max_memory_allocated()
    training.save(given.out / f"{name}.safetensors", {"data": given.data.name, "steps": str(done)}, tokenizer)
    write_json(given.out / f"{name}.json", told)


def load(directory: Path, given: argparse.Namespace) -> Any:
    """A model directory on the device, in bf16 on a GPU."""
    dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(given.device).eval()


# -- judging -----------------------------------------------------------------------------------------------------------
def cell_file(cell: str, given: argparse.Namespace) -> Path:
    """Where a cell's results are."""
    return given.out / f"cell-{cell.replace(':', '-')}.json"


def kept_by_gates(given: argparse.Namespace) -> float:
    """The share of a held-out context that the gates kept."""
    return float(json.loads(cell_file(GATED, given).read_text())["kept"])


def judge(cell: str, given: argparse.Namespace) -> None:
    """Scores the answers of one cell, MODEL:POLICY."""
    trained, name = cell.split(":")
    directory = given.model if trained == "base" else given.out / f"{trained}-model"
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rewriter = Rewriter(load(directory, given), check="off")
    weights = given.out / "gates.safetensors" if cell == GATED else None
    share = {} if name in ("full", "attention_gate") else {"budget": kept_by_gates(given)}
    model = rewriter.rewrite(make(name, **share), policy_weights=weights)
    rows = [{"text": row.get("context") or row["text"]} for row in documents.read_rows(given.held)]
    passages = documents.make_passages(
        "quote", rows, tokens=given.tokens, samples=given.samples, seed=given.seed, tokenizer=tokenizer
    )
    begun, held = time.perf_counter(), Held()
    scores = []
    numbers = sorted({p.document for p in passages})
    for at in range(0, len(numbers), given.rows):
        part = set(numbers[at : at + given.rows])
        scores += answers(model, [p for p in passages if p.document in part], held)
    means = held.means()
    heads = sum(map(len, means["heads"].values()))
    write_json(
        cell_file(cell, given),
        {
            "cell": cell,
            "options": share,
            "kept": means["slots"] / (means["tokens"] * heads),
            "memory": means,
            "seconds": time.perf_counter() - begun,
            **summary(scores, [p.document for p in passages]),
        },
    )
    print(cell, f"{time.perf_counter() - begun:.0f} s", flush=True)


@torch.no_grad()
def answers(model: Any, passages: Sequence[documents.Passage], held: Held) -> list[tuple[float, int, int]]:
    """Returns (nats, tokens that are the first choice, tokens) of each answer: contexts are compressed, the questions follow
    in one pass, and the answers token by token."""
    contexts = list(dict.fromkeys(p.context for p in passages))
    longest = max(len(p.question) + len(p.answer) for p in passages)
    ids, mask = pad_left(contexts, 0)
    cache = prefill(model, ids, mask, ids.shape[1] + longest + 1)
    held.add(cache)
    cache.select([contexts.index(p.context) for p in passages])
    ids, mask = (x.to(model.device) for x in pad_left([p.question for p in passages], 0))
    logits = model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    nats: list[Tensor] = []
    hits: list[Tensor] = []
    most = max(len(p.answer) for p in passages)
    for n in range(most):  # a row whose answer is over repeats its last token; that is not counted
        wanted = torch.tensor([p.answer[min(n, len(p.answer) - 1)] for p in passages], device=model.device)
        logp = logits.float().log_softmax(-1)
        nats.append(-logp.gather(-1, wanted[:, None])[:, 0])
        hits.append(logp.argmax(-1) == wanted)
        if n + 1 < most:
            logits = model(wanted[:, None], past_key_values=cache).logits[:, -1]
    sums = torch.stack(nats, 1).tolist(), torch.stack(hits, 1).tolist()
    counts = [len(p.answer) for p in passages]
    return [(math.fsum(n[:count]), sum(h[:count]), count) for n, h, count in zip(*sums, counts)]


# -- the table ---------------------------------------------------------------------------------------------------------
def table(cells: Sequence[str], given: argparse.Namespace) -> str:
    """All cells, with their paired differences to `lora` with its full cache and to the gates. Intervals: 95%, over documents."""
    found = {cell: json.loads(cell_file(cell, given).read_text()) for cell in cells}
    head = ["model, policy", "kept, %", "nats per token", "tokens right, %", "quotes whole, %"]
    head += ["nats, less LoRA alone with its full cache", "nats, less gates"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for cell, result in found.items():
        against = [between(result, found[base]) if cell != base else "" for base in (ALONE, GATED)]
        figures = [
            shown(result["nll"], 3),
            shown(result["accuracy"], 1, 100),
            shown(result["exact"], 1, 100),
            *against,
        ]
        lines.append(f"| {cell.replace(':', ', ')} | {100 * result['kept']:.1f} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def between(result: dict[str, Any], base: dict[str, Any]) -> str:
    """The paired difference of two cells in nats per token."""
    nats = [a - b for a, b in zip(result["nats"], base["nats"], strict=True)]
    return shown(vars(intervals.ratio(nats, result["counts"], result["documents"])), 3)


def shown(interval: dict[str, Any], digits: int, times: float = 1) -> str:
    """A mean and its interval."""
    mean, low, high = (f"{times * interval[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


# -- all of it ---------------------------------------------------------------------------------------------------------
def together(parts: Sequence[str], given: argparse.Namespace) -> None:
    """Runs parts that are not done yet, --jobs at a time, each in a process of its own."""
    waiting, running = list(parts), []
    while waiting or running:
        while waiting and len(running) < given.jobs:
            command = [sys.executable, "-m", "benchmarks.gate_lora", *sys.argv[1:], "--part", waiting[0]]
            running.append((waiting.pop(0), subprocess.Popen(command)))
        part, process = next((x for x in running if x[1].poll() is not None), running[0])
        try:
            code = process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        running.remove((part, process))
        if code:
            for _, other in running:
                other.terminate()
            raise SystemExit(f"{part} ended with {code}")


def main() -> None:
    """Trains and judges what has no results yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="documents to train on")
    parser.add_argument("held", type=Path, help="documents to judge on")
    parser.add_argument("out", type=Path)
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=1024, help="of a context")
    parser.add_argument("--samples", type=int, default=120, help="held-out documents, with up to four quotes each")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out windows and quotes")
    parser.add_argument("--keep-target", type=float, default=0.4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=60, help="documents that are judged side by side")
    parser.add_argument("--steps", type=int, default=0, help="0: as many as there is time for")
    parser.add_argument("--seconds", type=float, default=65.0, help="for each training")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw quotes, of each training; 0: none")
    parser.add_argument("--jobs", type=int, default=6, help="parts that run side by side")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if given.part:
        return train(given.part, given) if given.part in TRAINED else judge(given.part, given)
    given.out.mkdir(parents=True, exist_ok=True)
    cells = [BEFORE, ALONE, OPEN, GATED, *(f"lora:{name}" for name in given.policies)]
    together([name for name in TRAINED if not (given.out / f"{name}.json").exists()], given)
    without_share = [cell for cell in (GATED, ALONE, OPEN, BEFORE) if not cell_file(cell, given).exists()]
    together(without_share, given)
    together([cell for cell in cells if not cell_file(cell, given).exists()], given)
    for name in TRAINED:
        told = json.loads((given.out / f"{name}.json").read_text())
        print(
            f"{name}: {told['steps']} steps of {told['batch']} in {told['seconds']:.0f} s, {told['parameters']:,} parameters"
        )
    print(table(cells, given))


if __name__ == "__main__":
    main()
