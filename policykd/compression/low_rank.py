"""Low-rank factorization: the first dense layer becomes the product of two thin ones.

The truncated singular value decomposition W = U S V^T is the best approximation of its rank (Eckart & Young, 1936);
Sainath et al. (2013) applied it to the layers of acoustic models.

Suffixes name dimensions: O outputs, I inputs, R rank.
"""

from dataclasses import replace

import torch

from policykd.agents.student import Student
from policykd.compression.fine_tuning import FROM_TRAINED, FineTuning
from policykd.compression.networks import student_with_weights


def factorize_and_tune(student: Student, tuning: FineTuning, rank: int) -> Student:
    """Returns a student whose first dense layer has the given rank, fine-tuned with the whole budget.

    A NatureCNN's convolutions alone hold 78,000 parameters, so less than 5 % of the teacher cannot be reached.

    Raises:
        ValueError: as for `factorize`.
    """
    return tuning.train_fully(factorize(tuning.prepare(student), rank), FROM_TRAINED)


@torch.no_grad()
def factorize(student: Student, rank: int) -> Student:
    """Returns a student whose first dense layer is replaced by its best approximation of a rank.

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
