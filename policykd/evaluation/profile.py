"""Profile of policies: what each costs to store, start and run in every available runtime, measured in turns."""

import importlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from policykd.agents.archive import read_archive
from policykd.agents.policy import greedy
from policykd.agents.student import Student, save_student
from policykd.agents.teacher import Teacher
from policykd.envs.emulators import action_names
from policykd.evaluation.costs import Latency, parameters_and_macs
from policykd.evaluation.policies import NamedPolicy
from policykd.evaluation.real_states import on_policy_states
from policykd.evaluation.runtimes import BATCH_SIZE, RUNTIMES, RuntimeName
from policykd.export.artifacts import export
from policykd.export.c99 import to_c
from policykd.export.formats import ExportSource, check_format, compile_c, make_artifact
from policykd.io.machine import versions
from policykd.io.typed import parse_json

# Libraries read the number of threads when they are imported, so it must be in the environment.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)

NUM_INT8_STATES = 2000
"""states that int8 is calibrated on, as in `policykd export`, and other ones that it is validated on"""
C_FLAGS = ("-std=c99", "-O3", "-march=native", "-shared", "-fPIC")
_C_LIBRARY = """#include "policy.h"
int act(const unsigned char *obs);
int act(const unsigned char *obs) { return policykd_act((const void *)obs); }
"""
_FAILURES = (ValueError, ImportError, OSError, RuntimeError, ArithmeticError, subprocess.TimeoutExpired)


@dataclass(frozen=True)
class RuntimeFile:
    """One policy's file for one runtime."""

    path: Path
    num_bytes: int | None
    """bytes that a user would ship; None where that is not a file of its own"""
    int8: str = ""
    """the part of the file that is int8, such as `weights`"""


@dataclass(frozen=True)
class NotMeasured:
    """The reason why a policy is not measured in a runtime."""

    reason: str


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
class Timing(Latency):
    """Report of the process that times one file; the latency is that of one observation on one thread."""

    states_per_second: float
    """throughput with 256 observations per call"""
    same_actions: float
    """share of observations with the policy's own action"""


@dataclass(frozen=True, kw_only=True)
class Measurement(Timing):
    """One policy in one runtime."""

    num_bytes: int | None
    """bytes of the runtime's file"""
    int8: str
    """the part of the file that is int8; empty for float32"""
    start_seconds: float
    """from the start of a process to its first action"""
    peak_megabytes: float
    """peak memory of that process, MB"""
    practical_ratio: float | None = None
    """median latency of SB3's `predict` on the first policy, divided by this one"""
    practical_min_ratio: float | None = None
    """the same of the shortest calls: other processes interrupt long calls more often than short ones"""
    same_runtime_ratio: float | None = None
    """median latency of the first policy in the same runtime, divided by this one"""
    same_runtime_min_ratio: float | None = None


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
    versions: dict[str, str]
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
    command: str = field(default_factory=lambda: shlex.join(sys.argv))


Key = tuple[str, RuntimeName]
"""a policy's name and a runtime"""
Rows = dict[Key, Measurement | NotMeasured]


def profile(policies: Sequence[NamedPolicy], game: str, options: ProfileOptions = ProfileOptions()) -> Profile:
    """Returns what policies cost in every runtime; ratios are against the first policy.

    All are timed in one process with one thread, in turns (A B C, A B C, ...), on frames of the game as the first one
    plays it. Start-up time and memory come from fresh processes, which end with their first action.

    Raises:
        ValueError: two policies with one name, or an ensemble.
    """
    first = policies[0]
    if len({p.name for p in policies}) < len(policies):
        raise ValueError(f"two of {', '.join(p.ref for p in policies)} are called the same; profile them one by one")
    for p in policies:
        if isinstance(p.policy, Teacher) and p.policy.algorithm == "ENSEMBLE":
            raise ValueError(f"{p.ref}: several teachers; profile each by its own name")
    load_before = os.getloadavg()
    # The first policy's own frames: blank ones would measure denormals and branches that never occur.
    obs = on_policy_states(first.policy, game, BATCH_SIZE, seed=2 * options.seed)
    # The reference for actions is the policy itself, not one of its files.
    with torch.inference_mode():
        own_actions = {p.name: greedy(p.policy(obs)).tolist() for p in policies}
    files: dict[Key, RuntimeFile | NotMeasured] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, p in enumerate(policies):
            for runtime in options.runtimes:
                files[p.name, runtime] = make_file(p.policy, runtime, Path(folder) / str(i), game, options.seed)
        observations = Path(folder) / "observations"
        observations.write_bytes(obs.numpy().tobytes())
        # Only once every file exists, so that nothing else runs while they are timed.
        rows = _measure_files(files, own_actions, observations, options)
    profiles: dict[str, PolicyProfile] = {}
    for p in policies:
        parameters, macs = parameters_and_macs(p.policy.net, tuple(obs.shape[1:]))
        runtimes: dict[RuntimeName, Measurement | NotMeasured] = {}
        for runtime in options.runtimes:
            runtimes[runtime] = _with_ratios(rows, (p.name, runtime), first.name)
        profiles[p.name] = PolicyProfile(ref=p.ref, num_parameters=parameters, num_macs=macs, runtimes=runtimes)
    machine = _machine(load_before)
    return Profile(game=game, policies=profiles, ratios_against=first.name, options=options, machine=machine)


