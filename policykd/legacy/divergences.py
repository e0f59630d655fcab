"""Formulas that losses and per-state weights are made of: policies of scores, and distances between policies.

Pure functions of tensors that never mix rows; `log_policy` and `entropy` stand in `agents/policy.py`, where an
ensemble needs them too. Suffixes name dimensions: B batch, A actions.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from policykd.agents.policy import entropy as entropy
from policykd.agents.policy import log_policy as log_policy
from policykd.agents.policy import upcast as upcast

SMALLEST_SPREAD = 1e-6
"""scores that lie closer together than this are equal to `standardised`"""


def kl_divergence_B(log_p_BA: Tensor, log_q_BA: Tensor) -> Tensor:
    """Returns KL(p || q) of each row of two log-policies, nats `(batch,)`."""
    return kl_div(log_q_BA, log_p_BA, log_target=True, reduction="none").sum(dim=-1)


def jensen_shannon_B(log_p_BA: Tensor, log_q_BA: Tensor, share: float = 0.5) -> Tensor:
    """Returns the Jensen-Shannon divergence of each row of two log-policies, nats `(batch,)` (Lin, 1991).

    share KL(p || m) + (1 - share) KL(q || m) with the mixture m = share p + (1 - share) q, which is never zero where p
    or q is not; at most log 2, at `share` 0.5.
    """
    log_m_BA = torch.logaddexp(log_p_BA + math.log(share), log_q_BA + math.log1p(-share))
    return share * kl_divergence_B(log_p_BA, log_m_BA) + (1.0 - share) * kl_divergence_B(log_q_BA, log_m_BA)


def without(scores_BA: Tensor, action_B: Tensor) -> Tensor:
    """Returns the scores of all actions but one a row, `(batch, num_actions - 1)`, in their order."""
    rank = torch.arange(scores_BA.shape[-1] - 1, device=scores_BA.device)
    return scores_BA.gather(-1, rank + (rank >= action_B[:, None]).long())


def taken_or_not(log_p_BA: Tensor, action_B: Tensor) -> Tensor:
    """Returns log p(action) and log(1 - p(action)) of each row, `(batch, 2)`.

    The second is a sum over the other actions, since 1 - p(action) is 0 in float32 from p(action) = 1 - 3e-8 on.
    """
    log_taken_B1 = log_p_BA.gather(-1, action_B[:, None])
    return torch.cat([log_taken_B1, without(log_p_BA, action_B).logsumexp(dim=-1, keepdim=True)], dim=-1)


def standardised(scores_BA: Tensor) -> Tensor:
    """Returns (scores - mean) / standard deviation over the actions of each row (Sun et al., 2024).

    The deviation is the population's, the root of the mean square. A row of equal scores is all zeros, with a finite
    gradient. The largest difference goes out first: the square of 1e38 would overflow, that of 1e-38 vanish.
    """
    scores_BA = upcast(scores_BA)
    advantage_BA = scores_BA - scores_BA.amax(dim=-1, keepdim=True).detach()
    advantage_BA = advantage_BA / advantage_BA.detach().abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_SPREAD)
    centred_BA = advantage_BA - advantage_BA.mean(dim=-1, keepdim=True)
    # up to 5000 numbers that span [-1, 0] vary by more than 1e-4: the clamp sees only spreads below the smallest
    return centred_BA / centred_BA.square().mean(dim=-1, keepdim=True).clamp(min=1e-4).sqrt()
