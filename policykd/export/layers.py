"""A network as a list of layers, each with what it takes and gives: the form that every exporter walks."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from policykd.agents.networks import MLP, ConvNet, FrameNet, ImpalaNet, ResidualBlock, Stage, UserNet

Operator = Literal["conv", "average_pool", "max_pool", "relu", "elu", "leaky_relu", "tanh", "flatten", "dense", "add"]


@dataclass(frozen=True)
class Layer:
    """One step from an observation to scores.

    Frames come as uint8 `(batch, 4, 84, 84)` and are cast to float32 first; the input scaling is already in the first
    convolution, which has no padding. Vectors come as float32.
    """

    operator: Operator
    """`flatten` goes channel by channel: (C, H, W)"""
    takes: tuple[str, ...]
    """`obs`, or what earlier layers give; two names for `add`"""
    gives: str
    """of the last layer `scores`"""
    name: str = ""
    """of its weights, as in the state dict: `conv1`, `dense.0`"""
    weight: Tensor | None = None
    """of conv `(out, in / groups, kernel, kernel)`, of dense `(out, in)`; float32 on the CPU, contiguous, detached"""
    bias: Tensor | None = None
    """`(out,)`; none where a low-rank layer's first factor has none"""
    kernel: int = 0
    """of a pool"""
    stride: int = 1
    padding: int = 0
    """zeros at every side; of max_pool, minus infinity"""
    groups: int = 1
    alpha: float = 0.0
    """of elu and leaky_relu"""


@torch.no_grad()
def layers_of(net: nn.Module) -> list[Layer]:
    """Returns a network's layers in the order in which they are computed; the weights are copies.

    Raises:
        ValueError: a module whose layers policykd does not know.
    """
    if not isinstance(net, FrameNet | MLP):
        module = net.module if isinstance(net, UserNet) else net
        raise ValueError(
            f"{type(module).__name__}: the layers of a module of your own are not known; export it by to_onnx, or"
            " take one of policykd's networks"
        )
    chain = _Chain([])
    if isinstance(net, ConvNet):
        _convolutions(chain, net)
    elif isinstance(net, ImpalaNet):
        _stages(chain, net)
    activation, settings = _activation(net.activation) if isinstance(net, MLP) else ("relu", {})
    if isinstance(net, FrameNet):
        chain.add("flatten")
    for i, dense in enumerate(net.dense):
        assert isinstance(dense, nn.Linear)
        chain.add_weights("dense", f"dense.{i}", dense.weight, dense.bias)
        if dense.bias is not None and i < len(net.dense) - 1:  # without a bias: the first of two factors
            chain.add(activation, **settings)
    chain.layers[-1] = replace(chain.layers[-1], gives="scores")
    return chain.layers


@dataclass
class _Chain:
    """Layers so far; each takes what the last one gave, unless told otherwise."""

    layers: list[Layer]

    @property
    def last(self) -> str:
        return self.layers[-1].gives if self.layers else "obs"

    def add(self, operator: Operator, *others: str, **settings: Any) -> None:
        self.layers.append(Layer(operator, (self.last, *others), f"x{len(self.layers) + 1}", **settings))

    def add_weights(self, operator: Operator, name: str, weight: Tensor, bias: Tensor | None, **settings: Any) -> None:
        self.add(operator, name=name, weight=_plain(weight), bias=None if bias is None else _plain(bias), **settings)

    def add_conv(self, name: str, conv: nn.Conv2d, *folded: Tensor) -> None:
        weight, bias = folded or (conv.weight, conv.bias)
        geometry = {"stride": conv.stride[0], "padding": int(conv.padding[0]), "groups": conv.groups}
        self.add_weights("conv", name, weight, bias, **geometry)


def _plain(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)


def _convolutions(chain: _Chain, net: ConvNet) -> None:
    if net.design == "half":
        chain.add("average_pool", kernel=2, stride=2)
    for i, conv in enumerate(net.convolutions, start=1):
        chain.add_conv(f"conv{i}", conv, *(net.first_layer() if conv is net.first else ()))
        chain.add("relu")


def _stages(chain: _Chain, net: ImpalaNet) -> None:
    for i, stage in enumerate(net.stages):
        assert isinstance(stage, Stage)
        chain.add_conv(f"stages.{i}.conv", stage.conv, *(net.first_layer() if stage.conv is net.first else ()))
        chain.add("max_pool", kernel=3, stride=2, padding=1)
        for j, block in enumerate(stage.blocks):
            assert isinstance(block, ResidualBlock)
            came_in = chain.last
            for k, conv in enumerate((block.conv1, block.conv2), start=1):
                chain.add("relu")
                chain.add_conv(f"stages.{i}.blocks.{j}.conv{k}", conv)
            chain.add("add", came_in)
    chain.add("relu")


def _activation(module: nn.Module) -> tuple[Operator, dict[str, float]]:
    if isinstance(module, nn.ELU):
        return "elu", {"alpha": module.alpha}
    if isinstance(module, nn.LeakyReLU):
        return "leaky_relu", {"alpha": module.negative_slope}
    return ("tanh" if isinstance(module, nn.Tanh) else "relu"), {}
