"""`pytest --shard 2/4`: the second of four shares of the tests, for machines on which a run may only last so long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

import pytest


def share(items: list[pytest.Item], which: str) -> list[pytest.Item]:
    """The tests of one share, such as "2/4": each test is in one of them, and those of a group are in the same one."""
    number, _, count = which.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise pytest.UsageError(f"--shard is {which}, expected I/N with I from 1 to N")
    units: dict[Hashable, int] = {}

    def unit(item: pytest.Item) -> int:
        group = item.get_closest_marker("xdist_group")
        return units.setdefault(group.args if group else item.nodeid, len(units))

    # By turns: long tests of a kind follow each other.
    return [item for item in items if unit(item) % int(count) == int(number) - 1]


def split(items: list[pytest.Item], groups: set[str], most: int = 50) -> None:
    """Makes several groups of each of these with more tests: to capture a model again costs less than to wait for one process."""
    count: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("xdist_group")
        if marker is not None and marker.args and (name := marker.args[0]) in groups:
            item.add_marker(pytest.mark.xdist_group(f"{name} {count[name] // most}"), append=False)
            count[name] += 1


class Shard:
    """Leaves the other shares out, after all else was."""

    def __init__(self, which: str) -> None:
        self.which = which

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        mine = share(items, self.which)
        kept = set(map(id, mine))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
        items[:] = mine
