"""Tables for people: a model's attention sites, and the memory of its caches. Both fit 80 columns."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from kvrewrite.analysis.memory import MemoryPlan
    from kvrewrite.ir.site import AttentionSite

COLUMNS = ("layers", "heads", "kv heads", "head dim", "mask", "positions", "also")


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def ranges(numbers: Iterable[int]) -> str:
    """Formats numbers briefly: [0, 1, 2, 5] -> "0-2, 5"."""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def sites_table(sites: list[AttentionSite]) -> RenderableType:
    """Lists the attention sites; equal ones share a line. What all sites have in common stands under the table."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    notes = [_notes(site) for site in sites]
    common = [note for note in (notes[0] if notes else []) if all(note in others for others in notes)]
    groups: dict[tuple[str, ...], list[int]] = {}
    for site, own in zip(sites, notes):
        row = (*_cells(site), "; ".join(note for note in own if note not in common))
        groups.setdefault(row, []).append(site.layer)
    hidden = {"also"} if not any(row[-1] for row in groups) else set()
    table = Table(title=f"{len(sites)} attention sites", title_justify="left")
    for name in COLUMNS:
        if name not in hidden:
            number = name in ("heads", "kv heads", "head dim")
            table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row, layers in groups.items():
        alike = ": the same" if len(layers) > 1 else ""
        cells = [ranges(layers) + alike, *row]
        table.add_row(*(escaped(cell) for name, cell in zip(COLUMNS, cells) if name not in hidden))
    return Group(table, *(Text(f"  {note}") for note in common))


def _cells(site: AttentionSite) -> tuple[str, ...]:
    """A site's cells from "heads" to "positions"."""
    same = site.head_dim == site.v_head_dim
    return (
        str(site.heads),
        str(site.kv_heads),
        str(site.head_dim) if same else f"{site.head_dim}, v {site.v_head_dim}",
        f"{site.mask} {site.window or site.chunk}" if site.window or site.chunk else site.mask,
        " + ".join(["RoPE"] * site.rope + ["ALiBi"] * site.alibi) or "-",
    )


def _notes(site: AttentionSite) -> list[str]:
    """What else there is to say of a site, without its number: equal sites have equal notes."""
    notes = [f"module: {re.sub(r'(?<=[.])[0-9]+(?=[.]|$)', '*', site.module) or '(top)'}", f"found as: {site.source}"]
    notes.append(f"scale: {site.scale:.5g}")
    if site.softcap:
        notes.append(f"softcap: {site.softcap:g}")
    if site.sinks:
        notes.append("attention sinks")
    if site.latent:
        notes.append(f"latent: {site.latent} + {site.latent_rotary}{', cached' * site.latent_cached}")
    if site.shares_kv_with is not None:
        notes.append(f"keys and values of layer {site.shares_kv_with}")
    if site.inserted:
        notes.append(f"inserted: {', '.join(site.inserted)}")
    return notes


def memory_table(plans: list[MemoryPlan]) -> Table:
    """Lists estimated cache bytes by context length."""
    from rich.table import Table

    from kvrewrite.cache.memory import human

    table = Table(title=f"cache memory, estimated, batch {plans[0].batch}", title_justify="left")
    for name in ("context", "full cache", "evicted", "peak in prefill", "saved"):
        table.add_column(name, justify="right")
    for p in plans:
        saved = f"{1 - p.evicted / p.full:.1%}" if p.full > p.evicted else "-"
        table.add_row(f"{p.context:,}", human(p.full), human(p.evicted), human(p.peak), saved)
    if plans[0].carried:
        table.caption = f"of each {human(plans[0].carried)} for what layers without attention carry, at any length"
        table.caption_justify = "left"
    return table
