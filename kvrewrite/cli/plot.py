"""The command `kvrewrite plot`."""

from __future__ import annotations

from pathlib import Path

import click

from kvrewrite.cli.options import DTYPES, model_directory, parse_budget, parse_policies
from kvrewrite.cli.shared import Command, check_directory, find_device, quiet_transformers
from kvrewrite.errors import ArtifactError, OptionError


@click.command(cls=Command)
@click.argument("source", required=False)
@click.option(
    "--kind",
    type=click.Choice(["accuracy", "memory", "eviction", "retention"]),
    default="accuracy",
    show_default=True,
    help="accuracy against budget, memory against context, what each head evicts, or which positions a prompt keeps.",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The PNG file to write.")
@click.option(
    "--task",
    "-t",
    "tasks",
    multiple=True,
    help="accuracy and eviction: only these tasks; repeatable. Default: their mean.",
)
@click.option(
    "--policy",
    "-p",
    "policy_texts",
    multiple=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="memory and retention: a policy; repeatable. accuracy and eviction: only these.",
)
@click.option("--budget", "-b", "budget_text", help="memory and retention: part of the cache (0.25) or slots (1024).")
@click.option(
    "--prompt-file", type=click.Path(allow_dash=True), help="retention: a file with the prompt; - reads stdin."
)
@click.option("--context", "contexts", type=click.IntRange(min=1), multiple=True, help="memory: context lengths.")
@click.option("--policy-weights", multiple=True, metavar="NAME=FILE", help="As in `kvrewrite eval`.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", type=DTYPES, default="auto", show_default=True, help="auto: the checkpoint's own.")
@click.option("--force", is_flag=True, help="Replace --out.")
def plot(
    source: str | None,
    kind: str,
    out: Path,
    tasks: tuple[str, ...],
    policy_texts: tuple[str, ...],
    budget_text: str | None,
    prompt_file: str | None,
    contexts: tuple[int, ...],
    policy_weights: tuple[str, ...],
    device: str,
    dtype: str,
    force: bool,
) -> None:
    """Draws results as a PNG.

    SOURCE: the JSON file of `kvrewrite eval` for --kind accuracy and eviction; that or a model directory for --kind memory
    (measured, or estimated for --context and --policy); a model directory for --kind retention. Without it, the small model.

    \b
    Examples:
      kvrewrite plot results.json --out accuracy.png
      kvrewrite plot MODEL --kind memory -p h2o --context 131072 --out plan.png
    """
    from kvrewrite.tools.evaluation import plots
    from kvrewrite.tools.plotting import require_matplotlib

    require_matplotlib()
    if out.suffix.lower() != ".png":
        raise OptionError(f"--out {out}: expected a name that ends in .png")
    if out.exists() and not force:
        raise ArtifactError(f"{out} exists; replace it with --force")
    check_directory("--out", out)
    is_results = source is not None and Path(source).is_file()
    if kind in ("accuracy", "eviction") or (kind == "memory" and is_results):
        if not is_results:
            raise click.UsageError(f"--kind {kind} needs the JSON file that `kvrewrite eval --out` wrote")
        from kvrewrite.tools.evaluation.cells import read_results

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
    from kvrewrite.tools.subjects import Source, beside_baseline

    quiet_transformers()
    found = Source(model_directory(source), device=find_device(device), dtype=dtype)
    chosen = beside_baseline(specs, [] if budget is None else [budget])
    if kind == "memory":
        plots.estimated_memory(found, chosen, list(contexts) or [2**n for n in range(10, 18)], out)
    else:
        if prompt_file is None:
            raise click.UsageError("--kind retention needs --prompt-file")
        with click.open_file(prompt_file, encoding="utf-8") as file:
            prompt = file.read()
        plots.retention(found, chosen, prompt, out)
    click.echo(str(out), err=True)
