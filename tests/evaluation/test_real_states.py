"""States of a policy's own games: real stacks, different ones for another seed."""

import pytest
import torch
from torch import Tensor

from policykd.agents.student import make_student
from policykd.evaluation.evaluate import RandomPolicy
from policykd.evaluation.real_states import on_policy_states


def test_a_seed_gives_the_same_states_and_another_gives_others() -> None:
    policy = make_student("1%", 6)
    states = on_policy_states(policy, "Pong", 81, seed=0)
    assert (states.dtype, tuple(states.shape)) == (torch.uint8, (81, 4, 84, 84))
    assert torch.equal(states, on_policy_states(policy, "Pong", 81, seed=0))
    assert not torch.equal(states, on_policy_states(policy, "Pong", 81, seed=1))
    assert (states[4:41, :-1] == states[:37, 1:]).all()  # four games in turn: stacks move by one frame
    assert not torch.equal(states[:40], states[41:])


def test_the_halves_are_sampled_and_greedy() -> None:
    """A policy whose two actions are equal: only the sampled half takes both."""
    scored: list[Tensor] = []

    def policy(obs: Tensor) -> Tensor:
        scored.append(obs)
        return torch.zeros(len(obs), 6)

    states = on_policy_states(policy, "Pong", 240, seed=0)
    paddle = states[:, -1, :, 70:76].float().std(dim=0).mean(dim=0)
    assert paddle.max() > 0
    assert len(scored) == 60
    greedy = states[120:, -1, 10:, 72:78].float()
    sampled = states[:120, -1, 10:, 72:78].float()
    assert sampled[20:].std(dim=0).sum() > greedy[20:].std(dim=0).sum()


def test_a_broken_policy_and_no_states_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="Pong: the policy's outputs are NaN or infinite"):
        on_policy_states(lambda obs: torch.full((len(obs), 6), float("nan")), "Pong", 4, seed=0)
    with pytest.raises(ValueError, match="num_states must be at least 1, not 0"):
        on_policy_states(RandomPolicy(6), "Pong", 0, seed=0)
