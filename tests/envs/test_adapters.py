"""Environments of other libraries: real ones, compared with each other and with ours."""

import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecTransposeImage

import policykd
from policykd.envs.atari import AtariEnvs, make_atari
from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.vector import Episode, VectorEnv, as_vector_env
from policykd.evaluation.evaluate import RandomPolicy, evaluate

NUM_ENVS = 3


def gymnasium_envs(mode: AutoresetMode, vectorization: str = "sync") -> gym.vector.VectorEnv[Any, Any, Any]:
    envs = gym.make_vec(
        "CartPole-v1", NUM_ENVS, vectorization_mode=vectorization, vector_kwargs={"autoreset_mode": mode}
    )
    envs.reset(seed=5)
    return envs


def sb3_envs(*, monitor: bool) -> DummyVecEnv:
    def make() -> gym.Env[Any, Any]:
        return Monitor(gym.make("CartPole-v1")) if monitor else gym.make("CartPole-v1")

    envs = DummyVecEnv([make] * NUM_ENVS)
    envs.seed(5)  # environment i gets 5 + i, as in Gymnasium
    envs.reset()
    return envs


MAKERS: dict[str, Callable[[], Any]] = {
    "next step": lambda: gymnasium_envs(AutoresetMode.NEXT_STEP),
    "same step": lambda: gymnasium_envs(AutoresetMode.SAME_STEP),
    "disabled": lambda: gymnasium_envs(AutoresetMode.DISABLED),
    "async": lambda: gymnasium_envs(AutoresetMode.SAME_STEP, "async"),
    "SB3": lambda: sb3_envs(monitor=False),
    "SB3 with Monitor": lambda: sb3_envs(monitor=True),
}


def lean(obs: torch.Tensor) -> torch.Tensor:
    """Pushes to where the pole falls."""
    falls = 4.0 * (obs[:, 2] + obs[:, 3])
    return torch.stack([-falls, falls], dim=1)


def episodes_of(envs: VectorEnv, num_steps: int = 400) -> list[list[Episode]]:
    """The episodes of each environment under a policy that is a function of the observation."""
    obs = envs.reset()
    found: list[list[Episode]] = [[] for _ in range(envs.num_envs)]
    for _ in range(num_steps):
        step = envs.step((obs[:, 2] > 0).long())
        assert step.obs.dtype == torch.float32
        obs = step.obs
        for episode in step.episodes:
            found[episode.env].append(episode)
    return found


@pytest.fixture(scope="module")
def reference() -> list[list[Episode]]:
    return episodes_of(as_vector_env(sb3_envs(monitor=False), warn=False))


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_episodes_in_every_library_and_autoreset_mode(name: str, reference: list[list[Episode]]) -> None:
    with pytest.warns(UserWarning, match=r"cannot be resumed; make them with policykd\.make_env"):
        envs = as_vector_env(MAKERS[name]())
    found = episodes_of(envs)
    envs.close()
    for ours, theirs in zip(found, reference, strict=True):
        num = min(len(ours), len(theirs))  # a reset that takes a step leaves fewer of them
        assert num >= 3
        assert ours[:num] == theirs[:num]


@pytest.mark.parametrize("name", MAKERS)
def test_evaluate_takes_them_and_agrees_with_sb3(name: str) -> None:
    envs = MAKERS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an evaluation is never resumed, so there is nothing to warn of
        games = evaluate(lean, envs, 7)
    envs.close()
    assert len(games.returns) == 7
    assert games.returns == tuple(map(float, games.lengths))
    again = MAKERS["SB3"]()
    assert sorted(evaluate(lean, again, 7).returns) == sorted(games.returns)


def test_first_observations_carry_no_past_and_a_reset_is_no_step() -> None:
    for mode, delay in ((AutoresetMode.SAME_STEP, 0), (AutoresetMode.DISABLED, 0), (AutoresetMode.NEXT_STEP, 1)):
        envs = as_vector_env(gymnasium_envs(mode), warn=False)
        envs.reset()
        ended, starts, rewards = [], [], []
        for _ in range(60):
            step = envs.step(torch.ones(NUM_ENVS, dtype=torch.long))
            ended.append(any(e.env == 0 for e in step.episodes))
            starts.append(bool(step.starts_B[0]))
            rewards.append(float(step.rewards_B[0]))
        assert any(ended)
        assert starts[delay:] == ended[: len(ended) - delay]
        assert [r for r, s in zip(rewards, starts, strict=True) if s and delay] == [0.0] * (delay * sum(starts))


def test_time_limits_are_truncations() -> None:
    for envs in (
        gym.make_vec("CartPole-v1", 2, vectorization_mode="sync", max_episode_steps=5),
        DummyVecEnv([lambda: gym.make("CartPole-v1", max_episode_steps=5)] * 2),
    ):
        games = evaluate(lean, envs, 4)
        assert (games.lengths, games.num_truncated) == ((5,) * 4, 4)


