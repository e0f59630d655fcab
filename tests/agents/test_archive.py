"""Files that are not, or no longer, SB3 agents, and files that mean harm: one line, nothing executed."""

import base64
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from policykd.agents.archive import read_archive
from policykd.agents.teacher import load_teacher

BUNDLED = load_teacher(game="Pong").path


def pth(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def write(
    path: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]], compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


class Touch:
    """Leaves a mark where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


DATA = ("data", b"{}")
GOOD = ("policy.pth", pth({"action_net.weight": torch.zeros(6, 512)}))


def link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("data")
    info.external_attr = 0o120777 << 16
    return info


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: None, "cannot be read"),
    "a folder": (lambda p: p.mkdir(), "cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), "not an SB3"),
    "text": (lambda p: p.write_text("hello"), "not an SB3"),
    "a foreign zip": (lambda p: write(p, [("readme.txt", b"")]), "holds no 'data'"),
    "no weights": (lambda p: write(p, [DATA]), "holds no 'policy.pth'"),
    "data is not JSON": (lambda p: write(p, [("data", b"{"), GOOD]), "not an SB3"),
    "data is a list": (lambda p: write(p, [("data", b"[]"), GOOD]), "not an SB3 description"),
    "a foreign policy": (lambda p: write(p, [DATA, ("policy.pth", pth({"w": torch.zeros(3)}))]), "no PPO, A2C or DQN"),
    "not a state dict": (lambda p: write(p, [DATA, ("policy.pth", pth([1]))]), "not a state dict"),
    "two members": (lambda p: write(p, [DATA, GOOD, (zipfile.ZipInfo("data"), b"{ }")]), "two members"),
    "a path outside": (lambda p: write(p, [DATA, GOOD, ("../evil", b"")]), "member path"),
    "an absolute path": (lambda p: write(p, [DATA, GOOD, ("/evil", b"")]), "member path"),
    "a link": (lambda p: write(p, [(link(), b"x"), GOOD]), "link"),
    "a bomb": (lambda p: write(p, [DATA, ("policy.pth", bytes(300 << 20))], zipfile.ZIP_DEFLATED), "unpacks to"),
    "NaN": (lambda p: write(p, [DATA, ("policy.pth", pth({"w": torch.tensor([0.0, torch.nan])}))]), "NaN"),
    "integers": (lambda p: write(p, [DATA, ("policy.pth", pth({"w": torch.zeros(3, dtype=torch.int64)}))]), "float32"),
    "sparse": (lambda p: write(p, [DATA, ("policy.pth", pth({"w": torch.eye(3).to_sparse()}))]), "do not use it"),
    "expanded": (
        lambda p: write(p, [DATA, ("policy.pth", pth({"w": torch.zeros(1).expand(100_000, 100_000)}))]),
        "over fewer numbers",
    ),
    "truncated": (lambda p: p.write_bytes(BUNDLED.read_bytes()[:-1000]), "truncated"),
    "cut in half": (lambda p: p.write_bytes(BUNDLED.read_bytes()[:3_000_000]), "truncated"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_is_one_line_that_names_it(case: str, tmp_path: Path) -> None:
    make, reason = CASES[case]
    path = tmp_path / "agent.zip"
    make(path)
    with pytest.raises(ValueError, match=reason) as error:
        load_teacher(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_archive_is_refused(share: float, tmp_path: Path) -> None:
    content = BUNDLED.read_bytes()
    (tmp_path / "agent.zip").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="truncated"):
        read_archive(tmp_path / "agent.zip")


def test_a_flipped_bit_is_noticed_by_the_zip_or_against_the_card(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    (tmp_path / "a.json").write_text(json.dumps({"sha256": load_teacher(BUNDLED).sha256}))
    content = bytearray(BUNDLED.read_bytes())
    for position in (len(content) // 2, len(content) - 1):
        flipped = content.copy()
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"truncated, or not|sha256"):
            load_teacher(path)


def test_no_pickle_in_an_archive_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Touch(marker)))  # it does its harm to a naive loader
    assert marker.is_dir()
    marker.rmdir()

    write(tmp_path / "a.zip", [DATA, ("policy.pth", pth({"w": Touch(marker)}))])
    with pytest.raises(ValueError, match="more than tensors"):
        read_archive(tmp_path / "a.zip")

    payload = base64.b64encode(pickle.dumps(Touch(marker))).decode()
    data = {"policy_class": {":serialized:": payload}, "zzz": {":serialized:": payload}}
    with zipfile.ZipFile(BUNDLED) as bundled:
        weights = bundled.read("policy.pth")
    write(tmp_path / "b.zip", [("data", json.dumps(data).encode()), ("policy.pth", weights)])
    assert load_teacher(tmp_path / "b.zip").num_actions == 6
    assert not marker.exists()
