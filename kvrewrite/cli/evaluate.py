"""`kvrewrite eval` and `kvrewrite plot`; `cli` registers them, so this module does not import it when it is loaded."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvrewrite.errors import ArtifactError, OptionError

if TYPE_CHECKING:
    from kvrewrite.tools.evaluation.run import PolicySpec

ALL = "all"  # every policy that needs no trained weights
AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])


def register(group: click.Group) -> None:
    """Adds both commands to the command line."""
    group.command("eval")(evaluate)
    group.command("plot")(plot)


# ----------------------------------------------------------------------------------------------------- what users type
def parse_budget(text: str) -> int | float:
    """A fraction of the cache ("0.25", "25%") or a number of slots ("1024")."""
    try:
        if text.endswith("%"):
            value: int | float = float(text[:-1]) / 100
        elif re.fullmatch(r"\d[\d_]*", text):
            value = int(text)
        else:
            value = float(text)
    except ValueError:
        value = 0
    if not (value >= 1 if isinstance(value, int) else 0 < value < 1):
        raise OptionError(f"--budget {text}: expected a fraction such as 0.25 or a whole number of slots such as 1024")
    return value


def split_policy(text: str) -> tuple[str, list[str]]:
    """`name:key=value,key=value` as a name and pairs; a part without "=" belongs to the value before it."""
    name, _, rest = text.partition(":")
    pairs: list[str] = []
    for part in rest.split(",") if rest else []:
        if "=" in part or not pairs:
            pairs.append(part)
        else:
            pairs[-1] += f",{part}"
    return name.strip(), pairs


def parse_policies(texts: tuple[str, ...], weights: tuple[str, ...]) -> tuple[PolicySpec, ...]:
    """The policies that --policy and --policy-weights name; raises OptionError for names that do not exist."""
    from kvrewrite.cli.app import parse_options
    from kvrewrite.policies import ALIASES, POLICIES
    from kvrewrite.tools.evaluation.run import PolicySpec

    files = {}
    for text in weights:
        name, sign, file = text.partition("=")
        if not sign or not file:
            raise OptionError(f"--policy-weights {text}: expected NAME=FILE, such as locret=heads.safetensors")
        files[ALIASES.get(name, name)] = Path(file)
    specs = []
    for text in texts:
        if text == ALL:
            names = {
                p.name for p in POLICIES.values() if p.name != "full" and not (p.needs_weights and p.name not in files)
            }
            specs += [PolicySpec(n, {}, files.get(n)) for n in POLICIES if n in names]
            continue
        name, pairs = split_policy(text)
        name = ALIASES.get(name, name)
        spec = PolicySpec(name, parse_options(name, pairs), files.get(name))
        spec.check()
        specs.append(spec)
    unused = set(files) - {s.name for s in specs}
    if unused:
        raise OptionError(f"--policy-weights for {', '.join(sorted(unused))}, which --policy does not name")
    return tuple(specs)


def with_shipped_weights(specs: tuple[PolicySpec, ...]) -> tuple[PolicySpec, ...]:
    """For the small model: policies without weights of their own take those that are part of kvrewrite."""
    from kvrewrite.assets import small_policies

    shipped = small_policies()
    return tuple(dataclasses.replace(s, weights=s.weights or shipped.get(s.name)) for s in specs)


def model_directory(model: str | None) -> Path:
    """MODEL, or the small model that is part of kvrewrite."""
    if model is not None:
        from kvrewrite.cli.app import _checkpoint_directory

        return _checkpoint_directory(model)
    from kvrewrite.assets import small_model

    return small_model()


@contextmanager
def _long_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr with the time that is left, told (what, done, of)."""
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from kvrewrite.cli.app import _err

    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=_err(), transient=True, speed_estimate_period=300) as progress:
        task = progress.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=escape(what), completed=done, total=max(1, total))

        yield report


def _warn(message: str) -> None:
    click.echo(f"warning: {message}", err=True)


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


