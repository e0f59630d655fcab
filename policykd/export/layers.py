"""A network as a flat list of layers: the form that every exporter walks.

ONNX, NumPy and C each translate the ten operators below; none of them looks at torch modules.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from policykd.agents.networks import MLP, ConvNet, FrameNet, ImpalaNet, ResidualBlock, Stage, UserNet

Operator = Literal["conv", "average_pool", "max_pool", "relu", "elu", "leaky_relu", "tanh", "flatten", "dense", "add"]

_ACTIVATIONS: dict[type[nn.Module], Operator] = {
    nn.ReLU: "relu",
    nn.ELU: "elu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
}
"""activations of an MLP: those that SB3's archives may name"""


@dataclass(frozen=True)
class Layer:
    """One operation on the way from an observation to the network's outputs.

    Frames are uint8 `(batch, 4, 84, 84)` and are cast to float32 first; the input scaling is folded into the first
    convolution, which has no padding. Vectors are float32.
    """

    operator: Operator
    """`flatten` orders features as (channels, height, width)"""
    takes: tuple[str, ...]
    """names of the inputs: `obs`, or another layer's `gives`; two for `add`"""
    gives: str
    """name of the output; `scores` for the last layer"""
    name: str = ""
    """name of the weights, as in the state dict: `conv1`, `dense.0`"""
    weight: Tensor | None = None
    """conv `(out, in / groups, kernel, kernel)`, dense `(out, in)`; float32, CPU, contiguous, detached"""
    bias: Tensor | None = None
    """`(out,)`; None for the first factor of a low-rank layer"""
    kernel: int = 0
    """side of a pool's window"""
    stride: int = 1
    padding: int = 0
    """zeros on every side; minus infinity for max_pool"""
    groups: int = 1
    alpha: float = 0.0
    """slope or scale of elu and leaky_relu"""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Weight and bias, as far as the layer has them, by their names in the state dict."""
        tensors = {"weight": self.weight, "bias": self.bias}
        return {f"{self.name}.{kind}": tensor.numpy() for kind, tensor in tensors.items() if tensor is not None}


@torch.no_grad()
def layers_of(net: nn.Module) -> list[Layer]:
    """Returns a network's layers in the order of their computation; the weights are copies.

    Raises:
        ValueError: a module of the user's, whose layers are unknown, or an activation that no exporter has.
    """
    if not isinstance(net, FrameNet | MLP):
        module = net.module if isinstance(net, UserNet) else net
        raise ValueError(
            f"{type(module).__name__}: a module of your own has no known layers; export it as onnx, or use one of"
            " policykd's networks"
        )
    # Convolutional part first, then the dense layers, which all networks have.
    chain = _Chain(net)
    if isinstance(net, ConvNet):
        _add_convolutions(chain, net)
    elif isinstance(net, ImpalaNet):
        _add_stages(chain, net)
    activation: nn.Module = nn.ReLU()
    if isinstance(net, MLP):
        activation = net.activation
        if type(activation) not in _ACTIVATIONS:
            known = ", ".join(kind.__name__ for kind in _ACTIVATIONS)
            raise ValueError(f"activation {type(activation).__name__} cannot be exported; use one of {known}")
    else:
        chain.add("flatten")
    alpha = getattr(activation, "alpha", getattr(activation, "negative_slope", 0.0))
    for dense in net.dense:
        chain.add_weights("dense", dense)
        # The first of two low-rank factors has no bias and no activation; nor has the output layer an activation.
        if dense.bias is not None and dense is not net.dense[-1]:
            chain.add(_ACTIVATIONS[type(activation)], alpha=alpha)
    # The last output has one name in every format, whatever the number of layers.
    chain.layers[-1] = replace(chain.layers[-1], gives="scores")
    return chain.layers


class _Chain:
    """Layers so far; each takes the previous one's output, and `others`."""

    def __init__(self, net: FrameNet | MLP) -> None:
        self.layers: list[Layer] = []
        self._net = net
        self._names = {module: name for name, module in net.named_modules()}

    @property
    def last(self) -> str:
        return self.layers[-1].gives if self.layers else "obs"

    def add(self, operator: Operator, *others: str, **settings: Any) -> None:
        self.layers.append(Layer(operator, (self.last, *others), f"x{len(self.layers) + 1}", **settings))

    def add_weights(self, operator: Operator, layer: Any, **settings: Any) -> None:
        # The first convolution gets (pixel - centre) / scale folded into its weights, so that runtimes need no scaling.
        weight = layer.weight
        bias = layer.bias
        if isinstance(self._net, FrameNet) and layer is self._net.first:
            weight, bias = self._net.first_layer()
        bias = None if bias is None else _copy(bias)
        self.add(operator, name=self._names[layer], weight=_copy(weight), bias=bias, **settings)

    def add_conv(self, conv: nn.Conv2d) -> None:
        self.add_weights("conv", conv, stride=conv.stride[0], padding=int(conv.padding[0]), groups=conv.groups)


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)


def _add_convolutions(chain: _Chain, net: ConvNet) -> None:
    if net.design == "half":
        chain.add("average_pool", kernel=2, stride=2)
    for conv in net.convolutions:
        chain.add_conv(conv)
        chain.add("relu")


def _add_stages(chain: _Chain, net: ImpalaNet) -> None:
    """Adds the residual stages of IMPALA (Espeholt et al., 2018, figure 3)."""
    for stage in net.stages:
        assert isinstance(stage, Stage)
        chain.add_conv(stage.conv)
        chain.add("max_pool", kernel=3, stride=2, padding=1)
        for block in stage.blocks:
            assert isinstance(block, ResidualBlock)
            skip = chain.last
            # x + conv(relu(conv(relu(x)))): the skip connection carries x before its ReLU.
            for conv in (block.conv1, block.conv2):
                chain.add("relu")
                chain.add_conv(conv)
            chain.add("add", skip)
    chain.add("relu")
