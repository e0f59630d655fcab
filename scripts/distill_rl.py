"""Distils an Atari agent into a compact student inside reinforcement learning, and says what was lost and gained."""

import dataclasses
import json
import math
import shlex
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

from policykd.agents.card import Provenance
from policykd.agents.ensemble import WEIGHTS_HELP, load_teachers
from policykd.agents.policy import sample
from policykd.agents.student import Size, Student, make_student, save_student
from policykd.agents.teacher import TEACHER_HELP, Teacher
from policykd.cli.arguments import parse_args
from policykd.cli.command import DeviceName, exit_with_one_line, needs_extra, prepare_device, versions
from policykd.envs.atari import make_atari
from policykd.envs.games import canonical_name
from policykd.evaluation.evaluate import evaluate_on_atari
from policykd.evaluation.results import about, judge, table
from policykd.evaluation.teacher_check import TeacherCheck, check_fits, check_teacher, measured_return
from policykd.export.compiled import compile_policy
from policykd.io.files import write_atomically
from policykd.io.signals import check_interrupted, interruptible
from policykd.report import write_report
from policykd.runs.folder import (
    again,
    check_at_least,
    check_name,
    check_there,
    goes_on,
    lock,
    pinned,
    start_run,
    started_with,
)
from policykd.schedules import format_schedule
from policykd.storage.generations import has_generations
from policykd.viewer.animation import play_to_gif

with needs_extra("sb3"):
    from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat

    from policykd.agents.sb3_student import from_sb3
    from policykd.envs.sb3_vec_env import SB3VecEnv
    from policykd.rl.methods import METHODS, MethodArgs, check_weight, make_model, with_method_defaults
    from policykd.rl.qdagger import QDagger
    from policykd.rl.sb3_checkpoints import TrainingCallback, restore_training, save_training
    from policykd.rl.teacher_mixin import TeacherMixin

FREE = {"steps", "device", "threads", "name", "folder", "resume", "debug"}
FREE |= {"eval_every", "eval_episodes", "checkpoint_every"}
"""what may be changed when a run goes on"""


@dataclass(frozen=True, kw_only=True)
class Args(MethodArgs):
    """Distils an Atari agent into a compact student inside reinforcement learning, and says what was lost and gained.

    Writes runs/GAME/NAME/ with config.json, TensorBoard curves, checkpoints/, student.safetensors + student.json,
    results.json, report.html and student.gif. docs/rl.md has the methods. A run that was killed goes on with --resume,
    bit for bit.
    """

    game: str
    """Pong, PongNoFrameskip-v4 and ALE/Pong-v5 all mean the same game"""
    teacher: Annotated[str, tyro.conf.arg(help=TEACHER_HELP)] = "auto"
    teacher_weights: Annotated[str, tyro.conf.arg(help=WEIGHTS_HELP)] = "equal"
    trust_pickle: bool = False
    """let SB3 itself load the teacher, which executes code in the file: for your own archives with custom policies"""
    allow_weak_teacher: bool = False
    """go on with a teacher that may play no better than chance"""
    student: Size = "7%"
    """size, see distill_atari.py"""
    num_envs: int = 16
    """games played at once"""
    checkpoint_every: int = 50_000
    """steps between checkpoints"""
    eval_every: int = 250_000
    """steps between evaluations on the way (16 games, no-op starts, sampled); 0 for none"""
    eval_episodes: int = 50
    """whole games under each protocol at the end, for the student, and for a teacher whose card has none"""
    device: DeviceName = "auto"
    """where to compute: cuda, then mps, then cpu, whichever is there first"""
    threads: int = 0
    """CPU threads, and processes that emulate; 0 takes what torch finds"""
    name: str = ""
    """of the run's folder; by default method, size and seed"""
    folder: Path = Path("runs")
    """where runs are kept"""
    resume: bool = False
    """go on with the run of this --name from its last checkpoint, or start it if there is none"""
    debug: bool = False
    """show the traceback of an error"""


def main(args: Args) -> None:
    """Prepares the machine, and takes the run's folder for this process alone."""
    args = filled(args)
    check(args)
    device = prepare_device(args.device, args.threads)
    run = args.folder / args.game / (args.name or f"{args.method}-{args.student.replace('%', 'pct')}-seed{args.seed}")
    with lock(run), ExitStack() as opened:
        check_unfinished(run, args)
        distil(run, args, device, opened)


