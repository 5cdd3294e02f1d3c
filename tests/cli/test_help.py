"""What each command's --help shows."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from kvrewrite.cli import app


@pytest.mark.parametrize("command", app.COMMANDS)
def test_two_examples(command: str) -> None:
    done = CliRunner().invoke(app.main, [command, "--help"])
    assert done.exit_code == 0
    examples = done.output.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(examples) == 2 and all(line.startswith(f"    kvrewrite {command}") for line in examples), done.output
    assert max(map(len, examples)) <= 100
    said = app.main.get_command(click.Context(app.main), command)
    assert said is not None
    for line in examples:  # which name options that are there
        words = [word.strip("'\"") for word in line.split() if word.startswith("-") and word != "-"]
        options = {name for option in said.params for name in option.opts}
        assert set(words) <= options, line


def test_completion_knows_commands_and_options() -> None:
    environment = {"_KVREWRITE_COMPLETE": "bash_complete", "COMP_WORDS": "kvrewrite conv", "COMP_CWORD": "1"}
    done = CliRunner().invoke(app.main, prog_name="kvrewrite", env=environment)
    assert "plain,convert" in done.output


def test_the_list_of_commands_is_not_cut() -> None:
    done = CliRunner().invoke(app.main, ["--help"])
    assert "..." not in done.output.partition("Commands:")[2]
    assert all(f"  {command} " in done.output for command in app.COMMANDS)
