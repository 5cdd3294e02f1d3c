"""The command `kvrewrite train`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from kvrewrite.cli.options import AS_JSON, parse_pairs
from kvrewrite.cli.shared import Command, find_device, print_json, quiet_transformers
from kvrewrite.errors import OptionError

POLICIES = click.Choice(["locret", "locret_q", "kvzap", "attention_gate"])


def parse_training_options(policy: str, pairs: Iterable[str]) -> dict[str, Any]:
    """Parses `key=value` pairs to the types of the policy's training options."""
    from kvrewrite.policies.options import annotation

    if policy == "attention_gate":
        from kvrewrite.tools.training.gate import GateOptions as Options
    elif policy == "kvzap":
        from kvrewrite.tools.training.kvzap import KVzapOptions as Options  # type: ignore[assignment]
    else:
        from kvrewrite.tools.training.locret import LocretOptions as Options  # type: ignore[assignment]
    hints = {f.name: annotation(f) for f in dataclasses.fields(Options)}
    options = parse_pairs(policy, pairs, hints)
    if unknown := [key for key in options if key not in hints]:
        raise OptionError(f"training {policy} has no option {unknown[0]!r}; there are: {', '.join(sorted(hints))}")
    return options


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--policy", "-p", required=True, type=POLICIES, help="The policy whose weights are trained.")
@click.option(
    "--data",
    "-d",
    "data",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Texts, .jsonl or .parquet; repeatable. Rows have messages; prompt, answer; context, question, answer; context, turns; "
    "or text.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The safetensors file to write.")
@click.option(
    "--option",
    "-o",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the policy's training; repeatable.",
)
@click.option("--max-tokens", type=click.IntRange(min=8), help="Longest prompt. Default: 10240, or 4096 for gates.")
@click.option(
    "--question-tokens",
    type=click.IntRange(min=0),
    default=0,
    help="locret_q: how many tokens of the question stand before the context; 0: all.",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path, dir_okay=False),
    help="locret: file of labels; made where there is none, read by later runs on the same model, data and options.",
)
@click.option(
    "--collect",
    type=click.IntRange(min=0),
    default=0,
    metavar="TEXTS",
    help="Read so many texts once and train on what heads read of them: thousands of steps in seconds. Not for gates.",
)
@click.option(
    "--collect-tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="With --collect: tokens that are kept of each text.",
)
@click.option(
    "--rows", type=click.IntRange(min=1), default=8192, show_default=True, help="With --collect: tokens of each step."
)
@click.option("--steps", type=click.IntRange(min=1), default=3000, show_default=True, help="Steps of the optimizer.")
@click.option("--warmup", type=click.IntRange(min=0), help="Steps of warm-up. Default: two thirds of the steps.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Texts for each device and step."
)
@click.option("--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Batches for each step.")
@click.option(
    "--weight-decay", type=click.FloatRange(min=0), default=0.01, show_default=True, help="Of the optimizer (AdamW)."
)
@click.option(
    "--clip-value",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Largest value of a gradient; 0: no limit.",
)
@click.option(
    "--clip-norm",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Largest norm of all gradients; 0: no limit.",
)
@click.option(
    "--schedule", default="linear", show_default=True, help="How the learning rate goes, by transformers' names."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the weights and of the texts' order.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Dtype of the model; auto: the checkpoint's own. What is trained is fp32.",
)
@click.option("--device", help="cpu, cuda, ... Default: cuda where there is one.")
@click.option("--checkpoints", type=click.Path(path_type=Path, file_okay=False), help="Folder for checkpoints.")
@click.option(
    "--save-every", type=click.IntRange(min=1), default=500, show_default=True, help="Steps between checkpoints."
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --checkpoints.")
@click.option(
    "--log-every", type=click.IntRange(min=1), default=10, show_default=True, help="Steps between two reports."
)
@click.option("--report-to", multiple=True, metavar="TRACKER", help="tensorboard, wandb, ...; repeatable.")
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that tokenize.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="PNG file of the loss.")
@click.option("--force", is_flag=True, help="Replace --out.")
@AS_JSON
def train(
    model: Path,
    policy: str,
    data: tuple[Path, ...],
    out: Path,
    pairs: tuple[str, ...],
    max_tokens: int | None,
    question_tokens: int,
    labels: Path | None,
    collect: int,
    collect_tokens: int,
    rows: int,
    steps: int,
    warmup: int | None,
    batch_size: int,
    accumulate: int,
    weight_decay: float,
    clip_value: float,
    clip_norm: float,
    schedule: str,
    seed: int,
    dtype: str,
    device: str | None,
    checkpoints: Path | None,
    save_every: int,
    resume: bool,
    log_every: int,
    report_to: tuple[str, ...],
    workers: int,
    plot: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Trains the weights of a policy: Locret's retaining heads, KVzap's surrogates, or Attention-Gates.

    MODEL is a directory of transformers; it stays as it is. Defaults are those of Locret's authors. Several GPUs:
    accelerate launch -m kvrewrite.cli train ...

    \b
    Examples:
      kvrewrite train MODEL -p locret -d answers.jsonl --out heads.safetensors
      kvrewrite train MODEL -p kvzap -d texts.jsonl --out kvzap.safetensors
    """
    if resume and checkpoints is None:
        raise click.UsageError("--resume needs --checkpoints, the folder to go on from")
    from kvrewrite.tools.training import FitOptions
    from kvrewrite.tools.training import train as run
    from kvrewrite.tools.training.trainer import is_main_process

    quiet_transformers()
    options = {"seed": seed, **parse_training_options(policy, pairs)}
    fitting = FitOptions(
        steps=steps,
        warmup=min(2 * steps // 3, steps - 1) if warmup is None else warmup,
        batch_size=batch_size,
        accumulate=accumulate,
        weight_decay=weight_decay,
        clip_value=clip_value,
        clip_norm=clip_norm,
        schedule=schedule,
        seed=seed,
        save_every=save_every,
        log_every=log_every,
        checkpoints=checkpoints,
        resume=resume,
        report_to=report_to,
        workers=workers,
        quiet=as_json,
        collect=collect,
        collect_tokens=collect_tokens,
        rows=rows,
    )
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer's progress belongs there
        trained = run(
            model,
            policy,
            data,
            out,
            max_tokens=max_tokens,
            question_tokens=question_tokens,
            options=options,
            fitting=fitting,
            device=None if device is None else str(find_device(device)),
            dtype=dtype,
            plot=plot,
            force=force,
            labels=labels,
        )
    if not is_main_process():
        return
    if as_json:
        print_json(trained.as_dict())
        return
    share = trained.trained_parameters / trained.model_parameters
    peak = "" if trained.fitted.peak_bytes is None else f", peak {trained.fitted.peak_bytes / 2**30:.2f} GiB"
    cut = (
        f"; {trained.cut} of {trained.read} texts were cut to {max_tokens or 'the longest length'}"
        if trained.cut
        else ""
    )
    click.echo(
        f"{trained.trained_parameters:,} parameters ({share:.1%} of the model's) in {trained.fitted.seconds:.0f} s{peak}{cut}",
        err=True,
    )
    for path in trained.written:
        click.echo(str(path))
