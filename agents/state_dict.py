"""A reader of `policy.pth` that never unpickles.

A state dict is a zip of raw numbers and a pickle that describes which tensor is where in them. Only the opcodes that
such a description needs are interpreted here; any other one is an error. `torch.load(weights_only=True)` does not
execute foreign code either, but a file of a kilobyte can make it allocate any amount of memory (`bytearray(10**11)`) or
take any time (nested tuples as dictionary keys).
"""

import io
import math
import pickletools
import shutil
import zipfile
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 256 << 10
_MAX_PICKLE = 64 << 10
"""bytes of the description; a QR-DQN's has 4,000"""
_MARK = object()
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
}
"""kinds of storages; all are read as float32, as SB3's own load copies them"""


class _StorageKey(NamedTuple):
    """Name of a record of numbers, and their type."""

    record: str
    dtype: torch.dtype


class _View(NamedTuple):
    """Position of a tensor's numbers in a storage."""

    storage: _StorageKey
    offset: int
    size: tuple[int, ...]
    strides: tuple[int, ...]


class BoundedReader:
    """A file for `zipfile` that refuses large reads, such as the directory of a million members."""

    def __init__(self, file: IO[bytes]) -> None:
        self._read = file.read
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, size: int = -1) -> bytes:
        """Returns up to `size` bytes, like a file.

        Raises:
            zipfile.BadZipFile: more than `CHUNK` bytes.
        """
        if size > CHUNK:
            raise zipfile.BadZipFile(f"its directory has {size:,} bytes")
        return self._read(CHUNK if size < 0 else size)


def read_member(archive: zipfile.ZipFile, member: str | zipfile.ZipInfo) -> io.BytesIO:
    """Returns the content of a member whose declared size was checked; zipfile returns no more than that.

    Raises:
        zipfile.BadZipFile: truncated, or a wrong checksum.
    """
    content = io.BytesIO()
    with archive.open(member) as stream:
        shutil.copyfileobj(stream, content, CHUNK)  # in chunks: one large read could unpack to any size
    return content


def read_state_dict(pth: io.BytesIO) -> dict[str, Tensor]:
    """Returns the dense and finite tensors that `torch.save` wrote, as float32.

    Raises:
        ValueError, LookupError, TypeError: anything else, with the reason alone.
        zipfile.BadZipFile: truncated, or a wrong checksum.
    """
    with zipfile.ZipFile(BoundedReader(pth)) as archive:
        records = {m.filename.partition("/")[2]: m for m in archive.infolist()}
        # torch.save never compresses; a record that did could unpack to any size.
        if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in records.values()):
            raise ValueError("its records are compressed")
        # Two records of one name would let the checked one differ from the read one.
        if "data.pkl" not in records or len(records) < len(archive.infolist()):
            raise ValueError("its records are missing or duplicated")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise ValueError("its numbers are big-endian")
        if records["data.pkl"].file_size > _MAX_PICKLE:
            raise ValueError(f"{records['data.pkl'].file_size:,} bytes describe its tensors")
        # Records that overlap could be any number of times as large as the file.
        if sum(m.file_size for m in records.values()) > len(pth.getbuffer()):
            raise ValueError("its records overlap")
        views = _read_description(archive.read(records["data.pkl"]))
        keys = {view.storage for view in views.values()}
        if len({key.record for key in keys}) < len(keys):
            raise ValueError("a record of numbers has two types")
        storages = {key: _storage(archive, records[f"data/{key.record}"], key.dtype) for key in keys}
    return _tensors(views, storages)


def _storage(archive: zipfile.ZipFile, record: zipfile.ZipInfo, dtype: torch.dtype) -> Tensor:
    """Returns the numbers of a record as float32."""
    content = read_member(archive, record).getbuffer()
    if len(content) == 0 or len(content) % dtype.itemsize:
        raise ValueError("the numbers of a tensor are missing")
    return torch.frombuffer(content, dtype=dtype).float()


