"""One process at a time works in a folder (C08, C09 of the fault matrix)."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from policykd.io.files import LOCK, lock_folder

HOLD = """
import sys
from pathlib import Path
from policykd.io.files import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock of `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    """C08, and C09: the lock moves with the folder."""
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    owner = f"process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(OSError, match=f"locked by {owner}; wait for it") as error, lock_folder(moved):
        pass
    assert error.value.filename == str(moved / LOCK)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (moved / LOCK).is_file()
    with lock_folder(moved):
        assert (moved / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    assert list(moved.iterdir()) == []


def test_a_lock_leaves_nothing_and_can_be_taken_again(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "Pong" / "r"
    for _ in range(2):
        with lock_folder(run), pytest.raises(OSError, match="locked by process"), lock_folder(run):
            pass
        assert not (tmp_path / "runs").exists()
    with lock_folder(run):
        (run / "config.json").write_text("{}")
    assert [p.name for p in run.iterdir()] == ["config.json"]
    with ExitStack() as stack:
        stack.enter_context(lock_folder(run))
        (run / LOCK).unlink()  # by hand; the next process gets a lock of its own
        stack.enter_context(lock_folder(run))


def test_a_folder_that_is_not_writable_is_one_line(tmp_path: Path) -> None:
    """C09."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory; .* give another") as error, lock_folder(tmp_path / "file/run"):
        pass
    assert str(tmp_path / "file") in error.value.filename


def test_without_flock_a_record_in_the_file_is_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems and network file systems without fcntl.flock."""
    from filelock import SoftFileLock

    monkeypatch.setattr("policykd.io.files.FileLock", SoftFileLock)
    run = tmp_path / "run"
    for _ in range(2):
        with lock_folder(run), pytest.raises(OSError, match=f"locked by .*{os.getpid()}"), lock_folder(run):
            pass
        assert not run.exists()
