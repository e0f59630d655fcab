"""SB3's training, cut and continued, is the training that was not cut; what it ends with is a teacher."""

import json
import signal
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
from policykd.io.signals import check_interrupted, noting_signals
from policykd.rl import sb3_checkpoints
from policykd.rl.frame_buffer import FrameReplayBuffer
from policykd.rl.sb3_checkpoints import Progress, restore_training, save_training

OFF_POLICY: dict[str, Any] = {
    "learning_starts": 100,
    "buffer_size": 400,
    "gradient_steps": 2,
    "target_update_interval": 50,
}
OFF_POLICY |= {"replay_buffer_class": FrameReplayBuffer, "replay_buffer_kwargs": {"n_steps": 2}}
RMSPROP = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "PPO": (PPO, {"n_steps": 32, "batch_size": 32, "n_epochs": 2}),
    "A2C": (A2C, {"policy_kwargs": RMSPROP}),
    "DQN": (DQN, OFF_POLICY),
    "QRDQN": (QRDQN, {**OFF_POLICY, "policy_kwargs": {"n_quantiles": 5, "net_arch": [32]}}),
}


def make(algorithm: str) -> tuple[BaseAlgorithm, VectorEnv]:
    kind, settings = ALGORITHMS[algorithm]
    envs = GymnasiumEnvs("CartPole-v1", 2, seed=0)
    return kind("MlpPolicy", SB3VecEnv(envs, clip_rewards=False), seed=0, device="cpu", **settings), envs


class Saving(Progress):
    """Saves every 200 steps and stops, as if killed, at `until`."""

    until = 10**9

    def _on_rollout_start(self) -> None:
        super()._on_rollout_start()
        if self.model.num_timesteps >= self.until:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:You are trying to run PPO on the GPU")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_training_that_was_killed_goes_on_bit_for_bit(algorithm: str, tmp_path: Path) -> None:
    whole, envs = make(algorithm)
    whole.learn(1200)

    first, envs = make(algorithm)
    saving = Saving(envs, tmp_path, 200, lambda steps: None, 0)
    saving.until = 900
    with pytest.raises(KeyboardInterrupt):
        first.learn(1200, saving)

    np.random.seed(99)  # nothing may depend on what a new process starts with
    again, envs = make(algorithm)
    restore_training(again, envs, tmp_path)
    assert 700 <= again.num_timesteps <= 900
    again.learn(1200 - again.num_timesteps, reset_num_timesteps=False)

    assert again.num_timesteps == whole.num_timesteps
    expected, found = whole.policy.state_dict(), again.policy.state_dict()
    assert all((expected[name] == found[name]).all() for name in expected)
    assert [e["r"] for e in whole.ep_info_buffer or []] == [e["r"] for e in again.ep_info_buffer or []]


def test_shards_that_left_the_ring_are_removed(tmp_path: Path) -> None:
    model, envs = make("DQN")
    model.learn(3000, Saving(envs, tmp_path, 200, lambda steps: None, 0))
    shards = [p.name for p in tmp_path.glob("replay-*.npz")]
    assert 2 <= len(shards) <= 5
    manifests = list(tmp_path.glob("checkpoint-*.json"))
    assert len(manifests) == 2
    held = {name for path in manifests for name in json.loads(path.read_text())["files"]}
    assert {p.name for p in tmp_path.iterdir()} == held | {p.name for p in manifests}


def test_saving_twice_at_one_step_keeps_the_replay(tmp_path: Path) -> None:
    model, envs = make("DQN")
    model.learn(300, Saving(envs, tmp_path, 100, lambda steps: None, 0))
    save_training(model, envs, tmp_path)
    again, envs = make("DQN")
    restore_training(again, envs, tmp_path)
    save_training(again, envs, tmp_path)  # as a run does that was killed while it wrote its card
    last, envs = make("DQN")
    restore_training(last, envs, tmp_path)
    for name in ("frames_TE", "pasts_TE", "actions", "rewards", "dones"):
        a, b = (getattr(m.replay_buffer, name) for m in (model, last))  # type: ignore[attr-defined]
        assert (a == b).all()
        assert a.any() or name == "pasts_TE"


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    model, envs = make("PPO")
    model.learn(64)
    save_training(model, envs, tmp_path)
    (file,) = tmp_path.glob("model-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name}: damaged"):
        restore_training(*make("PPO"), tmp_path)


