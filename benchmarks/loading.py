"""Loads SB3 archives with this library and with SB3, in turn: `python benchmarks/loading.py [--malicious]`.

Each load is the first of a fresh process that has imported everything its command imports, as a run does it once;
`again` is the median of five more in the same process. Memory is the peak beyond what the process held before, in
multiples of the file's tensors. `--malicious` prints what the archives of tests/agents/test_malicious.py did instead.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "agents" / "pretrained" / "ppo-Pong.zip"
PROCESSES = 7
REPETITIONS = 5


def loader(library: str, algorithm: str) -> Callable[[Path], Any]:
    if library == "policykd":
        from policykd.agents.archive import read_archive
        from policykd.agents.rebuild import rebuild

        return lambda path: rebuild(read_archive(path))
    import stable_baselines3

    kind = getattr(stable_baselines3, algorithm)
    small = {"buffer_size": 1, "optimize_memory_usage": False} if algorithm == "DQN" else {}
    return lambda path: kind.load(path, device="cpu", **small)


def memory(what: str) -> int:
    """Returns this process's bytes: VmRSS now, VmHWM at its peak."""
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) * 1024


def child(library: str, algorithm: str, path: Path) -> None:
    """Measures in this process and prints one line of JSON."""
    import torch

    torch.set_num_threads(1)
    load = loader(library, algorithm)
    seconds = []
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory("VmRSS")
    for _ in range(1 + REPETITIONS):
        began = time.perf_counter()
        load(path)
        seconds.append(time.perf_counter() - began)
        if len(seconds) == 1:
            grown = memory("VmHWM") - before
    print(json.dumps({"first": seconds[0], "again": statistics.median(seconds[1:]), "bytes": grown}))


def compare(algorithm: str, path: Path) -> None:
    rows: dict[str, list[dict[str, float]]] = {"policykd": [], "SB3": []}
    for _ in range(PROCESSES):
        for library, found in rows.items():
            command = [sys.executable, "-W", "ignore", __file__, "--child", library, algorithm, str(path)]
            found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    with zipfile.ZipFile(path) as archive:
        tensors = archive.getinfo("policy.pth").file_size
    print(f"{algorithm}, policy.pth of {tensors / 1e6:.1f} MB; medians of {PROCESSES} processes each, in turn")
    for what in ("first", "again"):
        ours, theirs = ([row[what] for row in rows[library]] for library in rows)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        print(
            f"  {what}: {statistics.median(ours) * 1e3:.1f} ms, SB3 {statistics.median(theirs) * 1e3:.0f} ms: "
            f"{statistics.median(ratios):.0f} times [{min(ratios):.0f}, {max(ratios):.0f}]"
        )
    ours, theirs = (statistics.median(row["bytes"] for row in rows[library]) / tensors for library in rows)
    print(f"  memory: {ours:.2f} times the tensors, SB3 {theirs:.2f} times", flush=True)


def malicious() -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "agents" / "test_malicious.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        print(
            f"{row['case']:<34}{row['harm'].split(' (')[0]:<16}{row['seconds'] * 1e3:>6.0f} ms {row['MiB']:>5.1f} MiB  "
            f"{row['line'].split('agent.zip: ')[-1].strip()}"
        )
    slowest, largest = (max(rows, key=lambda row, what=what: row[what]) for what in ("seconds", "MiB"))
    print(f"slowest: {slowest['seconds'] * 1e3:.0f} ms, {slowest['case']}")
    print(f"largest: {largest['MiB']:.1f} MiB, {largest['case']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--malicious", action="store_true", help="what the malicious archives do, and cost")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], arguments.child[1], Path(arguments.child[2]))
    elif arguments.malicious:
        malicious()
    else:
        import stable_baselines3
        import torch

        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
        compare("PPO", BUNDLED)
        with tempfile.TemporaryDirectory() as folder:
            stable_baselines3.DQN("CnnPolicy", pixels(), device="cpu", buffer_size=1).save(Path(folder) / "dqn.zip")
            compare("DQN", Path(folder) / "dqn.zip")


def pixels() -> Any:
    """Returns an environment with the spaces of preprocessed Atari, nothing behind them."""
    import gymnasium as gym
    import numpy as np
    from stable_baselines3.common.vec_env import DummyVecEnv

    class Pixels(gym.Env[Any, Any]):
        observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        action_space = gym.spaces.Discrete(6)

    return DummyVecEnv([Pixels])


if __name__ == "__main__":
    main()
