"""Measures each stage beside its limit, in one run: `python benchmarks/stages.py [--game Pong]` (or `make benchmark`).

Rates are per second of CPU time of this process with all its threads, so that they are per core; each is the median of
several repetitions, the two sides of a ratio taken in turn.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import ale_py
import torch
from ale_py import roms

from policykd.agents.student import make_student
from policykd.agents.teacher import load_teacher
from policykd.command import prepare_device
from policykd.envs.atari import make_atari
from policykd.envs.games import rom_id
from policykd.losses import ForwardKL
from policykd.replay import Replay

REPETITIONS = 5


def rate(work: Callable[[], int]) -> float:
    began = time.process_time()
    done = work()
    return done / (time.process_time() - began)


def in_turn(*works: Callable[[], int]) -> list[list[float]]:
    """Returns the rates of every repetition of each work, after one that is not counted."""
    rows = [[rate(work) for work in works] for _ in range(REPETITIONS + 1)][1:]
    return [list(column) for column in zip(*rows, strict=True)]


def report(name: str, rates: list[float], limit: list[float] | None = None, unit: str = "states/s") -> None:
    line = f"{name:<44} {statistics.median(rates):>10,.0f} {unit}"
    if limit:
        share = statistics.median(a / b for a, b in zip(rates, limit, strict=True))
        line += f"   {share:.0%} of {statistics.median(limit):,.0f}"
    print(line, flush=True)


def collection(game: str) -> None:
    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", 0)
    ale.loadROM(roms.get_rom_path(rom_id(game)))
    legal = ale.getMinimalActionSet()
    generator = torch.Generator().manual_seed(0)
    envs = make_atari(game, 16, seed=0)
    envs.reset()

    def raw() -> int:
        for action in torch.randint(len(legal), (4000,), generator=generator).tolist():
            ale.act(legal[action])
            if ale.game_over():
                ale.reset_game()
        return 1000

    def exact() -> int:
        for actions_B in torch.randint(envs.num_actions, (125, 16), generator=generator):
            envs.step(actions_B)
        return 2000

    ours, limit = in_turn(exact, raw)
    report("collect, SB3's exact preprocessing", ours, limit, "steps/s")


def networks(game: str) -> None:
    teacher = load_teacher(game=game)
    envs = make_atari(game, 16, seed=0)
    replay = Replay(4096, 16, envs.num_actions, envs.obs_shape, stack=4, dtype=torch.uint8)
    obs, starts_B = envs.reset(), torch.ones(16, dtype=torch.bool)
    for _ in range(256):
        replay.add(obs, starts_B, teacher(obs))
        step = envs.step(torch.randint(envs.num_actions, (16,)))
        obs, starts_B = step.obs, step.starts_B
    generator = torch.Generator().manual_seed(0)
    size = 768
    a, b = torch.randn(size, size), torch.randn(size, size)
    macs = {"teacher": 9.35e6, "student": 4.91e6}
    """of a forward pass of the NatureCNN, and of a training step of the 7 % student (no gradient of the input)"""

    def matmul() -> int:
        for _ in range(40):
            a @ b
        return 40 * size**3

    def label() -> int:
        for _ in range(32):
            teacher(obs)
        return 32 * 16

    student = make_student("7%", envs.num_actions)
    student.centre_on(replay.frames[1:257])
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, fused=True)
    loss = ForwardKL()

    def fit() -> int:
        for _ in range(8):
            obs_BCHW, teacher_BA = replay.sample(256, generator)
            optimizer.zero_grad(set_to_none=True)
            loss(student(obs_BCHW), teacher_BA).mean().backward()
            optimizer.step()
        return 8 * 256

    def gather() -> int:
        for _ in range(20):
            replay.sample(256, generator)
        return 20 * 256

    labels, fits, gathers, matmuls = in_turn(label, fit, gather, matmul)
    report("label and act, teacher, 16 at a time", labels, [m / macs["teacher"] for m in matmuls])
    report("fit, 7 % student, batches of 256", fits, [m / macs["student"] for m in matmuls])
    report("gather stacks, batches of 256", gathers)
    share = statistics.median(f / g for f, g in zip(fits, gathers, strict=True))
    print(f"gathering is {share:.1%} of a fit step; a stored state takes", end=" ")
    print(f"{(replay.frames.nbytes + replay.pasts_N.nbytes) / replay.capacity:,.0f} bytes + scores")


def startup() -> None:
    for name, command in {
        "import policykd and torch": ["-c", "import policykd; policykd.load_student, policykd.make_atari"],
        "scripts/distill_atari.py --help": ["scripts/distill_atari.py", "--help"],
    }.items():
        seconds = []
        for _ in range(REPETITIONS):
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
        print(f"{name:<44} {statistics.median(seconds):>10.2f} s wall")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--game", default="Pong")
    game = parser.parse_args().game
    prepare_device("cpu", 1)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, ", end=""
    )
    print(f"one thread, torch {torch.__version__}, ale-py {ale_py.__version__}, medians of {REPETITIONS}")
    startup()
    collection(game)
    networks(game)
