"""The command `kvrewrite inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvrewrite.cli.options import AS_JSON, parse_budget, parse_options
from kvrewrite.cli.shared import Command, print_json, settings_text, stderr_console, stdout_console
from kvrewrite.errors import ArtifactError

if TYPE_CHECKING:
    from rich.console import Console

    from kvrewrite.tools.inspection.code import Group, SiteCode
    from kvrewrite.tools.inspection.gather import Inspection

LEGEND = (
    "B rows, T new tokens; parameters are those of the site's module. The code is for reading: arguments that say that "
    "something is not there (None, a window of 0) are left out."
)


@click.command(cls=Command)
@click.argument("model")
@click.option("--policy", "-p", help="Also show what this policy's insertion does. See `kvrewrite policies`.")
@click.option("--option", "-o", "options", multiple=True, metavar="KEY=VALUE", help="An option of the policy.")
@click.option("--budget", help="As in `kvrewrite convert`.")
@click.option("--chunk", type=int, help="As in `kvrewrite convert`.")
@click.option("--policy-weights", type=click.Path(path_type=Path), help="As in `kvrewrite convert`.")
@click.option("--site", type=click.IntRange(min=0), metavar="LAYER", help="Show the code of this attention site only.")
@click.option("--no-code", is_flag=True, help="Only the table of sites.")
@click.option(
    "--graph", is_flag=True, help="Also print the whole graph: canonical, or the rewritten one of a converted model."
)
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write a report: memory plan, cost model, code, passes, in one HTML file.",
)
@click.option(
    "--context", type=click.IntRange(min=1), help="With --html: tokens of the memory plan; default the longest."
)
@click.option("--force", is_flag=True, help="Replace --html's file.")
@click.option("--max-length", type=int, help="As in `kvrewrite convert`.")
@AS_JSON
def inspect(
    model: str,
    policy: str | None,
    options: tuple[str, ...],
    budget: str | None,
    chunk: int | None,
    policy_weights: Path | None,
    site: int | None,
    no_code: bool,
    graph: bool,
    page: Path | None,
    context: int | None,
    force: bool,
    max_length: int | None,
    as_json: bool,
) -> None:
    """Shows every attention site that is found in MODEL, a checkpoint or a converted directory, without its weights.

    Then the graph around each site as Python, before and after the policy and its cache went in; sites that do the same
    are shown once.

    \b
    Examples:
      kvrewrite inspect MODEL --no-code
      kvrewrite inspect MODEL --policy h2o --budget 1024 --html report.html
    """
    from kvrewrite import policies
    from kvrewrite.artifact import directory as artifact
    from kvrewrite.artifact.checkpoint import read_json
    from kvrewrite.artifact.local_directory import checkpoint_directory
    from kvrewrite.tools.tables import escaped, sites_table

    if policy is None and (options or budget or chunk is not None or policy_weights is not None):
        raise click.UsageError("--option, --budget, --chunk and --policy-weights need --policy")
    if page is None and (context is not None or force):
        raise click.UsageError("--context and --force need --html")
    if page is not None and page.exists() and not force:
        raise ArtifactError(f"{page} exists; replace it with --force")
    if page is not None and not page.parent.is_dir():
        raise ArtifactError(f"--html {page}: {page.parent} is not a directory; make it first")
    directory = checkpoint_directory(model)
    chosen = None
    if policy is not None:
        given = parse_options(policy, options, budget=None if budget is None else parse_budget(budget), chunk=chunk)
        chosen = policies.make(policy, **given)
    converted = artifact.is_artifact(directory)
    # A foreign module can't be compiled again; its sites are in the manifest.
    foreign = converted and chosen is None and not read_json(directory / "config.json").get("model_type")
    stored = converted and chosen is None and page is None and (no_code or foreign)
    data: dict[str, Any] = {"model": model, "policy": None}
    found: Inspection | None = None
    if stored:
        from kvrewrite.ir.site import AttentionSite

        manifest = artifact.read_manifest(directory)
        sites, data["policy"] = [AttentionSite.from_dict(s) for s in manifest["sites"]], manifest["policy"]
    else:
        from kvrewrite.tools.inspection.gather import inspect_directory

        with stderr_console().status("compiling") as status:
            found = inspect_directory(
                directory, chosen, policy_weights=policy_weights, max_length=max_length, progress=status.update
            )
        sites = found.sites
        if found.policy is not None:
            data["policy"] = {"name": found.policy.name, "options": found.policy.options()}
    text = None
    if graph:
        text = str(artifact.read_artifact(directory)[0].graph.graph) if converted else found and str(found.graph)
    data["sites"] = [s.as_dict() for s in sites]
    if page is not None and found is not None:
        from kvrewrite.tools.inspection.html import report

        page.write_text(report(found, context), encoding="utf-8")
        data["html"] = str(page)
    groups: list[Group] = []
    if found is not None and not no_code:
        groups = found.groups if site is None else [found.group_of(site)]
        data["code"] = [g.as_dict() for g in groups]
        data["passes"] = [vars(p) for p in found.passes]
    if text:
        data["graph"] = text
    if as_json:
        print_json(data)
        return
    console = stdout_console()
    console.print(sites_table(sites))
    if data["policy"]:
        console.print(f"policy: {escaped(settings_text(data['policy']))}", soft_wrap=True)
    for group in groups:
        _print_group(console, group)
    if groups:
        console.print(f"\n{LEGEND}")
    elif foreign and not no_code:
        console.print("the code of a module that is not from transformers can't be shown again; --graph has its graph")
    if page is not None:
        console.print(f"written: {escaped(str(page))}", soft_wrap=True)
    if text:
        click.echo(text)


def _print_group(console: Console, group: Group) -> None:
    """Prints the code of one kind of site."""
    from rich.rule import Rule
    from rich.text import Text

    console.print()
    console.print(Rule(Text(group.title), align="left"))
    _print_code(console, "before", group.before, marks=False)
    if group.after is not None:
        _print_code(console, "after", group.after, marks=True)


def _print_code(console: Console, title: str, side: SiteCode, marks: bool) -> None:
    from rich.syntax import Syntax
    from rich.text import Text

    new = "; + is what the compiler put there" if marks else ""
    console.print(Text(f"# {title}: {side.module or 'the model'}{new}", style="bold"), soft_wrap=True)
    syntax = Syntax("", "python", background_color="default")
    for row in side.text(marks).splitlines():
        mark, code = (row[:2], row[2:]) if marks else ("", row)
        line = Text(mark, style="green") + syntax.highlight(code)
        line.rstrip()
        console.print(line, soft_wrap=True)
