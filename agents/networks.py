"""The networks of this field: convolutions on stacked frames (Mnih et al., 2015), MLPs on vectors.

Suffixes name dimensions: B batch, A actions, C H W an image, F features.
"""

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ATARI_OBS_SHAPE = (4, 84, 84)

Design = Literal["nature", "strided", "depthwise", "half", "impala"]


class Convolution(NamedTuple):
    """One convolution of a design, without padding."""

    kernel: int
    stride: int
    is_depthwise: bool = False
    """whether each channel is filtered alone; the next convolution, 1 by 1, mixes them"""


DESIGNS: dict[Design, tuple[Convolution, ...]] = {
    "nature": (Convolution(8, 4), Convolution(4, 2), Convolution(3, 1)),
    "strided": (Convolution(7, 7), Convolution(4, 2), Convolution(3, 1)),  # 7 divides 84: every pixel is seen, once
    "depthwise": (Convolution(8, 4, is_depthwise=True), Convolution(1, 1), Convolution(4, 2), Convolution(3, 1)),
    "half": (Convolution(4, 2), Convolution(4, 2), Convolution(3, 1)),
}
"""those of ConvNet; of "half", on pixels that it averages two by two"""


class Activations(NamedTuple):
    """What a network computes on the way to its scores, for losses that compare more than scores."""

    outputs_BA: Tensor
    """logits or Q-values, float32 `(batch, num_actions)`"""
    hidden_BF: Tensor
    """of the last dense layer before the scores, float32 `(batch, features)`"""
    maps: tuple[Tensor, ...]
    """of the convolutions after their ReLU, `(batch, channels, height, width)`; none of an MLP"""


class FrameNet(nn.Module):
    """What networks on frames have in common: input scaling, dense layers; they run channels-last.

    The input scaling, (frame - centre) / scale in grey levels, is not a pass over the pixels: the first convolution has
    no padding, so that scaling its weights and moving its bias is the same thing for less work.
    """

    centre: Tensor
    scale: Tensor
    dense: nn.ModuleList
    num_actions: int
    num_features: int
    obs_shape: tuple[int, ...] = ATARI_OBS_SHAPE

    def _finish(self, num_flat: int, hidden: Sequence[int], num_actions: int, rank: int) -> None:
        """Makes what comes behind the convolutions, which exist by now."""
        self.num_actions, self.hidden, self.rank = num_actions, tuple(hidden), rank
        self.num_features = [num_flat, *hidden][-1]
        layers = [nn.Linear(i, o) for i, o in pairwise([num_flat, *hidden, num_actions])]
        if rank:
            layers[:1] = [nn.Linear(num_flat, rank, bias=False), nn.Linear(rank, layers[0].out_features)]
        self.dense = nn.ModuleList(layers)
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("scale", torch.tensor(255.0))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it for modules

    def forward(self, obs_BCHW: Tensor) -> Tensor:
        """Returns scores, float32 `(batch, num_actions)`, of uint8 frames `(batch, 4, 84, 84)`, newest last.

        Raises:
            ValueError: observations of another shape or kind.
        """
        check_obs(obs_BCHW, self.obs_shape)
        (last_map,) = deque(self._maps(_floats(obs_BCHW)), maxlen=1)
        return self._dense(last_map)[0]

    def activations(self, obs_BCHW: Tensor) -> Activations:
        """Returns the same scores as a call, and what lies on the way to them.

        Raises:
            ValueError: observations of another shape or kind.
        """
        check_obs(obs_BCHW, self.obs_shape)
        maps = tuple(self._maps(_floats(obs_BCHW)))
        scores_BA, hidden_BF = self._dense(maps[-1])
        return Activations(scores_BA, hidden_BF, maps)

    @property
    @abstractmethod
    def first(self) -> nn.Conv2d:
        """The convolution that sees the pixels."""

    @abstractmethod
    def _maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yields each stage's output; only a caller that wants all of them holds all of them.

        Args:
            x: pixels from 0 to 255, float32, channels-last.
        """

    def _dense(self, last_map: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scores and the activations before them."""
        x = last_map.contiguous().flatten(1)  # SB3 flattens channel by channel
        halved = x.dtype == torch.bfloat16  # under autocast, which is for convolutions alone
        with torch.autocast(x.device.type, enabled=False) if halved else nullcontext():
            x = x.float()
            for layer in self.dense[:-1]:
                x = layer(x) if layer.bias is None else F.relu(layer(x))  # without a bias: the first of two factors
            return self.dense[-1](x), x

    def first_layer(self) -> tuple[Tensor, Tensor]:
        """Returns the first convolution's weights and bias for pixels from 0 to 255, the input scaling in them."""
        weight = self.first.weight / self.scale
        bias: Tensor = self.first.bias - self.centre * weight.sum(dim=(1, 2, 3))  # type: ignore[operator]
        return weight, bias

    def _first_map(self, x: Tensor) -> Tensor:
        """Returns what the first convolution makes of pixels from 0 to 255, before its ReLU."""
        return F.conv2d(x, *self.first_layer(), stride=self.first.stride, groups=self.first.groups)


