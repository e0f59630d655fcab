"""Profile of policies: what each costs to store, start and run in every available runtime, measured in turns."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from policykd.agents.policy import greedy
from policykd.agents.teacher import Teacher
from policykd.evaluation.costs import Latency, parameters_and_macs
from policykd.evaluation.policies import NamedPolicy
from policykd.evaluation.real_states import on_policy_states
from policykd.evaluation.runtime_files import ArtifactBuilder, RuntimeFile
from policykd.evaluation.runtimes import BATCH_SIZE, RUNTIMES, RuntimeName
from policykd.io.typed import parse_json

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""environment variables that set the number of threads of torch and NumPy"""
PRACTICAL: RuntimeName = "sb3"
"""runtime of the first policy that users have before they compress or export anything"""
_PACKAGES = ("torch", "numpy", "onnxruntime", "stable-baselines3", "policykd")


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """Settings of a profile."""

    runtimes: tuple[RuntimeName, ...] = tuple(RUNTIMES)
    """runtimes, in the order of the table"""
    seed: int = 0
    """seed of the games whose frames are used"""
    rounds: int = 9
    """turns of each policy in each runtime"""
    calls_per_round: int = 100
    """timed calls per turn"""
    starts: int = 3
    """fresh processes per policy and runtime; start-up is their median"""


@dataclass(frozen=True, kw_only=True)
class Measurement(Latency):
    """One policy in one runtime; the latency is that of one observation on one thread."""

    num_bytes: int | None
    """bytes of the runtime's file"""
    int8: str
    """what is int8 in the file; empty for float32"""
    states_per_second: float
    """throughput with 256 observations per call"""
    start_seconds: float
    """from the start of a process to its first action"""
    peak_megabytes: float
    """peak memory of that process, MB"""
    same_actions: float
    """share of observations with the policy's own action"""
    practical_ratio: float | None
    """median latency of SB3's `predict` on the first policy, divided by this one"""
    practical_min_ratio: float | None
    """the same of the shortest calls: other processes interrupt long calls more often than short ones"""
    same_runtime_ratio: float | None
    """median latency of the first policy in the same runtime, divided by this one"""
    same_runtime_min_ratio: float | None


@dataclass(frozen=True)
class NotMeasured:
    """One policy in one runtime that it was not measured in."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class PolicyProfile:
    """One policy in every runtime."""

    ref: str
    num_parameters: int | None
    num_macs: int | None
    runtimes: dict[RuntimeName, Measurement | NotMeasured]


@dataclass(frozen=True, kw_only=True)
class ProfileMachine:
    """The machine that times depend on."""

    processor: str
    num_cores: int
    system: str
    python: str
    versions: dict[str, str | None]
    load_before: tuple[float, float, float]
    """load averages over 1, 5 and 15 minutes"""
    load_after: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Content of profile.json."""

    game: str
    policies: dict[str, PolicyProfile]
    ratios_against: str
    """name of the first policy"""
    options: ProfileOptions
    machine: ProfileMachine
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class _Timing(Latency):
    """Measurements of one file; start-up is added to what the benchmark's process reports."""

    actions: tuple[int, ...]
    states_per_second: float
    start_seconds: float = 0.0
    peak_megabytes: float = 0.0


@dataclass(frozen=True)
class _Start:
    """Report of a fresh process."""

    monotonic: float
    peak_megabytes: float


Key = tuple[str, RuntimeName]
"""a policy's name and a runtime"""


