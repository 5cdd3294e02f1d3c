"""The command `kvrewrite report`."""

from __future__ import annotations

from pathlib import Path

import click

from kvrewrite.cli.shared import Command, print_tables, stdout_console
from kvrewrite.errors import ArtifactError

PLACE = click.Path(path_type=Path, dir_okay=False)


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--markdown", "markdown_out", type=PLACE, help="Write tables of policies over budgets.")
@click.option(
    "--beside",
    metavar="POLICY",
    help="With --markdown: tables of paired differences to this policy, at the same budget.",
)
@click.option("--html", type=PLACE, help="Write a page with curves, tables and heat maps.")
@click.option("--out", type=PLACE, help="Write the results of all files as one.")
@click.option("--force", is_flag=True, help="Replace what is there.")
def report(
    files: tuple[Path, ...],
    markdown_out: Path | None,
    beside: str | None,
    html: Path | None,
    out: Path | None,
    force: bool,
) -> None:
    """Puts results of `kvrewrite eval` together and shows them.

    FILES: those of its --out, for one model: shards of a run, or runs with other policies, budgets, modes or tasks. A
    cell that ran counts before one that was refused. Each is compared with the full cache of any of the files.

    \b
    Examples:
      kvrewrite report part0.json part1.json --out results.json
      kvrewrite report results.json --markdown results.md
    """
    from kvrewrite.tools.evaluation.cells import join_results, read_results
    from kvrewrite.tools.evaluation.markdown import markdown
    from kvrewrite.tools.evaluation.page import page
    from kvrewrite.tools.evaluation.report import tables
    from kvrewrite.tools.subjects import write_json

    if beside is not None and markdown_out is None:
        raise click.UsageError("--beside makes tables of --markdown; give that, too")
    for path in (markdown_out, html, out):
        if path is not None and path.exists() and not force:
            raise ArtifactError(f"{path} exists; replace it with --force")
    results = join_results([read_results(path) for path in files], [str(path) for path in files])
    if out is not None:
        write_json(out, results)
    if markdown_out is not None:
        markdown_out.write_text(markdown(results, beside), encoding="utf-8")
    if html is not None:
        html.write_text(page(results), encoding="utf-8")
    print_tables(*tables(results, stdout_console().width))
