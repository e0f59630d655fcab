"""The methods of scripts/distill_rl.py by name: SB3 agents whose policy is a student and that learn from a teacher."""

from typing import Any, Literal

import torch
from stable_baselines3.common.utils import LinearSchedule

from policykd.agents.sb3_student import to_sb3
from policykd.agents.student import Student
from policykd.agents.teacher import Teacher
from policykd.legacy.schedules import Measured, Quantity, value
from policykd.rl.frame_buffer import FrameReplayBuffer
from policykd.rl.qdagger import QDagger
from policykd.rl.sb3_distillation import KickstartingPPO, ProximalPolicyDistillation, StudentDriven
from policykd.rl.student_driven import ExpectedEntropyRegularised, NDistill, OnPolicyDistillation
from policykd.rl.teacher_mixin import Taught

Method = Literal["ppd", "kickstarting", "qdagger", "on-policy", "n-distill", "expected-entropy"]

STUDENT_DRIVEN: dict[str, Any] = {
    "on-policy": OnPolicyDistillation,
    "n-distill": NDistill,
    "expected-entropy": ExpectedEntropyRegularised,
}
WEIGHTS: dict[str, str] = {"kickstarting": "linear:1:0", "qdagger": "gap:3"}
"""of the distillation, where it is not 1"""
OF_PPO: dict[str, Any] = {"n_steps": 64, "n_epochs": 4}
BATCH_OF_PPO = 256
OF_A2C: dict[str, Any] = {
    **{"n_steps": 8, "gamma": 0.97, "gae_lambda": 0.8, "use_rms_prop": False},
    "policy_kwargs": {"share_features_extractor": False},  # a critic of large costs would spoil the student's features
}
OF_DQN: dict[str, Any] = {
    **{"buffer_size": 100_000, "train_freq": 4, "batch_size": 32},
    **{"exploration_initial_eps": 0.05, "exploration_final_eps": 0.01, "target_update_interval": 1000},
    **{"replay_buffer_class": FrameReplayBuffer, "replay_buffer_kwargs": {"n_steps": 3, "gamma": 0.99}},
}
LONGEST_START, SHARE_OF_START = 2000, 1 / 20
"""steps, and share of a short run's, before QDagger learns from what it plays: it is weaned after 0.6 of them"""
PLAYED_AT, COMPARED_AT = 0.01, 0.1
"""temperatures of Q-values: a student that gives them plays softmax(Q / 0.01) (Rusu et al., 2015), and QDagger compares
them at 0.1"""


def units(method: Method) -> float:
    """Returns the temperature of a student made for a method: QDagger's network gives Q-values, the others' logits."""
    return PLAYED_AT if method == "qdagger" else 1.0


def check_weight(weight: Quantity, teacher_return: float | None, random_return: float = 0.0) -> None:
    """Tries a weight at the ends of a run, and of the way from random play to the teacher's.

    Raises:
        ValueError: it is negative or no number somewhere, or follows the return of a teacher that does not beat chance.
    """
    for progress in (0.0, 0.5, 1.0):
        for student_return in (None, random_return, teacher_return):
            found = value(weight, progress, Measured(student_return, teacher_return, random_return))
            if not 0.0 <= found < float("inf"):
                raise ValueError(f"--weight must not be negative or infinite, it comes to {found:g}; give another")


def make_model(
    method: Method,
    student: Student,
    teacher: Teacher,
    envs: Any,
    *,
    steps: int,
    weight: Quantity,
    teacher_return: float | None,
    random_return: float,
    temperature: float = 0.0,
    reward_weight: float = 0.0,
    entropy_weight: float = 1.0,
    learning_rate: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "auto",
) -> Taught:
    """Returns the agent whose policy is the student, with its teacher.

    Args:
        method: its name.
        student: stays as it is; made with the temperature `units(method)`.
        teacher: what it learns from.
        envs: SB3's.
        steps: of the whole run, the student's own.
        weight: of the distillation.
        teacher_return: for a weight that follows returns; None if it is not known.
        random_return: likewise.
        temperature: divides the teacher's scores; 0 is the teacher's own, but QDagger's 0.1 where these are Q-values.
        reward_weight: of the student-driven methods.
        entropy_weight: of n-distill and expected-entropy.
        learning_rate: at the start, falling to 0 over the run; 0 is the method's.
        seed: of actions and minibatches.
        device: where it learns.
    """
    settings: dict[str, Any] = {
        "teacher": teacher,
        "teacher_temperature": temperature or teacher.temperature,
        "distillation_weight": weight,
        "teacher_return": teacher_return,
        "random_return": random_return,
        "learning_rate": LinearSchedule(learning_rate or (1e-4 if method == "qdagger" else 1e-3), 0.0, 1.0),
        "seed": seed,
        "device": device,
    }
    algorithm: type[Taught]
    if method in STUDENT_DRIVEN:
        entropy = {} if method == "on-policy" else {"entropy_weight": entropy_weight}
        settings["method"] = STUDENT_DRIVEN[method](reward_weight=reward_weight, **entropy)
        algorithm, settings = StudentDriven, settings | OF_A2C
    elif method == "qdagger":
        settings["student_temperature"] = COMPARED_AT
        if teacher.temperature != 1.0:  # Q-values on both sides
            settings["teacher_temperature"] = settings["student_temperature"] = temperature or COMPARED_AT
        # One gradient step for every train_freq steps, as with a single environment.
        settings |= {
            "gradient_steps": envs.num_envs,
            "learning_starts": min(LONGEST_START, int(steps * SHARE_OF_START)),
        }
        algorithm, settings = QDagger, settings | OF_DQN
    else:
        algorithm = ProximalPolicyDistillation if method == "ppd" else KickstartingPPO
        settings |= OF_PPO | {"batch_size": min(BATCH_OF_PPO, OF_PPO["n_steps"] * envs.num_envs)}
    model = to_sb3(student, envs, algorithm, **settings)
    assert isinstance(model, Taught)
    return model
