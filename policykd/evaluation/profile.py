"""A profile of policies: what each costs to store, start and run in every runtime there is, measured side by side."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policykd.agents.networks import num_macs, num_parameters
from policykd.agents.policy import Policy, greedy
from policykd.agents.teacher import Teacher
from policykd.evaluation.deployments import Deployment, RealStates, deploy
from policykd.evaluation.policies import NamedPolicy
from policykd.evaluation.real_states import on_policy_states
from policykd.evaluation.runtimes import MANY, RUNTIMES, RuntimeName
from policykd.io.signals import check_interrupted

__all__ = ["profile", "table"]

THREADS_OF = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""variables by which torch and NumPy are told how many to use"""
NUM_CALIBRATION_STATES, NUM_TRIED_STATES = 2000, 2000
"""of int8: as many as scripts/export.py takes, and a fifth of those that it tries the file on"""
PRACTICAL: RuntimeName = "sb3"
"""the runtime of the first policy that is what a user has before any of this"""


def profile(
    contenders: Sequence[NamedPolicy],
    game: str,
    *,
    runtimes: Sequence[RuntimeName] = tuple(RUNTIMES),
    seed: int = 0,
    rounds: int = 9,
    calls_per_round: int = 100,
    starts: int = 3,
) -> dict[str, Any]:
    """Returns what policies cost in every runtime, as JSON; ratios are against the first policy.

    All are timed in one process with one thread, in turns (A B C, A B C, ...), on frames of the game as the first one
    plays it; start-up and memory come from fresh processes, which end with their first action.

    Args:
        contenders: policies, each of another name.
        game: what they play.
        runtimes: in the order of the table.
        seed: of the games.
        rounds: turns that each policy gets in each runtime.
        calls_per_round: timed in each turn.
        starts: fresh processes each, of which the median counts.

    Raises:
        ValueError: two policies of one name, or an ensemble.
        KeyboardInterrupt: a signal has come.
    """
    first = contenders[0]
    if len({c.name for c in contenders}) < len(contenders):
        raise ValueError(f"two of {', '.join(c.ref for c in contenders)} are called the same; profile them one by one")
    for c in contenders:
        if isinstance(c.policy, Teacher) and c.policy.algorithm == "ENSEMBLE":
            raise ValueError(f"{c.ref}: several teachers; profile each by its own name")
    obs = on_policy_states(first.policy, game, MANY, seed=2 * seed)
    expected = {c.name: _acts(c.policy, obs) for c in contenders}
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        observations = Path(folder) / "observations"
        observations.write_bytes(obs.numpy().tobytes())
        made: dict[tuple[str, RuntimeName], Deployment] = {}
        for i, contender in enumerate(contenders):
            own = Path(folder) / str(i)
            own.mkdir()
            states = _states_for_int8(contender, game, seed) if "int8" in runtimes else None
            for runtime, deployment in deploy(contender.policy, own, runtimes, game=game, states=states).items():
                made[contender.name, runtime] = deployment
        raced = _race(made, observations, rounds, calls_per_round)
        for (name, runtime), row in raced.items():
            if "why_not" not in row:
                row |= _started(runtime, made[name, runtime], observations, starts)
    policies: dict[str, dict[str, Any]] = {}
    for c in contenders:
        rows: dict[RuntimeName, dict[str, Any]] = {}
        for runtime in runtimes:
            rows[runtime] = _row(made[c.name, runtime], raced.get((c.name, runtime)))
        _compare_actions(rows, expected[c.name])
        policies[c.name] = {"ref": c.ref, **_size_of(c), "runtimes": rows}
    _add_ratios(policies)
    return {
        "game": game,
        "policies": policies,
        "ratios_against": first.name,
        "how": {"seed": seed, "rounds": rounds, "calls_per_round": calls_per_round, "batch": MANY, "threads": 1},
        "machine": machine() | {"load_before": load_before, "load_after": os.getloadavg()},
    }


def _acts(policy: Policy, obs: Tensor) -> list[int]:
    """Returns the best actions of the policy itself, with which what each runtime does is compared."""
    with torch.inference_mode():
        return greedy(policy(obs)).tolist()


def _states_for_int8(contender: NamedPolicy, game: str, seed: int) -> RealStates:
    """Returns what scripts/export.py would calibrate on, and states to try the file on, if fewer."""
    calibration, tried = (
        on_policy_states(contender.policy, game, num, seed=s)
        for num, s in ((NUM_CALIBRATION_STATES, 2 * seed + 1), (NUM_TRIED_STATES, 2 * seed))
    )
    return RealStates(calibration, tried)


def _race(
    made: Mapping[tuple[str, RuntimeName], Deployment], observations: Path, rounds: int, calls_per_round: int
) -> dict[tuple[str, RuntimeName], dict[str, Any]]:
    """Returns what each policy takes in each runtime that it has a file for."""
    there = {key: deployment.file for key, deployment in made.items() if deployment.file}
    entries = [{"runtime": runtime, "file": str(file)} for (_, runtime), file in there.items()]
    specification = observations.with_name("race.json")
    how = {"observations": str(observations), "rounds": rounds, "calls_per_round": calls_per_round}
    specification.write_text(json.dumps({**how, "entries": entries}))
    return dict(zip(there, _asked("race", str(specification)), strict=True))


