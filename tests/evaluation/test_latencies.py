"""Latencies: turns are shared, a disturbed round does not move the median, slow calls are not repeated for ever."""

import gc
import time
from itertools import groupby

import pytest

from policykd.evaluation.costs import Latency, _summary, measure_latencies


def test_all_take_their_turn_in_every_round() -> None:
    called: list[str] = []
    found = measure_latencies(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")}, rounds=3, calls_per_round=4, warm_up=2
    )
    assert [(name, len(list(turn))) for name, turn in groupby(called)] == [("a", 6), ("b", 6)] * 3
    assert {name: latency.num_calls for name, latency in found.items()} == {"a": 12, "b": 12}
    assert gc.isenabled()


def test_a_call_that_sleeps_takes_as_long_as_it_sleeps() -> None:
    found = measure_latencies({"asleep": lambda: time.sleep(0.002)}, rounds=2, calls_per_round=5, warm_up=0)["asleep"]
    assert 2000 <= found.least_us <= found.median_us <= found.p99_us
    assert found.median_us < 20_000


def test_slow_calls_are_timed_five_times_a_turn() -> None:
    found = measure_latencies(
        {"slow": lambda: time.sleep(0.004)}, rounds=2, calls_per_round=100, seconds_per_round=0.01
    )
    assert found["slow"].num_calls == 10


def test_one_disturbed_round_does_not_move_the_median_but_the_99th_percentile() -> None:
    calm, disturbed = [1000] * 30, [50_000] * 30
    assert _summary([calm, disturbed, calm]) == Latency(median_us=1.0, p99_us=50.0, least_us=1.0, num_calls=90)


@pytest.mark.parametrize(("num_slow", "p99"), [(1, 1.0), (2, 9.0)])
def test_the_99th_percentile_is_of_all_calls(num_slow: int, p99: float) -> None:
    turn = [1000] * (100 - num_slow) + [9000] * num_slow
    assert _summary([turn]).p99_us == p99
