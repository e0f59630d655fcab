"""The two network shapes of this field: convolutions on stacked frames (Mnih et al., 2015) and an MLP on vectors."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ATARI_OBS_SHAPE = (4, 84, 84)
_FLAT = 7 * 7


class Activations(NamedTuple):
    """What a network computes on the way to its scores, for losses that compare more than scores."""

    scores_BA: Tensor
    """float32 `(batch, num_actions)`"""
    hidden_BF: Tensor
    """of the last dense layer before the scores, float32 `(batch, features)`"""
    maps: tuple[Tensor, ...]
    """of the convolutions after their ReLU, `(batch, channels, height, width)`; none of an MLP"""


class ConvNet(nn.Module):
    """Three convolutions (8 by 8 stride 4, 4 by 4 stride 2, 3 by 3), dense layers, scores; runs channels-last.

    The input scaling, (frame - centre) / scale in grey levels, is not a pass over the pixels: the first convolution has
    no padding, so that scaling its weights and moving its bias is the same thing for less work.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, widths: Sequence[int], hidden: Sequence[int], num_actions: int) -> None:
        super().__init__()
        one, two, three = widths
        self.obs_shape, self.num_actions = ATARI_OBS_SHAPE, num_actions
        self.widths, self.hidden = tuple(widths), tuple(hidden)
        self.num_features = [three * _FLAT, *hidden][-1]
        self.conv1 = nn.Conv2d(ATARI_OBS_SHAPE[0], one, 8, 4)
        self.conv2 = nn.Conv2d(one, two, 4, 2)
        self.conv3 = nn.Conv2d(two, three, 3)
        self.dense = nn.ModuleList(
            nn.Linear(i, o) for i, o in zip([three * _FLAT, *hidden], [*hidden, num_actions], strict=False)
        )
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("scale", torch.tensor(255.0))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it for modules

    def forward(self, obs_BCHW: Tensor) -> Tensor:
        """Returns scores, float32 `(batch, num_actions)`, of uint8 frames `(batch, 4, 84, 84)`, newest last.

        Raises:
            ValueError: observations of another shape or kind.
        """
        check_obs(obs_BCHW, self.obs_shape)
        (last_map,) = deque(self._maps(obs_BCHW), maxlen=1)
        return self._dense(last_map)[0]

    def activations(self, obs_BCHW: Tensor) -> Activations:
        """Returns the same scores as a call, and what lies on the way to them.

        Raises:
            ValueError: observations of another shape or kind.
        """
        check_obs(obs_BCHW, self.obs_shape)
        maps = tuple(self._maps(obs_BCHW))
        scores_BA, hidden_BF = self._dense(maps[-1])
        return Activations(scores_BA, hidden_BF, maps)

    def _maps(self, obs_BCHW: Tensor) -> Iterator[Tensor]:
        """Yields each convolution's output; only a caller that wants all of them holds all of them."""
        # Bytes change places faster than floats: 6 % of a training step of the 7 % student, 10 % of the 1 % student.
        x = torch.stack(obs_BCHW.unbind(1), dim=-1).float().permute(0, 3, 1, 2)
        x = F.relu(F.conv2d(x, *self.first_layer(), stride=4))
        yield x
        x = F.relu(self.conv2(x))
        yield x
        yield F.relu(self.conv3(x))

    def _dense(self, last_map: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scores and the activations before them."""
        x = last_map.contiguous().flatten(1)  # SB3 flattens channel by channel
        halved = x.dtype == torch.bfloat16  # under autocast, which is for convolutions alone
        with torch.autocast(x.device.type, enabled=False) if halved else nullcontext():
            x = x.float()
            for layer in self.dense[:-1]:
                x = F.relu(layer(x))
            return self.dense[-1](x), x

    def first_layer(self) -> tuple[Tensor, Tensor]:
        """Returns the first convolution's weights and bias for pixels from 0 to 255, the input scaling in them."""
        weight = self.conv1.weight / self.scale
        bias: Tensor = self.conv1.bias - self.centre * weight.sum(dim=(1, 2, 3))  # type: ignore[operator]
        return weight, bias


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
        return self.activations(obs_BF).scores_BA

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


def check_obs(obs: Tensor, obs_shape: tuple[int, ...]) -> None:
    """Raises ValueError unless these are a batch of `obs_shape`, frames in bytes: an action of others means nothing."""
    if tuple(obs.shape[1:]) != obs_shape:
        raise ValueError(f"observations are {tuple(obs.shape[1:])}, expected a batch of {obs_shape}")
    if len(obs_shape) == 3 and obs.dtype != torch.uint8:
        raise ValueError(f"observations are {obs.dtype}, expected uint8 frames from 0 to 255, channels first")


def num_parameters(net: nn.Module) -> int:
    """Returns how many numbers the acting path holds, each tensor counted once; a student's value head is not on it."""
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("value_head."))


def num_macs(net: nn.Module, obs_shape: Sequence[int]) -> int:
    """Returns the multiply-accumulates of one forward pass of one observation."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        kind = torch.uint8 if len(obs_shape) == 3 else torch.float32
        net(torch.zeros((1, *obs_shape), dtype=kind, device=next(net.parameters()).device))
    return int(counter.get_total_flops()) // 2
