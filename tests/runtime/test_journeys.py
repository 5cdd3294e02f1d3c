"""A reader who follows a step opens few modules of the runtime and the cache (docs/develop/architecture.md)."""

from __future__ import annotations

import pytest

from benchmarks.journeys import journeys

MOST = {"prompt": 6, "token": 8}


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_a_step_enters_few_modules(static: bool) -> None:
    """The profiler's count also has `model.py`, without which it would have seen nothing."""
    found = journeys(static)
    for name, journey in found.items():
        counts = journey.groups()
        assert "kvrewrite/runtime/model.py" in journey.modules
        most = MOST[name] + (3 if static and name == "prompt" else 0)  # parts, and what captures them
        assert counts["runtime and cache"] <= most, sorted(journey.modules)
