"""The command line: `kvrewrite COMMAND ...`, also as `python -m kvrewrite.cli`."""


def main() -> None:
    """Runs the command line of this process."""
    from kvrewrite.cli.app import main as run

    run()
