import numpy as np
import pytest

from policykd.evaluation.statistics import (
    bootstrap_interval,
    difference_interval,
    interquartile_mean,
    summarise,
    teacher_normalised_score,
)


def test_a_summary_of_known_numbers() -> None:
    s = summarise([1.0, 2.0, 3.0, 4.0, 100.0, 2.0, 3.0, 5.0])
    assert (s.num_episodes, s.num_distinct, s.mean) == (8, 6, 15.0)
    assert s.iqm == 3.0  # of 2, 3, 3, 4
    assert s.std == pytest.approx(np.std([1, 2, 3, 4, 100, 2, 3, 5], ddof=1))
    assert s.interval[0] < 15 < s.interval[1]
    assert s.iqm_interval[1] < s.interval[1]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 30, 101])
def test_the_interquartile_mean_is_scipys_trimmed_mean(n: int) -> None:
    """scipy.stats.trim_mean(x, 0.25), which rliable uses, cuts int(n / 4) at either end."""
    x = np.random.default_rng(n).normal(size=n)
    assert interquartile_mean(x) == pytest.approx(np.sort(x)[n // 4 : n - n // 4].mean())


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for k in range(200):
        low, high = bootstrap_interval(generator.normal(size=60), np.mean, seed=k)
        hits += low <= 0.0 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_a_difference_and_its_interval() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(3.0, 1.0, 400), generator.normal(1.0, 1.0, 300)
    difference, low, high = difference_interval(a, b)
    assert difference == pytest.approx(a.mean() - b.mean())
    assert low < difference < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(1 / 400 + 1 / 300), rel=0.15)


def test_normalised_scores() -> None:
    assert teacher_normalised_score(10.0, 20.0, -20.0) == 0.75
    assert teacher_normalised_score(10.0, -20.0, -20.0) is None


def test_no_episodes_no_statistics() -> None:
    with pytest.raises(ValueError, match="no episodes"):
        summarise([])
