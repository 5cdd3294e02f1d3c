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
# Both take functions of a case's parameters: apart=f, cases of different results are chosen for themselves; and derived=
# {"policy": f}, a further parameter that follows from the others.
covering = pytest.mark.covering
# Every value of every parameter in one case.
each = pytest.mark.covering({})


def few(names: Iterable[str], *, rest: Iterable[str]) -> list[Any]:
    """For `parametrize`: names, of which `rest`, whose kind others stand for, are thorough."""
    every, left_out = list(names), set(rest)
    assert left_out < set(every), left_out - set(every)
    return [pytest.param(name, marks=pytest.mark.thorough) if name in left_out else name for name in every]


Case = Mapping[str, Any]
Needs = Callable[[Case], dict[Hashable, int]]


def choose(cases: list[Case], needs: Needs) -> set[int]:
    """The numbers of few cases that meet all needs: each need has to be met by so many cases, if there are as many.

    Greedy: next comes the case that meets most open needs; among equals the one whose values were taken least, then the first.
    """
    wanted = [needs(case) for case in cases]
    values = [[(name, repr(value)) for name, value in case.items()] for case in cases]
    open_needs: dict[Hashable, int] = {}
    for need in wanted:
        open_needs.update(need)
    taken: Counter[Hashable] = Counter()
    chosen: set[int] = set()
    while True:
        best, gain = None, (0, 0)
        for i, need in enumerate(wanted):
            if i not in chosen and (met := sum(open_needs[n] > 0 for n in need)):
                mine = (met, -sum(taken[v] for v in values[i]))
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


def thin(items: list[pytest.Item]) -> None:
    """Marks as thorough the cases of products that the default tier leaves out."""
    products: dict[Hashable, list[tuple[pytest.Item, Case]]] = {}
    needs: dict[Hashable, Needs] = {}
    for item in items:
        marker = item.get_closest_marker("pairwise") or item.get_closest_marker("covering")
        if marker is None or not hasattr(item, "callspec"):
            continue
        case = dict(item.callspec.params)
        # Cases that need a GPU prove nothing for the others where there is none.
        apart = marker.kwargs.get("apart", lambda case: None)(case), item.get_closest_marker("gpu") is None
        case |= {name: of(case) for name, of in marker.kwargs.get("derived", {}).items()}
        product = (item.path, item.originalname, apart)  # type: ignore[attr-defined]
        products.setdefault(product, []).append((item, case))
        needs[product] = pairs(marker.args) if marker.name == "pairwise" else values(*marker.args)
    for product, cases in products.items():
        chosen = choose([case for _, case in cases], needs[product])
        for i, (item, _) in enumerate(cases):
            if i not in chosen:
                item.add_marker(pytest.mark.thorough)
