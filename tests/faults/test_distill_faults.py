"""A run of `policykd distill` that was killed, stopped or damaged resumes with the same bytes.

The default tier has a short form of every case; `make faults` has the long ones. Most processes are forked from a warm
one (warm.py), so that a trial takes a second.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from policykd.agents.teacher import load_teacher
from policykd.cli.errors import BAD_FILE, ENVIRONMENT, INTERRUPTED, USAGE
from policykd.storage.dataset import load_dataset, open_dataset
from policykd.storage.generations import Generation, has_generations, newest

ROOT = Path(__file__).parents[2]
BEGIN = "--game Pong --threads 1 --student 1% --updates-per-round 2 --batch-size 32 --eval-episodes 2 --name r"
ROUNDS = "--rounds 3 --states-per-round 32 --num-envs 4 --eval-every 2"
LEARNED = ("student.safetensors", "metrics.jsonl", "evaluations.npz", "student.gif")
GRACE_SECONDS = 100.0
"""ten times what an idle machine needs to stop"""


class Warm:
    """Starts the command in a process of its own, with faults: functions of warm.py and their arguments."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output"
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._answer() == "ready"

    def start(self, runs: Path, args: str = ROUNDS, /, **faults: Mapping[str, Any]) -> int:
        """Returns the id of a process that starts the run in `runs`, or resumes it."""
        words = [*BEGIN.split(), *args.split(), "--folder", str(runs), "--resume"]
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"args": words, "output": str(self.output), "faults": faults}) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def finish(self) -> tuple[int, str]:
        """Returns the exit code of the process that was started, and its output."""
        code = int(self._answer())
        return code, self.output.read_text()

    def __call__(self, runs: Path, args: str = ROUNDS, /, **faults: Mapping[str, Any]) -> tuple[int, str]:
        """Does both."""
        self.start(runs, args, **faults)
        return self.finish()

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run."""

    run: Path
    learned: dict[str, Any]
    commits: list[str]
    """calls that change the folder"""
    seconds: float


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    process = Warm(tmp_path_factory.mktemp("warm"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def whole(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    code, said = warm(folder, note_commits={"folder": str(folder), "notes": str(folder / "commits")})
    assert code == 0, said
    seconds = time.monotonic() - began
    return Whole(folder / "Pong/r", learned(folder / "Pong/r"), (folder / "commits").read_text().splitlines(), seconds)


@pytest.fixture(scope="module")
def stopped(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its last round."""
    folder = tmp_path_factory.mktemp("stopped")
    code, said, _ = interrupted(warm, folder, ROUNDS, "policykd.runs.finish:final_evaluation", 1, [signal.SIGTERM])
    assert code == INTERRUPTED, said
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checkpointed(generation: Generation) -> dict[str, str]:
    """Returns the hashes of weights and states; the other file holds durations."""
    names = [name for name in generation.files if not name.startswith("progress")]
    return {name: generation.files[name].sha256 for name in names}


def learned(run: Path) -> dict[str, Any]:
    """Returns what must not depend on what happened to a finished run."""
    generation = newest(run / "checkpoints", "round")
    files = {"checkpoints": checkpointed(generation)}
    games = json.loads((run / "final_eval.json").read_text())
    for row in games.values():
        del row["seconds"]
    for path in (run, run / "checkpoints"):
        assert not [p.name for p in path.iterdir() if p.name.startswith(".")]
    assert json.loads((run / "results.json").read_text())["num_states_labelled"] == open_dataset(run).num_states
    return {name: sha256(run / name) for name in LEARNED} | files | {"games": games}


def num_rounds_kept(run: Path) -> int:
    """Opens everything that stands under its final name, and returns the rounds that need not be done again."""
    for path in run.rglob("*"):
        if path.suffix == ".json" and not path.name.startswith("."):
            json.loads(path.read_text())
        elif path.suffix == ".npz" and not path.name.startswith("."):
            with np.load(path, allow_pickle=False) as arrays:
                assert all(len(arrays[key]) for key in arrays)
        elif path.suffix == ".gif":
            with Image.open(path) as film:
                film.verify()
    assert (run / "student.json").exists() <= (run / "student.safetensors").exists()
    metrics = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    rows = [json.loads(line)["index"] for line in metrics]
    assert rows == list(range(len(rows)))
    kept = newest(run / "checkpoints", "round").manifest.position if has_generations(run / "checkpoints") else 0
    assert kept <= len(rows) <= kept + 1  # at most the round that was being saved is lost
    return kept


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


