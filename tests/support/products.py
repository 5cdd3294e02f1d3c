"""Products of parameters in tiers: what `pytest` runs of them, and what only `pytest -m thorough` runs.

A test with several parameters (families x policies, dims x dtypes x options) takes the whole product by its ordinary
`parametrize` decorators. One of the markers below says how much of it proves the point in daily work:

    @pairwise                       # every pair of values of any two parameters
    @pytest.mark.parametrize(...)
    @pytest.mark.parametrize(...)

The other cases get the marker `thorough`. Names of the cases stay the same, and so does the choice: it depends on the
cases alone. A case that one asks for by its name (`file.py::test[case]`) always runs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import pytest

# Every pair of values of any two parameters; with names, of any two of these, and every value of the others.
pairwise = pytest.mark.pairwise
# covering({"name": 2, ("policy", "positions"): 3}): every `name` in two cases, every policy with its positions in three,
# every value of any other parameter in one (none: 0).
# Both take functions of a case's parameters: apart=f, cases of different results are chosen for themselves; derived=
# {"policy": f}, a further parameter that follows from the others; prefer=f, of cases that prove as much those where it is true.
covering = pytest.mark.covering
# Every value of every parameter in one case.
each = pytest.mark.covering({})


def few(names: Iterable[Any], *, rest: Iterable[Any]) -> list[Any]:
    """For `parametrize`: names, of which `rest`, whose kind others stand for, are thorough."""
    every, left_out = list(names), set(rest)
    assert left_out < set(every), left_out - set(every)
    return [pytest.param(name, marks=pytest.mark.thorough) if name in left_out else name for name in every]


Case = Mapping[str, Any]
Needs = Callable[[Case], dict[Hashable, int]]


def choose(cases: list[Case], needs: Needs, prefer: Callable[[Case], bool] = lambda case: False) -> set[int]:
    """The numbers of few cases that meet all needs: each need has to be met by so many cases, if there are as many.

    Greedy: next comes the case that meets most open needs; among equals one that is preferred, then the one whose values were
    taken least, then the first.
    """
    wanted = [needs(case) for case in cases]
    values = [[(name, repr(value)) for name, value in case.items()] for case in cases]
    open_needs: dict[Hashable, int] = {}
    for need in wanted:
        open_needs.update(need)
    taken: Counter[Hashable] = Counter()
    chosen: set[int] = set()
    liked = [prefer(case) for case in cases]
    while True:
        best, gain = None, (0, False, 0)
        for i, need in enumerate(wanted):
            if i not in chosen and (met := sum(open_needs[n] > 0 for n in need)):
                mine = (met, liked[i], -sum(taken[v] for v in values[i]))
                if best is None or mine > gain:
                    best, gain = i, mine
        if best is None:
            return chosen
        chosen.add(best)
        taken.update(values[best])
        for need in wanted[best]:
            open_needs[need] -= 1


def pairs(names: Iterable[str] = ()) -> Needs:
    """The needs of `pairwise`: every pair of values of any two parameters (of these, if any are named), and every value."""
    among = set(names)

    def needs(case: Case) -> dict[Hashable, int]:
        shown = {name: repr(value) for name, value in case.items()}
        paired = sorted(item for item in shown.items() if not among or item[0] in among)
        return dict.fromkeys([*itertools.combinations(paired, 2), *shown.items()], 1)

    return needs


def values(least: Mapping[str | tuple[str, ...], int]) -> Needs:
    """The needs of `covering`."""
    groups = {(key,) if isinstance(key, str) else key: count for key, count in least.items()}
    grouped = {name for group in groups for name in group}

    def needs(case: Case) -> dict[Hashable, int]:
        asked = {(group, *(repr(case[name]) for name in group)): count for group, count in groups.items()}
        return {**asked, **{(name, repr(value)): 1 for name, value in case.items() if name not in grouped}}

    return needs


def chosen_by(marker: pytest.Mark, cases: list[Case]) -> set[int]:
    """The numbers of the cases that a marker leaves in the default tier."""
    needs = pairs(marker.args) if marker.name == "pairwise" else values(*marker.args)
    return choose(cases, needs, marker.kwargs.get("prefer", lambda case: False))


def daily(function: Any) -> list[Case]:
    """The cases of a test function that the default tier runs, read from its markers: for tests of what is left."""
    marks: list[pytest.Mark] = function.pytestmark
    lists = []
    for mark in (m for m in marks if m.name == "parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        alone = len(names) == 1
        params = [v if hasattr(v, "marks") else pytest.param(*([v] if alone else v)) for v in mark.args[1]]
        daily = [p for p in params if not any(m.name == "thorough" for m in p.marks)]
        lists.append([dict(zip(map(str.strip, names), p.values, strict=True)) for p in daily])
    cases: list[Case] = [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*lists)]
    marker = next((m for m in marks if m.name in ("pairwise", "covering")), None)
    if marker is None:
        return cases
    kinds: dict[Hashable, list[Case]] = {}
    for case in cases:
        kinds.setdefault(marker.kwargs.get("apart", lambda case: None)(case), []).append(case)
    return [
        alike[i]
        for alike in kinds.values()
        for i in sorted(chosen_by(marker, [with_derived(marker, c) for c in alike]))
    ]


def with_derived(marker: pytest.Mark, case: Case) -> Case:
    """A case with the further parameters of `derived=`."""
    return {**case, **{name: of(case) for name, of in marker.kwargs.get("derived", {}).items()}}


def thin(items: list[pytest.Item]) -> None:
    """Marks as thorough the cases of products that the default tier leaves out."""
    products: dict[Hashable, list[tuple[pytest.Item, Case]]] = {}
    markers: dict[Hashable, pytest.Mark] = {}
    for item in items:
        marker = item.get_closest_marker("pairwise") or item.get_closest_marker("covering")
        if marker is None or not hasattr(item, "callspec"):
            continue
        case: Case = dict(item.callspec.params)
        # Cases that need a GPU prove nothing for the others where there is none.
        apart = marker.kwargs.get("apart", lambda case: None)(case), item.get_closest_marker("gpu") is None
        product = (item.path, item.originalname, apart)  # type: ignore[attr-defined]
        products.setdefault(product, []).append((item, with_derived(marker, case)))
        markers[product] = marker
    for product, cases in products.items():
        chosen = chosen_by(markers[product], [case for _, case in cases])
        for i, (item, _) in enumerate(cases):
            if i not in chosen:
                item.add_marker(pytest.mark.thorough)
