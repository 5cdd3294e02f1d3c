"""What the tests cost, in CPU seconds: `pytest -p tests.support.cpu_seconds --cpu-seconds FILE` writes each test's.

Wall times depend on what else a machine does; CPU seconds of a test, its setup and teardown and the processes that it started
and waited for do so much less.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def spent() -> float:
    """CPU seconds of this process and of those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-seconds", metavar="FILE", help="write the CPU seconds of each test to FILE (JSON)")


class Costs:
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


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--cpu-seconds"):
        config.pluginmanager.register(Costs(Path(path)))