def interrupted(warm: Warm, runs: Path, args: str, where: str, call: int, numbers: list[int]) -> tuple[int, str, float]:
    """Returns exit code, last words and the seconds that it took from a signal to the end."""
    at = runs / "at"
    code, said = warm(runs, args, signal_in={"where": where, "call": call, "numbers": numbers, "at": str(at)})
    assert at.exists(), f"it never came to {where}: {said}"
    return code, said, time.monotonic() - float(at.read_text())


@pytest.mark.parametrize("num_kills", [4, pytest.param(200, marks=pytest.mark.faults)])
def test_kills_at_random_times_lose_no_more_than_a_round(
    num_kills: int, warm: Warm, whole: Whole, tmp_path: Path
) -> None:
    """C01, C03: a finished run is the same, byte for byte, however often it was killed."""
    chance, kills, runs, kept = random.Random(num_kills), 0, tmp_path / "0", 0
    while kills < num_kills or num_rounds_kept(runs / "Pong/r"):
        pid = warm.start(runs)
        if kills < num_kills:
            time.sleep(chance.uniform(0.0, whole.seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code, said = warm.finish()
        assert code in (0, -signal.SIGKILL), said
        if code:
            kills += 1
            before, kept = kept, num_rounds_kept(runs / "Pong/r")
            assert kept >= before
        else:
            assert learned(runs / "Pong/r") == whole.learned, runs
            check_curves(runs / "Pong/r")
            runs, kept = Path(tempfile.mkdtemp(dir=tmp_path)), 0


def check_curves(run: Path) -> None:
    """Raises where TensorBoard would show a round twice, or not at all."""
    events = EventAccumulator(str(run))
    events.Reload()
    assert [event.step for event in events.Scalars("train/kl")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("eval/mean_reward")] == [4]


def test_a_run_killed_at_one_commit_after_the_other_ends_the_same(warm: Warm, whole: Whole, tmp_path: Path) -> None:
    """C02, the short form: each process goes on where the one before was killed."""
    for number in (9, 14, 18, 30, 34, 27, 44, 23, 13, 38):
        code, said = warm(tmp_path, kill_at_commit={"folder": str(tmp_path), "number": number})
        assert code == -signal.SIGKILL, said
        num_rounds_kept(tmp_path / "Pong/r")
    code, said = warm(tmp_path)
    assert code == 0, said
    assert learned(tmp_path / "Pong/r") == whole.learned


@pytest.mark.faults
def test_a_kill_at_any_commit_loses_nothing(warm: Warm, whole: Whole, tmp_path: Path) -> None:
    """C02: before every call that changes the folder, and so after every one."""
    failures = []
    for number, commit in enumerate(whole.commits, start=1):
        runs = tmp_path / str(number)
        code, said = warm(runs, kill_at_commit={"folder": str(runs), "number": number})
        assert code == -signal.SIGKILL, said
        if reason := _differs_after(warm, whole, runs):
            failures.append(f"{number} {commit}: {reason}")
        shutil.rmtree(runs, ignore_errors=True)
    assert not failures


def _differs_after(warm: Warm, whole: Whole, runs: Path) -> str:
    """Returns why a run does not end as the uninterrupted one, or nothing."""
    try:
        num_rounds_kept(runs / "Pong/r")
        code, said = warm(runs)
        if code or learned(runs / "Pong/r") != whole.learned:
            return f"exit {code}, {said[-300:]}"
    except (ValueError, AssertionError, OSError) as error:
        return repr(error)
    return ""


def test_failing_calls_end_in_one_line_and_the_run_goes_on(warm: Warm, whole: Whole, tmp_path: Path) -> None:
    """C02 and D01, the short form."""
    for number, code in ((9, errno.ENOSPC), (16, errno.EIO), (28, errno.ENOSPC), (41, errno.ENOSPC), (20, errno.EIO)):
        assert fails(warm, tmp_path, number, code) == ""
    exit_code, said = warm(tmp_path)
    assert exit_code == 0, said
    assert learned(tmp_path / "Pong/r") == whole.learned


def fails(warm: Warm, runs: Path, number: int, code: int) -> str:
    """Returns what is wrong with how the command takes a failing call, or nothing."""
    exit_code, said = warm(runs, fail_at_commit={"folder": str(runs), "number": number, "code": code})
    last = said.strip().splitlines()[-1] if said.strip() else ""
    if exit_code not in (0, ENVIRONMENT):  # 0 where it is only about tidying up
        return f"exit {exit_code}: {last}"
    if exit_code and not (last.startswith("error: ") and os.strerror(code) in last and "Traceback" not in said):
        return f"said: {said}"
    with contextlib.suppress(FileNotFoundError):
        num_rounds_kept(runs / "Pong/r")
    left = [path.name for path in runs.rglob(".*") if path.suffix == ".tmp"]
    return f"left {left}" if left and code != errno.EIO else ""


@pytest.mark.faults
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_failure_of_any_commit_loses_nothing(code: int, warm: Warm, whole: Whole, tmp_path: Path) -> None:
    """C02, D01: exit 4 with one line, what was there is whole, and after making room the same bytes."""
    failures = []
    for number, commit in enumerate(whole.commits, start=1):
        runs = tmp_path / str(number)
        if reason := fails(warm, runs, number, code) or _differs_after(warm, whole, runs):
            failures.append(f"{number} {commit}: {reason}")
        shutil.rmtree(runs, ignore_errors=True)
    assert not failures


PHASES = {
    "load": ("policykd.runs.distill_run:load_run_teacher", 1),
    "begin": ("policykd.runs.distill_run:write_run_config", 1),
    "collect": ("policykd.collector:Collector._collect", 2),
    "measure": ("policykd.trainer:Trainer.measure", 2),
    "save": ("policykd.runs.distill_run:save_checkpoint", 2),
    "evaluate": ("policykd.runs.distill_run:periodic_evaluation", 1),
    "student": ("policykd.runs.finish:save_student", 1),
    "final evaluation": ("policykd.evaluation.results:evaluate_on_atari", 2),
    "film": ("policykd.viewer.animation:greedy", 3),
}
SHORT = ("collect", "save")


@pytest.mark.parametrize("phase", [p if p in SHORT else pytest.param(p, marks=pytest.mark.faults) for p in PHASES])
def test_a_signal_in_any_phase_saves_and_names_the_command_that_resumes(
    phase: str, warm: Warm, whole: Whole, tmp_path: Path
) -> None:
    """C04: then a second signal, which ends the process at once, and then it is resumed."""
    code, said, seconds = interrupted(warm, tmp_path, ROUNDS, *PHASES[phase], [signal.SIGTERM])
    assert code == INTERRUPTED, said
    assert seconds < GRACE_SECONDS
    last = said.strip().splitlines()[-1]
    assert re.search(r"interrupted: .*resume with: policykd (resume .*/Pong/r|distill .* --resume)$", last), said
    assert "Traceback" not in said
    if (tmp_path / "Pong/r").exists():
        num_rounds_kept(tmp_path / "Pong/r")
    step = "restore_checkpoint" if phase in ("save", "evaluate") else "_run_in_folder"
    again = (f"policykd.runs.distill_run:{step}", 1)
    code, said, seconds = interrupted(warm, tmp_path, ROUNDS, *again, [signal.SIGTERM, signal.SIGINT])
    assert code in (128 + signal.SIGINT, 128 + signal.SIGTERM), said
    assert seconds < GRACE_SECONDS
    code, said = warm(tmp_path)
    assert code == 0, said
    assert learned(tmp_path / "Pong/r") == whole.learned


@pytest.mark.faults
def test_a_signal_while_a_dataset_is_labelled(warm: Warm, whole: Whole, tmp_path: Path) -> None:
    """C04, offline: another teacher labels the states of a run."""
    args = f"--rounds 2 --eval-every 1 --teacher bundled:dqn --states dataset:{whole.run}"
    code, said = warm(tmp_path / "whole", args)
    assert code == 0, said
    code, said, seconds = interrupted(warm, tmp_path, args, "policykd.storage.dataset:label", 1, [signal.SIGINT])
    assert (code, seconds < GRACE_SECONDS) == (INTERRUPTED, True), said
    assert "policykd resume" in said.strip().splitlines()[-1]
    code, said = warm(tmp_path, args)
    assert code == 0, said
    assert learned(tmp_path / "Pong/r") == learned(tmp_path / "whole/Pong/r")


@pytest.mark.faults
def test_signals_at_random_times(warm: Warm, whole: Whole, tmp_path: Path) -> None:
    """C04: 100 of them, one more at once for every third."""
    chance, signals = random.Random(0), 0
    while signals < 100:
        runs = tmp_path / str(signals)
        code = INTERRUPTED
        while code:
            pid, numbers = warm.start(runs), [signal.SIGTERM, *[signal.SIGINT] * (chance.random() < 0.33)]
            time.sleep(chance.uniform(0.1, whole.seconds))
            began = time.monotonic()
            for number in numbers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            code, said = warm.finish()
            assert time.monotonic() - began < GRACE_SECONDS
            assert code in (0, INTERRUPTED, 130, 143, -signal.SIGTERM, -signal.SIGINT), said
            signals += bool(code)
        assert learned(runs / "Pong/r") == whole.learned
        shutil.rmtree(runs)


def real(runs: Path, args: str, *, stderr: int = subprocess.PIPE) -> "subprocess.Popen[str]":
    """Starts the command as a user does, with games of Pong."""
    command = [sys.executable, str(ROOT / "scripts/distill_atari.py"), *BEGIN.split(), *args.split()]
    return subprocess.Popen(
        [*command, "--folder", str(runs), "--resume"], stdout=subprocess.DEVNULL, stderr=stderr, text=True
    )


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 3000
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_real_command_is_stopped_once_and_twice(tmp_path: Path) -> None:
    """C04 during training; C08 meanwhile."""
    args, run = "--rounds 500 --states-per-round 64 --num-envs 2 --eval-every 0", tmp_path / "Pong/r"
    first = real(tmp_path, args)
    wait_for(run / "checkpoints/manifest-000002.json", first)
    first.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, said = first.communicate(timeout=600)
    assert (first.returncode, time.monotonic() - began < GRACE_SECONDS) == (INTERRUPTED, True), said
    assert "resume with: policykd resume " in said.splitlines()[-1]
    kept = num_rounds_kept(run)
    assert kept >= 2

    second = real(tmp_path, args)
    wait_for(run / f"checkpoints/manifest-{kept + 1:06d}.json", second)
    second.send_signal(signal.SIGTERM)
    second.send_signal(signal.SIGINT)
    _, said = second.communicate(timeout=600)
    assert second.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM), said
    assert num_rounds_kept(run) > kept


@pytest.mark.faults
def test_the_real_command_is_killed_ten_times(tmp_path: Path) -> None:
    """C01, C03 with emulators: the last round's checkpoint and curves are those of the uninterrupted run."""
    args, chance = "--rounds 12 --states-per-round 64 --num-envs 4 --eval-every 0", random.Random(1)
    for runs, num_kills in ((tmp_path / "whole", 0), (tmp_path / "killed", 10)):
        run = runs / "Pong/r"
        for _ in range(num_kills):
            process = real(runs, args, stderr=subprocess.DEVNULL)
            before = num_rounds_kept(run) if run.exists() else 0
            if before < 11:
                wait_for(run / f"checkpoints/manifest-{before + 1:06d}.json", process)
            time.sleep(chance.uniform(0.0, 1.0))
            process.kill()
            process.wait()
            assert num_rounds_kept(run) >= before
        process = real(runs, args, stderr=subprocess.DEVNULL)
        wait_for(run / "student.json", process)
        process.kill()
        process.wait()
    a, b = (tmp_path / name / "Pong/r" for name in ("whole", "killed"))
    for name in ("metrics.jsonl", "student.safetensors"):
        assert sha256(a / name) == sha256(b / name)
    one, other = (newest(run / "checkpoints", "round") for run in (a, b))
    assert checkpointed(one) == checkpointed(other)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "truncated weights": ("model-000003.safetensors", truncated),
    "flipped weights": ("model-000003.safetensors", flipped),
    "flipped manifest": ("manifest-000003.json", flipped),
    "missing manifest": ("manifest-000003.json", Path.unlink),
}
SHORT_DAMAGES = ("flipped weights", "missing manifest")