def make_file(
    policy: Student | Teacher, runtime: RuntimeName, folder: Path, game: str, seed: int = 0
) -> RuntimeFile | NotMeasured:
    """Returns a policy's file for a runtime; a failure, such as a missing package, becomes the reason for none."""
    folder.mkdir(exist_ok=True)
    source = ExportSource(policy, game, action_names(game))
    try:
        if runtime == "int8":
            return _int8_file(source, folder, seed)
        path = _make_path(source, runtime, folder)
    except _FAILURES as error:
        return NotMeasured((str(error).splitlines() or [type(error).__name__])[0][:200])
    shipped = path / "student.safetensors" if path.is_dir() else path
    return RuntimeFile(path, shipped.stat().st_size if shipped.is_file() else None)


def _make_path(source: ExportSource, runtime: RuntimeName, folder: Path) -> Path:
    """Returns the path of a policy's file, or folder, for a runtime in float32."""
    policy = source.policy
    is_onnx = isinstance(policy, Teacher) and policy.algorithm == "ONNX"
    if runtime == "sb3":
        if find_spec("stable_baselines3") is None:
            raise ValueError("stable_baselines3 is not installed; pip install 'policykd[sb3]'")
        if is_onnx:
            raise ValueError("an ONNX file is not an SB3 agent")
        model = policy.to_sb3() if isinstance(policy, Student) else _as_sb3(policy)
        # The name is how the runtime knows which class opens it.
        path = folder / f"{type(model).__name__}.zip"
        model.save(path)
        return path
    if runtime == "torch":
        if is_onnx:
            raise ValueError("an ONNX file needs ONNX Runtime")
        if isinstance(policy, Teacher):
            return policy.path
        save_student(policy, folder / "student")
        return folder / "student"
    if runtime == "c":
        check_format(source, "c")
        (folder / "policy.h").write_text(to_c(source.net))
        (folder / "policy.c").write_text(_C_LIBRARY)
        compile_c(*C_FLAGS, "policy.c", "-o", "policy.so", "-lm", folder=folder)
        return folder / "policy.so"
    if runtime == "onnx" and isinstance(policy, Teacher) and is_onnx:
        return policy.path
    assert runtime != "int8"
    return make_artifact(source, runtime, folder, calibration=torch.empty(0)).path


def _int8_file(source: ExportSource, folder: Path, seed: int) -> RuntimeFile:
    """Makes the file that `policykd export` writes, which is validated on states of the policy's own games."""
    check_format(source, "int8")
    # Other games for the validation than for the calibration.
    calibration = on_policy_states(source.policy, source.game, NUM_INT8_STATES, seed=2 * seed + 1)
    states = on_policy_states(source.policy, source.game, NUM_INT8_STATES, seed=2 * seed)
    manifest = export(source, "int8", folder, states, calibration)
    return RuntimeFile(folder / manifest.file, manifest.num_bytes, int8=str(manifest.details["int8"]))


def _as_sb3(teacher: Teacher) -> Any:
    """Returns an SB3 agent with the tensors of an archive in the network of SB3's CnnPolicy: no pickle is read."""
    from policykd.agents.sb3_student import agent_without_env

    library = importlib.import_module("sb3_contrib" if teacher.algorithm == "QRDQN" else "stable_baselines3")
    algorithm = getattr(library, teacher.algorithm)
    model: Any = agent_without_env(algorithm, "CnnPolicy", teacher.obs_shape, teacher.num_actions, device="cpu", seed=0)
    # Not strict, as SB3 loads PPO and A2C itself; tensors that do not fit would show in `same_actions`.
    try:
        model.policy.load_state_dict(read_archive(teacher.path).tensors, strict=False)
    except RuntimeError as error:
        raise ValueError("not the network that SB3's CnnPolicy builds") from error
    return model


