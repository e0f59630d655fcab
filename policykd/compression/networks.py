"""Students built from the weights of other networks: the starting points of fine-tuning.

Suffixes name dimensions: O outputs, I inputs, H W a filter, R rank.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from policykd.agents.networks import ConvNet, FrameNet
from policykd.agents.student import Shape, Student
from policykd.agents.teacher import Teacher


def teacher_as_student(teacher: Teacher) -> Student:
    """Returns the teacher's own network as a student.

    Raises:
        ValueError: the teacher's network is not a NatureCNN that policykd rebuilt.
    """
    # Ensembles, ONNX files and pickled policies have no layers that pruning could reach.
    net = teacher.net
    if not isinstance(net, ConvNet):
        name = teacher.ref or teacher.path
        raise ValueError(f"{name}: the teacher is not a NatureCNN and cannot be pruned; use an SB3 archive")
    shape = Shape(net.widths, net.hidden, net.num_actions, net.obs_shape, temperature=teacher.temperature)
    return student_with_weights(shape, net.state_dict())


def student_with_weights(shape: Shape, weights: dict[str, Tensor]) -> Student:
    """Returns a trainable student of a shape, with copies of the given weights, by their names in the network."""
    student = Student(shape)
    student.net.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()})
    return student.requires_grad_(True).eval()


@torch.no_grad()
def with_normalized_input(student: Student, frames: Tensor) -> Student:
    """Returns a copy that computes the same function, with its input scaling fitted to some frames.

    SB3's networks take pixels in [0, 1]. Tuning on that scale is as badly conditioned as learning on it (docs/log.md).

    Args:
        student: a student on frames; it is not changed.
        frames: uint8 `(n, 84, 84)`.

    Raises:
        ValueError: not a student on frames.
    """
    copied = copy.deepcopy(student).requires_grad_(True)
    net = copied.net
    if not isinstance(net, FrameNet):
        raise ValueError("compression needs a student of policykd's own on frames; choose one of its sizes")
    # The first layer computes w (x - centre) / scale + b. Its equivalent on raw pixels is w' x + b'.
    weight_OIHW, bias_O = net.first_layer()
    copied.fit_input_normalization(frames)
    net.first.weight.copy_(weight_OIHW * net.scale)
    net.first.bias.copy_(bias_O + net.centre * weight_OIHW.sum(dim=(1, 2, 3)))  # type: ignore[union-attr]
    return copied


def pixel_unit(student: Student) -> float:
    """Returns the factor that converts the first convolution's weights to pixels in [0, 1].

    Magnitudes are compared in that unit. Otherwise the input scaling would decide how much of the first layer is
    pruned.
    """
    assert isinstance(student.net, FrameNet)
    return 255.0 / float(student.net.scale)


def weight_layers(student: Student) -> list[nn.Conv2d | nn.Linear]:
    """Returns the convolutions and dense layers in order."""
    return [layer for layer in student.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


@torch.no_grad()
def factorize(student: Student, rank: int) -> Student:
    """Returns a student whose first dense layer is the product of two thin ones: its best approximation of a rank.

    The truncated singular value decomposition is the best one (Eckart & Young, 1936; Sainath et al., 2013, for neural
    networks). A NatureCNN's convolutions alone hold 78,000 parameters, so it cannot go below 5 % of the teacher.

    Raises:
        ValueError: the rank exceeds that of the layer, or the layer is factorized already.
    """
    if student.shape.rank:
        raise ValueError(f"the dense layer has rank {student.shape.rank} already; start from another student")
    weights = dict(student.net.state_dict())
    weight_OI = weights.pop("dense.0.weight")
    bias_O = weights.pop("dense.0.bias")
    if not 0 < rank <= min(weight_OI.shape):
        raise ValueError(f"--rank must lie between 1 and {min(weight_OI.shape)}, not {rank}")

    left_OR, values_R, right_RI = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    # The root of each singular value goes to either factor, so that neither learns much faster than the other.
    root_R = values_R[:rank].sqrt()
    # The dense layers after the first are one place later in the new network.
    for i in range(len(student.shape.hidden), 0, -1):
        for kind in ("weight", "bias"):
            weights[f"dense.{i + 1}.{kind}"] = weights.pop(f"dense.{i}.{kind}")
    weights["dense.0.weight"] = (root_R[:, None] * right_RI[:rank]).float()
    weights["dense.1.weight"] = (left_OR[:, :rank] * root_R).float()
    weights["dense.1.bias"] = bias_O
    return student_with_weights(replace(student.shape, rank=rank), weights)