@pytest.mark.parametrize(
    "damage", [d if d in SHORT_DAMAGES else pytest.param(d, marks=pytest.mark.faults) for d in DAMAGES]
)
def test_a_damaged_checkpoint_costs_one_round(
    damage: str, warm: Warm, whole: Whole, stopped: Path, tmp_path: Path
) -> None:
    """C05: a warning, and the same bytes in the end."""
    runs = shutil.copytree(stopped, tmp_path / "runs")
    name, harm = DAMAGES[damage]
    harm(runs / "Pong/r/checkpoints" / name)
    code, said = warm(runs)
    assert code == 0, said
    assert re.search(r"warning: .*-000003\.\w+: .*; continuing from round 2, the previous one", said), said
    assert learned(runs / "Pong/r") == whole.learned


def test_without_an_intact_checkpoint_nothing_is_started_again(warm: Warm, stopped: Path, tmp_path: Path) -> None:
    """C05: exit 3, nothing overwritten; C06: other settings are all named, exit 2."""
    runs = shutil.copytree(stopped, tmp_path / "runs")
    before = tree(runs)
    other = ROUNDS.replace("--states-per-round 32", "--states-per-round 64") + " --learning-rate 0.1"
    code, said = warm(runs, other)
    assert code == USAGE, said
    assert "states_per_round was 32, is 64; learning_rate was 0.004, is 0.1" in said.splitlines()[-1]
    assert tree(runs) == before
    for path in (runs / "Pong/r/checkpoints").glob("model-*"):
        flipped(path)
    before = tree(runs)
    code, said = warm(runs)
    assert (code, said.count("\n")) == (BAD_FILE, 1), said
    assert "no intact generation" in said
    assert tree(runs) == before


