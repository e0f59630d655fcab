"""Profiles: real files in real processes; what is counted is what is there, and ratios are of the same run."""

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.student import Student, make_student
from policykd.agents.teacher import load_teacher
from policykd.envs.actions import action_names
from policykd.evaluation.deployments import Deployment, RealStates, deploy
from policykd.evaluation.policies import NamedPolicy
from policykd.evaluation.profile import _add_ratios, _asked, _compare_actions, _started, profile, table
from policykd.evaluation.runtimes import OBS_BYTES, RUNTIMES, RuntimeName, race
from policykd.export import ExportSource, export
from policykd.io.signals import handle_signals

QUICK: tuple[RuntimeName, ...] = ("onnx",)


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


def test_every_runtime_plays_as_torch_does(student: Student, obs: np.ndarray, tmp_path: Path) -> None:
    expected = student(torch.from_numpy(obs)).argmax(1).tolist()
    assert len(set(expected)) > 1
    names: tuple[RuntimeName, ...] = ("sb3", "torch", "onnx", "numpy", "c")
    played = {}
    for name, deployment in deploy(student, tmp_path, names, game="Pong", states=None).items():
        assert deployment.file is not None, deployment.why_not
        assert deployment.num_bytes
        played[name] = RUNTIMES[name][1](deployment.file)(obs).tolist()
    assert played == dict.fromkeys(names, expected)
    assert (tmp_path / "policy.onnx").stat().st_size < 70_000


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_a_teacher_in_sb3_plays_as_its_archive(algorithm: str, obs: np.ndarray, tmp_path: Path) -> None:
    teacher = load_teacher(f"bundled:{algorithm}", game="Pong")
    made = deploy(teacher, tmp_path, ["sb3", "torch"], game="Pong", states=None)
    assert made["torch"].num_bytes == teacher.path.stat().st_size
    expected = teacher(torch.from_numpy(obs)).argmax(1).tolist()
    for name, deployment in made.items():
        assert deployment.file is not None, deployment.why_not
        assert RUNTIMES[name][1](deployment.file)(obs).tolist() == expected


