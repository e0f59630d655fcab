"""QDagger: the teacher's states first, then the student's own, with a decreasing weight of the teacher."""

from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger

from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.rl import qdagger
from policykd.rl.qdagger import QDagger
from policykd.schedules import ReturnGap
from tests.cart_pole import cart_poles, controller, mean_return

QUICK_DQN: dict[str, Any] = {
    "seed": 0,
    "device": "cpu",
    "learning_starts": 64,
    "exploration_initial_eps": 0.1,
    "buffer_size": 5000,
    "gradient_steps": 4,
    "learning_rate": 1e-3,
    "target_update_interval": 200,
}


def make(**settings: Any) -> QDagger:
    return QDagger("MlpPolicy", **{"env": cart_poles(1), "teacher": controller, **QUICK_DQN, **settings})


def test_it_plays_as_its_teacher_before_its_first_own_step() -> None:
    model = make(teacher_temperature=1.0, distillation_weight=ReturnGap(3.0), reference_returns=(20.0, 500.0))
    model.learn_offline(1000, 600)
    assert model.replay_buffer.size() == 0
    assert mean_return(model) > 400


def test_it_continues_to_learn_from_its_teacher_on_its_own_states() -> None:
    model = make(teacher_temperature=1.0, distillation_end_fraction=1.0)
    model.learn_offline(300, 30)
    online, target = (list(net.parameters()) for net in (model.q_net, model.q_net_target))
    assert all(map(torch.equal, online, target))
    first = [weight.clone() for weight in target]
    assert 20 < mean_return(model) < 90
    assert mean_return(model.learn(600)) > 250
    # The target network follows every 200 steps.
    assert not any(map(torch.equal, online, target))
    assert not any(map(torch.equal, first, target))


def test_no_episode_of_the_teachers_is_the_students() -> None:
    envs = SB3VecEnv(GymnasiumEnvs("CartPole-v1", 2, seed=0), clip_rewards=False)
    model = make(env=envs, learning_starts=1000)
    model.learn_offline(120, 1)  # 60 steps of episodes that would last 500
    assert not model.ep_info_buffer
    assert (np.abs(np.asarray(model._last_obs)) <= 0.05).all()  # where CartPole starts
    model.learn(200, reset_num_timesteps=False)
    assert model.ep_info_buffer
    assert sum(episode["l"] for episode in model.ep_info_buffer) <= 200
    assert (np.abs(model.replay_buffer.observations[0]) <= 0.05).all()


def test_offline_curves_end_at_zero_and_progress_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(qdagger, "LOG_INTERVAL", 10)
    steps: list[int] = []

    class Steps(KVWriter):
        def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
            assert "offline/teacher_kl" in key_values
            steps.append(step)

        def close(self) -> None:
            """Does nothing: nothing is open."""

    model = make()
    model.set_logger(Logger(None, [Steps()]))
    model.learn_offline(201, 15)
    assert steps == [-5, 0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "collecting 201 steps of the teacher"
    assert lines[-1].startswith("15 of 15 updates on the teacher's states: KL ")


def test_divergence_is_reported_before_the_weights_are_not_finite() -> None:
    model = make(learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"not finite.*lower --learning-rate or --weight"):
        model.learn_offline(200, 20)
    assert all(weight.isfinite().all() for weight in model.policy.parameters())


def test_a_negative_student_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="student_temperature must be"):
        make(student_temperature=-1.0)
