"""Statistics of episodic returns, under the names of rliable (Agarwal et al., 2021)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Number = TypeVar("Number", float, np.ndarray)

RESAMPLES = 10_000
"""bootstrap resamples; the interval's ends then vary by about 1 % of its width"""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Statistics of the returns of full episodes."""

    num_episodes: int
    num_distinct: int
    """number of different returns; few mean that the same episode was played again and again"""
    mean: float
    std: float
    """sample standard deviation of one episode (n - 1)"""
    interval: tuple[float, float]
    """95 % percentile bootstrap interval of the mean"""
    iqm: float
    """interquartile mean: the mean of the middle half"""
    iqm_interval: tuple[float, float]
    """95 % percentile bootstrap interval of the interquartile mean"""


def summarise(returns: Sequence[float]) -> Summary:
    """Returns the statistics of a list of episodic returns.

    Raises:
        ValueError: an empty list.
    """
    x = np.asarray(returns, np.float64)
    if not len(x):
        raise ValueError("no episodes, so no statistics: play at least one")
    return Summary(
        num_episodes=len(x),
        num_distinct=len(np.unique(x)),
        mean=float(x.mean()),
        std=float(x.std(ddof=1)) if len(x) > 1 else 0.0,
        interval=bootstrap_interval(x, np.mean),
        iqm=float(interquartile_mean(x)),
        iqm_interval=bootstrap_interval(x, interquartile_mean),
    )


def interquartile_mean(values: Sequence[float] | np.ndarray, axis: int = -1) -> np.ndarray:
    """Returns the mean of the middle half along an axis: a quarter, rounded down, is cut off at either end."""
    x = np.sort(np.asarray(values, np.float64), axis=axis)
    cut = x.shape[axis] // 4
    return np.asarray(x.take(range(cut, x.shape[axis] - cut), axis=axis).mean(axis=axis))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, statistic: Callable[..., np.ndarray], *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of `statistic(rows, axis=1)` (Efron, 1979)."""
    x = np.asarray(values, np.float64)
    # One matrix of resamples, so that the statistic is computed for all of them at once.
    rows = np.random.default_rng(seed).choice(x, (RESAMPLES, len(x)))
    low, high = np.quantile(statistic(rows, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference_interval(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, *, level: float = 0.95
) -> tuple[float, float, float]:
    """Returns mean(a) - mean(b) and the ends of its bootstrap interval, for two independent samples."""
    # Teacher and student played independent games, so each is resampled on its own.
    generator = np.random.default_rng(0)
    means = [generator.choice(np.asarray(x, np.float64), (RESAMPLES, len(x))).mean(axis=1) for x in (a, b)]
    low, high = np.quantile(means[0] - means[1], [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean(a) - np.mean(b)), float(low), float(high)


def teacher_normalised_score(student: float, teacher: float, random: float) -> float | None:
    """Returns (student - random) / (teacher - random), or None if the teacher is no better than a random policy."""
    return normalise(student, teacher, random) if teacher > random else None


def normalise(returns: Number, teacher: Number, random: Number) -> Number:
    """Returns (returns - random) / (teacher - random), of numbers or elementwise of arrays."""
    score: Number = (returns - random) / (teacher - random)
    return score
