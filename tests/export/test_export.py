"""Artifacts get their names after they match torch on real states, with a manifest, or not at all."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from policykd.agents.card import Provenance, TeacherRecord
from policykd.agents.networks import Net
from policykd.agents.student import Student, load_student, make_student, packed_weights, save_student
from policykd.agents.teacher import load_teacher
from policykd.cli.main import execute
from policykd.export.artifacts import ExportManifest, export, validate
from policykd.export.formats import FORMATS, Artifact, ExportSource, FormatName, check_format
from policykd.export.onnx import to_onnx
from policykd.io.files import BadFile
from policykd.io.typed import read_json

TEACHER = TeacherRecord(ref="bundled:ppo", sha256="abc")


@pytest.fixture(scope="module")
def student(frames: Tensor) -> Student:
    """One with outputs in the tens, as those of a student with a low temperature are."""
    student = make_student("1%", 6, seed=1)
    student.fit_input_normalization(frames[:, -1])
    last = [module for module in student.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        outputs_BA = student(frames)
        last.weight.mul_(30.0)
        last.bias.sub_(30.0 * outputs_BA.mean(0))
    return student.eval()


@pytest.fixture(scope="module")
def source(student: Student) -> ExportSource:
    return ExportSource(student, "Pong", ("NOOP",) * 6, TEACHER)


@pytest.mark.parametrize("format_name", FORMATS)
def test_each_format_is_written_with_its_manifest(
    format_name: FormatName, source: ExportSource, student: Student, frames: Tensor, tmp_path: Path
) -> None:
    manifest = export(source, format_name, tmp_path, frames[1::2], frames[::2], "a test")
    path = tmp_path / manifest.file
    assert manifest == read_json(ExportManifest, tmp_path / f"{path.name}.json")
    assert manifest.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest.source.student == hashlib.sha256(packed_weights(student)).hexdigest()
    assert (manifest.format, manifest.game, manifest.command) == (format_name, "Pong", "a test")
    assert manifest.source.teacher == TEACHER
    assert manifest.input.shape == ("batch", 4, 84, 84)
    assert manifest.validation.num_states == 64
    assert manifest.validation.agreement >= (0.99 if format_name == "int8" else 1.0)
    expected = {path.name, f"{path.name}.json", *manifest.extra_files}
    assert {path.name for path in tmp_path.iterdir()} == expected


@pytest.mark.parametrize("format_name", ["onnx", "int8"])
def test_a_file_that_differs_from_torch_is_not_written(
    format_name: FormatName, source: ExportSource, frames: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(source, format_name, tmp_path, frames[1::2], frames[::2])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = make_student("1%", 6, seed=9).folded_net()
    monkeypatch.setattr("policykd.export.formats.to_onnx", lambda net: to_onnx(other))
    with pytest.raises(FloatingPointError, match=rf"{format_name}: on 64 real states .* not written"):
        export(source, format_name, tmp_path, frames[1::2], frames[::2])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def shifted(net: Net, difference: float) -> Callable[[Tensor], np.ndarray]:
    return lambda obs: np.asarray(net(obs).detach().numpy() + np.float32(difference))


def test_the_tolerance_is_relative_to_the_largest_output(source: ExportSource, frames: Tensor) -> None:
    largest = float(source.net(frames).detach().abs().max())
    assert largest > 10.0
    validation = validate(Artifact(Path("x"), shifted(source.net, 0.5e-4 * largest)), "onnx", source, frames)
    assert validation.allowed_difference == pytest.approx(1e-4 * largest)
    with pytest.raises(FloatingPointError, match="is allowed"):
        validate(Artifact(Path("x"), shifted(source.net, 2e-4 * largest)), "onnx", source, frames)


@pytest.mark.parametrize("fault", ["one output", "nan", "shape", "single observation"])
def test_validation_notices(fault: str, source: ExportSource, frames: Tensor) -> None:
    def run(obs: Tensor) -> np.ndarray:
        outputs: np.ndarray = source.net(obs).detach().numpy().copy()
        if fault == "one output":
            outputs[-1, 2] += 3e-4 * np.abs(outputs).max()
        elif fault == "nan":
            outputs[0, 0] = np.nan
        elif fault == "single observation" and len(obs) == 1:
            outputs += 1.0
        return outputs[:, :5] if fault == "shape" else outputs

    with pytest.raises(FloatingPointError, match="not written"):
        validate(Artifact(Path("x"), run), "onnx", source, frames)


@pytest.mark.slow
def test_the_archive_opens_in_sb3_and_is_no_teacher(
    source: ExportSource, student: Student, frames: Tensor, tmp_path: Path
) -> None:
    """In a fresh process; policykd's own reader, which unpickles nothing, refuses it in one line."""
    archive = tmp_path / export(source, "sb3", tmp_path, frames[1::2], frames[::2]).file
    np.save(tmp_path / "obs.npy", frames[:64].numpy())
    code = (
        "import sys, numpy; from stable_baselines3 import PPO\n"
        "model = PPO.load(sys.argv[1], device='cpu')\n"
        "numpy.save(sys.argv[2], model.predict(numpy.load(sys.argv[3]), deterministic=True)[0])"
    )
    paths = [str(archive), str(tmp_path / "actions.npy"), str(tmp_path / "obs.npy")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True)
    with torch.inference_mode():
        expected = student(frames[:64]).argmax(-1).tolist()
    assert np.load(tmp_path / "actions.npy").tolist() == expected
    with pytest.raises(BadFile, match=r"student\.zip: "):
        load_teacher(archive)


