"""Figures over seeds: means with their spread, intervals of differences, and which tasks were learned. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import binom, norm, t

DRAWS = 2000
LEVEL = 0.95
FEWEST_SEEDS = 5
"""Of fewer seeds alone no interval is made: with three, a draw is thrice the worst of them too often for 2.5 %."""

SIGNIFICANCE = 0.05


class Summary(NamedTuple):
    """Values of several seeds. With a single one there is no spread."""

    mean: float
    deviation: float | None  # sample standard deviation, with n - 1
    error: float | None  # standard error of the mean
    seeds: int


def summarise(values: Sequence[float]) -> Summary:
    """Raises ValueError without values."""
    if not len(values):
        raise ValueError("no values")
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Summary(mean, None, None, 1)
    deviation = float(np.std(values, ddof=1))
    return Summary(mean, deviation, deviation / math.sqrt(count), count)


def is_learned(accuracy: float, pairs: int) -> bool:
    """Whether an accuracy in percent is above 50 % by a one-sided binomial test at 5 %."""
    right = round(accuracy / 100 * pairs)
    return bool(binom.sf(right - 1, pairs, 0.5) < SIGNIFICANCE)


class Interval(NamedTuple):
    """A mean difference and its bootstrap interval; no interval where there is too little to resample."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def bootstrap(differences: Sequence[np.ndarray]) -> Interval:
    """The interval of a mean over seeds of a sum over tasks of means over pairs, with seeds and pairs drawn anew.

    A draw takes seeds with replacement, and within each task pairs with replacement, the same pairs for every seed: seeds
    share their held-out pairs, so the two are crossed (Owen, 2007, The pigeonhole bootstrap). Means of n drawn seeds vary
    by (n - 1) / n too little, and the spread of few seeds is itself hardly known: both are made good, the second as Student's t
    does beside the normal distribution. The draws are the same in every call.

    Args:
        differences: for each task (seeds, pairs) float64 differences between two methods, seed by seed and pair by pair.
            A metric without values for pairs is one task with one pair a seed.
    """
    mean = sum(float(task.mean()) for task in differences)
    seeds = differences[0].shape[0]
    if seeds < FEWEST_SEEDS and all(task.shape[1] == 1 for task in differences):
        return Interval(mean, None, None, seeds)
    of_seeds = _weights(seeds, 0)
    if seeds > 1:
        upper = (1 + LEVEL) / 2
        stretch = math.sqrt(seeds / (seeds - 1)) * t.ppf(upper, seeds - 1) / norm.ppf(upper)
        of_seeds = 1 / seeds + stretch * (of_seeds - 1 / seeds)
    totals = np.zeros(DRAWS)
    for number, task in enumerate(differences, start=1):
        totals += np.einsum("bp,bp->b", of_seeds @ task, _weights(task.shape[1], number))
    low, high = np.quantile(totals, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high), seeds)


@lru_cache(maxsize=64)
def _weights(count: int, stream: int) -> np.ndarray:
    """(draws, count): how often each of ``count`` things is drawn, as shares that add up to 1."""
    generator = np.random.default_rng([stream, count])
    return generator.multinomial(count, np.full(count, 1 / count), size=DRAWS) / count


def places(means: dict[str, float], *, higher_is_better: bool) -> dict[str, int]:
    """1 for the best and 2 for the second best of several means; equal ones share a place."""
    ranked = sorted(set(means.values()), reverse=higher_is_better)[:2]
    return {name: ranked.index(mean) + 1 for name, mean in means.items() if mean in ranked}
