"""Runs transformers' Trainer for a `Task`: what is trained, its optimizer, checkpoints, and monitoring."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvrewrite.errors import OptionError, TrainingError

IGNORED = -100  # label of tokens that are no targets


class Task(nn.Module, ABC):
    """A policy's weights in training.

    Only trained parameters are registered, so that checkpoints hold nothing else. The captured graph, whose backbone is
    frozen and belongs to the model, is hidden from the module's own lists (`hide`) but moves with it.
    """

    needs: str = "answer"
    """"answer": texts with an answer; "text": any; "any": either."""
    max_tokens: ClassVar[int] = 4096
    """The longest prompt or text, unless the user says another."""
    ends_answers: ClassVar[bool] = False
    """Whether an answer without the token that ends a text gets one."""
    has_labels: ClassVar[bool] = False
    """Whether it learns from labels of its own, which a file can keep (`use_labels`)."""
    progress: float = 0.0
    """The share of the steps that are done; set before each step."""

    def hide(self, graph: nn.Module) -> None:
        """Keeps the captured graph beside the module's own parameters."""
        self.__dict__["graph"] = graph

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Task:
        if "graph" in self.__dict__:
            self.__dict__["graph"]._apply(fn)
        return super()._apply(fn, recurse)

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns an optimizer's parameter groups: {"params", "lr", "name"}."""

    def prepare(self, input_ids: Tensor, labels: Tensor, real: Tensor) -> None:
        """Receives the first batch (of all processes) of a fresh run, before any training."""

    @abstractmethod
    def forward(self, input_ids: Tensor, labels: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Returns {"loss": ..., and its parts}, scalars.

        input_ids, labels: (B, T) int64, real: (B, T) bool; rows are left-aligned, and labels are `IGNORED` for tokens
        that are no targets.
        """

    @abstractmethod
    def save(self, out: Path, metadata: dict[str, str]) -> list[Path]:
        """Writes what inference reads to `out` (.safetensors) and beside it; returns what was written."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How it is trained; Locret's defaults (one sample per step, AdamW, linear warm-up and decay, clipping by value).

    steps, warmup: optimizer steps. batch_size: texts per device and step. clip_value, clip_norm: of gradients (0: off).
    save_every: steps between checkpoints in `checkpoints` (0: none); keep: how many stay. resume: continues from the
    last one. report_to: trackers of transformers ("tensorboard", "wandb"); workers: processes that tokenize.
    collect: how many texts are read, once, to train heads on what is kept of them, `collect_tokens` tokens each, with `rows`
    tokens a step (0: every step reads its texts); batch_size is then of the reading (`kvrewrite.tools.training.collected`).
    """

    steps: int = 3000
    warmup: int = 2000
    batch_size: int = 1
    accumulate: int = 1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    schedule: str = "linear"
    clip_value: float = 0.5
    clip_norm: float = 0.0
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    checkpoints: Path | None = None
    resume: bool = False
    report_to: tuple[str, ...] = ()
    workers: int = 0
    quiet: bool = False
    collect: int = 0
    collect_tokens: int = 1024
    rows: int = 8192

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "accumulate": 1, "log_every": 1, "keep": 1}
        for name, low in {**least, "collect": 0, "collect_tokens": 1, "rows": 1}.items():
            if getattr(self, name) < low:
                raise OptionError(f"{name} is {getattr(self, name)}, expected at least {low}")
        for name in ("warmup", "clip_value", "clip_norm", "weight_decay", "save_every", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.warmup >= self.steps:
            raise OptionError(f"warmup is {self.warmup} of {self.steps} steps, expected fewer than there are steps")
        if self.resume and self.checkpoints is None:
            raise OptionError("resume needs the folder of the checkpoints")
        if self.collect and (self.collect < 2 or self.checkpoints is not None or self.accumulate > 1 or self.report_to):
            raise OptionError(
                f"collect is {self.collect}; expected at least 2 texts, one of which the heads are judged on, "
                "and no checkpoints, accumulate or report_to: the texts are read once, and the steps on what is kept take seconds"
            )


@dataclass
class Fitted:
    """What a training run did. log: what was logged, {"step", "loss", ...}; seconds: training; peak_bytes: on a GPU."""

    log: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int | None = None
    resumed_at: int = 0


def require_training() -> None:
    """Raises OptionError if what training needs is not installed."""
    import importlib.util

    missing = [name for name in ("accelerate", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(f"training needs {' and '.join(missing)}: pip install 'kvrewrite[train]'")


def collate(rows: list[dict[str, Any]], pad: int = 0) -> dict[str, Tensor]:
    """Makes a left-aligned batch of rows {"input_ids", "labels"} (int lists): input_ids, labels, real, each (B, T)."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        count = len(row["input_ids"])
        ids[i, :count] = torch.tensor(row["input_ids"], dtype=torch.int64)
        labels[i, :count] = torch.tensor(row["labels"], dtype=torch.int64)
        real[i, :count] = True
    return {"input_ids": ids, "labels": labels, "real": real}


def batch_of_all(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joins the batches of all processes in their order: the batch of one process with all their texts.

    inputs: input_ids, labels and real, each (B, T), as from `collate`; T may differ between processes.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return dict(inputs)
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, {name: x.cpu() for name, x in inputs.items()})
    width = max(batch["real"].shape[1] for batch in found)
    fill = {"input_ids": 0, "labels": IGNORED, "real": 0}
    return {
        name: torch.cat(
            [nn.functional.pad(b[name], (0, width - b[name].shape[1]), value=fill[name]) for b in found]
        ).to(x.device)
        for name, x in inputs.items()
    }


def share_parameters(task: nn.Module) -> None:
    """Gives all processes the first one's parameters. Call it after changing them outside the optimizer, because
    processes only exchange gradients."""
    if torch.distributed.is_initialized():
        for parameter in task.parameters():
            torch.distributed.broadcast(parameter.data, 0)


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint in a folder."""
    found = [p for p in folder.glob("checkpoint-*") if p.name[11:].isdigit() and (p / "trainer_state.json").exists()]
    return max(found, key=lambda p: int(p.name[11:]), default=None)


def check_checkpoints(options: FitOptions, what: Mapping[str, Any]) -> None:
    """Checks that the folder of checkpoints belongs to this run. what: everything that must be the same to resume,
    plain data.

    It is written beside the checkpoints. Raises TrainingError if there are checkpoints that would be mixed with new
    ones, none to resume from, or those of another run; names the differences.
    """
    if options.checkpoints is None:
        return
    said, newest = options.checkpoints / "training.json", last_checkpoint(options.checkpoints)
    plain = json.loads(json.dumps(dict(what), default=str))
    if not options.resume:
        if newest is not None:
            raise TrainingError(
                f"{options.checkpoints} has checkpoints already; go on from them with --resume (resume=True), or choose another "
                "folder"
            )
        if is_main_process():
            options.checkpoints.mkdir(parents=True, exist_ok=True)
            said.write_text(json.dumps(plain, indent=1, sort_keys=True), encoding="utf-8")
        return
    if newest is None:
        raise TrainingError(f"there is no checkpoint in {options.checkpoints} to resume from; train without --resume")
    before = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {}
    changed = [
        f"{name} was {before.get(name)} and is {plain.get(name)}"
        for name in sorted({*before, *plain})
        if before.get(name) != plain.get(name)
    ]
    if changed:
        raise TrainingError(
            f"{options.checkpoints} is of another run: {'; '.join(changed)}. Resume with the same options, or train anew in "
            "another folder"
        )


def fit(task: Task, texts: Any, options: FitOptions) -> Fitted:
    """Trains a task on rows {"input_ids", "labels"}, an iterable dataset that never ends or one with a length.

    Runs on the device of the task's parameters, in every process that `accelerate launch` started. Raises TrainingError
    if the loss is no longer a number: nothing is saved then, and the last checkpoint is from before it.
    """
    require_training()
    import tempfile

    from transformers import get_scheduler

    if options.resume:
        assert options.checkpoints is not None
        start = last_checkpoint(options.checkpoints)
        if start is None:
            raise TrainingError(
                f"there is no checkpoint in {options.checkpoints} to resume from; train without resuming"
            )
    else:
        start = None
    optimizer = torch.optim.AdamW(
        task.parameter_groups(), betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    scheduler = get_scheduler(
        options.schedule, optimizer, num_warmup_steps=options.warmup, num_training_steps=options.steps
    )
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = _trainer(task, texts, options, options.checkpoints or Path(nowhere), (optimizer, scheduler))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        result = trainer.train(resume_from_checkpoint=None if start is None else str(start))
        trainer.check_finite()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return Fitted(log, result.metrics["train_runtime"], peak, 0 if start is None else int(start.name[11:]))


def _trainer(task: Task, texts: Any, options: FitOptions, folder: Path, optimizers: Any) -> Any:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        """Clips by value, which the Trainer itself does not, and tells the task the training's progress."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            task.progress = state.global_step / max(1, state.max_steps)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if options.clip_value:
                nn.utils.clip_grad_value_(task.parameters(), options.clip_value)

    class PolicyTrainer(Trainer):
        """Logs the parts of the loss, and stops if it is no longer a number."""

        fresh = not options.resume
        bad: Tensor | None = None

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if self.fresh:
                self.fresh = False
                with torch.no_grad():
                    task.prepare(**batch_of_all(inputs))
                    share_parameters(task)
            found = model(**inputs)
            loss = found["loss"]
            broken = ~torch.isfinite(loss.detach())
            self.bad = broken if self.bad is None else self.bad | broken
            self.parts = getattr(self, "parts", [])
            self.parts.append({n: x.detach() for n, x in found.items() if n != "loss"})
            return (loss, found) if return_outputs else loss

        def check_finite(self) -> None:
            """Reads the device once for all steps since the last check."""
            if self.bad is not None and torch.distributed.is_initialized():
                count = self.bad.int()
                torch.distributed.all_reduce(count)  # all processes stop, or none
                self.bad = count > 0
            if self.bad is not None and bool(self.bad):
                last = last_checkpoint(folder) if options.checkpoints else None
                kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint from before"
                raise TrainingError(
                    f"the loss is not a number (NaN or infinite) by step {self.state.global_step}; {kept}. A lower "
                    "learning rate, a longer warm-up or other data may help"
                )
            self.bad = None

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:
                self.check_finite()
                for name in self.parts[0] if getattr(self, "parts", None) else ():
                    logs[name] = round(float(torch.stack([p[name].float() for p in self.parts]).mean()), 6)
                self.parts = []
            super().log(logs, start_time)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            self.check_finite()
            super()._save_checkpoint(model, trial)

    saving = bool(options.save_every and options.checkpoints)
    device = next(task.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where the Trainer puts things
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        max_grad_norm=options.clip_norm,
        seed=options.seed,
        data_seed=options.seed,
        save_strategy="steps" if saving else "no",
        save_steps=options.save_every if saving else 500,
        save_total_limit=options.keep,
        logging_steps=min(options.log_every, options.steps),
        logging_nan_inf_filter=False,
        report_to=list(options.report_to) or "none",
        disable_tqdm=options.quiet,
        remove_unused_columns=False,
        dataloader_num_workers=options.workers,
        dataloader_prefetch_factor=4 if options.workers else None,
        dataloader_persistent_workers=options.workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=device.type == "cpu",
        # Every process reads for itself: accelerate's method for streams (one reads for all) needs rows of equal
        # length.
        accelerator_config={"dispatch_batches": False},
        average_tokens_across_devices=False,
        label_names=["labels"],
    )
    # One process drives one GPU (accelerate launch starts several): replicas in one process would share the hidden
    # graph.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = PolicyTrainer(
        model=task,
        args=arguments,
        train_dataset=texts,
        data_collator=collate,
        optimizers=optimizers,
        callbacks=[Watch()],
    )
    trainer.remove_callback(PrinterCallback)  # what a quiet Trainer prints instead of its bar
    return trainer


def is_main_process() -> bool:
    """Whether this process writes, of those that `accelerate launch` started."""
    return int(os.environ.get("RANK", "0")) == 0
