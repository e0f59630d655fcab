"""Reads a `policy.pth` without an unpickler.

A state dict is a zip of raw numbers and a pickle that says which tensor is where in them. Of pickle's language only the
words that such a description needs are known here; all others end the reading. `torch.load(weights_only=True)` runs no
foreign code either, but it lets a file of a kilobyte ask for any amount of memory (`bytearray(10**11)`) or time (nested
tuples as dictionary keys).
"""

import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 256 << 10
_MAX_PICKLE = 64 << 10
_MARK = object()
_DICT, _TENSOR, _FLOATS = "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"


class _View(NamedTuple):
    """Which numbers of a storage are a tensor."""

    key: str
    offset: int
    size: tuple[int, ...]
    strides: tuple[int, ...]


class BoundedReader:
    """A file for `zipfile` that refuses to give much at once, such as the directory of a million members."""

    def __init__(self, file: IO[bytes]) -> None:
        self._read, self.seek, self.tell, self.seekable = file.read, file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """Returns up to `size` bytes, as files do.

        Raises:
            zipfile.BadZipFile: too much is asked for.
        """
        if size > CHUNK:
            raise zipfile.BadZipFile(f"its directory has {size:,} bytes")
        return self._read(CHUNK if size < 0 else size)


def read_bounded(stream: IO[bytes], limit: int) -> io.BytesIO:
    """Returns all that a stream holds, at most `limit` bytes whatever it declares.

    Raises:
        ValueError: it holds more.
    """
    content = io.BytesIO()
    while chunk := stream.read(CHUNK):
        if content.tell() + len(chunk) > limit:
            raise ValueError(f"unpacks to more than the {limit:,} bytes that a policy can need")
        content.write(chunk)
    return content


def read_state_dict(pth: io.BytesIO) -> dict[str, Tensor]:
    """Returns the dense, finite, float32 tensors that `torch.save` wrote, lying where they are in the file's memory.

    Raises:
        ValueError: anything else, with the reason alone.
        zipfile.BadZipFile: cut short, or its checksums do not agree.
    """
    with zipfile.ZipFile(BoundedReader(pth)) as archive:
        records = {m.filename.partition("/")[2]: m for m in archive.infolist()}
        if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in records.values()):
            raise ValueError("its records are compressed")
        if "data.pkl" not in records or len(records) < len(archive.infolist()):
            raise ValueError("its records are missing or there twice")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise ValueError("its numbers are big-endian")
        if records["data.pkl"].file_size > _MAX_PICKLE:
            raise ValueError(f"{records['data.pkl'].file_size:,} bytes describe its tensors")
        views = _described(archive.read(records["data.pkl"]))
    return _tensors(views, {key: _numbers(pth, records.get(f"data/{key}")) for key in {v.key for v in views.values()}})


