"""Trains heads for a real model on KVzip's scores, several kinds one after the other, and says how well each ranks unseen text.

    python -m benchmarks.train_heads MODEL train.jsonl OUT --device cuda
    python -m benchmarks.train_heads MODEL train.jsonl OUT --device cpu --tokens 150 --rows 8 --held 2 --batch 2 --steps 2

Rows of train.jsonl have a `context` or a `text`. The teacher is a second reading of each text (docs/training.md); students are
KVzap's models of a layer's input (`linear`, `mlp`) and Locret's heads of queries, keys and values (`locret`). `answers` are
Locret's heads on the label that they had before, the answers' attention. OUT gets a file of weights and one of figures for each;
what is there is not made again. The weights run with

    kvrewrite eval MODEL -p kvzap:threshold=none,scope=model,window=32 --policy-weights kvzap=OUT/mlp.safetensors --mode blind ...

Figures, on texts that were not trained on, beside what H2O's sums would have: `rank`: Spearman's correlation with the teacher,
mean over layers, heads and texts; `head`, `model`: the share of the teacher's best quarter that the student's best quarter has,
of each head, and of all heads of all layers together.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvrewrite.kernels.attention.reference import attend, column_mass
from kvrewrite.kernels.groups import Logits, Placed, Tokens, Watch
from kvrewrite.tools.training.heads_graph import arguments
from kvrewrite.tools.training.kvzap import KVzapOptions, KVzapTask
from kvrewrite.tools.training.locret import LocretOptions, LocretTask
from kvrewrite.tools.training.reconstruction import reconstruction_label, repeat
from kvrewrite.tools.training.trainer import IGNORED, collate

VARIANTS: dict[str, Callable[[Any], LocretTask]] = {
    "mlp": lambda model: KVzapTask(model, KVzapOptions(hidden_size=512, lr=2e-3)),
    "linear": lambda model: KVzapTask(model, KVzapOptions(hidden_size=0, lr=5e-3)),
    "locret": lambda model: LocretTask(
        model, LocretOptions(hidden_size=512, lr=2e-3, label="reconstruction", smoothing=0.0)
    ),
    "answers": lambda model: LocretTask(model, LocretOptions(hidden_size=512, lr=2e-3, label="log_probability")),
}

COLLECTED: dict[str, Callable[[Any], LocretTask]] = {  # of benchmarks/collected_heads.py
    "mlp": lambda model: KVzapTask(model, KVzapOptions(hidden_size=512, lr=2e-3)),
    "wide": lambda model: KVzapTask(model, KVzapOptions(hidden_size=1024, lr=1e-3)),
    "locret": VARIANTS["locret"],
}


def read(path: Path, tokenizer: Any, count: int, most: int) -> list[dict[str, list[int]]]:
    """Rows as token ids and labels (`collate`): the first `most` tokens of a context, and its answers after it."""
    found = []
    with path.open() as file:
        for line in file:
            row = json.loads(line)
            ids = tokenizer(row.get("context") or row["text"])["input_ids"][:most]
            ids, labels = list(ids), [IGNORED] * len(ids)
            for question, answer in row.get("turns", []):
                asked, reply = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (question, answer))
                labels += [IGNORED] * len(asked) + reply
                ids += asked + reply
            found.append({"input_ids": ids, "labels": labels})
            if len(found) == count:
                break
    return found


def contexts(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """A row without its answers and what is between them."""
    end = next((n for n, x in enumerate(row["labels"]) if x != IGNORED), None)
    return {name: ids[:end] for name, ids in row.items()}


def batch(rows: list[dict[str, list[int]]], task: LocretTask) -> dict[str, Tensor]:
    """What a task takes; without the answers where it repeats texts."""
    if task.repeats:
        rows = [contexts(row) for row in rows]
    return {name: value.to(task.heads[0].device) for name, value in collate(rows).items()}


def fit(task: LocretTask, rows: list[dict[str, list[int]]], size: int, steps: int, seconds: float) -> dict[str, Any]:
    """AdamW with a cosine schedule over `steps`, or over `seconds` where steps is 0."""
    (group,) = task.parameter_groups()
    optimizer = torch.optim.AdamW(group["params"], lr=group["lr"], betas=(0.9, 0.95), weight_decay=0.01)
    order, done, begun = torch.Generator().manual_seed(0), 0, time.perf_counter()
    losses: list[float] = []
    while True:
        passed = done / steps if steps else (time.perf_counter() - begun) / seconds
        if passed >= 1:
            return {"steps": done, "seconds": time.perf_counter() - begun, "losses": losses}
        picked = torch.randint(len(rows), (size,), generator=order).tolist()
        given = batch([rows[n] for n in picked], task)
        if not done:
            task.prepare(**given)
        for each in optimizer.param_groups:
            each["lr"] = group["lr"] * min(1.0, (done + 1) / 20) * 0.5 * (1 + math.cos(math.pi * passed))
        optimizer.zero_grad(set_to_none=True)
        loss = task(**given)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        done += 1
        if done % 20 == 1:
            losses.append(round(float(loss.detach()), 4))  # waits for the device


@torch.no_grad()
def judge(task: LocretTask, rows: list[dict[str, list[int]]]) -> dict[str, dict[str, float]]:
    """The figures of the student, and of the sums of attention that a text gives itself (H2O)."""
    graph, first = task.__dict__["graph"], task.options.n_sink
    figures: dict[str, list[dict[str, float]]] = {"student": [], "h2o": []}
    for row in rows:
        end = next((n for n, x in enumerate(row["labels"]) if x != IGNORED), len(row["labels"]))
        ids = torch.tensor([row["input_ids"][:end]], device=task.heads[0].device)
        texts = repeat(ids, torch.ones_like(ids, dtype=torch.bool), first)
        scores, queries, keys, sinks, slopes, _ = graph(*arguments(graph, texts.ids))
        found: dict[str, list[Tensor]] = {"student": [], "h2o": [], "teacher": []}
        for site, score, q, k, *own in zip(task.owners, scores, queries, keys, sinks, slopes):
            if site.window or site.chunk:
                continue
            found["teacher"].append(reconstruction_label(site, q, k, texts, *own)[0, :, first:end])
            found["student"].append(score[0, :, first:end].float())
            q, k = q[:, :, :end], k[:, :, :end]
            at = torch.arange(end, device=q.device)[None]
            placed = Placed(at, at.expand(1, k.shape[1], -1), torch.ones_like(k[..., 0], dtype=torch.bool))
            how = Logits(own[0], own[1], None, site.scale, site.softcap)
            lse = attend(Tokens(q, k, k), placed, how, own=True)[1]
            watch = Watch(q, k, lse, torch.ones_like(at, dtype=torch.float32))
            found["h2o"].append(column_mass(watch, placed, how)[0, :, first:])
        teacher = torch.cat(found["teacher"])
        for name, each in figures.items():
            each.append(agreement(torch.cat(found[name]), teacher))
    return {name: {n: sum(f[n] for f in each) / len(each) for n in each[0]} for name, each in figures.items()}


def agreement(scores: Tensor, teacher: Tensor) -> dict[str, float]:
    """Of one text: scores, teacher (heads of all layers, tokens)."""

    def ranks(x: Tensor) -> Tensor:
        return x.argsort(-1).argsort(-1).double()

    def recall(x: Tensor, y: Tensor) -> float:
        """Of rows of x and y."""
        quarter = max(1, x.shape[-1] // 4)
        best = [torch.zeros_like(z, dtype=torch.bool).scatter(-1, z.topk(quarter).indices, True) for z in (x, y)]
        return float((best[0] & best[1]).sum() / best[1].sum())

    a, b = (r - r.mean(-1, keepdim=True) for r in (ranks(scores), ranks(teacher)))
    rank = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-9)).mean()
    whole = recall(scores.reshape(1, -1), teacher.reshape(1, -1))
    return {"rank": float(rank), "head": recall(scores, teacher), "model": whole}


def main() -> None:
    """Trains and judges each kind that has no figures yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["mlp", "linear", "locret"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--held", type=int, default=24, help="the last rows, which are not trained on")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=0, help="0: as many as there is time for")
    parser.add_argument("--seconds", type=float, default=70.0, help="for each kind")
    given = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    given.out.mkdir(parents=True, exist_ok=True)
    rows = read(given.data, AutoTokenizer.from_pretrained(given.model), given.rows, given.tokens)
    train, held = rows[: -given.held], rows[-given.held :]
    dtype = torch.bfloat16 if given.device != "cpu" else torch.float32
    for name in given.variants:
        figures, weights = given.out / f"{name}.json", given.out / f"{name}.safetensors"
        if figures.exists():
            print(name, figures.read_text(), flush=True)
            continue
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).to(given.device).eval()
        begun = time.perf_counter()
        task = VARIANTS[name](model)
        told: dict[str, Any] = {"capture": time.perf_counter() - begun}
        told |= fit(task, train, given.batch, given.steps, given.seconds)
        task.save(weights, {"data": given.data.name, "steps": str(told["steps"])})
        told |= judge(task, held)
        figures.write_text(json.dumps(told))
        print(name, json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
