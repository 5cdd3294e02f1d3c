"""The command `kvrewrite prefill`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from kvrewrite.cli.options import TRUST
from kvrewrite.cli.shared import Command, find_device, waiting
from kvrewrite.errors import OptionError


@click.command(cls=Command)
@click.argument("directory")
@click.option("--document", required=True, type=click.Path(allow_dash=True), help="A file of text; - reads stdin.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--force", is_flag=True, help="Replace --out if it is there.")
@TRUST
def prefill(directory: str, document: str, out: Path, device: str, force: bool, trust_compiled: bool) -> None:
    """Compresses a document once with the converted model in DIRECTORY, into a file that is asked many times.

    kvrewrite generate DIRECTORY --cache OUT asks it.

    \b
    Examples:
      kvrewrite prefill small --document book.txt --out book.kvcache
      kvrewrite prefill small --document - --out book.kvcache < book.txt
    """
    with click.open_file(document, encoding="utf-8") as file:
        text = file.read()
    from kvrewrite.artifact import directory as artifact
    from kvrewrite.errors import ArtifactError

    artifact.read_manifest(directory)
    if out.is_dir() or (out.exists() and not force):  # before the work, not after it
        raise ArtifactError(f"{out} exists; choose another name, or replace it with --force")
    from kvrewrite import api
    from kvrewrite.artifact.companions import read_tokenizer
    from kvrewrite.cache.memory import human

    where = find_device(device)
    ids = read_tokenizer(directory)(text, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise OptionError(f"--document {document}: no tokens; expected some text")
    with waiting("loading the model"):
        model = api.load(directory, device=where, trust_compiled=trust_compiled)
    started = time.perf_counter()
    with waiting(f"reading {ids.shape[1]} tokens"):
        cache = model.prefill(ids.to(where))
    cache.save(out, force=force)
    seconds = time.perf_counter() - started
    click.echo(f"saved {ids.shape[1]} tokens in {human(out.stat().st_size)} to {out}, in {seconds:.1f} s", err=True)
