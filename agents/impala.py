"""The residual network of Espeholt et al. (2018) on stacked frames."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from policykd.agents.networks import ATARI_OBS_SHAPE, FrameNet


class ImpalaNet(FrameNet):
    """Stages of a convolution, a pool and two residual blocks (Espeholt et al., 2018), dense layers, scores.

    Its very first convolution has no padding, as all of ConvNet's, so that the input scaling folds into it.
    """

    def __init__(self, widths: Sequence[int], hidden: Sequence[int], num_actions: int, *, rank: int = 0) -> None:
        """Builds it with new weights; arguments as ConvNet's, a width for each stage."""
        super().__init__()
        self.widths, self.design = tuple(widths), "impala"
        channels, side = ATARI_OBS_SHAPE[0], ATARI_OBS_SHAPE[1] - 2
        self.stages = nn.ModuleList()
        for i, width in enumerate(widths):
            self.stages.append(Stage(channels, width, padding=1 if i else 0))
            channels, side = width, (side + 1) // 2
        self._finish(channels * side * side, hidden, num_actions, rank)

    @property
    def first(self) -> nn.Conv2d:
        """The convolution that sees the pixels."""
        first: nn.Conv2d = self.stages[0].conv  # type: ignore[assignment]
        return first

    def _maps(self, x: Tensor) -> Iterator[Tensor]:
        for i, stage in enumerate(self.stages):
            x = stage(stage.conv(x) if i else self._first_map(x))  # type: ignore[operator]
            yield F.relu(x)


class Stage(nn.Module):
    """A convolution, a pool that halves the picture, two residual blocks; called with the convolution's output."""

    def __init__(self, channels: int, width: int, *, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=padding)
        self.blocks = nn.Sequential(ResidualBlock(width), ResidualBlock(width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the stage's output before a ReLU, `(batch, width, height / 2, width / 2)`."""
        return self.blocks(F.max_pool2d(x, 3, 2, 1))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two convolutions, a ReLU before each, whose result is added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum, of the input's shape."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))  # type: ignore[no-any-return]
