"""The command `kvrewrite import-weights`."""

from __future__ import annotations

from pathlib import Path

import click

from kvrewrite.cli.options import AS_JSON
from kvrewrite.cli.shared import Command, print_json


@click.command("import-weights", cls=Command)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The safetensors file to write.")
@click.option("--policy", "-p", help="Whose format SOURCE has, as its authors publish it; checked then.")
@click.option("--force", is_flag=True, help="Overwrite it.")
@AS_JSON
def import_weights(source: Path, out: Path, policy: str | None, force: bool, as_json: bool) -> None:
    """Turns published trained heads into safetensors for --policy-weights. Nothing in a pickle is run.

    With --policy: the file that the policy's authors publish, or its directory; `kvrewrite policies NAME` says which file
    that is. Without: any torch pickle of tensors, under the names that it has.

    \b
    Examples:
      kvrewrite import-weights heads.bin --policy locret --out heads.safetensors
      kvrewrite import-weights KVzap-mlp/ -p kvzap --out kvzap.safetensors
    """
    metadata: dict[str, str] = {}
    if policy is None:
        from kvrewrite.artifact.policy_weights import import_pickle

        tensors = import_pickle(source, out, force=force)
    else:
        from kvrewrite.artifact.published import import_published

        tensors, metadata = import_published(source, out, policy, force=force)
    if as_json:
        shapes = {n: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for n, t in tensors.items()}
        print_json({"out": str(out), "tensors": shapes, **({"metadata": metadata} if metadata else {})})
    else:
        if metadata:
            click.echo(", ".join(f"{k} {v}" for k, v in metadata.items()))
        click.echo(f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} values: {out}")
