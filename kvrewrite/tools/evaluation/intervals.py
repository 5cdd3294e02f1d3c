"""Computes 95% confidence intervals of scores, with fixed seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

Z = 1.959963984540054  # the normal distribution's 97.5% quantile
RESAMPLES = 2000
BOOTSTRAP_SEED = 20061


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval. method: "wilson" or "bootstrap"; n: how many scores."""

    mean: float
    low: float
    high: float
    n: int
    method: str


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a proportion (Wilson 1927), which stays inside [0, 1] and has a width at 0 and at n."""
    p, z2 = successes / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Percentile bootstrap of the mean of the groups' means, resampled within each group; the seed is fixed."""
    random = numpy.random.default_rng(BOOTSTRAP_SEED)
    means = numpy.zeros(RESAMPLES)
    for scores in groups:
        values = numpy.asarray(scores, dtype=float)
        means += values[random.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = numpy.quantile(means / len(groups), [0.025, 0.975])
    return float(low), float(high)


def interval(*groups: Sequence[float]) -> Interval:
    """Returns the mean of the groups' means (one group per task) and its interval.

    Wilson's interval if all scores are 0 or 1 and the groups are equally large, otherwise the bootstrap. If all scores
    are the same, the bootstrap would have no width; Wilson's is used and is wide enough for any scores within [0, 1],
    since none vary more than zeros and ones of the same mean.
    """
    if not groups or not all(groups):
        raise ValueError("no scores")
    n = sum(len(g) for g in groups)
    mean = math.fsum(math.fsum(g) / len(g) for g in groups) / len(groups)
    values = {s for g in groups for s in g}
    if (len({len(g) for g in groups}) == 1 and values <= {0, 1}) or len(values) == 1:
        return Interval(mean, *wilson(math.fsum(s for g in groups for s in g), n), n, "wilson")
    return Interval(mean, *bootstrap(groups), n, "bootstrap")


def difference(scores: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Returns the mean of paired differences (same samples in the same order) with a bootstrap interval."""
    pairs = [a - b for a, b in zip(scores, baseline, strict=True)]
    return Interval(math.fsum(pairs) / len(pairs), *bootstrap([pairs]), len(pairs), "bootstrap")


def ratio(sums: Sequence[float], counts: Sequence[int], groups: Sequence[int]) -> Interval:
    """Returns the sum of `sums` over that of `counts`, with a bootstrap over groups: what belongs to one group (a
    document) is drawn together. n: how many groups."""
    names = sorted(set(groups))
    place = {name: i for i, name in enumerate(names)}
    where = numpy.asarray([place[g] for g in groups])
    totals = numpy.bincount(where, numpy.asarray(sums, dtype=float), len(names))
    weights = numpy.bincount(where, numpy.asarray(counts, dtype=float), len(names))
    drawn = numpy.random.default_rng(BOOTSTRAP_SEED).integers(0, len(names), (RESAMPLES, len(names)))
    low, high = numpy.quantile(totals[drawn].sum(1) / weights[drawn].sum(1), [0.025, 0.975])
    return Interval(math.fsum(sums) / sum(counts), float(low), float(high), len(names), "bootstrap by group")
