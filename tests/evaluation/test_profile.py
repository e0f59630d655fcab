"""Profiles: real files in real processes; what is counted is in the file, and ratios are of the same run."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.student import Student, make_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.envs.emulators import action_names
from policykd.evaluation.policies import NamedPolicy
from policykd.evaluation.profile import (
    Measurement,
    NotMeasured,
    Profile,
    ProfileOptions,
    RuntimeFile,
    Timing,
    _in_fresh_process,
    _with_ratios,
    _with_start,
    make_file,
    profile,
    profile_table,
)
from policykd.evaluation.runtimes import OBS_BYTES, RUNTIMES, RuntimeName, benchmark
from policykd.export.artifacts import export
from policykd.export.formats import ExportSource
from policykd.io.typed import parse_json, to_json


@pytest.fixture(scope="module")
def obs() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 4, 84, 84), np.uint8)


@pytest.fixture(scope="module")
def student() -> Student:
    """One that has not learned, but chooses different actions."""
    made = make_student("1%", 6, seed=1)
    last: Any = made.folded_net().dense
    last[-1].weight.data.mul_(100.0)
    made.fit_input_normalization(torch.tensor([[0, 255]], dtype=torch.uint8).repeat(2, 10))
    return made.eval()


def build(policy: Student | Teacher, folder: Path, *runtimes: RuntimeName) -> dict[RuntimeName, RuntimeFile]:
    """Files of runtimes that must all have one."""
    files: dict[RuntimeName, RuntimeFile] = {}
    for runtime in runtimes:
        file = make_file(policy, runtime, folder, "Pong")
        assert isinstance(file, RuntimeFile)
        files[runtime] = file
    return files


def test_every_runtime_plays_as_torch_does(student: Student, obs: np.ndarray, tmp_path: Path) -> None:
    expected = student(torch.from_numpy(obs)).argmax(1).tolist()
    assert len(set(expected)) > 1
    names: tuple[RuntimeName, ...] = ("sb3", "torch", "onnx", "numpy", "c")
    played = {}
    for name, file in build(student, tmp_path, *names).items():
        assert file.num_bytes
        played[name] = RUNTIMES[name][1](file.path)(obs).tolist()
    assert played == dict.fromkeys(names, expected)
    assert (tmp_path / "student.onnx").stat().st_size < 70_000


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_a_teacher_in_sb3_plays_as_its_archive(algorithm: str, obs: np.ndarray, tmp_path: Path) -> None:
    teacher = load_teacher(f"bundled:{algorithm}", game="Pong")
    files = build(teacher, tmp_path, "sb3", "torch")
    assert files["torch"].num_bytes == teacher.path.stat().st_size
    expected = teacher(torch.from_numpy(obs)).argmax(1).tolist()
    for name, file in files.items():
        assert RUNTIMES[name][1](file.path)(obs).tolist() == expected


def test_an_onnx_teacher_runs_in_onnx_runtime_alone(student: Student, tmp_path: Path) -> None:
    path = build(student, tmp_path / "made", "onnx")["onnx"].path
    assert OnnxPolicy(path).num_actions == 6
    teacher = load_teacher(path)
    assert build(teacher, tmp_path, "onnx")["onnx"].path == path
    runtimes: tuple[RuntimeName, ...] = ("sb3", "torch", "numpy", "c")
    assert all(isinstance(make_file(teacher, runtime, tmp_path, "Pong"), NotMeasured) for runtime in runtimes)
    assert make_file(teacher, "sb3", tmp_path, "Pong") == NotMeasured("an ONNX file is not an SB3 agent")


def test_a_profile_of_a_student(student: Student) -> None:
    """In real processes; the same policy under two names gives the same sizes and actions."""
    policies = [NamedPolicy(name, name, student) for name in ("a", "b")]
    options = ProfileOptions(runtimes=("onnx",), rounds=3, calls_per_round=20, starts=1)
    found = profile(policies, "Pong", options)
    assert parse_json(Profile, to_json(found), "profile.json") == found
    assert list(found.policies) == ["a", "b"]
    for policy in found.policies.values():
        assert (policy.num_parameters, policy.num_macs) == (16_446, 943_104)
        row = policy.runtimes["onnx"]
        assert isinstance(row, Measurement)
        assert row.num_bytes is not None
        assert row.num_bytes < 70_000
        assert 1 < row.min_us <= row.median_us <= row.p99_us
        assert 3 * 5 <= row.num_calls <= 3 * 20
        assert row.states_per_second > 0
        assert row.start_seconds > 0.02
        assert 20 < row.peak_megabytes < 120  # torch alone would take more
        assert row.same_actions == 1.0
        assert row.practical_ratio is None
        assert row.same_runtime_ratio is not None
    first = found.policies["a"].runtimes["onnx"]
    assert isinstance(first, Measurement)
    assert (first.same_runtime_ratio, first.same_runtime_min_ratio) == (1.0, 1.0)
    text = profile_table(found).splitlines()
    assert text[2].startswith("| a | 16,446 | 0.94 M | ONNX Runtime | ")
    assert text[2].endswith(" | 100.0% | - | 1.0 (1.0) |")


def timing(median_us: float, min_us: float) -> Measurement:
    return Measurement(
        median_us=median_us,
        p99_us=median_us,
        min_us=min_us,
        num_calls=1,
        states_per_second=1.0,
        same_actions=1.0,
        num_bytes=1,
        int8="",
        start_seconds=1.0,
        peak_megabytes=1.0,
    )


def test_ratios_are_against_the_first_policy_in_sb3_and_in_the_same_runtime() -> None:
    rows: dict[tuple[str, RuntimeName], Measurement | NotMeasured] = {
        ("t", "sb3"): timing(800.0, 600.0),
        ("t", "onnx"): timing(200.0, 180.0),
        ("t", "c"): NotMeasured("no compiler"),
        ("s", "onnx"): timing(40.0, 30.0),
        ("s", "c"): timing(20.0, 20.0),
    }

    def row(name: str, runtime: RuntimeName) -> Measurement:
        found = _with_ratios(rows, (name, runtime), "t")
        assert isinstance(found, Measurement)
        return found

    onnx, c = row("s", "onnx"), row("s", "c")
    assert (onnx.practical_ratio, onnx.same_runtime_ratio) == (20.0, 5.0)
    assert (onnx.practical_min_ratio, onnx.same_runtime_min_ratio) == (20.0, 6.0)
    assert (c.practical_ratio, c.practical_min_ratio) == (40.0, 30.0)
    assert c.same_runtime_ratio is c.same_runtime_min_ratio is None
    assert row("t", "sb3").practical_ratio == 1.0
    assert _with_ratios(rows, ("t", "c"), "t") == NotMeasured("no compiler")


def test_int8_is_the_file_that_an_export_writes(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    states, calibration = (
        torch.randint(0, 256, (n, 4, 84, 84), dtype=torch.uint8, generator=generator) for n in (16, 32)
    )
    monkeypatch.setattr("policykd.export.artifacts.INT8_AGREEMENT", 0.0)
    monkeypatch.setattr(
        "policykd.evaluation.profile.on_policy_states", lambda *_, seed: calibration if seed % 2 else states
    )
    file = build(student, tmp_path, "int8")["int8"]
    assert file.int8 == "weights"
    source = ExportSource(student, "Pong", action_names("Pong"))
    written = export(source, "int8", tmp_path / "out", states, calibration)
    assert file.path.read_bytes() == (tmp_path / "out" / written.file).read_bytes()


def test_an_int8_file_that_an_export_would_refuse_is_not_measured(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("policykd.export.artifacts.INT8_AGREEMENT", 1.1)
    monkeypatch.setattr("policykd.evaluation.profile.NUM_INT8_STATES", 8)
    file = make_file(student, "int8", tmp_path, "Pong")
    assert isinstance(file, NotMeasured)
    assert "are needed; not written" in file.reason


def test_a_failing_runtime_does_not_stop_the_others(student: Student, obs: np.ndarray, tmp_path: Path) -> None:
    observations = tmp_path / "observations"
    observations.write_bytes(obs.tobytes())
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    whole = build(student, tmp_path, "onnx")["onnx"].path
    own_actions = student(torch.from_numpy(obs)).argmax(1).tolist()
    own_actions[0] = (own_actions[0] + 1) % 6  # a runtime that acts differently is seen
    files: list[tuple[RuntimeName, str, list[int]]] = [
        ("onnx", str(path), own_actions) for path in (tmp_path / "broken.onnx", whole)
    ]
    found = benchmark(str(observations), files, rounds=1, calls_per_round=2)
    assert found[0].keys() == {"reason"}
    assert (found[1]["num_calls"], found[1]["same_actions"]) == (2, 7 / 8)
    # Neither does one that does not start.
    timed = Timing(**{f.name: 1 for f in fields(Timing)})
    row = _with_start(timed, RuntimeFile(tmp_path / "gone.npz", 1), "numpy", observations, 1)
    assert isinstance(row, NotMeasured)
    assert "measuring start numpy ended with 1: ModuleNotFoundError" in row.reason


def test_start_up_needs_no_torch(student: Student, obs: np.ndarray, tmp_path: Path) -> None:
    """What is measured for ONNX Runtime and NumPy is their own start, not torch's."""
    (tmp_path / "observations").write_bytes(obs.tobytes()[:OBS_BYTES])
    for name, file in build(student, tmp_path, "onnx", "numpy").items():
        code = (
            "import sys; sys.modules['torch'] = sys.modules['stable_baselines3'] = None\n"
            "import policykd.evaluation.runtimes as r; r.main(*sys.argv[1:])"
        )
        arguments = ["start", name, str(file.path), str(tmp_path / "observations")]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[1] > 5  # MB