def profile(policies: Sequence[NamedPolicy], game: str, options: ProfileOptions | None = None) -> Profile:
    """Returns what policies cost in every runtime; ratios are against the first policy.

    All are timed in one process with one thread, in turns (A B C, A B C, ...), on frames of the game as the first one
    plays it. Start-up time and memory come from fresh processes, which end with their first action.

    Args:
        policies: policies with different names, students and teachers.
        game: the Atari game that they play.
        options: runtimes, seed and number of calls.

    Raises:
        ValueError: two policies with one name, or an ensemble.
    """
    options = options or ProfileOptions()
    first = policies[0]
    if len({p.name for p in policies}) < len(policies):
        raise ValueError(f"two of {', '.join(p.ref for p in policies)} are called the same; profile them one by one")
    for p in policies:
        if isinstance(p.policy, Teacher) and p.policy.algorithm == "ENSEMBLE":
            raise ValueError(f"{p.ref}: several teachers; profile each by its own name")
    # The first policy's own frames: blank ones would measure denormals and branches that never occur.
    load_before = os.getloadavg()
    obs = on_policy_states(first.policy, game, BATCH_SIZE, seed=2 * options.seed)
    files: dict[Key, RuntimeFile] = {}
    with tempfile.TemporaryDirectory() as folder:
        observations = Path(folder) / "observations"
        observations.write_bytes(obs.numpy().tobytes())
        for i, p in enumerate(policies):
            builder = ArtifactBuilder(p, Path(folder) / str(i), game, options.seed)
            files |= {(p.name, runtime): builder.build(runtime) for runtime in options.runtimes}
        # Only once every file exists, so that nothing else runs while they are timed.
        timings = _measure_files(files, observations, options)
    # The reference for actions is the policy itself, not one of its files.
    profiles: dict[str, PolicyProfile] = {}
    for p in policies:
        with torch.inference_mode():
            own_actions = greedy(p.policy(obs)).tolist()
        keys = [(p.name, runtime) for runtime in options.runtimes]
        rows = {key[1]: _row(key, files[key], timings, first.name, own_actions) for key in keys}
        parameters, macs = parameters_and_macs(p.policy.net, tuple(obs.shape[1:]))
        profiles[p.name] = PolicyProfile(ref=p.ref, num_parameters=parameters, num_macs=macs, runtimes=rows)
    machine = _machine(load_before)
    return Profile(game=game, policies=profiles, ratios_against=first.name, options=options, machine=machine)


def _measure_files(
    files: Mapping[Key, RuntimeFile], observations: Path, options: ProfileOptions
) -> dict[Key, _Timing | NotMeasured]:
    """Returns the measurements of every file, or the reason why there are none."""
    found: dict[Key, _Timing | NotMeasured] = {key: NotMeasured(file.reason) for key, file in files.items()}
    paths = {key: file.path for key, file in files.items() if file.path}
    found |= zip(paths, _benchmark_interleaved(paths, observations, options), strict=True)
    for key, path in paths.items():
        timing = found[key]
        if isinstance(timing, _Timing):
            found[key] = _with_start(timing, key[1], path, observations, options.starts)
    return found


def _benchmark_interleaved(
    paths: Mapping[Key, Path], observations: Path, options: ProfileOptions
) -> list[_Timing | NotMeasured]:
    """Returns the latency and throughput of each file, all timed in turns in one process."""
    request = observations.with_name("request.json")
    content = {
        "observations": str(observations),
        "rounds": options.rounds,
        "calls_per_round": options.calls_per_round,
        "files": [(runtime, str(path)) for (_, runtime), path in paths.items()],
    }
    request.write_text(json.dumps(content))
    return parse_json(list[_Timing | NotMeasured], _in_fresh_process("benchmark", str(request)), "the benchmark")


def _with_start(
    timing: _Timing, runtime: RuntimeName, path: Path, observations: Path, starts: int
) -> _Timing | NotMeasured:
    """Returns the timing with the medians of start-up time and peak memory; a process that fails is the reason."""
    seconds: list[float] = []
    megabytes: list[float] = []
    for _ in range(starts):
        # CLOCK_MONOTONIC is shared by all processes of a machine.
        began = time.monotonic()
        try:
            printed = _in_fresh_process("start", runtime, str(path), str(observations))
        except RuntimeError as error:  # of this runtime alone: the other measurements are kept
            return NotMeasured(str(error))
        start = parse_json(_Start, printed, "the measurement")
        seconds.append(start.monotonic - began)
        megabytes.append(start.peak_megabytes)
    return replace(timing, start_seconds=float(np.median(seconds)), peak_megabytes=float(np.median(megabytes)))


def _in_fresh_process(*arguments: str) -> bytes:
    """Returns what a process of `policykd.evaluation.runtimes` with one thread prints.

    Raises:
        RuntimeError: it failed; the message has the last line of its standard error.
    """
    command = [sys.executable, "-m", "policykd.evaluation.runtimes", *arguments]
    # Libraries read the number of threads when they are imported, so it must be in the environment.
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, "1")
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    if done.returncode:
        last_line = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring {' '.join(arguments[:2])} ended with {done.returncode}: {last_line[:200]}")
    return done.stdout


