"""The command `kvrewrite verify`."""

from __future__ import annotations

import click

from kvrewrite.cli.options import AS_JSON
from kvrewrite.cli.shared import Command, find_device, long_bar, print_json, stdout_console
from kvrewrite.tools.tables import escaped


@click.command(cls=Command)
@click.argument("directory")
@click.option(
    "--tokens", type=click.IntRange(min=2), default=48, show_default=True, help="Length of the compared text."
)
@click.option("--no-hashes", is_flag=True, help="Do not hash the files.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@AS_JSON
def verify(directory: str, tokens: int, no_hashes: bool, device: str, as_json: bool) -> None:
    """Checks a converted model: file hashes, and logits against the unmodified model in the same directory.

    \b
    Examples:
      kvrewrite verify small
      kvrewrite verify small --tokens 256 --device cuda
    """
    from kvrewrite.artifact import directory as artifact

    artifact.read_manifest(directory)
    from transformers.utils import logging

    from kvrewrite.verification import verify as run

    logging.disable_progress_bar()  # this command has its own bar
    where = find_device(device)
    with long_bar() as progress:
        report = run(directory, tokens=tokens, hashes=not no_hashes, device=where, progress=progress)
    if as_json:
        print_json(report.as_dict())
    else:
        from rich.table import Table

        compared = f", compared in {report.compared_in}" if report.compared_in else ""
        title = f"{escaped(report.what)} ({report.dtype}{compared}, {report.sites} sites)"
        table = Table(title=title, title_justify="left")
        for name in ("check", "result", "max difference", "tolerance", "detail"):
            table.add_column(name, overflow="fold")
        results: dict[bool | None, str] = {
            True: "[green]ok[/]",
            False: "[red]FAILED[/]",
            None: "[yellow]not checked[/]",
        }
        for c in report.checks:
            numbers = ["-" if n is None else f"{n:.2e}" for n in (c.difference, c.tolerance)]
            table.add_row(c.name, results[c.ok], *numbers, escaped(c.detail))
        stdout_console().print(table)
        click.echo(f"{'ok' if report.ok else 'FAILED'} in {report.seconds:.1f} s")
    if not report.ok:
        failed = ", ".join(c.name for c in report.checks if c.ok is False)
        click.echo(f"error: verification failed: {failed}", err=True)
        raise click.exceptions.Exit(1)
