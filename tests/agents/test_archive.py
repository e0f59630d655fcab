"""Files that are not, or no longer, SB3 agents; test_malicious.py has those that mean harm."""

import hashlib
import io
import random
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from policykd.agents.archive import MAX_FILE, MAX_MEMBER, read_archive, read_members
from policykd.agents.rebuild import rebuild
from policykd.agents.teacher import load_teacher
from policykd.io.files import BadFile

BUNDLED = load_teacher(game="Pong").path
DATA = ("data", b'{"clip_range": 0.2, "zzz": {":serialized:": "gASVAAAA", "n": 3}}')


def pth(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def write(path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


POLICY = ("policy.pth", pth({"action_net.weight": torch.randn(6, 512), "action_net.bias": torch.zeros(6)}))


def unpacked(path: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(path.with_suffix(""))
    return path.with_suffix("")


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: None, "No such file"),
    "an empty folder": (lambda p: p.mkdir(), "No such file"),
    "empty": (lambda p: p.write_bytes(b""), "not an SB3"),
    "text": (lambda p: p.write_text("hello"), "not an SB3"),
    "a foreign zip": (lambda p: write(p, [("readme.txt", b"")]), "named 'data'"),
    "no weights": (lambda p: write(p, [DATA]), "named 'policy.pth'"),
    "no JSON": (lambda p: write(p, [("data", b"{"), POLICY]), "`data`"),
    "no text": (lambda p: write(p, [("data", b"\xff\xff"), POLICY]), "`data`"),
    "a list": (lambda p: write(p, [("data", b"[]"), POLICY]), "`data`: invalid"),
    "not a state dict": (lambda p: write(p, [DATA, ("policy.pth", pth([1]))]), "not a state dict"),
    "an empty state dict": (lambda p: write(p, [DATA, ("policy.pth", pth({}))]), "not a state dict"),
    "a list of weights": (lambda p: write(p, [DATA, ("policy.pth", pth({"w": [torch.zeros(3)]}))]), "not a state dict"),
    "integers": (lambda p: write(p, [DATA, ("policy.pth", pth({"w": torch.zeros(3).long()}))]), "LongStorage"),
    "half precision that is infinite": (
        lambda p: write(p, [DATA, ("policy.pth", pth({"w": torch.full((3,), 1e9).half()}))]), "infinite"
    ),
    "a number beyond float32": (
        lambda p: write(p, [DATA, ("policy.pth", pth({"w": torch.full((3,), 1e300, dtype=torch.float64)}))]), "infinite"
    ),
    "a negative bit": (
        lambda p: write(p, [DATA, ("policy.pth", pth({"w": torch.ones(3, dtype=torch.cfloat).conj().imag}))]),
        "lazily negated",
    ),
    "of before torch 1.6": (
        lambda p: write(p, [DATA, ("policy.pth", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")]), "not a zip"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_is_one_line_that_names_it(case: str, tmp_path: Path) -> None:
    make, reason = CASES[case]
    path = tmp_path / "agent.zip"
    make(path)
    with pytest.raises(ValueError, match=reason) as error:
        read_archive(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_record_with_two_types_is_refused(tmp_path: Path) -> None:
    """The same bytes, read as numbers of two types, could be several times as large as the file."""
    weights = torch.arange(8.0)
    content = pth({"a": weights[:4], "b": weights[:4].half()})  # two records
    fixed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(fixed, "w") as target:
        for member in source.infolist():
            inner = source.read(member)
            if member.filename.endswith("data.pkl"):
                inner = inner.replace(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000")
            target.writestr(member.filename, inner)
    with pytest.raises(BadFile, match="has two types"):
        read_archive(write(tmp_path / "agent.zip", [DATA, ("policy.pth", fixed.getvalue())]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_sb3_loads_them(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = torch.linspace(-3.0, 5.0, 40).to(dtype)
    write(tmp_path / "agent.zip", [DATA, ("policy.pth", pth({"a": weights.view(5, 8), "b": weights[:8].clone()}))])
    tensors = read_archive(tmp_path / "agent.zip").tensors
    layer = torch.nn.Linear(8, 5)
    layer.load_state_dict({"weight": weights.view(5, 8), "bias": weights[:5]})  # copies into float32
    assert tensors["a"].dtype == torch.float32
    assert torch.equal(tensors["a"], layer.weight)


def test_tensors_are_those_of_torch(tmp_path: Path) -> None:
    """Whatever their layout and however many names share them, and without the file's pickles."""
    shared = torch.randn(3, 4, 5, 6)
    state = {
        "a.weight": shared,
        "b.weight": shared,
        "c.weight": shared.contiguous(memory_format=torch.channels_last),
        "a part": torch.randn(10)[2:7],
        "turned": torch.randn(3, 5).T,
        "one": torch.ones(1, 1),
    }
    path = write(tmp_path / "agent.zip", [DATA, ("policy.pth", pth(state))], zipfile.ZIP_DEFLATED)
    found = read_archive(path)
    assert list(found.tensors) == list(state)
    for name, tensor in state.items():
        assert torch.equal(found.tensors[name], tensor)
        assert found.tensors[name].stride() == tensor.stride()
    assert found.data.entries == {"clip_range": 0.2, "zzz": {":serialized:": "", "n": 3}}


def test_a_module_s_state_dict_is_read_as_torch_saves_it(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Linear(3, 4))
    found = read_archive(write(tmp_path / "agent.zip", [DATA, ("policy.pth", pth(net.state_dict()))]))
    for name, tensor in net.state_dict().items():
        assert torch.equal(found.tensors[name], tensor)


def test_a_folder_is_read_as_the_zip_that_it_was(tmp_path: Path) -> None:
    (tmp_path / "agent.zip").write_bytes(BUNDLED.read_bytes())
    folder = unpacked(tmp_path / "agent.zip")
    zipped, loose = read_archive(BUNDLED), read_archive(folder)
    assert zipped.data == loose.data
    assert all(torch.equal(tensor, loose.tensors[name]) for name, tensor in zipped.tensors.items())
    assert zipped.sha256 == read_members(BUNDLED)[0] == hashlib.sha256(BUNDLED.read_bytes()).hexdigest()
    printed = subprocess.run(
        "sha256sum policy.pth data | sha256sum", shell=True, cwd=folder, capture_output=True, check=True
    )
    assert loose.sha256 == read_members(folder)[0] == printed.stdout.decode().split()[0]
    assert rebuild(loose)[1] == "PPO"


@pytest.mark.parametrize("member", ["data", "policy.pth"])
def test_a_folder_is_held_to_the_same_limits(member: str, tmp_path: Path) -> None:
    folder = unpacked(write(tmp_path / "agent.zip", [DATA, POLICY]))
    with (folder / member).open("ab") as file:
        file.truncate(MAX_MEMBER[member] + 1)
    with pytest.raises(ValueError, match=f"{member}: larger than {MAX_MEMBER[member]:,} bytes"):
        read_archive(folder)
    (folder / member).unlink()
    with pytest.raises(ValueError, match=f"{member}: No such file"):
        read_archive(folder)


def test_the_limits_leave_room_for_the_largest_atari_agent() -> None:
    """QR-DQN, 200 quantiles of 18 actions: two networks; and Adam's two numbers a weight of the first."""
    parameters = 1_684_128 + 200 * 18 * 513
    assert 2 * 4 * parameters < MAX_MEMBER["policy.pth"]
    assert 4 * 4 * parameters < MAX_FILE


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_any_damage_is_one_line_or_none(kind: str, tmp_path: Path) -> None:
    """Flips bytes of a small archive at random; what can still be read has the weights that were saved."""
    path = write(tmp_path / "agent.zip", [DATA, ("policy.pth", pth({"w": torch.arange(12.0).view(3, 4)}))])
    damaged = path if kind == "zip" else unpacked(path) / "policy.pth"
    content, draw = damaged.read_bytes(), random.Random(0)
    refused: list[str] = []
    for _ in range(600):
        broken = bytearray(content)
        for _ in range(draw.choice((1, 1, 3))):
            broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
        damaged.write_bytes(broken[: draw.choice((len(broken), draw.randrange(len(broken))))])
        try:
            found = read_archive(path if kind == "zip" else damaged.parent)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert torch.equal(found.tensors["w"].flatten(), torch.arange(12.0))
    assert len(refused) > 400
    assert all(str(tmp_path) in line and "\n" not in line for line in refused)
