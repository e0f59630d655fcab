"""A network as a flat list of layers: the form that every exporter walks.

ONNX, NumPy and C each translate the ten operators below; none of them looks at torch modules.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from policykd.agents.networks import MLP, ConvNet, FrameNet, ImpalaNet, ResidualBlock, Stage, UserNet

Operator = Literal["conv", "average_pool", "max_pool", "relu", "elu", "leaky_relu", "tanh", "flatten", "dense", "add"]


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


@torch.no_grad()
def layers_of(net: nn.Module) -> list[Layer]:
    """Returns a network's layers in the order of their computation; the weights are copies.

    Raises:
        ValueError: a module of the user's, whose layers are unknown.
    """
    if not isinstance(net, FrameNet | MLP):
        module = net.module if isinstance(net, UserNet) else net
        raise ValueError(
            f"{type(module).__name__}: a module of your own has no known layers; export it as onnx, or use one of"
            " policykd's networks"
        )
    # Convolutional part first, then the dense layers, which all networks have.
    chain = _Chain([])
    if isinstance(net, ConvNet):
        _add_convolutions(chain, net)
    elif isinstance(net, ImpalaNet):
        _add_stages(chain, net)
    if isinstance(net, MLP):
        activation, alpha = _activation(net.activation)
    else:
        activation, alpha = "relu", 0.0
        chain.add("flatten")
    for i, dense in enumerate(net.dense):
        assert isinstance(dense, nn.Linear)
        chain.add_weights("dense", f"dense.{i}", dense.weight, dense.bias)
        # The first of two low-rank factors has no bias and no activation; nor has the output layer an activation.
        if dense.bias is not None and i < len(net.dense) - 1:
            chain.add(activation, alpha=alpha)
    # The last output has one name in every format, whatever the number of layers.
    chain.layers[-1] = replace(chain.layers[-1], gives="scores")
    return chain.layers


@dataclass
class _Chain:
    """Layers so far; each takes the previous one's output, and `others`."""

    layers: list[Layer]

    @property
    def last(self) -> str:
        return self.layers[-1].gives if self.layers else "obs"

    def add(self, operator: Operator, *others: str, **settings: Any) -> None:
        self.layers.append(Layer(operator, (self.last, *others), f"x{len(self.layers) + 1}", **settings))

    def add_weights(self, operator: Operator, name: str, weight: Tensor, bias: Tensor | None, **settings: Any) -> None:
        self.add(operator, name=name, weight=_copy(weight), bias=None if bias is None else _copy(bias), **settings)

    def add_conv(self, name: str, conv: nn.Conv2d, net: FrameNet) -> None:
        # The first convolution gets (pixel - centre) / scale folded into its weights, so that runtimes need no scaling.
        weight, bias = net.first_layer() if conv is net.first else (conv.weight, conv.bias)
        padding = int(conv.padding[0])
        self.add_weights("conv", name, weight, bias, stride=conv.stride[0], padding=padding, groups=conv.groups)


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)


def _add_convolutions(chain: _Chain, net: ConvNet) -> None:
    if net.design == "half":
        chain.add("average_pool", kernel=2, stride=2)
    for i, conv in enumerate(net.convolutions, start=1):
        chain.add_conv(f"conv{i}", conv, net)
        chain.add("relu")


def _add_stages(chain: _Chain, net: ImpalaNet) -> None:
    """Adds the residual stages of IMPALA (Espeholt et al., 2018, figure 3)."""
    for i, stage in enumerate(net.stages):
        assert isinstance(stage, Stage)
        chain.add_conv(f"stages.{i}.conv", stage.conv, net)
        chain.add("max_pool", kernel=3, stride=2, padding=1)
        for j, block in enumerate(stage.blocks):
            assert isinstance(block, ResidualBlock)
            skip = chain.last
            # x + conv(relu(conv(relu(x)))): the skip connection carries x before its ReLU.
            for k, conv in enumerate((block.conv1, block.conv2), start=1):
                chain.add("relu")
                chain.add_conv(f"stages.{i}.blocks.{j}.conv{k}", conv, net)
            chain.add("add", skip)
    chain.add("relu")


def _activation(module: nn.Module) -> tuple[Operator, float]:
    if isinstance(module, nn.ELU):
        return "elu", module.alpha
    if isinstance(module, nn.LeakyReLU):
        return "leaky_relu", module.negative_slope
    return ("tanh" if isinstance(module, nn.Tanh) else "relu"), 0.0
