"""Tables for people: a model's attention sites, and the memory of its caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from kvrewrite.analysis.memory import MemoryPlan
    from kvrewrite.ir.site import AttentionSite


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def sites_table(sites: list[AttentionSite], brief: bool = False) -> Table:
    """Lists every attention site, one per row. brief: without what no site has, and without what was inserted."""
    from rich.table import Table

    def flag(value: bool) -> str:
        return "yes" if value else "-"

    rows = []
    for s in sites:
        rows.append(
            {
                "layer": str(s.layer),
                "module": escaped(s.module or "(top)"),
                "heads": str(s.heads),
                "kv heads": str(s.kv_heads),
                "head dim": str(s.head_dim) if s.head_dim == s.v_head_dim else f"{s.head_dim}, v {s.v_head_dim}",
                "latent": f"{s.latent} + {s.latent_rotary}{' cached' * s.latent_cached}" if s.latent else "-",
                "mask": f"{s.mask} {s.window or s.chunk}" if s.window or s.chunk else s.mask,
                "scale": f"{s.scale:.5g}",
                "softcap": f"{s.softcap:g}" if s.softcap else "-",
                "sinks": flag(s.sinks),
                "ALiBi": flag(s.alibi),
                "RoPE": flag(s.rope),
                "source": s.source,
                "shares k, v with": "-" if s.shares_kv_with is None else f"layer {s.shares_kv_with}",
                "inserted": ", ".join(s.inserted) or "-",
            }
        )
    optional = {"latent", "shares k, v with", "inserted"} | ({"softcap", "sinks", "ALiBi"} if brief else set())
    hidden = {name for name in optional if all(row[name] == "-" for row in rows)} | ({"inserted"} if brief else set())
    table = Table(title=f"{len(sites)} attention sites", title_justify="left")
    names = [name for name in (rows[0] if rows else {}) if name not in hidden]
    for name in names:
        numeric = name in ("layer", "heads", "kv heads", "head dim")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name not in ("module", "inserted"))
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def memory_table(plans: list[MemoryPlan]) -> Table:
    """Lists estimated cache bytes by context length."""
    from rich.table import Table

    from kvrewrite.analysis.memory import human

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
