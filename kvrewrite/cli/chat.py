"""The command `kvrewrite chat`."""

from __future__ import annotations

import sys
from typing import Any

import click

from kvrewrite.cli.options import TRUST
from kvrewrite.cli.shared import Command, find_device, waiting

HELP = "/memory: what the cache holds; /reset: begin again; /quit or Ctrl-D: end; Ctrl-C: stop an answer"


@click.command(cls=Command)
@click.argument("directory")
@click.option("--system", help="The system prompt.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="The most tokens of an answer."
)
@click.option("--sample", "--do-sample", "sample", is_flag=True, help="Sample instead of taking the likeliest token.")
@click.option("--temperature", type=float, help="With --sample.")
@click.option("--top-p", type=float, help="With --sample.")
@click.option("--seed", type=int, default=0, show_default=True, help="With --sample.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@TRUST
def chat(directory: str, system: str | None, device: str, trust_compiled: bool, **chosen: Any) -> None:
    """A conversation with the converted model in DIRECTORY, however long; answers on stdout, as they are made.

    Each line of stdin is a turn.

    \b
    Examples:
      kvrewrite chat small
      kvrewrite chat small --device cuda --sample --temperature 0.7
    """
    if not chosen["sample"] and (chosen["temperature"] is not None or chosen["top_p"] is not None):
        raise click.UsageError("--temperature and --top-p need --sample")
    from kvrewrite.artifact import directory as artifact

    artifact.read_manifest(directory)
    import torch
    from transformers import TextStreamer

    from kvrewrite import api
    from kvrewrite.artifact.companions import read_tokenizer
    from kvrewrite.runtime.chat import Chat

    where = find_device(device)
    tokenizer = read_tokenizer(directory)
    with waiting("loading the model"):
        model = api.load(directory, device=where, trust_compiled=trust_compiled)
    talk = Chat(model, tokenizer, system)
    options = {name: chosen[name] for name in ("temperature", "top_p") if chosen[name] is not None}
    torch.manual_seed(chosen["seed"])
    click.echo(HELP, err=True)
    while (line := _next_line()) is not None:
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            talk.reset()
        elif line == "/memory":
            click.echo(memory_line(talk), err=True)
        elif line.startswith("/"):
            click.echo(f"there is no command {line}; {HELP}", err=True)
        elif line:
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            limits = {"max_new_tokens": chosen["max_new_tokens"], "do_sample": chosen["sample"]}
            try:
                talk.ask(line, streamer=streamer, **limits, **options)
            except KeyboardInterrupt:
                click.echo("\n(stopped; the turn is forgotten)", err=True)


def _next_line() -> str | None:
    """The next turn, None at the end."""
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def memory_line(talk: Any) -> str:
    """What a conversation's cache holds."""
    from kvrewrite.cache.memory import human

    memory, cache = talk.memory(), talk.cache
    return (
        f"{max(cache.seen)} tokens so far, at most {max(cache.length)} per head held: {memory}; "
        f"{human(memory.checkpoints)} more for going back"
    )
