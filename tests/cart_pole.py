"""CartPole for tests of Stable-Baselines3 agents: a perfect teacher, and how well an agent plays."""

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor


def controller(obs_BO: Tensor) -> Tensor:
    """Pushes the cart to where the pole leans or falls: 500 of 500 in CartPole."""
    lean_B = 10 * obs_BO[:, 2] + 3 * obs_BO[:, 3]
    return torch.stack([-lean_B, lean_B], dim=1)


def cart_poles(num_envs: int, seed: int = 0) -> VecEnv:
    return make_vec_env("CartPole-v1", num_envs, seed=seed)


def mean_return(model: BaseAlgorithm) -> float:
    """Returns the mean of 10 episodes with sampled actions: about 20 untrained, the teacher's is 450."""
    mean, _ = evaluate_policy(model, cart_poles(4, seed=99), 10, deterministic=False)
    assert isinstance(mean, float)
    return mean