def test_an_onnx_teacher_has_no_other_form(student: Student, obs: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    file = deploy(student, tmp_path / "made", ["onnx"], game="Pong", states=None)["onnx"].file
    assert file is not None
    assert OnnxPolicy(file).num_actions == 6
    made = deploy(load_teacher(file), tmp_path, ["sb3", "torch", "onnx", "numpy"], game="Pong", states=None)
    assert {name: bool(deployment.file) for name, deployment in made.items()} == {
        "sb3": False,
        "torch": False,
        "onnx": True,
        "numpy": False,
    }
    assert made["sb3"].why_not == "an ONNX file is no SB3 agent"


def test_a_profile_of_a_student(student: Student) -> None:
    """In real processes; twice the same policy is as fast as itself, within what a busy machine makes of it."""
    contenders = [NamedPolicy(name, name, student) for name in ("a", "b")]
    found = profile(contenders, "Pong", runtimes=QUICK, rounds=3, calls_per_round=20, starts=1)
    assert json.loads(json.dumps(found)).keys() == found.keys()
    assert list(found["policies"]) == ["a", "b"]
    for policy in found["policies"].values():
        assert (policy["num_parameters"], policy["num_macs"]) == (16_446, 943_104)
        row = policy["runtimes"]["onnx"]
        assert row["num_bytes"] < 70_000
        assert 1 < row["least_us"] <= row["median_us"] <= row["p99_us"]
        assert row["num_calls"] == 60
        assert row["states_per_second"] > 100
        assert 0.02 < row["start_seconds"] < 60
        assert 20 < row["peak_megabytes"] < 120  # torch alone would take more
        assert row["same_actions"] == 1.0
        assert row["practical_ratio"] is None
        assert 0.2 < row["same_runtime_ratio"] < 5.0
    assert found["machine"]["num_cores"] == os.cpu_count()
    assert len(found["machine"]["load_before"]) == 3
    text = table(found).splitlines()
    assert text[2].startswith("| a | 16,446 | 0.94 M | ONNX Runtime | ")
    assert text[2].endswith(" | 100.0% | - | 1.0 (1.0) |")


def test_a_runtime_that_does_not_start_loses_nothing_that_was_measured(obs: np.ndarray, tmp_path: Path) -> None:
    """Its row says why, beside what it has; a profile ends with the others."""
    (tmp_path / "observations").write_bytes(obs.tobytes())
    found = _started("numpy", Deployment(tmp_path / "gone.npz"), tmp_path / "observations", 1)
    assert list(found) == ["why_not"]
    assert "measuring start numpy ended with 1: FileNotFoundError" in found["why_not"]


def test_ratios_are_against_the_first_in_sb3_and_in_the_same_runtime() -> None:
    rows: dict[str, Any] = {
        "sb3": {"median_us": 800.0, "least_us": 600.0},
        "onnx": {"median_us": 200.0, "least_us": 180.0},
        "c": {"why_not": "no compiler"},
    }
    policies: dict[str, dict[str, Any]] = {"t": {"runtimes": rows}, "s": {"runtimes": copy.deepcopy(rows)}}
    policies["s"]["runtimes"]["onnx"] = {"median_us": 40.0, "least_us": 30.0}
    policies["s"]["runtimes"]["c"] = {"median_us": 20.0, "least_us": 20.0}
    _add_ratios(policies)
    found = policies["s"]["runtimes"]
    assert (found["onnx"]["practical_ratio"], found["onnx"]["same_runtime_ratio"]) == (20.0, 5.0)
    assert (found["onnx"]["practical_least_ratio"], found["onnx"]["same_runtime_least_ratio"]) == (20.0, 6.0)
    assert (found["c"]["practical_ratio"], found["c"]["practical_least_ratio"]) == (40.0, 30.0)
    assert found["c"]["same_runtime_ratio"] is found["c"]["same_runtime_least_ratio"] is None
    assert rows["sb3"]["practical_ratio"] == 1.0
    assert rows["c"] == {"why_not": "no compiler"}


def test_a_runtime_that_plays_otherwise_is_seen() -> None:
    """By what the policy itself does: a torch that is wrong, or is not asked for, is no reference."""
    rows: dict[RuntimeName, dict[str, Any]] = {"onnx": {"actions": [1, 1, 0, 1]}, "torch": {"actions": [1, 2, 2, 1]}}
    _compare_actions(rows, [1, 1, 1, 1])
    assert rows == {"onnx": {"same_actions": 0.75}, "torch": {"same_actions": 0.5}}


def test_int8_is_the_file_that_an_export_writes(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("policykd.export.artifacts.INT8_AGREEMENT", 0.0)
    generator = torch.Generator().manual_seed(0)
    some = [torch.randint(0, 256, (n, 4, 84, 84), dtype=torch.uint8, generator=generator) for n in (32, 16)]
    made = deploy(student, tmp_path, ["int8"], game="Pong", states=RealStates(*some))["int8"]
    assert (made.int8, made.why_not) == ("weights", "")
    source = ExportSource(student, "Pong", action_names("Pong"))
    written = export(source, "int8", tmp_path / "out", some[1], some[0])
    assert made.file is not None
    assert made.file.read_bytes() == written.path.read_bytes()


def test_an_int8_that_an_export_would_refuse_is_no_row(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("policykd.export.artifacts.INT8_AGREEMENT", 1.1)
    some = torch.zeros((4, 4, 84, 84), dtype=torch.uint8)
    made = deploy(student, tmp_path, ["int8"], game="Pong", states=RealStates(some, some))["int8"]
    assert made.file is None
    assert "it takes torch's action in" in made.why_not


def test_one_runtime_that_fails_does_not_stop_the_others(student: Student, obs: np.ndarray, tmp_path: Path) -> None:
    file = deploy(student, tmp_path, ["onnx"], game="Pong", states=None)["onnx"].file
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    (tmp_path / "observations").write_bytes(obs.tobytes())
    files = [str(tmp_path / "broken.onnx"), str(file)]
    entries = [{"runtime": "onnx", "file": f} for f in files]
    how = {"observations": str(tmp_path / "observations"), "rounds": 1, "calls_per_round": 2}
    broken, whole = race({**how, "entries": entries})
    assert broken.keys() == {"why_not"}
    assert whole["num_calls"] == 2


def test_start_up_needs_no_torch(student: Student, obs: np.ndarray, tmp_path: Path) -> None:
    """What is measured for ONNX Runtime and NumPy is their own start, not torch's."""
    (tmp_path / "observations").write_bytes(obs.tobytes()[:OBS_BYTES])
    made = deploy(student, tmp_path, ["onnx", "numpy"], game="Pong", states=None)
    for name, deployment in made.items():
        code = (
            "import sys; sys.modules['torch'] = sys.modules['stable_baselines3'] = None\n"
            "import policykd.evaluation.runtimes as r; r.main(*sys.argv[1:])"
        )
        arguments = ["start", name, str(deployment.file), str(tmp_path / "observations")]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["peak_megabytes"] > 5


def test_memory_is_not_inherited_from_the_process_that_starts_another() -> None:
    """`ru_maxrss` would be this process's own, torch and all."""
    code = "from policykd.evaluation.runtimes import peak_megabytes; print(peak_megabytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 < float(done.stdout) < 60


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "observations").write_bytes(bytes(OBS_BYTES))
    with pytest.raises(RuntimeError, match=r"measuring start onnx ended with 1: .*none\.onnx"):
        _asked("start", "onnx", str(tmp_path / "none.onnx"), str(tmp_path / "observations"))


def test_a_signal_ends_the_process_that_measures_too(student: Student, obs: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "observations").write_bytes(obs.tobytes())
    entry = {"runtime": "onnx", "file": str(deploy(student, tmp_path, ["onnx"], game="Pong", states=None)["onnx"].file)}
    how = {"observations": str(tmp_path / "observations"), "rounds": 10_000, "calls_per_round": 1000}
    (tmp_path / "race.json").write_text(json.dumps({**how, "entries": [entry]}))
    stop = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    with handle_signals():
        stop.start()
        with pytest.raises(KeyboardInterrupt):
            _asked("race", str(tmp_path / "race.json"))
    with pytest.raises(ChildProcessError):  # there is none
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("missing", ["stable_baselines3", "onnxruntime"])
def test_a_missing_package_is_named_and_the_rest_goes_on(
    missing: str, student: Student, obs: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "policykd.evaluation.deployments.find_spec", lambda name: None if name == missing else real(name)
    )
    made = deploy(student, tmp_path, ["sb3", "onnx", "torch"], game="Pong", states=None)
    gone, extra = {"stable_baselines3": ("sb3", "sb3"), "onnxruntime": ("onnx", "onnx")}[missing]
    assert made[gone].why_not.endswith(f"pip install 'policykd[{extra}]'")  # type: ignore[index]
    assert [name for name, deployment in made.items() if deployment.file is None] == [gone]


def test_two_policies_of_one_name_are_refused(student: Student) -> None:
    with pytest.raises(ValueError, match="are called the same"):
        profile([NamedPolicy("a", "a", student), NamedPolicy("b/a", "a", student)], "Pong")
