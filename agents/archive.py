"""Reads a Stable-Baselines3 archive without executing anything in it.

An SB3 `.zip` (or the folder that it unpacks to) holds JSON (`data`) whose `:serialized:` entries are pickles, and
tensors (`policy.pth`). SB3's own `load` unpickles the former. Here they are cut out before the JSON is parsed, and the
tensors are read by `tensors.py`; the network is rebuilt from their names and shapes (see `rebuild.py`). The other
members, optimizer states among them, are never opened: whatever they hold cannot run.
"""

import hashlib
import io
import json
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from policykd.agents.tensors import BoundedReader, read_bounded, read_state_dict
from policykd.io.files import BadFile

MAX_FILE = 64 << 20
"""bytes of a whole archive: a QR-DQN of 18 actions with its optimizer is 56 MB"""
MAX_MEMBER = {"data": 8 << 20, "policy.pth": 32 << 20}
"""bytes unpacked: the last observations of 128 Atari environments; both nets of that QR-DQN"""
MAX_MEMBERS = 64
_MAX_JSON = 1 << 20
_UNIX_LINK = 0o120000
_PICKLE = re.compile(rb'":serialized:"\s*:\s*"[^"\\]*"')
_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, UnicodeDecodeError),
    *(OSError, OverflowError),  # where a broken directory makes zipfile look
)


@dataclass(frozen=True)
class Archive:
    """What an SB3 archive says, without its pickles."""

    path: Path
    sha256: str
    """see `read_members`"""
    tensors: Mapping[str, Tensor]
    """the policy's state dict: dense, finite, float32"""
    data: Mapping[str, Any]
    """the plain JSON entries of `data`; an entry that was pickled keeps only its readable attributes"""


def read_archive(path: str | Path) -> Archive:
    """Returns the tensors and the plain JSON of an SB3 archive, a `.zip` or the folder that it unpacks to.

    Raises:
        BadFile: missing, truncated, foreign or unsafe file; one line that names it, the reason and the next step.
    """
    path = Path(path)
    sha256, members = read_members(path)
    data = parse_data(path, members["data"].getvalue())
    try:
        tensors = read_state_dict(members["policy.pth"])
    except zipfile.BadZipFile as error:
        raise BadFile(f"{path}: truncated, or not an SB3 archive: policy.pth ({error}); get it again") from error
    except (ValueError, *_BROKEN) as error:
        raise BadFile(
            f"{path}: policy.pth is no state dict of dense, finite float32 tensors ({_line(error)}); do not use it, or "
            "--trust-pickle if it is your own"
        ) from error
    return Archive(path, sha256, tensors, data)


def read_members(path: Path) -> tuple[str, dict[str, io.BytesIO]]:
    """Returns what identifies an archive, and its `policy.pth` and `data`: the very bytes that were hashed.

    A `.zip` is known by its SHA-256, a folder by what `sha256sum policy.pth data | sha256sum` prints in it.

    Raises:
        BadFile: as `read_archive`, for all that is not inside the members.
    """
    if path.is_dir():
        contents = {name: _read_file(path / name, MAX_MEMBER[name]) for name in ("policy.pth", "data")}
        sums = "".join(f"{_sha256(content)}  {name}\n" for name, content in contents.items())
        return _sha256(io.BytesIO(sums.encode())), contents
    whole = _read_file(path, MAX_FILE)
    try:
        with zipfile.ZipFile(BoundedReader(whole)) as archive:
            members = _checked_members(path, archive)
            return _sha256(whole), {name: _read_member(path, archive, members, name) for name in MAX_MEMBER}
    except _BROKEN as error:
        raise BadFile(
            f"{path}: truncated, or not an SB3 .zip archive ({_line(error)}); download or save it again"
        ) from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _open(path: Path, limit: int) -> IO[bytes]:
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise BadFile(f"{path}: cannot be read (it is no file); give the path of an SB3 archive")
        if about.st_size > limit:
            raise BadFile(
                f"{path}: {about.st_size:,} bytes is more than a policy can need ({limit:,}); is it the right file?"
            )
        return path.open("rb")
    except FileNotFoundError as error:
        raise BadFile(f"{path}: cannot be read ({error.strerror}); give the path of an SB3 archive") from error


def _read_file(path: Path, limit: int) -> io.BytesIO:
    with _open(path, limit) as file:
        return read_bounded(file, limit)


def _sha256(content: io.BytesIO) -> str:
    return hashlib.sha256(content.getbuffer()).hexdigest()


def _checked_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise BadFile(f"{path}: unsafe archive with {len(members)} members, SB3 writes at most 6; do not use it")
    names = [m.filename for m in members]
    for m in members:
        if reason := _danger(m, names):
            raise BadFile(f"{path}: unsafe archive, {m.filename[:80]!r} {reason}; do not use it")
    return dict(zip(names, members, strict=True))


def _danger(m: zipfile.ZipInfo, names: list[str]) -> str | None:
    """Returns what is wrong with a member, if anything, also with one that is not read."""
    if names.count(m.filename) > 1:
        return "is there twice"
    if m.filename.startswith("/") or "\\" in m.filename or ".." in m.filename.split("/"):
        return "is a path outside"
    if m.flag_bits & 1 or (m.external_attr >> 16) & 0o170000 == _UNIX_LINK:
        return "is encrypted or a link"
    if m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed in an uncommon way"
    if m.file_size > MAX_MEMBER.get(m.filename, MAX_FILE):
        return f"unpacks to {m.file_size:,} bytes"
    return None


def _read_member(path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str) -> io.BytesIO:
    if name not in members:
        raise BadFile(
            f"{path}: truncated, or not an SB3 archive: it holds no {name!r}; save the agent with SB3's model.save"
        )
    try:
        with archive.open(members[name]) as stream:
            return read_bounded(stream, MAX_MEMBER[name])
    except ValueError as error:
        raise BadFile(f"{path}: unsafe archive, {name!r} {_line(error)}; do not use it") from error


def parse_data(path: Path, described: bytes) -> dict[str, Any]:
    """Returns the JSON of `data` without its pickles.

    Raises:
        BadFile: no such JSON, or too much of it.
    """
    plain = _PICKLE.sub(b'":serialized:": ""', described)
    if len(plain) > _MAX_JSON:
        raise BadFile(f"{path}: unsafe archive, {len(plain):,} bytes of `data` are no pickles; do not use it")
    try:
        data = json.loads(plain)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: truncated, or not an SB3 archive: `data` ({_line(error)}); get it again") from error
    if not isinstance(data, dict):
        raise BadFile(f"{path}: its `data` is not an SB3 description; save it again with SB3's model.save")
    return data
