"""Our Atari against SB3's own wrappers, and what we promise beyond them."""

import json
from itertools import pairwise
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage

from policykd.envs.atari import AtariEnvs, make_atari
from policykd.envs.emulators import pack
from policykd.envs.games import RANDOM_AND_HUMAN_SCORES
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


USUAL = {"BeamRider", "Breakout", "Pong"}
"""lives and FIRE, memory that outlasts a game, and neither; the others in `make slow`"""


@pytest.mark.parametrize("game", [g if g in USUAL else pytest.param(g, marks=pytest.mark.slow) for g in GAMES])
def test_every_pixel_reward_and_end_is_that_of_sb3(game: str) -> None:
    """D05: 3,000 random steps over two games at once: first frames, lost lives, game ends, returns, bit for bit."""
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


@pytest.mark.parametrize(
    ("game", "num_steps", "num_more"),
    [
        *(("Breakout", num_steps, 200) for num_steps in (0, 2, 40, 700)),
        ("BeamRider", 900, 900),  # what is left in memory when a game ends decides how the next one goes
        ("Qbert", 0, 100),  # the first frame after its start is half done
        ("YarsRevenge", 101, 50),
    ],
)
def test_a_position_is_restored_bit_for_bit(game: str, num_steps: int, num_more: int) -> None:
    """Lives are lost and games end before and after; sticky games continue as if nothing had happened."""
    envs, again = (make_atari(game, 2, seed=3, repeat_action_probability=0.25) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    obs, num_ended = envs.reset(), 0
    for _ in range(num_steps):
        obs = envs.step(torch.randint(envs.num_actions, (2,), generator=generator)).obs
    state = json.loads(json.dumps(envs.state()))
    assert (again.restore(state) == obs).all()
    assert (again.screens() == envs.screens()).all()
    for _ in range(num_more):
        actions_B = torch.randint(envs.num_actions, (2,), generator=generator)
        ours, theirs = envs.step(actions_B), again.step(actions_B)
        assert (ours.obs == theirs.obs).all()
        assert (ours.rewards_B == theirs.rewards_B).all()
        assert ours.episodes == theirs.episodes
        num_ended += len(ours.episodes)
    assert envs.state() == again.state()
    assert num_ended or game != "BeamRider"
    assert (envs.reset() == again.reset()).all()


@pytest.mark.slow
@pytest.mark.parametrize("game", RANDOM_AND_HUMAN_SCORES)
def test_every_game_is_restored_bit_for_bit(game: str) -> None:
    """At its very start, and three times later."""
    envs, again = (make_atari(game, 2, seed=1, noop_max=2, repeat_action_probability=0.25) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    obs = envs.reset()
    for _ in range(4):
        assert (again.restore(envs.state()) == obs).all()
        for _ in range(60):
            actions_B = torch.randint(envs.num_actions, (2,), generator=generator)
            ours, theirs = envs.step(actions_B), again.step(actions_B)
            obs = ours.obs
            assert (theirs.obs == obs).all()
            assert (theirs.rewards_B == ours.rewards_B).all()
    assert envs.state() == again.state()


def test_a_hundred_restores_change_nothing() -> None:
    """X03: the same emulators, over and over, in the middle of sticky games; no file stays open."""
    envs, again = (make_atari("Seaquest", 2, seed=0, repeat_action_probability=0.25) for _ in range(2))
    generator, num_files = torch.Generator().manual_seed(0), 0
    envs.reset()
    for k in range(100):
        state = envs.state()
        again.restore(state)
        for _ in range(4):
            actions_B = torch.randint(18, (2,), generator=generator)
            ours, theirs = envs.step(actions_B), again.step(actions_B)
            assert (ours.obs == theirs.obs).all()
        if k == 0 and Path("/proc/self/fd").exists():
            num_files = len(list(Path("/proc/self/fd").iterdir()))
    assert envs.state() == again.state()
    assert not Path("/proc/self/fd").exists() or len(list(Path("/proc/self/fd").iterdir())) == num_files


def test_a_position_of_another_number_or_game_is_refused_in_one_line() -> None:
    """Neither does the emulator crash on it."""
    envs, other = make_atari("Pong", 2, seed=0), make_atari("Breakout", 2, seed=0)
    obs = envs.reset()
    state = envs.state()
    pong, *_ = state["games"]
    for wrong, reason in {
        "other game": (other.state(), "not one of Pong"),
        "one game": (state | {"games": [pong]}, "has 1 environments, these are 2"),
        "no state": (state | {"games": [pong | {"ale": ""}] * 2}, "damaged"),
        "half a state": (state | {"games": [pong | {"ale": pack(np.zeros(100, np.uint8))}] * 2}, "not one of Pong"),
        "half a stack": (state | {"stacks": pack(np.zeros(100, np.uint8))}, "reshape"),
    }.values():
        with pytest.raises(ValueError, match=reason) as error:
            envs.restore(wrong)
        assert "\n" not in str(error.value)
    assert (envs.restore(state) == obs).all()


def test_a_negative_action_holds_a_game_and_a_held_game_is_restored() -> None:
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


@pytest.mark.parametrize(("num_envs", "sticky", "num_workers"), [(0, 0.0, 0), (1, -0.1, 0), (1, 1.5, 0), (1, 0.0, -1)])
def test_numbers_out_of_range_are_refused(num_envs: int, sticky: float, num_workers: int) -> None:
    with pytest.raises(ValueError, match="must"):
        make_atari("Pong", num_envs, 0, repeat_action_probability=sticky, num_workers=num_workers)


def test_a_game_for_two_is_refused() -> None:
    with pytest.raises(ValueError, match="Combat needs two players"):
        make_atari("Combat", 1, 0)
