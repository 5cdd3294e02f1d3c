"""The command `kvrewrite demo`."""

from __future__ import annotations

from pathlib import Path

import click

from kvrewrite.cli.shared import Command


@click.command(cls=Command)
@click.option("--out", type=click.Path(path_type=Path), help="Keep the models in this directory.")
@click.option("--force", is_flag=True, help="Replace an earlier demo in --out.")
def demo(out: Path | None, force: bool) -> None:
    """Converts the small model that ships with kvrewrite and compares policies on it: offline, on a CPU, in a minute.

    \b
    Examples:
      kvrewrite demo
      kvrewrite demo --out demo
    """
    from kvrewrite.tools.demo import run

    run(out, force=force)