def test_another_number_of_threads_is_a_warning_and_a_note(warm: Warm, stopped: Path, tmp_path: Path) -> None:
    """C07."""
    runs = shutil.copytree(stopped, tmp_path / "runs")
    code, said = warm(runs, f"{ROUNDS} --threads 2")
    assert code == 0, said
    assert "warning" in said
    assert "(threads was 1, is 2)" in (runs / "Pong/r/notes.log").read_text()


def test_one_process_per_folder_and_it_may_die_there(warm: Warm, whole: Whole, tmp_path: Path) -> None:
    """C08: the second names the first; the lock of a killed process is void."""
    pid = warm.start(tmp_path)
    while not (tmp_path / "Pong/r/.lock").exists():
        time.sleep(0.005)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.1)
    second = real(tmp_path, ROUNDS)
    _, said = second.communicate(timeout=2000)
    assert (second.returncode, said.count("\n")) == (ENVIRONMENT, 1), said
    assert f"locked by process {pid} on {socket.gethostname()}" in said
    os.kill(pid, signal.SIGKILL)
    assert warm.finish()[0] == -signal.SIGKILL
    assert (tmp_path / "Pong/r/.lock").exists()
    code, said = warm(tmp_path)
    assert code == 0, said
    assert learned(tmp_path / "Pong/r") == whole.learned


