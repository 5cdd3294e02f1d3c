"""The command line: each command is a module of this package, a thin layer over the Python API.

Machine output (--json), generated text and the tables that a command is asked for go to stdout. Progress, other tables
and errors go to stderr. Exit status: 0 success, 1 refused or failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib

import click

from kvrewrite import __version__

# Each command's module, which has a function of the same name.
COMMANDS = {
    "bench": "bench",
    "chat": "chat",
    "convert": "convert",
    "demo": "demo",
    "doctor": "doctor",
    "eval": "evaluate",
    "generate": "generate",
    "import-weights": "import_weights",
    "inspect": "inspect",
    "plot": "plot",
    "policies": "policies",
    "prefill": "prefill",
    "report": "report",
    "search-patterns": "search_patterns",
    "serve": "serve",
    "train": "train",
    "verify": "verify",
}


class LazyGroup(click.Group):
    """Imports a command's module only when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns the command of that name, None if there is none."""
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = getattr(importlib.import_module(f"kvrewrite.cli.{module}"), module)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes each command's first sentence in full; click cuts it to a line."""
        found = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, c.get_short_help_str(limit=200)) for name, c in found.items() if c is not None])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvrewrite")
def main() -> None:
    """Puts KV-cache eviction into decoder LLMs."""
