"""What a student's network is: shapes by name, and the network of a shape."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from policykd.agents.impala import ImpalaNet
from policykd.agents.networks import MLP, ConvNet, Design
from policykd.agents.user_net import UserNet

Net = ConvNet | ImpalaNet | MLP | UserNet
Size = Literal["25%", "7%", "4%", "1%", "0.3%", "0.1%", "narrow", "strided", "depthwise", "half", "impala"]

SIZES: dict[Size, tuple[Design, tuple[int, ...], int]] = {
    "25%": ("nature", (16, 32, 32), 256),
    "7%": ("nature", (16, 16, 16), 128),
    "4%": ("nature", (16, 16, 16), 64),
    "1%": ("nature", (8, 8, 8), 32),
    "0.3%": ("nature", (4, 8, 8), 8),
    "0.1%": ("nature", (2, 4, 4), 4),
    "narrow": ("nature", (4, 16, 16), 128),
    "strided": ("strided", (16, 16, 16), 128),
    "depthwise": ("depthwise", (8, 8, 16, 16), 64),
    "half": ("half", (8, 16, 16), 64),
    "impala": ("impala", (4, 8, 8), 64),
}
"""name -> (design, convolution widths, dense units); per cents are of the NatureCNN's parameters, the first three Rusu
et al.'s (2015) nets; the others are cheap in arithmetic rather than in parameters (docs/students.md)"""


@dataclass(frozen=True)
class Shape:
    """What a student's network is, enough to build it again."""

    widths: tuple[int, ...]
    """of the convolutions, or of the residual stages; empty for an MLP on vectors"""
    hidden: tuple[int, ...]
    """units of the dense layers"""
    num_actions: int
    obs_shape: tuple[int, ...]
    value: bool = False
    """whether it has a value head beside the scores"""
    temperature: float = 1.0
    """what the network's scores are divided by to get logits; 0.01 for a student that was regressed on Q-values"""
    design: Design = "nature"
    """which convolutions; "impala" for residual stages"""
    rank: int = 0
    """of the first dense layer, then two linear ones; 0 for a plain one"""
    module: str = ""
    """the class of a module of the user's; `widths` and `hidden` are empty then"""

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, not {self.temperature}; 1 for logits, 0.01 for Q-values")
        if self.rank < 0 or (self.rank and not self.widths):
            raise ValueError(f"rank {self.rank}: give a positive one to a network on frames, 0 to leave it out")


def make_net(shape: Shape) -> ConvNet | ImpalaNet | MLP:
    """Returns a network of this shape, with new weights."""
    if not shape.widths:
        return MLP(shape.obs_shape[0], shape.hidden, shape.num_actions, activation=nn.ReLU)
    if shape.design == "impala":
        return ImpalaNet(shape.widths, shape.hidden, shape.num_actions, rank=shape.rank)
    return ConvNet(shape.widths, shape.hidden, shape.num_actions, design=shape.design, rank=shape.rank)


def draw_weights(student: nn.Module, heads: Sequence[nn.Module | None], seed: int) -> None:
    """Sets the weights of convolutions and linear layers anew (He et al., 2015), of heads small: policies start flat.

    Args:
        student: in whose order they are drawn.
        heads: the layers whose outputs are not hidden.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in student.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            gain = 0.1 if layer in heads else 1.0 if layer.bias is None else math.sqrt(2.0)
            layer.weight.data.normal_(0.0, gain / math.sqrt(layer.weight[0].numel()), generator=generator)
            if layer.bias is not None:
                layer.bias.data.zero_()


def shape_of(said: Mapping[str, Any]) -> Shape:
    """Returns the shape that a card says; what it leaves out is as it was before there was a choice.

    Raises:
        KeyError: a number is missing.
        TypeError: one is of another kind.
    """
    widths, hidden, obs_shape = (tuple(said[name]) for name in ("widths", "hidden", "obs_shape"))
    value, temperature = said.get("value", False), said.get("temperature", 1.0)
    design, rank, module = said.get("design", "nature"), said.get("rank", 0), said.get("module", "")
    if not isinstance(value, bool) or type(temperature) not in (int, float) or not 0.0 < temperature < math.inf:
        raise TypeError(f"value {value!r:.20} or temperature {temperature!r:.20}")
    is_name = isinstance(module, str) and module.isprintable()
    if design not in get_args(Design) or type(rank) is not int or not is_name:
        raise TypeError(f"design {design!r:.20}, rank {rank!r:.20} or module {module!r:.20}")
    try:
        shape = Shape(
            widths, hidden, int(said["num_actions"]), obs_shape, value, float(temperature), design, rank, module
        )
        with torch.device("meta"):
            _ = module or make_net(shape)
    except ValueError as error:
        raise TypeError(str(error)) from error
    return shape


def check_module(folder: Path, shape: Shape, module: nn.Module | None) -> None:
    """Raises ValueError unless the module given for a student's folder is of the class that its card says."""
    said, given = shape.module[:60], type(module).__qualname__ if module is not None else ""
    if said and not given:
        raise ValueError(f"{folder}: a student of your own module; load it with load_student(path, module={said}())")
    if given and not said:
        raise ValueError(f"{folder}: a student of policykd's own; leave out module={given}()")
    if given != shape.module:
        raise ValueError(f"{folder}: a student of {said}, not of {given}; load it with module={said}()")
