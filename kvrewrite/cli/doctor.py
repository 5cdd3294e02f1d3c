"""The command `kvrewrite doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from kvrewrite.cli.options import AS_JSON
from kvrewrite.cli.shared import Command, print_json, stdout_console

STYLES = {"ok": "green", "slow": "yellow", "missing": "dim", "wrong": "red"}


@click.command(cls=Command)
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@AS_JSON
def doctor(directory: Path | None, as_json: bool) -> None:
    """Says what this machine can run, and what would be slow and why.

    DIRECTORY: a converted model; then also what of it would run slowly. The exit status is 1 if something is wrong.

    \b
    Examples:
      kvrewrite doctor
      kvrewrite doctor small
    """
    if directory is not None:
        from kvrewrite.artifact.directory import read_manifest

        read_manifest(directory)  # a wrong name fails before torch is loaded
    from kvrewrite.tools.doctor import examine

    found, seen = examine(directory), set[str]()
    if as_json:
        print_json([finding.as_dict() for finding in found])
    else:
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        for finding in found:
            new = finding.area not in seen
            seen.add(finding.area)
            state = Text(finding.state, style=STYLES[finding.state])
            grid.add_row(Text(finding.area if new else "", style="bold"), state, Text(finding.text))
        stdout_console().print(grid)
    if any(finding.state == "wrong" for finding in found):
        raise click.exceptions.Exit(1)