def _tensors(views: dict[str, _View], storages: dict[_StorageKey, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors, once each is dense and finite and they do not overlap."""
    tensors: dict[_View, Tensor] = {}
    for name, view in views.items():
        if not _is_plain(view):  # first of all: hash and text of a nested tuple can take forever
            raise ValueError(f"{name!r:.80} has no shape of integers")
        if view in tensors:  # PPO saves its CNN under three names
            continue
        storage = storages[view.storage]
        if not _is_dense(view) or view.offset + math.prod(view.size) > storage.numel():
            raise ValueError(f"{name!r:.80} claims shape {view.size} over fewer numbers")
        tensor = storage.as_strided(view.size, view.strides, view.offset)
        if not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ValueError(f"{name!r:.80} holds NaN or infinite weights")
        tensors[view] = tensor
    # Dense views that fit one by one can still share numbers with each other.
    if sum(t.numel() for t in tensors.values()) > sum(s.numel() for s in storages.values()):
        raise ValueError("its tensors overlap")
    return {name: tensors[view] for name, view in views.items()}


def _is_plain(view: _View) -> bool:
    """Returns whether offset, size and strides are a few integers."""
    if not 1 <= len(view.size) == len(view.strides) <= 8:
        return False
    return all(type(n) is int and 0 <= n < 1 << 31 for n in (view.offset, *view.size, *view.strides))


def _is_dense(view: _View) -> bool:
    """Returns whether the view covers its numbers once each, without gaps, in any order of the dimensions."""
    # In order of their strides, each dimension must continue where the smaller ones end.
    covered = 1
    for stride, length in sorted(zip(view.strides, view.size, strict=True)):
        if length != 1 and stride != covered:
            return False
        covered *= length
    return covered > 0


def _read_description(pickled: bytes) -> dict[str, _View]:
    """Returns the tensors that the pickle describes, by name.

    Raises:
        ValueError: an opcode, a call or a type that a state dict does not need.
    """
    state = _interpret(pickled)
    if type(state) is not dict or not state:
        raise ValueError(f"a {type(state).__name__} or nothing, not a state dict")
    for name, view in state.items():
        if type(view) is not _View:
            raise ValueError(f"{name!r:.80} is a {type(view).__name__}")
    return state


def _interpret(pickled: bytes) -> object:  # noqa: C901 -- one case per opcode
    """Runs the stack machine of pickle with the few opcodes that describe tensors; nothing foreign is called."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}  # a dict: a list would grow to the largest index
    for opcode, argument, _ in pickletools.genops(pickled):
        match opcode.name:
            case "PROTO" | "STOP":
                pass
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = "0123".index(opcode.name[-1]) if opcode.name[-1].isdigit() else 0
                stack.append(_pop(stack, count))
            case "TUPLE":
                stack.append(_pop_to_mark(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                _set_items(stack, _pop(stack, 2))
            case "SETITEMS":
                _set_items(stack, _pop_to_mark(stack))
            case "BUILD":
                stack.pop()  # attributes of the OrderedDict: the versions of the modules
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                if argument not in (_DICT, _TENSOR, *_DTYPES):
                    raise ValueError(f"{argument!r:.80}")
                stack.append(argument)
            case "BINPERSID":
                stack.append(_storage_key(stack.pop()))
            case "REDUCE":
                function, arguments = _pop(stack, 2)
                stack.append(_call(function, arguments))
            case _:
                raise ValueError(f"pickle's {opcode.name}")
    return stack[-1] if stack else None


def _pop(stack: list[Any], count: int) -> tuple[Any, ...]:
    return tuple([stack.pop() for _ in range(count)][::-1])


def _pop_to_mark(stack: list[Any]) -> tuple[Any, ...]:
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return tuple(items[::-1])


def _storage_key(description: Any) -> _StorageKey:
    """Returns the key of a storage, described as ('storage', torch.FloatStorage, key, device, numel)."""
    word, kind, key, _device, _numel = description
    if word != "storage" or kind not in _DTYPES or type(key) is not str:
        raise ValueError("another kind of storage")
    return _StorageKey(key, _DTYPES[kind])


def _call(function: Any, arguments: Any) -> dict[str, Any] | _View:
    """Returns what one of the two calls of a state dict describes."""
    if function == _DICT and arguments == ():
        return {}
    if function != _TENSOR:
        raise ValueError("a call")
    storage, offset, size, strides, _requires_grad, hooks, *metadata = arguments
    if type(storage) is not _StorageKey or type(size) is not tuple or type(strides) is not tuple or hooks != {}:
        raise ValueError("another kind of tensor")
    # Bits of a lazy view, such as {"neg": True}: its numbers have the other sign than those in the record.
    if any(bits != {} for bits in metadata):
        raise ValueError("a lazily negated or conjugated tensor")
    return _View(storage, offset, size, strides)


def _set_items(stack: list[Any], items: tuple[Any, ...]) -> None:
    target = stack[-1]
    if type(target) is not dict or len(items) % 2 or not all(type(key) is str for key in items[::2]):
        raise ValueError("a dictionary whose keys are not names")
    target.update(zip(items[::2], items[1::2], strict=True))
