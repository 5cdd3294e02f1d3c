"""Plots the loss of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SKIPPED = {"step", "epoch", "loss", "grad_norm", "learning_rate"}


def plot_loss(log: Sequence[dict[str, float]], out: str | Path) -> None:
    """Draws the loss, and beside it its parts, over the steps. log: of `Fitted`."""
    from kvrewrite.tools.plotting import new_figure, save_figure

    parts = sorted({name for entry in log for name in entry} - SKIPPED)
    figure, (axes,) = new_figure(7.0, 3.6)
    steps = [entry["step"] for entry in log]
    axes.plot(steps, [entry["loss"] for entry in log], label="loss", linewidth=1.8)
    for name in parts:
        here = [(e["step"], e[name]) for e in log if name in e]
        axes.plot([s for s, _ in here], [v for _, v in here], label=name.replace("_", " "), linewidth=1.0)
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, Path(out))


__all__: list[Any] = ["plot_loss"]
