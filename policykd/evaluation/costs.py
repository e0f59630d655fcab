"""Costs of running a policy: parameters, multiply-accumulates, bytes and latency, which are four different goals."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Annotated, Any

import torch
from pydantic import AliasChoices, Field
from torch import Tensor, nn

from policykd.agents.networks import num_macs, num_parameters
from policykd.agents.policy import PolicyNet


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of one forward pass of the acting network; random play costs nothing."""

    num_parameters: int = 0
    """parameters on the acting path, each tensor counted once"""
    num_macs: int | None = 0
    """multiply-accumulates per observation; None for an ONNX teacher, in which they are not counted"""
    num_bytes: int = 0
    """bytes of those parameters in float32"""
    latency_microseconds: float = 0.0
    """batch-1 latency in eager torch on one CPU thread: the median over rounds of each round's median"""
    latency_min_microseconds: Annotated[
        float | None,
        # In results written before the redesign of December 2026 it is called latency_least_microseconds.
        Field(validation_alias=AliasChoices("latency_min_microseconds", "latency_least_microseconds")),
    ] = None
    """shortest of all calls, undisturbed by a busy machine; None in older results"""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Durations of one call, microseconds."""

    median_us: float
    """median of the rounds' medians: a round that the machine disturbed moves it little"""
    p99_us: float
    """99th percentile of the calls of all rounds"""
    min_us: float
    """shortest of all calls, undisturbed"""
    num_calls: int


@dataclass(frozen=True, kw_only=True)
class TimingOptions:
    """Number of timed calls."""

    rounds: int = 9
    """turns that each call gets"""
    calls_per_round: int = 100
    """calls per turn, timed one by one; fewer (but at least 5) where they exceed `seconds_per_round`"""
    warm_up: int = 10
    """untimed calls before them, as caches hold another call's data"""
    seconds_per_round: float = 0.5
    """upper bound of one call's turn, seconds"""


COSTS_TIMING = TimingOptions(rounds=5, calls_per_round=40, seconds_per_round=float("inf"))
"""timing of `measure_costs`; without a bound in seconds the number of calls is the same on every machine"""


def measure_latencies(
    calls: Mapping[str, Callable[[], object]], options: TimingOptions = TimingOptions()
) -> dict[str, Latency]:
    """Returns the latency of each call, timed in turns (A B C, A B C, ...).

    A ratio of two then compares the same minutes of the machine. Each call should take another real observation. Set
    the number of threads that it may use before: torch's, a session's, the environment variables of NumPy.
    """
    durations: dict[str, list[list[int]]] = {name: [] for name in calls}
    was_enabled = gc.isenabled()
    gc.disable()  # or one call pays for the garbage of the others
    try:
        for _ in range(options.rounds):
            for name, call in calls.items():
                durations[name].append(_time_turn(call, options))
    finally:
        if was_enabled:
            gc.enable()
    return {name: summarise_latencies(turns) for name, turns in durations.items()}


def _time_turn(call: Callable[[], object], options: TimingOptions) -> list[int]:
    """Returns the nanoseconds of each timed call of one turn."""
    clock = time.perf_counter_ns
    bound = options.seconds_per_round * 1e9
    # Warm up, for at most a fifth of the turn.
    started = clock()
    for i in range(options.warm_up):
        call()
        if i and clock() - started > 0.2 * bound:
            break
    # Time every call on its own: a median of calls is robust against the interrupts of other processes.
    nanoseconds: list[int] = []
    started = clock()
    while len(nanoseconds) < options.calls_per_round and (len(nanoseconds) < 5 or clock() - started < bound):
        before = clock()
        call()
        nanoseconds.append(clock() - before)
    return nanoseconds


def summarise_latencies(turns: list[list[int]]) -> Latency:
    """Returns the statistics of the nanoseconds of several turns."""
    # The 99th percentile is over all calls, so it shows a disturbed round that the median hides.
    every = sorted(ns for turn in turns for ns in turn)
    p99_index = min(len(every) - 1, -(-99 * len(every) // 100) - 1)
    return Latency(
        median_us=statistics.median(statistics.median(turn) for turn in turns) / 1e3,
        p99_us=every[p99_index] / 1e3,
        min_us=every[0] / 1e3,
        num_calls=len(every),
    )


def measure_costs(nets: Mapping[str, nn.Module | PolicyNet], obs: Tensor) -> dict[str, Costs]:
    """Returns the costs of networks, timed in turns (A B, A B, ...) on one CPU thread.

    Args:
        nets: networks by name, on any device; they return to it. Modules are left in evaluation mode.
        obs: real observations, `(batch, *obs_shape)`, uint8 if they are frames; each call takes another.
    """
    # On one CPU thread, in evaluation mode; a GPU's latency for one observation is that of its driver.
    devices = {name: next(net.parameters()).device for name, net in nets.items() if isinstance(net, nn.Module)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for net in nets.values():
            if isinstance(net, nn.Module):
                net.eval()
            net.to("cpu")
        with torch.inference_mode():
            calls = {name: on_next(net, obs.cpu().split(1)) for name, net in nets.items()}
            latencies = measure_latencies(calls, COSTS_TIMING)
    finally:
        torch.set_num_threads(threads)
        for name, net in nets.items():
            net.to(devices.get(name, torch.device("cpu")))
    costs: dict[str, Costs] = {}
    for name, net in nets.items():
        parameters, macs = parameters_and_macs(net, tuple(obs.shape[1:]))
        costs[name] = Costs(
            num_parameters=parameters or 0,
            num_macs=macs,
            num_bytes=4 * (parameters or 0),
            latency_microseconds=latencies[name].median_us,
            latency_min_microseconds=latencies[name].min_us,
        )
    return costs


def parameters_and_macs(net: object, obs_shape: tuple[int, ...]) -> tuple[int | None, int | None]:
    """Returns the parameters and the multiply-accumulates per observation of a network; None where they are unknown."""
    if isinstance(net, nn.Module):
        return num_parameters(net), num_macs(net, obs_shape)
    return getattr(net, "num_parameters", None), getattr(net, "num_macs", None)


def on_next(call: Callable[[Any], object], observations: Sequence[Any]) -> Callable[[], object]:
    """Returns a call on one of the observations, the next one each time."""
    repeated = cycle(observations)
    return lambda: call(next(repeated))
