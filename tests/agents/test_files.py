from pathlib import Path

import pytest

from policykd.agents.files import write_atomically


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
