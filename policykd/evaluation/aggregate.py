"""Statistics over several games, each with its interval, under the names of rliable (Agarwal et al., 2021).

A score is the mean return of one run, normalised by teacher and random play. Scores are arrays whose last two axes are
runs and games. Suffixes name dimensions: S the sample and its resamples, N runs, M runs of another student, G games,
T thresholds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from policykd.evaluation.statistics import interquartile_mean, normalise

NUM_RESAMPLES = 2_000
"""bootstrap resamples; the interval's ends then vary by about 2 % of its width"""


@dataclass(frozen=True)
class GameReturns:
    """Episodic returns on one game, unclipped."""

    runs: Sequence[Sequence[float]]
    """those of the students, run by run"""
    teacher: Sequence[float]
    random: Sequence[float]
    """those of random play; a single 0 makes scores the plain ratio of student and teacher"""


@dataclass(frozen=True)
class Estimate:
    """A statistic and the ends of its 95 % percentile interval, arrays of one shape: () or (T,)."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def bootstrap_scores(games: Mapping[str, GameReturns], *, seed: int = 0) -> np.ndarray:
    """Returns the runs' normalised scores and bootstrap resamples of them, shape (1 + `NUM_RESAMPLES`, N, G).

    Row 0 holds the scores themselves. The bootstrap is stratified: games are fixed, and runs are drawn with replacement
    within each game (Agarwal et al., 2021, section 3). Where a game has a single run that draws the same run again and
    again, as if its score were exact. So episodes are also drawn with replacement within each drawn run (Davison and
    Hinkley, 1997, section 3.8), and so are those of teacher and random play, whose means are estimates too. With one
    run per game the intervals contain no variation between training runs, and with three too little of it.

    Raises:
        ValueError: no games, a game without episodes, games with different numbers of runs, or a teacher that is no
            better than random play, in the sample or in a resample.
    """
    generator = np.random.default_rng(seed)
    students_SNG = _resampled_means({game: returns.runs for game, returns in games.items()}, generator)
    teachers_S1G = _resampled_means({game: [returns.teacher] for game, returns in games.items()}, generator)
    random_S1G = _resampled_means({game: [returns.random] for game, returns in games.items()}, generator)
    is_better_G = np.asarray((teachers_S1G > random_S1G).all(axis=(0, 1)))
    for game, is_better in zip(games, is_better_G, strict=True):
        if not is_better:
            raise ValueError(f"{game}: the teacher is not clearly better than random play; leave the game out")
    return normalise(students_SNG, teachers_S1G, random_S1G)


def estimate(statistic: Callable[[np.ndarray], np.ndarray], scores_SNG: np.ndarray) -> Estimate:
    """Returns a statistic of `bootstrap_scores` with its interval.

    Raises:
        ValueError: the statistic is not defined for the scores or for a resample.
    """
    values = statistic(scores_SNG)
    low, high = np.quantile(values[1:], [0.025, 0.975], axis=0)
    return Estimate(values[0], low, high)


def aggregate_mean(scores: np.ndarray) -> np.ndarray:
    """Returns the mean over runs and games."""
    return np.asarray(scores.mean(axis=(-2, -1)))


def aggregate_median(scores: np.ndarray) -> np.ndarray:
    """Returns the median over games of each game's mean over runs."""
    return np.asarray(np.median(scores.mean(axis=-2), axis=-1))


def aggregate_iqm(scores: np.ndarray) -> np.ndarray:
    """Returns the interquartile mean of all runs of all games together."""
    return interquartile_mean(scores.reshape(*scores.shape[:-2], -1))


def aggregate_optimality_gap(scores: np.ndarray) -> np.ndarray:
    """Returns the mean amount by which runs miss a score of 1, the teacher's; a better run counts as 0."""
    return np.asarray(np.maximum(1.0 - scores, 0.0).mean(axis=(-2, -1)))


def geometric_mean(scores: np.ndarray) -> np.ndarray:
    """Returns the geometric mean over games of each game's mean over runs (Rusu et al., 2015).

    Raises:
        ValueError: a game's mean is not positive, and the geometric mean not defined.
    """
    games = scores.mean(axis=-2)
    if not (games > 0.0).all():
        raise ValueError("no geometric mean: a game's score is not positive, in the sample or in a resample")
    return np.asarray(np.exp(np.log(games).mean(axis=-1)))


def performance_profile(scores: np.ndarray, thresholds_T: np.ndarray) -> np.ndarray:
    """Returns the fraction of runs with a score above each threshold, over all games: axes (..., T)."""
    return np.asarray((scores[..., None] > thresholds_T).mean(axis=(-3, -2)))


def probability_of_improvement(
    x: Mapping[str, GameReturns], y: Mapping[str, GameReturns], *, seed: int = 0
) -> Estimate:
    """Returns the probability that a run of x has a higher score than one of y on the same game, mean over games.

    Ties count half. A score rises with its return, so returns are compared, and the teacher's episodes play no part.

    Raises:
        ValueError: x and y have different games, or as for `bootstrap_scores`.
    """
    if x.keys() != y.keys():
        raise ValueError(f"not the same games: {', '.join(x)}; {', '.join(y)}")
    # One generator for both, or x and y would be resampled alike and not be independent.
    generator = np.random.default_rng(seed)
    x_SNG = _resampled_means({game: x[game].runs for game in x}, generator)
    y_SMG = _resampled_means({game: y[game].runs for game in x}, generator)
    signs_SNMG = np.sign(x_SNG[:, :, None] - y_SMG[:, None])
    return estimate(lambda signs: np.asarray((0.5 + 0.5 * signs).mean(axis=(1, 2, 3))), signs_SNMG)


def _resampled_means(games: Mapping[str, Sequence[Sequence[float]]], generator: np.random.Generator) -> np.ndarray:
    """Returns the mean return of each run, row 0, and resamples of runs and their episodes, shape (S, N, G)."""
    if not games:
        raise ValueError("no games, so no statistics over games")
    for game, runs in games.items():
        if not (runs and all(runs)):
            raise ValueError(f"{game}: no episodes, so no statistics")
    if len({len(runs) for runs in games.values()}) > 1:
        counts = ", ".join(f"{game} {len(runs)}" for game, runs in games.items())
        raise ValueError(f"games with different numbers of runs: {counts}")
    return np.stack([_resampled_means_of_game(runs, generator) for runs in games.values()], axis=-1)


def _resampled_means_of_game(runs: Sequence[Sequence[float]], generator: np.random.Generator) -> np.ndarray:
    drawn_SN = generator.integers(len(runs), size=(NUM_RESAMPLES, len(runs)))
    means_SN = np.empty(drawn_SN.shape)
    for number, returns in enumerate(runs):
        # Other episodes each time that a run is drawn.
        is_drawn_SN = drawn_SN == number
        episodes = generator.choice(np.asarray(returns, np.float64), (int(is_drawn_SN.sum()), len(returns)))
        means_SN[is_drawn_SN] = episodes.mean(axis=1)
    return np.vstack([[np.mean(returns) for returns in runs], means_SN])
