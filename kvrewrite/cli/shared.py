"""What commands share: one-message errors, consoles, progress bars, devices."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvrewrite.errors import ArtifactError, KVRewriteError, OptionError
from kvrewrite.ir.waits import untold

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table


# What they warn of at import is between these packages, and would stand before our own output.
THEIRS = ("torchao", "torch.utils._pytree")


class Command(click.Command):
    """A command whose errors are one message and an exit status, not a traceback."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for option in self.params:  # --help says N, not "INTEGER RANGE"; the range stands after the text
            if option.metavar is None and isinstance(option.type, click.types.IntParamType):
                option.metavar = "N"
            elif option.metavar is None and isinstance(option.type, click.types.FloatParamType):
                option.metavar = "X"

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"copyreg|torch\..*")
        for name in THEIRS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            return super().invoke(ctx)
        except KVRewriteError as error:
            self._fail(ctx, error, str(error))
        except KeyboardInterrupt:
            click.echo("interrupted; nothing half-written was left", err=True)
            ctx.exit(130)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            self._fail(ctx, error, str(error))

    @staticmethod
    def _fail(ctx: click.Context, error: Exception, message: str) -> None:
        if ctx.params.get("as_json"):
            click.echo(json.dumps({"error": message, "type": type(error).__name__}))
        click.echo(f"error: {message}", err=True)
        ctx.exit(1)


def check_directory(option: str, path: Path) -> None:
    """Raises ArtifactError where a file that an option names can't be written, because its directory is not there."""
    if not path.resolve().parent.is_dir():
        raise ArtifactError(f"{option} {path}: its directory does not exist; make it first")


def print_tables(tables: Iterable[Table], notes: Iterable[str]) -> None:
    """Prints tables, and their numbered notes."""
    console = stdout_console()
    for table in tables:
        console.print(table)
    for i, note in enumerate(notes, 1):
        click.echo(f"[{i}] {note}")


def stderr_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def stdout_console() -> Console:
    """Returns a console for stdout: as wide as the terminal, 100 columns in files and pipes."""
    import sys

    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, allow_nan=False))


@contextmanager
def named_steps(total: int) -> Iterator[Callable[[str], None]]:
    """Shows a progress bar of named steps on stderr."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    console = stderr_console()
    shown = untold() if console.is_terminal else contextlib.nullcontext()
    with shown, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=total + 1)

        def step(name: str) -> None:
            progress.update(task, advance=1, description=name)

        yield step


@contextmanager
def waiting(what: str) -> Iterator[Status]:
    """Shows on stderr, if it is a terminal, what is being waited for; update() says what comes next, stop() ends it."""
    console = stderr_console()
    with untold() if console.is_terminal else contextlib.nullcontext(), console.status(what) as status:
        yield status


def settings_text(policy: dict[str, Any]) -> str:
    """Formats a policy's name, budget and chunk, and those of its options that are not the default."""
    from kvrewrite.policies import POLICIES

    kind = POLICIES.get(policy["name"])
    defaults = {} if kind is None else {f.name: f.default for f in dataclasses.fields(kind)}
    always = {"budget", "chunk", "positions"}
    shown = {k: v for k, v in policy["options"].items() if k in always or k not in defaults or v != defaults[k]}
    return f"{policy['name']} (" + ", ".join(f"{k}={v}" for k, v in shown.items()) + ")"


def find_device(name: str, option: str = "--device") -> Any:
    """Returns the device called `name`, if it is available; option: the option that named it."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            f"{option} {name}: {str(error).splitlines()[0]} (kvrewrite doctor says what is there)"
        ) from error
    return device


@contextmanager
def long_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Shows a progress bar on stderr with the remaining time; call it with (what, done, of)."""
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

    from kvrewrite.cli.shared import stderr_console

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr_console(), transient=True, speed_estimate_period=300) as progress:
        task = progress.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=escape(what), completed=done, total=max(1, total))

        yield report


def warn(message: str) -> None:
    click.echo(f"warning: {message}", err=True)


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
