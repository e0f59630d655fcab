"""A run of distillation inside reinforcement learning: teacher check, training, final evaluation, report."""

from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from policykd.agents.policy import sample
from policykd.agents.sb3_student import from_sb3
from policykd.agents.student import make_student
from policykd.agents.teacher import Teacher
from policykd.envs.atari import make_atari
from policykd.envs.games import canonical_name
from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.envs.vector import VectorEnv
from policykd.evaluation.evaluate import Evaluation, periodic_evaluation
from policykd.evaluation.results import FinalEvaluationOptions
from policykd.evaluation.teacher_check import check_fits, check_teacher
from policykd.export.compiled import compile_policy
from policykd.io.files import lock_folder
from policykd.io.machine import prepare_device
from policykd.rl.methods import METHODS, MethodArgs, check_weight, make_model, with_method_defaults
from policykd.rl.qdagger import QDagger
from policykd.rl.training import Training
from policykd.runs.config import (
    RESUMABLE_CHANGES,
    EvaluationArgs,
    MachineArgs,
    Positive,
    RunArgs,
    TaskArgs,
    TeacherArgs,
    check_flags,
    check_name,
    to_settings,
)
from policykd.runs.finish import TrainingCost, finish_run
from policykd.runs.folder import (
    Machine,
    RunRecord,
    RunResult,
    check_resumable,
    load_results,
    load_run_teacher,
    load_started_run,
    record_changes,
    write_run_config,
)

NUM_SCALING_STEPS = 100
"""agent steps of the teacher in 8 environments whose frames determine the student's input scaling"""


@dataclass(frozen=True, kw_only=True)
class DistillRLConfig(MethodArgs, EvaluationArgs, MachineArgs, TeacherArgs, RunArgs, TaskArgs):
    """Distils an Atari agent into a compact student inside reinforcement learning, and measures what that cost.

    Writes runs/GAME/NAME/ with config.json, TensorBoard curves, checkpoints/, student.safetensors + student.json,
    results.json, report.html and student.gif. docs/rl.md describes the methods. A killed run resumes with --resume, bit
    for bit.
    """

    num_envs: Positive = 16
    """environments that the student plays in parallel"""


def check_config(config: DistillRLConfig) -> DistillRLConfig:
    """Returns a config with the method's defaults filled in, after checking it before a run touches any file.

    Raises:
        ValueError: an unknown game, a setting out of bounds, or a flag of another method; the line names the flag.
    """
    check_flags(config)
    check_name(config.name)
    config = with_method_defaults(replace(config, game=canonical_name(config.game)))
    assert config.weight is not None
    check_weight(config.weight, 0.0, 1.0)
    if config.offline_updates and (config.offline_steps or 0) < 50 * config.num_envs:
        raise ValueError(f"--offline-steps {config.offline_steps} are too few; give at least 50 per environment")
    return config


def distill_rl_run(config: DistillRLConfig) -> RunResult:
    """Distils inside reinforcement learning, evaluates the student and writes the report; resumes an interrupted run.

    Raises:
        ValueError: an invalid config, or the folder holds another run.
        BadFile: the teacher does not fit the game or plays no better than random, or a file of the run is damaged.
        OSError: another process holds the run's folder, or it is not writable.
        FloatingPointError: training has diverged.
        KeyboardInterrupt: a signal was received; the message contains the command that resumes.
    """
    config = check_config(config)
    device = prepare_device(config.device, config.threads)
    name = config.name or f"{config.method}-{config.student.replace('%', 'pct')}-seed{config.seed}"
    run = config.folder / config.game / name
    with lock_folder(run), ExitStack() as resources:
        return _distill(run, config, device, resources)


