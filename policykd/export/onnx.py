"""Our networks as ONNX files: one file, frames in bytes or vectors in, scores out, any batch."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from policykd.agents.networks import ATARI_OBS_SHAPE, MLP, FrameNet, UserNet
from policykd.export.layers import Layer, layers_of

_OPSET, _IR_VERSION = 20, 9  # ONNX Runtime reads them since 1.17, of January 2024
_OPERATORS = {
    "conv": "Conv",
    "max_pool": "MaxPool",
    "relu": "Relu",
    "elu": "Elu",
    "leaky_relu": "LeakyRelu",
    "tanh": "Tanh",
    "flatten": "Flatten",
    "dense": "Gemm",
    "add": "Add",
}


@torch.no_grad()
def to_onnx(net: nn.Module) -> bytes:
    """Returns a network as an ONNX model that `OnnxPolicy` reads, the same bytes for the same weights.

    Its input `obs` is uint8 `(batch, 4, 84, 84)`, with the scaling inside the first convolution, or float32
    `(batch, features)`; its output `scores` is float32 `(batch, num_actions)`. The convolutions stay as they are:
    turned into 2 by 2 ones on blocks of 4 by 4 pixels, ONNX Runtime takes 1.5 times as long. What it is slow at, the
    average of pixels and depthwise convolutions, is written as convolutions with zeros in them: docs/students.md.

    Args:
        net: one of policykd's networks, or a student's `folded_net()`; a module of the user's goes through
            `torch.onnx.export`.

    Raises:
        ValueError: the package onnx is missing (for a user's module, onnxscript too), or torch cannot export it.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise ValueError("ONNX export needs another package: pip install 'policykd[onnx]'") from error
    if isinstance(net, UserNet):
        from policykd.export.onnx_trace import traced_onnx

        return traced_onnx(net)
    layers, on_frames = [_without_groups(layer) for layer in layers_of(net)], isinstance(net, FrameNet)
    assert isinstance(net, FrameNet | MLP)
    nodes, frames = [], "frames" if on_frames else "obs"
    if on_frames:
        nodes.append(helper.make_node("Cast", ["obs"], [frames], to=TensorProto.FLOAT))
    tensors = []
    for layer in layers:
        named = {"weight": layer.weight, "bias": layer.bias}
        weights = {f"{layer.name}.{kind}": tensor for kind, tensor in named.items() if tensor is not None}
        tensors += [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights.items()]
        taken = [frames if name == "obs" else name for name in layer.takes]
        nodes.append(
            helper.make_node(_OPERATORS[layer.operator], [*taken, *weights], [layer.gives], **_attributes(layer))
        )
    kind = TensorProto.UINT8 if on_frames else TensorProto.FLOAT
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


def _without_groups(layer: Layer) -> Layer:
    """Returns a layer that looks at each channel alone as the convolution of all channels that gives the same."""
    if layer.operator == "average_pool":
        num_channels, area = ATARI_OBS_SHAPE[0], layer.kernel**2
        assert layer.takes == ("obs",)
        weight = torch.eye(num_channels)[:, :, None, None].repeat(1, 1, layer.kernel, layer.kernel) / area
        return replace(layer, operator="conv", name="pool", weight=weight)
    if layer.groups == 1:
        return layer
    assert layer.weight is not None
    dense = torch.block_diag(*(part.flatten(1) for part in layer.weight.chunk(layer.groups)))
    return replace(layer, weight=dense.reshape(len(dense), -1, *layer.weight.shape[2:]), groups=1)


def _attributes(layer: Layer) -> dict[str, Any]:
    square = {"strides": [layer.stride] * 2} | ({"pads": [layer.padding] * 4} if layer.padding else {})
    if layer.operator == "conv":
        return square
    if layer.operator == "max_pool":
        return {**square, "kernel_shape": [layer.kernel] * 2}
    if layer.operator in ("elu", "leaky_relu"):
        return {"alpha": layer.alpha}
    return {"transB": 1} if layer.operator == "dense" else {}
