"""What policies cost to run: parameters, arithmetic, bytes and time are four different goals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor, nn

from policykd.agents.networks import num_macs, num_parameters
from policykd.agents.teacher import Net
from policykd.evaluation.latencies import measure_latencies


@dataclass(frozen=True)
class Costs:
    """Of one forward pass of the acting network."""

    num_parameters: int
    """on the acting path, each tensor counted once"""
    num_macs: int | None
    """multiply-accumulates for one observation; None for an ONNX teacher, which are not counted"""
    num_bytes: int
    """of those parameters in float32"""
    latency_microseconds: float
    """for one observation in torch on one CPU thread, eager: the median over rounds of each round's median"""
    latency_least_microseconds: float | None = None
    """of all calls: where a busy machine disturbed nothing; None in results that are older than it"""


def measure_costs(
    nets: Mapping[str, nn.Module | Net], obs: Tensor, *, rounds: int = 5, calls_per_round: int = 40
) -> dict[str, Costs]:
    """Returns the costs of networks, timed in turns (A B, A B, ...), so that a ratio is of the same minutes.

    Args:
        nets: by name, on any device; they are timed on the CPU.
        obs: real ones, of which each call takes another, `(batch, *obs_shape)`, uint8 if they are frames.
        rounds: turns that each gets.
        calls_per_round: timed in each turn, after some that are not.

    Raises:
        KeyboardInterrupt: a signal has come.
    """
    devices = {name: next(net.parameters()).device for name, net in nets.items() if isinstance(net, nn.Module)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for net in nets.values():
            if isinstance(net, nn.Module):
                net.eval()
            net.to("cpu")
        with torch.inference_mode():
            calls = {name: _next_one(net, obs) for name, net in nets.items()}
            # no bound in seconds, so that the number of calls is the same wherever it runs
            how = {"rounds": rounds, "calls_per_round": calls_per_round, "seconds_per_round": float("inf")}
            taken = measure_latencies(calls, **how)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
        for name, net in nets.items():
            net.to(devices.get(name, torch.device("cpu")))
    found = dict[str, Costs]()
    for name, net in nets.items():
        parameters: int = num_parameters(net) if isinstance(net, nn.Module) else getattr(net, "num_parameters", 0)
        macs = num_macs(net, obs.shape[1:]) if isinstance(net, nn.Module) else getattr(net, "num_macs", None)
        found[name] = Costs(parameters, macs, 4 * parameters, taken[name].median_us, taken[name].least_us)
    return found


def _next_one(net: nn.Module | Net, obs: Tensor) -> Callable[[], object]:
    """Returns a call on one observation, another one each time."""
    ones = cycle(obs.cpu().split(1))
    return lambda: net(next(ones))
