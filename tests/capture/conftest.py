"""In this folder, whose subject captures are, every one is a trace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.shared_captures import traced_each_time


@pytest.fixture(autouse=True)
def own_traces() -> Iterator[None]:
    with traced_each_time():
        yield