def _measure_files(
    files: Mapping[Key, RuntimeFile | NotMeasured],
    own_actions: Mapping[str, list[int]],
    observations: Path,
    options: ProfileOptions,
) -> Rows:
    """Returns the measurements of every file, or the reason why there are none."""
    made = {key: file for key, file in files.items() if isinstance(file, RuntimeFile)}
    content = {
        "observations": str(observations),
        "rounds": options.rounds,
        "calls_per_round": options.calls_per_round,
        "files": [(runtime, str(file.path), own_actions[name]) for (name, runtime), file in made.items()],
    }
    request = observations.with_name("request.json")
    request.write_text(json.dumps(content))
    # Latency and throughput of all files in one process, in turns.
    printed = _in_fresh_process("benchmark", str(request))
    timings = parse_json(list[Timing | NotMeasured], printed, "the benchmark")
    rows: Rows = {key: file for key, file in files.items() if isinstance(file, NotMeasured)}
    for (key, file), timing in zip(made.items(), timings, strict=True):
        if isinstance(timing, NotMeasured):
            rows[key] = timing
        else:
            rows[key] = _with_start(timing, file, key[1], observations, options.starts)
    return rows


def _with_start(
    timing: Timing, file: RuntimeFile, runtime: RuntimeName, observations: Path, starts: int
) -> Measurement | NotMeasured:
    """Returns the timing with the medians of start-up time and peak memory; a process that fails is a reason."""
    seconds: list[float] = []
    megabytes: list[float] = []
    for _ in range(starts):
        # CLOCK_MONOTONIC is shared by all processes of a machine.
        began = time.monotonic()
        try:
            printed = _in_fresh_process("start", runtime, str(file.path), str(observations))
        except RuntimeError as error:  # of this runtime alone: the other measurements are kept
            return NotMeasured(str(error))
        ended, peak = parse_json(tuple[float, float], printed, "the measurement")
        seconds.append(ended - began)
        megabytes.append(peak)
    return Measurement(
        **vars(timing),
        num_bytes=file.num_bytes,
        int8=file.int8,
        start_seconds=float(np.median(seconds)),
        peak_megabytes=float(np.median(megabytes)),
    )


def _in_fresh_process(*arguments: str) -> bytes:
    """Returns what a process of `policykd.evaluation.runtimes` with one thread prints.

    Raises:
        RuntimeError: it failed; the message has the last line of its standard error.
    """
    command = [sys.executable, "-m", "policykd.evaluation.runtimes", *arguments]
    done = subprocess.run(command, capture_output=True, env=os.environ | _ONE_THREAD, check=False)
    if done.returncode:
        last_line = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring {' '.join(arguments[:2])} ended with {done.returncode}: {last_line[:200]}")
    return done.stdout


def _with_ratios(rows: Rows, key: Key, first: str) -> Measurement | NotMeasured:
    """Returns a row with how many times faster it is than the policy called `first`."""
    row = rows[key]
    if isinstance(row, NotMeasured):
        return row
    # Practical: network and runtime changed. Same runtime: what the smaller network alone gains.
    if isinstance(sb3 := rows.get((first, "sb3")), Measurement):
        median_ratio = sb3.median_us / row.median_us
        row = replace(row, practical_ratio=median_ratio, practical_min_ratio=sb3.min_us / row.min_us)
    if isinstance(same := rows[first, key[1]], Measurement):
        median_ratio = same.median_us / row.median_us
        row = replace(row, same_runtime_ratio=median_ratio, same_runtime_min_ratio=same.min_us / row.min_us)
    return row


def _machine(load_before: tuple[float, float, float]) -> ProfileMachine:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    runtimes = ("onnxruntime", "stable_baselines3")
    return ProfileMachine(
        processor=model[1] if model else platform.processor() or platform.machine(),
        num_cores=os.cpu_count() or 1,
        system=platform.platform(),
        versions=versions() | {package: version(package) for package in runtimes if find_spec(package)},
        load_before=load_before,
        load_after=os.getloadavg(),
    )


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
