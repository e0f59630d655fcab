"""Formulas of the auxiliary losses: distances between the hidden activations of two networks.

Every formula is a pure function that returns one number per row. Those that compare rows with each other return row
i's mean over the others, so their values depend on how a batch is cut into parts. Shape suffixes: B batch, A actions,
F features, P pixels of all maps, E ends of an angle, C H W an image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from policykd.agents.policy import log_policy
from policykd.losses import kl_divergence_B

NUM_ENDS = 16
"""other rows between which a row's angles are measured; the rows of a batch are drawn at random"""
MAX_SHIFT = 4
"""pixels, of the frames' 84 (Kostrikov et al., 2021)"""
_ZERO_LENGTH = 1e-6


def value_loss_B(value_B: Tensor, teacher_value_B: Tensor) -> Tensor:
    """Returns (v_S - v_T)^2 per row, squared units of the teacher's reward."""
    return (value_B - teacher_value_B).square()


def hint_loss_B(projected_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    """Returns |W h_S + b - h_T|^2 / |h_T|^2 per row (FitNets; Romero et al., 2015).

    The paper uses the mean squared error; relative to the teacher's own it has no unit, and predicting zeros costs 1.
    """
    squared_error_B = (projected_BF - teacher_BF).square().sum(dim=-1)
    return squared_error_B / teacher_BF.square().sum(dim=-1).clamp(min=_ZERO_LENGTH)


def attention_maps(maps: Sequence[Tensor]) -> Tensor:
    """Returns where each map is active: sum_c x_c^2, normalised to length 1, all maps side by side `(batch, pixels)`.

    Args:
        maps: activations `(batch, channels, height, width)`; the number of channels may differ.
    """
    return torch.cat([_unit(m.float().square().sum(dim=1).flatten(1)) for m in maps], dim=1)


def attention_loss_B(attention_BP: Tensor, teacher_BP: Tensor, num_maps: int) -> Tensor:
    """Returns the mean over the maps of |q_S / |q_S| - q_T / |q_T||^2, from 0 to 2 (Zagoruyko & Komodakis, 2017)."""
    return (attention_BP - teacher_BP).square().sum(dim=-1) / num_maps


def similarity_loss_B(hidden_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    """Returns sum_j (g_S,ij - g_T,ij)^2 per row i, with g the rows of H H^T at length 1 (Tung & Mori, 2019).

    The paper divides by the batch size once more; this does not shrink as a batch grows, and lies between 0 and 4.
    """
    return (_unit(hidden_BF @ hidden_BF.T) - _unit(teacher_BF @ teacher_BF.T)).square().sum(dim=-1)


def distance_loss_B(hidden_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    """Returns the mean over j != i of Huber(d_S,ij - d_T,ij), d = |h_i - h_j| over its mean (Park et al., 2019)."""
    num_others = max(1, len(hidden_BF) - 1)
    loss_BB = F.huber_loss(_relative_distances(hidden_BF), _relative_distances(teacher_BF), reduction="none")
    return loss_BB.sum(dim=-1) / num_others


def angle_loss_B(hidden_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    """Returns the mean over j != k of Huber(cos_S,jik - cos_T,jik), cosines of the angle at i (Park et al., 2019).

    The ends j and k are the `NUM_ENDS` rows after i, not all: a batch costs its size times a constant, not its cube.
    """
    # The diagonal j = k is an angle of 0 in both networks: it is taken out of sum and count.
    num_ends = min(NUM_ENDS, len(hidden_BF) - 1)
    num_pairs = max(1, num_ends * (num_ends - 1))
    cosines_BEE = _cosines(hidden_BF, num_ends)
    loss_BEE = F.huber_loss(cosines_BEE, _cosines(teacher_BF, num_ends), reduction="none")
    diagonal_B = loss_BEE.diagonal(dim1=1, dim2=2).sum(dim=-1)
    loss_B: Tensor = (loss_BEE.sum(dim=(1, 2)) - diagonal_B) / num_pairs
    return loss_B


def relational_loss_B(hidden_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    """Returns distance + 2 angle, the paper's proportion of the two (Park et al., 2019)."""
    return distance_loss_B(hidden_BF, teacher_BF) + 2.0 * angle_loss_B(hidden_BF, teacher_BF)


def shift_loss_B(logits_BA: Tensor, shifted_BA: Tensor) -> Tensor:
    """Returns KL(stop-gradient pi(x) || pi(shifted x)) per row, nats."""
    return kl_divergence_B(log_policy(logits_BA.detach()), log_policy(shifted_BA))


def random_shifts(random_B: Tensor) -> Tensor:
    """Returns shifts of -4 to 4 pixels down and right, int64 `(batch, 2)`, made of 64 random bits per row."""
    num_shifts = 2 * MAX_SHIFT + 1
    # Two digits of the random number in base 9.
    down_B = random_B % num_shifts
    right_B = random_B // num_shifts % num_shifts
    return torch.stack([down_B, right_B], dim=1) - MAX_SHIFT


def shift_frames(obs_BCHW: Tensor, shifts_B2: Tensor) -> Tensor:
    """Returns frames shifted by whole pixels, with the border repeated (Kostrikov et al., 2021).

    Args:
        obs_BCHW: frames of any dtype; all channels of a row are shifted alike.
        shifts_B2: rows down and columns right, from -4 to 4, that each pixel is taken from.
    """
    batch_size, channels, height, width = obs_BCHW.shape
    device = obs_BCHW.device
    # Windows along the padded rows take a third of the time of indexing single pixels.
    left = obs_BCHW[..., :1].expand(-1, -1, -1, MAX_SHIFT)
    right = obs_BCHW[..., -1:].expand(-1, -1, -1, MAX_SHIFT)
    windows = torch.cat([left, obs_BCHW, right], dim=3).unfold(3, width, 1)
    rows_B = torch.arange(batch_size, device=device)
    channels_C = torch.arange(channels, device=device)
    down_B, right_B = shifts_B2.unbind(dim=1)
    from_BH = (torch.arange(height, device=device) + down_B[:, None]).clamp(0, height - 1)
    return windows[rows_B[:, None, None], channels_C[:, None], from_BH[:, None], (right_B + MAX_SHIFT)[:, None, None]]


def _unit(x: Tensor) -> Tensor:
    """Returns vectors at length 1 along the last dimension; zeros, without a gradient, where there is no length."""
    # Dead maps and repeated states have no direction; dividing by their length would give infinite gradients.
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    is_zero = length < _ZERO_LENGTH
    return (x / length.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0)


def _relative_distances(hidden_BF: Tensor) -> Tensor:
    """Returns the distances between rows over their mean, `(batch, batch)`; 0 on the diagonal."""
    # Not by matrix products: they lose the digits of small distances, and their gradient at 0 is nan.
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
