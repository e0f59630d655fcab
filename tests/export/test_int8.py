"""int8 networks take the float32 ones' actions, in a quarter of the bytes, and are read like any ONNX file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.student import Size, Student
from policykd.export.int8 import _compensated_rounding, quantize_static, quantize_weights
from policykd.export.onnx import to_onnx

MakeStudent = Callable[[Size], Student]
Quantize = Callable[[bytes, np.ndarray], bytes]


@pytest.mark.parametrize("size", ["7%", "half", pytest.param("impala", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("quantize", "max_error", "min_agreement"), [(quantize_weights, 0.03, 0.9), (quantize_static, 0.3, 0.5)]
)
def test_same_actions_in_a_quarter_of_the_bytes(
    size: Size,
    quantize: Quantize,
    max_error: float,
    min_agreement: float,
    frames: Tensor,
    decided_student: MakeStudent,
    tmp_path: Path,
) -> None:
    student = decided_student(size)
    float_model = to_onnx(student.folded_net())
    content = quantize(float_model, frames[::2].numpy())
    (tmp_path / "int8.onnx").write_bytes(content)
    policy = OnnxPolicy(tmp_path / "int8.onnx")
    with torch.inference_mode():
        expected_BA = student(frames[1::2])
    found_BA = policy(frames[1::2])
    assert (found_BA - expected_BA).abs().mean() < max_error
    assert (found_BA.argmax(1) == expected_BA.argmax(1)).float().mean() > min_agreement
    assert len(content) < (0.3 if size == "7%" else 0.6) * len(float_model)


def test_compensated_rounding_keeps_a_layers_outputs() -> None:
    """On correlated inputs its error is well below that of rounding to the nearest multiple."""
    rng = np.random.default_rng(0)
    inputs_NK = rng.standard_normal((500, 8)) @ rng.standard_normal((8, 32))
    weight_OK = rng.standard_normal((4, 32))
    step_O1 = np.abs(weight_OK).max(axis=1, keepdims=True) / 127
    multiples_OK = _compensated_rounding(weight_OK, step_O1, inputs_NK)
    np.testing.assert_array_equal(multiples_OK, np.round(multiples_OK))
    assert np.abs(multiples_OK).max() <= 127
    error = np.abs(inputs_NK @ (multiples_OK * step_O1 - weight_OK).T).mean()
    nearest = np.abs(inputs_NK @ (np.round(weight_OK / step_O1) * step_O1 - weight_OK).T).mean()
    assert error < 0.5 * nearest


@pytest.mark.parametrize("quantize", [quantize_weights, quantize_static])
def test_quantization_needs_states(quantize: Quantize, frames: Tensor, decided_student: MakeStudent) -> None:
    model = to_onnx(decided_student("1%").folded_net())
    with pytest.raises(ValueError, match="quantization needs states for calibration"):
        quantize(model, frames[:0].numpy())
