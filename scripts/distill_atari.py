"""Distils a trained Stable-Baselines3 Atari agent into a compact student, and says what was lost and gained."""

import json
import shlex
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm

from policykd.agents.card import Provenance
from policykd.agents.ensemble import WEIGHTS_HELP, load_teachers
from policykd.agents.student import Size, make_student, save_student
from policykd.agents.teacher import TEACHER_HELP
from policykd.cli.arguments import parse_args
from policykd.cli.command import DeviceName, exit_with_one_line, prepare_device, versions
from policykd.envs.atari import make_atari
from policykd.envs.games import canonical_name
from policykd.evaluation.results import about, evaluate_on_the_way, judge, table
from policykd.evaluation.teacher_check import TeacherCheck, check_fits, check_teacher, measured_return
from policykd.export.compiled import compile_policy
from policykd.io.files import write_atomically
from policykd.legacy.auxiliary import Beyond, BeyondLogits
from policykd.legacy.loop import distill
from policykd.legacy.losses import AnyLoss, ForwardKL, Loss, ScoreHuber, ScoreMSE, at_temperature
from policykd.legacy.rehearsal import follows_return, plays_alone, rehearse
from policykd.legacy.schedules import Quantity, WarmupCosine
from policykd.legacy.state_weights import Measure, counted_by
from policykd.legacy.states import BlendedStates, DatasetStates, MixedStates, StudentStates, TeacherStates
from policykd.legacy.train_state import make_learner
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
from policykd.runs.legacy_records import Records
from policykd.storage.checkpoints import restore_checkpoint, save_checkpoint
from policykd.storage.dataset import open_dataset
from policykd.storage.generations import has_generations
from policykd.storage.offline import label_preloaded, open_replay
from policykd.viewer.animation import play_to_gif

FREE = {"device", "threads", "overlap", "name", "folder", "resume", "debug", "eval_episodes"}
"""what may be changed when a run goes on: it does not decide what is learned"""


@dataclass(frozen=True)
class Args:
    """Distils a trained Stable-Baselines3 Atari agent into a compact student, and says what was lost and gained.

    Writes runs/GAME/NAME/ with config.json, TensorBoard curves, metrics.jsonl, evaluations.npz, checkpoints/,
    student.safetensors + student.json, results.json, report.html and student.gif.
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
    """size in per cent of the NatureCNN's parameters, or a design that is cheap in arithmetic (docs/students.md)"""
    loss: AnyLoss = ForwardKL()  # noqa: RUF009
    """what the student minimises: --loss two-sided-kl and the like (docs/losses.md; docs/methods.md says when); the
    teacher's own temperature is taken unless the loss has another"""
    count_states_by: Measure = "nothing"
    """let states count more where the teacher is sure (entropy, gap between its two best actions) or the student far
    from it (disagreement)"""
    least_count: Quantity = 0.1
    """what a state counts where that measure is 0; where it is 1, a state counts 1"""
    beyond: BeyondLogits = BeyondLogits()  # noqa: RUF009
    """weights of what is learned beside the teacher's scores (docs/beyond_logits.md)"""
    states: MixedStates | StudentStates | TeacherStates | DatasetStates | BlendedStates = MixedStates()  # noqa: RUF009
    """whose actions choose the states: --states mixed (handed over from teacher to student: DAgger), student, teacher;
    dataset:PATH is stored states without playing, blended:PATH stored beside live ones"""
    rounds_kept: int = 0
    """fit to the states of so many of the newest rounds, visited by the student as it stood one fit before: 1 is
    on-policy, 0 fits to all (aggregated)"""
    rounds: int = 10
    """times to visit states, then fit the student to all so far"""
    states_per_round: int = 8000
    """states to visit and label in a round, agent steps over all environments"""
    updates_per_round: int = 700
    """gradient steps in a round"""
    batch_size: int = 256
    """states a gradient step"""
    learning_rate: float = 2e-3
    """Adam's highest; it rises over the first 2 % of the run and falls to zero along a cosine"""
    num_envs: int = 16
    """games played at once while collecting"""
    eval_every: int = 5
    """rounds between evaluations on the way (16 games, no-op starts, sampled); 0 for none"""
    eval_episodes: int = 50
    """whole games under each protocol at the end, for the student, and for a teacher whose card has none"""
    overlap: bool = True
    """visit the next states while the student is fitted; the result is the same bit for bit without"""
    bf16: bool = False
    """convolutions in bfloat16, for GPUs and CPUs that have it; scores, loss and weights stay float32"""
    cuda_graph: bool = False
    """capture an update once and replay it, on a CUDA device"""
    device: DeviceName = "auto"
    """where to compute: cuda, then mps, then cpu, whichever is there first"""
    threads: int = 0
    """CPU threads that share each batch, and processes that emulate; 0 takes what torch finds"""
    seed: int = 0
    """of weights, batches, games and actions"""
    name: str = ""
    """of the run's folder; by default size, seed and time"""
    folder: Path = Path("runs")
    """where runs are kept"""
    resume: bool = False
    """go on with the run of this --name from its last round, or start it if there is none"""
    debug: bool = False
    """show the traceback of an error"""


