"""ONNX Runtime, NumPy and compiled C give torch's outputs, for every design of network and every activation."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from policykd.agents.networks import MLP, Net
from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.student import SIZES, Size, Student
from policykd.agents.teacher import load_teacher
from policykd.evaluation.real_states import on_policy_states
from policykd.export.c99 import stack_bytes, to_c
from policykd.export.formats import to_npz
from policykd.export.numpy_policy import load
from policykd.export.onnx import to_onnx

Run = Callable[[Tensor], np.ndarray]


def open_onnx(net: Net, folder: Path) -> Run:
    (folder / "policy.onnx").write_bytes(to_onnx(net))
    policy = OnnxPolicy(folder / "policy.onnx")
    return lambda obs: policy(obs).numpy()


def open_numpy(net: Net, folder: Path) -> Run:
    (folder / "policy.npz").write_bytes(to_npz(net))
    policy = load(folder / "policy.npz")
    return lambda obs: policy(obs.numpy())


def open_c(net: Net, folder: Path) -> Run:
    """Compiles without a warning, and needs no more stack than a thread has."""
    header = to_c(net, prefix="pong")
    assert stack_bytes(header) < 256 << 10
    (folder / "policy.h").write_text(header)
    program = str(folder / "program")
    strict = ["gcc", "-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic", "-DPONG_MAIN", "-x", "c"]
    subprocess.run([*strict, str(folder / "policy.h"), "-o", program, "-lm"], check=True, capture_output=True)

    def run(obs: Tensor) -> np.ndarray:
        done = subprocess.run([program], input=obs.numpy().tobytes(), capture_output=True, check=True)
        return np.frombuffer(done.stdout, np.float32).reshape(-1, net.num_actions)

    return run


RUNTIMES = {"onnx": open_onnx, "numpy": open_numpy, "c": open_c}


@torch.inference_mode()
def assert_same(net: Net, run: Run, obs: Tensor) -> None:
    """The same outputs, and the same best action outside ties; a single observation as in a batch."""
    expected = net(obs).numpy()
    found = run(obs)
    tolerance = 1e-4 * max(1.0, np.abs(expected).max() / 10.0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=tolerance)
    np.testing.assert_allclose(run(obs[7:8]), expected[7:8], atol=tolerance)
    best_two = np.sort(expected, axis=1)[:, -2:]
    is_tied = best_two[:, 1] - best_two[:, 0] <= 2 * tolerance
    assert is_tied.mean() < 0.2
    assert ((found.argmax(1) == expected.argmax(1)) | is_tied).all()


@pytest.mark.parametrize("size", ["7%", "1%", "strided", "depthwise", "half", "impala"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_students(
    runtime: str, size: Size, frames: Tensor, random_student: Callable[[Size], Student], tmp_path: Path
) -> None:
    """X01, the short form."""
    net = random_student(size).folded_net()
    assert_same(net, RUNTIMES[runtime](net, tmp_path), frames[:64])


@pytest.mark.parametrize("name", ["bundled:ppo", "bundled:dqn"])
def test_teachers(name: str, frames: Tensor, tmp_path: Path) -> None:
    """X01, the short form."""
    net: Net = load_teacher(name, game="Pong").net  # type: ignore[assignment]
    assert_same(net, open_onnx(net, tmp_path), frames)


@pytest.mark.slow
def test_ten_thousand_states(random_student: Callable[[Size], Student], tmp_path: Path) -> None:
    """X01, the long form."""
    teacher = load_teacher("bundled:ppo", game="Pong")
    frames = on_policy_states(teacher, "Pong", 10_000, seed=0)
    for net in (teacher.net, *(random_student(size).net for size in SIZES)):
        assert_same(net, open_onnx(net, tmp_path), frames)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.ELU, nn.LeakyReLU])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_vectors(runtime: str, activation: type[nn.Module], tmp_path: Path) -> None:
    net = MLP(4, (20, 70), 3, activation=activation)
    obs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert_same(net, RUNTIMES[runtime](net, tmp_path), obs)
