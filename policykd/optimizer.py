"""Muon for the weights of a small network, Adam for its biases.

The update of a weight matrix is its momentum with all singular values made about equal, so that rare directions are
learned as fast as frequent ones (Jordan et al., 2024). Shape suffixes: R rows, C columns.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""Adam's, for biases"""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""coefficients of the quintic iteration (Jordan et al., 2024)"""
UPDATE_RMS = 0.2
"""root mean square of an update, as of Adam's: one learning rate fits both (Liu et al., 2025)"""


class Muon(torch.optim.Optimizer):
    """Muon and Adam with one learning rate.

    A convolution's weight is a matrix of filters by inputs. As with torch's fused Adam, a step changes nothing where
    the attribute `found_inf`, a tensor, is 1; it never waits for the device, so a CUDA graph can hold it.
    """

    found_inf: Tensor

    def __init__(self, parameters: Iterable[Tensor], lr: Tensor) -> None:
        """Optimizes `parameters`; `lr` may be changed in place."""
        super().__init__(parameters, {"lr": lr})
        self.found_inf = torch.zeros((), device=lr.device)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Takes a step with the gradients in `grad`."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                # A gradient that is not finite must not enter the moments: NaN times 0 is NaN.
                gradient = torch.where(self.found_inf > 0, 0.0, parameter.grad)
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                    if parameter.ndim < 2:
                        state["square"] = torch.zeros_like(parameter)
                        state["step"] = torch.zeros((), device=parameter.device)
                kept = 1.0 - self.found_inf
                update = _muon(gradient, state, kept) if parameter.ndim >= 2 else _adam(gradient, state, kept)
                parameter.sub_(update * (group["lr"] * kept))


def _muon(gradient: Tensor, state: dict[str, Tensor], kept: Tensor) -> Tensor:
    """Returns the orthogonalised Nesterov momentum, scaled to Adam's size."""
    momentum = state["momentum"]
    momentum.mul_(1.0 - kept * (1.0 - MOMENTUM)).add_(gradient)
    matrix_RC = orthogonalized((gradient + MOMENTUM * momentum).flatten(1))
    return (matrix_RC * (UPDATE_RMS * math.sqrt(max(matrix_RC.shape)))).reshape(gradient.shape)


def _adam(gradient: Tensor, state: dict[str, Tensor], kept: Tensor) -> Tensor:
    """Returns Adam's update (Kingma & Ba, 2015)."""
    state["step"] += kept
    state["momentum"].lerp_(gradient, kept * (1.0 - BETA1))
    state["square"].lerp_(gradient.square(), kept * (1.0 - BETA2))
    # At the first step, if it is skipped, the moments are 0 and so is the update.
    steps = state["step"].clamp(min=1.0)
    mean = state["momentum"] / (1.0 - BETA1**steps)
    square = state["square"] / (1.0 - BETA2**steps)
    return mean / (square.sqrt() + EPSILON)


def orthogonalized(matrix_RC: Tensor) -> Tensor:
    """Returns a matrix with the singular vectors of `matrix_RC`, whose singular values are about 1 (0.7 to 1.2).

    Those far below the norm end below that. Five Newton-Schulz iterations, in float32 on every device: CPUs without
    bfloat16 would emulate it.
    """
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrix_RC / (matrix_RC.norm() + 1e-7)
    # The smaller of the two Gram matrices.
    is_tall = x.shape[0] > x.shape[1]
    x = x.t() if is_tall else x
    for _ in range(5):
        gram = x @ x.t()
        # a x + (b gram + c gram^2) x
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    orthogonal: Tensor = x.t() if is_tall else x
    return orthogonal
