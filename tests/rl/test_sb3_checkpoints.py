"""An SB3 training that is interrupted and resumed ends as the uninterrupted one, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

from policykd.envs.atari import make_atari
from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.envs.vector import VectorEnv
from policykd.rl.frame_buffer import FrameReplayBuffer
from policykd.rl.qdagger import QDagger
from policykd.rl.sb3_checkpoints import restore_training, save_training
from policykd.rl.sb3_distillation import KickstartingPPO, ProximalPolicyDistillation, StudentDriven
from policykd.schedules import ReturnGap

OFF_POLICY: dict[str, Any] = {
    "learning_starts": 100,
    "buffer_size": 400,
    "gradient_steps": 2,
    "target_update_interval": 50,
    "replay_buffer_class": FrameReplayBuffer,
    "replay_buffer_kwargs": {"n_steps": 2},
}
RMSPROP = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}
GAP = ReturnGap(1.0)
TEACHER: dict[str, Any] = {"teacher": lambda obs: 10 * obs[:, 2:], "reference_returns": (0.0, 500.0)}
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "PPO": (PPO, {"n_steps": 32, "batch_size": 32, "n_epochs": 2}),
    "A2C": (A2C, {"policy_kwargs": RMSPROP}),
    "DQN": (DQN, OFF_POLICY),
    "QRDQN": (QRDQN, {**OFF_POLICY, "policy_kwargs": {"n_quantiles": 5, "net_arch": [32]}}),
    "PPD": (ProximalPolicyDistillation, {"n_steps": 32, "batch_size": 32, "n_epochs": 2, **TEACHER}),
    "kickstarting": (KickstartingPPO, {"n_steps": 32, "batch_size": 32, "distillation_weight": GAP, **TEACHER}),
    "student-driven": (StudentDriven, TEACHER),
    "QDagger": (QDagger, {**OFF_POLICY, "distillation_weight": GAP, **TEACHER}),
    "DQN on Atari": (DQN, {**OFF_POLICY, "batch_size": 4, "gradient_steps": 1}),
}
NEVER = 10**9


def make(name: str) -> tuple[BaseAlgorithm, VectorEnv]:
    kind, settings = ALGORITHMS[name]
    is_atari = "Atari" in name
    envs: VectorEnv = make_atari("Breakout", 2, seed=0) if is_atari else GymnasiumEnvs("CartPole-v1", 2, seed=0)
    policy = "CnnPolicy" if is_atari else "MlpPolicy"
    model = kind(policy, SB3VecEnv(envs, clip_rewards=is_atari), seed=0, device="cpu", **settings)
    if is_atari:
        model.policy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, envs


class SaveEvery(BaseCallback):
    """Saves between rollouts, and stops there, as if killed, once `until` is reached."""

    def __init__(self, envs: VectorEnv, folder: Path, every: int, until: int = NEVER) -> None:
        super().__init__()
        self.envs = envs
        self.folder = folder
        self.every = every
        self.until = until
        self.saved = 0

    def _on_rollout_start(self) -> None:
        steps = self.model.num_timesteps
        if steps - self.saved >= self.every:
            save_training(self.model, self.envs, self.folder)
            self.saved = steps
        if steps >= self.until:
            raise KeyboardInterrupt

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_killed_training_is_resumed_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, _ = make(name)
    whole.learn(600)

    first, envs = make(name)
    with pytest.raises(KeyboardInterrupt):
        first.learn(600, SaveEvery(envs, tmp_path, 150, until=400))

    np.random.seed(99)  # nothing may depend on the state with which a new process starts
    resumed, envs = make(name)
    restore_training(resumed, envs, tmp_path)
    assert 250 <= resumed.num_timesteps <= 400
    resumed.learn(600 - resumed.num_timesteps, reset_num_timesteps=False)

    assert resumed.num_timesteps == whole.num_timesteps
    expected, found = whole.policy.state_dict(), resumed.policy.state_dict()
    assert all((expected[weight] == found[weight]).all() for weight in expected)
    assert [e["r"] for e in whole.ep_info_buffer or []] == [e["r"] for e in resumed.ep_info_buffer or []]


def test_shards_that_left_the_ring_are_removed(tmp_path: Path) -> None:
    model, envs = make("DQN")
    model.learn(1500, SaveEvery(envs, tmp_path, 100))
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert 2 * (1 + 1) + 2 <= len(sizes) <= 2 * (1 + 1) + 8  # two generations, and the shards of 400 steps in all


def test_saving_twice_at_one_step_keeps_the_replay(tmp_path: Path) -> None:
    model, envs = make("DQN")
    model.learn(300, SaveEvery(envs, tmp_path, 100))
    save_training(model, envs, tmp_path)
    again, envs = make("DQN")
    restore_training(again, envs, tmp_path)
    save_training(again, envs, tmp_path)  # as a run does that was killed while it wrote its card
    last, envs = make("DQN")
    restore_training(last, envs, tmp_path)
    arrays, restored = (m.replay_buffer.arrays(0) for m in (model, last))  # type: ignore[attr-defined]
    for name, array in arrays.items():
        assert (array == restored[name]).all()
        assert array.any() or name == "num_past_frames"


def test_the_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    model, envs = make("A2C")
    model.learn(20)
    save_training(model, envs, tmp_path)
    with pytest.raises(ValueError, match="holds the checkpoints of another run"):
        save_training(*make("A2C"), tmp_path)
