import inspect
import signal
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack
from torch import Tensor, nn

import policykd
from policykd.agents.student import Student, make_student
from policykd.agents.teacher import load_teacher
from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.vector import Episode, Step
from policykd.evaluation.evaluate import (
    MAX_STEPS,
    PROTOCOLS,
    ProtocolName,
    RandomPolicy,
    TemperedPolicy,
    evaluate,
    evaluate_on_atari,
    sampling_temperature,
)
from policykd.evaluation.results import summarise_episodes
from policykd.io.signals import handle_signals, is_signalled
from tests.identity_env import IdentityEnv


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
    games = evaluate(RandomPolicy(2), TwoSpeeds(), num_episodes)
    assert len(games.returns) == len(games.lengths) == num_episodes  # no game is played that is not counted
    assert games.returns.count(1.0) == sum((num_episodes + i) // 4 for i in (0, 1))  # the share of the quick two


def test_greedy_and_sampled_play() -> None:
    def policy(obs: Tensor) -> Tensor:
        return obs * float(np.log(9.0))  # the rewarded action with a probability of 0.75

    def mean(deterministic: bool, temperature: float = 1.0) -> float:
        envs = IdentityEnv(50, 4, seed=0)
        return evaluate(
            TemperedPolicy(policy, temperature), envs, 4000, deterministic=deterministic, seed=0
        ).mean_return

    assert mean(deterministic=True) == 1.0
    assert mean(deterministic=False) == pytest.approx(0.75, abs=0.02)
    assert mean(deterministic=False, temperature=0.5) == pytest.approx(81 / 84, abs=0.02)


def test_a_policy_brings_its_own_temperature() -> None:
    """A caller of a DQN teacher who passes nothing gets its near-greedy policy, not softmax(Q)."""
    assert sampling_temperature(load_teacher("bundled:dqn", game="Pong")) == 0.01
    assert sampling_temperature(load_teacher("bundled:ppo", game="Pong")) == 1.0
    assert sampling_temperature(make_student("0.1%", 6, temperature=0.01)) == 1.0  # its outputs are logits already
    assert sampling_temperature(lambda obs: obs) == 1.0


def test_it_is_called_like_sb3s_evaluate_policy_and_agrees_with_it() -> None:
    """The same agent on the same environments: without a keyword, with SB3's VecEnv as it is."""
    envs = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=2, seed=3), 4)
    student = make_student("0.1%", 4, seed=1)
    games = policykd.evaluate(student, envs, 4)
    again = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=2, seed=3), 4)
    returns, lengths = evaluate_policy(student, again, 4, return_episode_rewards=True)  # type: ignore[arg-type]
    assert (list(games.returns), list(games.lengths)) == (returns, lengths)


def test_modules_are_evaluated_in_evaluation_mode_and_left_as_they_were() -> None:
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    student = Student.of(module, num_actions=2, obs_shape=(4,)).train()
    before = module[0].running_mean.clone()  # type: ignore[operator]
    envs = GymnasiumEnvs("CartPole-v1", 2, seed=0)
    games = evaluate(student, envs, 4)
    assert student.training
    assert torch.equal(module[0].running_mean, before)  # type: ignore[arg-type]
    assert evaluate(student, GymnasiumEnvs("CartPole-v1", 2, seed=0), 4) == games


def test_a_policy_may_write_into_its_input() -> None:
    student = make_student("0.1%", 6)

    def blanks_the_score(obs: Tensor) -> Tensor:
        obs.numpy()[:, :, :14] = 0
        outputs: Tensor = student(obs)
        return outputs

    def on_a_copy(obs: Tensor) -> Tensor:
        return blanks_the_score(obs.clone())

    games = [evaluate(p, policykd.make_env("Pong", 1, 0), 1, max_steps=100) for p in (blanks_the_score, on_a_copy)]
    assert games[0] == games[1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_random_play_of_pong_returns_what_the_literature_reports(protocol: ProtocolName) -> None:
    games = evaluate_on_atari(RandomPolicy(6), "Pong", protocol, 5)
    assert games.mean_return == pytest.approx(-20.5, abs=0.9)  # -20.6 and -20.2 (sticky) in hundreds of games
    two, again = (evaluate_on_atari(RandomPolicy(6), "Pong", protocol, 2) for _ in range(2))
    assert again == two


def test_the_bundled_teacher_beats_pong() -> None:
    games = evaluate_on_atari(load_teacher(game="Pong"), "Pong", "noop_sampled", 2)
    assert min(games.returns) > 0


@pytest.mark.parametrize(("num_episodes", "whole"), [(4, (1.0, 1.0)), (10, (1.0,) * 4)])
def test_games_that_are_cut_off_are_not_averaged_with_full_ones(num_episodes: int, whole: tuple[float, ...]) -> None:
    games = evaluate(RandomPolicy(2), TwoSpeeds(), num_episodes, max_steps=7)
    assert games.returns == whole
    assert games.unfinished == (7.0, 7.0)


def test_a_game_that_ends_in_time_is_full() -> None:
    games = evaluate(RandomPolicy(2), TwoSpeeds(), 8, max_steps=10)
    assert sorted(games.returns) == [1.0] * 4 + [10.0] * 4
    assert not games.unfinished


class Bad(gym.Env[np.ndarray, np.int64]):
    """Ends after 5 steps, or fails in its third."""

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
        if self.num_steps == 3 and self.kind == "is interrupted" and not is_signalled():
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
        ("crashes", RuntimeError, r"^Bad-v0: environment 0, step 2 of episode 0: crashed \(ZeroDivisionError: its"),
        ("rewards with NaN", FloatingPointError, "reward in environment 0 at step 2 of its game is nan"),
        ("is interrupted", KeyboardInterrupt, None),
    ],
)
def test_a_failing_environment_gives_no_result(
    envs_of: Callable[[str], GymnasiumEnvs], kind: str, error: type[BaseException], reason: str | None
) -> None:
    """N05, C04: no mean over the games that had ended by then."""
    with handle_signals(), pytest.raises(error, match=reason):
        evaluate(RandomPolicy(2), envs_of(kind), 4)


def test_an_endless_game_is_cut_off_by_default_and_no_statistic(envs_of: Callable[[str], GymnasiumEnvs]) -> None:
    """N05."""
    assert inspect.signature(evaluate).parameters["max_steps"].default == MAX_STEPS
    games = evaluate(RandomPolicy(2), envs_of("never ends"), 2, max_steps=100)
    assert (games.returns, games.unfinished) == ((), (100.0,) * 2)
    with pytest.raises(ValueError, match="no episodes"):
        summarise_episodes(games)


@pytest.mark.parametrize(
    ("policy", "num_episodes", "error", "reason"),
    [
        (
            lambda obs: torch.tensor([[0.0, 1.0], [torch.inf, 0.0]]),
            4,
            FloatingPointError,
            "environment 1 at step 0 .*inf",
        ),
        (RandomPolicy(2), 0, ValueError, "num_episodes must be at least 1"),
    ],
)
def test_invalid_outputs_and_numbers_are_refused(
    envs_of: Callable[[str], GymnasiumEnvs], policy: Any, num_episodes: int, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        evaluate(policy, envs_of("ends"), num_episodes)
