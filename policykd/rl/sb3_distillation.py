"""Distillation inside reinforcement learning, as SB3's on-policy algorithms with a teacher.

Callbacks, logger, `save` and `predict` stay SB3's. With the weight of the distillation at 0 an agent has, bit for bit,
the parameters that SB3's own algorithm gives it, although the term is computed all the same. Suffixes name dimensions:
B batch, A actions.
"""

from collections import defaultdict
from typing import Any

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

from policykd.legacy.losses import kl_divergence_B
from policykd.legacy.schedules import Linear, Quantity
from policykd.rl.student_driven import NDistill, StudentDrivenMethod, cross_entropy_B
from policykd.rl.teacher_mixin import Taught, TaughtRolloutBuffer, TaughtSamples, acted_on, buffer_class, descend

FALLING, N_DISTILL = Linear(1.0, 0.0), NDistill()


class TaughtPPO(Taught, PPO):
    """PPO (Schulman et al., 2017) whose loss has a term of the teacher's more; the subclasses say which."""

    def __init__(self, policy: Any, env: Any, **kwargs: Any) -> None:
        """Takes SB3's arguments for PPO, and those of `Taught`."""
        kwargs["rollout_buffer_class"] = buffer_class(kwargs.get("rollout_buffer_class"))
        super().__init__(policy, env, **kwargs)

    @property
    def num_gradient_steps(self) -> int:
        """How often the weights were changed, if no epoch was cut short: SB3 counts passes over a rollout."""
        return self._n_updates * -(-self.n_steps * self.n_envs // self.batch_size)

    def teacher_term_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor, ratio_B: Tensor, clip: float) -> Tensor:
        """Returns what the distillation adds to the loss of each row, nats `(batch,)`, before its weight.

        Args:
            student_log_BA: the student's log-policy as it is now.
            teacher_log_BA: the teacher's.
            ratio_B: how much more likely the action taken is now than when it was taken.
            clip: PPO's range.
        """
        raise NotImplementedError

    def train(self) -> None:
        """Learns from a rollout, `n_epochs` times over."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        weight, curves = self.current_weight(), defaultdict[str, list[float]](list)
        buffer = labelled(self)
        for epoch in range(self.n_epochs):
            curves["approx_kl"].clear()
            goes_on = self._epoch(weight, curves)
            self._n_updates += 1
            if not goes_on:
                if self.verbose >= 1:
                    print(f"stopped in epoch {epoch}: approx_kl {curves['approx_kl'][-1]:.2f} is far above target_kl")
                break
        self.check_weights()
        for name, values in curves.items():
            self.logger.record(f"train/{name}", values[-1] if name == "loss" else float(np.mean(values)))
        explained = explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        self.logger.record("train/explained_variance", explained)
        self.logger.record("train/clip_range", self._clip())
        if self.clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", self._value_clip())
        self.logger.record("train/distillation_weight", weight)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _epoch(self, weight: float, curves: defaultdict[str, list[float]]) -> bool:
        """Makes one pass over the rollout; returns False where the policy has moved too far to go on."""
        for batch in self.rollout_buffer.get(self.batch_size):
            assert isinstance(batch, TaughtSamples)
            loss, measured = self._loss(batch, weight)
            for name, number in measured.items():
                curves[name].append(number)
            if self.target_kl is not None and measured["approx_kl"] > 1.5 * self.target_kl:
                return False
            descend(self.policy, loss, self.max_grad_norm)
        return True

    def _loss(self, batch: TaughtSamples, weight: float) -> tuple[Tensor, dict[str, float]]:
        values, log_prob_B, entropy_B = self.policy.evaluate_actions(batch.observations, batch.actions.long().flatten())
        student_log_BA, clip = acted_on(self.policy), self._clip()
        assert entropy_B is not None
        advantage_B = batch.advantages
        if self.normalize_advantage and len(advantage_B) > 1:
            advantage_B = (advantage_B - advantage_B.mean()) / (advantage_B.std() + 1e-8)
        log_ratio_B = log_prob_B - batch.old_log_prob
        ratio_B = log_ratio_B.exp()
        gain_B = torch.min(advantage_B * ratio_B, advantage_B * ratio_B.clamp(1 - clip, 1 + clip))
        value_loss = mse_loss(batch.returns, self._near(batch.old_values, values.flatten()))
        distillation = self.teacher_term_B(student_log_BA, batch.teacher_log_BA, ratio_B, clip).mean()
        policy_loss, entropy_loss = -gain_B.mean(), -entropy_B.mean()
        loss = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss + weight * distillation
        with torch.no_grad():
            measured = {
                "entropy_loss": entropy_loss,
                "policy_gradient_loss": policy_loss,
                "value_loss": value_loss,
                "approx_kl": (log_ratio_B.exp() - 1 - log_ratio_B).mean(),  # of the step, Schulman's estimator
                "clip_fraction": ((ratio_B - 1).abs() > clip).float().mean(),
                "loss": loss,
                "distillation_loss": distillation,
                "teacher_kl": kl_divergence_B(batch.teacher_log_BA, student_log_BA).mean(),
            }
        return loss, {name: number.item() for name, number in measured.items()}

    def _clip(self) -> float:
        assert callable(self.clip_range)
        return self.clip_range(self._current_progress_remaining)

    def _value_clip(self) -> float:
        assert callable(self.clip_range_vf)
        return self.clip_range_vf(self._current_progress_remaining)

    def _near(self, old_value_B: Tensor, value_B: Tensor) -> Tensor:
        """Returns values no further from the old ones than `clip_range_vf`, if there is one."""
        if self.clip_range_vf is None:
            return value_B
        clip = self._value_clip()
        return old_value_B + (value_B - old_value_B).clamp(-clip, clip)


class ProximalPolicyDistillation(TaughtPPO):
    """PPO's loss + weight KL(teacher || student) max(ratio, 1 - clip) (Spigler, 2025; weight 1 there)."""

    def teacher_term_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor, ratio_B: Tensor, clip: float) -> Tensor:
        """Returns KL(teacher || student) max(ratio, 1 - clip)."""
        return kl_divergence_B(teacher_log_BA, student_log_BA) * ratio_B.clamp(min=1 - clip)


