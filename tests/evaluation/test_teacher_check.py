"""Teachers that are better than random play pass, others are refused, and nothing hangs."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from policykd.agents.card import Card, CardProtocol
from policykd.agents.policy import Policy
from policykd.agents.student import make_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.envs.atari import make_atari
from policykd.envs.games import RANDOM_AND_HUMAN_SCORES
from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.vector import Step
from policykd.evaluation.evaluate import evaluate
from policykd.evaluation.results import protocols_of_card
from policykd.evaluation.teacher_check import (
    TeacherCheck,
    check_fits,
    check_from_card,
    check_teacher,
    compare_with_random,
)
from policykd.loop import DistillConfig, distill
from policykd.schedules import WarmupCosine
from tests.identity_env import IdentityEnv

DOCS = Path(__file__).parents[2] / "docs"


class Frames(gym.Env[np.ndarray, np.int64]):
    """Spaces of preprocessed Pong, nothing behind them."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(6)


class Endless:
    """No game ever ends; action 1 brings 1 a step."""

    num_envs, num_actions, stack = 8, 2, 1
    obs_shape: tuple[int, ...] = (1,)

    def reset(self) -> Tensor:
        return torch.zeros(8, 1)

    def step(self, actions_B: Tensor) -> Step:
        return Step(torch.zeros(8, 1), (actions_B == 1).float(), torch.zeros(8, dtype=torch.bool))

    def close(self) -> None:
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        raise NotImplementedError

    def restore(self, state: dict[str, Any]) -> Tensor:
        raise NotImplementedError


def always(action: int, num_actions: int) -> Policy:
    scores_A = torch.zeros(num_actions)
    scores_A[action] = 50.0
    return lambda obs: scores_A.expand(len(obs), -1)


@pytest.fixture(scope="module")
def pong() -> Teacher:
    return load_teacher("bundled", game="Pong")


def with_card(teacher: Teacher, returns: list[float]) -> Teacher:
    return replace(teacher, card=replace(teacher.card, protocols={"noop_sampled": CardProtocol(tuple(returns))}))


def test_the_card_of_the_bundled_teacher_is_its_check(pong: Teacher) -> None:
    check = check_teacher(pong, "Pong", seed=0)
    assert (check.source, check.num_games, check.num_unfinished) == ("card", 200, 0)
    assert check.mean == check.reported_return == pytest.approx(protocols_of_card(pong)["noop_sampled"].mean)
    assert check.random_mean == RANDOM_AND_HUMAN_SCORES["Pong"][0]
    assert check.advantage[0] > 39
    assert check.warning is None


