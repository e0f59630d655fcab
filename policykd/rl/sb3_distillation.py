"""Distillation inside SB3's on-policy algorithms: PPO and A2C with a teacher.

Callbacks, logger, `save` and `predict` stay SB3's. With a distillation weight of 0 an agent's parameters equal those of
SB3's own algorithm bit for bit, although the distillation term is computed.

Shape suffixes: B batch, A actions, N stored states.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from torch import Tensor
from torch.nn.functional import mse_loss

from policykd.losses import kl_divergence_B
from policykd.rl.student_driven import NDistill, StudentDrivenMethod, cross_entropy_B
from policykd.rl.teacher_mixin import TeacherMixin, TeacherRolloutBuffer, TeacherRolloutSamples, optimizer_step
from policykd.schedules import Linear, Schedule

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

    def _prepare_training(self) -> float:
        """Labels the rollout and updates the learning rate; returns the distillation weight."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        self.rollout_buffer.add_teacher_labels(self)
        return self.current_weight()

    def _record(self, metrics: dict[str, float]) -> None:
        """Logs the metrics of one `train` under SB3's names."""
        buffer = self.rollout_buffer
        explained = explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        for name, metric in {**metrics, "explained_variance": explained}.items():
            self.logger.record(f"train/{name}", metric)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")


class DistillationPPO(OnPolicyTeacherMixin, PPO):
    """PPO (Schulman et al., 2017) with a distillation term in its loss, which the subclasses define."""

    @property
    def num_gradient_steps(self) -> int:
        """Number of optimizer steps so far, if no epoch was stopped early: SB3 counts epochs."""
        batches_per_epoch = -(-self.n_steps * self.n_envs // self.batch_size)
        return self._n_updates * batches_per_epoch

    def distillation_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor, ratio_B: Tensor, clip: float) -> Tensor:
        """Returns the distillation term of each state before its weight, nats `(batch,)`.

        Args:
            student_log_BA: the current log-policy of the student.
            teacher_log_BA: the teacher's log-policy.
            ratio_B: probability of the action under the current policy over that when it was taken.
            clip: PPO's clip range.
        """
        raise NotImplementedError

    def train(self) -> None:
        """Makes `n_epochs` passes over the rollout."""
        weight = self._prepare_training()
        epochs: list[list[dict[str, float]]] = []
        for epoch in range(self.n_epochs):
            epochs.append([])
            is_too_far = False
            for batch in self.rollout_buffer.get(self.batch_size):
                loss, metrics = self._loss(batch, weight)
                epochs[-1].append(metrics)
                # SB3's early stopping: the policy has moved too far from the one that collected the rollout.
                is_too_far = self.target_kl is not None and metrics["approx_kl"] > 1.5 * self.target_kl
                if is_too_far:
                    break
                optimizer_step(self.policy, loss, self.max_grad_norm)
            self._n_updates += 1
            if is_too_far:
                if self.verbose >= 1:
                    print(f"Early stopping at epoch {epoch} due to reaching max kl: {epochs[-1][-1]['approx_kl']:.2f}")
                break
        self.check_weights()
        # As SB3 logs them: means over the minibatches, but the last epoch's approx_kl and the last minibatch's loss.
        batches = [metrics for epoch_metrics in epochs for metrics in epoch_metrics]
        means = {name: float(np.mean([metrics[name] for metrics in batches])) for name in batches[0]}
        means["approx_kl"] = float(np.mean([metrics["approx_kl"] for metrics in epochs[-1]]))
        means["loss"] = batches[-1]["loss"]
        self._record({**means, **self._clip_ranges(), "distillation_weight": weight})

    def _loss(self, batch: TeacherRolloutSamples, weight: float) -> tuple[Tensor, dict[str, float]]:
        """Returns PPO's loss on a minibatch plus `weight` times the distillation term, and the metrics."""
        # One forward pass gives values, probabilities of the actions taken, and the whole policy.
        actions_B = batch.actions.long().flatten()
        values_B1, log_prob_B, entropy_B = self.policy.evaluate_actions(batch.observations, actions_B)
        student_log_BA = last_action_logits(self.policy)
        clips = self._clip_ranges()
        clip = clips["clip_range"]
        advantage_B = batch.advantages
        if self.normalize_advantage and len(advantage_B) > 1:
            advantage_B = (advantage_B - advantage_B.mean()) / (advantage_B.std() + 1e-8)

        # PPO's clipped surrogate objective, value loss and entropy bonus: the operations and their order are SB3's.
        log_ratio_B = log_prob_B - batch.old_log_prob
        ratio_B = log_ratio_B.exp()
        clipped_B = advantage_B * ratio_B.clamp(1 - clip, 1 + clip)
        policy_loss = -torch.min(advantage_B * ratio_B, clipped_B).mean()
        value_B = values_B1.flatten()
        if "clip_range_vf" in clips:
            change_B = (value_B - batch.old_values).clamp(-clips["clip_range_vf"], clips["clip_range_vf"])
            value_B = batch.old_values + change_B
        value_loss = mse_loss(batch.returns, value_B)
        entropy_loss = -entropy_B.mean()

        # The teacher's term, weighted: the only difference from SB3's loss.
        distillation = self.distillation_B(student_log_BA, batch.teacher_log_BA, ratio_B, clip).mean()
        loss = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss + weight * distillation
        with torch.no_grad():
            metrics = {
                "entropy_loss": entropy_loss,
                "policy_gradient_loss": policy_loss,
                "value_loss": value_loss,
                # KL between old and new policy, not the teacher's: http://joschu.net/blog/kl-approx.html
                "approx_kl": (log_ratio_B.exp() - 1 - log_ratio_B).mean(),
                "clip_fraction": ((ratio_B - 1).abs() > clip).float().mean(),
                "loss": loss,
                "distillation_loss": distillation,
                "teacher_kl": kl_divergence_B(batch.teacher_log_BA, student_log_BA).mean(),
            }
        return loss, {name: metric.item() for name, metric in metrics.items()}

    def _clip_ranges(self) -> dict[str, float]:
        schedules = {"clip_range": self.clip_range, "clip_range_vf": self.clip_range_vf}
        return {name: s(self._current_progress_remaining) for name, s in schedules.items() if callable(s)}