def test_the_clock_and_the_place_do_not_matter(warm: Warm, whole: Whole, stopped: Path, tmp_path: Path) -> None:
    """C09: the folder was moved, its files are of the future, and the clock goes backwards."""
    runs = shutil.copytree(stopped, tmp_path / "elsewhere")
    for path in runs.rglob("*"):
        os.utime(path, (2e9, 2e9))
    truncated(runs / "Pong/r/checkpoints/model-000003.safetensors")  # so that a round is left to do
    code, said = warm(runs, turn_back_clock={"seconds": 3600.0})
    assert code == 0, said
    assert learned(runs / "Pong/r") == whole.learned


@pytest.mark.faults
def test_a_folder_that_moves_under_a_running_process(warm: Warm, whole: Whole, tmp_path: Path) -> None:
    """C09: one line, and the moved run is resumed."""
    runs = tmp_path / "before"
    warm.start(runs, sleep_in={"where": "policykd.runs.distill_run:save_checkpoint", "seconds": 1.0})
    while not (runs / "Pong/r/metrics.jsonl").exists():
        time.sleep(0.005)
    runs.rename(tmp_path / "after")
    code, said = warm.finish()
    assert code == ENVIRONMENT, said
    assert not (tmp_path / "before").exists()
    code, said = warm(tmp_path / "after")
    assert code == 0, said
    assert learned(tmp_path / "after/Pong/r") == whole.learned


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine does not let a test mount: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small disk of its own")


