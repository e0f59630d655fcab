"""Weights that lose little in 7 or 8 bits: ranges made equal, and rounding whose error later weights make up for."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from policykd.agents.onnx_policy import open_session
from policykd.io.signals import check_interrupted

if TYPE_CHECKING:
    import onnx

_BATCH = 64
_MAX_ROWS = 20_000
"""of what a layer takes, to estimate its second moments from"""
_MAX_INPUTS = 1024
"""of a filter, up to which errors are made up for: the time grows with their cube"""
_DAMPING = 0.01
"""of their mean, added to each: what was never seen is not certain never to come"""


def values_of(model: "onnx.ModelProto", names: list[str], obs: np.ndarray) -> list[np.ndarray]:
    """Returns what a graph computes on the way, by name."""
    import onnx

    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    del tapped.graph.output[:]
    tapped.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = open_session(tapped.SerializeToString(), 1)
    parts = []
    for i in range(0, len(obs), _BATCH):
        check_interrupted()
        parts.append(session.run(names, {"obs": obs[i : i + _BATCH]}))
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def nodes_with_weights(model: "onnx.ModelProto") -> list[Any]:
    """Returns the convolutions and dense layers whose weights stand in the file."""
    held = {tensor.name for tensor in model.graph.initializer}
    return [n for n in model.graph.node if n.op_type in ("Conv", "Gemm") and n.input[1] in held]


def weights_of(model: "onnx.ModelProto") -> dict[str, np.ndarray]:
    """Returns the numbers in a file, by name."""
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def replace_weights(model: "onnx.ModelProto", weights: Mapping[str, np.ndarray]) -> None:
    """Puts others in their place."""
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].astype(np.float32), tensor.name))


def equalise(model: "onnx.ModelProto", obs: np.ndarray) -> None:
    """Gives all channels that a ReLU lets through the same range, which the next layer's weights undo.

    One step of rounding then serves all of them (Nagel et al., 2019). The network stays the same function.
    """
    for before, after, through in _pairs(model):
        (seen,) = values_of(model, [through], obs)
        largest = np.abs(seen).reshape(len(seen), seen.shape[1], -1).max(axis=(0, 2))
        if not largest.any():
            continue
        scale = np.where(largest > 1e-6, largest, largest.max())
        scale = scale / np.exp(np.log(scale).mean())
        held = weights_of(model)
        weight, following = held[before.input[1]], held[after.input[1]]
        grouped = following.reshape(len(following), len(weight), -1) * scale[None, :, None]
        changed = {
            before.input[1]: weight / scale.reshape(-1, *[1] * (weight.ndim - 1)),
            before.input[2]: held[before.input[2]] / scale,
            after.input[1]: grouped.reshape(following.shape),
        }
        replace_weights(model, changed)


def _pairs(model: "onnx.ModelProto") -> list[tuple[Any, Any, str]]:
    """Returns layers that follow each other with only a ReLU between them, and what that gives."""
    takers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            takers.setdefault(name, []).append(node)
    layers, pairs = nodes_with_weights(model), []
    for before in layers:
        name, through, kinds = before.output[0], "", []
        while len(takers.get(name, [])) == 1 and takers[name][0].op_type in ("Relu", "Flatten"):
            node = takers[name][0]
            kinds.append(node.op_type)
            through, name = (node.output[0] if node.op_type == "Relu" else through), node.output[0]
        following = takers.get(name, [])
        if kinds.count("Relu") == 1 and len(following) == 1 and following[0] in layers and len(before.input) == 3:
            pairs.append((before, following[0], through))
    return pairs


def round_weights(model: "onnx.ModelProto", obs: np.ndarray, *, levels: int, exact: str = "") -> dict[str, np.ndarray]:
    """Rounds every layer's weights to whole multiples of a filter's step; returns the steps by the weights' names.

    Layer by layer, on what the rounded layers before it give; each weight's error is made up for by those of the same
    filter that are not rounded yet (GPTQ; Frantar et al., 2023).

    Args:
        model: changed in place.
        obs: real states.
        levels: the largest multiple.
        exact: name of a node to leave alone.
    """
    steps = {}
    for node in nodes_with_weights(model):
        weight = weights_of(model)[node.input[1]]
        if node.name == exact:
            continue
        flat = weight.reshape(len(weight), -1).astype(np.float64)
        largest = np.abs(flat).max(axis=1, keepdims=True)
        step = np.where(largest > 0.0, largest, 1.0) / levels
        if flat.shape[1] > _MAX_INPUTS:
            flat = np.round(flat / step) * step
        else:
            (taken,) = values_of(model, [node.input[0]], obs)
            flat = _compensated(flat, step, _seen(node, taken, weight), levels)
        replace_weights(model, {node.input[1]: flat.reshape(weight.shape)})
        steps[node.input[1]] = step[:, 0].astype(np.float32)
    return steps


def _seen(node: Any, taken: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Returns what a layer's filters lie on, a row a place."""
    if node.op_type == "Gemm":
        return taken
    said = {a.name: list(a.ints) for a in node.attribute}
    stride, margin = said.get("strides", [1])[0], said.get("pads", [0])[0]
    padded = np.pad(taken, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    places = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    n, _, high, wide = places.shape[:4]
    chosen = np.random.default_rng(0).integers((n, high, wide), size=(min(_MAX_ROWS, n * high * wide), 3))
    return places[chosen[:, 0], :, chosen[:, 1], chosen[:, 2]].reshape(len(chosen), -1)


def _compensated(weight_OK: np.ndarray, step: np.ndarray, rows: np.ndarray, levels: int) -> np.ndarray:
    """Returns multiples of every filter's step, chosen one input after the other."""
    moments = (rows.T.astype(np.float64) @ rows) / len(rows)
    moments += (_DAMPING * np.diag(moments).mean() + 1e-12) * np.eye(len(moments))
    order = np.argsort(-np.diag(moments))
    factor = np.linalg.cholesky(np.linalg.inv(moments[np.ix_(order, order)])).T
    left = weight_OK[:, order].copy()
    rounded = np.empty_like(left)
    for k in range(left.shape[1]):
        multiple = np.clip(np.round(left[:, k : k + 1] / step), -levels, levels)
        rounded[:, k : k + 1] = multiple * step
        error = (left[:, k : k + 1] - rounded[:, k : k + 1]) / factor[k, k]
        left[:, k:] -= error * factor[k : k + 1, k:]
    result = np.empty_like(rounded)
    result[:, order] = rounded
    return result
