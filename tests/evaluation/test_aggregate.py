"""Statistics over games, against numbers computed by hand and by rliable 1.2.0."""

import time
from collections.abc import Sequence

import numpy as np
import pytest

from policykd.evaluation.aggregate import (
    NUM_RESAMPLES,
    GameReturns,
    aggregate_iqm,
    aggregate_mean,
    aggregate_median,
    aggregate_optimality_gap,
    bootstrap_scores,
    estimate,
    geometric_mean,
    performance_profile,
    probability_of_improvement,
)

X = np.array([[0.98, 0.71, 1.2, 0.31, 1.02], [1.01, 0.64, 1.05, 0.4, 1.02], [0.95, 0.8, 0.9, 0.22, 1.1]])
Y = np.array([[0.97, 0.64, 1.05, 0.45, 0.99], [0.9, 0.6, 1.3, 0.1, 1.02]])
Z = np.array(
    [
        [0.83, 0.77, 0.93, 0.82, 0.69, 0.87],
        [1.06, 0.99, 0.66, 0.55, 0.68, 0.81],
        [0.33, 0.76, 0.55, 0.65, 0.69, 0.74],
        [0.88, 1.01, 0.77, 1.07, 0.67, 0.87],
        [0.98, 0.82, 0.65, 0.62, 0.71, 0.84],
    ]
)
W = np.array(
    [
        [0.55, 0.71, 0.72, 0.86, 0.79, 0.82],
        [0.62, 0.72, 0.91, 1.05, 0.5, 1.05],
        [1.02, 0.91, 0.8, 0.69, 1.04, 1.14],
        [1.11, 1.01, 0.82, 0.51, 0.75, 0.88],
    ]
)


def of_matrix(scores: np.ndarray) -> dict[str, GameReturns]:
    """Returns games in which every run is one episode, and teacher and random play return exactly 1 and 0."""
    return {f"game {i}": GameReturns([[score] for score in column], [1.0], [0.0]) for i, column in enumerate(scores.T)}


def game(*runs: Sequence[float], teacher: Sequence[float] = (1.0,)) -> dict[str, GameReturns]:
    return {"Pong": GameReturns(runs, teacher, [0.0])}


def width(games: dict[str, GameReturns]) -> float:
    found = estimate(aggregate_mean, bootstrap_scores(games))
    return float(found.high - found.low)


def test_statistics_are_those_of_rliable() -> None:
    assert aggregate_mean(X) == pytest.approx(0.8206666666666667)
    assert aggregate_median(X) == pytest.approx(0.98)
    assert aggregate_iqm(X) == pytest.approx(0.8922222222222221)
    assert aggregate_optimality_gap(X) == pytest.approx(0.206)
    assert probability_of_improvement(of_matrix(X), of_matrix(Y)).value == pytest.approx(2 / 3)
    assert probability_of_improvement(of_matrix(Y), of_matrix(X)).value == pytest.approx(1 / 3)
    thresholds = np.array([0.0, 0.4, 0.64, 0.9, 1.0, 1.02, 1.2, 1.3])
    assert performance_profile(X, thresholds) * 15 == pytest.approx([15, 12, 11, 8, 6, 3, 0, 0])


def test_intervals_are_those_of_rliable() -> None:
    """Its intervals of 5,000 resamples, with one episode per run, as it resamples runs only."""
    scores = bootstrap_scores(of_matrix(Z))
    for statistic, low, high in (
        (aggregate_mean, 0.7227, 0.8273),
        (aggregate_median, 0.6960, 0.8420),
        (aggregate_iqm, 0.7275, 0.8238),
        (aggregate_optimality_gap, 0.1810, 0.2797),
    ):
        found = estimate(statistic, scores)
        assert found.value == pytest.approx(statistic(Z))
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.006)
    improvement = probability_of_improvement(of_matrix(Z), of_matrix(W))
    assert improvement.value == pytest.approx(0.3625)
    assert (improvement.low, improvement.high) == pytest.approx((0.2083, 0.525), abs=0.025)
    profile = estimate(lambda s: performance_profile(s, np.array([0.4, 0.9, 1.02])), bootstrap_scores(of_matrix(X)))
    assert profile.low == pytest.approx([0.8, 0.4, 1 / 15])
    assert profile.high == pytest.approx([0.8, 0.6, 1 / 3])


