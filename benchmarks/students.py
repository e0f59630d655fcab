"""Measures every student beside the teacher: one action's time in ONNX Runtime and states a second learned from.

`python benchmarks/students.py`: a minute, one thread each, side by side. Times of one action are medians with the least
beside them, which others on the machine hardly change; the teacher's is SB3's own `predict`.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from stable_baselines3 import PPO

from policykd.agents.networks import num_macs
from policykd.agents.onnx_policy import open_session
from policykd.agents.student import SIZES, Student, make_student
from policykd.agents.teacher import load_teacher
from policykd.export.onnx import to_onnx

ROUNDS, BATCH = 9, 256


def timed(call: Callable[[], object], num: int) -> list[float]:
    call()
    seconds = []
    for _ in range(num):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def acting(net: torch.nn.Module, obs: np.ndarray) -> Callable[[], object]:
    session = open_session(to_onnx(net), 1)
    return lambda: session.run(["scores"], {"obs": obs})


def learning(student: Student, obs: torch.Tensor) -> Callable[[], object]:
    optimizer = torch.optim.Adam(student.parameters(), fused=True)

    def update() -> None:
        optimizer.zero_grad()
        student(obs).square().mean().backward()
        optimizer.step()

    return update


def main() -> None:
    torch.set_num_threads(1)
    obs = torch.randint(256, (BATCH, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, teacher = obs[:1].numpy(), load_teacher("bundled:ppo", game="Pong")
    agent = PPO.load(teacher.path, device="cpu")
    students = {size: make_student(size, 6) for size in SIZES}
    acts: dict[str, Callable[[], object]] = {
        "SB3 predict": lambda: agent.predict(one[0], deterministic=True),
        "teacher": acting(teacher.net, one),  # type: ignore[arg-type]
    }
    acts |= {size: acting(student.folded_net(), one) for size, student in students.items()}
    learns = {size: learning(student, obs) for size, student in students.items()}
    act_seconds: dict[str, list[float]] = {name: [] for name in acts}
    learn_seconds: dict[str, list[float]] = {name: [] for name in learns}
    for _ in range(ROUNDS):
        for name, call in acts.items():
            act_seconds[name] += timed(call, 20 if name == "SB3 predict" else 100)
        for name, call in learns.items():
            learn_seconds[name] += timed(call, 1)
    base = np.array(act_seconds["SB3 predict"])
    print("| | MACs | one action, µs (least) | times faster than SB3's `predict` (least) | states a second learned |")
    print("|---|---:|---:|---:|---:|")
    for name, seconds in act_seconds.items():
        taken = np.array(seconds)
        times = f"{np.median(base) / np.median(taken):.0f} ({base.min() / taken.min():.0f})"
        macs = f"{num_macs(students[name], (4, 84, 84)) / 1e6:.2f} M" if name in students else "9.35 M"
        rate = f"{BATCH / min(learn_seconds[name]):,.0f}" if name in learn_seconds else ""
        print(f"| {name} | {macs} | {1e6 * np.median(taken):.1f} ({1e6 * taken.min():.1f}) | {times} | {rate} |")


if __name__ == "__main__":
    main()
