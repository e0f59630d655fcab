"""Policy distillation in one file: a teacher plays Pong, a student with 1 % of its parameters learns to play like it.

This is `policykd.distill` without what makes it fast and safe (threads, overlapped collection, frames stored once,
checkpoints); a test holds the two to the same weights, bit for bit. Read it, then change it. Shape suffixes: B batch,
A actions, N stored states.

    python examples/distill_pong.py --rounds 10 --states-per-round 4000
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import policykd
from policykd.agents.student import Size, Student
from policykd.agents.teacher import Teacher
from policykd.envs.vector import VectorEnv


@dataclass(frozen=True)
class Args:
    """Settings of the example."""

    game: str = "Pong"
    """Atari game with a bundled or public teacher"""
    student: Size = "1%"
    """size of the student: percent of the teacher's parameters"""
    rounds: int = 10
    """rounds of collecting states and training on all collected so far"""
    states_per_round: int = 2000
    """agent steps per round over all environments; a state takes 28 kB here"""
    updates_per_round: int = 300
    """gradient steps per round"""
    batch_size: int = 256
    """states per gradient step"""
    learning_rate: float = 2e-3
    """peak learning rate of Adam"""
    num_envs: int = 8
    """games played in parallel"""
    eval_episodes: int = 8
    """full episodes at the end; 0 for none"""
    seed: int = 0
    """random seed"""


def log_policy(logits_BA: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns log softmax(logits / temperature); the maximum is subtracted first, or Q-values / 0.01 could overflow."""
    advantage_BA = logits_BA - logits_BA.amax(dim=-1, keepdim=True).detach()
    return F.log_softmax(advantage_BA / temperature, dim=-1)


def kl_loss(student_BA: Tensor, teacher_BA: Tensor, temperature: float) -> Tensor:
    """Returns the mean of KL(teacher || student), nats (Rusu et al., 2015): the formula of policy distillation."""
    log_p_BA = log_policy(teacher_BA, temperature)
    log_q_BA = log_policy(student_BA)
    return F.kl_div(log_q_BA, log_p_BA, log_target=True, reduction="none").sum(dim=-1).sum() / len(student_BA)


def sample(logits_BA: Tensor, generator: torch.Generator) -> Tensor:
    """Returns one action per row, drawn from softmax(logits)."""
    return logits_BA.softmax(dim=-1).multinomial(1, generator=generator).squeeze(1)


def learning_rate_at(progress: float, peak: float) -> float:
    """Returns 2 % linear warm-up, then the peak, then linear decay to 0 over the last 30 %."""
    if progress < 0.02:
        return peak * progress / 0.02
    return peak * min(1.0, (1.0 - progress) / 0.3)


def distill(teacher: Teacher, student: Student, envs: VectorEnv, args: Args) -> None:
    """Trains the student in place."""
    # One generator per purpose: how many batches are drawn does not change which actions are.
    action_seed, batch_seed = np.random.SeedSequence(args.seed).generate_state(2).tolist()
    action_generator = torch.Generator().manual_seed(action_seed)
    batch_generator = torch.Generator().manual_seed(batch_seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.0, fused=True)

    # Replay buffer: observations and the teacher's raw outputs, which are logits (PPO) or Q-values (DQN).
    capacity = args.rounds * args.states_per_round
    obs_N = torch.zeros((capacity, *envs.obs_shape), dtype=torch.uint8)
    teacher_NA = torch.zeros((capacity, envs.num_actions))
    num_stored = 0
    obs = envs.reset()

    @torch.inference_mode()
    def collect(student_fraction: float) -> None:
        """Collects and labels one round's states: each step is the teacher's or the student's (DAgger)."""
        nonlocal num_stored, obs
        student.eval()
        for _ in range(args.states_per_round // args.num_envs):
            # The same forward pass of the teacher labels the state and acts.
            teacher_BA = teacher(obs)
            obs_N[num_stored : num_stored + args.num_envs] = obs
            teacher_NA[num_stored : num_stored + args.num_envs] = teacher_BA
            num_stored += args.num_envs
            student_acts_B = torch.rand(args.num_envs, generator=action_generator) < student_fraction
            actions_B = sample(teacher_BA / teacher.temperature, action_generator)
            if student_acts_B.any():
                actions_B = torch.where(student_acts_B, sample(student(obs), action_generator), actions_B)
            obs = envs.step(actions_B).obs

    # The first round's states are the teacher's; the student's input scaling is fitted to their newest frames.
    collect(student_fraction=0.0)
    student.fit_input_normalization(obs_N[:num_stored, -1][:: max(1, num_stored // 256)])
    for k in range(args.rounds):
        # 1. Collect the next round's states before training, with a student whose share rises to 1 after 30 % of the
        #    run. In `policykd` this happens in the background, with a copy of the student, at the same time as step 2.
        num_trained_on = num_stored
        if k + 1 < args.rounds:
            collect(student_fraction=min(1.0, min(1.0, k / max(1, args.rounds - 2)) / 0.3))

        # 2. Train on all states but those just collected.
        student.train()
        losses = []
        rows_UB = torch.randint(num_trained_on, (args.updates_per_round, args.batch_size), generator=batch_generator)
        for u, rows_B in enumerate(rows_UB):
            progress = (k + (u + 1) / args.updates_per_round) / args.rounds
            # A float32 tensor, as a captured CUDA graph would need; a float would differ in the last bit.
            optimizer.param_groups[0]["lr"] = torch.tensor(learning_rate_at(progress, args.learning_rate))
            loss = kl_loss(student(obs_N[rows_B]).float(), teacher_NA[rows_B], teacher.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"round {k}: {num_trained_on:,} states, KL {np.mean(losses):.4f} nats", flush=True)


def main(args: Args) -> Student:
    """Loads the teacher, distils it, and compares both over full episodes."""
    torch.set_num_threads(1)
    teacher = policykd.load_teacher(game=args.game)
    envs = policykd.make_env(args.game, args.num_envs, args.seed)
    student = policykd.make_student(args.student, envs.num_actions, seed=args.seed)
    distill(teacher, student, envs, args)
    if args.eval_episodes:
        student.eval()
        for name, policy in (("teacher", teacher), ("student", student)):
            games = policykd.make_env(args.game, args.eval_episodes, args.seed + 1)
            returns = policykd.evaluate(policy, games, args.eval_episodes, deterministic=False).returns
            print(f"{name}: mean return {np.mean(returns):.1f} over {len(returns)} episodes")
    return student


if __name__ == "__main__":
    main(tyro.cli(Args))
