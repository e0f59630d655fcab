"""Plays an SB3 teacher in SB3's own environments and keeps what it saw and did: what plain cloning learns from."""

from dataclasses import dataclass
from pathlib import Path

import ale_py
import gymnasium
import numpy as np
import torch
import tyro
from snapshots import Snapshots
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage

gymnasium.register_envs(ale_py)


@dataclass(frozen=True)
class Args:
    """How many states of how many games at once."""

    out: Path
    teacher: Path
    """an archive of SB3's PPO"""
    num_states: int = 80_000
    num_envs: int = 16
    seed: int = 0


def main(args: Args) -> None:
    """Plays with sampled actions and writes observations.npy, actions.npy and the cost up to each thousandth state."""
    torch.set_num_threads(1)
    clock = Snapshots(args.out)
    env = make_atari_env("PongNoFrameskip-v4", n_envs=args.num_envs, seed=args.seed)
    env = VecTransposeImage(VecFrameStack(env, 4))
    teacher = PPO.load(args.teacher, device="cpu")
    observations = np.zeros((args.num_states, 4, 84, 84), np.uint8)
    actions, costs = np.zeros(args.num_states, np.int64), []
    obs = env.reset()
    for i in range(0, args.num_states, args.num_envs):
        observations[i : i + args.num_envs] = obs
        actions[i : i + args.num_envs], _ = teacher.predict(obs, deterministic=False)
        obs, *_ = env.step(actions[i : i + args.num_envs])
        if (i + args.num_envs) % 1000 < args.num_envs:
            costs.append((i + args.num_envs, clock.cpu_seconds(), clock.wall_seconds()))
            print(*costs[-1], flush=True)
    np.save(args.out / "observations.npy", observations)
    np.save(args.out / "actions.npy", actions)
    np.save(args.out / "costs.npy", np.array(costs))


if __name__ == "__main__":
    main(tyro.cli(Args))