class ProximalPolicyDistillation(DistillationPPO):
    """PPO's loss + weight KL(teacher || student) max(ratio, 1 - clip) (Spigler, 2025; weight 1 there)."""

    def distillation_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor, ratio_B: Tensor, clip: float) -> Tensor:
        """Returns KL(teacher || student) max(ratio, 1 - clip)."""
        return kl_divergence_B(teacher_log_BA, student_log_BA) * ratio_B.clamp(min=1 - clip)


class KickstartingPPO(DistillationPPO):
    """PPO's loss + weight H(teacher || student), with a weight that falls from 1 to 0 (Schmitt et al., 2018)."""

    default_weight: ClassVar[float | Schedule] = Linear(1.0, 0.0)

    def distillation_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor, ratio_B: Tensor, clip: float) -> Tensor:
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

    def train(self) -> None:
        """Takes one gradient step on a rollout."""
        # The costs of the states are subtracted from the rewards before the advantages are computed.
        weight = self._prepare_training()
        self._subtract_distillation_cost(weight)
        (batch,) = self.rollout_buffer.get(batch_size=None)
        actions_B = batch.actions.long().flatten()
        values_B1, log_prob_B, entropy_B = self.policy.evaluate_actions(batch.observations, actions_B)
        student_log_BA = last_action_logits(self.policy)
        advantage_B = batch.advantages
        if self.normalize_advantage:
            advantage_B = (advantage_B - advantage_B.mean()) / (advantage_B.std() + 1e-8)

        # A2C's loss in SB3's order of operations, then the method's.
        policy_loss = -(advantage_B * log_prob_B).mean()
        value_loss = mse_loss(batch.returns, values_B1.flatten())
        entropy_loss = -entropy_B.mean()
        distillation = self.method.loss_B(student_log_BA, batch.teacher_log_BA).mean()
        loss = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss + weight * distillation
        optimizer_step(self.policy, loss, self.max_grad_norm)
        self.check_weights()
        self._n_updates += 1
        metrics = {
            "policy_loss": policy_loss.item(),
            "value_loss": value_loss.item(),
            "entropy_loss": entropy_loss.item(),
            "distillation_loss": distillation.item(),
            "teacher_kl": kl_divergence_B(batch.teacher_log_BA, student_log_BA.detach()).mean().item(),
            "r_hat": float(self.rollout_buffer.rewards.mean()),
            "distillation_weight": weight,
        }
        self._record(metrics)

    @torch.no_grad()
    def _subtract_distillation_cost(self, weight: float) -> None:
        """Subtracts the cost of each state from the rollout's rewards, and computes the advantages again."""
        buffer = self.rollout_buffer
        # `rewards` is (steps, environments), the flattened rows are environment by environment.
        self.policy.get_distribution(buffer.to_torch(buffer.swap_and_flatten(buffer.observations)))
        cost_N = self.method.cost_B(last_action_logits(self.policy), buffer.to_torch(buffer.teacher_log_NA))
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


def last_action_logits(policy: Any) -> Tensor:
    """Returns the log-policies `(batch, num_actions)`, with their gradient, of the last `evaluate_actions`."""
    log_policy_BA: Tensor = policy.action_dist.distribution.logits
    return log_policy_BA
