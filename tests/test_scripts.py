"""The real commands on the real teacher, as a user types them."""

import gzip
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from policykd.agents.student import load_student, make_student, save_student
from policykd.agents.teacher import load_teacher
from policykd.envs.atari import make_atari
from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.evaluation.statistics import summarise

ROOT = Path(__file__).parents[1]
SMALL = ["--threads", "1", "--rounds", "3", "--states-per-round", "320", "--updates-per-round", "20"]
SMALL += ["--batch-size", "64", "--num-envs", "8"]


def run(script: str, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=400)


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command in this process, where torch is imported already: its exit code and standard error."""

    def run_here(script: str, *args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [script, *args])
        monkeypatch.setattr(threading, "excepthook", threading.excepthook)
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        assert isinstance(ended.value.code, int)
        return ended.value.code, capfd.readouterr().err

    return run_here


def start(script: str, *args: str) -> subprocess.Popen[str]:
    """Starts a command and returns it once it notes signals."""
    command = [sys.executable, str(ROOT / "scripts" / script), *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status, noted = Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGTERM - 1)
    while process.poll() is None and not int(status.read_text().split("SigCgt:")[1].split()[0], 16) & noted:
        time.sleep(0.01)
    return process


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def num_saved(run: Path) -> int:
    """Returns the number of the newest checkpoint, 0 if there is none."""
    return max((int(path.stem.split("-")[1]) for path in run.glob("checkpoints/manifest-*.json")), default=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small but whole run: 4,608 states of Pong, a 7 % student, three games under each protocol."""
    folder = tmp_path_factory.mktemp("runs")
    rounds = ["--rounds", "4", "--states-per-round", "1152", "--updates-per-round", "105", "--learning-rate", "5e-3"]
    done = run(
        "distill_atari.py", "--game", "Pong", "--threads", "1", *rounds, "--batch-size", "128", "--eval-episodes", "3",
        "--eval-every", "3", "--num-envs", "2", "--folder", str(folder), "--name", "small",
        "--states", "mixed", "--states.student", "linear:0:1:0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "student minus teacher" in done.stdout
    return folder / "Pong" / "small"


def test_the_kl_falls_and_the_return_rises_above_random(finished: Path) -> None:
    rounds = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["num_states"] for r in rounds] == [1152 * k for k in range(1, 5)]
    assert rounds[-1]["kl"] < 0.25 * rounds[0]["kl"]
    assert rounds[-1]["new_kl"] < 0.5 * rounds[0]["new_kl"]
    results = json.loads((finished / "results.json").read_text())
    student, random = (results[who]["protocols"]["noop_sampled"] for who in ("student", "random"))
    assert student["interval"][0] > random["interval"][1]


def test_results_hold_what_was_lost_and_gained(finished: Path) -> None:
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
    assert all(results["wall_seconds"][phase] > 0 for phase in ("collect", "label", "fit", "evaluate"))
    assert "--game Pong" in results["command"]
    assert results["versions"]["torch"]


def test_tensorboard_has_sb3s_tags(finished: Path) -> None:
    events = EventAccumulator(str(finished))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/kl", "train/action_agreement", "train/temperature", "train/learning_rate"} <= tags
    assert {"data/student_fraction", "rollout/ep_rew_mean", "time/total_timesteps", "eval/mean_reward"} <= tags
    assert {"eval/teacher_mean_reward", "eval/score_vs_teacher", "eval/mean_ep_length"} <= tags
    assert len(events.Scalars("train/kl")) == 4


def test_evaluations_are_in_sb3s_format(finished: Path) -> None:
    with np.load(finished / "evaluations.npz", allow_pickle=False) as arrays:
        assert arrays["timesteps"].tolist() == [3456]
        assert arrays["results"].shape == arrays["ep_lengths"].shape == (1, 16)


def test_the_animation_moves(finished: Path) -> None:
    with Image.open(finished / "student.gif") as film:
        assert film.size == (160, 210)
        assert film.n_frames > 100  # type: ignore[attr-defined]


def test_the_student_loads_in_one_line_and_plays(finished: Path) -> None:
    student = load_student(finished)
    action, _ = student.predict(np.zeros((4, 84, 84), np.uint8), deterministic=True)
    assert action in range(6)


