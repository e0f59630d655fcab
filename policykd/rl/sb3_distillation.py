"""Distillation inside SB3's on-policy algorithms: PPO and A2C with a teacher.

Callbacks, logger, `save`, `predict` and the update itself stay SB3's. With a distillation weight of 0 an agent's
parameters equal those of SB3's own algorithm bit for bit, although the distillation term is computed.

Shape suffixes: B batch, A actions, N stored states.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from torch import Tensor, nn

from policykd.losses import kl_divergence_B
from policykd.rl.teacher_mixin import TeacherMixin, TeacherRolloutBuffer
from policykd.schedules import Linear, Schedule, check_bounds


@dataclass(frozen=True)
class StudentDrivenMethod:
    """The loss of a state that the student collects (Czarnecki et al., 2019); subclass it for a method of your own.

    The student's weights also decide which states it is trained on, so a method defines two things: the loss l(s) of a
    state, and whether an action is charged for the loss of the state that it leads to. Only if it is charged is the
    update the gradient of an objective; docs/rl.md has the derivation.
    """

    charges_actions: ClassVar[bool] = True
    """whether an action is charged for the loss of the next state, which makes the update an objective's gradient"""

    reward_weight: float = 0.0
    """factor of the environment's rewards; 0 trains on the teacher alone"""

    def __post_init__(self) -> None:
        check_bounds("reward_weight", self.reward_weight, 0.0)

    def loss_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns l(s) of each state, nats `(batch,)`, from two log-policies `(batch, num_actions)`."""
        raise NotImplementedError

    def cost_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns what the action that led to each state is charged, nats `(batch,)`, without a gradient."""
        # A reward is a number: the gradient through it is the score-function term of the policy gradient.
        loss_B = self.loss_B(student_log_BA, teacher_log_BA).detach()
        return loss_B if self.charges_actions else torch.zeros_like(loss_B)


@dataclass(frozen=True)
class OnPolicyDistillation(StudentDrivenMethod):
    """H(teacher || student) on the student's states, as if it did not choose them: not the gradient of an objective."""

    charges_actions: ClassVar[bool] = False

    def loss_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns H(teacher || student) = -sum_a p_T(a) log p_S(a)."""
        return cross_entropy_B(teacher_log_BA, student_log_BA)


@dataclass(frozen=True)
class _CrossEntropyMethod(StudentDrivenMethod):
    entropy_weight: float = 0.0
    """factor of H(p), which is subtracted from the paper's cross-entropy H(p || q); 1 makes it KL(p || q)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("entropy_weight", self.entropy_weight, 0.0, 1.0)


@dataclass(frozen=True)
class NDistill(_CrossEntropyMethod):
    """H(teacher || student) with its true gradient: r_hat_t = -gamma H(teacher || student)(s_{t+1})."""

    def loss_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns H(teacher || student) - entropy_weight H(teacher)."""
        # -sum p log q + w sum p log p, in one sum
        return cross_entropy_B(teacher_log_BA, student_log_BA - self.entropy_weight * teacher_log_BA)


@dataclass(frozen=True)
class ExpectedEntropyRegularised(_CrossEntropyMethod):
    """H(student || teacher) with its true gradient: r_hat_t = -gamma H(student || teacher)(s_{t+1}).

    Czarnecki et al. reward log p_T(a_{t+1} | s_{t+1}), a one-sample estimate of the same expectation. The exact
    expectation costs nothing more here and has less variance. With `entropy_weight` 0 the minimum plays the teacher's
    best action only.
    """

    def loss_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns H(student || teacher) - entropy_weight H(student)."""
        # The same with the roles exchanged: here both factors depend on the student.
        return cross_entropy_B(student_log_BA, teacher_log_BA - self.entropy_weight * student_log_BA)


def cross_entropy_B(log_p_BA: Tensor, log_q_BA: Tensor) -> Tensor:
    """Returns H(p || q) = -sum_a p(a) log q(a) of each row of two finite log-policies, nats `(batch,)`."""
    return -(log_p_BA.exp() * log_q_BA).sum(dim=-1)


N_DISTILL = NDistill()


class OnPolicyTeacherMixin(TeacherMixin):
    """An on-policy algorithm whose rollout buffer holds the teacher's log-policies."""

    policy: Any
    rollout_buffer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of SB3's algorithm and of `TeacherMixin`.

        Raises:
            ValueError: `rollout_buffer_class` is not a `TeacherRolloutBuffer`; otherwise as `TeacherMixin`.
        """
        buffer = kwargs.get("rollout_buffer_class") or TeacherRolloutBuffer
        if not issubclass(buffer, TeacherRolloutBuffer):
            raise ValueError(
                f"rollout_buffer_class {buffer.__name__} has no teacher labels; subclass TeacherRolloutBuffer"
            )
        super().__init__(*args, **{**kwargs, "rollout_buffer_class": buffer})

    @property
    def output_layer(self) -> nn.Module:  # type: ignore[override]
        """Layer that returns the logits."""
        layer: nn.Module = self.policy.action_net
        return layer

    def teacher_labels(self, inputs: Tensor) -> Tensor:
        """Returns the teacher's log-policies of the minibatch on which SB3 trains."""
        labels: Tensor = self.rollout_buffer.teacher_log_BA
        return labels


