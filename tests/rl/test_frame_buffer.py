"""The ring of frames gives SB3's algorithms what SB3's own buffers would."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from policykd.envs.atari import make_atari
from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.rl.frame_buffer import FrameReplayBuffer

NUM_ENVS = 3


def fill(*buffers: FrameReplayBuffer | NStepReplayBuffer, steps: int) -> None:
    envs = SB3VecEnv(make_atari("Breakout", NUM_ENVS, seed=0), clip_rewards=True)
    obs: Any = envs.reset()
    generator = np.random.default_rng(0)
    for _ in range(steps):
        actions = generator.integers(4, size=NUM_ENVS)
        new_obs: Any
        new_obs, rewards, dones, infos = envs.step(actions)
        for buffer in buffers:
            buffer.add(obs, new_obs, actions, rewards, dones, infos)
        obs = new_obs


def make(size: int, n_steps: int = 1) -> FrameReplayBuffer:
    spaces = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(4)
    return FrameReplayBuffer(size * NUM_ENVS, *spaces, device="cpu", n_envs=NUM_ENVS, n_steps=n_steps, gamma=0.9)


def draw(buffer: FrameReplayBuffer | NStepReplayBuffer, rows: np.ndarray) -> ReplayBufferSamples:
    np.random.seed(1)  # which environment: both draw it in the same way
    return buffer._get_samples(rows)


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("steps", [200, 530])
def test_samples_are_those_of_sb3s_buffer(n_steps: int, steps: int) -> None:
    size = 300
    ours = make(size, n_steps)
    spaces = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(4)
    sb3 = NStepReplayBuffer(size * NUM_ENVS, *spaces, "cpu", NUM_ENVS, n_steps=n_steps, gamma=0.9)
    fill(ours, sb3, steps=steps)
    first = max(0, steps - size + 3) if steps > size else 0
    rows = np.arange(first, steps - n_steps)
    a, b = draw(ours, rows), draw(sb3, rows % size)
    assert (a.observations == b.observations).all()
    assert (a.actions == b.actions).all()
    torch.testing.assert_close(a.rewards, b.rewards)
    assert (a.dones == b.dones).all()
    is_alive = a.dones[:, 0] == 0
    assert 0 < int((~is_alive).sum()) < len(rows)
    assert (a.next_observations == b.next_observations)[is_alive].all()
    assert b.discounts is not None
    assert a.discounts is not None
    torch.testing.assert_close(a.discounts[is_alive], b.discounts[is_alive])


def test_only_whole_samples_are_drawn() -> None:
    buffer = make(40, n_steps=3)
    fill(buffer, steps=100)
    rows = []
    buffer._get_samples = lambda batch_inds, env=None: rows.append(batch_inds)  # type: ignore[method-assign,assignment,return-value]
    buffer.sample(10_000)
    assert (rows[0].min(), rows[0].max()) == (100 - 40 + 3, 100 - 3 - 1)


def test_a_step_takes_a_frame_and_not_eight() -> None:
    buffer = make(1000)
    arrays = (buffer.frames_TE, buffer.num_past_frames_TE, buffer.actions, buffer.rewards, buffer.dones)
    assert sum(a.nbytes for a in arrays) / (1000 * NUM_ENVS) < 7_100
    assert not hasattr(buffer, "observations")


def test_shards_bring_a_ring_back() -> None:
    buffer, again = make(40), make(40)
    shards = []
    for steps in (25, 30, 45):
        before = buffer.num_added
        fill(buffer, steps=steps)
        shards.append((buffer.arrays(before), buffer.num_added))
    for arrays, last in shards:
        again.extend(arrays, last)
    assert (again.num_added, again.pos, again.full) == (100, 100 % 40, True)
    for name in ("frames_TE", "num_past_frames_TE", "actions", "rewards", "dones"):
        assert (getattr(buffer, name) == getattr(again, name)).all()


def test_a_ring_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer_size 12 is too small for 3 environments"):
        make(4)