def test_evaluate_prints_the_same_statistics(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    protocol = ["--protocol", "sticky_greedy", "--episodes", "3", "--threads", "1", "--json", str(out)]
    done = run("evaluate.py", str(finished), "--game", "Pong", *protocol)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["protocols"]["sticky_greedy"]
    expected = json.loads((finished / "results.json").read_text())["student"]["protocols"]["sticky_greedy"]
    assert found["returns"] == expected["returns"]
    assert f"mean {expected['mean']:.2f}" in done.stdout
    assert "different returns in 3 games" in done.stdout


def test_a_finished_run_is_shown_and_not_repeated(finished: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in finished.iterdir()}
    command = json.loads((finished / "config.json").read_text())["command"].split()[1:]
    done = run("distill_atari.py", *command, "--help")
    assert done.returncode == 0
    again = run("distill_atari.py", *command)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr
    position = command.index("--states")
    shown = run("distill_atari.py", *command[:position], "--resume", *command[position:])
    assert shown.returncode == 0
    assert "student minus teacher" in shown.stdout
    assert {p.name: p.stat().st_mtime_ns for p in finished.iterdir()} == before


@pytest.mark.parametrize("is_cut", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_states_of_a_run_serve_another_without_playing(is_cut: bool, finished: Path, tmp_path: Path) -> None:
    """A second student learns from the first one's states; cut after a round and resumed, bit for bit the same."""
    args = [
        "--game",
        "Pong",
        "--threads",
        "1",
        "--rounds",
        "3",
        "--updates-per-round",
        "30",
        "--student",
        "1%",
        "--loss",
        "forward-kl",
    ]
    args += [
        "--batch-size",
        "128",
        "--eval-episodes",
        "1",
        "--eval-every",
        "0",
        "--states.held-out",
        "0.1",
        "--states",
        f"dataset:{finished}",
    ]
    whole = run("distill_atari.py", *args, "--folder", str(tmp_path / "whole"), "--name", "r")
    assert whole.returncode == 0, whole.stderr
    assert "4,608 states, 0 labelled" in whole.stdout  # the same teacher's scores are stored with them
    rounds = [json.loads(line) for line in (tmp_path / "whole/Pong/r/metrics.jsonl").read_text().splitlines()]
    assert [r["num_states"] for r in rounds] == [4608] * 3
    assert rounds[-1]["new_kl"] < 0.95 * rounds[0]["new_kl"]
    assert not list((tmp_path / "whole/Pong/r/checkpoints").glob("states-*"))  # the dataset has them
    if not is_cut:
        return
    cut = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "distill_atari.py"), *args, "--folder", str(tmp_path), "--name", "r"],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: num_saved(tmp_path / "Pong/r"), cut)
    cut.kill()
    cut.communicate(timeout=60)
    resumed = run("distill_atari.py", *args, "--folder", str(tmp_path), "--name", "r", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (load_student(folder / "Pong" / "r").state_dict() for folder in (tmp_path / "whole", tmp_path))
    assert all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize("teacher", ["bundled:ppo", pytest.param("bundled:ppo+bundled:dqn", marks=pytest.mark.slow)])
def test_the_flags_work_together(teacher: str, finished: Path, tmp_path: Path) -> None:
    """Schedules, weighed states, stored beside live ones, a window, more than scores; two teachers, who must play."""
    args = ["--game", "Pong", "--threads", "1", "--rounds", "3", "--states-per-round", "32", "--updates-per-round", "2"]
    args += ["--num-envs", "2", "--batch-size", "16", "--student", "half", "--eval-every", "2", "--eval-episodes", "1"]
    two = "+" in teacher
    args += ["--teacher", teacher, "--teacher-weights", "return" if two else "equal", "--rounds-kept", "2"]
    args += ["--loss", "two-sided-kl", "--loss.temperature", "exponential:4:1", "--count-states-by", "gap"]
    args += ["--least-count", "gap:0.5", "--beyond.shift", "0.5", "--states", f"blended:{finished}"]
    args += ["--states.student", "reached:0.5:1", "--folder", str(tmp_path), "--name", "r"]
    done = run("distill_atari.py", *args)
    assert done.returncode == 0, done.stderr
    num_labelled = "4,608" if two else "0"  # by other teachers than that of its run
    assert f"a dataset of 4,608 states, {num_labelled} labelled" in done.stdout
    rounds = [json.loads(line) for line in (tmp_path / "Pong/r/metrics.jsonl").read_text().splitlines()]
    assert [r["num_states"] for r in rounds] == [4608 + 32 * k for k in (1, 2, 3)]
    assert [r["scheduled"]["loss.loss.temperature"] for r in rounds] == pytest.approx([4.0, 2.0, 1.0])
    assert [r["student_return"] is None for r in rounds] == [True, True, False]  # an evaluation came between
    assert all(len(r["teacher_weights"]) == (2 if two else 0) for r in rounds)
    assert all((r["teacher_disagreement"] or 0.0) > 0.0 for r in rounds) == two
    assert all(r["terms"]["shift"] > 0 and 0 < r["state_weight"] <= 1 for r in rounds)
    about = json.loads((tmp_path / "Pong/r/config.json").read_text())["settings"]["teacher"]
    assert (about["algorithm"], about["ref"]) == ("ENSEMBLE" if two else "PPO", teacher)
    shown = run("distill_atari.py", *args, "--resume")
    assert shown.returncode == 0, shown.stderr


@pytest.mark.slow  # tests/policykd/test_teacher_check.py refuses one in this process
def test_a_teacher_that_plays_at_random_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"n_steps": 8, "batch_size": 8}
    PPO("CnnPolicy", SB3VecEnv(make_atari("Pong", 1, 0), clip_rewards=True), device="cpu", **settings).save(
        tmp_path / "new.zip"
    )
    args = ["--game", "Pong", *SMALL, "--teacher", str(tmp_path / "new.zip"), "--folder", str(tmp_path / "runs")]
    done = run("distill_atari.py", *args)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (3, 1)
    assert "no better than chance" in done.stderr
    assert "--allow-weak-teacher" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow  # tests/faults interrupts the same command in every phase, on games that cost nothing
