"""Our Atari against SB3's own wrappers, and what we promise beyond them."""

from itertools import pairwise

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage

from policykd.envs.atari import AtariEnvs, make_atari
from policykd.envs.vector import Episode

gym.register_envs(ale_py)

GAMES = [
    "Asteroids",
    "BeamRider",
    "Breakout",
    "Enduro",
    "MsPacman",
    "Pong",
    "Qbert",
    "RoadRunner",
    "Seaquest",
    "SpaceInvaders",
]


@pytest.mark.parametrize("game", GAMES)
def test_every_pixel_reward_and_end_is_that_of_sb3(game: str) -> None:
    """3,000 random steps over two games at once: stacks, lost lives, game ends, whole-game returns, bit for bit."""
    wrappers = {"noop_max": 0, "clip_reward": False}
    theirs = make_atari_env(f"{game}NoFrameskip-v4", n_envs=2, seed=0, wrapper_kwargs=wrappers)
    sb3 = VecTransposeImage(VecFrameStack(theirs, 4))
    envs = make_atari(game, 2, seed=0, noop_max=0)
    generator = np.random.default_rng(0)

    np.testing.assert_array_equal(envs.reset().numpy(), sb3.reset())
    lives_lost = episodes = 0
    for _ in range(1500):
        actions = generator.integers(envs.num_actions, size=2)
        obs, rewards, dones, infos = sb3.step(actions)
        step = envs.step(torch.from_numpy(actions))
        np.testing.assert_array_equal(step.obs.numpy(), obs)
        np.testing.assert_array_equal(step.rewards_B.numpy(), rewards)
        np.testing.assert_array_equal(step.starts_B.numpy(), dones)
        returns = [info["episode"]["r"] for info in infos if "episode" in info]
        assert [e.episodic_return for e in step.episodes] == pytest.approx(returns)
        episodes += len(returns)
        lives_lost += int(dones.sum()) - len(returns)
    lives = {"Asteroids", "BeamRider", "Breakout", "MsPacman", "Qbert", "RoadRunner", "Seaquest", "SpaceInvaders"}
    assert (lives_lost > 0) == (game in lives)
    assert (episodes > 0) == (game != "Enduro"), "only Enduro lasts longer than this test"


def trajectory(envs: AtariEnvs, num_steps: int, seed: int = 0) -> list[bytes]:
    generator = torch.Generator().manual_seed(seed)
    frames = [envs.reset()]
    for _ in range(num_steps):
        frames.append(envs.step(torch.randint(envs.num_actions, (envs.num_envs,), generator=generator)).obs)
    return [f.numpy().tobytes() for f in frames]


@pytest.mark.parametrize("sticky", [0.0, 0.25])
def test_a_seed_decides_everything(sticky: float) -> None:
    def play(seed: int) -> list[bytes]:
        return trajectory(make_atari("Breakout", 3, seed, repeat_action_probability=sticky), 150)

    assert play(5) == play(5)
    assert play(5) != play(6)


@pytest.mark.parametrize(("noop_max", "num_different"), [(0, 1), (30, 6)])
def test_noop_starts_make_games_differ(noop_max: int, num_different: int) -> None:
    envs = make_atari("Pong", 8, seed=0, noop_max=noop_max)
    obs = envs.reset()
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        obs = envs.step(torch.randint(6, (1,), generator=generator).expand(8)).obs
    assert len({f.numpy().tobytes() for f in obs}) >= num_different
    assert noop_max or len({f.numpy().tobytes() for f in obs}) == 1


@pytest.mark.parametrize("num_steps", [2, 40, 700])
def test_a_position_is_restored_bit_for_bit(num_steps: int) -> None:
    """Breakout loses lives and ends games within 700 random steps; the games go on as if nothing had happened."""
    envs, again = (make_atari("Breakout", 2, seed=3, repeat_action_probability=0.25) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    obs = envs.reset()
    for _ in range(num_steps):
        obs = envs.step(torch.randint(4, (2,), generator=generator)).obs
    assert (again.restore(envs.state()) == obs).all()
    for _ in range(200):
        actions_B = torch.randint(4, (2,), generator=generator)
        ours, theirs = envs.step(actions_B), again.step(actions_B)
        assert (ours.obs == theirs.obs).all()
        assert ours.episodes == theirs.episodes


def test_a_negative_action_stands_still_and_a_standing_game_is_restored() -> None:
    envs, again = make_atari("Breakout", 2, seed=0), make_atari("Breakout", 2, seed=0)
    first = obs = envs.reset()
    for k in range(60):
        step = envs.step(torch.tensor([k % 4, -1]))
        obs = step.obs
        assert (obs[1] == first[1]).all()
        assert not step.starts_B[1]
    assert not (obs[0] == first[0]).all()
    assert (again.restore(envs.state()) == obs).all()


def test_observations_are_not_changed_by_later_steps() -> None:
    envs = make_atari("Pong", 2, seed=0)
    obs = envs.reset()
    before = obs.clone()
    envs.step(torch.zeros(2, dtype=torch.long))
    assert (obs == before).all()


def test_returns_are_unclipped_and_count_the_whole_game() -> None:
    envs = make_atari("Qbert", 2, seed=0)  # 25 points a cube, four lives
    generator = torch.Generator().manual_seed(0)
    envs.reset()
    totals, episodes, life_losses = np.zeros(2), list[Episode](), 0
    while len(episodes) < 2:
        step = envs.step(torch.randint(6, (2,), generator=generator))
        totals += step.rewards_B.numpy()
        episodes += step.episodes
        life_losses += int(step.starts_B.sum())
    assert life_losses > len(episodes)
    assert max(e.episodic_return for e in episodes) >= 25
    assert sum(e.episodic_return for e in episodes) <= totals.sum()


def test_stacks_shift_by_one_frame() -> None:
    envs = make_atari("Pong", 1, seed=0)
    stacks = [envs.reset(), *(envs.step(torch.zeros(1, dtype=torch.long)).obs for _ in range(10))]
    assert (stacks[0][0, :3] == 0).all()
    for before, after in pairwise(stacks):
        assert (after[0, :3] == before[0, 1:]).all()


@pytest.mark.parametrize(("num_envs", "sticky"), [(0, 0.0), (1, -0.1), (1, 1.5)])
def test_numbers_out_of_range_are_refused(num_envs: int, sticky: float) -> None:
    with pytest.raises(ValueError, match="must"):
        make_atari("Pong", num_envs, 0, repeat_action_probability=sticky)