def filled(args: Args) -> Args:
    """Returns arguments with what the method takes where nothing is given.

    Raises:
        ValueError: a flag of another method, or an unknown game.
    """
    return with_method_defaults(dataclasses.replace(args, game=canonical_name(args.game)))


def check(args: Args) -> None:
    """Raises ValueError for what no run can have."""
    check_name(args.name)
    for name in ("reward_weight", "entropy_weight", "temperature", "learning_rate"):
        if getattr(args, name) is not None and not math.isfinite(getattr(args, name)):
            raise ValueError(f"--{name.replace('_', '-')} must be a number, not {getattr(args, name)}; leave it out")
    check_at_least(args, 1, "steps", "num_envs", "checkpoint_every", "eval_episodes")
    optional = ("offline_steps", "offline_updates", "reward_weight", "entropy_weight")
    check_at_least(args, 0, "eval_every", "seed", "temperature", "learning_rate")
    check_at_least(args, 0, *(name for name in optional if getattr(args, name) is not None))
    if args.entropy_weight is not None and args.entropy_weight > 1:
        raise ValueError(f"--entropy-weight must lie in [0, 1], not {args.entropy_weight}; 1 makes KL divergences")
    if args.seed >= 2**32:
        raise ValueError(f"--seed must be below 2^32, not {args.seed}; give a smaller one")
    assert args.weight is not None
    check_weight(args.weight, 0.0, 1.0)
    num_steps, num_updates = offline(args)
    if num_updates and num_steps < 50 * args.num_envs:
        raise ValueError(f"--offline-steps {num_steps} are too few to learn from; give 50 an environment")


def offline(args: Args) -> tuple[int, int]:
    """Returns the teacher's steps and the updates before the student plays."""
    if args.method != "qdagger" or not args.offline_updates:
        return 0, 0
    return args.offline_steps or 0, args.offline_updates


def check_unfinished(run: Path, args: Args) -> None:
    """Raises ValueError if a run is to go on that has ended, with fewer steps than are asked for."""
    if args.resume and (run / "results.json").is_file():
        steps = json.loads((run / "results.json").read_text())["num_states_labelled"] - offline(args)[0]
        if args.steps > steps:
            raise ValueError(f"{run}: is finished, at {steps:,} steps; for --steps {args.steps} give another --name")


