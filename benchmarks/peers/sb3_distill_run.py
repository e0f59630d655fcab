"""sb3_distill's student-driven distillation and PPD (Spigler, 2025), with the settings of its own example.

Its example runs 16 environments in 16 processes and distils into a larger IMPALA network. Here they share one process,
because there is one core, and the student is the 7 % network.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium
import torch
import tyro
from sb3_distill import ProximalPolicyDistillation, StudentDistill  # type: ignore[import-not-found]
from small_cnn import SmallCNN
from snapshots import SnapshotWriter
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

gymnasium.register_envs(ale_py)


@dataclass(frozen=True)
class Args:
    """Settings that differ between runs; the others are those of the example, in `main`."""

    out: Path
    """folder for the snapshots"""
    teacher: Path
    """archive of SB3's PPO"""
    method: Literal["student", "ppd"]
    seconds: float = 1500.0
    """CPU seconds of training"""
    learning_rate: float = 3e-4
    distill_lambda: float = 2.0
    num_envs: int = 16
    seed: int = 0


class Saver(BaseCallback):
    """Writes snapshots between rollouts and ends the run when its time is up."""

    def __init__(self, snapshots: SnapshotWriter, seconds: float) -> None:
        super().__init__()
        self.snapshots = snapshots
        self.seconds = seconds

    def _save(self) -> None:
        policy = self.model.policy
        assert isinstance(policy, ActorCriticCnnPolicy)
        tensors = [*policy.features_extractor.parameters(), *policy.action_net.parameters()]
        self.snapshots.save(tensors, steps=self.num_timesteps, updates=self.model._n_updates)

    def _on_rollout_start(self) -> None:
        if self.snapshots.is_due():
            self._save()

    def _on_step(self) -> bool:
        return self.snapshots.cpu_seconds() < self.seconds

    def _on_training_end(self) -> None:
        self._save()


def main(args: Args) -> None:
    """Distils until the time is up."""
    torch.set_num_threads(1)
    snapshots = SnapshotWriter(args.out)
    wrappers = {"clip_reward": False, "terminal_on_life_loss": True}
    env = make_atari_env("PongNoFrameskip-v4", n_envs=args.num_envs, seed=args.seed, wrapper_kwargs=wrappers)
    env = VecFrameStack(VecNormalize(env, norm_obs=False), 4)
    teacher = PPO.load(args.teacher, env=env, device="cpu")
    teacher.policy.requires_grad_(False)  # or each update would compute the teacher's gradients too, unused
    kwargs = {
        "policy_kwargs": {"features_extractor_class": SmallCNN, "net_arch": [], "optimizer_kwargs": {"eps": 1e-5}},
        "learning_rate": args.learning_rate,
        "ent_coef": 0.01,
        "seed": args.seed,
        "device": "cpu",
    }
    if args.method == "ppd":
        model = ProximalPolicyDistillation(
            "CnnPolicy", env, n_steps=256, batch_size=512, n_epochs=4, gamma=0.995, **kwargs
        )
        model.set_teacher(teacher, distill_lambda=args.distill_lambda)
    else:
        model = StudentDistill("CnnPolicy", env, n_steps=5, gamma=0.999, **kwargs)
        model.set_teacher(teacher)
    print(args, model.policy)
    model.learn(2_000_000, callback=Saver(snapshots, args.seconds))


if __name__ == "__main__":
    main(tyro.cli(Args))
