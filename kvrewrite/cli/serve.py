"""The command `kvrewrite serve`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from kvrewrite.cli.options import parse_bytes
from kvrewrite.cli.shared import Command, find_device
from kvrewrite.cli.shared import waiting as shown_waiting


@click.command(cls=Command)
@click.argument("directory")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen at. There is no authentication."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option(
    "--name", "--served-model-name", "name", help="What clients call the model; default: the name of the directory."
)
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
    "--max-requests",
    "--max-num-seqs",
    "max_requests",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Answers that are made at the same time; further requests wait.",
)
@click.option(
    "--memory",
    "memory_text",
    metavar="SIZE",
    help="Memory for what requests keep, such as 8GiB, taken at the start. Default: 80% of what is free on a GPU; on a CPU as "
    "much as is needed.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Tokens of prompts that are computed between two tokens of the answers; fewer: steadier streams.",
)
@click.option(
    "--prefixes",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Common beginnings of prompts that are kept, while there is memory; 0: none.",
)
@click.option(
    "--documents",
    type=click.Path(path_type=Path),
    help="A folder with files *.kvcache of kvrewrite prefill, which requests may name.",
)
@click.option(
    "--waiting",
    type=click.IntRange(min=1),
    default=128,
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
    max_requests: int,
    memory_text: str | None,
    prompt_tokens: int,
    prefixes: int,
    documents: Path | None,
    waiting: int,
    max_prompt_tokens: int,
    max_connections: int,
    grace_seconds: float,
) -> None:
    """Serves the converted model in DIRECTORY with OpenAI's API (chat completions, completions, models).

    Many requests run at once, and each has the answer that it has alone; /metrics says how many, for Prometheus.

    \b
    Examples:
      kvrewrite serve small --port 8000 --documents books/
      kvrewrite serve small --device cuda --compile --memory 40GiB
    """
    import importlib.util

    if compiled and trust_compiled:
        raise click.UsageError(
            "--compile compiles here, --trust-compiled loads what was compiled before; give one of them"
        )
    from kvrewrite.artifact import directory as artifact
    from kvrewrite.errors import OptionError

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError(
            "serve runs in one process; over several GPUs: vllm serve DIRECTORY --tensor-parallel-size N (docs/vllm.md)"
        )
    missing = [
        m
        for m in ("starlette", "uvicorn", "pydantic", "jinja2", "prometheus_client")
        if importlib.util.find_spec(m) is None
    ]
    if missing:
        raise OptionError(f"kvrewrite serve needs {', '.join(missing)}: pip install 'kvrewrite[serve]'")
    artifact.read_manifest(directory)
    from kvrewrite import api, serving
    from kvrewrite.artifact.companions import read_tokenizer

    where = find_device(device)
    tokenizer = read_tokenizer(directory)
    with shown_waiting("loading the model"):
        model = api.load(directory, device=where, trust_compiled=trust_compiled)
    if compiled:
        model.compile()
    limits = serving.Limits(connections=max_connections, grace_seconds=grace_seconds)
    limits.check(waiting, max_requests)
    engine = serving.Engine(
        model,
        tokenizer,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        waiting=waiting,
        capacity=serving.Capacity(
            max_requests=max_requests,
            memory=serving.free_share(where) if memory_text is None else parse_bytes(memory_text, "--memory"),
            prompt_tokens=prompt_tokens,
            prefixes=prefixes,
        ),
        documents=documents,
    )
    if compiled:
        click.echo("compiling, and capturing steps of 1, 2, 4, ... answers: half a minute or more", err=True)
        engine.warm_up()
    serving.serve(engine, name or Path(directory).resolve().name, host=host, port=port, limits=limits)
