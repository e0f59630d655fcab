"""What a policy costs to run: parameters, arithmetic, bytes and time are four different goals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from policykd.agents.networks import num_macs, num_parameters
from policykd.agents.teacher import Net
from policykd.latencies import measure_latencies


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
    """median for one observation in torch on one CPU thread, eager"""


def measure_costs(net: nn.Module | Net, obs_shape: Sequence[int], *, num_calls: int = 200) -> Costs:
    """Returns the costs of a network on observations of `obs_shape`, of bytes if they are frames."""
    device = torch.device("cpu")
    if isinstance(net, nn.Module):
        parameters, device = num_parameters(net), next(net.parameters()).device
        net.eval()
    else:
        parameters = getattr(net, "num_parameters", 0)
    net.to("cpu")
    obs = torch.zeros((1, *obs_shape), dtype=torch.uint8 if len(obs_shape) == 3 else torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            call = {"net": lambda: net(obs)}
            taken = measure_latencies(call, rounds=1, calls_per_round=num_calls, warm_up=0, seconds_per_round=math.inf)
    finally:
        torch.set_num_threads(threads)
        net.to(device)
    macs = num_macs(net, obs_shape) if isinstance(net, nn.Module) else getattr(net, "num_macs", None)
    return Costs(parameters, macs, 4 * parameters, taken["net"].median_us)
