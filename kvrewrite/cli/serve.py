"""The command `kvrewrite serve`."""

from __future__ import annotations

from pathlib import Path

import click

from kvrewrite.cli.shared import Command, find_device


@click.command(cls=Command)
@click.argument("directory")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen at. There is no authentication."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--name", help="What clients call the model; default: the name of the directory.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--compile", "compiled", is_flag=True, help="Compile the model (slow first requests, fast later ones).")
@click.option(
    "--trust-compiled",
    is_flag=True,
    help="Load the steps that DIRECTORY has compiled (convert --compile aot): native code, so only from whom you trust.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="The most tokens that an answer may have.",
)
@click.option(
    "--waiting",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Requests that may wait; one more gets an error (429).",
)
@click.option(
    "--max-prompt-tokens",
    type=click.IntRange(min=1),
    default=32768,
    show_default=True,
    help="The most tokens that a prompt may have; it limits the size of requests, too.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Open connections; beyond that the one that has idled longest is closed.",
)
@click.option(
    "--grace-seconds",
    type=click.FloatRange(min=0),
    default=8,
    show_default=True,
    help="What SIGTERM leaves to the requests that are there; the rest get an error (503). A second one ends at once.",
)
def serve(
    directory: str,
    host: str,
    port: int,
    name: str | None,
    device: str,
    compiled: bool,
    trust_compiled: bool,
    max_new_tokens: int,
    waiting: int,
    max_prompt_tokens: int,
    max_connections: int,
    grace_seconds: float,
) -> None:
    """Serves the converted model in DIRECTORY with OpenAI's API (chat completions, completions, models).

    Requests run one after another, each with a cache of its own; see /health for how many wait.
    """
    import importlib.util

    if compiled and trust_compiled:
        raise click.UsageError(
            "--compile compiles here, --trust-compiled loads what was compiled before; give one of them"
        )
    from kvrewrite.artifact import directory as artifact
    from kvrewrite.errors import OptionError

    missing = [m for m in ("starlette", "uvicorn", "pydantic", "jinja2") if importlib.util.find_spec(m) is None]
    if missing:
        raise OptionError(f"kvrewrite serve needs {', '.join(missing)}: pip install 'kvrewrite[serve]'")
    artifact.read_manifest(directory)
    from kvrewrite import api, serving
    from kvrewrite.artifact.companions import read_tokenizer

    where = find_device(device)
    tokenizer = read_tokenizer(directory)
    model = api.load(directory, device=where, trust_compiled=trust_compiled)
    if compiled:
        model.compile()
    limits = serving.Limits(connections=max_connections, grace_seconds=grace_seconds)
    limits.check(waiting)
    engine = serving.Engine(
        model, tokenizer, max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens, waiting=waiting
    )
    serving.serve(engine, name or Path(directory).resolve().name, host=host, port=port, limits=limits)