class ConvNet(FrameNet):
    """Convolutions, dense layers, scores; the design says which convolutions (docs/students.md), their widths are free.

    "nature" is 8 by 8 stride 4, 4 by 4 stride 2, 3 by 3 (Mnih et al., 2015).
    """

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv3: nn.Conv2d

    def __init__(
        self,
        widths: Sequence[int],
        hidden: Sequence[int],
        num_actions: int,
        *,
        design: Design = "nature",
        rank: int = 0,
    ) -> None:
        """Builds it with new weights.

        Args:
            widths: channels of each convolution; of a depthwise one a multiple of 4.
            hidden: units of the dense layers.
            num_actions: how many actions it scores.
            design: which convolutions.
            rank: of the first dense layer, which is then two linear ones; 0 for a plain one.

        Raises:
            ValueError: another number of widths than of convolutions.
        """
        super().__init__()
        self.widths, self.design = tuple(widths), design
        if len(self.widths) != len(DESIGNS[design]):
            raise ValueError(f"design {design} has {len(DESIGNS[design])} convolutions, not {len(self.widths)} widths")
        channels, side = ATARI_OBS_SHAPE[0], ATARI_OBS_SHAPE[1] // (2 if design == "half" else 1)
        for i, (width, (kernel, stride, is_depthwise)) in enumerate(zip(widths, DESIGNS[design], strict=True), start=1):
            groups = channels if is_depthwise else 1
            self.add_module(f"conv{i}", nn.Conv2d(channels, width, kernel, stride, groups=groups))
            channels, side = width, (side - kernel) // stride + 1
        self._finish(channels * side * side, hidden, num_actions, rank)

    @property
    def convolutions(self) -> tuple[nn.Conv2d, ...]:
        """The convolutions in order, `conv1` and so on in the state dict."""
        return tuple(layer for layer in self.children() if isinstance(layer, nn.Conv2d))

    @property
    def first(self) -> nn.Conv2d:
        """The convolution that sees the pixels, averaged or not."""
        return self.conv1

    def _maps(self, x: Tensor) -> Iterator[Tensor]:
        x = F.avg_pool2d(x, 2) if self.design == "half" else x
        first, *others = self.convolutions
        x = F.relu(self._first_map(x))
        if first.groups == 1:  # a depthwise convolution and the one that mixes its channels are one stage
            yield x
        for layer in others:
            x = F.relu(layer(x))
            yield x


class MLP(nn.Module):
    """Dense layers on a vector."""

    def __init__(self, obs_size: int, hidden: Sequence[int], num_actions: int, *, activation: type[nn.Module]) -> None:
        super().__init__()
        self.obs_shape, self.num_actions = (obs_size,), num_actions
        self.num_features = [obs_size, *hidden][-1]
        self.dense = nn.ModuleList(
            nn.Linear(i, o) for i, o in zip([obs_size, *hidden], [*hidden, num_actions], strict=False)
        )
        self.activation = activation()

    def forward(self, obs_BF: Tensor) -> Tensor:
        """Returns scores, float32 `(batch, num_actions)`, of vectors `(batch, features)`.

        Raises:
            ValueError: observations of another shape.
        """
        return self.activations(obs_BF).outputs_BA

    def activations(self, obs_BF: Tensor) -> Activations:
        """Returns the same scores as a call, and what lies on the way to them.

        Raises:
            ValueError: observations of another shape.
        """
        check_obs(obs_BF, self.obs_shape)
        x = obs_BF.float()
        for layer in self.dense[:-1]:
            x = self.activation(layer(x))
        return Activations(self.dense[-1](x), x, ())


def _floats(obs_BCHW: Tensor) -> Tensor:
    """Returns bytes as float32 that lie channels-last."""
    # Bytes change places faster than floats: 6 % of a training step of the 7 % student, 10 % of the 1 % student.
    return torch.stack(obs_BCHW.unbind(1), dim=-1).float().permute(0, 3, 1, 2)


def check_obs(obs: Tensor, obs_shape: tuple[int, ...]) -> None:
    """Raises ValueError unless these are a batch of `obs_shape`, frames in bytes: an action of others means nothing."""
    if tuple(obs.shape[1:]) != obs_shape:
        raise ValueError(f"observations are {tuple(obs.shape[1:])}, expected a batch of {obs_shape}")
    if len(obs_shape) == 3 and obs.dtype != torch.uint8:
        raise ValueError(f"observations are {obs.dtype}, expected uint8 frames from 0 to 255, channels first")


def num_parameters(net: nn.Module) -> int:
    """Returns how many numbers the acting path holds, each tensor counted once; a student's value head is not on it."""
    from policykd.agents.user_net import UserNet

    if user := next((part for part in net.modules() if isinstance(part, UserNet)), None):
        return sum(p.numel() for p in user.acting_parameters())
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("value_head."))


def num_macs(net: nn.Module, obs_shape: Sequence[int]) -> int:
    """Returns the multiply-accumulates of one forward pass of one observation: of convolutions and dense layers."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        kind = torch.uint8 if len(obs_shape) == 3 else torch.float32
        net(torch.zeros((1, *obs_shape), dtype=kind, device=next(net.parameters()).device))
    return int(counter.get_total_flops()) // 2
