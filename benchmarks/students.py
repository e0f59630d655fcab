"""Times every student next to the teacher: one action in ONNX Runtime, and states per second of training.

`python benchmarks/students.py` takes a minute on one thread; everything is measured in turns. Times of one action are
medians with the minimum, which other programs on the machine hardly change; the teacher's is SB3's own `predict`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from stable_baselines3 import PPO

from policykd.agents.networks import num_macs
from policykd.agents.onnx_session import open_session
from policykd.agents.student import SIZES, Student, make_student
from policykd.agents.teacher import load_teacher
from policykd.evaluation.costs import Latency, TimingOptions, measure_latencies
from policykd.export.onnx import to_onnx

BATCH_SIZE = 256


def action_call(net: torch.nn.Module, obs: np.ndarray) -> Callable[[], object]:
    """Returns a call that computes one action in ONNX Runtime on one thread."""
    session = open_session(to_onnx(net), 1)
    return lambda: session.run(None, {"obs": obs})


def update_call(student: Student, obs: torch.Tensor) -> Callable[[], object]:
    """Returns a call that takes one gradient step on a batch."""
    optimizer = torch.optim.Adam(student.parameters(), fused=True)

    def update() -> None:
        optimizer.zero_grad()
        student(obs).square().mean().backward()
        optimizer.step()

    return update


def max_rates(updates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the states per second of each update's fastest call, all called in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for call in updates.values():
        call()
    for _ in range(rounds):
        for name, call in updates.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: BATCH_SIZE / min(durations) for name, durations in seconds.items()}


def row(name: str, macs: int, latency: Latency, base: Latency, rate: float | None) -> str:
    """Returns a row of the table; `base` is the latency of SB3's predict."""
    faster = f"{base.median_us / latency.median_us:.0f} ({base.min_us / latency.min_us:.0f})"
    trained = "" if rate is None else f"{rate:,.0f}"
    return f"| {name} | {macs / 1e6:.2f} M | {latency.median_us:.1f} ({latency.min_us:.1f}) | {faster} | {trained} |"


@dataclass(frozen=True)
class Args:
    """Times every student next to the teacher."""

    rounds: int = 9
    """turns of every call"""


def main(args: Args) -> None:
    """Prints the table of docs/students.md."""
    torch.set_num_threads(1)
    obs = torch.randint(256, (BATCH_SIZE, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one = obs[:1].numpy()
    teacher = load_teacher("bundled:ppo", game="Pong")
    assert isinstance(teacher.net, torch.nn.Module)
    agent = PPO.load(teacher.path, device="cpu")
    students = {size: make_student(size, 6) for size in SIZES}
    calls: dict[str, Callable[[], object]] = {
        "SB3 `predict`, teacher": lambda: agent.predict(one[0], deterministic=True),
        "teacher, ONNX Runtime": action_call(teacher.net, one),
        **{size: action_call(student.folded_net(), one) for size, student in students.items()},
    }
    latencies = measure_latencies(calls, TimingOptions(rounds=args.rounds))
    rates = max_rates({size: update_call(student, obs) for size, student in students.items()}, args.rounds)
    macs: dict[str, int] = {size: num_macs(student, (4, 84, 84)) for size, student in students.items()}
    of_teacher = num_macs(teacher.net, (4, 84, 84))
    print("| | MACs | one action, µs (min) | times faster than SB3's `predict` (min) | states per second of training |")
    print("|---|---:|---:|---:|---:|")
    base = latencies["SB3 `predict`, teacher"]
    for name, latency in latencies.items():
        print(row(name, macs.get(name, of_teacher), latency, base, rates.get(name)))


if __name__ == "__main__":
    main(tyro.cli(Args))
