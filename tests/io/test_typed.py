"""The one reader of JSON files: what it accepts, and that every other file is one line of text."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from policykd.io.files import BadFile
from policykd.io.typed import one_line, parse_json, read_bounded, read_json, to_json, write_json


@dataclass(frozen=True)
class Inner:
    values: tuple[float, ...]


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Field(ge=1, le=100)]
    inner: Inner
    name: str = "x"
    extra: dict[str, float] | None = None


OUTER = Outer(3, Inner((0.5, -2.0)), extra={"a": 1.0})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "outer.json", OUTER)
    assert read_json(Outer, tmp_path / "outer.json") == OUTER
    assert parse_json(Outer, '{"count": 1, "inner": {"values": []}, "unknown": 7}', "x") == Outer(1, Inner(()))


@given(st.integers(1, 100), st.lists(st.floats(allow_nan=False, allow_infinity=False)), st.text())
def test_every_value_survives(count: int, values: list[float], name: str) -> None:
    outer = Outer(count, Inner(tuple(values)), name)
    assert parse_json(Outer, to_json(outer), "x") == outer


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "EOF while parsing"),
        ("{", "EOF while parsing"),
        ("[]", "instance of Outer|object|dictionary"),
        ('{"count": 0, "inner": {"values": []}}', "count: Input should be greater than or equal to 1"),
        ('{"count": 101, "inner": {"values": []}}', "count: Input should be less than or equal to 100"),
        ('{"count": 1}', "inner: Field required"),
        ('{"count": 1, "inner": {"values": ["a"]}}', r"inner\.values\.0: Input should be a valid number"),
        ('{"count": 1, "inner": {"values": [NaN]}}', "expected value"),
        ('{"count": 1, "inner": {"values": [1e999]}}', "not finite"),
        ("[" * 100_000, "recursion|depth"),
        ('{"count": "\x1b[31m", "inner": {}}', "."),
        (b"\xff\xfe\x00", "."),
    ],
)
def test_invalid_content_is_one_line_with_file_reason_and_next_step(content: str | bytes, reason: str) -> None:
    with pytest.raises(BadFile, match=rf"run\.json: invalid \(.*(?:{reason}).*\); copy it again") as raised:
        parse_json(Outer, content, "run.json", next_step="copy it again")
    assert str(raised.value).isprintable()


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    """A FIFO that nobody writes to must not hang, nor a device never end."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"x" * 11)
    for path, reason in (
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "missing", "No such file"),
        (tmp_path / "large", "larger than 10 bytes"),
        (tmp_path / "a\0b", "embedded null"),
    ):
        with pytest.raises(BadFile, match=rf"{reason}.*; give another"):
            read_bounded(path, 10, next_step="give another")
    assert read_bounded(tmp_path / "large", 11) == b"x" * 11


def test_foreign_text_becomes_one_printable_line() -> None:
    assert one_line("a\n\tb") == "a b"
    assert one_line("red \x1b[31m") == "red \\x1b[31m"
    assert len(one_line("x" * 1000)) < 250
