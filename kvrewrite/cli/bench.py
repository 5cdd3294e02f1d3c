"""The command `kvrewrite bench`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from kvrewrite.cli.options import (
    AS_JSON,
    CELLS_OUT,
    DTYPES,
    POLICY_WEIGHTS,
    RESUME,
    parse_budget,
    parse_bytes,
    parse_policies,
)
from kvrewrite.cli.shared import (
    Command,
    check_directory,
    find_device,
    long_bar,
    print_json,
    print_tables,
    quiet_transformers,
    stdout_console,
    warn,
)
from kvrewrite.errors import ArtifactError, OptionError


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "--policy",
    "-p",
    "policy_texts",
    multiple=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="A policy with its options; repeatable. 'all': every one without trained weights.",
)
@click.option(
    "--budget",
    "-b",
    "budget_texts",
    multiple=True,
    metavar="NUMBER",
    help="Slots (1024) or a part of the text (0.25, 25%); repeatable. Default: each policy's own.",
)
@click.option(
    "--context",
    "-c",
    "contexts",
    multiple=True,
    type=click.IntRange(min=2),
    default=(4096,),
    show_default=True,
    help="Tokens of a prompt; repeatable.",
)
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(min=1),
    default=(1,),
    show_default=True,
    help="Batch size; repeatable.",
)
@click.option(
    "--baselines",
    "baseline_text",
    default="sdpa",
    show_default=True,
    metavar="NAMES",
    help="sdpa, eager, static (compiled), kvpress, separated by commas; all, or none.",
)
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="How many prefills are timed.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=64, show_default=True, help="How many decode steps are timed."
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Tokens to time `generate` with; 0 skips it.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=300,
    show_default=True,
    help="Time limit of a measurement after its cold start. What would take longer is left out, and the result says so.",
)
@click.option("--memory-limit", "limit_text", metavar="SIZE", help="Limit the GPU memory, weights included: 24GiB.")
@click.option(
    "--compile/--no-compile", "compiled", default=None, help="Compile the rewritten models. Default: on a GPU only."
)
@click.option("--profile", is_flag=True, help="Put the longest kernels of a decode step and of a chunk into the JSON.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of random weights and tokens."
)
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: cuda where there is one.")
@click.option(
    "--dtype",
    type=DTYPES,
    default="auto",
    show_default=True,
    help="auto: the checkpoint's own (named shapes: bfloat16), but float32 on a CPU.",
)
@POLICY_WEIGHTS
@CELLS_OUT
@RESUME
@click.option("--force", is_flag=True, help="Replace --out and --plot.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="PNG file to write.")
@AS_JSON
def bench(
    model: str,
    policy_texts: tuple[str, ...],
    budget_texts: tuple[str, ...],
    contexts: tuple[int, ...],
    batches: tuple[int, ...],
    baseline_text: str,
    repeat: int,
    steps: int,
    new_tokens: int,
    seconds: float,
    limit_text: str | None,
    compiled: bool | None,
    profile: bool,
    seed: int,
    device: str | None,
    dtype: str,
    policy_weights: tuple[str, ...],
    out: Path | None,
    resume: bool,
    force: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measures prefill, decoding and memory of policies beside transformers' full cache and beside the roofline.

    MODEL is a checkpoint or a converted directory, or a named shape with random weights: llama-3.1-8b, phi-3-mini,
    qwen3-8b, or tiny (to try it on a CPU). With a named shape, policies that need trained weights get random ones.

    \b
    Examples:
      kvrewrite bench llama-3.1-8b -p locret:budget=16384,chunk=3072 -c 131072
      kvrewrite bench small -c 8192 -c 32768 --device cuda --plot bench.png
    """
    specs = parse_policies(policy_texts, policy_weights)
    budgets = tuple(parse_budget(t) for t in budget_texts)
    limit = None if limit_text is None else parse_bytes(limit_text, "--memory-limit")
    _check_files(out, plot, resume, force)
    from kvrewrite.tools.benchmark.baselines import parse_baselines
    from kvrewrite.tools.benchmark.measure import Options
    from kvrewrite.tools.benchmark.results import Settings
    from kvrewrite.tools.subjects import CONVERTED, PolicySpec

    baselines = parse_baselines(baseline_text)
    if not specs and _is_converted(model):
        specs = (PolicySpec(CONVERTED),)
    settings = Settings(
        model,
        specs,
        budgets,
        contexts,
        batches,
        baselines,
        str(find_device(device or _default_device())),
        dtype,
        compiled,
        limit,
        Options(repeat, steps, new_tokens, seconds, profile, seed),
    )
    _run(settings, out, resume, plot, as_json)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _is_converted(model: str) -> bool:
    from kvrewrite.artifact import directory as artifact

    return Path(model).is_dir() and artifact.is_artifact(Path(model))


def _check_files(out: Path | None, plot: Path | None, resume: bool, force: bool) -> None:
    if resume and out is None:
        raise click.UsageError("--resume needs --out, the file to continue from")
    for name, path in (("--out", out), ("--plot", plot)):
        if path is None:
            continue
        if path.exists() and not (resume or force):
            again = "continue it with --resume, or replace it" if name == "--out" else "replace it"
            raise ArtifactError(f"{path} exists; {again} with --force")
        check_directory(name, path)
    if plot is not None:
        from kvrewrite.tools.plotting import require_matplotlib

        require_matplotlib()
        if plot.suffix.lower() != ".png":
            raise OptionError(f"--plot {plot}: expected a name that ends in .png")


def _run(settings: Any, out: Path | None, resume: bool, plot: Path | None, as_json: bool) -> None:
    from kvrewrite.tools.benchmark.plot import draw
    from kvrewrite.tools.benchmark.report import explanation, tables
    from kvrewrite.tools.benchmark.run import bench as run

    quiet_transformers()
    started = time.perf_counter()
    try:
        with long_bar() as progress:
            results = run(settings, out=out, resume=resume, progress=progress, warn=warn)
    except KeyboardInterrupt:
        if out is not None and out.exists():
            click.echo(f"{out} keeps what is done; the same command with --resume continues", err=True)
        raise
    if as_json:
        print_json(results)
    else:
        console = stdout_console()
        print_tables(*tables(results, console.width))
        console.print(explanation(results), markup=False)
    if plot is not None and any(c.get("prefill") or c.get("decode") for c in results["cells"]):
        draw(results, plot)
    where = f"; {out}" if out is not None else ""
    click.echo(f"{len(results['cells'])} cells in {time.perf_counter() - started:.0f} s{where}", err=True)
