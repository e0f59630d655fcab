"""Every failure of a command is one line and the exit code that the README names."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from policykd.cli.errors import needs_extra, run_cli
from policykd.io.files import BadFile


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def too_much() -> None:
    torch.empty(1 << 55, dtype=torch.uint8)


def interrupted() -> None:
    signal.raise_signal(signal.SIGTERM)


def interrupted_in_an_extension() -> None:
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        raise ImportError("initialisation failed") from None


def without_a_package() -> None:
    with needs_extra("sb3"):
        import a_package_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401


CASES: dict[str, tuple[Callable[[], object], int, str]] = {
    "nothing": (lambda: None, 0, ""),
    "a flag": (raising(ValueError("--rounds must be at least 1")), 2, "error: --rounds must be at least 1"),
    "a file's content": (raising(BadFile("a.zip: truncated\nthere")), 3, "error: a.zip: truncated there"),
    "no such file": (lambda: Path("nowhere/x").read_text(), 4, "error: nowhere/x: No such file or directory"),
    "no network": (raising(ConnectionError("hub:x: not reached")), 4, "error: hub:x: not reached"),
    "no memory": (raising(MemoryError()), 4, r"error: out of memory \(no details\); free some"),
    "no memory for torch": (too_much, 4, "error: out of memory .*; free some"),
    "numbers": (raising(FloatingPointError("round 3: loss nan")), 5, "error: round 3: loss nan"),
    "a package": (without_a_package, 2, r"error: No module named .*pip install 'policykd\[sb3\]'"),
    "a signal": (interrupted, 75, "\n?stopping; .*\nerror: interrupted: .*run the same command again"),
    "a signal inside C": (interrupted_in_an_extension, 75, "\n?stopping; .*\nerror: interrupted: "),
    "a signal, saved": (raising(KeyboardInterrupt("3 are saved")), 75, "error: interrupted: 3 are saved"),
    "ours": (
        lambda: os.environ["NO_SUCH"],
        1,
        "error: unexpected KeyError: 'NO_SUCH'; run again with --debug",
    ),
    "ours in torch": (lambda: torch.ones(2) @ torch.ones(3), 1, "error: unexpected RuntimeError: .*size"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_failure_is_one_line_and_a_code(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    work, code, line = CASES[case]
    with pytest.raises(SystemExit) as exit_:
        run_cli(lambda: (work(), None)[1])
    error = capfd.readouterr().err
    assert exit_.value.code == code
    assert re.match(line, error), error
    assert error.count("error:") == (code != 0)
    assert "Traceback" not in error


def test_debug_shows_the_traceback_before_the_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "--debug"])
    with pytest.raises(SystemExit):
        run_cli(raising(BadFile("a.zip: truncated")))
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: a.zip: truncated"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize("output", ["No space left on device", "standard output was closed"])
def test_output_that_goes_nowhere(output: str) -> None:
    code = "from policykd.cli.errors import run_cli; run_cli(lambda: print('x' * 99999))"
    if output.startswith("No space"):
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=target, stderr=subprocess.PIPE, text=True, check=False)
    os.close(target)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert output in done.stderr
