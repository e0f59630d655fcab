"""QDagger: a teacher's games first, then its own, with the teacher beside it."""

from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.legacy.schedules import ReturnGap
from policykd.rl import qdagger
from policykd.rl.qdagger import QDagger

CPU: dict[str, Any] = {"seed": 0, "device": "cpu"}
SMALL_DQN: dict[str, Any] = {"learning_starts": 50, "target_update_interval": 100, "buffer_size": 1000, **CPU}
QUICK_DQN: dict[str, Any] = {
    **CPU,
    **{"learning_starts": 64, "exploration_initial_eps": 0.1, "buffer_size": 5000, "gradient_steps": 4},
    **{"learning_rate": 1e-3, "target_update_interval": 200},
}


def controller(obs_BO: Tensor) -> Tensor:
    """Pushes the cart to where the pole leans or falls: 500 of 500 in CartPole."""
    lean_B = 10 * obs_BO[:, 2] + 3 * obs_BO[:, 3]
    return torch.stack([-lean_B, lean_B], dim=1)


def cart_poles(num_envs: int = 4, seed: int = 0) -> VecEnv:
    return make_vec_env("CartPole-v1", num_envs, seed=seed)


def mean_return(model: BaseAlgorithm) -> float:
    """Returns the mean of 20 games with actions drawn from the policy: about 20 untrained, the teacher's is 450."""
    mean, _ = evaluate_policy(model, cart_poles(seed=99), 20, deterministic=False)
    assert isinstance(mean, float)
    return mean


def replayed(num_rows: int, repeats: int = 1) -> ReplayBufferSamples:
    generator = torch.Generator().manual_seed(0)
    obs, next_obs = (torch.randn(num_rows, 4, generator=generator).repeat(repeats, 1) for _ in range(2))
    column = torch.zeros(num_rows * repeats, 1)
    return ReplayBufferSamples(obs, column.long(), next_obs, column, column + 1.0)


def test_qdaggers_divergence_is_a_mean_over_the_batch_at_both_temperatures() -> None:
    how = {"teacher": controller, "teacher_temperature": 0.5, "student_temperature": 0.2, **SMALL_DQN}
    model = QDagger("MlpPolicy", cart_poles(1), **how)
    td_loss, teacher_kl = model._losses(replayed(8))
    for part, repeated in zip((td_loss, teacher_kl), model._losses(replayed(8, repeats=16)), strict=True):
        torch.testing.assert_close(part, repeated)
    obs = replayed(8).observations
    teacher = torch.distributions.Categorical(logits=controller(obs) / 0.5)
    student = torch.distributions.Categorical(logits=model.q_net(obs) / 0.2)
    torch.testing.assert_close(teacher_kl, torch.distributions.kl_divergence(teacher, student).mean())


def test_it_plays_as_its_teacher_before_its_first_own_step() -> None:
    how: dict[str, Any] = {"teacher_temperature": 1.0, "teacher_return": 500.0, "random_return": 20.0}
    model = QDagger(
        "MlpPolicy", cart_poles(1), teacher=controller, distillation_weight=ReturnGap(3.0), **how, **QUICK_DQN
    )
    model.learn_offline(1000, 600)
    assert model.replay_buffer is not None
    assert model.replay_buffer.size() == 0
    assert mean_return(model) > 400


def half_trained(**settings: Any) -> QDagger:
    how = {"teacher": controller, "teacher_temperature": 1.0, "distillation_weight": 3.0, "weaned_after": 1.0}
    model = QDagger("MlpPolicy", cart_poles(1), **{**how, **QUICK_DQN, **settings})
    model.learn_offline(300, 30)
    return model


def test_it_goes_on_learning_from_its_teacher_on_its_own_games() -> None:
    model = half_trained()
    assert 25 < mean_return(model) < 80
    assert mean_return(model.learn(600)) > 300


def test_the_target_network_follows() -> None:
    model = half_trained()
    online, target = (list(net.parameters()) for net in (model.q_net, model.q_net_target))
    assert all(map(torch.equal, online, target))
    first = [weight.clone() for weight in target]
    model.learn(300)  # its target is set every 200 steps
    assert not any(map(torch.equal, online, target))
    assert not any(map(torch.equal, first, target))


def test_own_games_begin_with_its_own_steps() -> None:
    envs = SB3VecEnv(GymnasiumEnvs("CartPole-v1", 2, seed=0), clip_rewards=False)
    model = QDagger("MlpPolicy", envs, teacher=controller, **{**QUICK_DQN, "learning_starts": 1000})
    model.learn_offline(120, 1)  # 60 steps of games that would go on to 500
    assert not model.ep_info_buffer
    assert (np.abs(np.asarray(model._last_obs)) <= 0.05).all()  # where CartPole starts
    model.learn(200, reset_num_timesteps=False)
    assert model.ep_info_buffer
    assert sum(e["l"] for e in model.ep_info_buffer) <= 200
    assert model.replay_buffer is not None
    assert (np.abs(model.replay_buffer.observations[0]) <= 0.05).all()


def test_offline_curves_end_at_zero_and_its_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdagger, "LOGGED_EVERY", 10)
    monkeypatch.setattr(qdagger, "SAID_EVERY", 100)
    model, lines = QDagger("MlpPolicy", cart_poles(1), teacher=controller, **QUICK_DQN), list[str]()
    steps = list[int]()

    class Steps(KVWriter):
        def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
            assert "offline/teacher_kl" in key_values
            steps.append(step)

        def close(self) -> None:
            """Does nothing: nothing is open."""

    model.set_logger(Logger(None, [Steps()]))
    model.learn_offline(201, 15, say=lines.append)
    assert steps == [-5, 0]
    assert lines[0] == "100 of 201 steps of the teacher's"
    assert lines[-1].startswith("15 of 15 updates on the teacher's games: KL ")


def test_what_has_diverged_is_said_before_the_weights_are_not_finite() -> None:
    model = QDagger("MlpPolicy", cart_poles(1), teacher=controller, **{**QUICK_DQN, "learning_rate": 1e30})
    with pytest.raises(FloatingPointError, match=r"not finite.*lower --learning-rate or --weight"):
        model.learn_offline(200, 20)
    assert all(weight.isfinite().all() for weight in model.policy.parameters())
    with pytest.raises(FloatingPointError, match="it has diverged"):
        QDagger("MlpPolicy", cart_poles(1), teacher=controller, **{**QUICK_DQN, "learning_rate": 1e30}).learn(300)


def test_a_teacher_of_another_width_is_refused_offline() -> None:
    model = QDagger("MlpPolicy", cart_poles(1), teacher=lambda obs: controller(obs)[:, :1], **QUICK_DQN)
    with pytest.raises(ValueError, match=r"scores are \(1, 1\), not \(1, 2\)"):
        model.learn_offline(200, 20)
