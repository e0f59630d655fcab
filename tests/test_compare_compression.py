"""scripts/compare_compression.py as a user types it."""

import json
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare_compression.py"
SMALL = ["--updates", "20", "--batch-size", "8", "--episodes", "1", "--seed", "0"]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process: its exit code and standard error."""

    def run_here(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--game", "Pong", *args])
        monkeypatch.setattr(threading, "excepthook", threading.excepthook)
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert isinstance(ended.value.code, int)
        return ended.value.code, capfd.readouterr().err

    return run_here


def test_what_cannot_be_is_said_in_one_line_before_anything_is_written(
    run_here: Callable[..., tuple[int, str]], dataset: Path, tmp_path: Path
) -> None:
    states = ["--states", f"dataset:{dataset}", "--folder", str(tmp_path)]
    for args, code, said in (
        (["--updates", "30"], 2, "--updates 30 is not a multiple of 20"),
        (["--rows", "8pct"], 2, "--rows 8pct: choose from teacher, 25pct"),
        (["--jobs", "0"], 2, "--jobs must be at least 1"),
        (["--seed", "99999999999999999999999"], 2, "--seed must be at least 0 and at most 4294967295"),
        (["--name", "../x"], 2, "--name must be the name of a folder"),
        (["--teacher", "nothing.zip"], 2, "nothing.zip"),
    ):
        found, error = run_here(*states, *args)
        assert (found, error.count("\n")) == (code, 1), error
        assert said in error
    assert not list(tmp_path.rglob("*.json"))


def test_other_settings_do_not_go_on_and_no_row_is_no_table(
    run_here: Callable[..., tuple[int, str]], dataset: Path, tmp_path: Path
) -> None:
    again = ["--states", f"dataset:{dataset}", "--folder", str(tmp_path), "--rows", "0.1pct", "--latency-only"]
    code, error = run_here(*again, *SMALL)
    assert code == 2
    assert "the teacher's row is not finished" in error
    code, error = run_here(*again, *SMALL, "--updates", "40")
    assert code == 2
    assert "updates was 20, is 40" in error


@pytest.mark.slow
def test_killed_and_started_again_it_goes_on_to_a_table_and_a_picture(tmp_path: Path) -> None:
    """On states that it visits itself, as by default."""
    command = [sys.executable, str(SCRIPT), "--game", "Pong", "--folder", str(tmp_path), *SMALL]
    command += ["--collect.rounds", "2", "--collect.states-per-round", "400", "--collect.updates-per-round", "4"]
    subset, command = [*command, "--rows", "0.1pct"], [*command, "--rows", "0.1pct", "1pct", "1pct-int8"]
    run, row = tmp_path / "Pong" / "compression", tmp_path / "Pong" / "compression" / "0.1pct"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (row / "student.json").is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "go on with: " in said
    assert not (run / "compression.json").exists()
    before = (row / "student.json").stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    assert (row / "student.json").stat().st_mtime_ns == before
    content = json.loads((run / "compression.json").read_text())
    assert list(content["rows"]) == ["teacher", "1pct", "0.1pct", "1pct-int8", "random"]
    assert all(r["latency_microseconds"] > 1 for r in content["rows"].values() if r["family"] != "random")
    assert (run / "pareto.svg").read_text().startswith("<?xml")
    assert "| 0.1% | distilled |" in (run / "compression.md").read_text()
    kept = (run / "latencies.json").read_bytes()
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert "begins" not in shown.stdout
    assert (run / "latencies.json").read_bytes() == kept
    shown = subprocess.run(subset, capture_output=True, text=True, check=True, timeout=400)
    assert "playing" not in shown.stdout
    assert (run / "latencies.json").read_bytes() == kept
    again = json.loads((run / "compression.json").read_text())
    assert (again["rows"], again["missing"]) == (content["rows"], [])
    assert content["rows"]["random"]["protocols"]["noop_sampled"]["num_episodes"] == 1
    more = subprocess.run([*subset, "--latency-only", "--episodes", "2"], capture_output=True, text=True, check=True)
    assert "Asked for and not finished: 0.1pct" in more.stdout
    (run / "1pct" / "policy.onnx").write_bytes(b"")
    broken = subprocess.run([*command, "--latency-only"], capture_output=True, text=True, check=False, timeout=400)
    assert broken.returncode == 3
    assert "policy.onnx: damaged" in broken.stderr
