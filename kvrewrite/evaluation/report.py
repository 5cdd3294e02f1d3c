"""Tables of evaluation results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvrewrite.evaluation.run import BASELINE, budget_text, cell_key

if TYPE_CHECKING:
    from rich.table import Table


def percent(share: float | None, digits: int = 0) -> str:
    """0.25 -> "25"."""
    return "-" if share is None else f"{share * 100:.{digits}f}"


def accuracy_text(accuracy: Mapping[str, Any]) -> str:
    """Mean and interval, in percent, on two lines."""
    return f"{percent(accuracy['mean'], 1)}\n{percent(accuracy['low'])}–{percent(accuracy['high'])}"


def _rows(cells: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Cells of one (policy, budget, mode, tokens) each."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(cell_key({**cell, "task": None}), []).append(cell)
    return list(groups.values())


def tables(results: Mapping[str, Any]) -> tuple[list[Table], list[str]]:
    """A table for each mode and length, and the reasons of refused cells, numbered as in the tables."""
    from rich.markup import escape
    from rich.table import Table

    from kvrewrite.memory import human

    cells = results["cells"]
    found = {cell_key({**m, "task": None}): m for m in results["means"]}
    tasks = list(dict.fromkeys(c["task"] for c in cells))
    modes = list(dict.fromkeys(c["mode"] for c in cells if c["mode"] != BASELINE)) or [BASELINE]
    reasons: list[str] = []
    made = []
    for tokens in dict.fromkeys(c["tokens"] for c in cells):
        for mode in modes:
            here = [c for c in cells if c["tokens"] == tokens and c["mode"] in (mode, BASELINE)]
            title = (
                f"accuracy in %, 95% interval below; {tokens:,} tokens, {results['settings']['samples']} samples a task"
            )
            table = Table(title=title if mode == BASELINE else f"question-{mode}: {title}", title_justify="left")
            table.add_column("policy", overflow="fold")
            for name in ("budget", *tasks, "mean", "slots %", "live", "leased", "time"):
                table.add_column(name, justify="right", overflow="fold")
            for group in _rows(here):
                by_task = {c["task"]: c for c in group}
                row = [escape(group[0]["label"]), budget_text(group[0]["budget"])]
                for task in tasks:
                    cell = by_task.get(task)
                    if cell is None:
                        row.append("")
                    elif cell["status"] == "ok":
                        row.append(accuracy_text(cell["accuracy"]))
                    else:
                        if cell["reason"] not in reasons:
                            reasons.append(cell["reason"])
                        row.append(escape(f"refused [{reasons.index(cell['reason']) + 1}]"))
                mean = found.get(cell_key({**group[0], "task": None}))
                if mean is None:
                    row += ["-"] * 5
                else:
                    row += [accuracy_text(mean["accuracy"]), percent(mean["kept"], 1), human(mean["live_bytes"])]
                    row += [human(mean["leased_bytes"]), f"{mean['seconds']:.0f} s"]
                table.add_row(*row)
            made.append(table)
    return made, reasons
