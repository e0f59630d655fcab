"""Networks: convolutions on stacked frames (Mnih et al., 2015), IMPALA's residual network, MLPs, the user's own module.

Suffixes name dimensions: B batch, A actions, C H W an image, F features.
"""

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policykd.agents.policy import check_outputs
from policykd.io.typed import one_line

ATARI_OBS_SHAPE = (4, 84, 84)

Design = Literal["nature", "strided", "depthwise", "half", "impala"]


class Convolution(NamedTuple):
    """One convolution of a design, without padding."""

    kernel: int
    stride: int
    is_depthwise: bool = False
    """each channel is filtered separately; the next convolution, 1 by 1, mixes the channels"""


DESIGNS: dict[Design, tuple[Convolution, ...]] = {
    "nature": (Convolution(8, 4), Convolution(4, 2), Convolution(3, 1)),
    "strided": (Convolution(7, 7), Convolution(4, 2), Convolution(3, 1)),  # 7 divides 84: every pixel is read once
    "depthwise": (Convolution(8, 4, is_depthwise=True), Convolution(1, 1), Convolution(4, 2), Convolution(3, 1)),
    "half": (Convolution(4, 2), Convolution(4, 2), Convolution(3, 1)),
}
"""designs of ConvNet; "half" first averages the pixels two by two"""


class Activations(NamedTuple):
    """Outputs of a network together with its hidden activations, for losses on features."""

    outputs_BA: Tensor
    """logits or Q-values, float32 `(batch, num_actions)`"""
    hidden_BF: Tensor
    """activations of the last hidden layer, float32 `(batch, features)`"""
    maps: tuple[Tensor, ...]
    """feature maps after each ReLU, `(batch, channels, height, width)`; empty for an MLP"""


