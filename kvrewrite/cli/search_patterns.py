"""The command `kvrewrite search-patterns`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from kvrewrite.cli.options import AS_JSON, DTYPES
from kvrewrite.cli.shared import Command, find_device, long_bar, print_json, quiet_transformers, stdout_console
from kvrewrite.errors import OptionError


@click.command("search-patterns", cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "-d",
    "data",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Text or .jsonl; repeatable. Long texts, of the kind that prompts will be.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file of patterns to write.")
@click.option(
    "--tokens",
    type=click.IntRange(min=65),
    default=8192,
    show_default=True,
    help="The most tokens of the texts that are read.",
)
@click.option(
    "--share", type=float, default=0.1, show_default=True, help="What a head may take of the work of dense attention."
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", type=DTYPES, default="auto", show_default=True, help="auto: the checkpoint's own.")
@click.option("--force", is_flag=True, help="Replace --out.")
@AS_JSON
def search_patterns(
    model: Path,
    data: tuple[Path, ...],
    out: Path,
    device: str,
    dtype: str,
    force: bool,
    as_json: bool,
    **limits: Any,
) -> None:
    """Chooses for each head of MODEL which part of a prompt's attention it computes (docs/sparse_prefill.md).

    The file goes to `kvrewrite convert --prefill minference --patterns FILE`.

    \b
    Examples:
      kvrewrite search-patterns MODEL --data texts.jsonl --out patterns.json
      kvrewrite search-patterns MODEL -d texts.jsonl --out p.json --device cuda
    """
    if out.exists() and not force:
        raise OptionError(f"{out} exists; choose another name, or overwrite it with --force")
    where = find_device(device)
    tokens, share = limits["tokens"], limits["share"]
    quiet_transformers()
    from kvrewrite.artifact.companions import read_original
    from kvrewrite.artifact.head_patterns import write_patterns
    from kvrewrite.tools.pattern_search import read_ids, search_patterns

    network, tokenizer = read_original(model, dtype, "search on the original, then convert it with the patterns")
    ids = read_ids(tokenizer, data, tokens).to(where)
    started = time.perf_counter()
    with long_bar() as bar:
        found = search_patterns(network.to(where).eval(), ids, share, bar)
    seconds = round(time.perf_counter() - started, 1)
    about = {"model": model.name, "tokens": ids.shape[1], "share": share}
    about |= {"errors": {str(i): e for i, e in found.errors.items()}}
    about |= {"shares": {str(i): s for i, s in found.shares.items()}}
    write_patterns(out, found.patterns, about)
    heads = [head for layer in found.patterns.values() for head in layer]
    kinds = {kind: sum(head.kind == kind for head in heads) for kind in sorted({head.kind for head in heads})}
    errors, shares = ([x for layer in part.values() for x in layer] for part in (found.errors, found.shares))
    result = {
        "out": str(out), "heads": kinds, "error": sum(errors) / max(1, len(errors)),
        "share": sum(shares) / max(1, len(shares)), "tokens": ids.shape[1], "seconds": seconds,
    }  # fmt: skip
    if as_json:
        print_json(result)
        return
    counted = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    stdout_console().print(
        f"{counted}; mean error of a head's output {result['error']:.1%} at {result['share']:.1%} of the work, "
        f"{ids.shape[1]} tokens\nwritten in {seconds} s: {out}",
        soft_wrap=True,
    )
