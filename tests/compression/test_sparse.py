import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

from policykd.agents.student import Student, make_student
from policykd.compression.compressors import layers_with_weights
from policykd.compression.pruning import masks_of_largest
from policykd.compression.sparse import load_sparse, pack_sparse
from policykd.io.files import BadFile


@pytest.fixture
def pruned() -> Student:
    student = make_student("1%", 6)
    layers = layers_with_weights(student)
    for layer, mask in zip(layers, masks_of_largest([x.weight for x in layers], 0.9, 1.0), strict=True):
        layer.weight.data *= mask
    return student


def test_what_is_read_is_bit_for_bit_what_was_written(pruned: Student, tmp_path: Path) -> None:
    content = pack_sparse(pruned)
    (tmp_path / "p.npz").write_bytes(content)
    found = load_sparse(tmp_path / "p.npz")
    assert found.shape == pruned.shape
    assert all(torch.equal(t, found.state_dict()[name]) for name, t in pruned.state_dict().items())
    assert content == pack_sparse(found)
    num = sum(p.numel() for p in pruned.parameters())
    assert len(content) < 0.2 * 4 * num  # a tenth of the values, an eighth of a byte for each weight


def test_the_order_in_which_weights_were_registered_does_not_matter(pruned: Student, tmp_path: Path) -> None:
    """Masks that were parametrisations and are removed leave each weight behind its bias."""
    content = pack_sparse(pruned)
    parametrize.register_parametrization(pruned.net.conv1, "weight", torch.nn.Identity())  # type: ignore[arg-type]
    parametrize.remove_parametrizations(pruned.net.conv1, "weight")  # type: ignore[arg-type]
    assert list(pruned.net.conv1.state_dict()) == ["bias", "weight"]  # type: ignore[union-attr]
    assert pack_sparse(pruned) == content


def _with(content: bytes, **members: np.ndarray) -> bytes:
    with np.load(io.BytesIO(content)) as arrays:
        kept = {name: arrays[name] for name in arrays.files} | members
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **kept)
    return buffer.getvalue()


@pytest.mark.parametrize("how", ["cut", "foreign", "values", "mask", "shape", "another", "missing"])
def test_what_is_no_sparse_network_is_refused_in_one_line(how: str, pruned: Student, tmp_path: Path) -> None:
    content, path = pack_sparse(pruned), tmp_path / "p.npz"
    bad = {
        "cut": content[:-200],
        "foreign": b"not a zip",
        "values": _with(content, values=np.zeros(3, np.float32)),
        "mask": _with(content, mask=np.zeros(5, np.uint8)),
        "shape": _with(content, shape=np.frombuffer(b'{"widths": [1, 2]}', np.uint8)),
        "another": _with(content, more=np.zeros(1)),
        "missing": b"",
    }[how]
    if how != "missing":
        path.write_bytes(bad)
    with pytest.raises(BadFile, match=r"p\.npz") as said:
        load_sparse(path)
    assert "\n" not in str(said.value)


def test_objects_are_not_unpickled(pruned: Student, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("mask", "values", "shape"):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.array([{}], object), allow_pickle=True)
    (tmp_path / "p.npz").write_bytes(buffer.getvalue())
    with pytest.raises(BadFile, match="not plain numbers"):
        load_sparse(tmp_path / "p.npz")