def main(args: Args) -> None:
    """Prepares the machine, and takes the run's folder for this process alone."""
    check(args)
    device = prepare_device(args.device, args.threads)
    check_device(args, device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each of our own threads computes alone: see distill()
    name = args.name or f"{args.student.replace('%', 'pct')}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = args.folder / canonical_name(args.game) / name
    with lock(run), ExitStack() as opened:
        try:
            make(run, args, device, threads, opened)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; the rounds before it are saved in {run}") from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"what was finished is saved; go on with: {again(args, run)}") from None


def make(run: Path, args: Args, device: torch.device, threads: int, opened: ExitStack) -> None:
    """Loads, distils, judges, in that order; goes on where the run's folder says that it stopped."""
    game, offline = canonical_name(args.game), isinstance(args.states, DatasetStates)
    teacher_ref = pinned(args.teacher, run)
    teacher = load_teachers(
        teacher_ref,
        args.teacher_weights,
        game=game,
        trust_pickle=args.trust_pickle,
        measure=lambda member: measured_return(member, game, seed=args.seed),
    )
    loss = at_temperature(counted_by(args.loss, args.count_states_by, args.least_count), teacher.temperature)
    envs = make_atari(game, 1 if offline else args.num_envs, args.seed, num_workers=0 if offline else threads)
    opened.callback(envs.close)
    check_fits(teacher, envs, args.teacher, game)
    given = {k: v for k, v in vars(args).items() if k not in FREE}
    settings: dict[str, Any] = {k: v if isinstance(v, int | float | str) else repr(v) for k, v in given.items()}
    settings |= {"game": game, "teacher": about(teacher)}
    if isinstance(args.states, DatasetStates | BlendedStates):
        settings["dataset"] = open_dataset(args.states.path).sha256
    with closing(make_atari(game, 1, args.seed)) as one:
        teacher = compile_policy(teacher.to(device), one.reset().to(device))
    machine = {"device": str(device), "threads": threads, "labels": teacher.backend}
    is_old = goes_on(run, settings, resume=args.resume, machine=machine)
    if is_old and (run / "results.json").is_file():
        print((run / "results.md").read_text())
        return
    student = make_student(
        args.student,
        envs.num_actions,
        seed=args.seed,
        value="value" in args.beyond.active,
        temperature=units(at_temperature(args.loss, teacher.temperature)),
    )
    beyond = Beyond(args.beyond, student, teacher, seed=args.seed) if args.beyond.active else None
    room = 0 if offline else args.rounds * args.states_per_round
    replay = open_replay(args.states, teacher, game, room=room, num_envs=args.num_envs, device=device)
    kept = started_with(run)["teacher_check"] if is_old else None
    checked = (
        TeacherCheck(**kept)
        if kept
        else check_teacher(teacher, game, seed=args.seed, allow_weak=args.allow_weak_teacher)
    )
    learner = make_learner(student, envs, capacity=room, seed=args.seed, device=device, replay=replay, beyond=beyond)
    teacher_return, random_return = checked.goal(game)
    told: dict[str, Any] = {
        "loss": loss,
        "states": args.states,
        "rounds": args.rounds,
        "states_per_round": 0 if offline else args.states_per_round,
        "batch_size": args.batch_size,
        "beyond": args.beyond,
        "rounds_kept": args.rounds_kept,
        "stored": args.states.stored if isinstance(args.states, BlendedStates) else 0.0,
        "teacher_return": teacher_return,
        "random_return": random_return,
    }
    rehearse(learner, **told)
    if not is_old:
        print(f"warning: the teacher {checked.warning}" if checked.warning else f"the teacher plays {checked}")
        start_run(run, settings, machine=machine, teacher_argument=args.teacher, teacher_check=asdict(checked))
    label_preloaded(learner.replay, teacher)
    if has_generations(run / "checkpoints"):
        restore_checkpoint(learner, run / "checkpoints")
    elif is_old:
        print(f"warning: {run} holds no checkpoint yet: it begins anew", file=sys.stderr)
    records = opened.enter_context(closing(Records(run, learner.round)))
    print(f"{run}: {game} from {teacher.algorithm} {teacher.ref}; watch it with: tensorboard --logdir {args.folder}")

    def evaluate_if_due() -> None:
        due = args.eval_every and learner.round and learner.round % args.eval_every == 0
        if due and not records.has_evaluation(learner.num_updates):
            evaluate_on_the_way(student, records, game, teacher, args.seed, device, threads)
        if due:
            learner.student_returns = records.returns_of(learner.num_updates)

    evaluate_if_due()  # where a run was stopped between a checkpoint and its evaluation
    rounds = distill(
        teacher,
        learner,
        **told,
        learning_rate=WarmupCosine(args.learning_rate),
        updates_per_round=args.updates_per_round,
        temperature=teacher.temperature,
        threads=threads,
        overlap=args.overlap,
        bf16=args.bf16,
        cuda_graph=args.cuda_graph,
    )
    with tqdm(rounds, total=args.rounds, initial=learner.round, unit="round", desc=game) as bar:
        for r in bar:
            records.add_round(r, teacher.temperature)
            save_checkpoint(learner, run / "checkpoints")
            evaluate_if_due()
            live = [e.episodic_return for e in r.episodes]
            score = f"{sum(live) / len(live):.1f}" if live else "-"
            agree, share = f"{r.action_agreement:.1%}", f"{r.student_fraction:.0%}"
            bar.set_postfix(kl=f"{r.kl:.4f}", agree=agree, student=share, score=score)
    check_there(run)
    save_student(student, run, Provenance(game=game, teacher=teacher.record, command=shlex.join(sys.argv)))
    results, seconds = judge(
        student, teacher, game, args.eval_episodes, args.seed, device, done=run / "judged.json", threads=threads
    )
    results |= {
        "num_states_labelled": learner.replay.num_states,
        "num_updates": learner.num_updates,
        "wall_seconds": records.seconds() | {"evaluate": seconds},
        "versions": versions(),
        "command": shlex.join(sys.argv),
    }
    spent = ", ".join(f"{phase} {s:.0f} s" for phase, s in results["wall_seconds"].items())
    counts = f"{results['num_states_labelled']:,} states, {results['num_updates']:,} updates"
    text = f"{table(results)}\n\n{counts}; {spent}\n"
    play_to_gif(student, game, run / "student.gif", seed=args.seed)
    check_there(run)
    write_atomically(run / "results.md", text.encode())
    write_report(run, results, student, teacher, game, seed=args.seed)
    write_atomically(run / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    print(f"\n{text}\n{run}/ holds student.safetensors, results.json, report.html")


def units(loss: Loss) -> float:
    """Returns what the student's scores are divided by to be logits: a student of Q-values plays them tempered."""
    if not isinstance(loss, ScoreMSE | ScoreHuber):
        return 1.0
    if not isinstance(loss.temperature, int | float):
        raise ValueError("--loss.temperature of a loss on scores is the student's own; give a number, no schedule")
    return loss.temperature


def check_device(args: Args, device: torch.device) -> None:
    """Raises ValueError for what this device cannot do, or does ten times slower."""
    if args.cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda-graph needs --device cuda, this is {device}; leave it out")
    if args.bf16 and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        raise ValueError("--bf16: this CPU has no bfloat16 arithmetic and would take ten times as long; leave it out")


def check(args: Args) -> None:
    """Raises ValueError for a number that no run can have."""
    check_at_least(
        args, 1, "rounds", "states_per_round", "updates_per_round", "batch_size", "num_envs", "eval_episodes"
    )
    check_at_least(args, 0, "eval_every", "seed", "rounds_kept")
    check_name(args.name)
    if (gigabytes := args.rounds * args.states_per_round * 7.2e-6) > 1000:
        raise ValueError(f"--rounds times --states-per-round takes {gigabytes:,.0f} GB of memory; lower one of them")
    if args.states_per_round % args.num_envs:
        raise ValueError(f"--states-per-round {args.states_per_round} is not a multiple of --num-envs {args.num_envs}")
    if not 0.0 < args.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate must be a positive number, not {args.learning_rate}")
    if args.count_states_by == "nothing" and args.least_count != Args.least_count:
        raise ValueError(
            "--least-count needs --count-states-by entropy, gap or disagreement; leave it out, or add that"
        )
    is_told = 0 < args.eval_every < args.rounds or plays_alone(args.states)
    if follows_return(args.loss, args.beyond, args.states, args.least_count) and not is_told:
        raise ValueError(
            "--eval-every: a schedule that follows the return needs games that the student plays alone; give it less"
            " than --rounds, or --states student"
        )
    visited = (args.states_per_round, args.num_envs) != (Args.states_per_round, Args.num_envs)
    if isinstance(args.states, DatasetStates) and visited:
        raise ValueError("--states dataset:PATH visits no states; leave out --states-per-round and --num-envs")


if __name__ == "__main__":
    exit_with_one_line(lambda: main(parse_args(Args, sys.argv[1:])))
