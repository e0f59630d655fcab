import inspect
import signal
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from policykd.agents.teacher import load_teacher
from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.identity import IdentityEnv
from policykd.envs.vector import Episode, Step
from policykd.evaluation.evaluate import MAX_STEPS, PROTOCOLS, RandomPolicy, evaluate, evaluate_on_atari
from policykd.evaluation.results import judgement
from policykd.io.signals import noting_signals, seconds_since_signal


class TwoSpeeds:
    """Half the environments end after 1 step with return 1, half after 10 with return 10."""

    num_envs, num_actions, stack = 4, 2, 1
    obs_shape: tuple[int, ...] = (1,)

    def reset(self) -> Tensor:
        self.steps = [0] * 4
        return torch.zeros(4, 1)

    def step(self, actions_B: Tensor) -> Step:
        episodes = []
        for i in torch.nonzero(actions_B >= 0).flatten().tolist():
            self.steps[i] += 1
            if self.steps[i] == (length := 1 if i < 2 else 10):
                episodes.append(Episode(i, float(length), length))
                self.steps[i] = 0
        return Step(torch.zeros(4, 1), torch.ones(4), torch.zeros(4, dtype=torch.bool), episodes)

    def close(self) -> None:
        raise NotImplementedError

    def state(self) -> dict[str, object]:
        raise NotImplementedError

    def restore(self, state: dict[str, object]) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("num_episodes", [4, 10, 11])
def test_short_games_are_not_favoured(num_episodes: int) -> None:
    games = evaluate(RandomPolicy(2), TwoSpeeds(), num_episodes, deterministic=False, generator=torch.Generator())
    assert len(games.returns) == len(games.lengths) == num_episodes  # none is played that is not counted
    assert games.returns.count(1.0) == sum((num_episodes + i) // 4 for i in (0, 1))  # the two quick environments' share


def test_greedy_and_sampled_play() -> None:
    def policy(obs: Tensor) -> Tensor:
        return obs * float(np.log(9.0))  # the hot action with a chance of 0.75

    def mean(deterministic: bool, temperature: float = 1.0) -> float:
        envs = IdentityEnv(50, 4, seed=0)
        generator = torch.Generator().manual_seed(0)
        games = evaluate(policy, envs, 4000, deterministic=deterministic, generator=generator, temperature=temperature)
        return float(np.mean(games.returns))

    assert mean(deterministic=True) == 1.0
    assert mean(deterministic=False) == pytest.approx(0.75, abs=0.02)
    assert mean(deterministic=False, temperature=0.5) == pytest.approx(81 / 84, abs=0.02)


def test_no_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(RandomPolicy(2), TwoSpeeds(), 0, deterministic=False, generator=torch.Generator())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_random_play_of_pong_scores_what_the_literature_says(protocol: str) -> None:
    games = evaluate_on_atari(RandomPolicy(6), "Pong", protocol, 5, seed=0)  # type: ignore[arg-type]
    assert np.mean(games.returns) == pytest.approx(-20.5, abs=0.9)  # -20.6 and -20.2 (sticky) in hundreds of games
    two, again = (evaluate_on_atari(RandomPolicy(6), "Pong", protocol, 2, seed=0) for _ in range(2))  # type: ignore[arg-type]
    assert again == two


def test_the_bundled_teacher_beats_pong() -> None:
    teacher = load_teacher(game="Pong")
    games = evaluate_on_atari(teacher, "Pong", "noop_sampled", 2, seed=0)
    assert min(games.returns) > 0


@pytest.mark.parametrize(("num_episodes", "whole"), [(4, [1.0, 1.0]), (10, [1.0] * 4)])
def test_games_that_are_cut_off_are_not_averaged_with_whole_ones(num_episodes: int, whole: list[float]) -> None:
    games = evaluate(
        RandomPolicy(2), TwoSpeeds(), num_episodes, deterministic=False, generator=torch.Generator(), max_steps=7
    )
    assert games.returns == whole
    assert games.unfinished == [7.0, 7.0]


def test_a_game_that_ends_in_time_is_whole() -> None:
    games = evaluate(RandomPolicy(2), TwoSpeeds(), 8, deterministic=False, generator=torch.Generator(), max_steps=10)
    assert sorted(games.returns) == [1.0] * 4 + [10.0] * 4
    assert not games.unfinished


class Bad(gym.Env[np.ndarray, np.int64]):
    """Ends after 5 steps, or goes wrong in its third."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Any]:
        self.num_steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, Any]:
        self.num_steps += 1
        if self.num_steps == 3 and self.kind == "crashes":
            raise ZeroDivisionError("its physics")
        if self.num_steps == 3 and self.kind == "is interrupted" and not seconds_since_signal():
            signal.raise_signal(signal.SIGTERM)
        reward = np.nan if self.num_steps == 3 and self.kind == "rewards with NaN" else 1.0
        return np.zeros(3, np.float32), reward, self.num_steps == 5 and self.kind != "never ends", False, {}


@pytest.fixture
def envs_of() -> Iterator[Callable[[str], GymnasiumEnvs]]:
    gym.register("Bad-v0", lambda **kwargs: Bad(**kwargs), disable_env_checker=True, order_enforce=False)
    yield lambda kind: GymnasiumEnvs("Bad-v0", 2, seed=0, kind=kind)
    del gym.registry["Bad-v0"]


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        (
            "crashes",
            RuntimeError,
            r"^Bad-v0: environment 0, step 2 of episode 0: crashed \(ZeroDivisionError: its",
        ),
        ("rewards with NaN", FloatingPointError, "reward in environment 0 at step 2 of its game: nan"),
        ("is interrupted", KeyboardInterrupt, None),
    ],
)
def test_what_goes_wrong_in_an_environment_is_no_result(
    envs_of: Callable[[str], GymnasiumEnvs], kind: str, error: type[BaseException], reason: str | None
) -> None:
    """N05, C04: no mean over what was played by then."""
    with noting_signals(), pytest.raises(error, match=reason):
        evaluate(RandomPolicy(2), envs_of(kind), 4, deterministic=False, generator=torch.Generator())


def test_a_game_without_an_end_is_cut_off(envs_of: Callable[[str], GymnasiumEnvs]) -> None:
    """N05: without being told to, and marked as what it is."""
    assert inspect.signature(evaluate).parameters["max_steps"].default == MAX_STEPS
    games = evaluate(
        RandomPolicy(2), envs_of("never ends"), 2, deterministic=False, generator=torch.Generator(), max_steps=100
    )
    assert (games.returns, games.unfinished) == ([], [100.0] * 2)
    with pytest.raises(ValueError, match="no episodes"):
        judgement(games)


def test_scores_that_are_no_numbers_choose_no_action(envs_of: Callable[[str], GymnasiumEnvs]) -> None:
    def policy(obs: Tensor) -> Tensor:
        return torch.tensor([[0.0, 1.0], [torch.inf, 0.0]])

    with pytest.raises(FloatingPointError, match="policy's scores in environment 1 at step 0 of its game: inf"):
        evaluate(policy, envs_of("ends"), 4, deterministic=True, generator=torch.Generator())