class DistillationPPO(OnPolicyTeacherMixin, PPO):
    """PPO (Schulman et al., 2017) with a distillation term in its loss, which the subclasses define."""

    @property
    def num_gradient_steps(self) -> int:
        """Number of optimizer steps so far, if no epoch was stopped early: SB3 counts epochs."""
        batches_per_epoch = -(-self.n_steps * self.n_envs // self.batch_size)
        return self._n_updates * batches_per_epoch

    def train(self) -> None:
        """Makes `n_epochs` passes over the rollout."""
        self.rollout_buffer.add_teacher_labels(self)
        weight = self.current_weight()
        terms = self._train_with_teacher(weight)
        # SB3 logs the loss of the last minibatch.
        self.logger.record("train/loss", self.logger.name_to_value["train/loss"] + weight * terms[-1])


class ProximalPolicyDistillation(DistillationPPO):
    """PPO's loss + weight KL(teacher || student) max(ratio, 1 - clip) (Spigler, 2025; weight 1 there)."""

    def distillation_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns KL(teacher || student) max(ratio, 1 - clip); the ratio is that of the minibatch's actions."""
        batch = self.rollout_buffer.minibatch
        log_prob_B = student_log_BA.gather(1, batch.actions.long()).squeeze(1)
        ratio_B: Tensor = (log_prob_B - batch.old_log_prob).exp()
        clip: float = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        return kl_divergence_B(teacher_log_BA, student_log_BA) * ratio_B.clamp(min=1 - clip)


class KickstartingPPO(DistillationPPO):
    """PPO's loss + weight H(teacher || student), with a weight that falls from 1 to 0 (Schmitt et al., 2018)."""

    default_weight: ClassVar[float | Schedule] = Linear(1.0, 0.0)

    def distillation_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns H(teacher || student) = -sum_a p_T(a) log p_S(a)."""
        return cross_entropy_B(teacher_log_BA, student_log_BA)


class StudentDriven(OnPolicyTeacherMixin, A2C):
    """Czarnecki et al.'s (2019) student-driven methods: A2C on r_hat, plus weight times the method's loss.

    The value head learns the return of reward_weight r_t - weight cost(s_t), which includes the cost of the state
    itself. That cost is the same for every action, so the advantage is that of r_hat (docs/rl.md).
    """

    def __init__(self, *args: Any, method: StudentDrivenMethod = N_DISTILL, **kwargs: Any) -> None:
        """Takes the arguments of SB3's A2C and of `TeacherMixin`, and the method."""
        self.method = method
        super().__init__(*args, **kwargs)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Collects a rollout; rewards are weighted before SB3 adds the value of an episode that a time limit cut."""
        weighted = _WeightedRewards(env, self.method.reward_weight)
        return super().collect_rollouts(weighted, callback, rollout_buffer, n_rollout_steps)

    def distillation_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor) -> Tensor:
        """Returns the method's loss."""
        return self.method.loss_B(student_log_BA, teacher_log_BA)

    def train(self) -> None:
        """Takes one gradient step on a rollout."""
        self.rollout_buffer.add_teacher_labels(self)
        weight = self.current_weight()
        self._subtract_distillation_cost(weight)
        self._train_with_teacher(weight)
        self.logger.record("train/r_hat", float(self.rollout_buffer.rewards.mean()))

    @torch.no_grad()
    def _subtract_distillation_cost(self, weight: float) -> None:
        """Subtracts the cost of each state from the rollout's rewards, and computes the advantages again."""
        buffer = self.rollout_buffer
        # `rewards` is (steps, environments), the flattened rows are environment by environment.
        obs_N = buffer.to_torch(buffer.swap_and_flatten(buffer.observations))
        student_log_NA = self.policy.get_distribution(obs_N).distribution.logits
        cost_N = self.method.cost_B(student_log_NA, buffer.to_torch(buffer.teacher_log_NA))
        buffer.rewards -= weight * cost_N.cpu().numpy().reshape(buffer.n_envs, -1).T
        assert self._last_obs is not None
        # SB3 has computed them from the rewards alone when it collected the rollout.
        last_values = self.policy.predict_values(obs_as_tensor(self._last_obs, self.device))
        buffer.compute_returns_and_advantage(last_values, self._last_episode_starts)


class _WeightedRewards(VecEnvWrapper):
    """Environments whose rewards are multiplied by a number."""

    def __init__(self, venv: VecEnv, weight: float) -> None:
        super().__init__(venv)
        self.weight = weight

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, rewards * self.weight, dones, infos