def _numbers(pth: io.BytesIO, record: zipfile.ZipInfo | None) -> Tensor:
    """Returns a storage without copying it."""
    content = pth.getbuffer()
    if record is None or record.file_size == 0 or record.file_size % 4 or record.header_offset + 30 > len(content):
        raise ValueError("the numbers of a tensor are missing")
    start = record.header_offset + 30 + sum(struct.unpack_from("<HH", content, record.header_offset + 26))
    if zlib.crc32(content[start : start + record.file_size]) != record.CRC or start + record.file_size > len(content):
        raise zipfile.BadZipFile(f"bad checksum of {record.filename[:80]!r}")
    return torch.frombuffer(content, dtype=torch.float32, count=record.file_size // 4, offset=start)


def _tensors(views: dict[str, _View], storages: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors, checked."""
    made: dict[_View, Tensor] = {}
    for name, view in views.items():
        if not _readable(view):  # before anything else: Python's hash and text of a nested tuple can take for ever
            raise ValueError(f"{name!r:.80} has no shape of whole numbers")
        if view in made:  # PPO's CNN is there three times
            continue
        storage = storages[view.key]
        if not _dense(view) or view.offset + math.prod(view.size) > storage.numel():
            raise ValueError(f"{name!r:.80} claims shape {view.size} over fewer numbers")
        tensor = storage.as_strided(view.size, view.strides, view.offset)
        if not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ValueError(f"{name!r:.80} holds NaN or infinite weights")
        made[view] = tensor
    if sum(t.numel() for t in made.values()) > sum(s.numel() for s in storages.values()):
        raise ValueError("its tensors overlap")
    return {name: made[view] for name, view in views.items()}


def _readable(view: _View) -> bool:
    """Returns whether offset, size and strides are a few whole numbers."""
    if not 1 <= len(view.size) == len(view.strides) <= 8:
        return False
    return all(type(n) is int and 0 <= n < 1 << 31 for n in (view.offset, *view.size, *view.strides))


def _dense(view: _View) -> bool:
    """Returns whether each number of the view is another one, without gaps, in whatever order of the dimensions."""
    covered = 1
    for stride, length in sorted(zip(view.strides, view.size, strict=True)):
        if length != 1 and stride != covered:
            return False
        covered *= length
    return covered > 0


def _described(pickled: bytes) -> dict[str, _View]:
    """Returns the tensors that the pickle describes, by their names."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name not in _WORDS:
                raise ValueError(f"pickle's {opcode.name}")
            _WORDS[opcode.name](stack, memo, argument)
    except (IndexError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"a broken pickle, {type(error).__name__}") from error
    state = stack[-1] if stack else None
    if type(state) is not dict or not state:
        raise ValueError(f"a {type(state).__name__} or nothing, not a state dict")
    for name, view in state.items():
        if type(view) is not _View:
            raise ValueError(f"{name!r:.80} is a {type(view).__name__}")
    return state


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _fetch(stack: list[Any], memo: dict[int, Any], index: int) -> None:
    stack.append(memo[index])


def _remember(stack: list[Any], memo: dict[int, Any], index: int) -> None:
    memo[index] = stack[-1]


def _global(stack: list[Any], _memo: dict[int, Any], name: str) -> None:
    if name not in (_DICT, _TENSOR, _FLOATS):
        raise ValueError(f"{name!r:.80}")
    stack.append(name)


def _storage(stack: list[Any], _memo: dict[int, Any], _argument: None) -> None:
    """Puts a storage's key where its description was, ('storage', torch.FloatStorage, key, device, numel)."""
    word, kind, key, _device, _numel = stack.pop()
    if word != "storage" or kind != _FLOATS or type(key) is not str:
        raise ValueError("another kind of storage")
    stack.append(key)


def _call(stack: list[Any], _memo: dict[int, Any], _argument: None) -> None:
    arguments, function = stack.pop(), stack.pop()
    if function == _DICT and arguments == ():
        stack.append({})
    elif function == _TENSOR:
        key, offset, size, strides, _requires_grad, hooks, *_metadata = arguments
        if type(key) is not str or type(size) is not tuple or type(strides) is not tuple or hooks != {}:
            raise ValueError("another kind of tensor")
        stack.append(_View(key, offset, size, strides))
    else:
        raise ValueError("a call")


def _set_items(stack: list[Any], items: list[Any]) -> None:
    target = stack[-1]
    if type(target) is not dict or len(items) % 2 or not all(type(key) is str for key in items[::2]):
        raise ValueError("a dictionary whose keys are no names")
    target.update(zip(items[::2], items[1::2], strict=True))


def _last(stack: list[Any], count: int) -> list[Any]:
    return [stack.pop() for _ in range(count)][::-1]


def _push(stack: list[Any], _memo: dict[int, Any], argument: Any) -> None:
    stack.append(argument)


_WORDS: dict[str, Callable[[list[Any], dict[int, Any], Any], None]] = {
    "PROTO": lambda stack, memo, argument: None,
    "STOP": lambda stack, memo, argument: None,
    "MARK": lambda stack, memo, argument: stack.append(_MARK),
    **dict.fromkeys(("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"), _push),
    "NEWTRUE": lambda stack, memo, argument: stack.append(True),
    "NEWFALSE": lambda stack, memo, argument: stack.append(False),
    "EMPTY_TUPLE": lambda stack, memo, argument: stack.append(()),
    "TUPLE": lambda stack, memo, argument: stack.append(tuple(_pop_to_mark(stack))),
    "TUPLE1": lambda stack, memo, argument: stack.append(tuple(_last(stack, 1))),
    "TUPLE2": lambda stack, memo, argument: stack.append(tuple(_last(stack, 2))),
    "TUPLE3": lambda stack, memo, argument: stack.append(tuple(_last(stack, 3))),
    "EMPTY_DICT": lambda stack, memo, argument: stack.append({}),
    "SETITEM": lambda stack, memo, argument: _set_items(stack, _last(stack, 2)),
    "SETITEMS": lambda stack, memo, argument: _set_items(stack, _pop_to_mark(stack)),
    "BUILD": lambda stack, memo, argument: stack.pop() and None,  # the versions of the modules
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _fetch),
    "GLOBAL": _global,
    "BINPERSID": _storage,
    "REDUCE": _call,
}
