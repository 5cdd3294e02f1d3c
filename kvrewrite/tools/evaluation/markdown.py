"""Writes results as Markdown: for each task, mode and length a table of policies over budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvrewrite.errors import OptionError
from kvrewrite.tools.evaluation.cells import BASELINE, is_scored
from kvrewrite.tools.evaluation.scored import against
from kvrewrite.tools.subjects import budget_text

Cell = Mapping[str, Any]


def markdown(results: Mapping[str, Any], beside: str | None = None) -> str:
    """Returns all tables of results. Rows are ordered by their value at the budget that comes first in the file.

    beside: a policy as it was given (`snapkv:window=16`); tasks in nats get a table more, of how many more each has than that
    policy at the same budget, over the same answers. Raises OptionError if nothing was measured of it.
    """
    parts: list[str] = []
    cells = results["cells"]
    for task, tokens in dict.fromkeys((c["task"], c["tokens"]) for c in cells):
        here = [c for c in cells if (c["task"], c["tokens"]) == (task, tokens)]
        modes = list(dict.fromkeys(c["mode"] for c in here if c["mode"] != BASELINE)) or [BASELINE]
        for mode in modes:
            shown = [c for c in here if c["mode"] in (mode, BASELINE)]
            for title, value, text in _columns(task):
                parts.append(_table(f"{task}, {mode}, {tokens:,} tokens: {title}", shown, value, text))
    if beside is not None:
        parts += _paired(cells, beside)
    reasons = dict.fromkeys(f"- {c['label']}: {c['reason']}" for c in cells if c["status"] != "ok")
    if reasons:
        parts.append("Refused:\n\n" + "\n".join(reasons))
    return "\n\n".join(parts) + "\n"


def _paired(cells: Sequence[dict[str, Any]], beside: str) -> list[str]:
    """Tables of paired differences to one policy."""
    ran = [c for c in cells if c["status"] == "ok" and is_scored(c["task"])]
    chosen = [c for c in ran if c["label"] == beside]
    if not chosen:
        labels = ", ".join(dict.fromkeys(c["label"] for c in ran))
        raise OptionError(f"{beside} has no cells in nats; there are: {labels or 'none'}")
    parts = []
    for task, tokens, mode in dict.fromkeys((c["task"], c["tokens"], c["mode"]) for c in chosen):
        base = {c["budget"]: c for c in chosen if (c["task"], c["tokens"], c["mode"]) == (task, tokens, mode)}
        found = [
            {**c, "more": against(c, base[c["budget"]])["nll"]}
            for c in ran
            if (c["task"], c["tokens"], c["mode"]) == (task, tokens, mode)
            and c["budget"] in base
            and c["label"] != beside
        ]
        title = f"{task}, {mode}, {tokens:,} tokens: nats per token more than `{beside}`, paired"
        parts.append(_table(title, found, lambda c: c["more"]["mean"], lambda c: _signed(c["more"])))
    return parts


def _signed(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"


Column = tuple[str, Callable[[Cell], float], Callable[[Cell], str]]


def _columns(task: str) -> list[Column]:
    """Returns (title, what rows are ordered by, text) of each table of a task."""
    percent: Column = ("answers right, %", lambda c: -c["accuracy"]["mean"], lambda c: _percent(c["accuracy"]))
    if not is_scored(task):
        return [percent]
    nats: Column = ("nats per token", lambda c: c["nll"]["mean"], lambda c: _nats(c["nll"]))
    tokens: Column = ("tokens right, %", percent[1], percent[2])
    return [nats, tokens] if task == "quote" else [nats]


def _nats(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _percent(value: Mapping[str, Any]) -> str:
    return f"{100 * value['mean']:.1f} ({100 * value['low']:.0f} to {100 * value['high']:.0f})"


def _table(title: str, cells: Sequence[Cell], value: Callable[[Cell], float], text: Callable[[Cell], str]) -> str:
    budgets = list(dict.fromkeys(c["budget"] for c in cells if c["mode"] != BASELINE)) or [None]
    rows: dict[str, dict[Any, Cell]] = {}
    for cell in cells:
        rows.setdefault(cell["label"], {})[cell["budget"]] = cell
    first = {label: row.get(budgets[0], next(iter(row.values()))) for label, row in rows.items()}

    def order(label: str) -> tuple[bool, bool, float]:
        cell = first[label]
        ran = cell["status"] == "ok"
        return cell["mode"] != BASELINE, not ran, value(cell) if ran else 0.0

    lines = [f"**{title}**", "", "| policy | " + " | ".join(map(budget_text, budgets)) + " |"]
    lines.append("| --- |" + " --- |" * len(budgets))
    for label in sorted(rows, key=order):
        row = rows[label]
        if first[label]["mode"] == BASELINE:
            row = dict.fromkeys(budgets, first[label])
        found = [row.get(budget) for budget in budgets]
        shown = ["" if c is None else text(c) if c["status"] == "ok" else "refused" for c in found]
        lines.append(f"| `{label}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)
