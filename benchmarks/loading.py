"""Loads SB3 archives with policykd and with SB3, in turns: `python benchmarks/loading.py [--malicious]`.

Each load is the first of a fresh process that has imported everything its command imports, as in a run; `again` is the
median of five more in the same process. Memory is the peak in addition to what the process held before, in multiples
of the file's tensors. `--malicious` prints instead what the archives of tests/agents/test_malicious.py did.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
import tyro
from stable_baselines3.common.vec_env import DummyVecEnv

from policykd.agents.archive import read_archive
from policykd.agents.rebuild import rebuild
from policykd.io.typed import parse_json, to_json

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "agents" / "pretrained" / "ppo-Pong.zip"
REPETITIONS = 5
Library = Literal["policykd", "SB3"]


@dataclass(frozen=True)
class Load:
    """One process's measurement."""

    first: float
    """seconds of the first load"""
    again: float
    """median seconds of later loads"""
    num_bytes: int
    """peak memory in addition to what the process held before"""


@dataclass(frozen=True)
class Args:
    """Loads SB3 archives with policykd and with SB3, in turns."""

    malicious: bool = False
    """print what malicious archives do and cost, instead"""
    processes: int = 7
    """processes per library"""
    child: tuple[Library, str, Path] | None = None
    """internal: library, algorithm and archive to measure in this process"""


def loader(library: Library, algorithm: str) -> Callable[[Path], object]:
    """Returns the function that loads an archive with a library."""
    if library == "policykd":
        return lambda path: rebuild(read_archive(path))
    kind = getattr(stable_baselines3, algorithm)
    options = {"buffer_size": 1, "optimize_memory_usage": False} if algorithm == "DQN" else {}
    return lambda path: kind.load(path, device="cpu", **options)


def memory(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Returns this process's memory in bytes: VmRSS now, VmHWM at its peak (Linux)."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def measure(library: Library, algorithm: str, path: Path) -> Load:
    """Returns a measurement in this process."""
    torch.set_num_threads(1)
    load = loader(library, algorithm)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory("VmRSS")
    durations = []
    peak = 0
    for repetition in range(1 + REPETITIONS):
        began = time.perf_counter()
        load(path)
        durations.append(time.perf_counter() - began)
        if repetition == 0:
            peak = memory("VmHWM") - before
    return Load(durations[0], statistics.median(durations[1:]), peak)


def measure_in_process(library: Library, algorithm: str, path: Path) -> Load:
    """Returns a measurement in a fresh process."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", library, algorithm, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return parse_json(Load, done.stdout, "measurement")


def compare(algorithm: str, path: Path, processes: int) -> None:
    """Prints the medians of both libraries and their ratios."""
    ours = []
    theirs = []
    for _ in range(processes):
        ours.append(measure_in_process("policykd", algorithm, path))
        theirs.append(measure_in_process("SB3", algorithm, path))
    with zipfile.ZipFile(path) as archive:
        num_bytes = archive.getinfo("policy.pth").file_size
    print(f"{algorithm}, policy.pth of {num_bytes / 1e6:.1f} MB; medians of {processes} processes each, in turns")
    for what in ("first", "again"):
        a = [getattr(load, what) for load in ours]
        b = [getattr(load, what) for load in theirs]
        ratios = [y / x for x, y in zip(a, b, strict=True)]
        print(
            f"  {what}: {statistics.median(a) * 1e3:.1f} ms, SB3 {statistics.median(b) * 1e3:.0f} ms: "
            f"{statistics.median(ratios):.0f} times [{min(ratios):.0f}, {max(ratios):.0f}]"
        )
    peaks = [statistics.median(load.num_bytes for load in loads) / num_bytes for loads in (ours, theirs)]
    print(f"  memory: {peaks[0]:.2f} times the tensors, SB3 {peaks[1]:.2f} times", flush=True)


def malicious() -> None:
    """Prints what every malicious archive did, its time and its memory."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "agents" / "test_malicious.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        reason = row["line"].split("agent.zip: ")[-1].strip()
        harm = row["harm"].split(" (")[0]
        print(f"{row['case']:<34}{harm:<16}{row['seconds'] * 1e3:>6.0f} ms {row['MiB']:>5.1f} MiB  {reason}")
    slowest = max(rows, key=lambda row: float(row["seconds"]))
    largest = max(rows, key=lambda row: float(row["MiB"]))
    print(f"slowest: {slowest['seconds'] * 1e3:.0f} ms, {slowest['case']}")
    print(f"largest: {largest['MiB']:.1f} MiB, {largest['case']}")


class _Pixels(gym.Env[np.ndarray, int]):
    """An environment with the spaces of preprocessed Atari and no game."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space: Any = gym.spaces.Discrete(6)


def main(args: Args) -> None:
    """Measures, or prints what malicious archives do."""
    if args.child:
        print(to_json(measure(*args.child), indent=None).decode(), end="")
    elif args.malicious:
        malicious()
    else:
        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
        compare("PPO", BUNDLED, args.processes)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dqn.zip"
            agent = stable_baselines3.DQN("CnnPolicy", DummyVecEnv([_Pixels]), device="cpu", buffer_size=1)
            agent.save(path)
            compare("DQN", path, args.processes)


if __name__ == "__main__":
    main(tyro.cli(Args))
