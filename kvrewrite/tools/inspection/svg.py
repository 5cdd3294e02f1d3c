"""Inline SVG for the report: coloured by CSS classes, so that it follows the page's theme, with a title per mark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def lines(
    title: str,
    unit: Callable[[float], str],
    contexts: Sequence[int],
    series: Sequence[tuple[str, str, Sequence[float]]],
) -> str:
    """Draws curves over context length, both axes logarithmic. series: (label, CSS class, values), drawn in order."""
    width, height, left, right, top, bottom = 460, 250, 82, 14, 12, 40
    values = [v for _, _, ys in series for v in ys if v > 0]
    ticks = _ticks(min(values), max(values))
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    first, last = math.log2(contexts[0]), math.log2(contexts[-1])

    def x(context: float) -> float:
        return left + (math.log2(context) - first) / max(last - first, 1e-9) * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (math.log10(value) - low) / (high - low) * (height - top - bottom)

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" class="plot">']
    for tick in ticks:
        at = y(tick)
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        out.append(_text(left - 8, at + 4, unit(tick), "end", "tick"))
    step = max(1, math.ceil(len(contexts) / 6))
    shown = [c for i, c in enumerate(contexts) if (len(contexts) - 1 - i) % step == 0]
    out += [_text(x(c), height - bottom + 16, short_count(c), "middle", "tick") for c in shown]
    out.append(_text((left + width - right) / 2, height - 3, "context, tokens", "middle", "tick"))
    for label, kind, ys in series:
        points = [(x(c), y(v)) for c, v in zip(contexts, ys, strict=True)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        out.append(f'<polyline points="{path}" class="curve {kind}"/>')
        for (px, py), c, v in zip(points, contexts, ys, strict=True):
            out.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" class="dot {kind}">'
                f"<title>{escape(f'{label}, {c:,} tokens: {unit(v)}')}</title></circle>"
            )
    out.append("</svg>")
    return "".join(out)


def _ticks(least: float, most: float) -> list[float]:
    """Returns round numbers around all values: powers of ten, with 2 and 5 between them if there are few."""
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
    steps = (1.0, 2.0, 5.0) if high - low <= 2 else (1.0,)
    ticks = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    below = [t for t in ticks if t <= least][-1:]
    above = [t for t in ticks if t >= most][:1]
    return [*below, *(t for t in ticks if least < t < most), *(t for t in above if t not in below)] + (
        [2 * below[0]] if below == above else []
    )


def bars(rows: Sequence[tuple[str, float, float, float, str]]) -> str:
    """Draws one bar per layer. rows: (label, bytes of a full cache, after the prompt, at the maximum, title)."""
    line, left, width, right = 18, 34, 460, 70
    largest = max((max(full, most) for _, full, _, most, _ in rows), default=1) or 1
    height = line * len(rows) + 6
    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="cache by layer" class="plot">']

    def span(value: float) -> float:
        return value / largest * (width - left - right)

    for i, (label, full, kept, most, says) in enumerate(rows):
        top = 3 + i * line
        out.append(f"<g><title>{escape(says)}</title>")
        out.append(f'<rect x="0" y="{top}" width="{width}" height="{line}" class="hit"/>')
        out.append(_text(left - 8, top + 13, label, "end", "tick"))
        out.append(f'<rect x="{left}" y="{top + 3}" width="{span(full):.1f}" height="12" rx="2" class="bar-full"/>')
        out.append(f'<rect x="{left}" y="{top + 3}" width="{span(most):.1f}" height="12" rx="2" class="bar-most"/>')
        out.append(
            f'<rect x="{left}" y="{top + 3}" width="{max(span(kept), 1.5):.1f}" height="12" rx="2" class="bar-kept"/>'
        )
        share = f"{kept / full:.1%}" if full else "-"
        out.append(_text(left + max(span(full), span(most)) + 6, top + 13, share, "start", "tick"))
        out.append("</g>")
    out.append("</svg>")
    return "".join(out)


def heat(rows: Sequence[tuple[str, Sequence[tuple[int, float, str]]]]) -> str:
    """Draws one cell per kv head and layer. rows: (label, [(slots, share of the context, title)])."""
    most = max((len(cells) for _, cells in rows), default=1)
    line, left, width = 18, 34, 460
    cell = min(64.0, (width - left) / max(most, 1))
    height = line * len(rows) + 24
    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="slots by layer and head" class="plot">']
    for i, (label, cells) in enumerate(rows):
        top = 3 + i * line
        out.append(_text(left - 8, top + 13, label, "end", "tick"))
        for h, (slots, share, says) in enumerate(cells):
            at = left + h * cell
            out.append(
                f'<g><title>{escape(says)}</title><rect x="{at + 1:.1f}" y="{top + 1}" width="{cell - 2:.1f}" '
                f'height="{line - 2}" rx="2" class="cell"/><rect x="{at + 1:.1f}" y="{top + 1}" width="{cell - 2:.1f}" '
                f'height="{line - 2}" rx="2" class="heat" style="opacity:{0.12 + 0.88 * share:.3f}"/>'
            )
            if cell >= 36:
                kind = "cell-text strong" if share > 0.55 else "cell-text"
                out.append(_text(at + cell / 2, top + 13, short_count(slots), "middle", kind))
            out.append("</g>")
    step = 1 if cell >= 18 else 4
    for h in range(0, most, step):
        out.append(_text(left + (h + 0.5) * cell, line * len(rows) + 18, str(h), "middle", "tick"))
    out.append("</svg>")
    return "".join(out)


def short_count(count: float) -> str:
    """Formats a number of tokens for an axis: 131072 -> "128K"."""
    for size, name in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= size:
            value = count / size
            return f"{value:.0f}{name}" if abs(value - round(value)) < 0.05 else f"{value:.1f}{name}"
    return f"{count:.0f}"
