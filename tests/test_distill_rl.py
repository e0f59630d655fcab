"""The command that distils inside reinforcement learning, on the real game and teacher."""

import hashlib
import json
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from policykd.agents.student import load_student
from policykd.evaluation import results, teacher_check
from policykd.evaluation.teacher_check import TeacherCheck
from policykd.rl import sb3_checkpoints

SCRIPT = Path(__file__).parents[1] / "scripts" / "distill_rl.py"
SMALL = ["--game", "Pong", "--student", "1%", "--eval-every", "0", "--eval-episodes", "1", "--threads", "1"]
SMALL += ["--num-envs", "2", "--checkpoint-every", "128", "--device", "cpu"]
CHANCE = TeacherCheck("played", -20.7, (-21.0, -20.0), -20.7, (-0.5, 0.5), 8, 0, None, None)


@pytest.fixture
def distil(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process, where torch is imported already: its exit code and standard error."""

    def distil(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["distill_rl.py", *args])
        monkeypatch.setattr(threading, "excepthook", threading.excepthook)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert isinstance(ended.value.code, int)
        return ended.value.code, capfd.readouterr().err

    return distil


@pytest.mark.parametrize(
    ("method", "is_compared"),
    [("qdagger", False), *(pytest.param(m, True, marks=pytest.mark.slow) for m in ("ppd", "n-distill", "qdagger"))],
)
def test_a_student_is_distilled_cut_and_continued(
    method: str,
    is_compared: bool,
    distil: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = [*SMALL, "--method", method, "--steps", "256"]
    args += ["--offline-steps", "100", "--offline-updates", "10"] if method == "qdagger" else []
    whole, cut = (tmp_path / folder / "Pong" / f"{method}-1pct-seed0" for folder in ("whole", "cut"))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    save = sb3_checkpoints.Progress.save

    def save_and_stop(progress: sb3_checkpoints.Progress) -> None:
        save(progress)
        stop()

    with monkeypatch.context() as patched:
        patched.setattr(sb3_checkpoints.Progress, "save", save_and_stop)
        code, stderr = distil(*args, "--folder", str(tmp_path / "cut"))
    assert code == 75
    assert "128 steps are saved; go on with" in stderr
    monkeypatch.setattr("policykd.report.STEPS_A_SECOND", 1)  # a short film
    code, stderr = distil(*args, "--folder", str(tmp_path / "cut"), "--resume")
    assert code == 0, stderr
    if is_compared:
        with monkeypatch.context() as patched:
            patched.setattr(results, "judge", stop)  # by then the student is saved
            code, stderr = distil(*args, "--folder", str(tmp_path / "whole"))
        assert code == 75
        assert "256 steps are saved; go on with" in stderr
        one, other = (hashlib.sha256((run / "student.safetensors").read_bytes()).hexdigest() for run in (whole, cut))
        assert one == other
    assert load_student(cut).temperature == (0.01 if method == "qdagger" else 1.0)
    found = json.loads((cut / "results.json").read_text())
    assert found["num_states_labelled"] == 256 + 100 * (method == "qdagger")
    assert found["num_updates"] > 10 * (method == "qdagger")
    assert found["student"]["protocols"]["noop_sampled"]["num_episodes"] == 1

    page = (cut / "report.html").read_text()
    assert "KL divergence from the teacher" in page
    assert "agent steps" in page

    if method == "qdagger":  # the curve is there after the cut as before
        curves = EventAccumulator(str(cut)).Reload()
        assert [event.step for event in curves.Scalars("offline/teacher_kl")] == [0]
    code, stderr = distil(*args, "--folder", str(tmp_path / "cut"), "--resume", "--steps", "257")
    assert code == 2
    assert "is finished, at 256 steps; for --steps 257 give another --name" in stderr


@pytest.mark.slow
def test_a_student_that_diverges_is_one_line_and_not_saved(
    distil: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    args = ["--method", "qdagger", "--steps", "256", "--offline-steps", "100", "--offline-updates", "10"]
    code, stderr = distil(*SMALL, *args, "--learning-rate", "1e30", "--folder", str(tmp_path))
    assert code == 5
    assert "lower --learning-rate or --weight" in stderr
    assert stderr.count("\n") == 1
    assert not list(tmp_path.rglob("student.safetensors"))
    assert not list(tmp_path.rglob("model-*.safetensors"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--weight", "linear:1"], "linear:1"),
        (["--weight", "nan"], "nan"),
        (["--weight", "-1"], "--weight must not be negative or infinite, it comes to -1"),
        (["--weight", "gap:-2"], "--weight must not be negative or infinite, it comes to -2"),
        (["--weight", "linear:1:-1"], "--weight must not be negative or infinite, it comes to -1"),
        (["--reward-weight", "1"], "--reward-weight is not for --method ppd but for on-policy, n-distill"),
        (["--reward-weight", "0"], "--reward-weight is not for --method ppd"),
        (["--method", "n-distill", "--reward-weight", "-1"], "--reward-weight must be at least 0"),
        (["--method", "n-distill", "--reward-weight", "nan"], "--reward-weight must be a number, not nan"),
        (["--method", "n-distill", "--entropy-weight", "nan"], "--entropy-weight must be a number, not nan"),
        (["--method", "n-distill", "--entropy-weight", "2"], "--entropy-weight must lie in [0, 1], not 2"),
        (["--method", "on-policy", "--entropy-weight", "1"], "--entropy-weight is not for --method on-policy"),
        (["--method", "n-distill", "--offline-steps", "9"], "--offline-steps is not for --method n-distill"),
        (["--offline-updates", "0"], "--offline-updates is not for --method ppd but for qdagger; leave it out"),
        (["--temperature", "nan"], "--temperature must be a number, not nan"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--learning-rate", "nan"], "--learning-rate must be a number, not nan"),
        (["--seed", "99999999999"], "--seed must be below 2^32, not 99999999999"),
        (["--method", "qdagger", "--offline-steps", "10"], "--offline-steps 10 are too few"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--stpes", "1"], "Unrecognized options: --stpes"),
    ],
)
def test_a_run_that_cannot_be_is_one_line(
    args: list[str], says: str, distil: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, stderr = distil("--game", "Pong", "--folder", str(tmp_path / "runs"), *args)
    assert code == 2
    assert says in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_weight_that_follows_a_teacher_that_cannot_play_is_refused_before_anything_is_written(
    distil: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_check, "check_teacher", lambda *_, **__: CHANCE)
    args = ["--method", "qdagger", "--allow-weak-teacher", "--folder", str(tmp_path / "runs")]
    code, stderr = distil(*SMALL, *args)
    assert code == 2
    assert "needs a teacher that beats random play, not -20.7 against -20.7" in stderr
    assert not (tmp_path / "runs").exists()
