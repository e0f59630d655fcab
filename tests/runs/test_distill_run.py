"""`distill_run` from Python and as a command: whole, interrupted, resumed, lengthened, repeated."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policykd.cli.main import execute
from policykd.io.files import BadFile
from policykd.losses import LogitMSE
from policykd.runs import distill_run as module
from policykd.runs import finish
from policykd.runs.config import DistillRunConfig, from_settings
from policykd.runs.distill_run import distill_run
from policykd.runs.folder import NOTES, RunResult, load_results, load_run_config

pytestmark = pytest.mark.usefixtures("flickers")


def learned(run: Path) -> list[str]:
    """Returns hashes of what must not depend on interruptions."""
    names = ("student.safetensors", "metrics.jsonl", "evaluations.npz")
    return [hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names]


def folder(config: DistillRunConfig) -> Path:
    return config.folder / "Pong" / "r"


def interrupt(monkeypatch: pytest.MonkeyPatch, step: str, call: int) -> None:
    """Raises KeyboardInterrupt after the n-th call of a step, as a signal would."""
    owner = module if hasattr(module, step) else finish
    function: Callable[..., Any] = getattr(owner, step)
    num_calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        result = function(*args, **kwargs)
        if num_calls == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, step, interrupted)


def test_a_whole_run_returns_its_results(tiny: DistillRunConfig) -> None:
    result = distill_run(tiny)
    run = folder(tiny)
    assert isinstance(result, RunResult)
    assert (result.num_states_labelled, result.num_updates) == (96, 6)
    assert result.student.protocols["noop_sampled"].num_episodes == 2
    assert load_results(run) == result
    assert (run / "results.md").read_text() == result.summary()
    assert from_settings(DistillRunConfig, load_run_config(run).settings, "config.json") == tiny
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["num_states"] for row in rows] == [32, 64, 96]
    written = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    logs = {"metrics.jsonl", "timings.jsonl", "evaluations.npz", "config.json", "checkpoints", "final_eval.json"}
    assert written == logs | {"student.safetensors", "student.json", "student.gif"} | {
        "results.json",
        "results.md",
        "report.html",
    }


def test_a_finished_run_is_shown_and_not_repeated(tiny: DistillRunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    result = distill_run(tiny)
    run = folder(tiny)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(ValueError, match="holds a run already"):
        distill_run(tiny)
    capsys.readouterr()
    assert distill_run(replace(tiny, resume=True)) == result
    assert "student minus teacher" in capsys.readouterr().out
    execute("resume", [str(run)])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(("step", "call"), [("save_checkpoint", 2), ("periodic_evaluation", 1), ("save_student", 1)])
def test_an_interrupted_run_resumes_with_the_same_bytes(
    step: str, call: int, tiny: DistillRunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill_run(replace(tiny, folder=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt(patch, step, call)
        with pytest.raises(KeyboardInterrupt, match=f"resume with: policykd resume {folder(tiny)}"):
            distill_run(tiny)
    assert not (folder(tiny) / "results.json").exists()
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    execute("resume", [str(moved / "Pong/r")])
    assert learned(moved / "Pong/r") == learned(tmp_path / "whole/Pong/r")


def test_other_settings_are_refused(
    tiny: DistillRunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "save_checkpoint", 1)
        with pytest.raises(KeyboardInterrupt):
            distill_run(tiny)
    again = replace(tiny, resume=True)
    with pytest.raises(ValueError, match=r"\(batch_size was 32, is 16; seed was 0, is 1\); give another --name"):
        distill_run(replace(again, seed=1, batch_size=16))
    with pytest.raises(ValueError, match=r"loss was .*ForwardKL.*, is .*LogitMSE"):
        distill_run(replace(again, loss=LogitMSE()))
    with pytest.raises(ValueError, match=r"teacher was PPO bundled:ppo .*, is DQN bundled:dqn"):
        distill_run(replace(again, teacher="bundled:dqn"))
    with pytest.raises(ValueError, match=r"fewer rounds \(3 before, 2 now\)"):
        distill_run(replace(again, rounds=2, eval_every=1))
    assert distill_run(replace(again, eval_every=1, eval_episodes=1, overlap=False)).num_updates == 6


def test_a_finished_run_is_lengthened(tiny: DistillRunConfig, tmp_path: Path) -> None:
    first = distill_run(tiny)
    run = folder(tiny)
    execute("resume", [str(run), "--rounds", "5", "--eval-episodes", "3"])
    result = load_results(run)
    assert result is not None
    assert (first.num_updates, result.num_updates, result.num_states_labelled) == (6, 10, 160)
    assert result.student.protocols["noop_sampled"].num_episodes == 3
    assert "lengthened from 3 to 5 rounds" in (run / NOTES).read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["num_states"] for row in rows] == [32, 64, 96, 128, 160]
    assert all(row["new_kl"] > 0 for row in rows)
    # A longer final evaluation alone changes nothing that was learned.
    before = learned(run)
    execute("resume", [str(run), "--eval-episodes", "4"])
    assert learned(run) == before
    assert load_run_config(run).settings["eval_episodes"] == 4  # what an interrupted resume would continue with


def test_a_config_repeats_a_run(tiny: DistillRunConfig, tmp_path: Path) -> None:
    distill_run(tiny)
    config = ["--config", str(folder(tiny) / "config.json"), "--folder", str(tmp_path / "again"), "--name", "r"]
    execute("distill", config)
    assert learned(tmp_path / "again/Pong/r") == learned(folder(tiny))
    execute("distill", [*config, "--name", "s", "--seed", "1", "--loss", "reverse-kl", "--loss.temperature", "2"])
    settings = load_run_config(tmp_path / "again/Pong/s").settings
    assert (settings["seed"], settings["rounds"]) == (1, 3)
    assert settings["loss"] == {"kind": "ReverseKL", "temperature": 2.0}


def test_resume_refuses_what_is_not_a_run(tiny: DistillRunConfig, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"config\.json: No such file"):
        execute("resume", [str(tmp_path)])
    distill_run(replace(tiny, rounds=1))
    moved = folder(tiny).rename(tmp_path / "r")
    with pytest.raises(ValueError, match="move the folder of a run to FOLDER/Pong/NAME"):
        execute("resume", [str(moved)])
    back = moved.rename(folder(tiny))
    with pytest.raises(ValueError, match="--steps: not a flag of policykd distill"):
        execute("resume", [str(back), "--steps", "9"])