def distil(run: Path, args: Args, device: torch.device, opened: ExitStack) -> None:
    """Loads, learns, judges, in that order; goes on where the run's folder says that it stopped."""
    teacher = load_teachers(
        pinned(args.teacher, run),
        args.teacher_weights,
        game=args.game,
        trust_pickle=args.trust_pickle,
        measure=lambda member: measured_return(member, args.game, seed=args.seed),
    )
    with interruptible():
        envs = make_atari(args.game, args.num_envs, args.seed, num_workers=torch.get_num_threads())
    opened.callback(envs.close)
    check_fits(teacher, envs, args.teacher, args.game)
    settings = {k: v for k, v in vars(args).items() if k not in FREE} | {"teacher": about(teacher)}
    settings["weight"] = format_schedule(args.weight or 0.0)
    with closing(make_atari(args.game, 8, args.seed)) as few:
        teacher = compile_policy(teacher.to(device), few.reset().to(device))
        frames = first_frames(teacher, few, args.seed, device)
    machine = {"device": str(device), "threads": torch.get_num_threads(), "labels": teacher.backend}
    is_old = goes_on(run, settings, resume=args.resume, machine=machine)
    if is_old and (run / "results.json").is_file():
        print((run / "results.md").read_text())
        return
    kept = started_with(run)["teacher_check"] if is_old else None
    checked = (
        TeacherCheck(**kept)
        if kept
        else check_teacher(teacher, args.game, seed=args.seed, allow_weak=args.allow_weak_teacher)
    )
    print(f"warning: the teacher {checked.warning}" if checked.warning else f"the teacher plays {checked}")
    teacher_return, random_return = checked.goal(args.game)
    assert args.weight is not None
    check_weight(args.weight, random_return, teacher_return)
    if not is_old:
        start_run(run, settings, machine=machine, teacher_argument=args.teacher, teacher_check=asdict(checked))
    student = make_student(
        args.student, envs.num_actions, seed=args.seed, temperature=METHODS[args.method].student_temperature
    )
    student.fit_input_normalization(frames)
    returns = (random_return, teacher_return)
    model = make_model(args, student, teacher, SB3VecEnv(envs, clip_rewards=True), returns, device)

    has_checkpoint = has_generations(run / "checkpoints")
    with interruptible():
        wall_seconds = restore_training(model, envs, run / "checkpoints") if has_checkpoint else 0.0
    board = TensorBoardOutputFormat(str(run))
    num_steps, num_updates = offline(args)
    first = model.num_timesteps + 1 if has_checkpoint else -num_updates  # curves of the offline phase end at 0
    board.writer = SummaryWriter(str(run), purge_step=first)
    opened.callback(board.close)
    model.set_logger(Logger(str(run), [board]))

    def evaluate(steps: int) -> None:
        student_now = from_sb3(model, student).to(device)
        games = evaluate_on_atari(student_now, args.game, "noop_sampled", 16, seed=args.seed)
        board.writer.add_scalar("eval/mean_reward", np.mean(games.returns), steps)
        board.writer.add_scalar("eval/mean_ep_length", np.mean(games.lengths), steps)
        print(f"{steps:>11,} steps: 16 games, mean {np.mean(games.returns):.2f}", flush=True)

    print(f"{run}: {model.num_timesteps:,} of {args.steps:,} steps; watch it with: tensorboard --logdir {args.folder}")
    saved = model.num_timesteps
    try:
        if isinstance(model, QDagger) and num_updates and not has_checkpoint:
            began = time.perf_counter()
            model.learn_offline(num_steps, num_updates, print_line=lambda line: print(line, flush=True))
            wall_seconds = time.perf_counter() - began
            save_training(model, envs, run / "checkpoints", wall_seconds=wall_seconds)
        progress = TrainingCallback(
            envs, run / "checkpoints", args.checkpoint_every, evaluate, args.eval_every, wall_seconds
        )
        try:
            model.learn(max(0, args.steps - model.num_timesteps), progress, reset_num_timesteps=False)
            progress.save()
        finally:
            saved = progress.saved_steps
        board.writer.flush()  # the report reads it
        write_results(run, args, from_sb3(model, student).to(device), teacher, model, progress.wall_seconds)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{saved:,} steps are saved; go on with: {again(args, run)}") from None


def first_frames(teacher: Teacher, envs: Any, seed: int, device: torch.device) -> torch.Tensor:
    """Returns frames of a little play by the teacher, `(n, 84, 84)`, for the student's input scaling."""
    obs, generator, frames = envs.reset(), torch.Generator().manual_seed(seed), []
    for _ in range(100):
        check_interrupted()
        frames.append(obs[:, -1])
        obs = envs.step(sample(teacher(obs.to(device)).cpu() / teacher.temperature, generator)).obs
    return torch.cat(frames)


def write_results(
    run: Path, args: Args, student: Student, teacher: Teacher, model: TeacherMixin, wall_seconds: float
) -> None:
    """Saves the student, lets it be judged, and writes what was lost and gained."""
    check_there(run)
    command = shlex.join(sys.argv)
    save_student(student, run, Provenance(game=args.game, teacher=teacher.record, command=command))
    where: dict[str, Any] = {"done": run / "judged.json", "threads": torch.get_num_threads()}
    device = torch.device(model.device)
    results, seconds = judge(student, teacher, args.game, args.eval_episodes, args.seed, device, **where)
    results |= {
        "num_states_labelled": model.num_timesteps + offline(args)[0],
        "num_updates": model.num_gradient_steps,
        "wall_seconds": {"learn": wall_seconds, "evaluate": seconds},
        "versions": versions(),
        "command": command,
    }
    text = (
        f"{table(results)}\n\n{results['num_states_labelled']:,} states, {results['num_updates']:,} updates;"
        f" learn {wall_seconds:.0f} s, evaluate {seconds:.0f} s\n"
    )
    play_to_gif(student, args.game, run / "student.gif", seed=args.seed)
    check_there(run)
    write_atomically(run / "results.md", text.encode())
    write_report(run, results, student, teacher, args.game, seed=args.seed)
    write_atomically(run / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    print(f"\n{text}\n{run}/ holds student.safetensors, results.json, report.html")


if __name__ == "__main__":
    exit_with_one_line(lambda: main(parse_args(Args, sys.argv[1:])))
