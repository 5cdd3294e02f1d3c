"""Trains a policy's weights from a model and files of texts; `kvrewrite train` calls `train`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kvrewrite
from kvrewrite.artifact.companions import read_original
from kvrewrite.errors import OptionError, TrainingError
from kvrewrite.policies import POLICIES, Locret, make
from kvrewrite.tools.training.collected import regress
from kvrewrite.tools.training.data import Encoder, Texts, check_files, fingerprint
from kvrewrite.tools.training.gate import GateOptions, GateTask
from kvrewrite.tools.training.kvzap import KVzapOptions, KVzapTask
from kvrewrite.tools.training.locret import LocretOptions, LocretTask
from kvrewrite.tools.training.trainer import (
    FitOptions,
    Fitted,
    Task,
    check_checkpoints,
    fit,
    is_main_process,
    require_training,
)


@dataclass
class Trained:
    """What `train` did. cut: how many of the `read` texts were longer than the cap."""

    policy: str
    out: Path
    written: list[Path]
    trained_parameters: int
    model_parameters: int
    fitted: Fitted
    read: int
    cut: int

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "policy": self.policy,
            "written": [str(p) for p in self.written],
            "trained_parameters": self.trained_parameters,
            "model_parameters": self.model_parameters,
            "steps": self.fitted.log[-1]["step"] if self.fitted.log else 0,
            "seconds": self.fitted.seconds,
            "peak_bytes": self.fitted.peak_bytes,
            "resumed_at": self.fitted.resumed_at,
            "texts": {"read": self.read, "cut": self.cut},
            "log": self.fitted.log,
        }


TASKS: dict[str, type[Task]] = {
    "locret": LocretTask,
    "locret_q": LocretTask,
    "kvzap": KVzapTask,
    "attention_gate": GateTask,
}


def task_class(policy: str) -> type[Task]:
    """The kind of task that trains a policy's weights."""
    if policy not in TASKS:
        raise OptionError(f"{policy} is not trained; expected one of {', '.join(TASKS)}")
    return TASKS[policy]


def make_task(policy: str, model: nn.Module, options: Mapping[str, Any] | None = None, tokenizer: Any = None) -> Task:
    """Makes a policy's task; options: fields of `LocretOptions`, `KVzapOptions` or
    `GateOptions`. tokenizer: for a merged model."""
    if task_class(policy) is KVzapTask:
        return KVzapTask(model, _options(KVzapOptions, options or {}))
    if task_class(policy) is GateTask:
        return GateTask(model, _options(GateOptions, options or {}), tokenizer)
    chosen = make(policy)
    assert isinstance(chosen, Locret)
    return LocretTask(model, _options(LocretOptions, options or {}), chosen)


