"""Pruning of a trained student: single weights by magnitude, or whole channels and units.

Magnitude pruning follows Zhu & Gupta (2017, "To prune, or not to prune"), structured pruning uses the group magnitudes
of DepGraph (Fang et al., 2023) in torch-pruning.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from policykd.agents.networks import ConvNet, num_parameters
from policykd.agents.student import Student
from policykd.compression.fine_tuning import FROM_TRAINED, ROUNDS, FineTuning
from policykd.compression.networks import pixel_unit, student_with_weights, weight_layers

PRUNING_FRACTION = 0.6
"""fraction of the budget over which weights are removed; the rest only tunes those that are left"""
MIN_KEPT_CHANNELS = 0.05
"""minimum fraction of a layer's channels that one step of structured pruning leaves"""


def prune_by_magnitude(student: Student, tuning: FineTuning, sparsity: float) -> Student:
    """Returns a student with a fraction of its weights set to zero, gradually and fine-tuned on the way and after it.

    The weights of all layers are ranked together. Biases are not pruned.

    Args:
        student: a trained student; it is not changed.
        tuning: teacher, states and budget.
        sparsity: fraction of the weights that are zero at the end.
    """
    pruned = tuning.prepare(student)
    # The input scaling stays constant while the student is trained, and so does the unit.
    unit = pixel_unit(pruned)
    layers = weight_layers(pruned)
    weights = [layer.weight for layer in layers]
    # The mask is a parametrization, so that the weights stay the parameters that Adam updates.
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _Mask(torch.ones_like(layer.weight)))

    def update_masks(num_rounds: int) -> None:
        now = cubic_sparsity(num_rounds / ROUNDS, sparsity)
        for layer, mask in zip(layers, masks_of_largest(weights, now, unit), strict=True):
            layer.parametrizations["weight"][0].mask.copy_(mask)  # type: ignore[index,union-attr]

    # Masks move at the start of every round; the optimizer keeps its moments.
    update_masks(1)
    # Half the usual learning rate: at 7 % of the bytes 4e-3 is worse than 1e-3 (docs/compression.md).
    for num_rounds in tuning.train(pruned, FROM_TRAINED / 2):
        if num_rounds < ROUNDS:
            update_masks(num_rounds + 1)
    # Write the zeros into the weights, which leaves an ordinary network.
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return pruned.eval()


def cubic_sparsity(progress: float, final: float) -> float:
    """Returns the sparsity at a point of training, which rises as final (1 - (1 - t)^3).

    Progress is from 0 to 1 over the whole budget; t is that of the pruning phase, which ends at `PRUNING_FRACTION`.
    """
    t = min(1.0, progress / PRUNING_FRACTION)
    return float(final * (1.0 - (1.0 - t) ** 3))


@torch.no_grad()
def masks_of_largest(weights: Sequence[Tensor], sparsity: float, unit: float) -> list[Tensor]:
    """Returns a mask per tensor: 0 for the smallest magnitudes of all tensors together, 1 for the others.

    Args:
        weights: the weights of every layer.
        sparsity: the fraction that is masked.
        unit: factor of the first layer's weights, see `pixel_unit`.
    """
    magnitudes = [weight.abs() * (1.0 if i else unit) for i, weight in enumerate(weights)]
    # One threshold for all layers: a layer whose weights are small loses more of them.
    flat = torch.cat([magnitude.flatten() for magnitude in magnitudes])
    num_kept = max(1, round((1.0 - sparsity) * len(flat)))
    threshold = flat.topk(num_kept).values[-1]
    return [(magnitude >= threshold).to(magnitude.dtype) for magnitude in magnitudes]


