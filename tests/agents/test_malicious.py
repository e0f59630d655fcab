"""Archives that mean harm: each does it to a naive loader; read here, it is one line, at once, in little memory.

`python tests/agents/test_malicious.py` prints what every case did to the naive loader and what it cost us. Both happen
in forked children of one process that has everything imported; memory is the child's peak beyond what it was born with.
"""

import base64
import io
import json
import math
import os
import pickle
import pickletools
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from policykd.agents.teacher import load_teacher
from policykd.cli.errors import BAD_FILE, run_cli

MIB = 1 << 20
BUNDLED = Path(__file__).parents[2] / "agents" / "pretrained" / "ppo-Pong.zip"
EXECUTED = "executed"
"""the folder that a pickle makes next to the archive when it is executed"""
HEAD = torch.randn(2, 64)
STATE = {
    "mlp_extractor.policy_net.0.weight": torch.randn(64, 4),
    "mlp_extractor.policy_net.0.bias": torch.randn(64),
    "action_net.weight": HEAD,
    "action_net.bias": torch.randn(2),
}
DATA = b'{"clip_range": 0.2}'
VARIABLES, OPTIMIZER = "pytorch_variables.pth", "policy.optimizer.pth"


def pth(state: object = STATE) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def pth_of(pickled: bytes, numbers: bytes = bytes(1024)) -> bytes:
    return packed([("archive/data.pkl", pickled), ("archive/data/0", numbers), ("archive/version", b"3\n")])


