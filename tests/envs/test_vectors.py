"""What every vector of environments promises, on the small ones."""

from collections.abc import Callable

import pytest
import torch

from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.vector import VectorEnv
from tests.identity_env import IdentityEnv

MAKERS: dict[str, Callable[[], VectorEnv]] = {
    "identity": lambda: IdentityEnv(3, 4, seed=1),
    "CartPole": lambda: GymnasiumEnvs("CartPole-v1", 3, seed=1),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_position_is_restored(make: Callable[[], VectorEnv]) -> None:
    envs, again = make(), make()
    generator = torch.Generator().manual_seed(0)
    obs, episodes = envs.reset(), 0
    for _ in range(75):
        step = envs.step(torch.randint(2, (3,), generator=generator))
        obs, episodes = step.obs, episodes + len(step.episodes)
    assert episodes > 0
    assert (again.restore(envs.state()) == obs).all()
    for _ in range(50):
        actions_B = torch.randint(2, (3,), generator=generator)
        a, b = envs.step(actions_B), again.step(actions_B)
        assert (a.obs == b.obs).all()
        assert (a.starts_B == b.starts_B).all()
        assert a.episodes == b.episodes


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_negative_action_holds_the_environment(make: Callable[[], VectorEnv]) -> None:
    envs = make()
    obs = envs.reset()
    for _ in range(40):
        step = envs.step(torch.tensor([1, -1, 0]))
        assert (step.obs[1] == obs[1]).all()
        assert not step.starts_B[1]
        assert step.rewards_B[1] == 0
        assert all(e.env != 1 for e in step.episodes)


def test_identity_rewards_the_hot_action() -> None:
    envs = IdentityEnv(64, 4)
    hot_B = envs.reset().argmax(dim=1)
    step = envs.step(torch.where(torch.arange(64) < 32, hot_B, (hot_B + 1) % 4))
    assert step.rewards_B.tolist() == [1.0] * 32 + [0.0] * 32
    assert [e.episodic_return for e in step.episodes] == step.rewards_B.tolist()
    assert step.starts_B.all()


def test_cartpole_counts_whole_episodes() -> None:
    envs = GymnasiumEnvs("CartPole-v1", 2, seed=0)
    envs.reset()
    lengths = [e.length for _ in range(60) for e in envs.step(torch.ones(2, dtype=torch.long)).episodes]
    assert lengths
    assert all(8 <= n <= 11 for n in lengths)  # always pushing right falls over within ten steps or so


def test_an_unfit_or_unknown_environment_is_refused() -> None:
    with pytest.raises(ValueError, match="discrete"):
        GymnasiumEnvs("Pendulum-v1", 1, 0)
    with pytest.raises(ValueError, match="cannot make 'CartPool-v1'"):
        GymnasiumEnvs("CartPool-v1", 1, 0)