def _options(cls: type, given: Mapping[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(given) - known):
        raise OptionError(f"unknown training option {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    return cls(**given)


def train(
    model: str | Path | nn.Module,
    policy: str,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: Any = None,
    max_tokens: int | None = None,
    question_tokens: int = 0,
    options: Mapping[str, Any] | None = None,
    fitting: FitOptions | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    plot: str | Path | None = None,
    force: bool = False,
    labels: str | Path | None = None,
) -> Trained:
    """Trains a policy's weights and writes them as safetensors.

    model: a transformers checkpoint directory, or a model; its parameters are frozen and shared, never copied. data:
    .jsonl or .parquet files (`kvrewrite.tools.training.data`). max_tokens: the longest prompt or text, default 10240
    (locret) or 4096. options: of the policy's training (`LocretOptions`, `GateOptions`). fitting: steps, batches,
    optimizer, checkpoints. plot: a PNG of the loss. labels: a file of Locret's labels: made from all texts if it does
    not exist, read if it does; one of another model, data or options is refused. Raises TrainingError, OptionError and
    what `transform` raises for models without sites.
    """
    require_training()
    out = Path(out)
    fitting = fitting or FitOptions()
    check_out(out, force)
    check_plot(plot)
    if labels is not None and not task_class(policy).has_labels:
        raise OptionError(f"{policy} is trained without labels; leave --labels (labels) out")
    if fitting.collect:
        check_collect(policy, labels)
    _, paths = check_files(data)
    limit = max_tokens or task_class(policy).max_tokens
    if isinstance(model, (str, Path)):
        base, tokenizer = read_original(
            Path(model), dtype, "train on the original, then convert it with the weights", tokenizer
        )
        name = Path(model).name
    else:
        base, name = model, getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        if tokenizer is None:
            raise OptionError("a tokenizer is needed with a model that is given as a module (tokenizer=...)")
    if device is not None:
        base.to(torch.device(device))
    elif torch.cuda.is_available():
        base.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    total = sum(p.numel() for p in base.parameters())
    base_hash = weights_hash(base)  # before adapters are added
    task = make_task(policy, base.eval(), options, tokenizer)
    longest = getattr(task, "longest", None)
    if longest is not None and limit > longest:
        limit = int(longest)
    first = POLICIES[policy].question_first
    encode = Encoder(tokenizer, task.needs, limit, first, question_tokens, longest, end=task.ends_answers)
    texts = Texts(paths, encode, fitting.seed)
    run = {
        "policy": policy,
        "options": dataclasses.asdict(task.options),  # type: ignore[call-overload]
        "fitting": _plain(fitting),
        "data": fingerprint(paths),
        "max_tokens": limit,
        "question_tokens": question_tokens,
        # Labels of single texts may differ in the last bit from those of a batch.
        **({} if labels is None else {"labels": "from a file"}),
    }
    check_checkpoints(fitting, run)
    if labels is not None:
        assert isinstance(task, LocretTask)
        depends = ("policy", "data", "max_tokens", "question_tokens")
        task.use_labels(Path(labels), texts, {"model": base_hash, **{n: run[n] for n in depends}}, fitting.quiet)
    if fitting.collect:
        assert isinstance(task, LocretTask)
        fitted = regress(task, texts, fitting)
    else:
        fitted = fit(task, texts, fitting)
    # Before `save`, which may merge adapters.
    trained = sum(p.numel() for group in task.parameter_groups() for p in group["params"])
    written: list[Path] = []
    if is_main_process():
        said = {
            "base_model_name": name,
            "base_model_hash": base_hash,
            "data": fingerprint(paths),
            "steps": str(fitting.steps),
            "training": json.dumps(run, sort_keys=True, default=str),
            "trained_with": f"kvrewrite {kvrewrite.__version__}, torch {torch.__version__}",
            "date": time.strftime("%Y-%m-%d"),
        }
        check_out(out, force)
        written = task.save(out, said)
        if plot is not None:
            from kvrewrite.tools.training.report import plot_loss

            plot_loss(fitted.log, plot)
            written.append(Path(plot))
    return Trained(policy, out, written, trained, total, fitted, encode.counts.read.value, encode.counts.cut.value)


def weights_hash(model: nn.Module) -> str:
    """Returns the sha256 of a model's parameters' names, dtypes and values: identifies the base model of weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_out(out: Path, force: bool) -> None:
    """Checks the output before any work, and again before writing."""
    if out.suffix != ".safetensors":
        raise TrainingError(f"{out}: expected a name that ends in .safetensors, the format that is written")
    if out.is_dir():
        raise TrainingError(f"{out} is a directory; expected the name of a file to write")
    if out.exists() and not force:
        raise TrainingError(f"{out} exists; choose another name, or overwrite it with --force (force=True)")


def check_collect(policy: str, labels: str | Path | None) -> None:
    """Checks what trains on tokens that are kept."""
    if not issubclass(task_class(policy), LocretTask):
        raise OptionError(f"{policy} changes what the model computes, so nothing of it can be kept; leave collect out")
    if labels is not None:
        raise OptionError("collect keeps the labels with what the heads read; leave --labels (labels) out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError("collect works in one process; run it without accelerate launch")


def check_plot(plot: str | Path | None) -> None:
    """Checks before any work whether a plot can be drawn."""
    if plot is None:
        return
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("a plot of the loss needs matplotlib: pip install matplotlib, or leave --plot out")
    if Path(plot).suffix != ".png":
        raise OptionError(f"--plot {plot}: expected a name that ends in .png")


def _plain(fitting: FitOptions) -> dict[str, Any]:
    plain = dataclasses.asdict(fitting)
    for name in ("checkpoints", "resume", "report_to", "workers", "quiet", "keep", "save_every", "log_every"):
        plain.pop(name)
    if not fitting.collect:
        for name in ("collect", "collect_tokens", "rows"):
            plain.pop(name)
    return plain