class _Mask(nn.Module):
    """A parametrization that multiplies a weight by a mask of 0 and 1."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def prune_structured(student: Student, tuning: FineTuning, num_parameters_left: int) -> Student:
    """Returns a student with fewer channels and units per layer, fine-tuned between the pruning steps and after them.

    Every layer loses the same fraction. The result is a dense network that needs no sparse kernels.

    Args:
        student: a student of three convolutions and dense layers; it is not changed.
        tuning: teacher, states and budget.
        num_parameters_left: maximum number of parameters at the end.

    Raises:
        ValueError: as for `remove_channels`.
    """
    pruned = tuning.prepare(student)
    num_before = num_parameters(student)
    # Many small steps, because importances change once their neighbors are gone (DepGraph prunes iteratively too).
    num_steps = max(1, round(PRUNING_FRACTION * ROUNDS))
    for step in range(ROUNDS):
        if step < num_steps:
            # A geometric schedule: each step removes the same fraction of what is left.
            fraction = (num_parameters_left / num_before) ** ((step + 1) / num_steps)
            pruned = remove_channels(pruned, round(num_before * fraction))
        # Every step gives a new network with other shapes, so each round has an optimizer of its own.
        for _ in tuning.train(pruned, FROM_TRAINED, first_round=step, num_rounds=1):
            pass
    return pruned.eval()


def remove_channels(student: Student, num_parameters_left: int) -> Student:
    """Returns a student without its least important channels and units, of at most so many parameters.

    Raises:
        ValueError: torch-pruning is not installed, the network has another structure than convolutions followed by
            dense layers, or a layer would vanish.
    """
    # The largest fraction of channels, the same in every layer, that fits the number of parameters.
    plain = _sequential_copy(student)
    kept = 1.0
    while _num_parameters(student, kept) > num_parameters_left:
        kept *= 0.998
        if kept < MIN_KEPT_CHANNELS:
            raise ValueError(f"structured pruning cannot leave {num_parameters_left:,} parameters; use a larger --size")
    _prune_layers(plain, student.shape.obs_shape, kept)

    # Read the new widths off the pruned layers and put their weights into a student of that shape.
    layers = [layer for layer in plain if isinstance(layer, nn.Conv2d | nn.Linear)]
    layers[0].weight.data /= pixel_unit(student)
    widths = tuple(layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d))
    hidden = tuple(layer.out_features for layer in layers if isinstance(layer, nn.Linear))[:-1]
    names = ["conv1", "conv2", "conv3", *(f"dense.{i}" for i in range(len(hidden) + 1))]
    weights = dict(student.net.state_dict())
    for name, layer in zip(names, layers, strict=True):
        weights |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    return student_with_weights(replace(student.shape, widths=widths, hidden=hidden), weights)


def _sequential_copy(student: Student) -> nn.Sequential:
    """Returns the student's layers as one chain on pixels in [0, 1], which torch-pruning can trace."""
    net = copy.deepcopy(student.net).requires_grad_(True)
    if not isinstance(net, ConvNet) or student.shape.design != "nature" or student.shape.rank:
        raise ValueError("structured pruning needs three convolutions and plain dense layers; use another student")
    layers: list[nn.Module] = []
    # The ReLU after Flatten changes nothing: its inputs are outputs of a ReLU.
    for layer in (*net.convolutions, nn.Flatten(), *net.dense):
        layers += [layer, nn.ReLU()]
    # Group magnitudes are compared in one unit, too.
    net.conv1.weight.data *= pixel_unit(student)
    plain = nn.Sequential(*layers[:-1])  # no ReLU after the logits
    return plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


def _num_kept(width: int, kept: float) -> int:
    # Rounded to the nearest: rounded down, each of the many small steps would remove a channel of every layer.
    return max(1, round(kept * width))


def _num_parameters(student: Student, kept: float) -> int:
    """Returns the number of parameters with a fraction of every layer's channels and units."""
    shape = student.shape
    widths = [_num_kept(width, kept) for width in shape.widths]
    hidden = [_num_kept(width, kept) for width in shape.hidden]
    # On the meta device nothing is allocated; the search calls this hundreds of times.
    with torch.device("meta"):
        return num_parameters(ConvNet(widths, hidden, shape.num_actions))


def _prune_layers(plain: nn.Sequential, obs_shape: tuple[int, ...], kept: float) -> None:
    """Removes all but a fraction of the channels and units of every layer but the last, in place."""
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; structured pruning needs it: pip install 'policykd[compress]'") from error
    ratios: dict[nn.Module, float] = {}
    for layer in list(plain)[:-1]:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            width = layer.weight.shape[0]
            # Half a channel more, because torch-pruning rounds the number that it removes up.
            ratios[layer] = 1.0 - min(width, _num_kept(width, kept) + 0.5) / width
    # Ranked across layers, group magnitudes narrow the second convolution to one channel (docs/compression.md).
    pruner: Any = torch_pruning.pruner.BasePruner(
        plain,
        torch.ones(1, *obs_shape),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=False,
        pruning_ratio_dict=ratios,  # pyright: ignore[reportArgumentType]  # its annotation is invariant
        ignored_layers=[plain[-1]],
    )
    pruner.step()