def test_a_signal_waits_for_the_end_of_a_rollout(tmp_path: Path) -> None:
    """C04: what was collected is learned from and saved."""
    model, envs = make("PPO")
    progress = Progress(envs, tmp_path, 10**9, lambda steps: None, 0)
    progress.evaluate, progress.evaluate_every = lambda steps: signal.raise_signal(signal.SIGTERM), 128
    with noting_signals(), pytest.raises(KeyboardInterrupt):
        model.learn(1000, progress)
    assert progress.saved == model.num_timesteps == 192
    again, envs = make("PPO")
    restore_training(again, envs, tmp_path)
    assert again.num_timesteps == 192


def test_a_rollout_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C04: on a machine that needs seconds for a rollout each begins with a checkpoint, and nothing but it is lost."""
    monkeypatch.setattr(sb3_checkpoints, "GRACE_SECONDS", 0.0)  # every rollout is too long
    for where in ("step", "learning"):
        model, envs = make("PPO")
        progress = Progress(envs, tmp_path / where, 10**9, lambda steps: None, 0)

        class Signal(BaseCallback):
            def _on_step(self, where: str = where) -> bool:
                if where == "step" and self.num_timesteps == 150:
                    signal.raise_signal(signal.SIGTERM)
                return True

            def _on_rollout_end(self, where: str = where) -> None:
                if where == "learning" and self.num_timesteps == 192:
                    signal.raise_signal(signal.SIGTERM)

        with noting_signals(), pytest.raises(KeyboardInterrupt):
            model.learn(1000, [Signal(), progress])
        assert (progress.saved, model.num_timesteps) == (128, 150 if where == "step" else 192)
        again, envs = make("PPO")
        restore_training(again, envs, tmp_path / where)
        assert again.num_timesteps == 128


def test_an_evaluation_that_was_interrupted_is_repeated(tmp_path: Path) -> None:
    """C04: the training is saved before it."""
    model, envs = make("A2C")

    def interrupted(steps: int) -> None:
        signal.raise_signal(signal.SIGTERM)
        check_interrupted()

    progress = Progress(envs, tmp_path, 10**9, interrupted, 300)
    with noting_signals(), pytest.raises(KeyboardInterrupt):
        model.learn(700, progress)
    again, envs = make("A2C")
    restore_training(again, envs, tmp_path)
    seen: list[int] = []
    again.learn(700 - again.num_timesteps, Progress(envs, tmp_path, 10**9, seen.append, 300), reset_num_timesteps=False)
    assert seen == [300, 600]


def test_evaluations_come_between_rollouts(tmp_path: Path) -> None:
    model, envs = make("A2C")
    seen: list[int] = []
    model.learn(700, Progress(envs, tmp_path, 10**9, seen.append, 300))
    assert seen == [300, 600]
    progress = Progress(envs, tmp_path, 10**9, seen.append, 300)  # a run that goes on does not start to count anew
    model.learn(300, progress, reset_num_timesteps=False)
    assert seen == [300, 600, 900]


def test_an_atari_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def make_dqn() -> tuple[BaseAlgorithm, VectorEnv]:
        envs = make_atari("Breakout", 2, seed=0)
        settings: dict[str, Any] = {**OFF_POLICY, "batch_size": 4, "gradient_steps": 1}
        model = DQN("CnnPolicy", SB3VecEnv(envs, clip_rewards=True), seed=0, device="cpu", **settings)
        model.policy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, envs

    whole, _ = make_dqn()
    whole.learn(400)
    first, envs = make_dqn()
    saving = Saving(envs, tmp_path, 200, lambda steps: None, 0)
    saving.until = 300
    with pytest.raises(KeyboardInterrupt):
        first.learn(400, saving)
    again, envs = make_dqn()
    restore_training(again, envs, tmp_path)
    again.learn(400 - again.num_timesteps, reset_num_timesteps=False)
    expected, found = whole.policy.state_dict(), again.policy.state_dict()
    assert all((expected[name] == found[name]).all() for name in expected)
