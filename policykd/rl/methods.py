"""The methods of `policykd distill-rl`: SB3 agents whose policy is a student and that learn from a teacher."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field as Bounds
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from policykd.agents.sb3_student import to_sb3
from policykd.agents.student import Student
from policykd.agents.teacher import Teacher
from policykd.rl.frame_buffer import FrameReplayBuffer
from policykd.rl.qdagger import QDagger
from policykd.rl.sb3_distillation import (
    ExpectedEntropyRegularised,
    KickstartingPPO,
    NDistill,
    OnPolicyDistillation,
    ProximalPolicyDistillation,
    StudentDriven,
    StudentDrivenMethod,
)
from policykd.rl.teacher_mixin import TeacherMixin
from policykd.rl.training import TrainingArgs
from policykd.runs.config import SeedArgs
from policykd.schedules import Linear, Progress, Quantity, ReturnGap, check_bounds, resolve

MethodName = Literal["ppd", "kickstarting", "qdagger", "on-policy", "n-distill", "expected-entropy"]


@dataclass(frozen=True)
class Method:
    """An algorithm, its defaults on Atari, and the flags that only some methods have."""

    algorithm: type[TeacherMixin]
    settings: Mapping[str, object]
    """SB3's keyword arguments"""
    weight: Quantity = 1.0
    """weight of the distillation"""
    learning_rate: float = 1e-3
    """initial learning rate"""
    student_temperature: float = 1.0
    """divisor of the student's outputs: those of QDagger's student are Q-values, which are played at 0.01"""
    loss: type[StudentDrivenMethod] | None = None
    flags: Mapping[str, float] = field(default_factory=dict)
    """name -> default"""


_PPO = {"n_steps": 64, "n_epochs": 4, "batch_size": 256}
_A2C = {
    "n_steps": 8,
    # At SB3's gamma 0.99 the KL divergence of N-distill on Pong diverged (docs/rl.md).
    "gamma": 0.97,
    "gae_lambda": 0.8,
    "use_rms_prop": False,
    # The costs are large: a critic on the student's own features would spoil them.
    "policy_kwargs": {"share_features_extractor": False},
}
_DQN = {
    # One update per four steps as in DQN (Mnih et al., 2015), three-step returns as in Rainbow (Hessel et al., 2018).
    "buffer_size": 100_000,
    "train_freq": 4,
    "batch_size": 32,
    "exploration_initial_eps": 0.05,
    "exploration_final_eps": 0.01,
    "target_update_interval": 1000,
    "replay_buffer_class": FrameReplayBuffer,
    "replay_buffer_kwargs": {"n_steps": 3, "gamma": 0.99},
}
_REWARD = {"reward_weight": 0.0}
_ENTROPY = {"entropy_weight": 1.0}
METHODS: dict[MethodName, Method] = {
    "ppd": Method(ProximalPolicyDistillation, _PPO),
    "kickstarting": Method(KickstartingPPO, _PPO, weight=Linear(1.0, 0.0)),
    "qdagger": Method(
        QDagger,
        _DQN,
        weight=ReturnGap(3.0),
        learning_rate=1e-4,
        student_temperature=0.01,
        flags={"offline_steps": 50_000, "offline_updates": 12_500},
    ),
    "on-policy": Method(StudentDriven, _A2C, loss=OnPolicyDistillation, flags=_REWARD),
    "n-distill": Method(StudentDriven, _A2C, loss=NDistill, flags=_REWARD | _ENTROPY),
    "expected-entropy": Method(StudentDriven, _A2C, loss=ExpectedEntropyRegularised, flags=_REWARD | _ENTROPY),
}
MAX_LEARNING_STARTS = 2000
"""agent steps before QDagger's first update in `learn`; a twentieth of the run if that is shorter"""


