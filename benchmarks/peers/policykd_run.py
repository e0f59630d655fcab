"""policykd's loop with the defaults of its command, a snapshot per round."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro
from snapshots import SnapshotWriter

from policykd.agents.networks import FrameNet
from policykd.agents.student import make_student
from policykd.agents.teacher import load_teacher
from policykd.envs.atari import make_atari
from policykd.loop import DistillConfig, distill
from policykd.schedules import Linear
from policykd.states import MixedStates


@dataclass(frozen=True)
class Args:
    """Defaults of the command, or a shorter schedule."""

    out: Path
    """folder for the snapshots"""
    teacher: str = "bundled:ppo"
    """reference of the teacher"""
    handover: float = 0.3
    """fraction of the run after which the student alone acts"""
    num_envs: int = 16
    """parallel games"""
    config: tyro.conf.OmitArgPrefixes[DistillConfig] = field(default_factory=DistillConfig)
    """settings of the loop"""


def main(args: Args) -> None:
    """Distils and writes a snapshot per round."""
    torch.set_num_threads(1)
    writer = SnapshotWriter(args.out)
    teacher = load_teacher(args.teacher, game="Pong")
    envs = make_atari("Pong", args.num_envs, args.config.seed)
    student = make_student("7%", envs.num_actions, seed=args.config.seed)
    assert isinstance(student.net, FrameNet)
    states = MixedStates(student=Linear(0.0, 1.0, args.handover))
    for r in distill(teacher, student, envs, replace(args.config, states=states)):
        scaling = (student.net.centre.item(), student.net.scale.item())
        writer.save(list(student.parameters()), steps=r.num_states, updates=r.num_updates, scaling=scaling)
        print(f"  round {r.index}: kl {r.train['kl']:.4f}, on new states {r.new_states['kl']:.4f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