class KickstartingPPO(TaughtPPO):
    """PPO's loss + weight H(teacher || student), the weight falling over the run (Schmitt et al., 2018)."""

    def __init__(self, policy: Any, env: Any, *, distillation_weight: Quantity = FALLING, **kwargs: Any) -> None:
        """Takes SB3's arguments for PPO, and those of `Taught`; the weight falls from 1 to 0 unless told otherwise."""
        super().__init__(policy, env, distillation_weight=distillation_weight, **kwargs)

    def teacher_term_B(self, student_log_BA: Tensor, teacher_log_BA: Tensor, ratio_B: Tensor, clip: float) -> Tensor:
        """Returns H(teacher || student) = -sum_a p_T(a) log p_S(a)."""
        return cross_entropy_B(teacher_log_BA, student_log_BA)


class StudentDriven(Taught, A2C):
    """Czarnecki et al.'s (2019) student-driven methods: A2C on r_hat, + weight times the method's loss.

    The value head learns the return of reward_weight r_t - weight cost(s_t), with the state's own cost in it. That is
    the same for every action, so the advantage is that of r_hat.
    """

    def __init__(self, policy: Any, env: Any, *, method: StudentDrivenMethod = N_DISTILL, **kwargs: Any) -> None:
        """Takes SB3's arguments for A2C, the method, and the arguments of `Taught`."""
        self.method = method
        kwargs["rollout_buffer_class"] = buffer_class(kwargs.get("rollout_buffer_class"))
        super().__init__(policy, env, **kwargs)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Plays as A2C does; rewards are weighted before SB3 adds the value of a game that a time limit cut."""
        weighted = WeightedRewards(env, self.method.reward_weight)
        return super().collect_rollouts(weighted, callback, rollout_buffer, n_rollout_steps)

    def train(self) -> None:
        """Takes one gradient step on a rollout."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        weight, buffer = self.current_weight(), labelled(self)
        self._charge(buffer, weight)
        (batch,) = buffer.get(batch_size=None)
        assert isinstance(batch, TaughtSamples)
        values, log_prob_B, entropy_B = self.policy.evaluate_actions(batch.observations, batch.actions.long().flatten())
        student_log_BA = acted_on(self.policy)
        assert entropy_B is not None
        advantage_B = batch.advantages
        if self.normalize_advantage:
            advantage_B = (advantage_B - advantage_B.mean()) / (advantage_B.std() + 1e-8)
        policy_loss = -(advantage_B * log_prob_B).mean()
        value_loss, entropy_loss = mse_loss(batch.returns, values.flatten()), -entropy_B.mean()
        distillation = self.method.loss_B(student_log_BA, batch.teacher_log_BA).mean()
        loss = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss + weight * distillation
        descend(self.policy, loss, self.max_grad_norm)
        self.check_weights()
        self._n_updates += 1
        measured = {
            "policy_loss": policy_loss.item(),
            "value_loss": value_loss.item(),
            "entropy_loss": entropy_loss.item(),
            "distillation_loss": distillation.item(),
            "teacher_kl": kl_divergence_B(batch.teacher_log_BA, student_log_BA.detach()).mean().item(),
            "r_hat": float(buffer.rewards.mean()),
            "distillation_weight": weight,
            "explained_variance": explained_variance(buffer.values.flatten(), buffer.returns.flatten()),
        }
        for name, number in measured.items():
            self.logger.record(f"train/{name}", number)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    @torch.no_grad()
    def _charge(self, buffer: TaughtRolloutBuffer, weight: float) -> None:
        """Takes what its states cost from the rollout's rewards, and computes the advantages again."""
        assert self._last_obs is not None
        assert self._last_episode_starts is not None
        rows = buffer.to_torch(buffer.swap_and_flatten(buffer.observations))
        self.policy.get_distribution(rows)
        cost_B = self.method.cost(self.method.loss_B(acted_on(self.policy), buffer.to_torch(buffer.teacher_log)))
        buffer.rewards -= weight * cost_B.cpu().numpy().reshape(buffer.n_envs, -1).T
        last_values = self.policy.predict_values(obs_as_tensor(self._last_obs, self.device))
        buffer.compute_returns_and_advantage(last_values, self._last_episode_starts)


class WeightedRewards(VecEnvWrapper):
    """Environments whose rewards are multiplied by a number."""

    def __init__(self, venv: VecEnv, weight: float) -> None:
        super().__init__(venv)
        self.weight = weight

    def reset(self) -> Any:
        """Starts new games."""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """Returns a step with its rewards weighted."""
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, rewards * self.weight, dones, infos


def labelled(agent: TaughtPPO | StudentDriven) -> TaughtRolloutBuffer:
    """Returns an agent's rollout with what its teacher thinks of the states."""
    buffer = agent.rollout_buffer
    assert isinstance(buffer, TaughtRolloutBuffer)
    buffer.label(agent)
    return buffer