@dataclass(frozen=True, kw_only=True)
class MethodArgs(TrainingArgs, SeedArgs):
    """The method and what it learns by."""

    method: MethodName = "ppd"
    """proximal policy distillation, kickstarting PPO, QDagger on DQN, or Czarnecki et al.'s three methods on A2C"""
    weight: Quantity | None = None
    """weight of the distillation, a number or a schedule such as linear:1:0 or gap:3; None is 1, for kickstarting
    linear:1:0, for qdagger gap:3"""
    reward_weight: Annotated[float | None, Bounds(ge=0)] = None
    """factor of the game's rewards, for on-policy, n-distill and expected-entropy (default 0); the others use the
    rewards as they are"""
    entropy_weight: Annotated[float | None, Bounds(ge=0, le=1)] = None
    """entropy that n-distill and expected-entropy subtract: 1 (default) minimises KL divergences, 0 the cross-entropies
    of the paper"""
    temperature: Annotated[float, Bounds(ge=0)] = 0.0
    """temperature of the teacher's outputs; 0 is the teacher's own (1 for PPO and A2C, 0.01 for DQN), but 0.1 for
    qdagger with a DQN teacher, which also divides the student's Q-values"""
    offline_steps: Annotated[int | None, Bounds(ge=0)] = None
    """agent steps of the teacher that qdagger trains on first (default 50,000)"""
    offline_updates: Annotated[int | None, Bounds(ge=0)] = None
    """gradient steps on them (default 12,500)"""
    learning_rate: Annotated[float, Bounds(ge=0)] = 0.0
    """initial learning rate of Adam, which falls linearly to 0; 0 is 1e-3, for qdagger 1e-4"""


Args = TypeVar("Args", bound=MethodArgs)


def with_method_defaults(args: Args) -> Args:
    """Returns arguments with the method's own defaults in place of None.

    Raises:
        ValueError: a flag of another method.
    """
    method = METHODS[args.method]
    for name in ("reward_weight", "entropy_weight", "offline_steps", "offline_updates"):
        if getattr(args, name) is not None and name not in method.flags:
            others = ", ".join(other for other, spec in METHODS.items() if name in spec.flags)
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is not for --method {args.method} but for {others}; leave it out")
    # None in the arguments means the default of the method, so that flags of other methods are noticed.
    missing: Any = {name: default for name, default in method.flags.items() if getattr(args, name) is None}
    return replace(args, weight=method.weight if args.weight is None else args.weight, **missing)


def check_weight(weight: Quantity, random_return: float, teacher_return: float | None) -> None:
    """Checks a distillation weight all over a run, before the run starts.

    Raises:
        ValueError: it is negative or not finite somewhere, or it follows the return of a teacher that is not known to
            be better than a random policy.
    """
    # Bounds over the whole run, then whether the returns that it may follow are known.
    check_bounds("--weight", weight, 0.0)
    resolve(weight, Progress(0.0, None, teacher_return, random_return))


def make_model(
    args: MethodArgs,
    student: Student,
    teacher: Teacher,
    envs: VecEnv,
    reference_returns: tuple[float, float | None],
    device: torch.device | str = "auto",
) -> TeacherMixin:
    """Returns an agent whose policy is a copy of the student, with its teacher.

    The arguments have been through `with_method_defaults`, and the student has the method's `student_temperature`.
    `reference_returns` are the mean episodic returns of a random policy and of the teacher (None: unknown).
    """
    method = METHODS[args.method]
    settings: dict[str, Any] = {  # SB3's keyword arguments
        **method.settings,
        "teacher": teacher,
        "teacher_temperature": args.temperature or None,
        "distillation_weight": args.weight,
        "reference_returns": reference_returns,
        "learning_rate": LinearSchedule(args.learning_rate or method.learning_rate, 0.0, 1.0),
        "seed": args.seed,
        "device": device,
    }
    # What depends on the environments, or on the flags of one method.
    if method.loss:
        settings["method"] = method.loss(**{name: getattr(args, name) for name in method.flags})
    elif method.algorithm is QDagger:
        # One gradient step per train_freq steps of any environment, as with a single environment.
        settings["gradient_steps"] = envs.num_envs
        settings["learning_starts"] = min(MAX_LEARNING_STARTS, args.steps // 20)
    else:
        settings["batch_size"] = min(settings["batch_size"], settings["n_steps"] * envs.num_envs)
    model = to_sb3(student, envs, method.algorithm, **settings)
    assert isinstance(model, TeacherMixin)
    return model
