"""The command `kvrewrite policies`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from kvrewrite.cli.options import AS_JSON
from kvrewrite.cli.shared import Command, print_json, stdout_console
from kvrewrite.tools.tables import escaped

if TYPE_CHECKING:
    from rich.table import Table

    from kvrewrite.policies import Policy


def _policy_data(policy: type[Policy]) -> dict[str, Any]:
    from kvrewrite.policies.options import annotation

    options = {f.name: {"type": annotation(f), "default": f.default} for f in dataclasses.fields(policy)}
    return {
        "name": policy.name,
        "summary": policy.summary,
        "evicts": policy.evicts_when or None,
        "source": policy.source,
        "needs_weights": policy.needs_weights,
        "published": policy.published or None,
        "options": options,
    }


def _overview(data: list[dict[str, Any]]) -> Table:
    """A line for each policy, which fits 80 columns."""
    from rich.table import Table

    table = Table()
    table.add_column("policy", no_wrap=True)
    for title in ("what it keeps", "evicts"):
        table.add_column(title)
    table.add_column("source", overflow="fold", max_width=14)
    for d in data:
        name = d["name"] + (" *" if d["needs_weights"] else "")
        table.add_row(name, escaped(d["summary"]), escaped(d["evicts"] or "-"), d["source"].removeprefix("arXiv "))
    return table


@click.command(cls=Command)
@click.argument("name", required=False)
@AS_JSON
def policies(name: str | None, as_json: bool) -> None:
    """Lists the eviction policies, or describes one.

    \b
    Examples:
      kvrewrite policies
      kvrewrite policies snapkv
    """
    import inspect as inspection

    from rich.table import Table

    from kvrewrite.policies import ALIASES, POLICIES, make

    name = ALIASES.get(name, name) if name else None
    if name is not None and name not in POLICIES:
        make(name)  # raises, with the likely spelling
    chosen = [POLICIES[name]] if name else list(POLICIES.values())
    data = [_policy_data(p) for p in chosen]
    if as_json:
        print_json(data[0] if name else data)
        return
    console = stdout_console()
    if name is None:
        console.print(_overview(data))
        console.print("* needs trained weights: kvrewrite train, or those that its authors publish")
        console.print("A policy's options, defaults and paper: kvrewrite policies NAME")
        console.print("Which one? docs/guide/policies.md, or leave the choice to kvrewrite convert MODEL --memory SIZE")
        return
    console.print(inspection.cleandoc(chosen[0].__doc__ or ""), soft_wrap=True, markup=False)
    if chosen[0].evicts_when:
        console.print(f"Evicts: {chosen[0].evicts_when}", soft_wrap=True, markup=False)
    if chosen[0].published:
        text = f"Trained weights (kvrewrite import-weights FILE --policy {name}): {chosen[0].published}"
        console.print(text, soft_wrap=True, markup=False)
    table = Table()
    for title in ("option", "type", "default"):
        table.add_column(title)
    for option, value in data[0]["options"].items():
        table.add_row(option, value["type"], str(value["default"]))
    console.print(table)
