"""What SB3's algorithms need to learn from a teacher: its scores beside their minibatches, and what its term weighs.

Suffixes name dimensions: B batch, A actions.
"""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Tensor, nn

from policykd.agents.policy import Policy
from policykd.legacy.losses import log_policy
from policykd.legacy.schedules import Measured, Quantity, ReturnGap, ReturnReached, value

ARRAYS = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary

LABELLED_AT_ONCE = 1024
"""states that a teacher scores in one call"""
ENDS_WITHOUT_A_GAME = 20
"""of every environment, after which nothing seems to report its games; a lost life may be an end too"""


class Taught(BaseAlgorithm):
    """What every algorithm here has besides SB3's: a teacher, and what its term weighs as the run goes on."""

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        teacher: Policy | None = None,
        teacher_temperature: float = 1.0,
        distillation_weight: Quantity = 1.0,
        teacher_return: float | None = None,
        random_return: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """Takes SB3's arguments and these.

        Args:
            policy: SB3's.
            env: SB3's; its actions are discrete, its observations one array.
            teacher: scores observations as the environment gives them, `(batch, *obs_shape)`, `(batch, num_actions)`.
                It is not saved; give it again to `load(path, env, teacher=...)` to train further.
            teacher_temperature: divides the teacher's scores: 1 for PPO and A2C, 0.01 for Q-values (Rusu et al., 2015).
            distillation_weight: a number, or a schedule over the run or over the measured returns; not negative.
            teacher_return: for schedules that compare the student's last 100 games with it.
            random_return: of random play, likewise.
            **kwargs: SB3's, for the algorithm.

        Raises:
            ValueError: no teacher, spaces that are not those, a temperature that is not positive, a negative weight, or
                a `rollout_buffer_class` without room for the teacher's answers.
        """
        if teacher is None and kwargs.get("_init_setup_model", True):
            raise ValueError(f"{type(self).__name__} has no teacher; give teacher=, anything that scores observations")
        if not 0.0 < teacher_temperature < math.inf:
            raise ValueError(
                f"teacher_temperature must be positive, not {teacher_temperature}; 1 for PPO and A2C, 0.01 for DQN"
            )
        if isinstance(distillation_weight, int | float) and not 0.0 <= distillation_weight < math.inf:
            raise ValueError(
                f"distillation_weight must not be negative, not {distillation_weight}; 0 leaves the teacher out"
            )
        self.teacher, self.teacher_temperature = teacher, teacher_temperature
        self.distillation_weight = distillation_weight
        self.teacher_return, self.random_return = teacher_return, random_return
        self._ends_without_a_game = 0
        super().__init__(policy, env, **kwargs)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if not isinstance(env.action_space, spaces.Discrete):
            raise ValueError(f"a teacher scores discrete actions, not {env.action_space}; give another environment")
        if not isinstance(env.observation_space, ARRAYS):
            kind = type(env.observation_space).__name__
            raise ValueError(f"a teacher sees one array, not {kind} observations; flatten the environment's")
        return BaseAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def learn(self, *args: Any, **kwargs: Any) -> Any:
        """Learns as SB3's algorithm does, with its arguments.

        Raises:
            FloatingPointError: losses, gradients, weights or scores that are not finite: it has diverged.
        """
        try:
            super().learn(*args, **kwargs)  # type: ignore[safe-super]
            self._check_scores()
        except ValueError as error:
            if "to satisfy the constraint" not in str(error):  # what torch says of a policy that is no distribution
                raise
            raise FloatingPointError(diverged("scores", self.num_timesteps)) from error
        return self

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
            ValueError: an agent loaded without its teacher, or a teacher of another number of actions.
        """
        if self.teacher is None:
            raise ValueError(f"this {type(self).__name__} was loaded without its teacher; load(path, env, teacher=...)")
        scores_BA = self.teacher(obs).to(self.device, torch.float32)
        expected = len(obs), int(self.action_space.n)  # type: ignore[attr-defined]
        if scores_BA.shape != expected:
            found = tuple(scores_BA.shape)
            raise ValueError(f"the teacher's scores are {found}, not {expected}; give one of this game")
        return log_policy(scores_BA, self.teacher_temperature).clone()  # out of a teacher's inference mode

    def check_weights(self) -> None:
        """Raises FloatingPointError where the weights are not finite."""
        sums = torch.stack([weight.detach().sum() for weight in self.policy.parameters()])
        if not sums.isfinite().all():
            raise FloatingPointError(diverged("weights", self.num_timesteps))

    @torch.no_grad()
    def _check_scores(self) -> None:
        """Raises, in torch's words or ours, where the policy of the last states is no distribution."""
        if self._last_obs is None:
            return
        obs, policy = obs_as_tensor(self._last_obs, self.device), self.policy
        if isinstance(policy, ActorCriticPolicy):
            policy.get_distribution(obs)
        elif not policy.q_net(obs).isfinite().all():  # type: ignore[operator]
            raise FloatingPointError(diverged("scores", self.num_timesteps))

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        if self.ep_info_buffer or dones is None or not isinstance(self.distillation_weight, ReturnGap | ReturnReached):
            return
        before, limit = self._ends_without_a_game, ENDS_WITHOUT_A_GAME * self.n_envs
        self._ends_without_a_game += int(np.sum(dones))
        if before <= limit < self._ends_without_a_game:
            warnings.warn(
                f"{self._ends_without_a_game} episodes ended and none was reported, so a weight that follows the return"
                " stays as it is; wrap the environment in SB3's Monitor or VecMonitor",
                stacklevel=2,
            )

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
    """Takes one step of a policy's own optimizer.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; the weights stay as they are.
    """
    optimizer: Any = policy.optimizer
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    if not torch.stack([loss.detach(), norm]).isfinite().all():
        raise FloatingPointError(diverged(f"loss ({loss.item():g}) or gradient ({norm.item():g})"))
    optimizer.step()


def diverged(what: str, steps: int | None = None) -> str:
    """Returns the line for a student whose numbers are not finite any more."""
    when = "" if steps is None else f" after {steps:,} steps"
    return f"the student's {what} are not finite{when}: it has diverged; lower --learning-rate or --weight"


def buffer_class(given: Any) -> type[TaughtRolloutBuffer]:
    """Returns the rollout buffer of an on-policy algorithm.

    Raises:
        ValueError: one of the user's own that has no room for the teacher's answers.
    """
    if given is None:
        return TaughtRolloutBuffer
    if not (isinstance(given, type) and issubclass(given, TaughtRolloutBuffer)):
        name = getattr(given, "__name__", given)
        raise ValueError(f"rollout_buffer_class {name} has no teacher's answers; subclass TaughtRolloutBuffer")
    return given
