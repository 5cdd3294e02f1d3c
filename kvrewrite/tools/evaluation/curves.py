"""Draws scores over what was kept as an SVG, for pages that need nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvrewrite.tools.evaluation.cells import BASELINE
from kvrewrite.tools.plotting import COLOURS

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 60, 190, 12, 44  # around the axes; the legend is on the right
DASHES = ("", "6 3", "2 3", "8 3 2 3")
LEGEND_STEP = 15

Cell = Mapping[str, Any]


def curves(cells: Sequence[Cell], measure: str, name: str, factor: float) -> str:
    """Returns an SVG: a line for each policy over the measured share of slots (logarithmic), with intervals; the full cache
    as a band. measure: the cells' entry that is drawn, times `factor`; name: of the axis. Empty where no policy ran."""
    base = next((c for c in cells if c["mode"] == BASELINE and c["status"] == "ok"), None)
    lines: dict[str, list[tuple[float, Mapping[str, float]]]] = {}
    for cell in cells:
        if cell["mode"] != BASELINE and cell["status"] == "ok" and "against_full" in cell:
            point = 100 * cell["against_full"]["kept"], {k: factor * cell[measure][k] for k in ("mean", "low", "high")}
            lines.setdefault(cell["label"], []).append(point)
    if not lines:
        return ""
    points = [p for line in lines.values() for p in line]
    shares, values = [x for x, _ in points], [v[k] for _, v in points for k in ("low", "high")]
    full = None if base is None else {k: factor * base[measure][k] for k in ("mean", "low", "high")}
    values += [] if full is None else [full["low"], full["high"]]
    height = max(HEIGHT, TOP + BOTTOM + LEGEND_STEP * (len(lines) + 1))
    x = _Axis(math.log(min(shares) / 1.15), math.log(max(shares) * 1.15), LEFT, WIDTH - RIGHT)
    margin = 0.05 * (max(values) - min(values)) or 1.0
    y = _Axis(min(values) - margin, max(values) + margin, height - BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">',
        _frame(x, y, name, shares),
    ]
    if full is not None:
        top, bottom, middle = y(full["high"]), y(full["low"]), y(full["mean"])
        parts.append(
            f'<rect x="{LEFT}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{bottom - top:.1f}" fill="#8883"/>'
        )
        parts.append(_line([(LEFT, middle), (WIDTH - RIGHT, middle)], "#888888", ""))
        parts.append(_legend(0, "full cache", "#888888", ""))
    for i, (label, line) in enumerate(lines.items()):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        found = sorted((x(math.log(share)), value) for share, value in sorted(line, key=lambda p: p[0]))
        shift = 1.2 * (i - len(lines) / 2)  # intervals of neighbours do not hide each other
        parts.append(_line([(at, y(v["mean"])) for at, v in found], colour, dash))
        for at, v in found:
            parts.append(_line([(at + shift, y(v["low"])), (at + shift, y(v["high"]))], colour, "", 1))
            parts.append(f'<circle cx="{at:.1f}" cy="{y(v["mean"]):.1f}" r="3" fill="{colour}"/>')
        parts.append(_legend(i + 1, label, colour, dash))
    return "\n".join([*parts, "</svg>"])


class _Axis:
    """Where a value is drawn: from `low` at `start` to `high` at `end`."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About five round values."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(f for f in (1, 2, 5, 10) if (self.high - self.low) / (f * step) <= 6)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _frame(x: _Axis, y: _Axis, name: str, shares: Sequence[float]) -> str:
    """Both axes, with ticks at the shares that are there (one for those that are close)."""
    bottom, parts = y.start, []
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" stroke="#8883"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    shown: list[float] = []
    for share in sorted(shares):
        if not shown or share > 1.25 * shown[-1]:
            shown.append(share)
            at = x(math.log(share))
            parts.append(f'<text x="{at:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{share:.3g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 36:.1f}" text-anchor="middle">cache slots kept, %</text>')
    parts.append(
        f'<text transform="translate(14 {(TOP + bottom) / 2:.1f}) rotate(-90)" text-anchor="middle">{name}</text>'
    )
    return "\n".join(parts)


def _line(points: Sequence[tuple[float, float]], colour: str, dash: str, width: float = 1.8) -> str:
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>'


def _legend(row: int, label: str, colour: str, dash: str) -> str:
    left, at = WIDTH - RIGHT + 14, TOP + 10 + LEGEND_STEP * row
    line = _line([(left, at - 4), (left + 22, at - 4)], colour, dash)
    return f'{line}\n<text x="{left + 28}" y="{at}">{html.escape(label)}</text>'
