"""Our networks as ONNX files: one file, frames in bytes or vectors in, scores out, any batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from policykd.agents.networks import MLP, ConvNet

_OPSET, _IR_VERSION = 20, 9  # ONNX Runtime reads them since 1.17, of January 2024
_Layer = tuple[str, Mapping[str, Tensor], Mapping[str, Any]]  # operator, weights by name, attributes


@torch.no_grad()
def to_onnx(net: ConvNet | MLP) -> bytes:
    """Returns a network as an ONNX model that `OnnxPolicy` reads, the same bytes for the same weights.

    Its input `obs` is uint8 `(batch, 4, 84, 84)`, with the scaling inside the first convolution, or float32
    `(batch, features)`; its output `scores` is float32 `(batch, num_actions)`. The convolutions stay as they are:
    turned into 2 by 2 ones on blocks of 4 by 4 pixels, ONNX Runtime takes 1.5 times as long.

    Raises:
        ValueError: the package onnx is missing.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise ValueError("ONNX export needs another package: pip install 'policykd[onnx]'") from error
    layers: list[_Layer] = []
    activation: _Layer = ("Relu", {}, {})
    if isinstance(net, ConvNet):
        layers = [("Cast", {}, {"to": TensorProto.FLOAT}), *_convolutions(net)]
    else:
        activation = _activation(net.activation)
    for i, dense in enumerate(net.dense):
        weights = {f"dense.{i}.weight": dense.weight, f"dense.{i}.bias": dense.bias}
        layers += [("Gemm", weights, {"transB": 1}), activation]  # type: ignore[list-item]
    layers.pop()  # scores are not bounded below
    values = ["obs", *(f"x{i}" for i in range(1, len(layers))), "scores"]
    nodes = [
        helper.make_node(operator, [taken, *weights], [given], **attributes)
        for (operator, weights, attributes), taken, given in zip(layers, values, values[1:], strict=False)
    ]
    tensors = [
        numpy_helper.from_array(tensor.float().cpu().contiguous().numpy(), name)
        for _, weights, _ in layers
        for name, tensor in weights.items()
    ]
    kind = TensorProto.UINT8 if isinstance(net, ConvNet) else TensorProto.FLOAT
    obs = helper.make_tensor_value_info("obs", kind, ("batch", *net.obs_shape))
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ("batch", net.num_actions))
    model = helper.make_model(
        helper.make_graph(nodes, "policy", [obs], [scores], tensors),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="policykd",
    )
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _convolutions(net: ConvNet) -> list[_Layer]:
    layers: list[_Layer] = []
    tensors = (net.first_layer(), (net.conv2.weight, net.conv2.bias), (net.conv3.weight, net.conv3.bias))
    for i, ((weight, bias), stride) in enumerate(zip(tensors, (4, 2, 1), strict=True), start=1):
        weights = {f"conv{i}.weight": weight, f"conv{i}.bias": bias}
        layers += [("Conv", weights, {"strides": [stride, stride]}), ("Relu", {}, {})]  # type: ignore[list-item]
    return [*layers, ("Flatten", {}, {})]


def _activation(module: nn.Module) -> _Layer:
    if isinstance(module, nn.ELU):
        return "Elu", {}, {"alpha": module.alpha}
    if isinstance(module, nn.LeakyReLU):
        return "LeakyRelu", {}, {"alpha": module.negative_slope}
    return {nn.ReLU: "Relu", nn.Tanh: "Tanh"}[type(module)], {}, {}
