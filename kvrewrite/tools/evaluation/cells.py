"""The cells of an evaluation, as data: their keys, what they say beside the full cache, means, and results as files.

A cell is one measurement: a policy at a budget, in a mode, on a task at a length.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvrewrite.errors import OptionError
from kvrewrite.tools.evaluation import asked, documents, intervals, ruler, scored
from kvrewrite.tools.evaluation.ask import POINTS
from kvrewrite.tools.subjects import read_json

FORMAT = 1
BASELINE = "full"  # the mode of the baseline's cells, which belong to both modes
FIXED = ("fingerprint", "samples", "seed", "dtype", "device")  # settings that results must share to be one


def cell_key(cell: Mapping[str, Any]) -> str:
    """Returns a cell's key as text: equal keys are the same measurement."""
    names = ("policy", "options", "weights", "budget", "mode", "task", "tokens")
    return json.dumps([cell.get(n) for n in names], sort_keys=True, default=str)


def is_scored(task: str) -> bool:
    """Whether a task's cells are in nats per token (`scored.py`), not in answers."""
    return task in documents.TASKS


def reads_file(task: str) -> bool:
    """Whether a task is made of a file of the user's (--data)."""
    return is_scored(task) or task in asked.TASKS or task in ruler.WITH_DATA


def compare(cells: list[dict[str, Any]]) -> None:
    """Adds to every cell its comparison with the full cache: shares of slots and bytes, and paired differences."""
    full = {(c["task"], c["tokens"]): c for c in cells if c["mode"] == BASELINE and c["status"] == "ok"}
    for cell in cells:
        base = full.get((cell["task"], cell["tokens"]))
        if base is None or cell["status"] != "ok" or "against_full" in cell:
            continue
        # The full cache was measured at both points; a blind cell is compared before its question.
        point = POINTS[0] if POINTS[0] in cell["memory"] else POINTS[1]
        ours, theirs = cell["memory"][point], base["memory"].get(point, base["memory"][POINTS[0]])
        cell["against_full"] = {
            "measured_at": point,
            "full_live": theirs["live"],
            "full_leased": theirs["leased"],
            "kept": ours["slots"] / theirs["slots"],
            "live": ours["live"] / theirs["live"],
            "leased": ours["leased"] / theirs["leased"],
            **_differences(cell, base),
        }


def _differences(cell: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    if "nll" in cell:
        return scored.against(cell, base)
    return {"accuracy": dataclasses.asdict(intervals.difference(cell["scores"], base["scores"]))}


def means(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the mean over tasks of each (policy, budget, mode, tokens) whose cells have all run; tasks that are scored
    in nats are left out."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if is_scored(cell["task"]):
            continue
        groups.setdefault(cell_key({**cell, "task": None}), []).append(cell)
    found = []
    for group in groups.values():
        ran = [c for c in group if c["status"] == "ok"]
        if not ran or len(ran) < len(group):
            continue
        row = {name: group[0][name] for name in ("policy", "label", "options", "weights", "budget", "mode", "tokens")}
        row["tasks"] = [c["task"] for c in ran]
        row["accuracy"] = dataclasses.asdict(intervals.interval(*(c["scores"] for c in ran)))
        for name in ("kept", "live", "leased"):
            shares = [c["against_full"][name] for c in ran if "against_full" in c]
            row[name] = sum(shares) / len(shares) if len(shares) == len(ran) else None
        point = POINTS[0] if row["mode"] == "blind" else POINTS[1]
        for name in ("live", "leased"):
            row[f"{name}_bytes"] = sum(c["memory"][point][name] for c in ran) / len(ran)
        row["seconds"] = round(sum(c["seconds"] for c in ran), 3)
        found.append(row)
    return found


def read_results(path: Path) -> dict[str, Any]:
    """Reads the results of an earlier evaluation; raises ArtifactError."""
    return read_json(path, "kvrewrite eval", FORMAT)


def join_results(parts: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Puts results of several files together (shards, other budgets or tasks): one cell for each key, one that ran before
    one that was refused. names: what to call each in errors. Raises OptionError where they are of different settings."""
    first = parts[0]
    for part, name in zip(parts[1:], names[1:]):
        for setting in ("fingerprint", "seed", "dtype"):
            a, b = first["settings"][setting], part["settings"][setting]
            if a != b:
                raise OptionError(f"{name} has another {setting} than {names[0]}: {b}, expected {a}")
    cells: dict[str, dict[str, Any]] = {}
    for cell in (cell for part in parts for cell in part["cells"]):
        known = cells.get(cell_key(cell))
        if known is None or known["status"] != "ok":
            cells[cell_key(cell)] = {k: v for k, v in cell.items() if k != "against_full"}
    ordered = sorted(cells.values(), key=lambda c: c["mode"] != BASELINE)  # stable: the full cache first
    joined = {**first, "cells": ordered, "complete": all(p["complete"] for p in parts)}
    compare(ordered)
    joined["means"] = means(ordered)
    recorded = [part["kept"] for part in parts if part.get("kept")]
    if recorded:  # of the same text, or only the first file's is shown
        alike = [kept for kept in recorded if kept["pieces"] == recorded[0]["pieces"]]
        joined["kept"] = {"pieces": recorded[0]["pieces"], "rows": [row for kept in alike for row in kept["rows"]]}
    return joined
