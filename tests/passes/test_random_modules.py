"""Random decoders are exact or refused, never wrong in silence; see tests/support/random_modules.py."""

from __future__ import annotations

import pytest

from tests.support.random_modules import RandomModule, outcome

FEW, MANY = 8, 2000


def check(seeds: range) -> dict[str, int]:
    count: dict[str, int] = {}
    for seed in seeds:
        found = outcome(seed)
        assert found.startswith(("exact", "refused", "no model")), f"seed {seed}: {found} ({RandomModule(seed).notes})"
        kind = found.partition(":")[0]
        count[kind] = count.get(kind, 0) + 1
    return count


def test_random_modules_are_exact_or_refused() -> None:
    count = check(range(FEW))
    assert count.get("exact", 0) >= 1 and count.get("refused", 0) >= 1


@pytest.mark.thorough
@pytest.mark.parametrize("part", range(40))
def test_many_random_modules_are_exact_or_refused(part: int) -> None:
    share = MANY // 40
    check(range(1000 + part * share, 1000 + (part + 1) * share))
