"""The default tier's share of a product has what its marker promises, and only that is left out which the marker lets go."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.products import choose, covering, daily, pairs, pairwise, thin, values
from tests.support.shards import share, split

DIMS, DTYPES, KINDS = [(16, 8), (64, 32), (96, 48)], ["float32", "float16"], ["half", "pairs", "none"]
PRODUCT: list[dict[str, Any]] = [
    {"dim": dim, "dtype": dtype, "kind": kind, "undo": undo}
    for dim, dtype, kind, undo in itertools.product(DIMS, DTYPES, KINDS, [False, True])
]


def taken(chosen: set[int], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(PRODUCT[i][n] for n in names) for i in sorted(chosen)]


def test_pairwise_has_every_pair_of_values_in_few_cases() -> None:
    chosen = choose(PRODUCT, pairs())
    for names in itertools.combinations(PRODUCT[0], 2):
        assert set(taken(chosen, *names)) == {tuple(case[n] for n in names) for case in PRODUCT}
    assert 9 <= len(chosen) <= 12 < len(PRODUCT)


def test_pairwise_of_some_parameters_has_every_value_of_the_others() -> None:
    chosen = choose(PRODUCT, pairs(["dtype", "kind"]))
    assert len(set(taken(chosen, "dtype", "kind"))) == len(chosen) == 6
    assert set(taken(chosen, "dim")) == {(dim,) for dim in DIMS} and set(taken(chosen, "undo")) == {(False,), (True,)}


def test_covering_counts_and_spreads_the_other_values() -> None:
    chosen = choose(PRODUCT, values({"dim": 2, ("dtype", "undo"): 3}))
    count = {dim: taken(chosen, "dim").count((dim,)) for dim in DIMS}
    assert min(count.values()) >= 2 and max(count.values()) - min(count.values()) <= 1
    for pair in itertools.product(DTYPES, [False, True]):
        assert taken(chosen, "dtype", "undo").count(pair) == 3
    assert set(taken(chosen, "kind")) == {(kind,) for kind in KINDS} and len(chosen) == 12


def test_covering_takes_all_where_there_are_not_enough() -> None:
    assert choose(PRODUCT, values({"dim": 100})) == set(range(len(PRODUCT)))


def test_the_choice_is_the_same_every_time() -> None:
    assert choose(PRODUCT, pairs()) == choose([dict(case) for case in PRODUCT], pairs())


class Item:
    """What `thin` reads of one case of a test, and the marker that it gets."""

    path, originalname = "test_file.py", "test"

    def __init__(self, mark: Any, **case: Any) -> None:
        self.case, self.marks = case, [mark.mark]
        self.callspec = SimpleNamespace(params=case)

    def get_closest_marker(self, name: str) -> Any:
        return next((mark for mark in self.marks if mark.name == name), None)

    def add_marker(self, mark: Any) -> None:
        self.marks.append(mark.mark)


def left(items: list[Any]) -> list[dict[str, Any]]:
    thin(items)
    return [item.case for item in items if not item.get_closest_marker("thorough")]


def test_what_is_not_chosen_is_thorough() -> None:
    kept = left([Item(pairwise, **case) for case in PRODUCT])
    assert kept == [PRODUCT[i] for i in sorted(choose(PRODUCT, pairs()))]


def test_results_that_differ_are_chosen_apart() -> None:
    """Refusals do not count as proofs of what is not refused."""
    mark = covering({"dim": 1}, apart=lambda case: case["kind"] == "none")
    kept = left([Item(mark, **case) for case in PRODUCT])
    for refused in (False, True):
        assert {c["dim"] for c in kept if (c["kind"] == "none") is refused} == {*DIMS}


def test_derived_parameters_count() -> None:
    mark = covering({"wide": 3, "dim": 0}, derived={"wide": lambda case: case["dim"][0] > 16})
    kept = [case["dim"][0] > 16 for case in left([Item(mark, **case) for case in PRODUCT])]
    assert kept.count(True) >= 3 and kept.count(False) >= 3


def test_a_test_of_one_case_always_runs() -> None:
    assert left([Item(pairwise, **PRODUCT[17])]) == [PRODUCT[17]]


def test_preferred_cases_are_taken_where_they_prove_as_much() -> None:
    def wide(case: Any) -> bool:
        return bool(case["dim"][0] > 16 and not case["undo"])

    chosen = choose(PRODUCT, values({"kind": 1, "dim": 0, "dtype": 0, "undo": 0}), wide)
    assert len(chosen) == len(KINDS) and all(wide(PRODUCT[i]) for i in chosen)


def test_daily_is_what_thin_leaves() -> None:
    @covering({"dim": 1}, apart=lambda case: case["kind"] == "none")
    @pytest.mark.parametrize("dim", DIMS)
    @pytest.mark.parametrize(("dtype", "kind"), [*itertools.product(DTYPES, KINDS)])
    @pytest.mark.parametrize("undo", [False, True])
    def function() -> None: ...

    [mark] = [mark for mark in function.pytestmark if mark.name == "covering"]
    items = [Item(SimpleNamespace(mark=mark), **case) for case in cases_of(function)]
    assert sorted(map(str, daily(function))) == sorted(map(str, left(items)))


def cases_of(function: Any) -> list[dict[str, Any]]:
    """Every case of a test function without a marker of products."""
    plain = SimpleNamespace(pytestmark=[mark for mark in function.pytestmark if mark.name == "parametrize"])
    return [dict(case) for case in daily(plain)]


def test_shares_have_every_test_once_and_groups_whole() -> None:
    class Test(SimpleNamespace):
        def get_closest_marker(self, name: str) -> Any:
            return SimpleNamespace(args=(self.group,)) if self.group else None

    tests: list[Any] = [Test(nodeid=f"test_{i}", group=f"group {i % 3}" if i % 2 else None) for i in range(40)]
    shares = [share(tests, f"{n}/4") for n in (1, 2, 3, 4)]
    assert sorted(test.nodeid for part in shares for test in part) == sorted(test.nodeid for test in tests)
    assert all(
        sum(t.group == g for t in part) in (0, 6, 7) for part in shares for g in ("group 0", "group 1", "group 2")
    )
    assert all(len(part) >= 5 for part in shares)
    with pytest.raises(pytest.UsageError, match="5/4, expected I/N"):
        share(tests, "5/4")


def test_large_groups_are_split() -> None:
    class Test(SimpleNamespace):
        def get_closest_marker(self, name: str) -> Any:
            return self.marks[0]

        def add_marker(self, mark: Any, append: bool) -> None:
            self.marks.insert(0, mark.mark)

    tests: list[Any] = [Test(marks=[SimpleNamespace(args=("llama" if i % 4 else "serve",))]) for i in range(40)]
    split(tests, {"llama"}, most=12)
    names = Counter(test.get_closest_marker("xdist_group").args[0] for test in tests)
    assert names == {"serve": 10, "llama 0": 12, "llama 1": 12, "llama 2": 6}
