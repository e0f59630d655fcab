"""A file is complete under its name or absent, whatever fails, and no temporary file stays."""

import errno
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from policykd.io.files import BadFile, read_verified, remove_stale_temp_files, write_atomically


def test_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_failure_leaves_the_file_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "inside").write_text("")
    with pytest.raises(OSError, match="nothing was overwritten") as error:
        write_atomically(path, b"content")
    assert error.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["x" * 300, "file/below", "zero\0byte"])
def test_an_invalid_name_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    with pytest.raises((OSError, ValueError)) as error:
        write_atomically(tmp_path / name, b"content")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def no_room(path: Path) -> None:
    """Writes 300 kB where there is no space for them, and checks the error and the folder."""
    write_atomically(path, b"before")
    with pytest.raises(OSError, match="300,000 bytes were needed, nothing was overwritten") as error:
        write_atomically(path, b"x" * 300_000)
    assert error.value.filename == str(path)
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert path.read_bytes() == b"before"
    assert [p.name for p in path.parent.iterdir() if not p.is_dir()] == [path.name]


def test_a_file_size_limit_is_a_disk_without_room(tmp_path: Path) -> None:
    """D01: the form that needs no privilege."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        no_room(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 200 kB."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", folder]).returncode:
            pytest.skip("this machine does not let a test mount")
        yield Path(folder)
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_what_it_holds(small_disk: Path) -> None:
    """D01."""
    no_room(small_disk / "file")


def test_a_read_only_disk_is_one_line(small_disk: Path) -> None:
    """C09."""
    path = small_disk / "file"
    write_atomically(path, b"before")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="Read-only file system; nothing was overwritten") as error:
        write_atomically(path, b"after")
    assert (error.value.filename, path.read_bytes()) == (str(path), b"before")


def test_stale_temp_files_are_removed_and_those_of_running_processes_are_not(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, os.getpid(), os.getppid()):
        (tmp_path / f".file.{pid}.policykd.tmp").write_bytes(b"cut")
    (tmp_path / ".hidden.tmp").write_bytes(b"not ours")
    write_atomically(tmp_path / "new", b"content")
    assert {p.name for p in tmp_path.iterdir()} == {f".file.{os.getppid()}.policykd.tmp", ".hidden.tmp", "new"}
    remove_stale_temp_files(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_is_read_if_it_is_the_one(tmp_path: Path) -> None:
    sha256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    (tmp_path / "file").write_bytes(b"hello")
    assert read_verified(tmp_path / "file", sha256, "") == b"hello"
    (tmp_path / "file").write_bytes(b"hellp")
    with pytest.raises(BadFile, match=r"file: damaged \(its sha256 differs .*\); copy it again"):
        read_verified(tmp_path / "file", sha256, "; copy it again")
    with pytest.raises(BadFile, match=r"none: damaged \(No such file or directory\)"):
        read_verified(tmp_path / "none", sha256, "")
