"""What the tests cost: `pytest --cpu-seconds FILE` writes each test's CPU seconds, and says at the end what each folder took.

Wall times depend on what else a machine does. CPU seconds of a test, of its setup and teardown and of the processes that it
started and waited for do so much less (up to twice as many on busy cores), so they are what docs/develop/testing.md budgets.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# CPU seconds that a folder's default tests may take on idle cores; all of them in 8 minutes of two cores.
BUDGET = {
    "analysis": 10,
    "artifact": 60,
    "cache": 70,
    "capture": 45,
    "cli": 25,
    "coverage": 5,
    "dynamo": 75,
    "ir": 20,
    "kernels": 75,
    "ops": 15,
    "passes": 105,
    "policies": 110,
    "runtime": 150,
    "serving": 35,
    "tools": 85,
    "vllm": 5,
    "top": 40,  # files of tests/ itself
}


def spent() -> float:
    """CPU seconds of this process and of those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def folder_of(test: str) -> str:
    parts = Path(test.partition("::")[0]).parts
    return parts[1] if len(parts) > 2 else "top"


class Costs:
    """Of the tests of one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = spent()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = spent() - before

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps({"all": spent(), "tests": self.seconds}, indent=1))


class Report:
    """What all processes wrote, in the one that starts them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        found = [json.loads(p.read_text()) for p in (self.path, *of_workers(self.path)) if p.exists()]
        folders = Counter[str]()
        for test, seconds in ((t, s) for part in found for t, s in part["tests"].items()):
            folders[folder_of(test)] += seconds
        lines = [
            f"{name:>9} {folders[name]:6.0f} of {most:3} CPU s" for name, most in BUDGET.items() if name in folders
        ]
        total, beside = sum(folders.values()), sum(part["all"] for part in found) - sum(folders.values())
        lines.append(
            f"{'all':>9} {total:6.0f} of {sum(BUDGET.values())} CPU s, and {beside:.0f} for imports and collection"
        )
        terminalreporter.section("CPU seconds by folder, and what it may take on idle cores")
        terminalreporter.write("\n".join(lines) + "\n")


def of_workers(path: Path) -> list[Path]:
    """The files of pytest-xdist's processes."""
    return sorted(path.parent.glob(f"{path.name}.gw*"))


def watch(config: pytest.Config) -> None:
    """What `--cpu-seconds` asks for."""
    if not config.getoption("--cpu-seconds"):
        return
    path, worker = Path(config.getoption("--cpu-seconds")).resolve(), os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        config.pluginmanager.register(Costs(path.with_name(f"{path.name}.{worker}")))
        return
    for old in (path, *of_workers(path)):
        old.unlink(missing_ok=True)
    if not config.getoption("numprocesses", None):
        config.pluginmanager.register(Costs(path))
    config.pluginmanager.register(Report(path))
