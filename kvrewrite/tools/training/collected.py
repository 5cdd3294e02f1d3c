"""Trains heads on what they read, kept from one pass over the texts: the model runs once, then only the heads do.

The model is frozen, so what a head reads of a text, and what a teacher says of it, never change. Both are kept of some tokens
of each text; thousands of steps on them take as long as a few dozen passes through the model.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from kvrewrite.errors import OptionError, TrainingError
from kvrewrite.tools.training.head_stack import stacked
from kvrewrite.tools.training.heads_graph import head_graphs
from kvrewrite.tools.training.locret import LocretTask
from kvrewrite.tools.training.trainer import FitOptions, Fitted, collate

HELD = 20  # one text of so many is not learned from


@dataclass
class Examples:
    """Of each head: what it reads, (N, C) in the model's dtype, and the labels of that, (N, Hkv) fp32."""

    reads: list[Tensor]
    labels: list[Tensor]


class Collector:
    """Keeps up to `tokens` tokens, drawn at random, of each text that it is shown."""

    def __init__(self, task: LocretTask, tokens: int, seed: int):
        self.task, self.tokens = task, tokens
        self.order = torch.Generator().manual_seed(seed)
        self.found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in task.owners]

    @torch.no_grad()
    def add(self, rows: list[dict[str, list[int]]]) -> None:
        """Runs the model on some texts. Every head keeps tokens that all its kv heads have a label for."""
        device = self.task.heads[0].device
        _, labels, reads = self.task.look(**{name: x.to(device) for name, x in collate(rows).items()})
        ranks = torch.rand(len(rows), labels[0].shape[-1], generator=self.order).to(device)
        for label, read, kept in zip(labels, reads, self.found, strict=True):
            counted = (label > -torch.inf).all(1)
            order = ranks.masked_fill(~counted, 2.0)
            most = order.sort(1).values[:, : self.tokens][:, -1:]
            picked = counted & (order <= most)
            kept.append((read[picked], label.transpose(1, 2)[picked]))

    def examples(self) -> Examples:
        """What was kept of all texts, which is here no longer: head by head, so that only one head's is there twice."""
        joined = Examples([], [])
        for kept in self.found:
            joined.reads.append(torch.cat([reads for reads, _ in kept]))
            joined.labels.append(torch.cat([labels for _, labels in kept]))
            kept.clear()
        return joined


def collect(task: LocretTask, texts: Iterable[dict[str, list[int]]], options: FitOptions) -> tuple[Examples, Examples]:
    """Reads `options.collect` texts; returns what heads learn from, and what they are judged on (of one text of 20)."""
    learned, held = (Collector(task, options.collect_tokens, options.seed + n) for n in (0, 1))
    rows = itertools.islice(texts, options.collect)
    aside = max(1, options.collect // HELD)
    with tqdm(total=options.collect, desc="texts", disable=options.quiet) as bar:
        while part := list(itertools.islice(rows, options.batch_size)):
            bar.update(len(part))
            mine, part = part[:aside], part[aside:]
            aside -= len(mine)
            for collector, some in ((held, mine), (learned, part)):
                if some:
                    collector.add(some)
    examples = learned.examples()
    if not any(len(labels) for labels in examples.labels):
        raise TrainingError(
            f"of {options.collect} texts no token has a label: every layer has a window that hides the text; expected a model "
            "with a layer that sees all of it, or shorter texts"
        )
    return examples, held.examples()


def regress(task: LocretTask, texts: Iterable[dict[str, list[int]]], options: FitOptions) -> Fitted:
    """Trains a task's heads on what is kept of the texts, `options.rows` tokens for each head and step; heads whose layers
    hide the text have no labels and stay as they are.

    The log has the loss of the steps and `held`, that of texts which nothing was learned from. Raises OptionError for
    a loss of neighbours, and TrainingError if no token has a label, or if the loss is no longer a number.
    """
    if task.options.smoothing:
        raise OptionError(
            f"smoothing is {task.options.smoothing}, and tokens that are drawn at random have no neighbours; give -o smoothing=0"
        )
    begun = time.perf_counter()
    log = learn(task, *collect(task, texts, options), options)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return Fitted(log, time.perf_counter() - begun, peak)


def learn(task: LocretTask, learned: Examples, held: Examples, options: FitOptions) -> list[dict[str, float]]:
    """Makes `options.steps` steps on examples, which may be another task's on the same model; returns the log."""
    from transformers import get_scheduler

    used = [n for n, labels in enumerate(learned.labels) if len(labels)]
    task.begin([x.mean(0) if len(x) else x.new_zeros(x.shape[1]) for x in learned.labels])
    stacks = stacked(head_graphs(task.__dict__["graph"]), used)
    parameters = [p for stack in stacks for p in stack.weights.values()]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters, lr=task.options.lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    schedule = get_scheduler(options.schedule, optimizer, options.warmup, options.steps)
    order = torch.Generator(device).manual_seed(options.seed)

    def drawn(reads: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(labels), (options.rows,), generator=order, device=device)
        return reads[rows], labels[rows]

    def loss(examples: Examples, draw: bool) -> Tensor:
        losses = []
        for stack in stacks:
            parts = [(examples.reads[n], examples.labels[n]) for n in stack.heads]
            if draw:
                parts = [drawn(*part) if options.rows < len(part[1]) else part for part in parts]
            for some in _of_one_length(parts):  # of a judged text that is shorter than a window there are none
                reads, labels = (torch.stack([part[i] for part in some.values()]) for i in (0, 1))
                losses.append(task.error(stack.scores(list(some), reads), labels.transpose(1, 2)).mean((1, 2)))
        return torch.cat(losses).mean()

    log: list[dict[str, float]] = []
    for step in tqdm(range(1, options.steps + 1), desc="steps", disable=options.quiet):
        total = loss(learned, draw=True)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        if options.clip_value:
            nn.utils.clip_grad_value_(parameters, options.clip_value)
        if options.clip_norm:
            nn.utils.clip_grad_norm_(parameters, options.clip_norm)
        optimizer.step()
        schedule.step()
        if step % options.log_every == 0 or step == options.steps:
            with torch.no_grad():
                log.append({"step": step, "loss": float(total), "held": float(loss(held, draw=False))})
            if not math.isfinite(log[-1]["loss"]):
                raise TrainingError(
                    f"the loss is {log[-1]['loss']} at step {step}; a lower learning rate (-o lr=...) may help"
                )
    for stack in stacks:
        stack.write_back()
    return log


def _of_one_length(parts: list[tuple[Tensor, Tensor]]) -> Iterable[dict[int, tuple[Tensor, Tensor]]]:
    """Groups parts, by their numbers, that have as many tokens as each other; those without tokens are left out."""
    groups: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
    for number, part in enumerate(parts):
        if len(part[1]):
            groups.setdefault(len(part[1]), {})[number] = part
    return groups.values()
