"""SB3 sees our environments as it sees its own."""

import numpy as np
import pytest

from policykd.envs.atari import make_atari
from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.sb3_vec_env import SB3VecEnv


def test_rewards_are_clipped_for_learning_and_whole_in_the_episode() -> None:
    envs = SB3VecEnv(make_atari("MsPacman", 4, seed=0), clip_rewards=True)
    obs = envs.reset()
    assert obs.shape == (4, 4, 84, 84)
    assert envs.observation_space.contains(obs[0])
    generator, episodes, seen, ends = np.random.default_rng(0), [], set[float](), 0
    for _ in range(600):
        _, rewards, dones, infos = envs.step(generator.integers(envs.action_space.n, size=4))  # type: ignore[attr-defined]
        seen |= set(rewards.tolist())
        ends += int(dones.sum())
        episodes += [info["episode"] for info in infos if "episode" in info]
    assert seen == {0.0, 1.0}
    assert episodes
    assert ends > len(episodes)  # a lost life ends an episode for the algorithm alone
    assert all(e["r"] >= 60 and e["l"] > 100 for e in episodes)


def test_vectors_pass_through() -> None:
    envs = SB3VecEnv(GymnasiumEnvs("CartPole-v1", 3, seed=0), clip_rewards=False)
    obs = envs.reset()
    assert (obs.shape, envs.observation_space.shape) == ((3, 4), (4,))
    _, rewards, dones, _ = envs.step(np.zeros(3, np.int64))
    assert rewards.tolist() == [1.0] * 3
    assert not dones.any()
    assert envs.get_attr("num_actions", [0, 2]) == [2, 2]


def test_closing_ends_the_workers() -> None:
    envs = SB3VecEnv(make_atari("Pong", 2, seed=0, num_workers=1), clip_rewards=False)
    envs.reset()
    envs.close()
    with pytest.raises(OSError, match="make new environments"):
        envs.reset()
