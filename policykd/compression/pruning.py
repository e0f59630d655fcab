"""Pruning of a trained network: single weights by their magnitude, or whole channels and units."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from policykd.agents.networks import ConvNet, num_parameters
from policykd.agents.student import Student
from policykd.compression.compressors import (
    FROM_TRAINED,
    ROUNDS,
    Fit,
    copy_of,
    layers_with_weights,
    pixel_unit,
    with_weights,
)
from policykd.compression.sparse import pack_sparse
from policykd.legacy.losses import ForwardKL, Loss

LEAST_SHARE = 0.05
"""of a layer's channels that a step of structured pruning leaves at least"""


def cubic_sparsity(progress: float, final: float, until: float) -> float:
    """Returns the share of weights that are zero at `progress`, final (1 - (1 - t)^3) (Zhu & Gupta, 2017).

    Args:
        progress: from 0 to 1 over the run.
        final: the share at the end.
        until: the progress at which it is reached; what is left of the run only tunes.
    """
    return float(final * (1.0 - (1.0 - min(1.0, progress / until)) ** 3))


@torch.no_grad()
def masks_of_largest(weights: Sequence[Tensor], sparsity: float, unit: float) -> list[Tensor]:
    """Returns masks of 1 and 0 in the weights' shapes: the smallest magnitudes of all layers together become 0.

    Args:
        weights: of every layer.
        sparsity: the share that becomes 0.
        unit: of the first layer's weights, see `pixel_unit`.
    """
    magnitudes = [w.abs() * (1.0 if i else unit) for i, w in enumerate(weights)]
    flat = torch.cat([m.flatten() for m in magnitudes])
    least = flat.topk(max(1, round((1.0 - sparsity) * len(flat)))).values[-1]
    return [(m >= least).to(m.dtype) for m in magnitudes]


class _Masked(nn.Module):
    """A weight times a mask of 0 and 1, wherever the weight is used."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight with zeros."""
        return weight * self.mask


def sparsity_for_bytes(student: Student, num_bytes: int) -> float:
    """Returns the share of zeros at which a student's sparse file is as large as asked, by bisection on real files.

    Raises:
        ValueError: such a file cannot be that small.
    """
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        too_large = len(pack_sparse(_pruned_at_once(student, middle))) > num_bytes
        low, high = (middle, high) if too_large else (low, middle)
    if high == 1.0:
        raise ValueError(f"a sparse file of {num_bytes:,} bytes holds no weight; give more bytes")
    return high


def _pruned_at_once(student: Student, sparsity: float) -> Student:
    pruned = copy_of(student)
    weights = [layer.weight.data for layer in layers_with_weights(pruned)]
    for weight, mask in zip(weights, masks_of_largest(weights, sparsity, pixel_unit(student)), strict=True):
        weight.mul_(mask)
    return pruned


@dataclass(frozen=True)
class Magnitude:
    """Global magnitude pruning, gradual on a cubic schedule (Zhu & Gupta, 2017), tuned on the way and after it."""

    num_bytes: int
    """of the sparse file: what decides how many weights are left"""
    until: float = 0.6
    """share of the budget after which the masks stay"""
    learning_rate: float = FROM_TRAINED / 2
    loss: Loss = field(default_factory=ForwardKL)

    def __call__(self, begin: Student, fit: Fit, /) -> Student:
        """Returns the student with zeros in its weights; biases are not pruned."""
        student = fit.begin(begin)
        final, unit = sparsity_for_bytes(student, self.num_bytes), pixel_unit(student)
        learner = fit.learner(student, is_trained=True)
        layers = layers_with_weights(student)
        weights = [layer.weight for layer in layers]  # the parameters stay what they are: Adam knows them
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", _Masked(torch.ones_like(layer.weight)))

        def move_masks(progress: float) -> None:
            sparsity = cubic_sparsity(progress, final, self.until)
            for layer, mask in zip(layers, masks_of_largest(weights, sparsity, unit), strict=True):
                layer.parametrizations["weight"][0].mask.copy_(mask)  # type: ignore[index,union-attr]

        move_masks(1.0 / ROUNDS)
        for r in fit.rounds(learner, self.loss, self.learning_rate):
            if r.index + 1 < ROUNDS:
                move_masks((r.index + 2) / ROUNDS)
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        return student.eval()


