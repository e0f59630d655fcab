"""scripts/profile_policy.py: one command, one table, JSON beside it."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from policykd.agents.card import Provenance
from policykd.agents.student import make_student, save_student
from policykd.cli.command import USAGE

SCRIPT = Path(__file__).parents[1] / "scripts" / "profile_policy.py"
Profile = Callable[..., tuple[int, str, str]]


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Profile:
    """Runs the command in this process: exit code, output, errors."""

    def profile(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["profile_policy.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert isinstance(ended.value.code, int)
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return profile


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_student(make_student("1%", 6), tmp_path / "small", Provenance(game="Pong"))
    return tmp_path / "small"


def test_what_is_not_installed_is_named_and_the_profile_is_in_the_runs_folder(
    run: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("policykd.evaluation.deployments.which", lambda name: None)
    code, out, err = profile(str(run), "--runtimes", "onnx", "c", "--rounds", "1", "--calls", "5", "--starts", "1")
    assert (code, err) == (0, "")
    assert "| small | 16,446 | 0.94 M | ONNX Runtime | " in out
    assert "- not measured, C: no C compiler is installed (cc, gcc, clang) (small)" in out
    found = json.loads((run / "profile.json").read_text())
    assert found["policies"]["small"]["runtimes"]["onnx"]["num_calls"] == 5
    assert "profile_policy.py " in found["command"]
    assert found["machine"]["versions"]["onnxruntime"]
    assert sorted(p.name for p in run.iterdir()) == ["profile.json", "student.json", "student.safetensors"]


@pytest.mark.slow
def test_teacher_and_student_in_every_runtime(run: Path, profile: Profile, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    how = ["--rounds", "3", "--calls", "20", "--starts", "1", "--json", str(out)]
    code, said, err = profile("bundled:ppo", str(run), *how)
    assert (code, err) == (0, "")
    assert "not measured" not in said
    found = json.loads(out.read_text())
    assert found["ratios_against"] == "bundled:ppo"
    teacher, student = (found["policies"][name]["runtimes"] for name in ("bundled:ppo", "small"))
    assert list(teacher) == list(student) == ["sb3", "torch", "onnx", "int8", "numpy", "c"]
    for row in (*teacher.values(), *student.values()):
        assert row["same_actions"] > 0.9
    assert student["onnx"]["practical_ratio"] > student["onnx"]["same_runtime_ratio"] > 1.0
    assert student["sb3"]["peak_megabytes"] > student["onnx"]["peak_megabytes"] > student["c"]["peak_megabytes"]
    assert student["int8"]["num_bytes"] < student["onnx"]["num_bytes"]


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(
    run: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs the tests may be allowed everything
    code, _, err = profile(str(run), "--runtimes", "onnx")
    assert (code, len(err.splitlines())) == (USAGE, 1)
    assert f"--json {run}/profile.json: its folder cannot be written" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give the folder of a run, or a teacher such as bundled:ppo"),
        (["none-such"], "none-such: no such file or folder"),
        (["RUN", "--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["RUN", "--json", "none-such/p.json"], "its folder is missing; make it first"),
        (["RUN", "--json", "RUN"], "a folder; give a file in it"),
        (["RUN", "--runtimes"], "--runtimes: name at least one of sb3, torch, onnx"),
        (["RUN", "--runtimes", "c", "onnx", "onnx"], "--runtimes c onnx onnx: onnx is there twice"),
        (["RUN", "--seed", "99999999999999999999999"], "--seed must be at least 0 and at most 4294967295, not 9999"),
        (["bundled:ppo+bundled:dqn"], "several teachers; profile each by its own name"),
        (["RUN", "RUN"], "are called the same; profile them one by one"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], said: str, run: Path, profile: Profile) -> None:
    code, _, err = profile(*[str(run) if word == "RUN" else word for word in arguments])
    assert (code, len(err.splitlines())) == (USAGE, 1)
    assert said in err
