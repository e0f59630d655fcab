"""Files appear under their names once they score as torch does, with a manifest, or not at all."""

import hashlib
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from policykd.agents.card import Provenance, TeacherRecord
from policykd.agents.student import Student, load_student, make_student, save_student
from policykd.agents.teacher import load_teacher
from policykd.evaluation.real_states import on_policy_states
from policykd.export import FORMATS, Format, Made, Subject, export, validate
from policykd.io.files import BadFile

ROOT = Path(__file__).parents[2]
WRITTEN = {"command": "a test", "versions": {}}


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return on_policy_states(load_teacher("bundled:ppo", game="Pong"), "Pong", 192, seed=8)


@pytest.fixture
def student(frames: Tensor) -> Student:
    student = make_student("1%", 6, seed=1)
    student.fit_input_normalization(frames[:, -1])
    with torch.no_grad():
        scores_BA, last = student(frames), [m for m in student.modules() if isinstance(m, nn.Linear)][-1]
        last.weight.mul_(30.0)
        last.bias.sub_(30.0 * scores_BA.mean(0))
    return student.eval()


@pytest.fixture
def subject(student: Student) -> Subject:
    return Subject(student.folded_net(), "Pong", {"student": "abc"}, ("NOOP",) * 6, student)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_written_with_its_manifest(
    kind: Format, subject: Subject, frames: Tensor, tmp_path: Path
) -> None:
    done = export(subject, kind, tmp_path, frames[1::2], frames[::2], written=WRITTEN)
    manifest = json.loads((tmp_path / f"{done.path.name}.json").read_text())
    assert manifest["sha256"] == hashlib.sha256(done.path.read_bytes()).hexdigest()
    assert (manifest["format"], manifest["game"], manifest["command"]) == (kind, "Pong", "a test")
    assert manifest["input"]["shape"] == ["batch", 4, 84, 84]
    assert manifest["validation"]["num_states"] == 96
    assert manifest["validation"]["agreement"] >= (0.99 if kind == "int8" else 1.0)
    named = {done.path.name, f"{done.path.name}.json", *manifest["beside"]}
    assert {path.name for path in tmp_path.iterdir()} == named


@pytest.mark.parametrize("kind", ["onnx", "int8"])
def test_what_does_not_score_alike_is_not_written(
    kind: Format, subject: Subject, frames: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_student("1%", 6, seed=9).folded_net()
    from policykd.export import onnx as onnx_export

    right = onnx_export.to_onnx
    export(subject, kind, tmp_path, frames[1::2], frames[::2], written=WRITTEN)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("policykd.export.formats.to_onnx", lambda net: right(other))
    with pytest.raises(FloatingPointError, match=rf"{kind}: on 96 real states .* not written"):
        export(subject, kind, tmp_path, frames[1::2], frames[::2], written=WRITTEN)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_int8_falls_back_to_weights_alone_where_the_validation_refuses_more(
    subject: Subject, frames: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration states that say nothing: black ones, on which every way keeps the action."""
    monkeypatch.setattr("policykd.export.formats._INT8_SURELY", 0.0)
    done = export(subject, "int8", tmp_path, frames[1::2], torch.zeros_like(frames[::2]), written=WRITTEN)
    manifest = json.loads((tmp_path / f"{done.path.name}.json").read_text())
    assert manifest["int8"] == "weights"
    assert manifest["why"].startswith("with activations too: int8: on 96 real states it takes the float32 policy's")
    assert manifest["validation"]["agreement"] >= 0.99


def test_large_scores_may_differ_by_a_share_of_the_largest(subject: Subject, frames: Tensor) -> None:
    def off_by(difference: float) -> Callable[[Tensor], np.ndarray]:
        return lambda obs: np.asarray(net(obs).detach().numpy() + np.float32(difference))

    net = subject.net
    largest = float(net(frames).detach().abs().max())
    assert largest > 10.0
    tried = validate(subject, "onnx", Made("x", off_by(0.5e-4 * largest)), frames)
    assert tried.tolerance == pytest.approx(1e-4 * largest)
    with pytest.raises(FloatingPointError, match="is allowed"):
        validate(subject, "onnx", Made("x", off_by(2e-4 * largest)), frames)


@pytest.mark.parametrize("wrong", ["by a little", "nan", "shape", "alone"])
def test_a_wrong_score_is_noticed(wrong: str, subject: Subject, frames: Tensor) -> None:
    def score(obs: Tensor) -> np.ndarray:
        with torch.inference_mode():
            scores: np.ndarray = subject.net(obs).numpy().copy()
        if wrong == "by a little":
            scores[-1, 2] += 3e-4 * max(1.0, np.abs(scores).max())
        elif wrong == "nan":
            scores[0, 0] = np.nan
        elif wrong == "alone" and len(obs) == 1:
            scores += 1e-2
        return scores[:, :5] if wrong == "shape" else scores

    with pytest.raises(FloatingPointError, match="not written"):
        validate(subject, "onnx", Made("x", score), frames)


@pytest.mark.slow
def test_an_archive_opens_in_sb3_and_our_own_reader_unpickles_nothing(
    subject: Subject, student: Student, frames: Tensor, tmp_path: Path
) -> None:
    """In a fresh process; our reader rebuilds SB3's own networks alone, and refuses a student in one line."""
    done = export(subject, "sb3", tmp_path, frames[1::2], frames[::2], written=WRITTEN)
    np.save(tmp_path / "obs.npy", frames[:64].numpy())
    code = (
        "import sys, numpy; from stable_baselines3 import PPO\n"
        "model = PPO.load(sys.argv[1], device='cpu')\n"
        "numpy.save(sys.argv[2], model.predict(numpy.load(sys.argv[3]), deterministic=True)[0])"
    )
    paths = [str(done.path), str(tmp_path / "actions.npy"), str(tmp_path / "obs.npy")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True)
    with torch.inference_mode():
        expected = student(frames[:64]).argmax(-1).tolist()
    assert np.load(tmp_path / "actions.npy").tolist() == expected
    with pytest.raises(BadFile, match=r"student\.zip: policy\.pth is no state dict"):
        load_teacher(done.path)


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run_here(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["export.py", *args])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / "export.py"), run_name="__main__")
        assert isinstance(ended.value.code, int)
        return ended.value.code, "\n".join(capfd.readouterr())

    return run_here