def test_statistics_by_hand() -> None:
    scores = np.array([[2.0, 0.5], [0.0, 0.5]])
    assert aggregate_mean(scores) == 0.75
    assert aggregate_median(scores) == 0.75
    assert aggregate_iqm(scores) == 0.5
    assert aggregate_optimality_gap(scores) == 0.5
    assert geometric_mean(scores) == pytest.approx(np.sqrt(1.0 * 0.5))
    assert geometric_mean(np.array([[1.083, 1.017, 0.839]])) == pytest.approx((1.083 * 1.017 * 0.839) ** (1 / 3))
    assert performance_profile(scores, np.array([0.5])).tolist() == [0.25]  # above, not equal
    ties = probability_of_improvement(game([1.0], [2.0]), game([1.0], [1.0]))
    assert ties.value == 0.75
    stack = np.stack([scores, 2 * scores])
    assert aggregate_iqm(stack).tolist() == [0.5, 1.0]
    assert performance_profile(stack, np.array([0.1, 0.9])).tolist() == [[0.75, 0.25], [0.75, 0.75]]


def test_scores_are_normalised_by_teacher_and_random_play() -> None:
    games = {"Pong": GameReturns([[18.0, 20.0], [14.0, 16.0]], [20.0, 18.0], [-21.0])}
    scores = bootstrap_scores(games)
    assert scores.shape == (1 + NUM_RESAMPLES, 2, 1)
    assert scores[0, :, 0].tolist() == [1.0, 0.9]
    # A single 0 in place of random play is the plain ratio of Rusu et al. (2015).
    ratio = bootstrap_scores({"Pong": GameReturns(games["Pong"].runs, [20.0], [0.0])})
    assert ratio[0, :, 0] == pytest.approx([0.95, 0.75])


def test_a_single_run_is_as_uncertain_as_its_episodes_and_its_teacher() -> None:
    episodes = list(np.random.default_rng(0).normal(1.0, 0.5, 100))
    assert width(game([1.0])) == 0.0
    assert width(game(episodes)) == pytest.approx(2 * 1.96 * np.std(episodes) / 10, rel=0.1)
    assert width(game([1.0], teacher=episodes)) == pytest.approx(width(game(episodes)), rel=0.3)
    # Two runs of constant, different returns: their mean is 0, 0.5 or 1.
    between = estimate(aggregate_mean, bootstrap_scores(game([0.0] * 9, [1.0] * 9)))
    assert [between.value, between.low, between.high] == [0.5, 0.0, 1.0]


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        runs = generator.normal(size=(10, 1)) + generator.normal(size=(10, 20))
        found = estimate(aggregate_mean, bootstrap_scores(game(*runs.tolist()), seed=seed))
        hits += bool(found.low <= 0.0 <= found.high)
    assert 0.87 <= hits / 100 <= 0.99


def test_students_are_resampled_independently() -> None:
    episodes = [0.0, 1.0] * 20
    same = probability_of_improvement(game(episodes), game(episodes))
    assert [same.value, same.low, same.high] == [0.5, 0.0, 1.0]


def test_a_seed_gives_the_same_interval() -> None:
    games = game([0.0, 1.0, 5.0], [2.0, 3.0, 4.0])
    assert np.array_equal(bootstrap_scores(games), bootstrap_scores(games))
    assert not np.array_equal(bootstrap_scores(games), bootstrap_scores(games, seed=1))


def test_ten_games_take_well_under_a_second() -> None:
    returns = np.random.default_rng(0).normal(size=(3, 100)).tolist()
    games = {str(number): GameReturns(returns, [9.0] * 100, [-9.0] * 32) for number in range(10)}
    began = time.process_time()
    estimate(aggregate_iqm, bootstrap_scores(games))
    assert time.process_time() - began < 1.0


def test_scores_that_are_not_defined_are_refused() -> None:
    with pytest.raises(ValueError, match="no games"):
        bootstrap_scores({})
    with pytest.raises(ValueError, match="Pong: no episodes"):
        bootstrap_scores(game([]))
    with pytest.raises(ValueError, match="different numbers of runs: Pong 1, Qbert 2"):
        bootstrap_scores({**game([1.0]), "Qbert": GameReturns([[1.0], [2.0]], [1.0], [0.0])})
    with pytest.raises(ValueError, match="Pong: the teacher is not clearly better than random play"):
        bootstrap_scores(game([1.0], teacher=[-1.0, 3.0]))  # in some resamples its mean is -1
    with pytest.raises(ValueError, match="no geometric mean"):
        geometric_mean(np.array([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="not the same games: Pong; game 0"):
        probability_of_improvement(game([1.0]), of_matrix(np.ones((1, 1))))
