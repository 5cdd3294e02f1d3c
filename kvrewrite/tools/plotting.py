"""What all plots share: figures, styles that differ in grey too, and atomically written files."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrewrite.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart (without their yellow, which is too faint on white).
# Further policies differ by dash and marker as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"


def require_matplotlib() -> None:
    """Raises OptionError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("plots need matplotlib: pip install 'matplotlib>=3.9' (or: pip install 'kvrewrite[plot]')")


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any
) -> tuple[Figure, list[Axes]]:
    """Makes a figure without pyplot's state; returns its axes in one list."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, [a for row in axes for a in row]


def save_figure(figure: Figure, out: Path) -> None:
    """Writes the PNG completely or not at all."""
    out = out.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".png", dir=out.parent)
    os.close(handle)
    try:
        figure.savefig(name)
        os.chmod(name, 0o644)
        os.replace(name, out)
    except BaseException:
        os.unlink(name)
        raise


def styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns a style per label; the first 28 all differ."""
    looks = {}
    for i, label in enumerate(labels):
        turn = i // len(COLOURS)
        looks[label] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[turn % len(DASHES)],
            "marker": MARKERS[(i + turn) % len(MARKERS)],
            "markersize": 5,
            "linewidth": 1.6,
        }
    return looks


def tidy(axes: Axes) -> None:
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Adds one legend for all panels, to their right, so that it never covers a line."""
    seen: dict[str, Any] = {}
    for a in axes:
        for handle, label in zip(*a.get_legend_handles_labels()):
            seen.setdefault(label, handle)
    figure.legend(
        list(seen.values()), list(seen), loc="outside right upper", frameon=False, fontsize=9, handlelength=3.2
    )