def test_the_command_exports_a_run(run_here: Callable[..., tuple[int, str]], student: Student, tmp_path: Path) -> None:
    save_student(student, tmp_path, Provenance(game="Pong", teacher=TeacherRecord(ref="bundled:ppo", sha256="")))
    few = ("--states", "64", "--calibration", "16", "--formats")
    code, said = run_here(str(tmp_path), *few, "onnx", "numpy", "onnx")
    assert code == 0, said
    assert said.count("student.onnx: ") == 1
    assert "warning: --states 64 is few to try a file on" in said
    files = {path.name for path in (tmp_path / "export").iterdir()}
    assert files == {"student.onnx", "student.onnx.json", "student.npz", "student.npz.json", "numpy_policy.py"}
    manifest = json.loads((tmp_path / "export" / "student.npz.json").read_text())
    assert manifest["actions"]["2"] == "RIGHT"
    assert manifest["source"]["student"] == json.loads((tmp_path / "student.json").read_text())["sha256"]
    assert load_student(tmp_path).shape == student.shape


def test_the_command_says_what_is_wrong_in_one_line(run_here: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, said = run_here(str(tmp_path))
    assert (code, said.count("error:")) == (2, 1)
    assert "not the folder of a run; a teacher needs --game and --out" in said
    for wrong, why in (
        (["--fromats", "onnx"], "--fromats"),
        (["--seed", "99999999999999999999999"], "--seed must be at least 0 and at most 4294967295"),
    ):
        code, said = run_here("bundled:ppo", "--game", "Pong", "--out", str(tmp_path), *wrong)
        assert (code, said.strip().count("\n"), why in said) == (2, 0, True), said
    code, said = run_here("bundled:ppo", "--game", "Pong", "--out", str(tmp_path), "--states", "0")
    assert code == 2
    teacher = ("bundled:ppo", "--game", "Pong", "--out", str(tmp_path))
    code, said = run_here(*teacher, "--states", "8", "--calibration", "8", "--formats", "sb3")
    assert code == 2
    assert "a teacher is one already" in said
    assert "visiting" not in said
    code, said = run_here(*teacher, "--prefix", "9a")
    assert (code, "visiting" in said) == (2, False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    code, said = run_here("bundled:ppo", "--game", "Pong", "--out", str(tmp_path / "file"))
    assert (code, "file: not a folder" in said, "visiting" in said) == (2, True, False)


class Own(nn.Module):
    """A user's."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4 * 84 * 84, 6)

    def forward(self, obs: Tensor) -> Tensor:
        scores: Tensor = self.head(obs.flatten(1) / 255.0)
        return scores


def test_a_module_of_ones_own_is_exported_from_python(
    run_here: Callable[..., tuple[int, str]], frames: Tensor, tmp_path: Path
) -> None:
    save_student(Student.of(Own(), num_actions=6), tmp_path, Provenance(game="Pong"))
    code, said = run_here(str(tmp_path))
    assert code == 2
    assert "load_student(path, module=Own()) in Python, then export(Subject(...)); docs/export.md has the lines" in said
    net = load_student(tmp_path, module=Own()).folded_net()
    done = export(Subject(net, "Pong", {}), "onnx", tmp_path / "export", frames[1::2], frames[::2], written=WRITTEN)
    assert done.path.is_file()
