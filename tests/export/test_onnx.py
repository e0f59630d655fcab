"""ONNX files are the same bytes for the same weights, and compiled policies the same bits at every call."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from policykd.agents.networks import MLP, ConvNet, Net
from policykd.agents.student import Size, Student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.export import compiled
from policykd.export.compiled import compile_net, compile_policy
from policykd.export.onnx import to_onnx

MakeStudent = Callable[[Size], Student]
TEACHERS = ["bundled:ppo", "bundled:dqn"]


def teacher_net(name: str) -> ConvNet:
    net = load_teacher(name, game="Pong").net
    assert isinstance(net, ConvNet)
    return net


def test_the_file_is_a_teacher_like_any_other(frames: Tensor, tmp_path: Path) -> None:
    net = teacher_net("bundled:ppo")
    content = to_onnx(net)
    (tmp_path / "pong.onnx").write_bytes(content)
    teacher = load_teacher(tmp_path / "pong.onnx", game="Pong")
    assert (teacher.obs_shape, teacher.num_actions) == ((4, 84, 84), 6)
    assert teacher.backend.startswith("onnxruntime ")
    assert compile_policy(teacher, frames) is teacher
    assert content == to_onnx(net)
    model = onnx.load_model_from_string(content)
    assert [(i.name, i.type.tensor_type.elem_type) for i in model.graph.input] == [("obs", onnx.TensorProto.UINT8)]
    assert len(content) == pytest.approx(4 * 1_687_206, rel=0.001)


def test_a_compiled_teacher_gives_the_same_bits_at_every_call(frames: Tensor) -> None:
    """In any batch, at any address, with any number of threads and callers: an overlapped run needs no more."""
    teacher = load_teacher("bundled", game="Pong")
    fast = compile_policy(teacher, frames[:64])
    assert isinstance(fast, Teacher)
    assert (fast.net, fast.sha256) == (teacher.net, teacher.sha256)
    assert (teacher.backend, fast.backend) == (f"torch {torch.__version__}", fast.backend)
    assert fast.backend.startswith("onnxruntime ")
    expected_BA = fast(frames)
    torch.testing.assert_close(expected_BA, teacher(frames), atol=1e-4, rtol=1e-4)
    assert torch.equal(fast(frames.clone()), expected_BA)
    assert torch.equal(torch.cat([fast(obs) for obs in frames.split(16)]), expected_BA)
    shifted = torch.zeros(frames.numel() + 3, dtype=torch.uint8)[3:].view(frames.shape).copy_(frames)
    assert torch.equal(fast(shifted), expected_BA)
    assert torch.equal(fast(frames.movedim(1, -1).contiguous().movedim(-1, 1)), expected_BA)
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(scores_BA, expected_BA) for scores_BA in pool.map(fast, [frames] * 4))
    assert torch.equal(compile_policy(teacher, frames[:64], num_threads=2)(frames), expected_BA)


def test_a_network_that_is_compiled_wrongly_is_refused(
    frames: Tensor, random_student: MakeStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = random_student("1%").net

    def broken(net: Net) -> bytes:
        content: bytes = to_onnx(net)
        model = onnx.load_model_from_string(content)
        model.graph.node[1].attribute[0].ints[:] = [4, 4]
        del model.graph.node[-2]  # the last ReLU
        model.graph.node[-1].input[0] = model.graph.node[-2].output[0]
        return bytes(model.SerializeToString())

    monkeypatch.setattr(compiled, "to_onnx", broken)
    with pytest.raises(FloatingPointError, match=r"onnxruntime .* differs from torch by "):
        compile_net(net, frames)


def test_a_compiled_network_refuses_other_observations(frames: Tensor, random_student: MakeStudent) -> None:
    """X02."""
    net = compile_net(random_student("1%").net, frames)
    with pytest.raises(ValueError, match=r"observations are \(84, 84, 4\), expected a batch of \(4, 84, 84\)"):
        net(frames.movedim(1, -1))
    with pytest.raises(ValueError, match=r"observations are torch.float32, expected uint8 frames from 0 to 255"):
        net(frames / 255.0)
    mlp = compile_net(MLP(4, (8,), 2, activation=nn.ReLU), torch.eye(4))
    with pytest.raises(ValueError, match=r"observations are \(5,\), expected a batch of \(4,\)"):
        mlp(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="observations are NaN or infinite, expected finite numbers"):
        mlp(torch.full((1, 4), torch.nan))


def test_a_compiled_network_returns_outputs_that_are_not_finite() -> None:
    """As torch does: the collector leaves such states out and counts them, and a few of them end no run."""
    net = MLP(2, (2,), 2, activation=nn.ReLU)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(2.0 * torch.eye(2) if parameter.ndim == 2 else torch.zeros(2))
    compiled_net = compile_net(net, torch.eye(2))
    # The first feature of the second state overflows: 2 x infinity in one output, 0 x infinity in the other.
    obs = torch.tensor([[1.0, 2.0], [torch.finfo(torch.float32).max, 2.0]])
    outputs_BA = compiled_net(obs)
    assert outputs_BA.isfinite().tolist() == [[True, True], [False, False]]
    torch.testing.assert_close(outputs_BA, net(obs).detach(), equal_nan=True)


def test_without_the_extra_torch_stays(frames: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher("bundled", game="Pong")
    for package in ("onnx", "onnxruntime"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            assert compile_policy(teacher, frames) is teacher
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"another package: pip install 'policykd\[onnx\]'"):
        to_onnx(teacher_net("bundled"))
