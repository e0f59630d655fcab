"""A teacher for SB3's algorithms: the mixin that evaluates and weights it, and a rollout buffer with its log-policies.

SB3's own `train` computes the loss and takes the optimizer steps; a hook adds the teacher's term to that loss.

Shape suffixes: B batch, A actions, N stored states.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize, is_vecenv_wrapped
from torch import Tensor, nn

from policykd.agents.policy import Policy, log_policy
from policykd.losses import check_temperature, kl_divergence_B
from policykd.schedules import Progress, Quantity, Schedule, check_bounds, follows_return, resolve

LABEL_BATCH_SIZE = 1024
"""states per call of the teacher"""


class TeacherMixin(BaseAlgorithm):
    """An SB3 algorithm with a teacher and a weighted distillation term; precedes SB3's class in the bases."""

    default_weight: ClassVar[float | Schedule] = 1.0
    student_temperature: float = 1.0
    """divides the student's outputs"""
    output_layer: nn.Module
    """part of the policy that returns the student's outputs, `(batch, num_actions)`"""

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
        own_temperature: float = getattr(teacher, "temperature", 1.0)
        temperature = own_temperature if teacher_temperature is None else teacher_temperature
        check_temperature("teacher_temperature", temperature)
        if distillation_weight is None:
            distillation_weight = self.default_weight
        check_bounds("distillation_weight", distillation_weight, 0.0)
        self.teacher = teacher
        self.teacher_temperature: float = temperature
        self.distillation_weight = distillation_weight
        self.reference_returns = reference_returns
        super().__init__(*args, **kwargs)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if not isinstance(env.action_space, spaces.Discrete):
            raise ValueError(f"distillation needs discrete actions, not {env.action_space}; give another environment")
        if isinstance(env.observation_space, spaces.Dict):
            raise ValueError("distillation needs one array, not Dict observations; flatten the environment's")
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
            # A sum per tensor: NaN and infinity survive it, and one synchronisation with the device is enough.
            if not torch.stack([weight.detach().sum() for weight in self.policy.parameters()]).isfinite().all():
                raise FloatingPointError(diverged("weights", self.num_timesteps))
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

    def distillation_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns the distillation term of each state before its weight, nats `(batch,)`, from two log-policies."""
        return kl_divergence_B(teacher_log_BA, student_log_BA)

    def teacher_labels(self, inputs: Tensor) -> Tensor:
        """Returns the teacher's log-policies of the current minibatch; `inputs` are those of the output layer."""
        raise NotImplementedError

    def _train_with_teacher(self, weight: float, *args: Any) -> list[float]:
        """Runs SB3's own `train` with `weight` times the term added to its loss; returns the term per minibatch."""
        terms: list[float] = []
        divergences: list[float] = []

        def add_term(_: nn.Module, inputs: tuple[Tensor], outputs_BA: Tensor) -> Tensor:
            teacher_log_BA = self.teacher_labels(*inputs)
            student_log_BA = log_policy(outputs_BA, self.student_temperature)
            term = self.distillation_B(student_log_BA, teacher_log_BA).mean()
            terms.append(term.item())
            divergences.append(kl_divergence_B(teacher_log_BA, student_log_BA.detach()).mean().item())
            outputs: Tensor = _AddedTerm.apply(outputs_BA, weight * term)  # type: ignore[no-untyped-call]
            return outputs

        # Only while SB3 trains: elsewhere it evaluates states that have no labels.
        hook = self.output_layer.register_forward_hook(add_term)
        try:
            with finite_steps(self.policy):
                super().train(*args)  # type: ignore[misc]
        finally:
            hook.remove()
        losses = [loss for name, loss in self.logger.name_to_value.items() if name.endswith("loss")]
        if not np.isfinite(losses).all():
            raise FloatingPointError(diverged("losses", self.num_timesteps))
        # Means over the minibatches, as SB3 logs its own.
        self.logger.record("train/distillation_loss", float(np.mean(terms)))
        self.logger.record("train/teacher_kl", float(np.mean(divergences)))
        self.logger.record("train/distillation_weight", weight)
        return terms

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "teacher", "rollout_buffer_class"]


class _AddedTerm(torch.autograd.Function):
    """A policy's outputs, unchanged; whatever loss is computed from them, its gradient includes that of a term.

    So the loss itself stays SB3's. Mixture-of-experts models add their load-balancing losses in this way.
    """

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, term: Tensor) -> Tensor:
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, gradient.new_ones(())


@contextmanager
def finite_steps(policy: nn.Module) -> Iterator[None]:
    """Checks each gradient before the policy's optimizer uses it.

    Raises:
        FloatingPointError: the gradient is not finite; the weights stay unchanged.
    """
    optimizer: Any = policy.optimizer
    norms: list[Tensor] = []

    def check(*_: object) -> None:
        if not torch.stack(norms).norm().isfinite():
            raise FloatingPointError(diverged("gradients"))
        norms.clear()

    # SB3 clips the gradient before the step, which turns an infinite one into zeros: each norm is taken before that.
    hooks: list[Any] = [optimizer.register_step_pre_hook(check)]
    for weight in policy.parameters():
        hooks.append(weight.register_post_accumulate_grad_hook(lambda weight: norms.append(weight.grad.norm())))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class TeacherRolloutBuffer(RolloutBuffer):
    """SB3's rollout buffer with the teacher's log-policies, which are computed once for all epochs."""

    teacher_log_NA: np.ndarray
    """float32 `(states, num_actions)`, in the order in which SB3 flattens its arrays"""
    minibatch: RolloutBufferSamples
    """the last one that was drawn"""
    teacher_log_BA: Tensor
    """its log-policies of the teacher"""

    def add_teacher_labels(self, agent: TeacherMixin) -> None:
        """Evaluates the agent's teacher on every state of the rollout."""
        # In SB3's order of rows, in batches that bound the memory of large rollouts.
        obs_N = self.swap_and_flatten(self.observations)
        pieces = np.array_split(obs_N, math.ceil(len(obs_N) / LABEL_BATCH_SIZE))
        labels = [agent.teacher_log_policy(self.to_torch(piece)).cpu().numpy() for piece in pieces]
        self.teacher_log_NA = np.concatenate(labels)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> RolloutBufferSamples:
        self.minibatch = super()._get_samples(batch_inds, env)
        self.teacher_log_BA = self.to_torch(self.teacher_log_NA[batch_inds])
        return self.minibatch


def diverged(quantity: str, steps: int | None = None) -> str:
    """Returns the error message for a student of which some quantity is not finite."""
    when = "" if steps is None else f" after {steps:,} steps"
    return f"the student's {quantity} are not finite{when}: it has diverged; lower --learning-rate or --weight"
