"""The offline phase of CleanRL's QDagger (Agarwal et al., 2022) on an SB3 DQN: TD error and KL on the teacher's replay.

CleanRL's script is one main block with an IMPALA student, which cannot be called. Its replay buffer, teacher network,
KL and default arguments are imported, and the phase is written again around the 7 % network.
"""

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ale_py
import gymnasium
import numpy as np
import torch
import tyro
from cleanrl.dqn_atari import QNetwork as TeacherNetwork  # type: ignore[import-not-found]
from cleanrl.qdagger_dqn_atari_impalacnn import Args as Defaults  # type: ignore[import-not-found]
from cleanrl.qdagger_dqn_atari_impalacnn import (  # pyright: ignore[reportMissingImports]
    kl_divergence_with_logits,
    linear_schedule,
)
from cleanrl_utils.buffers import ReplayBuffer  # type: ignore[import-not-found]
from small_cnn import SmallCNN
from snapshots import SnapshotWriter
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage
from torch import Tensor, nn
from torch.nn import functional as F

gymnasium.register_envs(ale_py)


@dataclass(frozen=True)
class Args:
    """Settings that differ from CleanRL's `Defaults`."""

    out: Path
    """folder for the snapshots"""
    teacher: Path
    """archive of SB3's DQN"""
    teacher_steps: int = 20_000
    """CleanRL takes 500,000: 14 GB of frames, and 25 times the wait before the first update"""
    temperature: float = Defaults.temperature
    seconds: float = 1500.0
    """CPU seconds of training"""
    seed: int = 0


class StudentNetwork(nn.Module):
    """The 7 % network on frames from 0 to 255."""

    def __init__(self, observation_space: gymnasium.spaces.Box, num_actions: int) -> None:
        super().__init__()
        self.features = SmallCNN(observation_space)
        self.head = nn.Linear(128, num_actions)

    def forward(self, obs_BCHW: Tensor) -> Tensor:
        """Returns Q-values, float32 `(batch, num_actions)`."""
        q_values_BA: Tensor = self.head(self.features(obs_BCHW / 255.0))
        return q_values_BA


def main(args: Args) -> None:
    """Fills the teacher's replay buffer, then trains the student on it until the time is up."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    snapshots = SnapshotWriter(args.out)
    settings = Defaults()
    frames = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=settings.num_envs, seed=args.seed), 4)
    envs = VecTransposeImage(frames)
    envs.action_space.seed(args.seed)
    teacher = load_teacher_network(args.teacher, envs)
    buffer = collect(teacher, envs, args.teacher_steps)
    print(f"{args.teacher_steps:,} states of the teacher after {snapshots.cpu_seconds():.0f} s CPU", flush=True)
    train(teacher, buffer, envs, snapshots, args)


def collect(teacher: nn.Module, envs: VecTransposeImage, num_steps: int) -> Any:
    """Returns a replay buffer of the teacher's games, with CleanRL's decaying epsilon."""
    settings = Defaults()
    buffer = ReplayBuffer(
        num_steps, envs.observation_space, envs.action_space, "cpu",
        optimize_memory_usage=True, handle_timeout_termination=False,
    )  # fmt: skip
    obs = np.asarray(envs.reset())
    for step in range(num_steps):
        epsilon = linear_schedule(settings.start_e, settings.end_e, num_steps, step)
        if random.random() < epsilon:
            actions = np.array([envs.action_space.sample()])
        else:
            with torch.no_grad():
                actions = teacher(torch.as_tensor(obs).float()).argmax(dim=1).numpy()
        stepped, rewards, dones, infos = envs.step(actions)
        next_obs = np.asarray(stepped)
        last_obs = infos[0]["terminal_observation"][None] if dones[0] else next_obs
        buffer.add(obs, last_obs, actions, rewards, dones, infos)
        obs = next_obs
    return buffer


def train(teacher: nn.Module, buffer: Any, envs: VecTransposeImage, snapshots: SnapshotWriter, args: Args) -> None:
    """Minimizes TD error plus KL on the teacher's replay buffer (Agarwal et al., 2022), writing snapshots."""
    settings = Defaults()
    assert isinstance(envs.observation_space, gymnasium.spaces.Box)
    assert isinstance(envs.action_space, gymnasium.spaces.Discrete)
    student = StudentNetwork(envs.observation_space, int(envs.action_space.n))
    target = copy.deepcopy(student)
    optimizer = torch.optim.Adam(student.parameters(), lr=settings.learning_rate)
    updates = 0
    while snapshots.cpu_seconds() < args.seconds and updates < settings.offline_steps:
        data = buffer.sample(settings.batch_size)
        student_BA = student(data.observations.float())
        with torch.no_grad():
            target_B = target(data.next_observations.float()).amax(dim=1)
            returns_B = data.rewards.flatten() + settings.gamma * target_B * (1 - data.dones.flatten())
            teacher_BA = teacher(data.observations.float()) / args.temperature
        td_loss = F.mse_loss(student_BA.gather(1, data.actions).squeeze(1), returns_B)
        kl = kl_divergence_with_logits(teacher_BA, student_BA / args.temperature)
        optimizer.zero_grad()
        (td_loss + kl).backward()
        optimizer.step()
        if updates % settings.target_network_frequency == 0:
            target.load_state_dict(student.state_dict())
        updates += 1
        if snapshots.is_due():
            snapshots.save(list(student.parameters()), steps=args.teacher_steps, updates=updates)
            print(f"  td {td_loss.item():.4f} kl {kl.item():.4f}", flush=True)
    snapshots.save(list(student.parameters()), steps=args.teacher_steps, updates=updates)


def load_teacher_network(path: Path, envs: VecTransposeImage) -> nn.Module:
    """Returns CleanRL's teacher network with the weights of an SB3 DQN."""
    envs.single_action_space = envs.action_space  # type: ignore[attr-defined]  # CleanRL's name
    teacher: nn.Module = TeacherNetwork(envs)
    weights = DQN.load(path, device="cpu", buffer_size=1).q_net.state_dict()
    teacher.load_state_dict(dict(zip(teacher.state_dict(), weights.values(), strict=True)))
    return teacher.requires_grad_(False)


if __name__ == "__main__":
    main(tyro.cli(Args))