def packed(members: list[tuple[str | zipfile.ZipInfo, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content, compression)
    return buffer.getvalue()


def agent(*others: tuple[str | zipfile.ZipInfo, bytes], data: bytes = DATA, policy: bytes | None = None) -> bytes:
    return packed([("data", data), ("policy.pth", pth() if policy is None else policy), *others])


def head(weight: torch.Tensor) -> bytes:
    """Returns an archive with other weights in its last layer."""
    return agent(policy=pth(STATE | {"action_net.weight": weight}))


def evil() -> bytes:
    return pth({"w": Touch()})


def bomb(name: str, mib: int, filler: bytes = bytes(MIB)) -> bytes:
    """Returns an archive with a member that unpacks to much; the same block again and again, so it is quickly made."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(filler) + deflate.flush(zlib.Z_FULL_FLUSH)
    content = block * mib + deflate.flush(zlib.Z_FINISH)
    about = struct.pack("<HHHHHLLLHH", 20, 0, 8, 0, 33, 0, len(content), mib * len(filler), len(name), 0)
    local = b"PK\3\4" + about + name.encode() + content
    directory = b"PK\1\2" + struct.pack("<H", 20) + about + bytes(14) + name.encode()
    return local + directory + b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, 1, 1, len(directory), len(local), 0)


def largest(data: bytes) -> bytes:
    """Returns an archive of which the most is read that is read of any."""
    members: list[tuple[str | zipfile.ZipInfo, bytes]] = [("data", data % (b"A" * (8 * MIB - 99)))]
    return packed([*members, ("policy.pth", bytes(32 * MIB))], zipfile.ZIP_DEFLATED)


def deflated(mib: int) -> bytes:
    """Returns a `policy.pth` whose numbers are compressed."""
    count = b"J" + struct.pack("<l", mib * MIB // 4)
    records: list[tuple[str | zipfile.ZipInfo, bytes]] = [("archive/data/0", bytes(mib * MIB))]
    records += [("archive/data.pkl", tensor_pickle(count + b"\x85", ONE, count)), ("archive/version", b"3\n")]
    return packed(records, zipfile.ZIP_DEFLATED)


def crowded(count: int, length: int) -> bytes:
    """Returns an archive of many empty members with names of some length."""
    entry = struct.pack("<HHHHHHLLLHHHHHLL", 20, 20, 0, 0, 0, 33, 0, 0, 0, length, 0, 0, 0, 0, 0, 0)
    directory = (b"PK\1\2" + entry + b"x" * length) * count
    end = b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, 65535, 65535, len(directory), 0, 0)
    return directory + end


def encrypted() -> bytes:
    content = bytearray(packed([("data", DATA)]))
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + flags] |= 1
    return bytes(content)


def lzma_of_a_gigabyte() -> bytes:
    """Returns an archive that claims that reading it takes a dictionary of a gigabyte."""
    content = bytearray(packed([("data", DATA)], zipfile.ZIP_LZMA))
    content[39:43] = struct.pack("<L", 1 << 30)
    return bytes(content)


def twice() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return agent((zipfile.ZipInfo("data"), b"{ }"))


def linked(path: Path) -> bytes:
    (path.parent / "secret").write_bytes(b"secret")
    info = zipfile.ZipInfo("data")
    info.external_attr = 0o120777 << 16
    return packed([(info, f"{path.parent}/secret".encode()), ("policy.pth", pth())])


def cut(share: float) -> bytes:
    content = BUNDLED.read_bytes()
    return content[: int(share * len(content))]


class Touch:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (EXECUTED,)


def payload(key: str) -> bytes:
    code = base64.b64encode(pickle.dumps(Touch())).decode()
    return json.dumps({"clip_range": 0.2, key: {":type:": "function", ":serialized:": code}}).encode()


def tensor_pickle(size: bytes, strides: bytes, numel: bytes) -> bytes:
    """Returns the pickle of a state dict of one tensor, given pickle for its tuples and its storage's length."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu" + numel + b"tQ"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\0"
        + size
        + strides
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\2}X\1\0\0\0w" + tensor + b"s."


def described(size: bytes, numel: bytes) -> bytes:
    return agent(policy=pth_of(tensor_pickle(size + b"\x85", ONE, numel)))


ONE = b"K\1\x85"
"""pickle for (1,)"""
SMALL, HUGE = b"M\0\1", b"J\xff\xff\xff\x7f"
"""pickle for 256 and 2^31 - 1"""
ENDLESS = b"q\0h\0\x86" * 40
"""makes a pair of what is on the stack, and a pair of these, and so on: 2^40 leaves"""
ENDLESS_KEY = b"\x80\2})" + ENDLESS + b"K\1s."
ENDLESS_SHAPE = tensor_pickle(b"K\1" + ENDLESS, ONE, SMALL)
HUGE_BYTES = b"\x80\2cbuiltins\nbytearray\n\x8a\5\0\0\0\0\1\x85R."
HUGE_MEMO = b"\x80\2)r\xff\xff\xff\x0f."
LONG = b"\x80\2" + b"}" * 65_000 + b"."


def naive_data(path: Path) -> None:
    for entry in json.loads(member("data")(path)).values():
        if isinstance(entry, dict) and ":serialized:" in entry:
            pickle.loads(base64.b64decode(entry[":serialized:"]))


def member(name: str) -> Callable[[Path], bytes]:
    return lambda path: zipfile.ZipFile(path).read(name)


def naive_pth(name: str = "policy.pth", *, weights_only: bool = False) -> Callable[[Path], Any]:
    return lambda path: torch.load(io.BytesIO(member(name)(path)), weights_only=weights_only)


def naive_directory(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(member("policy.pth")(path)))


def naive_pickle(path: Path) -> object:
    return pickle.loads(naive_directory(path).read("archive/data.pkl"))


def hashed(path: Path) -> None:
    """Reads pickle's words as one might, and makes a set of the shapes."""
    stack: list[Any] = [1]
    for opcode, _, _ in pickletools.genops(naive_directory(path).read("archive/data.pkl")):
        stack += [(stack[-1], stack[-1])] if opcode.name == "TUPLE2" else []
    set(stack)


def naive_weights(path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = naive_pth(weights_only=True)(path)
    return weights


def naive_unpack(path: Path) -> bool:
    """Unpacks everything and returns whether it wrote outside the folder, or read what was outside."""
    folder = path.parent / "unpacked"
    for m in zipfile.ZipFile(path).infolist():
        (folder / m.filename).parent.mkdir(exist_ok=True, parents=True)
        if (m.external_attr >> 16) & 0o170000 == 0o120000:
            (folder / m.filename).symlink_to(zipfile.ZipFile(path).read(m).decode())
        else:
            (folder / m.filename).write_bytes(zipfile.ZipFile(path).read(m))
    return (path.parent / "evil").exists() or (folder / "data").read_bytes() == b"secret"


def into_a_network(path: Path) -> bool:
    """Copies weights as many loaders do and returns whether they changed, or broadcast, without a word."""
    found = naive_weights(path)["action_net.weight"]
    layer = torch.nn.Linear(64, 2)
    with torch.no_grad():
        layer.weight.copy_(found)
    return not torch.equal(layer.weight, HEAD)


def first_and_last_differ(path: Path) -> bool:
    content = path.read_bytes()
    start = content.index(b"PK\3\4") + 34
    return zipfile.ZipFile(path).read("data") != content[start : start + len(DATA)]


def one_is_two(path: Path) -> bool:
    """Changes one weight and returns whether another one changed with it."""
    weight = naive_weights(path)["action_net.weight"]
    before = weight.clone()
    weight[0, 1] += 1
    return int((weight != before).sum()) > 1


def plays(path: Path) -> bool:
    """Says whether an action is chosen that looks like any other."""
    return (naive_weights(path)["action_net.weight"] @ torch.ones(64)).argmax().item() in (0, 1)


def loads(path: Path) -> bool:
    return bool(naive_weights(path))


def loads_nothing(path: Path) -> bool:
    return naive_weights(path) == {}


def needs_gradients(path: Path) -> bool:
    """Says whether an optimizer would go on to train the teacher."""
    return naive_weights(path)["action_net.weight"].requires_grad


def clones(path: Path) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in naive_weights(path).values()]


def changed_weights(path: Path) -> bool:
    """Reads the pth of an unpacked archive, as it lies, and returns whether its weights are others now."""
    found = torch.load(path / "policy.pth", weights_only=True)
    return not all(torch.equal(found[name], STATE[name]) for name in STATE)


def multiply(path: Path) -> None:
    sparse = naive_weights(path)["action_net.weight"]
    torch.mm(sparse, torch.ones(64, 1))


def broken_csr() -> torch.Tensor:
    columns = torch.tensor([2**30, 2**30 + 1])
    with torch.sparse.check_sparse_tensor_invariants(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beta
        return torch.sparse_csr_tensor(torch.tensor([0, 1, 2]), columns, torch.ones(2), size=(2, 64))


def flipped(path: Path) -> None:
    """Writes an unpacked archive whose weights lost a bit."""
    path.mkdir()
    content = bytearray(pth())
    content[content.index(HEAD.numpy().tobytes()) + 3] ^= 64
    (path / "policy.pth").write_bytes(content)
    (path / "data").write_bytes(DATA)


def flipped_beside_its_card(path: Path) -> None:
    """Writes an archive one byte of which is not what its card's hash is of, in a place that zip does not check."""
    content = bytearray(agent())
    path.with_suffix(".json").write_text(json.dumps({"sha256": load_teacher(BUNDLED).sha256}))
    content[content.rindex(b"PK\1\2") + 12] ^= 1  # the time of writing
    path.write_bytes(content)


def twice_in_memory(path: Path) -> io.BytesIO:
    return io.BytesIO(bytearray(path.read_bytes()))


def holes(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def shared() -> bytes:
    weight, bias = torch.randn(512, 512), torch.randn(512)
    layers = {f"q_net.q_net.{2 * i}.{part}": t for i in range(300) for part, t in (("weight", weight), ("bias", bias))}
    return pth(layers)


@dataclass(frozen=True)
class Case:
    make: Callable[[Path], bytes | None]
    """returns the archive, or writes it itself"""
    harm: str
    """what the naive loader suffers"""
    naive: Callable[[Path], Any]
    reason: str
    """in our one line; empty: the archive is used, and the code in it is not"""


TRACEBACK, MEMORY, TIME, RUNS, WRONG = "traceback", "memory", "time", "code runs", "silently wrong"

CASES: dict[str, Case] = {
    # the marks of an ordinary archive are in these places too, so they are not a reason to refuse it
    "code in a known key": Case(lambda p: agent(data=payload("policy_class")), RUNS, naive_data, ""),
    "code in an unknown key": Case(lambda p: agent(data=payload("zzz")), RUNS, naive_data, ""),
    "code in pytorch_variables.pth": Case(lambda p: agent((VARIABLES, evil())), RUNS, naive_pth(VARIABLES), ""),
    "code in policy.optimizer.pth": Case(lambda p: agent((OPTIMIZER, evil())), RUNS, naive_pth(OPTIMIZER), ""),
    "code in policy.pth": Case(lambda p: agent(policy=evil()), RUNS, naive_pth(), "mkdir"),
    "code as policy.pth": Case(lambda p: agent(policy=pickle.dumps(Touch())), RUNS, naive_pth(), "not a zip"),
    "bomb: policy.pth": Case(lambda p: bomb("policy.pth", 200), MEMORY, member("policy.pth"), "unpacks to"),
    "bomb: data": Case(lambda p: bomb("data", 200), MEMORY, member("data"), "unpacks to"),
    "bomb: a member that is not read": Case(lambda p: bomb("zzz", 200), MEMORY, member("zzz"), "unpacks to"),
    "bomb: 400 MB of JSON": Case(lambda p: bomb("data", 133, b"[]," * MIB), MEMORY, member("data"), "unpacks to"),
    "bomb: inside policy.pth": Case(lambda p: agent(policy=deflated(128)), MEMORY, naive_weights, "compressed"),
    "bomb: LZMA": Case(lambda p: lzma_of_a_gigabyte(), MEMORY, member("data"), "uncommon"),
    "50,000 members": Case(lambda p: crowded(50_000, 1000), MEMORY, zipfile.ZipFile, "directory"),
    "150,000 records": Case(lambda p: agent(policy=crowded(150_000, 150)), MEMORY, naive_directory, "directory"),
    "a file of 10 GB": Case(lambda p: holes(p, 10 << 30), MEMORY, Path.read_bytes, "larger than"),
    "a file of 96 MiB": Case(lambda p: holes(p, 96 * MIB), MEMORY, twice_in_memory, "larger than"),
    "the most that is read": Case(lambda p: largest(b'{"x": "%s"}'), TRACEBACK, naive_weights, "not pickles"),
    "the most, in pickles": Case(lambda p: largest(b'{":serialized:": "%s"}'), TRACEBACK, naive_weights, "not a zip"),
    "a pipe": Case(lambda p: os.mkfifo(p), TIME, Path.read_bytes, "not a regular file"),
    "a member twice": Case(lambda p: twice(), WRONG, first_and_last_differ, "appears twice"),
    "a path outside": Case(lambda p: agent(("../evil", b"")), WRONG, naive_unpack, "path outside"),
    "an absolute path": Case(lambda p: agent((f"{p.parent}/evil", b"")), WRONG, naive_unpack, "path outside"),
    "a link": Case(linked, WRONG, naive_unpack, "link"),
    "encrypted": Case(lambda p: encrypted(), TRACEBACK, member("data"), "encrypted"),
    "cut to 10 %": Case(lambda p: cut(0.1), TRACEBACK, member("data"), "truncated"),
    "cut to 50 %": Case(lambda p: cut(0.5), TRACEBACK, member("data"), "truncated"),
    "cut to 90 %": Case(lambda p: cut(0.9), TRACEBACK, member("data"), "truncated"),
    "cut to 99.99 %": Case(lambda p: cut(0.9999), TRACEBACK, member("data"), "truncated"),
    "a bit of an unpacked policy.pth": Case(flipped, WRONG, changed_weights, "CRC"),
    "a bit of an archive with a card": Case(flipped_beside_its_card, WRONG, loads, "its card's"),
    "sparse": Case(lambda p: head(HEAD.to_sparse()), TRACEBACK, into_a_network, "sparse"),
    "sparse, broken": Case(lambda p: head(broken_csr()), "SIGSEGV", multiply, "sparse"),
    "expanded": Case(lambda p: head(torch.zeros(1).expand(100_000, 100_000)), MEMORY, clones, "over fewer"),
    "overlapping": Case(lambda p: head(torch.zeros(65).as_strided((2, 64), (1, 1))), WRONG, one_is_two, "over fewer"),
    "complex": Case(lambda p: head(HEAD * 1j), WRONG, into_a_network, "Complex"),
    "integers": Case(lambda p: head(HEAD.long()), WRONG, into_a_network, "Long"),
    "0-dim": Case(lambda p: head(torch.tensor(1.0)), WRONG, into_a_network, "no shape"),
    "a subclass": Case(lambda p: head(torch.nn.Parameter(HEAD)), WRONG, needs_gradients, "_rebuild_parameter"),
    "a huge shape": Case(lambda p: described(HUGE, SMALL), TRACEBACK, naive_weights, "over fewer"),
    "a huge storage": Case(lambda p: described(HUGE, HUGE), TRACEBACK, naive_weights, "over fewer"),
    "300 layers that are one": Case(lambda p: agent(policy=shared()), MEMORY, clones, "share"),
    "NaN": Case(lambda p: head(HEAD * math.nan), WRONG, plays, "NaN"),
    "infinite": Case(lambda p: head(HEAD * math.inf), WRONG, plays, "infinite"),
    "deep JSON": Case(lambda p: agent(data=b"[" * 500_000), TRACEBACK, naive_data, "`data`"),
    "much JSON": Case(lambda p: agent(data=b"[%s0]" % (b"[]," * 2 * MIB)), MEMORY, naive_data, "not pickles"),
    "a number of 500,000 digits": Case(lambda p: agent(data=b"9" * 500_000), TRACEBACK, naive_data, "`data`"),
    "pickle: 4 GB of bytes": Case(lambda p: agent(policy=pth_of(HUGE_BYTES)), MEMORY, naive_weights, "bytearray"),
    "pickle: a huge memo": Case(lambda p: agent(policy=pth_of(HUGE_MEMO)), MEMORY, naive_pickle, "not a state dict"),
    "pickle: an endless key": Case(lambda p: agent(policy=pth_of(ENDLESS_KEY)), TIME, naive_weights, "not names"),
    "pickle: an endless shape": Case(lambda p: agent(policy=pth_of(ENDLESS_SHAPE)), TIME, hashed, "no shape"),
    "pickle: as long as is read": Case(lambda p: agent(policy=pth_of(LONG)), WRONG, loads_nothing, "not a state dict"),
}


def in_a_child(
    work: Callable[[], object], warm_up: Callable[[], object] = lambda: None
) -> tuple[int, str, float, float]:
    """Returns the exit status, standard error, seconds and the MiB that the child's memory grew by at its peak."""
    with tempfile.TemporaryFile() as stderr, tempfile.TemporaryFile() as report:
        if (pid := os.fork()) == 0:
            os.dup2(stderr.fileno(), 2)
            warm_up()
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            before, began = memory("VmRSS"), time.process_time()
            status = exit_status(work)
            os.write(report.fileno(), json.dumps([time.process_time() - began, memory("VmHWM") - before]).encode())
            os._exit(status)
        _, status = os.waitpid(pid, 0)
        stderr.seek(0)
        report.seek(0)
        seconds, mib = json.loads(report.read() or b"[0, 0]")
        return status, stderr.read().decode(), seconds, mib


def exit_status(work: Callable[[], object]) -> int:
    """Returns what a process that does the work exits with; 70 is a traceback."""
    try:
        work()
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
        return 70
    return 0


def memory(what: str) -> float:
    """Returns this process's memory in MiB: VmRSS now, VmHWM at its peak."""
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 1024


def suffer(case: Case, path: Path) -> str:
    """Returns what happens to the naive loader, given 100 MiB and a few seconds."""

    def work() -> None:
        os.chdir(path.parent)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 100 * MIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(1 if case.harm == TIME else 600)
        if case.naive(path) is True:
            sys.exit(71)

    status, stderr, _, _ = in_a_child(work)
    if (path.parent / EXECUTED).exists():
        (path.parent / EXECUTED).rmdir()
        return RUNS
    if os.WIFSIGNALED(status):
        return {signal.SIGALRM: TIME}.get(signal.Signals(os.WTERMSIG(status)), signal.Signals(os.WTERMSIG(status)).name)
    if "MemoryError" in stderr or "can't allocate memory" in stderr:
        return MEMORY
    return {0: "nothing", 70: TRACEBACK, 71: WRONG}[os.WEXITSTATUS(status)] + f" ({stderr})" * bool(stderr)


def measure(names: list[str]) -> None:
    """Prints a JSON line a case."""
    for name in names:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            path, ordinary = Path(folder) / "agent.zip", Path(folder) / "ordinary.zip"
            ordinary.write_bytes(agent())
            if content := case.make(path):
                path.write_bytes(content)
            harm = suffer(case, path)
            for mark in ("evil", "unpacked/evil"):
                (Path(folder) / mark).unlink(missing_ok=True)

            def warm_up(ordinary: Path = ordinary) -> None:
                os.chdir(ordinary.parent)
                load_teacher(ordinary)  # a fork maps libraries again when it first runs them: not what a file costs

            def read(path: Path = path) -> None:
                run_cli(lambda: print(load_teacher(path).num_actions, file=sys.stderr))

            status, stderr, seconds, mib = in_a_child(read, warm_up)
            executed = any((Path(folder) / mark).exists() for mark in (EXECUTED, "evil", "unpacked/evil"))
            row = {"case": name, "harm": harm, "status": status, "line": stderr, "seconds": seconds, "MiB": mib}
            print(json.dumps(row | {"executed": executed}), flush=True)


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    if sys.platform != "linux":
        pytest.skip("/proc is Linux's")
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["case"]: row for row in found}


@pytest.mark.parametrize("name", CASES)
def test_a_malicious_archive(name: str, rows: dict[str, dict[str, Any]]) -> None:
    row, case = rows[name], CASES[name]
    assert row["harm"].startswith(case.harm)
    assert not row["executed"]
    assert row["seconds"] < 10  # of CPU time: an attack on time would take hours
    assert row["MiB"] < 100
    assert row["line"].count("\n") == 1
    if case.reason:
        assert os.waitstatus_to_exitcode(row["status"]) == BAD_FILE
        assert re.search(case.reason, row["line"])
        assert "agent.zip" in row["line"]
    else:  # an ordinary archive holds pickles in these places too, so they are not a reason to refuse it
        assert (row["status"], row["line"]) == (0, "2\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(sys.argv[1:] or list(CASES))