def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    """SIGTERM after the first checkpoint: exit 75, the next step is named.

    --resume ends as the uninterrupted run.
    """
    args = ["--game", "Pong", *SMALL, "--eval-episodes", "1", "--eval-every", "0", "--student", "1%"]
    script = str(ROOT / "scripts" / "distill_atari.py")
    uninterrupted = run("distill_atari.py", *args, "--folder", str(tmp_path / "whole"), "--name", "r")
    assert uninterrupted.returncode == 0, uninterrupted.stderr

    cut = subprocess.Popen(
        [sys.executable, script, *args, "--folder", str(tmp_path / "cut"), "--name", "r"],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: num_saved(tmp_path / "cut" / "Pong" / "r"), cut)
    cut.send_signal(signal.SIGTERM)
    _, stderr = cut.communicate(timeout=60)
    assert cut.returncode == 75, stderr
    assert "--resume" in stderr.splitlines()[-1]
    assert not (tmp_path / "cut" / "Pong" / "r" / "results.json").exists()

    refused = run(
        "distill_atari.py",
        *args,
        "--learning-rate",
        "0.1",
        "--folder",
        str(tmp_path / "cut"),
        "--name",
        "r",
        "--resume",
    )
    assert refused.returncode == 2
    assert "learning_rate was 0.002, is 0.1" in refused.stderr
    resumed = run("distill_atari.py", *args, "--folder", str(tmp_path / "cut"), "--name", "r", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    whole, cut_run = (load_student(tmp_path / which / "Pong" / "r").state_dict() for which in ("whole", "cut"))
    assert all((whole[name] == cut_run[name]).all() for name in whole)
    results = [json.loads((tmp_path / which / "Pong" / "r" / "results.json").read_text()) for which in ("whole", "cut")]
    games = [[r["student"]["protocols"][p]["returns"] for p in ("noop_sampled", "sticky_greedy")] for r in results]
    assert games[0] == games[1]


ERRORS = {
    "unknown game": (["--game", "Pomg"], "did you mean Pong"),
    "no teacher": (["--game", "Breakout", "--teacher", "bundled"], "no teacher is bundled for Breakout"),
    "missing archive": (["--game", "Pong", "--teacher", "nowhere.zip"], "nowhere.zip: no such file"),
    "an unknown algorithm": (["--game", "Pong", "--teacher", "hub:dqm"], "the algorithms are ppo, a2c, dqn, qrdqn"),
    "states from nowhere": (["--game", "Pong", "--states", "dataset:nowhere"], "nowhere: no such folder"),
    "unknown states": (["--game", "Pong", "--states", "replay"], "give mixed, student, teacher, dataset:PATH"),
    "visits of stored states": (["--game", "Pong", "--states", "dataset:x", "--num-envs", "8"], "visits no states"),
    "truncated archive": (["--game", "Pong", "--teacher", "{cut}"], "truncated"),
    "foreign archive": (["--game", "Pong", "--teacher", "{foreign}"], "holds no 'data'"),
    "another game": (["--game", "Breakout", "--teacher", "{plain}"], "it was made for another game"),
    "negative temperature": (
        ["--game", "Pong", "loss:forward-kl", "--loss.temperature", "-1"],
        "temperature must be positive",
    ),
    "a loss that is none": (["--game", "Pong", "--loss", "huber"], "--loss huber: give one of forward-kl"),
    "a schedule that ends at nothing": (
        ["--game", "Pong", "--loss", "forward-kl", "--loss.temperature", "linear:1:0"],
        "temperature must be positive, not 0.0",
    ),
    "feedback from nobody": (
        ["--game", "Pong", "--eval-every", "0", "--states", "teacher", "--beyond.value", "gap:1"],
        "--eval-every: a schedule that follows the return needs games",
    ),
    "noise beyond one": (["--game", "Pong", "--states", "student", "--states.epsilon", "7"], "must lie in [0, 1]"),
    "a window offline": (["--game", "Pong", "--states", "dataset:x", "--rounds-kept", "1"], "x: no such folder"),
    "features of an ensemble": (
        ["--game", "Pong", "--teacher", "bundled:ppo+bundled:dqn", "--beyond.hint", "1"],
        "needs the teacher's features",
    ),
    "weights for too many": (
        ["--game", "Pong", "--teacher", "bundled:ppo+bundled:dqn", "--teacher-weights", "1,2,3"],
        "3 teacher weights for 2 teachers",
    ),
    "a number of weights that counts nothing": (["--game", "Pong", "--least-count", "0.5"], "needs --count-states-by"),
    "no rounds": (["--game", "Pong", "--rounds", "0"], "--rounds must be at least 1"),
    "bad learning rate": (["--game", "Pong", "--learning-rate", "nan"], "--learning-rate must be"),
    "a negative seed": (["--game", "Pong", "--seed", "-1"], "--seed must be at least 0"),
    "a name that is a path": (["--game", "Pong", "--name", "../x"], "--name must be the name of a folder"),
    "more than any memory": (["--game", "Pong", "--rounds", "1000000000"], "GB of memory"),
    "states do not divide": (["--game", "Pong", "--states-per-round", "100"], "multiple of"),
    "a device that is not there": (["--game", "Pong", "--device", "cuda"], "use --device cpu"),
}


BAD_FILES = {"truncated archive", "foreign archive", "another game"}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_and_leaves_nothing(
    case: str, tmp_path: Path, run_here: Callable[..., tuple[int, str]]
) -> None:
    if case == "a device that is not there" and torch.cuda.is_available():
        pytest.skip("it is there")
    bundled = load_teacher(game="Pong").path
    files = {name: tmp_path / f"{name}.zip" for name in ("cut", "foreign", "plain")}
    files["cut"].write_bytes(bundled.read_bytes()[:1_000_000])
    shutil.make_archive(str(tmp_path / "foreign"), "zip", ROOT / "docs")
    shutil.copy(bundled, files["plain"])
    args, reason = ERRORS[case]
    runs = tmp_path / "runs"
    code, stderr = run_here("distill_atari.py", "--folder", str(runs), *[a.format(**files) for a in args])
    assert code == (3 if case in BAD_FILES else 2), stderr
    assert len(stderr.strip().splitlines()) == 1
    assert reason in stderr
    assert not runs.exists()


def test_evaluate_says_in_one_line_what_is_no_flag(run_here: Callable[..., tuple[int, str]]) -> None:
    for wrong, why in (
        (["--episods", "9"], "--episods"),
        (["--episodes", "0"], "--episodes must be at least 1, not 0"),
        (["--seed", "99999999999999999999999"], "--seed must be at least 0 and at most 4294967295"),
    ):
        code, stderr = run_here("evaluate.py", "random", "--game", "Pong", *wrong)
        assert (code, len(stderr.strip().splitlines()), why in stderr) == (2, 1, True), stderr


def test_evaluate_refuses_what_is_not_a_policy(tmp_path: Path) -> None:
    done = run("evaluate.py", str(tmp_path), "--game", "Pong")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (3, 1)
    save_student(make_student("1%", 4), tmp_path)
    done = run("evaluate.py", str(tmp_path), "--game", "Pong")
    assert done.returncode == 3
    assert "scores 4 actions on (4, 84, 84), Pong has 6" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = run("distill_atari.py", "--game", "Pong", *SMALL, "--folder", str(blocked))
    assert done.returncode == 4, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(blocked) in done.stderr


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounts a small disk of its own")
def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path: Path) -> None:
    """On a disk of 1 MB the run stops at its first checkpoint: no file stands half-written under its final name."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inner = [
        sys.executable,
        str(ROOT / "scripts" / "distill_atari.py"),
        "--game",
        "Pong",
        *SMALL,
        "--folder",
        str(disk),
    ]
    keep = tmp_path / "kept"
    mount = (
        f"mount -t tmpfs -o size=1m none {disk} && {' '.join(inner)} --name r; code=$?; cp -r {disk} {keep}; exit $code"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True, check=False, timeout=300
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("this machine does not let a test mount")
    assert done.returncode == 4, done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    names = {p.name for p in (keep / "Pong" / "r" / "checkpoints").iterdir()}
    assert not any(name.startswith("manifest-") for name in names)
    assert not any(name.endswith(".tmp") for name in names)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells when a command notes signals")
def test_a_signal_is_an_exit_code_in_every_command(tmp_path: Path) -> None:
    """C04: one signal ends each within 10 s, with nothing half-written; a second one at once, with a whole store."""
    logs = tmp_path / "replay_logs"
    logs.mkdir()
    zeros: dict[str, np.ndarray] = {"observation": np.zeros((3000, 84, 84), np.uint8)}
    zeros["action"] = np.zeros(3000, np.int32)
    zeros |= {"reward": np.zeros(3000, np.float32), "terminal": np.zeros(3000, np.uint8)}
    for name, values in zeros.items():
        with gzip.open(logs / f"$store$_{name}_ckpt.0.gz", "wb", compresslevel=1) as file:
            np.save(file, values)
    long = ["--checkpoint-every", "1", "--eval-every", "0", "--hyperparams", "n_steps:3008", "--folder", str(tmp_path)]
    commands = {
        signal.SIGTERM: ("evaluate.py", "random", "--game=Pong", "--num-envs=2", f"--json={tmp_path}/games.json"),
        signal.SIGINT: ("states.py", "import", str(logs), str(tmp_path / "states"), "--game", "Pong"),
    }
    for number, command in commands.items():
        process = start(*command)
        process.send_signal(number)
        began = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        assert (process.returncode, time.monotonic() - began < 10) == (75, True), stderr
        assert [line for line in stderr.splitlines() if line][1:] == [
            "error: interrupted: nothing is left half-written; run the same again"
        ]
    assert {path.name for path in tmp_path.iterdir()} == {"replay_logs"}

    training = start("train_teacher.py", "--game", "Pong", "--threads", "1", *long, "--name", "r")
    wait_for((tmp_path / "Pong" / "r" / "config.json").is_file, training)
    training.send_signal(signal.SIGTERM)
    assert training.stderr is not None
    assert "stopping at the next safe point" in training.stderr.readline() + training.stderr.readline()
    training.send_signal(signal.SIGTERM)
    training.communicate(timeout=5)
    assert training.returncode == 128 + signal.SIGTERM
    names = {path.name for path in (tmp_path / "Pong" / "r").rglob("*")}
    assert not any(name.endswith(".tmp") for name in names)


def test_help_is_quick_documentation() -> None:
    began = time.perf_counter()
    done = run("distill_atari.py", "--help")
    assert time.perf_counter() - began < 10  # 3 s on an idle machine: benchmarks/stages.py measures it
    for word in ("--game", "--student", "DAgger", "KL(teacher", "{auto,cuda,mps,cpu}"):
        assert word in done.stdout


def test_nothing_a_run_writes_is_a_pickle(finished: Path) -> None:
    for path in finished.rglob("*"):
        if path.suffix == ".npz":
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                assert all(arrays[key].dtype != object for key in arrays.files)
    kinds = {p.suffix if "tfevents" not in p.name else ".tfevents" for p in finished.rglob("*") if p.is_file()}
    assert kinds <= {".json", ".jsonl", ".npz", ".safetensors", ".gif", ".html", ".md", ".tfevents"}
