"""Plots prefill, decode and memory against the context, as a PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import OptionError
from kvrewrite.tools.plotting import GREY, add_legend, new_figure, save_figure, styles, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (
    ("prefill", "prefill, s", 1.0),
    ("decode", "decode step, ms", 1000.0),
    ("memory", "peak over weights, GiB", 1.0),
)


def draw(results: Mapping[str, Any], out: Path) -> Figure:
    """Draws three panels per batch size, with logarithmic axes; dotted: the roofline."""
    cells = results["cells"]
    drawn = [c for c in cells if c.get("prefill") or c.get("decode")]
    if not drawn:
        raise OptionError("there is nothing to draw: no cell was measured")
    batches = list(dict.fromkeys(c["batch"] for c in drawn))
    has_memory = any(_value(c, "memory") is not None for c in drawn)
    panels = [p for p in PANELS if p[0] != "memory" or has_memory]
    looks = styles(list(dict.fromkeys(c["label"] for c in drawn)))
    figure, axes = new_figure(3.6 * len(panels) + 2.6, 3.4 * len(batches), len(batches), len(panels))
    for row, batch in enumerate(batches):
        for column, (part, title, factor) in enumerate(panels):
            a = axes[row * len(panels) + column]
            tidy(a)
            for label, look in looks.items():
                mine = sorted(
                    (c for c in drawn if c["label"] == label and c["batch"] == batch), key=lambda c: c["context"]
                )
                points = [(c["context"], y) for c in mine if (y := _value(c, part)) is not None]
                if points:
                    a.plot(
                        [x for x, _ in points],
                        [y * factor for _, y in points],
                        label=textwrap.fill(label.replace(",", ", "), 30),
                        **look,
                    )
                    _errors(a, mine, part, factor, look["color"])
                floors = [(c["context"], y) for c in mine if (y := _floor(c, part)) is not None]
                if floors:
                    xs, ys = [x for x, _ in floors], [y * factor for _, y in floors]
                    a.plot(xs, ys, color=look["color"], linestyle=":", linewidth=1, marker="_", markersize=9)
            a.set_xscale("log", base=2)
            a.set_yscale("log")
            contexts = sorted({c["context"] for c in drawn if c["batch"] == batch})
            a.set_xticks(contexts, [f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in contexts])
            a.set_xlabel("tokens", color=GREY)
            a.set_title(title if len(batches) == 1 else f"{title} (batch {batch})", fontsize=10, loc="left")
    add_legend(figure, axes)
    save_figure(figure, out)
    return figure


def _errors(axes: Any, cells: list[dict[str, Any]], part: str, factor: float, colour: str) -> None:
    for cell in cells:
        if part != "memory" and cell.get(part):
            s = cell[part]["seconds"]
            axes.plot([cell["context"]] * 2, [s["low"] * factor, s["high"] * factor], color=colour, linewidth=1)


def _value(cell: Mapping[str, Any], part: str) -> float | None:
    if part == "memory":
        peaks = [(cell.get(p) or {}).get("peak_bytes") for p in ("prefill", "decode")]
        known = [p for p in peaks if p]
        return max(known) / 2**30 if known else None
    found = cell.get(part)
    return found["seconds"]["median"] if found else None


def _floor(cell: Mapping[str, Any], part: str) -> float | None:
    bound = {"prefill": "floor", "decode": "limit"}.get(part)
    return ((cell.get("limits") or {}).get(part) or {}).get(bound) if bound else None
