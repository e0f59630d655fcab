"""`policykd profile`: one command, one table, JSON next to it."""

import json
from pathlib import Path

import pytest

from policykd.agents.card import Provenance
from policykd.agents.student import make_student, save_student
from policykd.cli.main import execute


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_student(make_student("1%", 6), tmp_path / "small", Provenance(game="Pong"))
    return tmp_path / "small"


def test_a_missing_compiler_is_named_and_the_profile_is_in_the_runs_folder(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("policykd.export.formats.shutil.which", lambda name: None)
    execute("profile", [str(run), "--runtimes", "onnx", "c", "onnx", "--rounds", "1", "--calls", "5", "--starts", "1"])
    printed = capsys.readouterr().out
    assert "| small | 16,446 | 0.94 M | ONNX Runtime | " in printed
    assert "- not measured, C: c: no compiler found (cc, gcc, clang)" in printed
    found = json.loads((run / "profile.json").read_text())
    assert found["policies"]["small"]["runtimes"]["onnx"]["num_calls"] == 5
    assert found["command"]
    assert found["machine"]["versions"]["onnxruntime"]
    assert sorted(p.name for p in run.iterdir()) == ["profile.json", "student.json", "student.safetensors"]


@pytest.mark.slow
def test_teacher_and_student_in_every_runtime(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    options = ["--rounds", "3", "--calls", "20", "--starts", "1", "--json", str(out)]
    execute("profile", ["bundled:ppo", str(run), *options])
    assert "not measured" not in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["ratios_against"] == "bundled:ppo"
    teacher, student = (found["policies"][name]["runtimes"] for name in ("bundled:ppo", "small"))
    assert list(teacher) == list(student) == ["sb3", "torch", "onnx", "int8", "numpy", "c"]
    for row in (*teacher.values(), *student.values()):
        assert row["same_actions"] > 0.9
    assert student["onnx"]["practical_min_ratio"] > student["onnx"]["same_runtime_min_ratio"] > 1.0
    assert student["sb3"]["peak_megabytes"] > student["onnx"]["peak_megabytes"] > student["c"]["peak_megabytes"]
    assert student["int8"]["num_bytes"] < student["onnx"]["num_bytes"]


def test_a_folder_that_is_not_writable_is_refused_before_anything_is_measured(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs the tests may be allowed everything
    with pytest.raises(ValueError, match=rf"--json {run}/profile\.json: folder not writable"):
        execute("profile", [str(run), "--runtimes", "onnx"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give the folder of a run, or a teacher such as bundled:ppo"),
        (["none-such"], "none-such: file or folder not found"),
        (["RUN", "--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["RUN", "--json", "none-such/p.json"], "folder not found; create it first"),
        (["RUN", "--json", "RUN"], "a folder; give a file in it"),
        (["RUN", "--seed", "99999999999999999999999"], "--seed must be at "),
        (["bundled:ppo+bundled:dqn"], "several teachers; profile each by its own name"),
        (["RUN", "RUN"], "are called the same; profile them one by one"),
    ],
)
def test_invalid_arguments_are_one_line(arguments: list[str], reason: str, run: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the text is checked below)
        execute("profile", [str(run) if word == "RUN" else word for word in arguments])
    assert "\n" not in str(error.value)
    assert reason in str(error.value)
