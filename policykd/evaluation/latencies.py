"""How long calls take, measured in turns, so that a ratio of two compares the same minutes of the machine."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from policykd.io.signals import check_interrupted


@dataclass(frozen=True)
class Latency:
    """Of one call, microseconds."""

    median_us: float
    """of the rounds' medians: a round that the machine disturbed moves it little"""
    p99_us: float
    """99 of 100 calls of all rounds took no longer"""
    least_us: float
    """of all calls: what it takes where nothing disturbs it"""
    num_calls: int


def measure_latencies(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    calls_per_round: int = 100,
    warm_up: int = 10,
    seconds_per_round: float = 0.5,
) -> dict[str, Latency]:
    """Returns how long each call takes; in every round all take their turn (A B C, A B C, ...).

    Set the threads that a call may use before: torch's, a session's, the environment's for NumPy.

    Args:
        calls: by name, each without arguments; let each draw its observation from real ones.
        rounds: how many turns each call gets.
        calls_per_round: timed one by one, fewer where they take longer than `seconds_per_round`, but at least 5.
        warm_up: calls before them that are not timed, as caches hold another call's data.
        seconds_per_round: of one call's turn, at most.

    Raises:
        KeyboardInterrupt: a signal has come.
    """
    taken: dict[str, list[list[int]]] = {name: [] for name in calls}
    enabled = gc.isenabled()
    gc.disable()  # or one call pays for the others' garbage
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                check_interrupted()
                taken[name].append(_turn(call, calls_per_round, warm_up, seconds_per_round))
    finally:
        if enabled:
            gc.enable()
    return {name: _summary(turns) for name, turns in taken.items()}


def _turn(call: Callable[[], object], num_calls: int, warm_up: int, seconds: float) -> list[int]:
    """Returns the nanoseconds of each timed call."""
    clock, nanoseconds = time.perf_counter_ns, list[int]()
    began = clock()
    for i in range(warm_up):
        call()
        if i and clock() - began > 0.2 * seconds * 1e9:
            break
    began = clock()
    while len(nanoseconds) < num_calls and (len(nanoseconds) < 5 or clock() - began < seconds * 1e9):
        before = clock()
        call()
        nanoseconds.append(clock() - before)
    return nanoseconds


def _summary(turns: list[list[int]]) -> Latency:
    every = sorted(ns for turn in turns for ns in turn)
    median = statistics.median(statistics.median(turn) for turn in turns)
    p99 = every[min(len(every) - 1, -(-99 * len(every) // 100) - 1)]
    return Latency(median / 1e3, p99 / 1e3, every[0] / 1e3, len(every))
