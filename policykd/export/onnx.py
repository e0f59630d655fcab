"""Networks as ONNX files: uint8 frames or float vectors in, logits or Q-values out, any batch size, one file."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from policykd.agents.networks import ATARI_OBS_SHAPE, MLP, FrameNet, UserNet
from policykd.export.layers import Layer, Operator, layers_of
from policykd.io.typed import one_line

# ONNX Runtime reads both since 1.17, of January 2024.
_OPSET = 20
_IR_VERSION = 9
_OPERATORS: dict[Operator, str] = {
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
    """Returns a network as an ONNX model that `OnnxPolicy` reads; the same bytes for the same weights.

    The input `obs` is uint8 `(batch, 4, 84, 84)`, with the scaling inside the first convolution, or float32
    `(batch, features)`. The output `scores`, float32 `(batch, num_actions)`, holds logits or Q-values.

    Args:
        net: one of policykd's networks, such as a student's `folded_net()`; a module of the user's (`UserNet`) goes
            through `torch.onnx.export`.

    Raises:
        ValueError: the package onnx is not installed (for a user's module, onnxscript too), or torch cannot export it.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise ValueError("ONNX export needs another package: pip install 'policykd[onnx]'") from error
    if isinstance(net, UserNet):
        return _traced(net)
    layers = [_without_groups(layer) for layer in layers_of(net)]
    assert isinstance(net, FrameNet | MLP)
    on_frames = isinstance(net, FrameNet)
    # Frames are cast once; every layer that takes `obs` then takes the floats.
    first_input = "frames" if on_frames else "obs"
    nodes = [helper.make_node("Cast", ["obs"], ["frames"], to=TensorProto.FLOAT)] if on_frames else []
    # Weights keep their names in the state dict, which graph viewers show.
    initializers = []
    for layer in layers:
        inputs = [first_input if name == "obs" else name for name in layer.takes]
        inputs += layer.arrays
        initializers += [numpy_helper.from_array(array, name) for name, array in layer.arrays.items()]
        nodes.append(helper.make_node(_OPERATORS[layer.operator], inputs, [layer.gives], **_attributes(layer)))
    obs_type = TensorProto.UINT8 if on_frames else TensorProto.FLOAT
    obs = helper.make_tensor_value_info("obs", obs_type, ("batch", *net.obs_shape))
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ("batch", net.num_actions))
    model = helper.make_model(
        helper.make_graph(nodes, "policy", [obs], [scores], initializers),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="policykd",
    )
    # Deterministic, so that the sha256 in the manifest identifies the weights.
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _without_groups(layer: Layer) -> Layer:
    """Returns a pool or depthwise convolution as the equivalent ordinary convolution, other layers unchanged.

    ONNX Runtime takes 32 microseconds for an average pool of the frames and 49 for a depthwise convolution, but 11 to
    24 for ordinary ones that do the same with zeros in their weights (docs/log.md, 2026-11-27).
    """
    if layer.operator == "average_pool":
        assert layer.takes == ("obs",)
        area = layer.kernel**2
        weight = torch.eye(ATARI_OBS_SHAPE[0])[:, :, None, None].repeat(1, 1, layer.kernel, layer.kernel) / area
        return replace(layer, operator="conv", name="pool", weight=weight)
    if layer.groups == 1:
        return layer
    assert layer.weight is not None
    # Filters of one group get zeros for the channels of all others.
    dense = torch.block_diag(*(part.flatten(1) for part in layer.weight.chunk(layer.groups)))
    return replace(layer, weight=dense.reshape(len(dense), -1, *layer.weight.shape[2:]), groups=1)


def _attributes(layer: Layer) -> dict[str, Any]:
    window: dict[str, Any] = {"strides": [layer.stride] * 2}
    if layer.padding:
        window["pads"] = [layer.padding] * 4
    attributes: dict[Operator, dict[str, Any]] = {
        "conv": window,
        "max_pool": {**window, "kernel_shape": [layer.kernel] * 2},
        "elu": {"alpha": layer.alpha},
        "leaky_relu": {"alpha": layer.alpha},
        "dense": {"transB": 1},
    }
    return attributes.get(layer.operator, {})


def _traced(net: UserNet) -> bytes:
    """Returns a user's module as an ONNX model with the inputs and outputs of `to_onnx`, traced by torch."""
    # Tracing needs evaluation mode; the caller's module is left in the mode in which it came.
    was_training = net.training
    try:
        with quiet():
            program = torch.onnx.export(
                net.eval(),
                (net.blank_obs(2),),
                input_names=["obs"],
                output_names=["scores"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=_OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        assert program is not None
        content: bytes = program.model_proto.SerializeToString(deterministic=True)
        return content
    except ImportError as error:
        raise ValueError("ONNX export of a module needs another package: pip install 'policykd[onnx]'") from error
    except Exception as error:
        name = type(net.module).__name__
        reason = one_line(str(error)) or type(error).__name__
        raise ValueError(f"{name}: torch.onnx.export fails ({reason}); use operators that it supports") from error
    finally:
        net.train(was_training)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings, logged or raised, of exporters and quantizers about their own deprecations and defaults."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
