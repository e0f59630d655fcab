"""Records states and actions of an SB3 teacher in SB3's own environments, the data of behavioural cloning."""

from dataclasses import dataclass
from pathlib import Path

import ale_py
import gymnasium
import numpy as np
import torch
import tyro
from snapshots import SnapshotWriter
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage

gymnasium.register_envs(ale_py)


@dataclass(frozen=True)
class Args:
    """Records states and actions of an SB3 teacher."""

    out: Path
    """folder for the recording"""
    teacher: Path
    """archive of SB3's PPO"""
    num_states: int = 80_000
    """states to record, a multiple of the games"""
    num_envs: int = 16
    """parallel games"""
    seed: int = 0


def main(args: Args) -> None:
    """Plays with sampled actions and writes observations.npy, actions.npy and the cost up to every 1,000th state."""
    torch.set_num_threads(1)
    clock = SnapshotWriter(args.out)
    frames = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=args.num_envs, seed=args.seed), 4)
    env = VecTransposeImage(frames)
    teacher = PPO.load(args.teacher, device="cpu")
    observations = np.zeros((args.num_states, 4, 84, 84), np.uint8)
    actions = np.zeros(args.num_states, np.int64)
    costs: list[tuple[float, float, float]] = []
    obs = np.asarray(env.reset())
    for i in range(0, args.num_states, args.num_envs):
        chosen, _ = teacher.predict(obs, deterministic=False)
        observations[i : i + args.num_envs] = obs
        actions[i : i + args.num_envs] = chosen
        obs = np.asarray(env.step(chosen)[0])
        num_recorded = i + args.num_envs
        if num_recorded % 1000 < args.num_envs:
            costs.append((num_recorded, clock.cpu_seconds(), clock.wall_seconds()))
            print(*costs[-1], flush=True)
    np.save(args.out / "observations.npy", observations)
    np.save(args.out / "actions.npy", actions)
    np.save(args.out / "costs.npy", np.array(costs))


if __name__ == "__main__":
    main(tyro.cli(Args))
