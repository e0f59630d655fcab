"""int8 networks as ONNX Runtime runs them, calibrated on states that were really visited.

Where activations are quantised too, the graph has pairs of QuantizeLinear and DequantizeLinear, which the runtime fuses
with the layers between them.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from policykd.export.int8_weights import equalise, nodes_with_weights, replace_weights, round_weights, weights_of

if TYPE_CHECKING:
    import onnx

_BATCH = 64
_LEVELS_OF_7_BITS, _LEVELS_OF_8_BITS = 64, 127


def quantise(onnx_model: bytes, calibration_obs: np.ndarray) -> bytes:
    """Returns a network as int8 ONNX model: weights, activations and arithmetic.

    Weights have 7 bits and a step a filter (ONNX Runtime's `reduce_range`: sums of products of 8 bits overflow on
    processors without VNNI), activations 8 bits. Frames go in as they are: the background's grey level is their zero
    point, so that what is rounded off the first filters is not multiplied by it. The layer that gives the scores stays
    float32. docs/export.md says what each of these steps is worth.

    Args:
        onnx_model: of `to_onnx`.
        calibration_obs: real states, uint8 `(n, 4, 84, 84)` or float32 `(n, features)`; a thousand are enough.

    Raises:
        ValueError: the packages onnx and onnxruntime are missing, there are no states, or there is one layer.
        KeyboardInterrupt: a signal has come.
    """
    model, last = _named(onnx_model, calibration_obs)
    import onnx
    from onnxruntime import quantization as q  # type: ignore[import-untyped]

    options: dict[str, Any] = {"WeightSymmetric": True}
    excluded, zero = [last], int(np.median(calibration_obs))
    is_shifted = _shift_input(model, zero)
    if is_shifted:
        step = {"scale": np.array(1.0, np.float32), "zero_point": np.array(zero, np.uint8)}
        options["TensorQuantOverrides"] = {"shifted": [{**step, "quant_type": q.QuantType.QUInt8}]}
        excluded.append("shift")
    if len(nodes_with_weights(model)) < 2:
        raise ValueError(
            "int8: a network of one layer, which stays float32, has nothing to quantise; take another format"
        )
    equalise(model, calibration_obs)
    round_weights(model, calibration_obs, levels=_LEVELS_OF_7_BITS, exact=last)
    with tempfile.TemporaryDirectory() as folder, _without_advice():
        path = Path(folder) / "int8.onnx"
        q.quantize_static(
            model,
            path,
            cast(Any, _Reader(calibration_obs)),
            per_channel=True,
            reduce_range=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            calibrate_method=q.CalibrationMethod.MinMax,
            nodes_to_exclude=excluded,
            extra_options=options,
        )
        quantised = onnx.load(path)
    if is_shifted:
        _take_bytes(quantised)
    content: bytes = quantised.SerializeToString(deterministic=True)
    return content


def quantise_weights(onnx_model: bytes, calibration_obs: np.ndarray) -> bytes:
    """Returns a network whose weights are int8, 8 bits and a step a filter; it computes in float32.

    As many bytes as with `quantise`, at the speed of float32: for small networks, which int8 makes no faster, and to
    whose scores rounded activations do more.

    Args:
        onnx_model: of `to_onnx`.
        calibration_obs: as in `quantise`.

    Raises:
        ValueError: the packages onnx and onnxruntime are missing, or there are no states.
        KeyboardInterrupt: a signal has come.
    """
    model, _ = _named(onnx_model, calibration_obs)
    from onnx import TensorProto, helper, numpy_helper

    steps = round_weights(model, calibration_obs, levels=_LEVELS_OF_8_BITS)
    weights, tensors = weights_of(model), {tensor.name: tensor for tensor in model.graph.initializer}
    for node in nodes_with_weights(model):
        name = node.input[1]
        if name not in steps:
            continue
        step = steps.pop(name)
        shape = (-1, *[1] * (weights[name].ndim - 1))
        multiples = np.round(weights[name] / step.reshape(shape)).astype(np.int8)
        model.graph.initializer.remove(tensors[name])
        model.graph.initializer.append(numpy_helper.from_array(multiples, f"{name} int8"))
        model.graph.initializer.append(numpy_helper.from_array(step.reshape(shape), f"{name} step"))
        # not DequantizeLinear, which ONNX Runtime computes anew at every call; this it does once
        model.graph.node.insert(0, helper.make_node("Mul", [f"{name} multiples", f"{name} step"], [name]))
        cast = helper.make_node("Cast", [f"{name} int8"], [f"{name} multiples"], to=TensorProto.FLOAT)
        model.graph.node.insert(0, cast)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


class _Reader:
    """Hands out states in batches, as ONNX Runtime's calibration asks for them."""

    def __init__(self, obs: np.ndarray) -> None:
        self._batches: Iterator[np.ndarray] = iter([obs[i : i + _BATCH] for i in range(0, len(obs), _BATCH)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"obs": batch}


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keeps quiet what ONNX Runtime logs: advice to preprocess a graph that needs none."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _named(onnx_model: bytes, obs: np.ndarray) -> tuple["onnx.ModelProto", str]:
    """Returns a model whose nodes have names, and the name of the one that gives the scores."""
    try:
        import onnx
        import onnxruntime.quantization  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise ValueError("quantisation needs another package: pip install 'policykd[onnx]'") from error
    if not len(obs):
        raise ValueError("quantisation needs states to calibrate on; give a thousand that were really visited")
    model = onnx.load_model_from_string(onnx_model)
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{i}"
    scores = model.graph.output[0].name
    return model, next(node.name for node in model.graph.node if scores in node.output)


def _shift_input(model: "onnx.ModelProto", zero: int) -> bool:
    """Puts a subtraction of `zero` behind the cast of the frames, and its effect back into the first biases.

    Returns:
        Whether the graph begins as ours do: a cast, then a convolution without padding.
    """
    from onnx import helper, numpy_helper

    nodes, weights = model.graph.node, weights_of(model)
    if len(nodes) < 2:
        return False
    cast, first = nodes[0], nodes[1]
    pads = [n for a in first.attribute if a.name == "pads" for n in a.ints]
    if cast.op_type != "Cast" or first.op_type != "Conv" or any(pads) or first.input[0] != cast.output[0]:
        return False
    weight = weights[first.input[1]]
    moved = np.float32(zero) * weight.sum(axis=(1, 2, 3), dtype=np.float64)
    if len(first.input) == 3:
        replace_weights(model, {first.input[2]: weights[first.input[2]] + moved})
    else:
        first.input.append("first bias")
        model.graph.initializer.append(numpy_helper.from_array(moved.astype(np.float32), "first bias"))
    first.input[0] = "shifted"
    nodes.insert(1, helper.make_node("Sub", [cast.output[0], "background"], ["shifted"], name="shift"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(zero, np.float32), "background"))
    return True


def _take_bytes(model: "onnx.ModelProto") -> None:
    """Lets frames in as they are: bytes are quantised already, with a step of 1 and the background as zero point."""
    nodes, weights = model.graph.node, model.graph.initializer
    quantize = next(node for node in nodes if node.op_type == "QuantizeLinear" and node.input[0] == "shifted")
    dequantize = next(node for node in nodes if node.input[0] == quantize.output[0])
    dequantize.input[0] = "obs"
    shift = next(node for node in nodes if node.name == "shift")
    cast = next(node for node in nodes if node.output[0] == shift.input[0])
    for node in (cast, shift, quantize):
        nodes.remove(node)
    weights.remove(next(tensor for tensor in weights if tensor.name == "background"))
