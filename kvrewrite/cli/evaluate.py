"""The command `kvrewrite eval`."""

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
    model_directory,
    parse_budget,
    parse_policies,
    with_shipped_weights,
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


@click.command("eval", cls=Command)
@click.argument("model", required=False)
@click.option(
    "--policy",
    "-p",
    "policy_texts",
    multiple=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="A policy with its options; repeatable. 'all': every one without trained weights. The full cache always runs.",
)
@click.option(
    "--budget",
    "-b",
    "budget_texts",
    multiple=True,
    metavar="NUMBER",
    help="Part of the cache to keep (0.25, 25%) or slots (1024); repeatable. Default: each policy's own.",
)
@click.option(
    "--mode",
    type=click.Choice(["aware", "blind", "both"]),
    default="both",
    show_default=True,
    help="Whether the context is compressed together with the question, or before it is known.",
)
@click.option("--task", "-t", "tasks", multiple=True, help="A task; repeatable. Default: all.")
@click.option(
    "--tokens",
    multiple=True,
    type=click.IntRange(min=16),
    default=(4096,),
    show_default=True,
    help="Length of a prompt in tokens; repeatable.",
)
@click.option(
    "--data",
    "data_texts",
    multiple=True,
    metavar="[TASK=]FILE",
    help="Documents for a task that reads them: quote, lm, ruler:qa_1, ...; repeatable.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The text of --task perplexity; the same as --data perplexity=FILE.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Samples for each task; for quote and lm: documents, for perplexity: pieces.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the samples.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=4, show_default=True, help="Samples that run together."
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--dtype",
    type=DTYPES,
    default="auto",
    show_default=True,
    help="auto: the checkpoint's own, but float32 on a CPU.",
)
@click.option(
    "--check",
    type=click.Choice(["full", "sites", "off"]),
    default="full",
    show_default=True,
    help="What to prove of each rewrite by running it.",
)
@click.option("--shard", metavar="I/N", help="Run part I (from 0) of N; `kvrewrite report` puts the files together.")
@click.option("--breadth-first", is_flag=True, help="All policies at the first budget and mode, then at the next.")
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with curves, tables and heat maps."
)
@POLICY_WEIGHTS
@CELLS_OUT
@RESUME
@click.option("--force", is_flag=True, help="Replace --out.")
@click.option("--harness", type=click.Choice(["lm_eval"]), help="Run another harness's tasks: --tasks, --limit.")
@click.option("--tasks", "harness_tasks", help="With --harness: its tasks, separated by commas.")
@click.option("--include-path", type=click.Path(path_type=Path), help="With --harness: a directory of task files.")
@click.option("--limit", type=click.IntRange(min=1), help="With --harness: samples for each task.")
@AS_JSON
def evaluate(
    model: str | None,
    policy_texts: tuple[str, ...],
    budget_texts: tuple[str, ...],
    mode: str,
    tasks: tuple[str, ...],
    tokens: tuple[int, ...],
    data_texts: tuple[str, ...],
    text: Path | None,
    samples: int,
    seed: int,
    batch_size: int,
    device: str,
    dtype: str,
    check: str,
    shard: str | None,
    breadth_first: bool,
    html: Path | None,
    policy_weights: tuple[str, ...],
    out: Path | None,
    resume: bool,
    force: bool,
    harness: str | None,
    harness_tasks: str | None,
    include_path: Path | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Measures what policies and budgets cost in accuracy and save in memory.

    MODEL is a checkpoint or a converted directory; without it, the small model that is part of kvrewrite. Every policy
    gets the same samples, and the full cache always runs as the baseline. --policy converted is a converted directory's
    own policy, which is also what runs when no policy is named there. Trained weights for the small model are part of
    kvrewrite, too.

    \b
    Examples:
      kvrewrite eval MODEL -p snapkv -p keydiff -b 50% -b 25% --out results.json
      kvrewrite eval small --mode blind --task needle_single --samples 20
    """
    _check_usage(harness, harness_tasks, include_path, limit, tasks)
    if text is not None:
        if "perplexity" not in tasks:
            raise click.UsageError("--text is the text of --task perplexity; name that task, too")
        data_texts = (*data_texts, f"perplexity={text}")
    specs = parse_policies(policy_texts, policy_weights)
    if model is None:
        specs = with_shipped_weights(specs)
    budgets = tuple(parse_budget(t) for t in budget_texts)
    if resume and out is None:
        raise click.UsageError("--resume needs --out, the file to continue from")
    if out is not None and out.exists() and not (resume or force):
        raise ArtifactError(f"{out} exists; continue it with --resume, or replace it with --force")
    for path, name in ((out, "--out"), (html, "--html")):
        if path is not None:
            check_directory(name, path)
    if html is not None and html.exists() and not force:
        raise ArtifactError(f"{html} exists; replace it with --force")
    from kvrewrite.artifact import directory as artifact
    from kvrewrite.tools.evaluation.settings import MODES, Settings
    from kvrewrite.tools.subjects import CONVERTED, PolicySpec

    directory = model_directory(model)
    if not specs and artifact.is_artifact(directory):
        specs = (PolicySpec(CONVERTED),)
    where = str(find_device(device))
    settings = Settings(
        directory,
        specs,
        budgets,
        MODES if mode == "both" else (mode,),
        tasks,
        tokens,
        samples,
        seed,
        batch_size,
        where,
        dtype,
        _parse_data(data_texts, tasks),
        _parse_shard(shard),
        check,
        html is not None,
        breadth_first,
    )
    quiet_transformers()
    if harness:
        _run_harness(settings, str(harness_tasks), include_path, limit, out, as_json)
        return
    _run_tasks(settings, out, resume, as_json, html)


def _parse_data(texts: tuple[str, ...], tasks: tuple[str, ...]) -> tuple[tuple[str, Path], ...]:
    """Returns the files of --data by task; a bare FILE belongs to the one task that reads a file."""
    from kvrewrite.tools.evaluation.cells import reads_file

    reading, found = [task for task in tasks if reads_file(task)], {}
    for text in texts:
        name, sign, file = text.partition("=")
        if not (sign and reads_file(name)):
            if len(reading) != 1:
                raise OptionError(f"--data {text}: which task is it for? Give --data TASK=FILE")
            name, file = reading[0], text
        if name in found:
            raise OptionError(f"--data for {name} is given twice")
        if not Path(file).is_file():
            raise OptionError(f"--data {file}: there is no such file")
        found[name] = Path(file)
    return tuple(found.items())


def _parse_shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    number, sign, shards = text.partition("/")
    if not (sign and number.isdecimal() and shards.isdecimal() and int(number) < int(shards)):
        raise OptionError(f"--shard {text}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(number), int(shards)


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


def _run_tasks(settings: Any, out: Path | None, resume: bool, as_json: bool, html: Path | None) -> None:
    from kvrewrite.tools.evaluation.page import page
    from kvrewrite.tools.evaluation.report import tables
    from kvrewrite.tools.evaluation.run import evaluate as run

    started = time.perf_counter()
    try:
        with long_bar() as progress:
            results = run(settings, out=out, resume=resume, progress=progress, warn=warn)
    except KeyboardInterrupt:
        if out is not None and out.exists():
            click.echo(f"{out} keeps what is done; the same command with --resume continues", err=True)
        raise
    if html is not None:
        html.write_text(page(results), encoding="utf-8")
    if as_json:
        print_json(results)
        return
    print_tables(*tables(results, stdout_console().width))
    where = f"; {out}" if out is not None else ""
    click.echo(f"{len(results['cells'])} cells in {time.perf_counter() - started:.0f} s{where}", err=True)


def _run_harness(
    settings: Any, names: str, include: Path | None, limit: int | None, out: Path | None, as_json: bool
) -> None:
    from kvrewrite.tools.evaluation.harness import run, table

    with long_bar() as progress:
        results = run(
            settings,
            [n.strip() for n in names.split(",") if n.strip()],
            include_path=include,
            limit=limit,
            out=out,
            progress=progress,
        )
    if as_json:
        print_json(results)
        return
    shown, notes = table(results)
    stdout_console().print(shown)
    for note in notes:
        click.echo(note)
