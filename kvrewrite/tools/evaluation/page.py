"""Writes results as one HTML page that needs nothing else: curves over budgets, tables, and what heads kept of a text."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from kvrewrite.tools.evaluation.cells import BASELINE, is_scored
from kvrewrite.tools.evaluation.curves import curves
from kvrewrite.tools.evaluation.kept import unpack
from kvrewrite.tools.subjects import budget_text

STYLE = """
:root { color-scheme: light dark; --line: #8884; --grey: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
small { opacity: .7; } svg { max-width: 100%; height: auto; } svg text { fill: currentColor; font-size: 12px; }
.heads { width: 100%; height: auto; image-rendering: pixelated; border: 1px solid var(--line); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; }
summary { cursor: pointer; }
"""


def page(results: Mapping[str, Any]) -> str:
    """Returns the page. Everything that comes from texts, names or models is escaped."""
    settings, versions = results["settings"], results["versions"]
    facts = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        f"<h1>{html.escape(str(settings['model']))}</h1>",
        f"<p>{html.escape(facts)}; {settings['dtype']} on {html.escape(settings['device'])}; seed {settings['seed']}. "
        "Points and tables have 95% intervals.</p>",
    ]
    cells = results["cells"]
    for task, tokens in dict.fromkeys((c["task"], c["tokens"]) for c in cells):
        here = [c for c in cells if (c["task"], c["tokens"]) == (task, tokens)]
        for mode in list(dict.fromkeys(c["mode"] for c in here if c["mode"] != BASELINE)) or [BASELINE]:
            shown = [c for c in here if c["mode"] in (mode, BASELINE)]
            parts.append(f"<h2>{html.escape(task)}, {mode}, {tokens:,} tokens</h2>")
            name, factor = ("nats per token", 1) if is_scored(task) else ("answers right, %", 100)
            parts.append(curves(shown, "nll" if is_scored(task) else "accuracy", name, factor))
            parts.append(_table(shown, is_scored(task)))
    parts += _heat(results.get("kept"))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>kvrewrite eval</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


# -------------------------------------------------------------------------------------------------------------- tables
def _number(value: Mapping[str, Any] | None, factor: float, digits: int) -> str:
    if value is None:
        return "-"
    mean, low, high = (factor * value[name] for name in ("mean", "low", "high"))
    return f"{mean:.{digits}f} <small>{low:.{digits}f} to {high:.{digits}f}</small>"


def _table(cells: Sequence[Mapping[str, Any]], scored: bool) -> str:
    heads = ["policy", "budget", "slots kept, %"]
    heads += ["nats per token", "more than full", "tokens right, %"] if scored else ["right, %", "difference to full"]
    rows = []
    for cell in cells:
        row = [html.escape(cell["label"]), budget_text(cell["budget"])]
        if cell["status"] != "ok":
            rows.append([*row, "", f"refused: {html.escape(cell['reason'])}"])
            continue
        beside = cell.get("against_full") or {}
        row.append(f"{100 * beside['kept']:.1f}" if beside else "-")
        if scored:
            row += [_number(cell["nll"], 1, 3), _number(beside.get("nll"), 1, 3)]
        row.append(_number(cell["accuracy"], 100, 1))
        if not scored:
            row.append(_number(beside.get("accuracy"), 100, 1))
        rows.append(row)
    head = "".join(f"<th>{h}</th>" for h in heads)
    lines = ["<tr>" + "".join(f"<td>{x}</td>" for x in row) + "</tr>" for row in rows]
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"


# ----------------------------------------------------------------------------------------------------------- heat maps
def _heat(kept: Mapping[str, Any] | None) -> list[str]:
    """The first text, for each policy: an image of heads x tokens, and the text coloured by how many heads kept a token."""
    if not kept or not kept["rows"]:
        return []
    pieces = kept["pieces"]
    parts = [
        "<h2>What each head kept of the first text</h2>",
        "<p>An image has a row for each kv head (layer by layer, from the first) and a column for each token; dark is kept. "
        "In the text, the stronger a token's colour, the more heads kept it.</p>",
    ]
    for row in kept["rows"]:
        heads = [unpack(bits, len(pieces)) for layer in sorted(row["heads"], key=int) for bits in row["heads"][layer]]
        counts = [sum(column) for column in zip(*heads)]
        share = sum(counts) / (len(heads) * len(pieces))
        title = f"{html.escape(row['label'])} at {budget_text(row['budget'])}: {100 * share:.1f}% of all slots"
        data = base64.b64encode(png([[20 if kept_ else 245 for kept_ in head] for head in heads])).decode()
        image = f'<img class="heads" alt="{title}" src="data:image/png;base64,{data}">'
        text = "".join(_span(piece, i, n, len(heads)) for i, (piece, n) in enumerate(zip(pieces, counts, strict=True)))
        parts.append(
            f'<h3>{title}</h3>\n{image}\n<details><summary>The text</summary><div class="text">{text}</div></details>'
        )
    return parts


def _span(piece: str, position: int, count: int, heads: int) -> str:
    colour = f"rgb(0 114 178 / {0.75 * count / heads:.2f})"
    return f'<span style="background:{colour}" title="token {position}: {count} of {heads} heads">{html.escape(piece)}</span>'


def png(rows: Sequence[Sequence[int]]) -> bytes:
    """A grey PNG of rows of numbers from 0 (black) to 255."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
