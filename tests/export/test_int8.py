"""int8 networks take the float32 ones' actions, in a quarter of the bytes, and are read like any ONNX file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.student import Size, Student, make_student
from policykd.agents.teacher import load_teacher
from policykd.evaluation.real_states import on_policy_states
from policykd.export.int8 import quantise, quantise_weights
from policykd.export.int8_weights import equalise, values_of
from policykd.export.onnx import to_onnx


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return on_policy_states(load_teacher("bundled:ppo", game="Pong"), "Pong", 128, seed=7)


def sharp(size: Size, frames: Tensor) -> Student:
    """Returns a student whose actions are not all nearly tied, as those of an untrained one are."""
    student = make_student(size, 6, seed=1)
    student.fit_input_normalization(frames[:, -1])
    with torch.no_grad():
        scores_BA = student(frames)
        last = [m for m in student.modules() if isinstance(m, nn.Linear)][-1]
        spread = scores_BA.std(0)
        last.weight.div_(spread[:, None])
        last.bias.sub_(scores_BA.mean(0)).div_(spread)
    return student


@pytest.mark.parametrize("size", ["7%", "half", pytest.param("impala", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", [quantise, quantise_weights])
def test_it_acts_as_before_in_a_quarter_of_the_bytes(
    size: Size, how: Callable[[bytes, np.ndarray], bytes], frames: Tensor, tmp_path: Path
) -> None:
    student = sharp(size, frames)
    plain = to_onnx(student.folded_net())
    content = how(plain, frames[::2].numpy())
    path = tmp_path / "int8.onnx"
    path.write_bytes(content)
    policy = OnnxPolicy(path)
    with torch.inference_mode():
        expected, found = student(frames[1::2]), policy(frames[1::2])
    assert (found - expected).abs().mean() < (0.03 if how is quantise_weights else 0.15)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.9
    assert len(content) < (0.3 if size == "7%" else 0.6) * len(plain)


def test_frames_go_in_as_bytes_and_the_arithmetic_is_of_integers(frames: Tensor) -> None:
    model = onnx.load_model_from_string(quantise(to_onnx(make_student("7%", 6).folded_net()), frames.numpy()))
    kinds = [node.op_type for node in model.graph.node]
    assert "Cast" not in kinds
    first = next(node for node in model.graph.node if "obs" in node.input)
    assert first.op_type == "DequantizeLinear"
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = [t for t in held.values() if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert len(weights) == 4
    assert all(np.abs(onnx.numpy_helper.to_array(t).astype(int)).max() <= 64 for t in weights)  # reduce_range


def test_equal_ranges_leave_the_function_as_it_is(frames: Tensor) -> None:
    plain = onnx.load_model_from_string(to_onnx(sharp("7%", frames).folded_net()))
    (before,) = values_of(plain, ["scores"], frames.numpy())
    equalise(plain, frames.numpy())
    after, first = values_of(plain, ["scores", "x2"], frames.numpy())
    np.testing.assert_allclose(after, before, atol=1e-3, rtol=1e-4)
    ranges = first.max(axis=(0, 2, 3))
    np.testing.assert_allclose(ranges[ranges > 0], ranges.max(), rtol=1e-4)


def test_nothing_to_calibrate_on_and_nothing_to_quantise_is_said(frames: Tensor) -> None:
    with pytest.raises(ValueError, match="int8: a network of one layer, which stays float32"):
        quantise(to_onnx(make_student((), 3, (5,)).folded_net()), np.ones((4, 5), np.float32))
    with pytest.raises(ValueError, match="quantisation needs states to calibrate on"):
        quantise(to_onnx(make_student("1%", 6).folded_net()), frames[:0].numpy())
