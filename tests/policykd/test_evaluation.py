import numpy as np
import pytest
import torch
from torch import Tensor

from policykd.agents.teacher import load_teacher
from policykd.envs.identity import IdentityEnv
from policykd.envs.vector import Episode, Step
from policykd.evaluation import PROTOCOLS, RandomPolicy, evaluate, evaluate_on_atari


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
    games = evaluate_on_atari(RandomPolicy(6), "Pong", protocol, 8, seed=0)  # type: ignore[arg-type]
    assert np.mean(games.returns) == pytest.approx(-20.7, abs=0.6)
    again = evaluate_on_atari(RandomPolicy(6), "Pong", protocol, 8, seed=0)  # type: ignore[arg-type]
    assert again == games


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
