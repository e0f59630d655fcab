"""The main command on the real teacher and real Pong: it learns, and what it writes is what the docs promise."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from policykd.agents.student import load_student
from policykd.cli.errors import ENVIRONMENT, INTERRUPTED
from policykd.cli.main import execute
from policykd.envs.atari import make_atari
from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.evaluation.statistics import summarise
from policykd.io.files import BadFile

ROOT = Path(__file__).parents[1]
SMALL = "--game Pong --device cpu --threads 1 --num-envs 8 --rounds 3 --states-per-round 320 --updates-per-round 20"


def distill(words: str, folder: Path) -> Path:
    """Runs `policykd distill` in this process and returns the run's folder."""
    execute("distill", [*words.split(), "--folder", str(folder), "--name", "r"])
    return folder / "Pong" / "r"


def rounds_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small but whole run: 4,608 states of Pong, a 7 % student, two games per protocol."""
    return distill(
        "--game Pong --threads 1 --rounds 4 --states-per-round 1152 --updates-per-round 105 --learning-rate 5e-3"
        " --batch-size 128 --eval-episodes 2 --eval-every 0 --num-envs 2 --states.student linear:0:1:0.5",
        tmp_path_factory.mktemp("runs"),
    )


def test_the_kl_falls_and_the_return_rises_above_random(finished: Path) -> None:
    rounds = rounds_of(finished)
    assert [r["num_states"] for r in rounds] == [1152 * k for k in range(1, 5)]
    assert rounds[-1]["kl"] < 0.25 * rounds[0]["kl"]
    assert rounds[-1]["new_kl"] < 0.5 * rounds[0]["new_kl"]
    results = json.loads((finished / "results.json").read_text())
    student, random = (results[who]["protocols"]["noop_sampled"] for who in ("student", "random"))
    assert student["interval"][0] > random["interval"][1]


def test_results_have_costs_and_returns_of_all_three(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert (results["teacher"]["num_parameters"], results["student"]["num_parameters"]) == (1_687_206, 111_798)
    for who in ("teacher", "student", "random"):
        for protocol in ("noop_sampled", "sticky_greedy"):
            row = results[who]["protocols"][protocol]
            assert row["mean"] == pytest.approx(np.mean(row["returns"]))
            assert row["iqm"] == pytest.approx(summarise(row["returns"]).iqm)
            assert row["interval"][0] <= row["mean"] <= row["interval"][1]
            assert row["num_truncated"] == 0
    assert results["student"]["num_macs"] < results["teacher"]["num_macs"]
    assert (results["num_states_labelled"], results["num_updates"]) == (4608, 420)
    assert all(results["wall_seconds"][phase] > 0 for phase in ("collect", "label", "train", "evaluate"))
    assert results["versions"]["torch"]


def test_curves_and_films_are_in_common_formats(finished: Path) -> None:
    events = EventAccumulator(str(finished))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/kl", "train/action_agreement", "train/temperature", "train/learning_rate"} <= tags
    assert {"data/student_fraction", "rollout/ep_rew_mean", "time/total_timesteps"} <= tags
    assert len(events.Scalars("train/kl")) == 4
    with Image.open(finished / "student.gif") as film:
        assert film.size == (160, 210)
        assert film.n_frames > 100  # type: ignore[attr-defined]


def test_the_student_loads_in_one_line_and_plays(finished: Path) -> None:
    action, _ = load_student(finished).predict(np.zeros((4, 84, 84), np.uint8), deterministic=True)
    assert action in range(6)


def test_no_file_of_a_run_is_a_pickle(finished: Path) -> None:
    for path in finished.rglob("*.npz"):
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            assert all(arrays[key].dtype != object for key in arrays.files)
    kinds = {p.suffix if "tfevents" not in p.name else ".tfevents" for p in finished.rglob("*") if p.is_file()}
    assert kinds <= {".json", ".jsonl", ".npz", ".safetensors", ".gif", ".html", ".md", ".tfevents"}


def test_evaluate_prints_the_same_statistics(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = f"{finished} --game Pong --protocol sticky_greedy --episodes 2 --threads 1 --json {out}"
    execute("evaluate", words.split())
    found = json.loads(out.read_text())["protocols"]["sticky_greedy"]
    expected = json.loads((finished / "results.json").read_text())["student"]["protocols"]["sticky_greedy"]
    assert found["returns"] == expected["returns"]


def test_states_of_a_run_train_another_student_without_collecting(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--game Pong --threads 1 --rounds 3 --updates-per-round 30 --batch-size 128 --student 1% --loss forward-kl"
    more = f"--eval-episodes 1 --eval-every 0 --states.held-out 0.1 --states dataset:{finished}"
    run = distill(f"{words} {more}", tmp_path)
    assert (
        "4,608 stored states, 0 of them labelled now" in capsys.readouterr().out
    )  # the same teacher's outputs are stored with them
    rounds = rounds_of(run)
    assert [r["num_states"] for r in rounds] == [4608] * 3
    assert rounds[-1]["new_kl"] < 0.95 * rounds[0]["new_kl"]
    assert not list((run / "checkpoints").glob("states-*"))  # the dataset has them


@pytest.mark.parametrize("teacher", ["bundled:ppo", pytest.param("bundled:ppo+bundled:dqn", marks=pytest.mark.slow)])
def test_the_flags_work_together(teacher: str, finished: Path, tmp_path: Path) -> None:
    """Schedules, weighted states, stored and live ones, a window, auxiliary losses; an ensemble of two teachers."""
    is_ensemble = "+" in teacher
    run = distill(
        "--game Pong --threads 1 --rounds 3 --states-per-round 32 --updates-per-round 2 --num-envs 2 --batch-size 16"
        f" --student 1% --eval-every 2 --eval-episodes 1 --teacher {teacher} --replay-window-rounds 2"
        f" --teacher-weights {'return' if is_ensemble else 'equal'} --loss two-sided-kl"
        " --loss.temperature exponential:4:1 --state-weighting gap --min-state-weight gap:0.5 --auxiliary.shift 0.5"
        f" --states blended:{finished} --states.student reached:0.5:1",
        tmp_path,
    )
    rounds = rounds_of(run)
    assert [r["num_states"] for r in rounds] == [4608 + 32 * k for k in (1, 2, 3)]
    events = EventAccumulator(str(run))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"eval/mean_reward", "eval/teacher_mean_reward", "eval/score_vs_teacher", "eval/mean_ep_length"} <= tags
    with np.load(run / "evaluations.npz", allow_pickle=False) as arrays:  # in SB3's format
        assert arrays["timesteps"].tolist() == [4672]
        assert arrays["results"].shape == arrays["ep_lengths"].shape == (1, 16)
    temperatures = [r["schedules"]["loss.loss.temperature"] for r in rounds]
    assert temperatures == pytest.approx([4.0, 2.0, 1.0])
    assert [r["student_return"] is None for r in rounds] == [True, True, False]  # an evaluation came between
    assert all(("teacher_disagreement" in r) == is_ensemble for r in rounds)
    assert all(r["shift_loss"] > 0 and 0 < r["state_weight"] <= 1 for r in rounds)
    teacher_record = json.loads((run / "config.json").read_text())["teacher"]
    assert (teacher_record["algorithm"], teacher_record["ref"]) == ("ENSEMBLE" if is_ensemble else "PPO", teacher)


@pytest.mark.slow  # tests/evaluation/test_teacher_check.py refuses one without a run
def test_a_teacher_that_plays_at_random_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"n_steps": 8, "batch_size": 8}
    untrained = PPO("CnnPolicy", SB3VecEnv(make_atari("Pong", 1, 0), clip_rewards=True), device="cpu", **settings)
    untrained.save(tmp_path / "new.zip")
    with pytest.raises(BadFile, match="--allow-weak-teacher"):
        distill(f"{SMALL} --teacher {tmp_path / 'new.zip'}", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def start(words: list[str]) -> "subprocess.Popen[str]":
    """Starts `policykd`, and returns once it handles signals."""
    command = [sys.executable, "-m", "policykd", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    wait_for(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) & 1 << (signal.SIGTERM - 1), process)
    return process


def wait_for(condition: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    while process.poll() is None and not condition():
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc shows when a command handles signals")
def test_a_signal_ends_every_command_with_its_exit_code(tmp_path: Path) -> None:
    """C04: also while its modules are imported; tests/faults interrupts a run in every phase."""
    process = start(["evaluate", "random", "--game=Pong", f"--json={tmp_path}/games.json"])
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == INTERRUPTED, error
    assert error.splitlines()[-1] == "error: interrupted: no file is left incomplete; run the same command again"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounts a small disk of its own")
def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path: Path) -> None:
    """On a disk of 1 MB the run stops at its first checkpoint: no file is incomplete under its final name."""
    disk = tmp_path / "disk"
    disk.mkdir()
    keep = tmp_path / "kept"
    command = f"{sys.executable} {ROOT / 'scripts/distill_atari.py'} {SMALL} --batch-size 64 --folder {disk} --name r"
    mount = f"mount -t tmpfs -o size=1m none {disk} && {command}; code=$?; cp -r {disk} {keep}; exit $code"
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True, check=False)
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("this machine does not let a test mount")
    assert done.returncode == ENVIRONMENT, done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    names = {path.name for path in (keep / "Pong" / "r" / "checkpoints").iterdir()}
    assert not any(name.startswith("manifest-") or name.endswith(".tmp") for name in names)