# ------------------------------------------------------------------------------------------------------------ eval
@click.argument("model", required=False)
@click.option(
    "--policy", "-p", "policy_texts", multiple=True, metavar="NAME[:KEY=VALUE,...]",
    help="A policy with its options; repeatable. 'all': every one without trained weights. The full cache always runs.",
)  # fmt: skip
@click.option(
    "--budget", "-b", "budget_texts", multiple=True, metavar="NUMBER",
    help="Part of the cache to keep (0.25, 25%) or slots (1024); repeatable. Default: each policy's own.",
)  # fmt: skip
@click.option(
    "--mode", type=click.Choice(["aware", "blind", "both"]), default="both", show_default=True,
    help="Whether the context is compressed together with the question, or before it is known.",
)  # fmt: skip
@click.option("--task", "-t", "tasks", multiple=True, help="A task; repeatable. Default: all.")
@click.option(
    "--tokens", multiple=True, type=click.IntRange(min=16), default=(4096,), show_default=True,
    help="Length of a prompt in tokens; repeatable.",
)  # fmt: skip
@click.option("--samples", type=click.IntRange(min=1), default=50, show_default=True, help="Samples a task.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the samples.")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--dtype", type=DTYPES, default="auto", show_default=True,
    help="auto: the checkpoint's own, but float32 on a CPU.",
)  # fmt: skip
@click.option(
    "--policy-weights", multiple=True, metavar="NAME=FILE", help="safetensors file of a policy's trained weights."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file, written after every cell.")
@click.option("--resume", is_flag=True, help="Continue from --out where it has results.")
@click.option("--force", is_flag=True, help="Replace --out.")
@click.option("--harness", type=click.Choice(["lm_eval"]), help="Run another harness's tasks: --tasks, --limit.")
@click.option("--tasks", "harness_tasks", help="With --harness: its tasks, separated by commas.")
@click.option("--include-path", type=click.Path(path_type=Path), help="With --harness: a directory of task files.")
@click.option("--limit", type=click.IntRange(min=1), help="With --harness: samples a task.")
@AS_JSON
def evaluate(
    model: str | None, policy_texts: tuple[str, ...], budget_texts: tuple[str, ...], mode: str, tasks: tuple[str, ...],
    tokens: tuple[int, ...], samples: int, seed: int, batch_size: int, device: str, dtype: str,
    policy_weights: tuple[str, ...], out: Path | None, resume: bool, force: bool, harness: str | None,
    harness_tasks: str | None, include_path: Path | None, limit: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Measures what policies and budgets cost in accuracy and save in memory.

    MODEL is a checkpoint or a converted directory; without it, the small model that is part of kvrewrite. Every policy
    gets the same samples, and the full cache always runs as the baseline. --policy converted is a converted directory's
    own policy, which is also what runs when no policy is named there. Trained weights for the small model are part of
    kvrewrite, too.
    """
    _check_usage(harness, harness_tasks, include_path, limit, tasks)
    specs = parse_policies(policy_texts, policy_weights)
    if model is None:
        specs = with_shipped_weights(specs)
    budgets = tuple(parse_budget(t) for t in budget_texts)
    if resume and out is None:
        raise click.UsageError("--resume needs --out, the file to continue from")
    if out is not None and out.exists() and not (resume or force):
        raise ArtifactError(f"{out} exists; continue it with --resume, or replace it with --force")
    if out is not None and not out.resolve().parent.is_dir():
        raise ArtifactError(f"--out {out}: its directory does not exist")
    from kvrewrite.artifact import directory as artifact
    from kvrewrite.cli.app import _device
    from kvrewrite.tools.evaluation.run import CONVERTED, MODES, PolicySpec, Settings

    directory = model_directory(model)
    if not specs and artifact.is_artifact(directory):
        specs = (PolicySpec(CONVERTED),)
    where = str(_device(device))
    settings = Settings(
        directory, specs, budgets, MODES if mode == "both" else (mode,), tasks, tokens, samples, seed, batch_size, where,
        dtype,
    )  # fmt: skip
    _quiet_transformers()
    if harness:
        _run_harness(settings, str(harness_tasks), include_path, limit, out, as_json)
        return
    _run_tasks(settings, out, resume, as_json)


def _check_usage(
    harness: str | None, names: str | None, include: Path | None, limit: int | None, tasks: tuple[str, ...]
) -> None:
    if harness and not names:
        raise click.UsageError("--harness needs --tasks, its tasks separated by commas")
    if harness and tasks:
        raise click.UsageError("--task names kvrewrite's own tasks; with --harness give --tasks")
    if not harness and (names or include or limit):
        raise click.UsageError(
            "--tasks, --include-path and --limit need --harness lm_eval; kvrewrite's own: --task, --samples"
        )


def _run_tasks(settings: Any, out: Path | None, resume: bool, as_json: bool) -> None:
    from kvrewrite.cli.app import _out, _print_json
    from kvrewrite.tools.evaluation.report import tables
    from kvrewrite.tools.evaluation.run import evaluate as run

    started = time.perf_counter()
    try:
        with _long_bar() as progress:
            results = run(settings, out=out, resume=resume, progress=progress, warn=_warn)
    except KeyboardInterrupt:
        if out is not None and out.exists():
            click.echo(f"{out} keeps what is done; the same command with --resume continues", err=True)
        raise
    if as_json:
        _print_json(results)
        return
    console = _out()
    shown, reasons = tables(results, console.width)
    for table in shown:
        console.print(table)
    for i, reason in enumerate(reasons):
        click.echo(f"[{i + 1}] {reason}")
    where = f"; {out}" if out is not None else ""
    click.echo(f"{len(results['cells'])} cells in {time.perf_counter() - started:.0f} s{where}", err=True)


def _run_harness(
    settings: Any, names: str, include: Path | None, limit: int | None, out: Path | None, as_json: bool
) -> None:
    from kvrewrite.cli.app import _out, _print_json
    from kvrewrite.tools.evaluation.harness import run, table

    with _long_bar() as progress:
        results = run(
            settings, [n.strip() for n in names.split(",") if n.strip()], include_path=include, limit=limit, out=out,
            progress=progress, warn=_warn,
        )  # fmt: skip
    if as_json:
        _print_json(results)
        return
    shown, notes = table(results)
    _out().print(shown)
    for note in notes:
        click.echo(note)


# ------------------------------------------------------------------------------------------------------------ plot
@click.argument("source", required=False)
@click.option(
    "--kind", type=click.Choice(["accuracy", "memory", "eviction", "retention"]), default="accuracy", show_default=True,
    help="accuracy against budget, memory against context, what each head evicts, or which positions a prompt keeps.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The PNG file to write.")
@click.option(
    "--task",
    "-t",
    "tasks",
    multiple=True,
    help="accuracy and eviction: only these tasks; repeatable. Default: their mean.",
)
@click.option(
    "--policy", "-p", "policy_texts", multiple=True, metavar="NAME[:KEY=VALUE,...]",
    help="memory and retention: a policy; repeatable. accuracy and eviction: only these.",
)  # fmt: skip
@click.option("--budget", "-b", "budget_text", help="memory and retention: part of the cache (0.25) or slots (1024).")
@click.option(
    "--prompt-file", type=click.Path(allow_dash=True), help="retention: a file with the prompt; - reads stdin."
)
@click.option("--context", "contexts", type=click.IntRange(min=1), multiple=True, help="memory: context lengths.")
@click.option("--policy-weights", multiple=True, metavar="NAME=FILE", help="As in eval.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=DTYPES, default="auto", show_default=True)
@click.option("--force", is_flag=True, help="Replace --out.")
def plot(
    source: str | None, kind: str, out: Path, tasks: tuple[str, ...], policy_texts: tuple[str, ...],
    budget_text: str | None, prompt_file: str | None, contexts: tuple[int, ...], policy_weights: tuple[str, ...],
    device: str, dtype: str, force: bool,
) -> None:  # fmt: skip
    """Draws results as a PNG.

    SOURCE: the JSON file of `kvrewrite eval` for --kind accuracy and eviction; that or a model directory for --kind memory
    (measured, or estimated for --context and --policy); a model directory for --kind retention. Without it, the small model.
    """
    from kvrewrite.tools.evaluation import plots

    plots.require_matplotlib()
    if out.suffix.lower() != ".png":
        raise OptionError(f"--out {out}: expected a name that ends in .png")
    if out.exists() and not force:
        raise ArtifactError(f"{out} exists; replace it with --force")
    if not out.resolve().parent.is_dir():
        raise ArtifactError(f"--out {out}: its directory does not exist")
    is_results = source is not None and Path(source).is_file()
    if kind in ("accuracy", "eviction") or (kind == "memory" and is_results):
        if not is_results:
            raise click.UsageError(f"--kind {kind} needs the JSON file that `kvrewrite eval --out` wrote")
        from kvrewrite.tools.evaluation.run import read_results

        results = read_results(Path(str(source)))
        names = list(policy_texts)
        if kind == "accuracy":
            plots.accuracy(results, out, tasks=list(tasks), labels=names)
        elif kind == "eviction":
            plots.eviction(results, out, tasks=list(tasks), labels=names)
        else:
            plots.measured_memory(results, out, labels=names)
        click.echo(str(out), err=True)
        return
    specs = parse_policies(policy_texts, policy_weights)
    budget = None if budget_text is None else parse_budget(budget_text)
    if not specs:
        raise click.UsageError(f"--kind {kind} needs --policy")
    from kvrewrite.cli.app import _device
    from kvrewrite.tools.evaluation.run import Source, arms

    _quiet_transformers()
    found = Source(model_directory(source), device=_device(device), dtype=dtype)
    chosen = arms(specs, [] if budget is None else [budget])
    if kind == "memory":
        plots.estimated_memory(found, chosen, list(contexts) or [2**n for n in range(10, 18)], out)
    else:
        if prompt_file is None:
            raise click.UsageError("--kind retention needs --prompt-file")
        with click.open_file(prompt_file, encoding="utf-8") as file:
            prompt = file.read()
        plots.retention(found, chosen, prompt, out)
    click.echo(str(out), err=True)