def _distill(run: Path, config: DistillRLConfig, device: torch.device, resources: ExitStack) -> RunResult:
    started = load_started_run(run, resume=config.resume)
    # A finished run is shown again, but not lengthened: its learning rate has reached 0.
    results = load_results(run)
    if results:
        _check_length(run, config, results)

    # The teacher, the environments, and frames for the student's input scaling.
    teacher = load_run_teacher(config, started, config.game, config.seed)
    envs = make_atari(config.game, config.num_envs, config.seed, num_workers=torch.get_num_threads())
    resources.callback(envs.close)
    check_fits(teacher, envs, config.teacher, config.game)
    with closing(make_atari(config.game, 8, config.seed)) as few:
        teacher = compile_policy(teacher.to(device), few.reset().to(device))
        frames = _teacher_frames(teacher, few, config.seed, device)

    # Settings, teacher and weight may all be refused: config.json is written only after that.
    machine = Machine(device=str(device), threads=torch.get_num_threads(), teacher_backend=teacher.backend)
    record = RunRecord(subcommand="distill-rl", settings=to_settings(config), machine=machine, teacher=teacher.record)
    if started:
        check_resumable(run, started, record, may_change=RESUMABLE_CHANGES)
        record_changes(run, started, record)
    if results:
        print(results.summary())
        return results
    # Checked once per run; a resumed one keeps the result, from which schedules take the returns.
    checked = started.teacher_check if started else None
    if checked is None:
        checked = check_teacher(teacher, config.game, seed=config.seed, allow_weak=config.allow_weak_teacher)
    print(f"warning: the teacher {checked.warning}" if checked.warning else f"the teacher plays {checked}")
    teacher_return, random_return = checked.goal(config.game)
    assert config.weight is not None
    check_weight(config.weight, random_return, teacher_return)
    if not started:
        write_run_config(run, replace(record, teacher_check=checked))

    # The student as the policy of an SB3 agent, and its training.
    temperature = METHODS[config.method].student_temperature
    student = make_student(config.student, envs.num_actions, seed=config.seed, temperature=temperature)
    student.fit_input_normalization(frames)
    sb3_envs = SB3VecEnv(envs, clip_rewards=True)
    model = make_model(config, student, teacher, sb3_envs, (random_return, teacher_return), device)

    def evaluate() -> Evaluation:
        current = from_sb3(model, student).to(device)
        return periodic_evaluation(current, config.game, seed=config.seed, num_workers=torch.get_num_threads())

    num_updates = config.offline_updates or 0
    training = Training(model, envs, run, config, evaluate, first_curve_step=-num_updates)
    with training.resume_hint():
        # Saved at its end, and not repeated by a resumed run.
        if isinstance(model, QDagger) and num_updates and not training.is_resumed:
            model.learn_offline(_offline_steps(config), num_updates)
            training.save()
        training.train()
        cost = TrainingCost(
            num_states_labelled=model.num_timesteps + _offline_steps(config),
            num_updates=model.num_gradient_steps,
            wall_seconds={"learn": training.wall_seconds},
        )
        options = FinalEvaluationOptions(
            num_episodes=config.eval_episodes, seed=config.seed, threads=torch.get_num_threads()
        )
        return finish_run(run, from_sb3(model, student).to(device), teacher, config.game, cost, options)


def _check_length(run: Path, config: DistillRLConfig, results: RunResult) -> None:
    """Raises ValueError if a finished run is asked for more than it has."""
    steps = (results.num_states_labelled or 0) - _offline_steps(config)
    if steps < config.steps:
        raise ValueError(f"{run}: is finished, at {steps:,} steps; for --steps {config.steps} give another --name")
    num_episodes = results.num_episodes
    if num_episodes < config.eval_episodes:
        raise ValueError(
            f"{run}: is finished, with {num_episodes} episodes per protocol; policykd evaluate {run} plays more"
        )


@torch.no_grad()
def _teacher_frames(teacher: Teacher, envs: VectorEnv, seed: int, device: torch.device) -> Tensor:
    """Returns frames that the teacher sees, `(n, 84, 84)`."""
    # As it plays: actions sampled at its own temperature.
    generator = torch.Generator().manual_seed(seed)
    obs = envs.reset()
    frames: list[Tensor] = []
    for _ in range(NUM_SCALING_STEPS):
        frames.append(obs[:, -1])
        logits_BA = teacher(obs.to(device)).cpu() / teacher.temperature
        obs = envs.step(sample(logits_BA, generator)).obs
    return torch.cat(frames)


def _offline_steps(config: DistillRLConfig) -> int:
    """Returns the teacher's agent steps before the student plays, 0 for the methods that have none."""
    return (config.offline_steps or 0) if config.offline_updates else 0
