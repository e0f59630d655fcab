"""Reads a Stable-Baselines3 archive without executing anything in it.

An SB3 `.zip` holds JSON (`data`) whose `:serialized:` entries are pickles, and tensors (`policy.pth`). SB3's own `load`
unpickles the former. Here only the JSON's plain entries are read and the tensors come through `torch.load` with
`weights_only=True`; the network is rebuilt from their names and shapes (see `teacher.py`).
"""

import hashlib
import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_BYTES = 256 << 20
MAX_MEMBERS = 64
_UNIX_LINK = 0o120000


@dataclass(frozen=True)
class Archive:
    """What an SB3 archive says, without its pickles."""

    path: Path
    sha256: str
    tensors: Mapping[str, Tensor]
    """the policy's state dict: dense, finite, float32"""
    data: Mapping[str, Any]
    """the plain JSON entries of `data`; an entry that was pickled keeps only its readable attributes"""


def read_archive(path: str | Path) -> Archive:
    """Returns the tensors and the plain JSON of an SB3 archive.

    Raises:
        ValueError: missing, truncated, foreign or unsafe file; one line that names it, the reason and the next step.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(
                f"{path}: {size:,} bytes is more than a policy can need ({MAX_BYTES:,}); is it the right file?"
            )
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the path of an SB3 .zip archive") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = _checked_members(path, archive)
            described = _read(path, archive, members, "data")
            pth = _read(path, archive, members, "policy.pth")
        data = json.loads(described)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RecursionError,
        json.JSONDecodeError,
    ) as error:
        raise ValueError(
            f"{path}: truncated, or not an SB3 .zip archive ({error}); download or save it again"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: its `data` is not an SB3 description; save it again with SB3's model.save")
    return Archive(path, hashlib.sha256(content).hexdigest(), _tensors(path, pth), data)


def _checked_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise ValueError(f"{path}: unsafe archive with {len(members)} members, SB3 writes at most 6; do not use it")
    names = [m.filename for m in members]
    for m in members:
        if names.count(m.filename) > 1:
            raise ValueError(f"{path}: unsafe archive with two members named {m.filename!r}; do not use it")
        if m.filename.startswith("/") or "\\" in m.filename or ".." in m.filename.split("/"):
            raise ValueError(f"{path}: unsafe archive with the member path {m.filename!r}; do not use it")
        if m.flag_bits & 1 or (m.external_attr >> 16) & 0o170000 == _UNIX_LINK:
            raise ValueError(f"{path}: unsafe archive, {m.filename!r} is encrypted or a link; do not use it")
    return dict(zip(names, members, strict=True))


def _read(path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str) -> bytes:
    if name not in members:
        raise ValueError(
            f"{path}: truncated, or not an SB3 archive: it holds no {name!r}; save the agent with SB3's model.save"
        )
    if members[name].file_size > MAX_BYTES:
        raise ValueError(
            f"{path}: unsafe archive, {name!r} unpacks to {members[name].file_size:,} bytes; do not use it"
        )
    with archive.open(members[name]) as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: unsafe archive, {name!r} unpacks to more than it declares; do not use it")
    return content


def _tensors(path: Path, pth: bytes) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(io.BytesIO(pth)) as inner:
            if any(m.compress_type != zipfile.ZIP_STORED for m in inner.infolist()):
                raise ValueError(f"{path}: unsafe archive, its policy.pth is compressed inside; do not use it")
        state = torch.load(io.BytesIO(pth), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(
            f"{path}: policy.pth holds more than tensors, or is cut short ({reason}); do not use it"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(
            f"{path}: policy.pth is a {type(state).__name__}, not a state dict; save it with SB3's model.save"
        )
    for name, tensor in state.items():
        _check_tensor(path, name, tensor)
    return state


def _check_tensor(path: Path, name: object, tensor: object) -> None:
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.dtype is not torch.float32:
        kind = f"{tensor.layout} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{path}: {name!r} is {kind}, a policy holds dense float32 tensors; do not use it")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{path}: {name!r} claims shape {tuple(tensor.shape)} over fewer numbers; do not use it")
    if not tensor.isfinite().all():
        raise ValueError(f"{path}: {name!r} holds NaN or infinite weights; the agent is broken, take an earlier one")