def test_the_command_exports_a_run(student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_student(student, tmp_path, Provenance(game="Pong", teacher=TEACHER))
    few_states = ["--states", "64", "--calibration", "16"]
    execute("export", [str(tmp_path), *few_states, "--formats", "onnx", "numpy", "onnx"])
    printed = capsys.readouterr()
    assert printed.out.count("student.onnx: ") == 1
    assert "warning: --states 64 is few" in printed.err
    files = {path.name for path in (tmp_path / "export").iterdir()}
    assert files == {"student.onnx", "student.onnx.json", "student.npz", "student.npz.json", "numpy_policy.py"}
    manifest = read_json(ExportManifest, tmp_path / "export" / "student.npz.json")
    assert manifest.actions[2] == "RIGHT"
    assert manifest.source.student == json.loads((tmp_path / "student.json").read_text())["sha256"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "not the folder of a run; a teacher needs --game and --out"),
        (["bundled:ppo", "--fromats", "onnx"], "--fromats"),
        (["bundled:ppo", "--seed", "99999999999999999999999"], "--seed must be at least 0 and at most 4294967295"),
        (["bundled:ppo", "--states", "0"], "--states must be at least 1"),
        (["bundled:ppo", "--game", "Pong", "--out", "FOLDER", "--formats", "sb3"], "sb3: a teacher is an SB3 archive"),
        (["bundled:ppo", "--game", "Pong", "--out", "FOLDER", "--formats", "c", "--prefix", "9a"], "prefix '9a'"),
        (["bundled:ppo", "--game", "Pong", "--out", "FOLDER/file"], "file: not a folder"),
    ],
)
def test_the_command_refuses_before_it_plays(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message):
        execute("export", [word.replace("FOLDER", str(tmp_path)) for word in words])
    assert "collecting" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Own(nn.Module):
    """A module of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4 * 84 * 84, 6)

    def forward(self, obs: Tensor) -> Tensor:
        outputs: Tensor = self.head(obs.flatten(1) / 255.0)
        return outputs


def test_a_module_of_the_users_is_exported_from_python(frames: Tensor, tmp_path: Path) -> None:
    save_student(Student.of(Own(), num_actions=6), tmp_path, Provenance(game="Pong"))
    with pytest.raises(ValueError, match=r"your own module; export it from Python, see docs/export\.md"):
        execute("export", [str(tmp_path)])
    source = ExportSource(load_student(tmp_path, module=Own()), "Pong")
    manifest = export(source, "onnx", tmp_path / "export", frames[1::2], frames[::2])
    assert (tmp_path / "export" / manifest.file).is_file()
    for format_name in ("numpy", "c", "sb3"):
        with pytest.raises(ValueError, match="a module of your own has no known layers"):
            check_format(source, format_name)