@pytest.fixture
def short_games(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 games of at most 250 steps."""
    monkeypatch.setattr("policykd.evaluation.teacher_check.NUM_GAMES", 4)
    monkeypatch.setattr("policykd.evaluation.teacher_check.MAX_STEPS", 250)


@pytest.mark.usefixtures("short_games")
def test_the_bundled_teacher_passes_without_a_card(pong: Teacher) -> None:
    check = check_teacher(replace(pong, card=Card(reported_return=19.0)), "ALE/Pong-v5", seed=0)
    assert (check.source, check.num_games, check.num_unfinished, check.max_steps) == ("played", 4, 4, 250)
    assert check.advantage[0] > 0
    assert check.warning is None  # points after 250 steps say nothing about a return of 19 for whole games
    assert "4 of them cut off after 250 steps" in str(check)


@pytest.mark.usefixtures("short_games")
def test_an_untrained_agent_is_refused(tmp_path: Path) -> None:
    PPO("CnnPolicy", DummyVecEnv([Frames]), seed=1, device="cpu", n_steps=8, batch_size=8).save(tmp_path / "fresh.zip")
    fresh = load_teacher(tmp_path / "fresh.zip", game="Pong")
    expected = (
        r"fresh\.zip: plays Pong no better than chance: -\d.* in 4 games.*; random play -\d.*--allow-weak-teacher$"
    )
    with pytest.raises(ValueError, match=expected) as raised:
        check_teacher(fresh, "Pong", seed=0)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("short_games")
def test_a_teacher_that_never_moves_is_refused() -> None:
    still = Teacher(always(0, 4), "PPO", Path("still.zip"), "")  # type: ignore[arg-type]  # it only plays
    with pytest.raises(ValueError, match=r"still\.zip: plays Breakout no better than chance"):
        check_teacher(still, "Breakout", seed=0)


def test_a_card_without_a_point_is_refused_though_no_game_is_played(pong: Teacher) -> None:
    """The zoo's A2C scores 0.0 on Enduro, as random play does."""
    with pytest.raises(ValueError, match=r"plays Enduro no better than chance: 0\.00 .* in 40 games of its card"):
        check_teacher(with_card(pong, [0.0] * 40), "Enduro", seed=0)
    assert check_teacher(with_card(pong, [0.0] * 40), "Enduro", seed=0, allow_weak=True).is_weak


def test_a_card_with_too_few_games_is_not_enough(pong: Teacher) -> None:
    enough = with_card(pong, [0.0] * 30)
    assert check_from_card(enough, "Enduro")
    assert not check_from_card(with_card(pong, [0.0] * 29), "Enduro")
    assert not check_from_card(enough, "Carnival")  # not in the table of random scores
    assert not check_from_card(replace(pong, card=Card()), "Pong")


def test_a_game_that_never_ends_is_cut_off() -> None:
    check = compare_with_random(always(1, 2), Endless(), seed=0, max_steps=100, reported_return=10_000.0)
    assert (check.mean, check.num_unfinished) == (100.0, 8)
    assert check.random_mean == pytest.approx(50.0, abs=10.0)
    assert not check.is_weak
    assert check.warning is None
    assert compare_with_random(always(0, 2), Endless(), seed=0, max_steps=100).is_weak


def test_play_far_below_what_is_reported_is_warned_of() -> None:
    def check(hot: float, reported: float | None) -> TeacherCheck:
        return compare_with_random(lambda obs: hot * obs, IdentityEnv(400, 4), seed=0, reported_return=reported)

    assert check(9.0, 1.0).warning is None
    assert check(0.7, 0.5).warning is None
    assert check(0.7, None).warning is None
    far_below = check(0.7, 1.0)  # right in 40 % of the games, by chance in 25 %
    assert not far_below.is_weak
    assert far_below.warning
    assert re.match(r"plays far below its reported return.*: 0\.\d+ \[.*reported 1\.00$", far_below.warning)


def test_random_play_is_seldom_taken_for_a_teacher() -> None:
    def uniform(obs: Tensor) -> Tensor:
        return torch.zeros(len(obs), 4)

    passed = [not compare_with_random(uniform, IdentityEnv(8, 4, s), seed=s).is_weak for s in range(60)]
    assert sum(passed) <= 3


def test_the_check_repeats_and_too_few_games_are_refused() -> None:
    def check() -> TeacherCheck:
        return compare_with_random(always(1, 4), IdentityEnv(4, 4), seed=3)

    assert check() == check()
    with pytest.raises(ValueError, match="3 games are too few"):
        compare_with_random(always(1, 4), IdentityEnv(3, 4), seed=3)


def test_what_does_not_fit_is_refused_with_expected_and_found(pong: Teacher) -> None:
    atari, cart_pole = make_atari("Breakout", 1, 0), GymnasiumEnvs("CartPole-v1", 1, 0)
    with pytest.raises(ValueError, match=r"mine: 6 actions and observations \(4, 84, 84\), but Breakout has 4"):
        check_fits(pong, atari, "mine", "Breakout")
    with pytest.raises(ValueError, match=r"mine: 2 actions and observations \(4,\), but Breakout has 4"):
        check_fits(make_student((8,), 2, (4,)), atari, "mine", "Breakout")
    with pytest.raises(ValueError, match=r"mine returns a tensor float32 \(1, 3\), expected \(1, 2\)"):
        check_fits(always(1, 3), cart_pole, "mine", "CartPole")
    check_fits(make_student("1%", 4), atari, "mine", "Breakout")
    check_fits(always(1, 2), cart_pole, "mine", "CartPole")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (lambda obs: np.zeros((1, 2)), r"returns ndarray, expected a tensor \(1, 2\)"),
        (lambda obs: torch.zeros(2), r"returns a tensor float32 \(2,\)"),
        (lambda obs: torch.full((1, 2), float("nan")), "returns NaN or infinity"),
    ],
)
def test_a_callable_with_invalid_outputs_is_refused(policy: Policy, expected: str) -> None:
    with pytest.raises(ValueError, match=f"mine {expected}"):
        check_fits(policy, GymnasiumEnvs("CartPole-v1", 1, 0), "mine", "CartPole")


def test_a_plain_function_teaches_cart_pole() -> None:
    def lean(obs: Tensor) -> Tensor:
        """Pushes to where the pole falls: about 200 steps, 22 at random."""
        falls = 4.0 * (obs[:, 2] + obs[:, 3])
        return torch.stack([-falls, falls], dim=1)

    envs = GymnasiumEnvs("CartPole-v1", 8, seed=0)
    assert not compare_with_random(lean, envs, seed=0).is_weak
    student = make_student((32,), 2, (4,))
    config = DistillConfig(
        rounds=4, states_per_round=400, updates_per_round=100, batch_size=64, learning_rate=WarmupCosine(1e-2)
    )
    *_, last = distill(lean, student, envs, config)
    assert last.new_states["action_agreement"] > 0.9
    assert evaluate(student, envs, 8).mean_return > 100


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's exporter warns of itself
def test_the_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", (DOCS / "own_teachers.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "own_teachers.md", "exec"), {})
