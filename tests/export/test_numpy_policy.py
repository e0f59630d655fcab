"""The NumPy runtime gives torch's outputs, also where torch is not installed, and refuses invalid files and inputs."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from policykd.agents.networks import MLP
from policykd.agents.student import Size, Student, make_student
from policykd.export import numpy_policy
from policykd.export.formats import to_npz
from policykd.export.numpy_policy import Policy, load

MakeStudent = Callable[[Size], Student]


def loaded(net: nn.Module, folder: Path) -> Policy:
    path = folder / "student.npz"
    path.write_bytes(to_npz(net, actions=("A", "B")))  # type: ignore[arg-type]
    return load(path)


def test_batches_single_observations_and_layouts(frames: Tensor, random_student: MakeStudent, tmp_path: Path) -> None:
    policy, obs = loaded(random_student("7%").folded_net(), tmp_path), frames.numpy()
    outputs = policy(obs)
    np.testing.assert_allclose(policy(obs[7]), outputs[7], atol=1e-4, rtol=1e-5)
    np.testing.assert_array_equal(policy(obs), outputs)  # a call does not change the policy
    np.testing.assert_allclose(policy(np.asfortranarray(obs)[::-1]), outputs[::-1], atol=1e-4, rtol=1e-5)
    assert policy.act(obs[7]) == outputs[7].argmax()
    empty = policy(obs[:0])
    assert (empty.shape, empty.dtype.name, policy.act(obs[:0]).shape) == ((0, 6), "float32", (0,))


def test_vectors_are_finite_numbers_of_any_precision(tmp_path: Path) -> None:
    net, obs = MLP(4, (16, 16), 2, activation=nn.Tanh), torch.randn(20, 4)
    policy = loaded(net, tmp_path)
    np.testing.assert_allclose(policy(obs.double().numpy()), net(obs).detach().numpy(), atol=1e-5)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"NaN or infinite, expected float32 \(4,\)"):
            policy(np.array([0.0, bad, 0.0, 0.0]))


def test_actions_are_sampled_from_the_policy(frames: Tensor, random_student: MakeStudent, tmp_path: Path) -> None:
    net = random_student("1%").folded_net()
    policy, obs = loaded(net, tmp_path), np.repeat(frames[:1].numpy(), 600, axis=0)
    drawn = policy.act(obs, deterministic=False, rng=np.random.default_rng(0))
    shares = np.bincount(drawn, minlength=6) / len(drawn)
    with torch.inference_mode():
        np.testing.assert_allclose(shares, net(frames[:1]).softmax(-1)[0].numpy(), atol=0.08)
    assert len(set(drawn)) > 1
    with pytest.raises(ValueError, match="sampling needs a generator: rng="):
        policy.act(obs[0], deterministic=False)


def test_other_observations_are_refused(frames: Tensor, tmp_path: Path) -> None:
    """X02: another layout, kind or range is an exception that says what is expected, never an action."""
    policy = loaded(make_student("1%", 6).folded_net(), tmp_path)
    obs = frames[0].numpy()
    not_numbers = np.full(obs.shape, np.nan, np.float32)
    others = (obs / 255.0, (obs / 255.0).astype(np.float32), obs.astype(np.int64), not_numbers, obs > 0)
    layouts = (obs.transpose(1, 2, 0), obs[0], obs[None, None], obs[:3])
    for other in (*others, *layouts, obs.tolist()):
        for play in (policy, policy.act):
            with pytest.raises(
                ValueError, match=r"expected uint8 \(4, 84, 84\) or a batch of them: grey frames from 0"
            ):
                play(other)


def test_neither_torch_nor_policykd_is_needed(frames: Tensor, random_student: MakeStudent, tmp_path: Path) -> None:
    net = random_student("7%").folded_net()
    (tmp_path / "student.npz").write_bytes(to_npz(net))
    shutil.copy(numpy_policy.__file__, tmp_path / "numpy_policy.py")
    np.save(tmp_path / "obs.npy", frames.numpy())
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnxruntime', 'onnx', 'policykd', 'cv2']))\n"
        "import numpy; from numpy_policy import load\n"
        "numpy.save('scores.npy', load('student.npz')(numpy.load('obs.npy')))\n"
        "print(sorted({'torch', 'onnxruntime', 'policykd'} & {n for n, m in sys.modules.items() if m}))"
    )
    environment = {"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    with torch.inference_mode():
        np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), net(frames).numpy(), atol=1e-4, rtol=1e-5)


def test_a_damaged_or_foreign_file_is_refused_in_one_line(tmp_path: Path) -> None:
    content = to_npz(make_student("1%", 6).folded_net())
    path, generator = tmp_path / "student.npz", np.random.default_rng(0)
    cases = [b"", b"hello", content[:1000], content[:-30]]
    for position in generator.integers(len(content), size=60):
        broken = bytearray(content)
        broken[position] ^= 1 << int(generator.integers(8))
        cases.append(bytes(broken))
    lines = []
    for case in cases:
        path.write_bytes(case)
        try:
            load(path)
        except ValueError as error:
            lines.append(str(error))
    assert len(lines) > 50
    assert all(line.startswith(f"{path}: not a valid policy of policykd (") and "\n" not in line for line in lines)


def test_a_file_with_code_or_a_bomb_in_it_is_refused(tmp_path: Path) -> None:
    path, buffer = tmp_path / "student.npz", io.BytesIO()
    np.savez(buffer, about=np.array([print], dtype=object))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("about.npy", bytes(65 << 20))
    with pytest.raises(ValueError, match=r"68,157,440 bytes, the maximum is"):
        load(path)
    with pytest.raises(OSError, match=r"none\.npz"):
        load(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format 2, this numpy_policy.py reads 1"),
        ({"num_actions": 5}, r"outputs of shape \(1, 6\), expected \(1, 5\)"),
        ({"obs_shape": [4, 80, 80]}, "not a valid policy of policykd"),
        ({"obs_shape": [4, 20000, 20000]}, "observations of shape"),
        ({"obs_shape": [4, -84, -84]}, "observations of shape"),
        ({"obs_shape": [4, 500, 500], "stride": 1}, "a layer that is too large"),
    ],
)
def test_an_invalid_description_is_refused(change: dict[str, object], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "student.npz"
    path.write_bytes(to_npz(make_student("1%", 6).folded_net()))
    with np.load(path) as arrays:
        held = dict(arrays)
    about = json.loads(held.pop("about").tobytes()) | change
    about["layers"][0]["stride"] = about.get("stride", 4)
    np.savez(path, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **held)
    with pytest.raises(ValueError, match=reason):
        load(path)