def test_an_idle_environment_reports_nothing() -> None:
    envs = as_vector_env(gymnasium_envs(AutoresetMode.SAME_STEP), warn=False)
    first = envs.reset()
    for _ in range(60):
        step = envs.step(torch.tensor([1, -1, 1]))
        assert (step.obs[1] == first[1]).all()
        assert step.rewards_B[1] == 0
        assert not step.starts_B[1]
        assert all(e.env != 1 for e in step.episodes)


@pytest.mark.parametrize("channels_first", [False, True])
def test_sb3s_atari_is_our_atari(channels_first: bool) -> None:
    """Stacks, starts and whole games; the rewards stay what SB3's wrappers make of them."""
    theirs: Any = VecFrameStack(
        make_atari_env("BreakoutNoFrameskip-v4", n_envs=2, seed=0, wrapper_kwargs={"noop_max": 0}), 4
    )
    if channels_first:
        theirs = VecTransposeImage(theirs)
    adapted, envs = as_vector_env(theirs, warn=False), make_atari("Breakout", 2, 0, noop_max=0)
    assert (adapted.obs_shape, adapted.num_actions, adapted.stack) == (envs.obs_shape, 4, 4)
    assert (adapted.reset() == envs.reset()).all()
    generator, num_games, num_starts = torch.Generator().manual_seed(0), 0, 0
    for _ in range(500):
        actions_B = torch.randint(4, (2,), generator=generator)
        a, b = adapted.step(actions_B), envs.step(actions_B)
        assert a.obs.dtype == torch.uint8
        assert (a.obs == b.obs).all()
        assert (a.starts_B == b.starts_B).all()
        assert (a.rewards_B == b.rewards_B.sign()).all()
        assert [e.episodic_return for e in a.episodes] == [e.episodic_return for e in b.episodes]
        num_games += len(a.episodes)
        num_starts += int(a.starts_B.sum())
    assert num_starts > num_games > 0


def test_a_vec_monitor_counts_the_episodes_too() -> None:
    envs = VecMonitor(sb3_envs(monitor=False))
    games = evaluate(RandomPolicy(2), envs, 5, deterministic=False)
    assert len(games.returns) == 5


def test_positions_are_refused_in_one_line() -> None:
    envs = as_vector_env(sb3_envs(monitor=False), warn=False)
    for call in (envs.state, lambda: envs.restore({})):
        with pytest.raises(ValueError, match=r"DummyVecEnv: positions .* cannot be saved or restored; make them") as e:
            call()
        assert "\n" not in str(e.value)


def test_our_own_environments_pass_through() -> None:
    envs = GymnasiumEnvs("CartPole-v1", 2, 0)
    assert as_vector_env(envs) is envs


def test_discrete_actions_may_start_elsewhere() -> None:
    class FromFive(gym.ActionWrapper[Any, Any, Any]):
        def __init__(self) -> None:
            super().__init__(gym.make("CartPole-v1"))
            self.action_space = gym.spaces.Discrete(2, start=5)

        def action(self, action: Any) -> Any:
            assert action in (5, 6)
            return action - 5

    games = evaluate(lean, DummyVecEnv([FromFive]), 2)
    assert len(games.returns) == 2


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (lambda: gym.make_vec("Pendulum-v1", 1), ValueError, "SyncVectorEnv has Box.*needs Discrete actions and a Box"),
        (lambda: DummyVecEnv([lambda: gym.make("FrozenLake-v1")]), ValueError, "DummyVecEnv has Discrete"),
        (lambda: gym.make("CartPole-v1"), TypeError, "a single environment; give a vector"),
        (lambda: 3, TypeError, "int: not a vector of environments"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        as_vector_env(make())


def test_make_env_takes_games_and_registered_ids() -> None:
    assert isinstance(policykd.make_env("Pong", 2, 0, repeat_action_probability=0.25), AtariEnvs)
    for name in ("ALE/Pong-v5", "PongNoFrameskip-v4", "ms_pacman"):
        assert isinstance(policykd.make_env(name, 1, 0), AtariEnvs)
    cart_pole = policykd.make_env("CartPole-v1", 2, 0)
    assert isinstance(cart_pole, GymnasiumEnvs)
    assert (cart_pole.reset() == GymnasiumEnvs("CartPole-v1", 2, 0).reset()).all()
    # Blackjack is a game of ALE and, with a version, an environment of Gymnasium whose observations are tuples.
    assert isinstance(policykd.make_env("Blackjack", 1, 0), AtariEnvs)
    with pytest.raises(ValueError, match=r"Blackjack-v1 has .* needs discrete actions"):
        policykd.make_env("Blackjack-v1", 1, 0)
    with pytest.raises(ValueError, match=r"unknown environment 'CartPool-v1': .*") as error:
        policykd.make_env("CartPool-v1", 1, 0)
    assert "\n" not in str(error.value)


def test_observations_are_copies() -> None:
    envs = as_vector_env(sb3_envs(monitor=False), warn=False)
    obs = envs.reset()
    before = obs.clone()
    envs.step(torch.zeros(NUM_ENVS, dtype=torch.long))
    np.testing.assert_array_equal(obs.numpy(), before.numpy())