class FrameNet(nn.Module):
    """Base of the networks on frames: input normalisation and dense layers; they run channels-last.

    The input normalisation, (frame - centre) / scale in grey levels, costs no pass over the pixels: the first
    convolution has no padding, so scaling its weights and shifting its bias has the same effect.
    """

    centre: Tensor
    scale: Tensor
    dense: nn.ModuleList
    num_actions: int
    num_features: int
    obs_shape: tuple[int, ...] = ATARI_OBS_SHAPE

    def _add_dense_layers(self, num_flat: int, hidden: Sequence[int], num_actions: int, rank: int) -> None:
        """Adds the layers after the convolutions, and the normalisation's buffers; called last by every subclass."""
        self.num_actions = num_actions
        self.hidden = tuple(hidden)
        self.num_features = [num_flat, *hidden][-1]
        # The first dense layer has most parameters; a low rank replaces it by two factors.
        layers = [nn.Linear(i, o) for i, o in pairwise([num_flat, *hidden, num_actions])]
        if rank:
            layers[:1] = [nn.Linear(num_flat, rank, bias=False), nn.Linear(rank, layers[0].out_features)]
        self.dense = nn.ModuleList(layers)
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("scale", torch.tensor(255.0))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub of Module

    def forward(self, obs_BCHW: Tensor) -> Tensor:
        """Returns logits or Q-values, float32 `(batch, num_actions)`, of uint8 frames `(batch, 4, 84, 84)`.

        Raises:
            ValueError: observations of another shape or dtype.
        """
        check_obs(obs_BCHW, self.obs_shape)
        # A deque of length 1 frees every feature map as soon as the next one exists.
        (last_map,) = deque(self._feature_maps(_to_float(obs_BCHW)), maxlen=1)
        return self._dense(last_map)[0]

    def activations(self, obs_BCHW: Tensor) -> Activations:
        """Returns the same outputs as a call, with the hidden activations; raises as a call does."""
        check_obs(obs_BCHW, self.obs_shape)
        maps = tuple(self._feature_maps(_to_float(obs_BCHW)))
        outputs_BA, hidden_BF = self._dense(maps[-1])
        return Activations(outputs_BA, hidden_BF, maps)

    @property
    @abstractmethod
    def first(self) -> nn.Conv2d:
        """The convolution on the pixels."""

    @abstractmethod
    def _feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yields each stage's output, given pixels `x` from 0 to 255, float32, channels-last."""

    def _dense(self, last_map: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the outputs and the last hidden activations."""
        x = last_map.contiguous().flatten(1)  # SB3 flattens channel by channel
        # Under autocast only the convolutions run in bfloat16: it has too few digits for logits.
        is_autocast = x.dtype == torch.bfloat16
        with torch.autocast(x.device.type, enabled=False) if is_autocast else nullcontext():
            x = x.float()
            for layer in self.dense[:-1]:
                x = layer(x) if layer.bias is None else F.relu(layer(x))  # no bias: the first of two low-rank factors
            return self.dense[-1](x), x

    def first_layer(self) -> tuple[Tensor, Tensor]:
        """Returns the first convolution's weight and bias for pixels from 0 to 255, normalisation included."""
        # conv((x - c) / s) = conv(x) / s - c * sum(w) / s, without padding.
        weight = self.first.weight / self.scale
        bias: Tensor = self.first.bias - self.centre * weight.sum(dim=(1, 2, 3))  # type: ignore[operator]
        return weight, bias

    def _first_map(self, pixels: Tensor) -> Tensor:
        """Returns the first convolution's output before its ReLU."""
        return F.conv2d(pixels, *self.first_layer(), stride=self.first.stride, groups=self.first.groups)


class ConvNet(FrameNet):
    """Convolutions, then dense layers; the design gives kernels and strides (docs/students.md), widths are free.

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
        """Builds the network with torch's initial weights; arguments as in a student's `Shape`.

        Raises:
            ValueError: the number of widths differs from the number of convolutions.
        """
        super().__init__()
        self.widths = tuple(widths)
        self.design = design
        if len(self.widths) != len(DESIGNS[design]):
            raise ValueError(f"design {design} has {len(DESIGNS[design])} convolutions, not {len(self.widths)} widths")
        # Output side of a convolution without padding: (side - kernel) // stride + 1.
        channels = ATARI_OBS_SHAPE[0]
        side = ATARI_OBS_SHAPE[1] // (2 if design == "half" else 1)
        for i, (width, (kernel, stride, is_depthwise)) in enumerate(zip(widths, DESIGNS[design], strict=True), start=1):
            groups = channels if is_depthwise else 1
            self.add_module(f"conv{i}", nn.Conv2d(channels, width, kernel, stride, groups=groups))
            channels = width
            side = (side - kernel) // stride + 1
        self._add_dense_layers(channels * side * side, hidden, num_actions, rank)

    @property
    def convolutions(self) -> tuple[nn.Conv2d, ...]:
        """The convolutions in order, `conv1`, `conv2`, ... in the state dict."""
        return tuple(layer for layer in self.children() if isinstance(layer, nn.Conv2d))

    @property
    def first(self) -> nn.Conv2d:
        """The convolution on the (averaged) pixels."""
        return self.conv1

    def _feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        x = F.avg_pool2d(x, 2) if self.design == "half" else x
        first, *others = self.convolutions
        x = F.relu(self._first_map(x))
        if first.groups == 1:  # a depthwise convolution and the 1 by 1 one after it count as one stage
            yield x
        for layer in others:
            x = F.relu(layer(x))
            yield x


class ImpalaNet(FrameNet):
    """Stages of a convolution, a pool and two residual blocks, then dense layers (Espeholt et al., 2018).

    Unlike the paper's, the very first convolution has no padding, so that the input normalisation folds into it.
    """

    def __init__(self, widths: Sequence[int], hidden: Sequence[int], num_actions: int, *, rank: int = 0) -> None:
        """Builds the network with torch's initial weights; arguments as ConvNet's, one width per stage."""
        super().__init__()
        self.widths = tuple(widths)
        self.design: Design = "impala"
        # Without padding the first convolution loses a pixel on each side; each pool halves, rounding up.
        channels = ATARI_OBS_SHAPE[0]
        side = ATARI_OBS_SHAPE[1] - 2
        self.stages = nn.ModuleList()
        for i, width in enumerate(widths):
            self.stages.append(Stage(channels, width, padding=1 if i else 0))
            channels = width
            side = (side + 1) // 2
        self._add_dense_layers(channels * side * side, hidden, num_actions, rank)

    @property
    def first(self) -> nn.Conv2d:
        """The convolution on the pixels."""
        first: nn.Conv2d = self.stages[0].conv  # type: ignore[assignment]
        return first

    def _feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        for i, stage in enumerate(self.stages):
            x = stage(stage.conv(x) if i else self._first_map(x))  # type: ignore[operator]
            yield F.relu(x)


class Stage(nn.Module):
    """A convolution, a pool that halves the image, two residual blocks; called with the convolution's output."""

    def __init__(self, channels: int, width: int, *, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=padding)
        self.blocks = nn.Sequential(ResidualBlock(width), ResidualBlock(width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the stage's output before a ReLU, `(batch, width, height / 2, width / 2)`."""
        return self.blocks(F.max_pool2d(x, 3, 2, 1))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two convolutions with a ReLU before each, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum, of the input's shape."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Dense layers on a vector."""

    def __init__(self, obs_size: int, hidden: Sequence[int], num_actions: int, *, activation: type[nn.Module]) -> None:
        super().__init__()
        self.obs_shape = (obs_size,)
        self.num_actions = num_actions
        self.num_features = [obs_size, *hidden][-1]
        self.dense = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise([obs_size, *hidden, num_actions]))
        self.activation = activation()

    def forward(self, obs_BF: Tensor) -> Tensor:
        """Returns logits or Q-values, float32 `(batch, num_actions)`, of vectors `(batch, features)`.

        Raises:
            ValueError: observations of another shape.
        """
        return self.activations(obs_BF).outputs_BA

    def activations(self, obs_BF: Tensor) -> Activations:
        """Returns the same outputs as a call, with the hidden activations; raises as a call does."""
        check_obs(obs_BF, self.obs_shape)
        x = obs_BF.float()
        for layer in self.dense[:-1]:
            x = self.activation(layer(x))
        return Activations(self.dense[-1](x), x, ())


class UserNet(nn.Module):
    """A module of the user's that maps uint8 frames or float vectors to logits, with the attributes of our networks.

    If the module has tensors `centre` and `scale`, a student's input normalisation is written into them.
    """

    def __init__(self, module: nn.Module, obs_shape: Sequence[int], num_actions: int) -> None:
        """Wraps the module itself, not a copy, after one call with two blank observations.

        Raises:
            ValueError: the call fails, or does not return float32 `(batch, num_actions)`.
        """
        super().__init__()
        self.module = module
        self.obs_shape = tuple(obs_shape)
        self.num_actions = num_actions
        self.divisor = 1.0
        """divisor of the module's outputs; set where a student's temperature is folded in"""
        # Only a call shows what a foreign module returns; its mode is restored afterwards.
        name = type(module).__name__
        is_training = module.training
        try:
            with torch.no_grad():
                outputs = module.eval()(self.blank_obs(2))
        except Exception as error:
            reason = one_line(str(error)) or type(error).__name__
            raise ValueError(f"{name} fails on two blank observations {self.obs_shape} ({reason}); fix it") from error
        finally:
            module.train(is_training)
        if check_outputs(outputs, 2, num_actions, name).dtype != torch.float32:
            raise ValueError(f"{name} returns {outputs.dtype}, expected torch.float32")

    def forward(self, obs: Tensor) -> Tensor:
        """Returns logits, float32 `(batch, num_actions)`: the module's outputs divided by `divisor`.

        Raises:
            ValueError: observations of another shape or dtype.
        """
        check_obs(obs, self.obs_shape)
        outputs_BA: Tensor = self.module(obs)
        return outputs_BA if self.divisor == 1.0 else outputs_BA / self.divisor

    def blank_obs(self, num: int) -> Tensor:
        """Returns observations of zeros, uint8 or float32 `(num, *obs_shape)`, on the module's device."""
        tensor = next(chain(self.module.parameters(), self.module.buffers()), torch.empty(0))
        return torch.zeros((num, *self.obs_shape), dtype=_obs_dtype(self.obs_shape), device=tensor.device)

    def acting_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that the logits depend on, each once; a critic in the same module is left out."""
        # A parameter acts if the logits have a gradient with respect to it.
        weights = dict(self.module.named_parameters())
        is_training = self.module.training
        with torch.inference_mode(False), torch.enable_grad():
            copies = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
            outputs_BA = torch.func.functional_call(self.module.eval(), copies, (self.blank_obs(2),))
            gradients = torch.autograd.grad(outputs_BA.sum(), list(copies.values()), allow_unused=True)
        self.module.train(is_training)
        return [weight for weight, gradient in zip(weights.values(), gradients, strict=True) if gradient is not None]


Net = ConvNet | ImpalaNet | MLP | UserNet


def check_obs(obs: Tensor, obs_shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `obs` is a batch of `obs_shape`; images must be uint8."""
    if tuple(obs.shape[1:]) != obs_shape:
        raise ValueError(f"observations are {tuple(obs.shape[1:])}, expected a batch of {obs_shape}")
    if len(obs_shape) == 3 and obs.dtype != torch.uint8:
        raise ValueError(f"observations are {obs.dtype}, expected uint8 frames from 0 to 255, channels first")


def num_parameters(net: nn.Module) -> int:
    """Returns the number of parameters of the acting path, each tensor counted once, without a value head."""
    if user := next((part for part in net.modules() if isinstance(part, UserNet)), None):
        return sum(p.numel() for p in user.acting_parameters())
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("value_head."))


def num_macs(net: nn.Module, obs_shape: Sequence[int]) -> int:
    """Returns the multiply-accumulates of convolutions and dense layers in one forward pass of one observation."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        device = next(net.parameters()).device
        net(torch.zeros((1, *obs_shape), dtype=_obs_dtype(obs_shape), device=device))
    return int(counter.get_total_flops()) // 2  # a multiplication and an addition count as two


def _obs_dtype(obs_shape: Sequence[int]) -> torch.dtype:
    return torch.uint8 if len(obs_shape) == 3 else torch.float32


def _to_float(obs_BCHW: Tensor) -> Tensor:
    """Returns uint8 frames as float32 in channels-last memory."""
    # Permuting bytes is faster than permuting floats: 6 % of a training step of the 7 % student, 10 % of the 1 % one.
    return torch.stack(obs_BCHW.unbind(1), dim=-1).float().permute(0, 3, 1, 2)