def _row(
    key: Key,
    file: RuntimeFile,
    timings: Mapping[Key, _Timing | NotMeasured],
    first: str,
    own_actions: Sequence[int],
) -> Measurement | NotMeasured:
    """Returns one row of the profile, with ratios against the policy called `first`."""
    timing = timings[key]
    if isinstance(timing, NotMeasured):
        return timing
    # Practical: network and runtime changed. Same runtime: what the smaller network alone gains.
    practical = _ratios(timings.get((first, PRACTICAL)), timing)
    same_runtime = _ratios(timings.get((first, key[1])), timing)
    measured = {f.name: getattr(timing, f.name) for f in fields(timing) if f.name != "actions"}
    return Measurement(
        **measured,
        num_bytes=file.num_bytes,
        int8=file.int8,
        same_actions=float(np.mean(np.equal(timing.actions, own_actions))),
        practical_ratio=practical[0],
        practical_min_ratio=practical[1],
        same_runtime_ratio=same_runtime[0],
        same_runtime_min_ratio=same_runtime[1],
    )


def _ratios(reference: _Timing | NotMeasured | None, timing: _Timing) -> tuple[float | None, float | None]:
    """Returns how many times faster than the reference: by median and by shortest call."""
    if not isinstance(reference, _Timing):
        return None, None
    return reference.median_us / timing.median_us, reference.min_us / timing.min_us


def _machine(load_before: tuple[float, float, float]) -> ProfileMachine:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return ProfileMachine(
        processor=models[0] if models else platform.processor() or platform.machine(),
        num_cores=os.cpu_count() or 1,
        system=platform.platform(),
        python=platform.python_version(),
        versions={package: _version(package) for package in _PACKAGES},
        load_before=load_before,
        load_after=os.getloadavg(),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def profile_table(found: Profile) -> str:
    """Returns a profile as Markdown: one row per policy and runtime, and the reasons for missing ones."""
    lines = [
        "| policy | parameters | MACs | runtime | file | batch 1, median | 99th percentile"
        f" | batch {BATCH_SIZE} | start | memory | same actions | practical ratio | same-runtime ratio |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    missing: dict[str, list[str]] = {}
    for name, policy in found.policies.items():
        macs = "-" if policy.num_macs is None else f"{policy.num_macs / 1e6:.2f} M"
        head = f"| {name} | {policy.num_parameters or 0:,} | {macs} |"
        for runtime, row in policy.runtimes.items():
            label = RUNTIMES[runtime][0]
            if isinstance(row, NotMeasured):
                missing.setdefault(f"{label}: {row.reason}", []).append(name)
                continue
            lines.append(f"{head} {label}{row.int8 and f' {row.int8}'} | {' | '.join(_cells(row))} |")
            head = "| | | |"
    machine = found.machine
    before = machine.load_before[0]
    after = machine.load_after[0]
    caveat = "; on a machine as busy as this only those in brackets are reliable"
    lines.append(
        f"\nTimes of one observation, one thread, {machine.processor}, {machine.num_cores} cores, load {before:.1f}"
        f" before and {after:.1f} after. Practical: against `predict` of SB3 on {found.ratios_against}; same-runtime:"
        f" against {found.ratios_against} in the same runtime. Ratios of medians, in brackets of the shortest calls"
        f"{caveat if max(before, after) > machine.num_cores else ''}."
    )
    lines += [f"- not measured, {reason} ({', '.join(names)})" for reason, names in missing.items()]
    return "\n".join(lines)


def _cells(row: Measurement) -> tuple[str, ...]:
    return (
        "-" if row.num_bytes is None else f"{row.num_bytes / 1e3:,.0f} kB",
        f"{row.median_us:,.0f} us",
        f"{row.p99_us:,.0f} us",
        f"{row.states_per_second:,.0f}/s",
        f"{row.start_seconds:.2f} s",
        f"{row.peak_megabytes:,.0f} MB",
        f"{row.same_actions:.1%}",
        _ratio_cell(row.practical_ratio, row.practical_min_ratio),
        _ratio_cell(row.same_runtime_ratio, row.same_runtime_min_ratio),
    )


def _ratio_cell(median_ratio: float | None, min_ratio: float | None) -> str:
    return "-" if median_ratio is None else f"{median_ratio:.1f} ({min_ratio:.1f})"