def test_memory_is_not_that_of_the_parent_process() -> None:
    """`ru_maxrss` would be this process's own, torch and all."""
    code = "from policykd.evaluation.runtimes import peak_megabytes; print(peak_megabytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 < float(done.stdout) < 60


def test_a_process_that_fails_gives_the_reason(tmp_path: Path) -> None:
    (tmp_path / "observations").write_bytes(bytes(OBS_BYTES))
    with pytest.raises(RuntimeError, match=r"measuring start onnx ended with 1: .*none\.onnx"):
        _in_fresh_process("start", "onnx", str(tmp_path / "none.onnx"), str(tmp_path / "observations"))


@pytest.mark.parametrize(
    ("package", "runtime", "extra"), [("stable_baselines3", "sb3", "sb3"), ("onnxruntime", "onnx", "onnx")]
)
def test_a_missing_package_is_named_and_the_rest_is_measured(
    package: str,
    runtime: RuntimeName,
    extra: str,
    student: Student,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec
    hidden = lambda name: None if name == package else real(name)  # noqa: E731
    monkeypatch.setattr("policykd.evaluation.profile.find_spec", hidden)
    monkeypatch.setattr("importlib.util.find_spec", hidden)
    runtimes: tuple[RuntimeName, ...] = ("sb3", "onnx", "torch")
    files = {name: make_file(student, name, tmp_path, "Pong") for name in runtimes}
    missing = {name: file.reason for name, file in files.items() if isinstance(file, NotMeasured)}
    assert list(missing) == [runtime]
    assert missing[runtime].endswith(f"pip install 'policykd[{extra}]'")


def test_two_policies_with_one_name_are_refused(student: Student) -> None:
    with pytest.raises(ValueError, match="are called the same"):
        profile([NamedPolicy("a", "a", student), NamedPolicy("b/a", "a", student)], "Pong")
