"""Distances between what two networks compute on the way to their scores, and of one network from itself.

Every formula is a pure function and gives one number a row; those that compare the rows with each other give row i's
mean over the others, so that what they say of a batch depends on how it is cut into parts. Suffixes name dimensions: B
batch, A actions, F features, P pixels of all maps, E ends of an angle, C H W an image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from policykd.legacy.divergences import kl_divergence_B, log_policy

NUM_ENDS = 16
"""other rows between which a row's angles are measured; the rows of a batch are drawn at random"""
MAX_SHIFT = 4
"""pixels, of the frames' 84 (Kostrikov et al., 2021)"""
_ZERO_LENGTH = 1e-6


def value_loss_B(value_B: Tensor, teacher_value_B: Tensor) -> Tensor:
    """Returns (v_S - v_T)^2 of each row, squared units of the teacher's reward."""
    return (value_B - teacher_value_B).square()


def hint_loss_B(projected_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    """Returns |W h_S + b - h_T|^2 / |h_T|^2 of each row (FitNets; Romero et al., 2015).

    The paper has the mean squared error; divided by the teacher's own it has no unit, and 1 is what zeros would cost.
    """
    return (projected_BF - teacher_BF).square().sum(dim=-1) / teacher_BF.square().sum(dim=-1).clamp(min=_ZERO_LENGTH)


def attention_maps(maps: Sequence[Tensor]) -> Tensor:
    """Returns where each map is active: sum_c x_c^2, of length 1 over its pixels, all maps in a row `(batch, pixels)`.

    Args:
        maps: activations `(batch, channels, height, width)`, as many channels as they may have.
    """
    return torch.cat([_unit(m.float().square().sum(dim=1).flatten(1)) for m in maps], dim=1)


def attention_loss_B(attention_BP: Tensor, teacher_BP: Tensor, num_maps: int) -> Tensor:
    """Returns the mean over the maps of |q_S / |q_S| - q_T / |q_T||^2, from 0 to 2 (Zagoruyko & Komodakis, 2017)."""
    return (attention_BP - teacher_BP).square().sum(dim=-1) / num_maps


def similarity_loss_B(hidden_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    """Returns sum_j (g_S,ij - g_T,ij)^2 of each row i, g = the rows of H H^T at length 1 (Tung & Mori, 2019).

    The paper divides by the batch's size once more; this does not shrink as a batch grows, and lies between 0 and 4.
    """
    return (_unit(hidden_BF @ hidden_BF.T) - _unit(teacher_BF @ teacher_BF.T)).square().sum(dim=-1)


def distance_loss_B(hidden_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    """Returns the mean over j != i of Huber(d_S,ij - d_T,ij), d = |h_i - h_j| over its mean (Park et al., 2019)."""
    others = max(1, len(hidden_BF) - 1)
    return F.huber_loss(_distances(hidden_BF), _distances(teacher_BF), reduction="none").sum(dim=-1) / others


def angle_loss_B(hidden_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    """Returns the mean over j != k of Huber(cos_S,jik - cos_T,jik), cosines of the angle at i (Park et al., 2019).

    The ends j and k are the `NUM_ENDS` rows after i, not all: a batch costs its size times a constant, not its cube.
    """
    num_ends = min(NUM_ENDS, len(hidden_BF) - 1)
    off_diagonal = max(1, num_ends * (num_ends - 1))
    cosines, expected = _cosines(hidden_BF, num_ends), _cosines(teacher_BF, num_ends)
    loss_BEE = F.huber_loss(cosines, expected, reduction="none")
    loss_B: Tensor = (loss_BEE.sum(dim=(1, 2)) - loss_BEE.diagonal(dim1=1, dim2=2).sum(dim=-1)) / off_diagonal
    return loss_B


def relational_loss_B(hidden_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    """Returns distance + 2 angle, the paper's proportion of the two (Park et al., 2019)."""
    return distance_loss_B(hidden_BF, teacher_BF) + 2.0 * angle_loss_B(hidden_BF, teacher_BF)


def shift_loss_B(scores_BA: Tensor, shifted_BA: Tensor) -> Tensor:
    """Returns KL(stop-gradient pi(x) || pi(shifted x)) of each row, nats."""
    return kl_divergence_B(log_policy(scores_BA.detach()), log_policy(shifted_BA))


def shifted_frames(obs_BCHW: Tensor, shifts_B2: Tensor) -> Tensor:
    """Returns frames moved by whole pixels, the border repeated behind them (Kostrikov et al., 2021).

    Args:
        obs_BCHW: of any kind, all channels of a row move alike.
        shifts_B2: rows down the picture and columns along it, from -4 to 4, that each pixel is taken from.
    """
    batch, channels, height, width = obs_BCHW.shape
    left, right = (edge.expand(-1, -1, -1, MAX_SHIFT) for edge in (obs_BCHW[..., :1], obs_BCHW[..., -1:]))
    windows = torch.cat([left, obs_BCHW, right], dim=3).unfold(3, width, 1)  # a third of the time of indexing pixels
    rows_B, channels_C = (torch.arange(n, device=obs_BCHW.device) for n in (batch, channels))
    down_B, along_B = shifts_B2.unbind(dim=1)
    from_BH = (torch.arange(height, device=obs_BCHW.device) + down_B[:, None]).clamp(0, height - 1)
    return windows[rows_B[:, None, None], channels_C[:, None], from_BH[:, None], (along_B + MAX_SHIFT)[:, None, None]]


def _unit(x: Tensor) -> Tensor:
    """Returns vectors at length 1, along the last dimension; none where there is no length, and no gradient there."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    is_zero = length < _ZERO_LENGTH
    return (x / length.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0)


def _distances(hidden_BF: Tensor) -> Tensor:
    """Returns the distances between rows over their mean, `(batch, batch)`; 0 on the diagonal."""
    distances_BB = torch.cdist(hidden_BF, hidden_BF, compute_mode="donot_use_mm_for_euclid_dist")
    num_pairs = max(1, len(hidden_BF) * (len(hidden_BF) - 1))
    return distances_BB / (distances_BB.sum() / num_pairs).clamp(min=_ZERO_LENGTH)


def _cosines(hidden_BF: Tensor, num_ends: int) -> Tensor:
    """Returns the cosines of the angles at each row between the `num_ends` rows after it, `(batch, ends, ends)`."""
    if num_ends < 1:
        return hidden_BF.new_zeros(len(hidden_BF), 1, 1)
    ends = [hidden_BF.roll(-n, dims=0) - hidden_BF for n in range(1, num_ends + 1)]
    directions_BEF = _unit(torch.stack(ends, dim=1))
    return directions_BEF @ directions_BEF.transpose(1, 2)
