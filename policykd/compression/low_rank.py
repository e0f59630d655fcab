"""A dense layer as a product of two thin ones."""

from dataclasses import dataclass, field, replace

import torch

from policykd.agents.student import Student
from policykd.compression.compressors import FROM_TRAINED, Fit, with_weights
from policykd.legacy.losses import ForwardKL, Loss


@dataclass(frozen=True)
class LowRank:
    """The first dense layer by its largest singular values (Sainath et al., 2013), then tuned.

    A NatureCNN's convolutions alone hold 78,000 parameters: below 5 % of the network there is no such student.
    """

    rank: int
    learning_rate: float = FROM_TRAINED
    loss: Loss = field(default_factory=ForwardKL)

    def __call__(self, begin: Student, fit: Fit, /) -> Student:
        """Returns the student whose first dense layer has this rank."""
        student = factorised(fit.begin(begin), self.rank)
        for _ in fit.rounds(fit.learner(student, is_trained=True), self.loss, self.learning_rate):
            pass
        return student.eval()


@torch.no_grad()
def factorised(student: Student, rank: int) -> Student:
    """Returns a student with its first dense layer replaced by its best approximation of a rank (Eckart & Young, 1936).

    Raises:
        ValueError: a rank that the layer does not have, or a layer that is factorised already.
    """
    weights = dict(student.net.state_dict())
    if student.shape.rank:
        raise ValueError(f"its dense layer has rank {student.shape.rank} already; begin with another network")
    weight_OI, bias_O = weights.pop("dense.0.weight"), weights.pop("dense.0.bias")
    if not 0 < rank <= min(weight_OI.shape):
        raise ValueError(f"rank must lie between 1 and {min(weight_OI.shape)}, not {rank}")
    left_OR, values_R, right_RI = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    root_R = values_R[:rank].sqrt()  # half of each value on either side, so that neither factor learns much faster
    moved = {_one_later(name): weight for name, weight in weights.items()}
    moved["dense.0.weight"] = (root_R[:, None] * right_RI[:rank]).float()
    moved["dense.1.weight"], moved["dense.1.bias"] = (left_OR[:, :rank] * root_R).float(), bias_O
    return with_weights(replace(student.shape, rank=rank), moved)


def _one_later(name: str) -> str:
    """Returns the name of a dense layer's weights once there is one more before it."""
    kind, _, rest = name.partition(".")
    if kind != "dense":
        return name
    index, _, which = rest.partition(".")
    return f"dense.{int(index) + 1}.{which}"
