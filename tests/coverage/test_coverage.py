"""The table of docs/coverage.md still holds: `pytest -m coverage` (deselected otherwise; an hour on two cores)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.coverage import configs, page
from tests.coverage.measure import Worker
from tests.coverage.modules import ALL_MODULES

pytestmark = pytest.mark.coverage


@pytest.fixture(scope="session")
def measure() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def _installed() -> page.Outcomes:
    import transformers

    return page.read(transformers.__version__)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each name; the list needs transformers, so it is made where it is asked for only."""
    if "name" in metafunc.fixturenames:
        asked = "coverage" in (metafunc.config.option.markexpr or "")
        metafunc.parametrize("name", [*configs.model_types(), *configs.VARIANTS, *ALL_MODULES] if asked else [])


def test_architecture(name: str, measure: Worker) -> None:
    """Exact where the table says so, refused where it says so, and never anything else than these."""
    outcome = measure(name)
    recorded = _installed().get(name)
    if recorded is not None:
        assert outcome.status == recorded["status"], f"{outcome.status}: {outcome.reason}"
    assert outcome.status in ("exact", "refused", "no model"), f"{outcome.status}: {outcome.reason}"
    if recorded is not None and outcome.status == "exact":
        assert (outcome.sites, outcome.idiom, outcome.rope) == (recorded["sites"], recorded["idiom"], recorded["rope"])


def test_the_table_is_complete() -> None:
    """At least 90 architectures of the installed transformers are exact, and 12 modules from elsewhere."""
    recorded = _installed()
    if not recorded:
        pytest.skip("this version of transformers is not in the table")
    assert set(recorded) == {*configs.model_types(), *configs.VARIANTS, *ALL_MODULES}
    exact = [n for n, o in recorded.items() if o["status"] == "exact"]
    assert sum(page.is_architecture(n) for n in exact) >= 90
    assert sum(n in ALL_MODULES for n in exact) >= 12