@dataclass(frozen=True)
class Structured:
    """Channels and units taken out by DepGraph's group magnitude (Fang et al., 2023), tuned between the steps.

    Every layer loses the same share. What is left is a dense network of other widths. Needs the extra `compress`.
    """

    num_parameters: int
    """at most so many are left"""
    until: float = 0.6
    """share of the budget after which nothing is taken out any more"""
    learning_rate: float = FROM_TRAINED
    loss: Loss = field(default_factory=ForwardKL)

    def __call__(self, begin: Student, fit: Fit, /) -> Student:
        """Returns a student of the shape that is left."""
        student, at_first = fit.begin(begin), num_parameters(begin)
        learner, num_steps = fit.learner(student, is_trained=True), max(1, round(self.until * ROUNDS))
        for k in range(ROUNDS):
            if k < num_steps:  # each step takes the same share of what is there
                wanted = round(at_first * (self.num_parameters / at_first) ** ((k + 1) / num_steps))
                student = without_channels(student, wanted)
                learner = fit.goes_on_with(student, learner)
            next(fit.rounds(learner, self.loss, self.learning_rate))
        return student.eval()


def without_channels(student: Student, num_parameters_left: int) -> Student:
    """Returns a student of which channels and units are taken out until at most so many parameters are left.

    Raises:
        ValueError: torch-pruning is missing; another network than convolutions and dense layers one behind the other;
            so few are left that a layer would vanish.
    """
    plain, ones = _plain_copy(student), torch.ones(1, *student.shape.obs_shape)
    kept = 1.0
    while _num_parameters(student, kept) > num_parameters_left:
        kept *= 0.998
        if kept < LEAST_SHARE:
            raise ValueError(f"{num_parameters_left:,} parameters are fewer than structured pruning leaves; give more")
    _pruner(plain, ones, kept).step()
    layers = [layer for layer in plain if isinstance(layer, nn.Conv2d | nn.Linear)]
    widths = tuple(layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d))
    hidden = tuple(layer.out_features for layer in layers if isinstance(layer, nn.Linear))[:-1]
    layers[0].weight.data /= pixel_unit(student)
    weights = dict(student.net.state_dict())
    names = ["conv1", "conv2", "conv3", *(f"dense.{i}" for i in range(len(hidden) + 1))]
    for name, layer in zip(names, layers, strict=True):
        weights |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    return with_weights(replace(student.shape, widths=widths, hidden=hidden), weights)


def _plain_copy(student: Student) -> nn.Sequential:
    """Returns the student's layers one behind the other, on pixels from 0 to 1, for a tracer of modules' calls."""
    net = copy_of(student).net
    if not isinstance(net, ConvNet) or student.shape.design != "nature" or student.shape.rank:
        raise ValueError("structured pruning takes networks of three convolutions and dense layers; give such a size")
    convolutions = [net.conv1, net.conv2, net.conv3]
    layers: list[nn.Module] = []
    for layer in (*convolutions, *net.dense):
        layers += [nn.Flatten()] if layer is net.dense[0] else []
        layers += [layer, nn.ReLU()]
    net.conv1.weight.data *= pixel_unit(student)
    plain = nn.Sequential(*layers[:-1])
    return plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


def _left(width: int, kept: float) -> int:
    return max(1, round(kept * width))  # the nearest: rounded down, each step would take a channel of every layer


def _num_parameters(student: Student, kept: float) -> int:
    """Returns how many parameters are left with a share of every layer's channels and units."""
    shape = student.shape
    widths, hidden = ([_left(w, kept) for w in of] for of in (shape.widths, shape.hidden))
    with torch.device("meta"):
        return num_parameters(ConvNet(widths, hidden, shape.num_actions))


def _pruner(plain: nn.Sequential, ones: Tensor, kept: float) -> Any:
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; structured pruning needs it: pip install 'policykd[compress]'") from error
    layers = [layer for layer in plain if isinstance(layer, nn.Conv2d | nn.Linear)][:-1]
    widths = {layer: layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features for layer in layers}
    return torch_pruning.pruner.BasePruner(
        plain,
        ones,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=False,  # across layers it narrows the second convolution to one channel (docs/compression.md)
        pruning_ratio_dict={
            layer: 1.0 - min(width, _left(width, kept) + 0.5) / width for layer, width in widths.items()
        },
        ignored_layers=[plain[-1]],
    )