def _started(runtime: RuntimeName, deployment: Deployment, observations: Path, starts: int) -> dict[str, Any]:
    """Returns seconds from a process's start to its first action, and its memory then, medians; or why it ended."""
    seconds, megabytes = [], []
    for _ in range(starts):
        began = time.monotonic()
        try:
            found = _asked("start", runtime, str(deployment.file), str(observations))
        except RuntimeError as error:  # of this one alone: what was measured is not lost
            return {"why_not": str(error)}
        seconds.append(found["monotonic"] - began)
        megabytes.append(found["peak_megabytes"])
    return {"start_seconds": float(np.median(seconds)), "peak_megabytes": float(np.median(megabytes))}


def _asked(*arguments: str) -> Any:
    """Returns what a fresh process of `policykd.evaluation.runtimes` prints."""
    command = [sys.executable, "-m", "policykd.evaluation.runtimes", *arguments]
    environment = os.environ | dict.fromkeys(THREADS_OF, "1")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        try:
            while True:
                try:
                    printed, said = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    check_interrupted()
        except BaseException:
            process.kill()
            raise
    check_interrupted()
    if process.returncode:
        last = (said.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring {' '.join(arguments[:2])} ended with {process.returncode}: {last[:200]}")
    return json.loads(printed)


def _row(deployment: Deployment, raced: Mapping[str, Any] | None) -> dict[str, Any]:
    if raced is None:
        return {"why_not": deployment.why_not}
    return {"num_bytes": deployment.num_bytes, **({"int8": deployment.int8} if deployment.int8 else {}), **raced}


def _compare_actions(rows: Mapping[RuntimeName, dict[str, Any]], expected: Sequence[int]) -> None:
    """Replaces each runtime's actions by the share that equals those of the policy itself."""
    for row in rows.values():
        if "actions" in row:
            row["same_actions"] = float(np.mean(np.equal(row.pop("actions"), expected)))


def _size_of(contender: NamedPolicy) -> dict[str, int | None]:
    net: Any = getattr(contender.policy, "net", None)
    if not hasattr(net, "state_dict"):
        return {"num_parameters": getattr(net, "num_parameters", None), "num_macs": None}
    return {"num_parameters": num_parameters(net), "num_macs": num_macs(net, net.obs_shape)}


def _add_ratios(policies: Mapping[str, dict[str, Any]]) -> None:
    """Adds how many times less time a row takes than the first policy in SB3 (practical) and in its own runtime.

    Of medians, and of the least times: other processes interrupt long calls more often than short ones.
    """
    first: dict[str, dict[str, Any]] = next(iter(policies.values()))["runtimes"]
    for policy in policies.values():
        for runtime, row in policy["runtimes"].items():
            if "median_us" not in row:
                continue
            for ratio, other in (("practical", first.get(PRACTICAL, {})), ("same_runtime", first[runtime])):
                for name, time_us in (("ratio", "median_us"), ("least_ratio", "min_us")):
                    row[f"{ratio}_{name}"] = other[time_us] / row[time_us] if time_us in other else None


def machine() -> dict[str, Any]:
    """Returns what times depend on: the processor, its cores, the system and the versions of the runtimes."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "num_cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in ("torch", "numpy", "onnxruntime", "stable-baselines3", "policykd")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(found: Mapping[str, Any]) -> str:
    """Returns a profile as Markdown: a row for each policy in each runtime."""
    first = found["ratios_against"]
    lines = [
        "| policy | parameters | MACs | runtime | file | batch 1, median | 99th percentile"
        f" | batch {found['how']['batch']} | start | memory | same actions | practical ratio | same-runtime ratio |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, policy in found["policies"].items():
        macs = "-" if policy["num_macs"] is None else f"{policy['num_macs'] / 1e6:.2f} M"
        head = f"| {name} | {policy['num_parameters'] or 0:,} | {macs} |"
        for runtime, row in policy["runtimes"].items():
            if "why_not" not in row:
                kind = f" {row['int8']}" if "int8" in row else ""
                lines.append(f"{head} {RUNTIMES[runtime][0]}{kind} | {' | '.join(_cells(row))} |")
                head = "| | | |"
    missing: dict[str, list[str]] = {}
    for name, policy in found["policies"].items():
        for runtime, row in policy["runtimes"].items():
            if "why_not" in row:
                missing.setdefault(f"{RUNTIMES[runtime][0]}: {row['why_not']}", []).append(name)
    where = found["machine"]
    before, after = where["load_before"][0], where["load_after"][0]
    is_busy = max(before, after) > where["num_cores"]
    lines.append(
        f"\nTimes of one observation, one thread, {where['processor']}, {where['num_cores']} cores, load {before:.1f}"
        f" before and {after:.1f} after. Practical: against `predict` of SB3 on {first}; same-runtime: against {first}"
        " in the runtime of the row; of the medians, and in brackets of the least times"
        f"{', which alone are to be trusted on a machine as busy as this' if is_busy else ''}."
    )
    lines += [f"- not measured, {what} ({', '.join(names)})" for what, names in missing.items()]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    size = "-" if row["num_bytes"] is None else f"{row['num_bytes'] / 1e3:,.0f} kB"
    ratios = [_ratio(row[f"{kind}_ratio"], row[f"{kind}_least_ratio"]) for kind in ("practical", "same_runtime")]
    return [
        size,
        f"{row['median_us']:,.0f} us",
        f"{row['p99_us']:,.0f} us",
        f"{row['states_per_second']:,.0f}/s",
        f"{row['start_seconds']:.2f} s",
        f"{row['peak_megabytes']:,.0f} MB",
        f"{row['same_actions']:.1%}",
        *ratios,
    ]


def _ratio(of_medians: float | None, of_least: float | None) -> str:
    return "-" if of_medians is None else f"{of_medians:.1f} ({of_least:.1f})"
