"""Latencies are timed in turns: a disturbed round does not move the median, slow calls are bounded."""

import gc
import time
from itertools import groupby

import pytest

from policykd.evaluation.costs import Latency, TimingOptions, measure_latencies, summarise_latencies


def test_all_calls_take_turns_in_every_round() -> None:
    called: list[str] = []
    found = measure_latencies(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")},
        TimingOptions(rounds=3, calls_per_round=4, warm_up=2, seconds_per_round=float("inf")),
    )
    assert [(name, len(list(turn))) for name, turn in groupby(called)] == [("a", 6), ("b", 6)] * 3
    assert {name: latency.num_calls for name, latency in found.items()} == {"a": 12, "b": 12}
    assert gc.isenabled()


def test_slow_calls_are_timed_five_times_a_turn() -> None:
    options = TimingOptions(rounds=2, calls_per_round=100, seconds_per_round=0.01)
    found = measure_latencies({"slow": lambda: time.sleep(0.004)}, options)["slow"]
    assert found.num_calls == 10
    assert 4000 <= found.min_us <= found.median_us <= found.p99_us


def test_one_disturbed_round_moves_the_99th_percentile_but_not_the_median() -> None:
    calm, disturbed = [1000] * 30, [50_000] * 30
    expected = Latency(median_us=1.0, p99_us=50.0, min_us=1.0, num_calls=90)
    assert summarise_latencies([calm, disturbed, calm]) == expected


@pytest.mark.parametrize(("num_slow", "p99"), [(1, 1.0), (2, 9.0)])
def test_the_99th_percentile_is_over_all_calls(num_slow: int, p99: float) -> None:
    turn = [1000] * (100 - num_slow) + [9000] * num_slow
    assert summarise_latencies([turn]).p99_us == p99
