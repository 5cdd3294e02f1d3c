"""Tests that share captured models run in one process."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("grouped")
def test_groups_are_heeded(request: pytest.FixtureRequest) -> None:
    """pytest-xdist tells its scheduler a test's group by the end of its id. With pytest 9.2 it can't (its issue 1386), and every
    process captures every family."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("all tests run in one process")
    assert request.node.nodeid.endswith("@grouped")
