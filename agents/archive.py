"""A reader of Stable-Baselines3 archives that executes nothing in them.

An SB3 `.zip` (or the folder that it unpacks to) contains JSON (`data`) whose `:serialized:` entries are pickles, and
tensors (`policy.pth`). SB3's own `load` unpickles the former. Here they are cut out before the JSON is parsed, and the
tensors are read by `state_dict.py`; the network is rebuilt from their names and shapes (see `rebuild.py`). The other
members, optimizer states among them, are never opened.
"""

import hashlib
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue
from torch import Tensor

from policykd.agents.state_dict import BoundedReader, read_member, read_state_dict
from policykd.io.files import BadFile
from policykd.io.typed import one_line, parse_json, read_bounded

MAX_FILE = 64 << 20
"""bytes of a whole archive: a QR-DQN of 18 actions with its optimizer is 56 MB"""
MAX_MEMBER = {"data": 8 << 20, "policy.pth": 32 << 20}
"""bytes unpacked: the last observations of 128 Atari environments; both networks of that QR-DQN"""
MAX_MEMBERS = 64
_MAX_JSON = 1 << 20
# The file type in the upper half of `external_attr`.
_UNIX_LINK = 0o120000
_PICKLE = re.compile(rb'":serialized:"\s*:\s*"[^"\\]*"')
_GIVE = "give the path of an SB3 archive"
_GET_AGAIN = "download or save it again"
_UNSAFE = "do not use it"
_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError),
    *(OSError, OverflowError),  # a broken directory makes zipfile seek to impossible places
    *(LookupError, TypeError),  # a member is missing, or the pickle's stack holds something else
)


@dataclass(frozen=True)
class Sb3Data:
    """The plain JSON of an archive's `data`; of a pickled entry only its readable attributes are left."""

    entries: dict[str, JsonValue]

    def entry(self, name: str) -> Mapping[str, JsonValue]:
        """Returns an object of the JSON, empty if there is none."""
        entry = self.entries.get(name)
        return entry if isinstance(entry, dict) else {}

    def space_kind(self, name: str) -> str | None:
        """Returns the class of a space, such as `Box`, or None."""
        found = re.search(r"(\w+)'>$", text(self.entry(name).get(":type:")))
        return found[1] if found else None

    @property
    def obs_shape(self) -> tuple[int, ...] | None:
        """Shape of an observation, or None."""
        space = self.entry("observation_space")
        shape = space.get("_shape", space.get("shape"))
        if isinstance(shape, str):
            return tuple(int(n) for n in re.findall(r"\d{1,9}", shape))
        if isinstance(shape, list):
            sizes = tuple(n for n in shape if type(n) is int)
            return sizes if len(sizes) == len(shape) else None
        return None

    @property
    def obs_dtype(self) -> str | None:
        """NumPy's name of the observations' dtype, or None."""
        space = self.entry("observation_space")
        return text(space["dtype"]) if "dtype" in space else None

    @property
    def num_actions(self) -> int | None:
        """Number of discrete actions, or None."""
        n = self.entry("action_space").get("n")
        return int(n) if isinstance(n, int | str) and re.fullmatch(r"[0-9]{1,9}", str(n)) else None


@dataclass(frozen=True)
class Archive:
    """Content of an SB3 archive, without its pickles."""

    path: Path
    sha256: str
    """see `read_members`"""
    tensors: Mapping[str, Tensor]
    """the policy's state dict: dense, finite, read as float32"""
    data: Sb3Data


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
    except _BROKEN as error:
        raise BadFile(
            f"{path}: policy.pth is truncated, or not a state dict of dense, finite numbers"
            f" ({one_line(str(error))}); {_GET_AGAIN}, or --trust-pickle if it is your own"
        ) from error
    return Archive(path, sha256, tensors, data)


def read_members(path: Path) -> tuple[str, dict[str, io.BytesIO]]:
    """Returns an archive's sha256, and `policy.pth` and `data`: the very bytes that were hashed.

    The hash of a folder is what `sha256sum policy.pth data | sha256sum` prints in it.

    Raises:
        BadFile: as `read_archive`, for everything outside the members.
    """
    # The Hub's unpacked form is hashed as `sha256sum` would, so that a user can compare.
    if path.is_dir():
        names = ("policy.pth", "data")
        contents = {name: read_bounded(path / name, MAX_MEMBER[name], next_step=_GIVE) for name in names}
        sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())
        return hashlib.sha256(sums.encode()).hexdigest(), {n: io.BytesIO(content) for n, content in contents.items()}
    # The whole file is read first: what is hashed is what is parsed, even if the file changes meanwhile.
    whole = read_bounded(path, MAX_FILE, next_step=_GIVE)
    try:
        with zipfile.ZipFile(BoundedReader(io.BytesIO(whole))) as archive:
            _check_members(path, archive.infolist())
            read = {name: read_member(archive, name) for name in MAX_MEMBER}
    except BadFile:
        raise
    except _BROKEN as error:
        reason = f"truncated, or not an SB3 .zip archive ({one_line(str(error))}); {_GET_AGAIN}"
        raise BadFile(f"{path}: {reason}") from error
    return hashlib.sha256(whole).hexdigest(), read


def parse_data(path: Path, content: bytes) -> Sb3Data:
    """Returns the JSON of `data` without its pickles.

    Raises:
        BadFile: invalid JSON, or too much of it.
    """
    # The pickles go before the JSON is parsed: they are most of its bytes, and nothing may decode them.
    plain = _PICKLE.sub(b'":serialized:": ""', content)
    if len(plain) > _MAX_JSON:
        raise BadFile(f"{path}: unsafe archive, {len(plain):,} bytes of `data` are not pickles; {_UNSAFE}")
    return Sb3Data(parse_json(dict[str, JsonValue], plain, f"{path}: `data`", next_step=_GET_AGAIN))


def text(value: object) -> str:
    """Returns text unchanged and anything else as its type: the repr of nested lists could be endless."""
    return value if isinstance(value, str) else f"a {type(value).__name__}"


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Raises BadFile for an unsafe member, even one that is not read: other tools may unpack the same file."""
    if len(members) > MAX_MEMBERS:
        raise BadFile(f"{path}: unsafe archive with {len(members)} members, SB3 writes at most 6; {_UNSAFE}")
    names = [member.filename for member in members]
    for member in members:
        if reason := _danger(member, names):
            raise BadFile(f"{path}: unsafe archive, {member.filename[:80]!r} {reason}; {_UNSAFE}")


def _danger(member: zipfile.ZipInfo, names: list[str]) -> str | None:
    """Returns why a member is unsafe, or None."""
    if names.count(member.filename) > 1:
        return "appears twice"
    if member.filename.startswith("/") or "\\" in member.filename or ".." in member.filename.split("/"):
        return "is a path outside"
    if member.flag_bits & 1 or (member.external_attr >> 16) & 0o170000 == _UNIX_LINK:
        return "is encrypted or a link"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "has an uncommon compression"
    if member.file_size > MAX_MEMBER.get(member.filename, MAX_FILE):
        return f"unpacks to {member.file_size:,} bytes"
    return None
