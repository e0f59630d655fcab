"""policykd: the loop of the README, a snapshot each round."""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from snapshots import Snapshots

import policykd
from policykd import load_teacher, make_student
from policykd.envs.atari import make_atari
from policykd.legacy.loop import distill
from policykd.legacy.losses import ForwardKL
from policykd.legacy.schedules import Linear, WarmupCosine
from policykd.legacy.states import MixedStates
from policykd.legacy.train_state import make_learner


@dataclass(frozen=True)
class Args:
    """The command's defaults."""

    out: Path
    teacher: str = "bundled:ppo"
    rounds: int = 10
    states_per_round: int = 8000
    updates_per_round: int = 700
    batch_size: int = 256
    learning_rate: float = 2e-3
    handover: float = 0.3
    num_envs: int = 16
    seed: int = 0


def main(args: Args) -> None:
    """Distils and saves each round."""
    torch.set_num_threads(1)
    snapshots = Snapshots(args.out)
    print(policykd.__file__, args)
    teacher, envs = load_teacher(args.teacher, game="Pong"), make_atari("Pong", args.num_envs, args.seed)
    student = make_student("7%", envs.num_actions, seed=args.seed)
    learner = make_learner(student, envs, capacity=args.rounds * args.states_per_round, seed=args.seed)
    rounds = distill(
        teacher,
        learner,
        loss=ForwardKL(teacher.temperature),
        states=MixedStates(student=Linear(0.0, 1.0, args.handover)),
        learning_rate=WarmupCosine(args.learning_rate),
        rounds=args.rounds,
        states_per_round=args.states_per_round,
        updates_per_round=args.updates_per_round,
        batch_size=args.batch_size,
        temperature=teacher.temperature,
    )
    for r in rounds:
        centre, scale = (buffer.item() for buffer in student.buffers())
        snapshots.save(list(student.parameters()), steps=r.num_states, updates=r.num_updates, scaling=(centre, scale))
        print(f"  round {r.index}: kl {r.kl:.4f} new_kl {r.new_kl:.4f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
