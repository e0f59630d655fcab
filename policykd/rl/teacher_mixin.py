"""A teacher for SB3's algorithms: the mixin that evaluates and weights it, and a rollout buffer with its log-policies.

Shape suffixes: B batch, A actions, N stored states.
"""

import math
import warnings
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize, is_vecenv_wrapped
from torch import Tensor, nn

from policykd.agents.policy import Policy, log_policy
from policykd.schedules import Progress, Quantity, Schedule, check_bounds, follows_return, resolve

ARRAY_SPACES = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
LABEL_BATCH_SIZE = 1024
"""states per call of the teacher"""


class TeacherMixin(BaseAlgorithm):
    """An SB3 algorithm with a teacher and a weighted distillation term; precedes SB3's class in the bases."""

    default_weight: ClassVar[float | Schedule] = 1.0

    def __init__(
        self,
        *args: Any,
        teacher: Policy | None = None,
        teacher_temperature: float | None = None,
        distillation_weight: Quantity | None = None,
        reference_returns: tuple[float, float | None] = (0.0, None),
        **kwargs: Any,
    ) -> None:
        """Builds SB3's algorithm from its own arguments and these.

        Args:
            *args: SB3's `policy` and `env`. Actions are discrete, and an observation is one array.
            teacher: maps observations as the environment returns them, `(batch, *obs_shape)`, to logits or Q-values
                `(batch, num_actions)`. It is not saved: pass it to `load(path, env, teacher=...)` to continue training.
            teacher_temperature: divides the teacher's outputs; None takes the teacher's own, or 1 if it has none.
            distillation_weight: a number or a schedule, not negative; None is the `default_weight`.
            reference_returns: mean episodic returns of a random policy and of the teacher, for schedules that compare
                the student's last 100 episodes with them.
            **kwargs: SB3's other arguments.

        Raises:
            ValueError: no teacher, an unsupported space, or an invalid temperature or weight.
        """
        # SB3's `load` builds the object first and sets the teacher afterwards.
        if teacher is None and kwargs.get("_init_setup_model", True):
            raise ValueError(f"{type(self).__name__} has no teacher; give teacher=, a function of observations")
        if teacher_temperature is None:
            teacher_temperature = getattr(teacher, "temperature", 1.0)
        check_temperature("teacher_temperature", teacher_temperature)
        if distillation_weight is None:
            distillation_weight = self.default_weight
        check_bounds("distillation_weight", distillation_weight, 0.0)
        self.teacher = teacher
        self.teacher_temperature = teacher_temperature
        self.distillation_weight = distillation_weight
        self.reference_returns = reference_returns
        super().__init__(*args, **kwargs)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if not isinstance(env.action_space, spaces.Discrete):
            raise ValueError(f"distillation needs discrete actions, not {env.action_space}; give another environment")
        if not isinstance(env.observation_space, ARRAY_SPACES):
            kind = type(env.observation_space).__name__
            raise ValueError(f"distillation needs one array, not {kind} observations; flatten the environment's")
        return BaseAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def learn(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as SB3's algorithm does, with its arguments.

        Raises:
            FloatingPointError: losses, gradients, weights or outputs are not finite: training has diverged.
        """
        env = self.get_env()
        is_monitored = env and (is_vecenv_wrapped(env, VecMonitor) or all(env.env_is_wrapped(Monitor)))
        if follows_return(self.distillation_weight) and not is_monitored:
            warnings.warn(
                "nothing reports episodic returns, so a weight that follows the return stays constant; wrap the"
                " environment in SB3's Monitor or VecMonitor",
                stacklevel=2,
            )
        try:
            super().learn(*args, **kwargs)  # type: ignore[safe-super]
            self.check_weights()
        except ValueError as error:
            # torch.distributions reports NaN logits as a violated constraint.
            if "to satisfy the constraint" not in str(error):
                raise
            raise FloatingPointError(diverged("outputs", self.num_timesteps)) from error
        return self

    @property
    def num_gradient_steps(self) -> int:
        """Number of optimizer steps so far."""
        return self._n_updates

    def current_weight(self) -> float:
        """Returns the distillation weight at the current progress of the run and return of the student."""
        # SB3 keeps the last 100 episodes.
        returns = [float(episode["r"]) for episode in self.ep_info_buffer or []]
        random_return, teacher_return = self.reference_returns
        student_return = float(np.mean(returns)) if returns else None
        done = 1.0 - self._current_progress_remaining
        return resolve(self.distillation_weight, Progress(done, student_return, teacher_return, random_return))

    @torch.no_grad()
    def teacher_log_policy(self, obs: Tensor) -> Tensor:
        """Returns the teacher's log softmax(outputs / temperature), float32 `(batch, num_actions)` on our device.

        Raises:
            ValueError: the agent was loaded without its teacher, or the teacher has another number of actions.
        """
        if self.teacher is None:
            raise ValueError(f"this {type(self).__name__} was loaded without its teacher; load(path, env, teacher=...)")
        teacher_BA = self.teacher(obs).to(self.device, torch.float32)
        expected = (len(obs), int(self.action_space.n))  # type: ignore[attr-defined]
        if teacher_BA.shape != expected:
            found = tuple(teacher_BA.shape)
            raise ValueError(f"the teacher's outputs are {found}, not {expected}; give one of this environment")
        # The clone leaves the teacher's inference mode, whose tensors autograd cannot save.
        return log_policy(teacher_BA, self.teacher_temperature).clone()

    def check_weights(self) -> None:
        """Raises FloatingPointError if a weight is not finite."""
        # A sum per tensor: NaN and infinity survive it, and one synchronisation with the device is enough.
        sums = torch.stack([weight.detach().sum() for weight in self.policy.parameters()])
        if not sums.isfinite().all():
            raise FloatingPointError(diverged("weights", self.num_timesteps))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "teacher", "rollout_buffer_class"]


class TeacherRolloutSamples(NamedTuple):
    """A minibatch of SB3's rollout buffer with the teacher's log-policies."""

    observations: Tensor
    actions: Tensor
    old_values: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    teacher_log_BA: Tensor


class TeacherRolloutBuffer(RolloutBuffer):
    """SB3's rollout buffer with the teacher's log-policies, which are computed once for all epochs."""

    teacher_log_NA: np.ndarray
    """float32 `(states, num_actions)`, in the order in which SB3 flattens its arrays"""

    def add_teacher_labels(self, agent: TeacherMixin) -> None:
        """Evaluates the agent's teacher on every state of the rollout."""
        # In SB3's order of rows, in batches that bound the memory of large rollouts.
        obs_N = self.swap_and_flatten(self.observations)
        pieces = np.array_split(obs_N, math.ceil(len(obs_N) / LABEL_BATCH_SIZE))
        labels = [agent.teacher_log_policy(self.to_torch(piece)).cpu().numpy() for piece in pieces]
        self.teacher_log_NA = np.concatenate(labels)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> TeacherRolloutSamples:
        samples = super()._get_samples(batch_inds, env)
        return TeacherRolloutSamples(*samples, self.to_torch(self.teacher_log_NA[batch_inds]))


def optimizer_step(policy: nn.Module, loss: Tensor, max_grad_norm: float) -> None:
    """Takes one step of a policy's own optimizer on a loss, with the gradient's norm clipped.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; the weights stay unchanged.
    """
    optimizer: Any = policy.optimizer
    optimizer.zero_grad()
    loss.backward()
    # Checked before the step, so that the last finite weights stay.
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    if not torch.stack([loss.detach(), norm]).isfinite().all():
        raise FloatingPointError(diverged(f"loss ({loss.item():g}) or gradient ({norm.item():g})"))
    optimizer.step()


def diverged(quantity: str, steps: int | None = None) -> str:
    """Returns the error message for a student of which some quantity is not finite."""
    when = "" if steps is None else f" after {steps:,} steps"
    return f"the student's {quantity} are not finite{when}: it has diverged; lower --learning-rate or --weight"


def check_temperature(name: str, temperature: float) -> None:
    """Raises ValueError if a temperature is not a positive number."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{name} must be positive, not {temperature}; 1 for PPO and A2C, 0.01 for DQN")
