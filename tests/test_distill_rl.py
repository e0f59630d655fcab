"""The command that distils inside reinforcement learning, on the real game and teacher."""

import hashlib
import json
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from policykd import sb3_checkpoints
from policykd.agents.student import load_student

SCRIPT = Path(__file__).parents[1] / "scripts" / "distill_rl.py"
SMALL = ["--game", "Pong", "--student", "1%", "--eval-every", "0", "--eval-episodes", "1", "--threads", "1"]
SMALL += ["--num-envs", "4", "--checkpoint-every", "256", "--device", "cpu"]


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
    "method", ["qdagger", *(pytest.param(m, marks=pytest.mark.slow) for m in ("ppd", "n-distill"))]
)
def test_a_student_is_distilled_cut_and_continued(
    method: str, distil: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*SMALL, "--method", method, "--steps", "768", "--offline-steps", "400", "--offline-updates", "20"]
    code, stderr = distil(*args, "--folder", str(tmp_path / "whole"))
    assert code == 0, stderr
    whole, cut = (tmp_path / folder / "Pong" / f"{method}-1pct-seed0" for folder in ("whole", "cut"))
    results = json.loads((whole / "results.json").read_text())
    assert results["num_states_labelled"] == 768 + 400 * (method == "qdagger")
    assert results["num_updates"] > 0
    assert results["student"]["protocols"]["noop_sampled"]["num_episodes"] == 1
    assert load_student(whole).temperature == (0.01 if method == "qdagger" else 1.0)

    save = sb3_checkpoints.Progress.save

    def save_and_stop(progress: sb3_checkpoints.Progress) -> None:
        save(progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sb3_checkpoints.Progress, "save", save_and_stop)
        code, stderr = distil(*args, "--folder", str(tmp_path / "cut"))
    assert code == 75
    assert "256 steps are saved; go on with" in stderr
    code, stderr = distil(*args, "--folder", str(tmp_path / "cut"), "--resume")
    assert code == 0, stderr
    one, other = (hashlib.sha256((run / "student.safetensors").read_bytes()).hexdigest() for run in (whole, cut))
    assert one == other


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--weight", "linear:1"], "linear:1"),
        (["--reward-weight", "1"], "--reward-weight is not for --method ppd"),
        (["--method", "qdagger", "--offline-steps", "10"], "--offline-steps 10 are too few"),
        (["--steps", "0"], "--steps must be at least 1"),
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
