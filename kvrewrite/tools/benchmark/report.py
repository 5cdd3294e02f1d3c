"""The table of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("prefill\ns", "x\nfull", "/\nfloor", "decode\nms", "x\nfull", "/\nlimit", "tok/s", "peak\n", "cache\n")
NUMBERS = 62  # columns of a terminal that these take


def number(value: float | None) -> str:
    """Formats three digits."""
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    if 0 < value < 0.1:
        return f"{value:.1g}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _unit(cells: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """Returns GiB, or MiB if all values are small."""
    sizes = [size for c in cells for size in (_peak(c), (c.get("cache") or {}).get("leased")) if size]
    return ("GiB", 1 << 30) if max(sizes, default=1 << 30) >= 1 << 27 else ("MiB", 1 << 20)


def _peak(cell: Mapping[str, Any]) -> int | None:
    """Returns the most bytes over the weights, in prefill or decoding."""
    peaks = [(cell.get(p) or {}).get("peak_bytes") for p in ("prefill", "decode")]
    return max((p for p in peaks if p is not None), default=None)


def spread_text(part: Mapping[str, Any] | None, factor: float) -> str:
    """Formats the median, and below it the range of most samples."""
    if not part:
        return "-"
    s = part["seconds"]
    return f"{number(s['median'] * factor)}\n{number(s['low'] * factor)}–{number(s['high'] * factor)}"


def tables(results: Mapping[str, Any], width: int = 160) -> tuple[list[Table], list[str]]:
    """Returns a table per (context, batch), and notes, numbered as in the tables."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    cells: list[dict[str, Any]] = results["cells"]
    notes: list[str] = []
    made = []
    unit, size = _unit(cells)
    for context, batch in dict.fromkeys((c["context"], c["batch"]) for c in cells):
        table = Table(
            title=f"{context:,} tokens, batch {batch}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("", overflow="fold", max_width=max(16, min(48, width - NUMBERS)))
        for name in COLUMNS:
            table.add_column(name + (unit if name.endswith("\n") else ""), justify="right", no_wrap=True)
        for cell in cells:
            if (cell["context"], cell["batch"]) == (context, batch):
                table.add_row(*map(escape, _row(cell, notes, size)))
        made.append(table)
    return made, notes


def _marks(texts: Sequence[str], notes: list[str]) -> str:
    """Returns the marks after a label for these notes; adds new ones to `notes`."""
    for text in texts:
        if text not in notes:
            notes.append(text)
    return "".join(f" [{notes.index(t) + 1}]" for t in texts)


def _row(cell: Mapping[str, Any], notes: list[str], unit: int) -> list[str]:
    about = list(cell.get("notes") or [])
    if cell["status"] != "ok":
        about.insert(0, f"{cell['status']}: {cell['reason']}")
    limits = cell.get("limits") or {}
    if limits.get("why_not"):
        about.append(f"no floor: {limits['why_not']}")
    if cell.get("weights") == "random":
        about.append("random policy weights")
    decode = cell.get("decode") or {}
    beside = cell.get("beside") or {}
    sizes = [_peak(cell), (cell.get("cache") or {}).get("leased")]
    return [
        cell["label"].replace(",", ", ").replace(":", ": ", 1) + _marks(about, notes),
        spread_text(cell.get("prefill"), 1),
        number(beside.get("prefill_speedup")),
        number(beside.get("prefill_over_floor")),
        spread_text(cell.get("decode"), 1000),
        number(beside.get("decode_speedup")),
        number(beside.get("decode_over_limit")),
        number(decode.get("tokens_per_second")),
        *(number(None if size is None else size / unit) for size in sizes),
    ]


def explanation(results: Mapping[str, Any]) -> str:
    """Explains how to read the table."""
    s, m = results["settings"], results["machine"]
    what = "random weights" if s["random_weights"] else "its own weights"
    how = "compiled" if s["compile"] else "op by op"
    limit = f", limited to {s['memory_limit'] / 2**30:g} GiB" if s["memory_limit"] else ""
    return (
        f"{s['model']} ({what}, {s['dtype']}) on {m['gpu'] or 'CPU'}{limit}; policies run {how}. Medians of {s['repeat']} "
        f"prefills and {s['steps']} single steps, with their range (steps: 10 to 90%). x full: times as fast as transformers' "
        "full cache (sdpa); / floor, / limit: times the roofline's; peak: over the weights."
    )
