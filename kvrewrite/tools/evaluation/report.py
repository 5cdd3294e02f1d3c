"""Formats tables of evaluation results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvrewrite.tools.evaluation.cells import BASELINE, cell_key, is_scored
from kvrewrite.tools.subjects import budget_text

if TYPE_CHECKING:
    from rich.table import Table

SUMMARY = ("mean", "slots %\ntime", "live\nleased")
SUMMARY_WIDTH = 34  # columns of a terminal that these take


def percent(share: float | None, digits: int = 0) -> str:
    """0.25 -> "25"."""
    return "-" if share is None else f"{share * 100:.{digits}f}"


def accuracy_text(accuracy: Mapping[str, Any]) -> str:
    """Formats mean and interval in percent, on two lines."""
    return f"{percent(accuracy['mean'], 1)}\n{percent(accuracy['low'])}–{percent(accuracy['high'])}"


def _rows(cells: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups cells by (policy, budget, mode, tokens)."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(cell_key({**cell, "task": None}), []).append(cell)
    return list(groups.values())


def _header(task: str) -> str:
    return task.replace("_", "\n")


def _fitting(tasks: list[str], room: int) -> list[list[str]]:
    """Splits the tasks into groups whose columns fit into `room` characters."""
    groups: list[list[str]] = [[]]
    left = room
    for task in tasks:
        need = 3 + max(11, *(len(part) for part in _header(task).split("\n")))
        if groups[-1] and need > left:
            groups.append([])
            left = room
        groups[-1].append(task)
        left -= need
    return groups


def tables(results: Mapping[str, Any], width: int = 160) -> tuple[list[Table], list[str]]:
    """Returns tables per mode and length, and the reasons of refused cells, numbered as in the tables.

    width: characters per line; tasks that do not fit go into further tables.
    """
    from rich.markup import escape
    from rich.table import Table

    from kvrewrite.cache.memory import human

    scored, scored_reasons = scored_tables(results)
    cells = [c for c in results["cells"] if not is_scored(c["task"])]
    if not cells:
        return scored, scored_reasons
    found = {cell_key({**m, "task": None}): m for m in results["means"]}
    tasks = list(dict.fromkeys(c["task"] for c in cells))
    modes = list(dict.fromkeys(c["mode"] for c in cells if c["mode"] != BASELINE)) or [BASELINE]
    labels = max((min(len(c["label"]), 40) for c in cells), default=0)
    groups = _fitting(tasks, width - labels - 14 - SUMMARY_WIDTH)
    reasons, made = scored_reasons, scored
    for tokens in dict.fromkeys(c["tokens"] for c in cells):
        for mode in modes:
            rows = _rows([c for c in cells if c["tokens"] == tokens and c["mode"] in (mode, BASELINE)])
            title = (
                f"accuracy in %, 95% interval below; {tokens:,} tokens, {results['settings']['samples']} samples a task"
            )
            title = title if mode == BASELINE else f"question-{mode}: {title}"
            for shown in groups:
                last = shown is groups[-1]
                table = Table(title=title, title_justify="left")
                table.add_column("policy", overflow="fold")
                for name in ("budget", *map(_header, shown), *(SUMMARY if last else ())):
                    table.add_column(name, justify="right", overflow="fold")
                for group in rows:
                    by_task = {c["task"]: c for c in group}
                    row = [escape(group[0]["label"]), budget_text(group[0]["budget"])]
                    row += [escape(_cell_text(by_task.get(task), reasons)) for task in shown]
                    mean = found.get(cell_key({**group[0], "task": None}))
                    if last and mean is None:
                        row += ["-"] * len(SUMMARY)
                    elif last and mean is not None:
                        row.append(accuracy_text(mean["accuracy"]))
                        row.append(f"{percent(mean['kept'], 1)}\n{mean['seconds']:.0f} s")
                        row.append(f"{human(mean['live_bytes'])}\n{human(mean['leased_bytes'])}")
                    table.add_row(*row)
                made.append(table)
    return made, reasons


def scored_tables(results: Mapping[str, Any]) -> tuple[list[Table], list[str]]:
    """Returns a table for each task in nats, mode and length, and the reasons of refused cells."""
    from rich.markup import escape
    from rich.table import Table

    made, reasons = [], []
    for (task, tokens, mode), cells in scored_groups(results["cells"]).items():
        documents = max((len(set(c["documents"])) for c in cells if c["status"] == "ok"), default=0)
        table = Table(
            title=f"{task}, question-{mode}: up to {tokens:,} tokens, {documents} documents", title_justify="left"
        )
        table.add_column("policy", overflow="fold")
        for name in ("budget", "nats a token", "more than full", "tokens right %", "all right %", "slots %", "s"):
            table.add_column(name, justify="right")
        for cell in cells:
            head = [escape(cell["label"]), budget_text(cell["budget"])]
            if cell["status"] != "ok":
                if cell["reason"] not in reasons:
                    reasons.append(cell["reason"])
                table.add_row(*head, escape(f"refused [{reasons.index(cell['reason']) + 1}]"))
                continue
            beside = cell.get("against_full")
            table.add_row(
                *head,
                nats_text(cell["nll"]),
                "-" if beside is None else nats_text(beside["nll"]),
                percent(cell["accuracy"]["mean"], 1),
                percent(cell["exact"]["mean"], 1),
                "-" if beside is None else percent(beside["kept"], 1),
                f"{cell['seconds']:.1f}",
            )
        made.append(table)
    return made, reasons


def scored_groups(cells: Sequence[dict[str, Any]]) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    """Groups the cells of tasks in nats by (task, tokens, mode), the full cache's in each."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    ours = [c for c in cells if is_scored(c["task"])]
    for task, tokens in dict.fromkeys((c["task"], c["tokens"]) for c in ours):
        here = [c for c in ours if (c["task"], c["tokens"]) == (task, tokens)]
        modes = list(dict.fromkeys(c["mode"] for c in here if c["mode"] != BASELINE)) or [BASELINE]
        for mode in modes:
            groups[task, tokens, mode] = [c for c in here if c["mode"] in (mode, BASELINE)]
    return groups


def nats_text(value: Mapping[str, Any]) -> str:
    """Formats a number of nats with its interval: "1.611 (1.48 to 1.74)"."""
    return f"{value['mean']:.3f} ({value['low']:.2f} to {value['high']:.2f})"


def _cell_text(cell: Mapping[str, Any] | None, reasons: list[str]) -> str:
    """Returns a table's text for a cell; adds the reason of a refused one to `reasons`."""
    if cell is None:
        return ""
    if cell["status"] == "ok":
        return accuracy_text(cell["accuracy"])
    if cell["reason"] not in reasons:
        reasons.append(cell["reason"])
    return f"refused [{reasons.index(cell['reason']) + 1}]"