@needs_root
def test_a_read_only_folder_is_one_line(warm: Warm, whole: Whole, stopped: Path, disk: Path) -> None:
    """C09."""
    runs = shutil.copytree(stopped, disk / "runs")
    before = tree(runs)
    remount(disk, "ro")
    code, said = warm(runs)
    assert (code, said.count("\n")) == (ENVIRONMENT, 1), said
    assert "Read-only file system" in said
    assert tree(runs) == before
    remount(disk, "rw")
    code, said = warm(runs)
    assert code == 0, said
    assert learned(runs / "Pong/r") == whole.learned


def test_a_file_that_may_not_grow_is_one_line(warm: Warm, whole: Whole, tmp_path: Path) -> None:
    """D01, the short form: no space for the weights."""
    code, said = warm(tmp_path, limit_file_size={"num_bytes": 100_000})
    assert code == ENVIRONMENT, said
    assert re.search(r"[\d,]{6,} bytes were needed, nothing was overwritten$", said.strip()), said
    assert num_rounds_kept(tmp_path / "Pong/r") == 0
    assert not list(tmp_path.rglob("*.tmp"))
    code, said = warm(tmp_path)
    assert code == 0, said
    assert learned(tmp_path / "Pong/r") == whole.learned


@pytest.mark.faults
@needs_root
def test_a_full_disk_at_any_time_is_one_line(warm: Warm, whole: Whole, disk: Path) -> None:
    """D01: from no space for the config to no space for the animation."""
    stopped_at, kilobytes = set(), 4
    while True:
        remount(disk, f"size={kilobytes}k")
        code, said = warm(disk / "runs")
        assert "Traceback" not in said
        if code == 0:
            break
        last = said.strip().splitlines()[-1]
        assert code == ENVIRONMENT, said
        assert "No space left on device" in last, said
        assert "bytes were needed, nothing was overwritten" in last or str(disk) in last, said
        assert not list(disk.rglob("*.tmp"))
        if (disk / "runs/Pong/r").exists():
            num_rounds_kept(disk / "runs/Pong/r")
        stopped_at.add(re.sub(r"-?\d+", "", Path(last.partition(": ")[2].partition(":")[0]).name))
        remount(disk, "size=16m")
        code, said = warm(disk / "runs")
        assert code == 0, said
        assert learned(disk / "runs/Pong/r") == whole.learned
        shutil.rmtree(disk / "runs")
        kilobytes += 4 + kilobytes // 32 * 4  # whole pages
    assert {"config.json", "model.safetensors", "states.npz"} <= stopped_at


@pytest.mark.faults
@needs_root
@pytest.mark.parametrize(("name", "room"), [("student.safetensors", 40_000), ("student.gif", 180_000)])
def test_no_room_for_the_export_is_one_line(
    name: str, room: int, warm: Warm, whole: Whole, stopped: Path, disk: Path
) -> None:
    """D01: of the student and of its animation, which need less than a checkpoint."""
    runs = shutil.copytree(stopped, disk / "runs")
    for path in (runs / "Pong/r").glob("student.*"):
        path.unlink()
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - room))
    code, said = warm(runs)
    assert code == ENVIRONMENT, said
    last = said.strip().splitlines()[-1]
    assert f"/{name}: No space left on device" in last
    assert "bytes were needed, nothing was overwritten" in last
    assert not list(disk.rglob("*.tmp"))
    assert num_rounds_kept(runs / "Pong/r") == 3
    filler.unlink()
    code, said = warm(runs)
    assert code == 0, said
    assert learned(runs / "Pong/r") == whole.learned


def test_a_reader_next_to_the_writer_sees_a_prefix(warm: Warm, whole: Whole, tmp_path: Path) -> None:
    """D03."""
    load = partial(load_dataset, teacher=load_teacher(game="Pong"))
    expected = load(whole.run)
    assert expected.teacher_NA.isfinite().all()
    pid, run, seen = warm.start(tmp_path), tmp_path / "Pong/r", set()
    while not (run / "results.json").exists():
        os.kill(pid, 0)
        if not list(run.glob("checkpoints/manifest-*.json")):
            time.sleep(0.01)
            continue
        assert open_dataset(run).num_rows % 32 == 0
        found = load(run)
        seen.add(len(found))
        assert (found.frames[: 1 + len(found)] == expected.frames[: 1 + len(found)]).all()
        assert (found.teacher_NA[: len(found)] == expected.teacher_NA[: len(found)]).all()
    code, said = warm.finish()
    assert code == 0, said
    assert seen >= {64, 96}
