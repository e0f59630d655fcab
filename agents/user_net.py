"""A module of the user's as a network: what it takes and gives is checked once, and what of it acts is known."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from policykd.agents.networks import check_obs


class UserNet(nn.Module):
    """Any module that maps uint8 frames or float vectors to scores, with the attributes that policykd's networks have.

    Where the module has tensors `centre` and `scale`, a student's input scaling is written into them.
    """

    def __init__(self, module: nn.Module, obs_shape: Sequence[int], num_actions: int) -> None:
        """Takes the module itself, not a copy, and tries it on two observations.

        Raises:
            ValueError: it fails, or gives something else than float32 scores `(batch, num_actions)`.
        """
        super().__init__()
        self.module, self.obs_shape, self.num_actions = module, tuple(obs_shape), num_actions
        self.temperature = 1.0
        name, is_training = type(module).__name__, module.training
        try:
            with torch.no_grad():
                scores = module.eval()(self.blank_obs(2))
        except Exception as error:
            reason = " ".join(str(error).split())[:150] or type(error).__name__
            raise ValueError(f"{name} fails on two blank observations {self.obs_shape} ({reason}); mend it") from error
        finally:
            module.train(is_training)
        expected = (2, num_actions)
        if not isinstance(scores, Tensor) or scores.dtype != torch.float32 or tuple(scores.shape) != expected:
            found = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"{name} gives {found} of two observations, expected torch.float32 {expected}; return scores alone"
            )

    def forward(self, obs: Tensor) -> Tensor:
        """Returns scores, float32 `(batch, num_actions)`.

        Raises:
            ValueError: observations of another shape or kind.
        """
        check_obs(obs, self.obs_shape)
        scores_BA: Tensor = self.module(obs)
        return scores_BA if self.temperature == 1.0 else scores_BA / self.temperature

    def blank_obs(self, num: int) -> Tensor:
        """Returns observations of zeros, uint8 frames or float32 vectors `(num, *obs_shape)`, where the module is."""
        tensor = next(chain(self.module.parameters(), self.module.buffers()), torch.empty(0))
        kind = torch.uint8 if len(self.obs_shape) == 3 else torch.float32
        return torch.zeros((num, *self.obs_shape), dtype=kind, device=tensor.device)

    def acting_parameters(self) -> list[nn.Parameter]:
        """Returns what scores depend on, each tensor once: a critic beside them is left out."""
        weights, is_training = dict(self.module.named_parameters()), self.module.training
        with torch.inference_mode(False), torch.enable_grad():
            copies = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
            scores_BA = torch.func.functional_call(self.module.eval(), copies, (self.blank_obs(2),))
            found = torch.autograd.grad(scores_BA.sum(), list(copies.values()), allow_unused=True)
        self.module.train(is_training)
        return [weight for weight, gradient in zip(weights.values(), found, strict=True) if gradient is not None]
