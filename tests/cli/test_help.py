"""What each command's --help shows."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from kvrewrite.cli import app, policies
from kvrewrite.policies import POLICIES


@pytest.mark.parametrize("command", app.COMMANDS)
def test_two_examples(command: str) -> None:
    done = CliRunner().invoke(app.main, [command, "--help"])
    assert done.exit_code == 0
    examples = done.output.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(examples) == 2 and all(line.startswith(f"    kvrewrite {command}") for line in examples), done.output
    assert max(map(len, examples)) <= 80
    assert max(map(len, done.output.splitlines())) <= 80
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


@pytest.mark.parametrize("command", app.COMMANDS)
def test_each_option_is_explained(command: str) -> None:
    said = app.main.get_command(click.Context(app.main), command)
    assert said is not None
    options = [option for option in said.params if isinstance(option, click.Option)]
    assert not [option.name for option in options if not option.help]


def test_the_table_of_policies_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "stdout_console", lambda: Console(width=80))
    output = CliRunner().invoke(app.main, ["policies"]).output
    assert max(map(len, output.splitlines())) <= 80
    needing = {name for name, policy in POLICIES.items() if policy.needs_weights}
    for name in POLICIES:
        assert f"│ {name}{' *' if name in needing else ''} " in output
    words = {word for policy in POLICIES.values() for word in policy.summary.split()}
    assert not {word for word in words if word not in output}  # none is cut
