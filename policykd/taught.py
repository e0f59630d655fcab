"""What SB3's algorithms need to learn from a teacher: its scores beside their minibatches, and what its term weighs.

Suffixes name dimensions: B batch, A actions.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

from policykd.agents.policy import Policy
from policykd.losses import log_policy
from policykd.schedules import Measured, Quantity, value

LABELLED_AT_ONCE = 1024
"""states that a teacher scores in one call"""


class Taught(BaseAlgorithm):
    """What every algorithm here has besides SB3's: a teacher, and what its term weighs as the run goes on."""

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        teacher: Policy | None = None,
        temperature: float = 1.0,
        distillation_weight: Quantity = 1.0,
        teacher_return: float | None = None,
        random_return: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """Takes SB3's arguments and these.

        Args:
            policy: SB3's.
            env: SB3's; its actions are discrete.
            teacher: scores observations as the environment gives them, `(batch, *obs_shape)`, `(batch, num_actions)`.
                It is not saved; give it again to `load(path, env, teacher=...)` to train further.
            temperature: divides the teacher's scores: 1 for PPO and A2C, 0.01 for Q-values (Rusu et al., 2015).
            distillation_weight: a number, or a schedule over the run or over the measured returns.
            teacher_return: for schedules that compare the student's last 100 games with it.
            random_return: of random play, likewise.
            **kwargs: SB3's, for the algorithm.

        Raises:
            ValueError: no teacher, actions that are not discrete, or a temperature that is not positive.
        """
        if teacher is None and kwargs.get("_init_setup_model", True):
            raise ValueError(f"{type(self).__name__} has no teacher; give teacher=, anything that scores observations")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}; 1 for PPO and A2C, 0.01 for DQN")
        self.teacher, self.temperature, self.distillation_weight = teacher, temperature, distillation_weight
        self.teacher_return, self.random_return = teacher_return, random_return
        super().__init__(policy, env, **kwargs)
        if env is not None and not isinstance(self.action_space, spaces.Discrete):
            raise ValueError(f"a teacher scores discrete actions, not {self.action_space}; give another environment")

    @property
    def num_gradient_steps(self) -> int:
        """How often the weights were changed."""
        return self._n_updates

    def current_weight(self) -> float:
        """Returns what the distillation weighs now."""
        games = [float(episode["r"]) for episode in self.ep_info_buffer or []]
        student_return = float(np.mean(games)) if games else None
        measured = Measured(student_return, self.teacher_return, self.random_return)
        return value(self.distillation_weight, 1.0 - self._current_progress_remaining, measured)

    @torch.no_grad()
    def teacher_log_policy(self, obs: Tensor) -> Tensor:
        """Returns the teacher's log softmax(scores / temperature), float32 `(batch, num_actions)` on our device.

        Raises:
            ValueError: an agent loaded without its teacher.
        """
        if self.teacher is None:
            raise ValueError(f"this {type(self).__name__} was loaded without its teacher; load(path, env, teacher=...)")
        scores_BA = self.teacher(obs).to(self.device, torch.float32)
        return log_policy(scores_BA, self.temperature).clone()  # out of a teacher's inference mode

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "teacher", "rollout_buffer_class"]


class TaughtSamples(NamedTuple):
    """A minibatch of SB3's rollout buffer, and what the teacher thinks of its states."""

    observations: Tensor
    actions: Tensor
    old_values: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    teacher_log_BA: Tensor


class TaughtRolloutBuffer(RolloutBuffer):
    """SB3's rollout buffer with the teacher's log-policies, computed once for all epochs."""

    teacher_log: np.ndarray
    """`(states, num_actions)`, in the order in which SB3 flattens its arrays"""

    def label(self, agent: Taught) -> None:
        """Asks the agent's teacher about every state of the rollout."""
        rows = self.swap_and_flatten(self.observations)
        pieces = np.array_split(rows, -(-len(rows) // LABELLED_AT_ONCE))
        self.teacher_log = np.concatenate([agent.teacher_log_policy(self.to_torch(p)).cpu().numpy() for p in pieces])

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> TaughtSamples:  # type: ignore[override]
        return TaughtSamples(*super()._get_samples(batch_inds, env), self.to_torch(self.teacher_log[batch_inds]))


def acted_on(policy: ActorCriticPolicy) -> Tensor:
    """Returns the log-policies `(batch, num_actions)`, with their gradient, of the last `evaluate_actions`."""
    distribution: Any = policy.action_dist.distribution
    log_policy_BA: Tensor = distribution.logits
    return log_policy_BA


def descend(policy: nn.Module, loss: Tensor, max_grad_norm: float) -> None:
    """Takes one step of a policy's own optimizer."""
    optimizer: Any = policy.optimizer
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    optimizer.step()
