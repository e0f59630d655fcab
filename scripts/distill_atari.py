"""Distils a trained Stable-Baselines3 Atari agent into a compact student, and says what was lost and gained."""

import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm

from policykd.agents.files import write_atomically
from policykd.agents.student import Size, make_student, save_student
from policykd.agents.teacher import TEACHER_HELP, Teacher, load_teacher
from policykd.animation import play_to_gif
from policykd.checkpoints import MANIFEST, restore_checkpoint, save_checkpoint
from policykd.command import DeviceName, exit_with_one_line, prepare_device, versions
from policykd.dataset import label, load_dataset
from policykd.distill import Learner, distill, make_learner
from policykd.envs.atari import make_atari
from policykd.envs.games import canonical_name
from policykd.evaluation import evaluate_on_atari
from policykd.losses import ActionNLL, ForwardKL, ReverseKL, ScoreMSE
from policykd.manifest import open_dataset
from policykd.records import Records
from policykd.replay import Replay
from policykd.results import judge, table
from policykd.runs import again, check_at_least, check_name, goes_on, pinned, start_run
from policykd.schedules import WarmupCosine
from policykd.states import DatasetStates, MixedStates, StudentStates, TeacherStates
from policykd.teacher_check import check_fits, check_teacher

FREE = {"device", "threads", "name", "folder", "resume", "eval_episodes"}
"""what may be changed when a run goes on: it does not decide what is learned"""


@dataclass(frozen=True)
class Args:
    """Distils a trained Stable-Baselines3 Atari agent into a compact student, and says what was lost and gained.

    Writes runs/GAME/NAME/ with config.json, TensorBoard curves, metrics.jsonl, evaluations.npz, checkpoints/,
    student.safetensors + student.json, results.json and student.gif.
    """

    game: str
    """Pong, PongNoFrameskip-v4 and ALE/Pong-v5 all mean the same game"""
    teacher: Annotated[str, tyro.conf.arg(help=TEACHER_HELP)] = "auto"
    trust_pickle: bool = False
    """let SB3 itself load the teacher, which executes code in the file: for your own archives with custom policies"""
    allow_weak_teacher: bool = False
    """go on with a teacher that may play no better than chance"""
    student: Size = "7%"
    """size, in per cent of the teacher's NatureCNN: 16-32-32-256, 16-16-16-128, 16-16-16-64 or 8-8-8-32"""
    loss: ForwardKL | ReverseKL | ScoreMSE | ActionNLL = ForwardKL()  # noqa: RUF009
    """what the student minimises; a KL is taken at the teacher's temperature unless it has its own"""
    states: MixedStates | StudentStates | TeacherStates | DatasetStates = MixedStates()  # noqa: RUF009
    """whose actions choose the states: handed over from teacher to student (DAgger), the student's, the teacher's; or
    stored states, without playing: --states dataset:PATH"""
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
    device: DeviceName = "auto"
    """where to compute: cuda, then mps, then cpu, whichever is there first"""
    threads: int = 0
    """CPU threads; 0 takes what torch finds"""
    seed: int = 0
    """of weights, batches, games and actions"""
    name: str = ""
    """of the run's folder; by default size, seed and time"""
    folder: Path = Path("runs")
    """where runs are kept"""
    resume: bool = False
    """go on with the run of this --name from its last round, or start it if there is none"""


def main(args: Args) -> None:
    """Loads, distils, judges, in that order."""
    check(args)
    device = prepare_device(args.device, args.threads)
    game = canonical_name(args.game)
    name = args.name or f"{args.student[:-1]}pct-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = args.folder / game / name
    offline = isinstance(args.states, DatasetStates)
    teacher = load_teacher(pinned(args.teacher, run), game=game, trust_pickle=args.trust_pickle)
    loss = args.loss
    if isinstance(loss, ForwardKL | ReverseKL) and loss.temperature is None:
        loss = replace(loss, temperature=teacher.temperature)
    if isinstance(loss, ScoreMSE) and teacher.temperature != 1.0:
        raise ValueError(
            f"loss:score-mse on a {teacher.algorithm} teacher leaves a student whose actions cannot be drawn;"
            " use another loss"
        )
    envs = make_atari(game, 1 if offline else args.num_envs, args.seed)
    check_fits(teacher, envs, args.teacher, game)
    given = {k: v for k, v in vars(args).items() if k not in FREE}
    settings: dict[str, Any] = {k: v if isinstance(v, int | float | str) else repr(v) for k, v in given.items()}
    settings |= {"game": game, "teacher": about(teacher)}
    if isinstance(args.states, DatasetStates):
        settings["dataset"] = open_dataset(args.states.path).sha256
    machine = {"device": str(device), "threads": torch.get_num_threads()}
    is_old = goes_on(run, settings, resume=args.resume, machine=machine)
    if is_old and (run / "results.json").is_file():
        print((run / "results.md").read_text())
        return
    replay = open_replay(args.states, teacher, game, device) if isinstance(args.states, DatasetStates) else None
    if not is_old:
        checked = check_teacher(
            teacher.to(device), game, seed=args.seed, allow_weak=args.allow_weak_teacher, device=device
        )
        print(f"warning: the teacher {checked.warning}" if checked.warning else f"the teacher plays {checked}")
        start_run(run, settings, machine=machine, teacher_argument=args.teacher, teacher_check=asdict(checked))
    student = make_student(args.student, envs.num_actions, seed=args.seed)
    learner = make_learner(
        student,
        envs,
        capacity=args.rounds * args.states_per_round,
        seed=args.seed,
        device=device,
        replay=replay,
    )
    label_given(learner.replay, teacher.to(device))
    if (run / "checkpoints" / MANIFEST).is_file():
        restore_checkpoint(learner, run / "checkpoints")
    records = Records(run, learner.round)
    print(f"{run}: {game} from {teacher.algorithm} {teacher.ref}; watch it with: tensorboard --logdir {args.folder}")
    rounds = distill(
        teacher.to(device),
        learner,
        loss=loss,
        states=args.states,
        learning_rate=WarmupCosine(args.learning_rate),
        rounds=args.rounds,
        states_per_round=0 if offline else args.states_per_round,
        updates_per_round=args.updates_per_round,
        batch_size=args.batch_size,
        temperature=teacher.temperature,
    )
    num_saved = learner.round
    try:
        with tqdm(rounds, total=args.rounds, initial=learner.round, unit="round", desc=game) as bar:
            for r in bar:
                due = args.eval_every and (r.index + 1) % args.eval_every == 0
                seconds = evaluate_on_the_way(learner, records, game, teacher, args.seed, device) if due else 0.0
                records.add_round(r, getattr(loss, "temperature", 1.0), seconds)
                save_checkpoint(learner, run / "checkpoints")
                num_saved = learner.round
                live = [e.episodic_return for e in r.episodes]
                score = f"{sum(live) / len(live):.1f}" if live else "-"
                bar.set_postfix(
                    kl=f"{r.kl:.4f}",
                    agree=f"{r.action_agreement:.1%}",
                    student=f"{r.student_fraction:.0%}",
                    score=score,
                )
        save_student(student, run, {"game": game, "teacher": about(teacher), "command": shlex.join(sys.argv)})
        results, seconds = judge(student, teacher, game, args.eval_episodes, args.seed, device)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; {num_saved} rounds before it are saved in {run}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{num_saved} rounds are saved; go on with: {again(args, run)}") from None
    results |= {
        "num_states_labelled": learner.replay.num_states,
        "num_updates": learner.num_updates,
        "wall_seconds": {p: s + (seconds if p == "evaluate" else 0.0) for p, s in records.seconds().items()},
        "versions": versions(),
        "command": shlex.join(sys.argv),
    }
    records.close()
    spent = ", ".join(f"{phase} {s:.0f} s" for phase, s in results["wall_seconds"].items())
    text = (
        f"{table(results)}\n\n{results['num_states_labelled']:,} states, {results['num_updates']:,} updates; {spent}\n"
    )
    play_to_gif(student, game, run / "student.gif", seed=args.seed)
    write_atomically(run / "results.md", text.encode())
    write_atomically(run / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    print(f"\n{text}\n{run}/ holds student.safetensors, results.json, student.gif")


def check(args: Args) -> None:
    """Raises ValueError for a number that no run can have."""
    check_at_least(
        args, 1, "rounds", "states_per_round", "updates_per_round", "batch_size", "num_envs", "eval_episodes"
    )
    check_at_least(args, 0, "eval_every", "seed")
    check_name(args.name)
    if (gigabytes := args.rounds * args.states_per_round * 7.2e-6) > 1000:
        raise ValueError(
            f"--rounds times --states-per-round would take {gigabytes:,.0f} GB of memory; lower one of them"
        )
    if args.states_per_round % args.num_envs:
        raise ValueError(f"--states-per-round {args.states_per_round} is not a multiple of --num-envs {args.num_envs}")
    if not 0.0 < args.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate must be a positive number, not {args.learning_rate}")
    visited = (args.states_per_round, args.num_envs) != (Args.states_per_round, Args.num_envs)
    if isinstance(args.states, DatasetStates) and visited:
        raise ValueError("--states dataset:PATH visits no states; leave out --states-per-round and --num-envs")


def open_replay(states: DatasetStates, teacher: Teacher, game: str, device: torch.device) -> Replay:
    """Returns the replay of a dataset."""
    replay = load_dataset(
        states.path,
        num_actions=teacher.num_actions,
        obs_shape=teacher.obs_shape,
        game=game,
        teacher_sha256=teacher.sha256,
        num_held_out=max(1, round(states.held_out * open_dataset(states.path).num_rows)),
        device=device,
    )
    replay.num_given = len(replay)
    return replay


def label_given(replay: Replay, teacher: Teacher) -> None:
    """Scores the states of a dataset that this teacher has not scored yet, and says how many they were."""
    if not replay.num_given:
        return
    began = time.perf_counter()
    num_labelled = label(replay, teacher)
    seconds = time.perf_counter() - began
    print(f"a dataset of {replay.num_states:,} states, {num_labelled:,} labelled in {seconds:.0f} s", flush=True)


def about(teacher: Teacher) -> dict[str, str]:
    """Returns which teacher it was."""
    where = {"ref": teacher.ref, "revision": teacher.revision}
    return {"algorithm": teacher.algorithm, "file": teacher.path.name, **where, "sha256": teacher.sha256}


def evaluate_on_the_way(
    learner: Learner, records: Records, game: str, teacher: Teacher, seed: int, device: torch.device
) -> float:
    """Plays 16 games with the student as it stands, writes them down and returns the seconds that it took."""
    began = time.perf_counter()
    learner.student.eval()
    evaluation = evaluate_on_atari(learner.student, game, "noop_sampled", 16, seed=seed, device=device)
    of_teacher = teacher.reported_return
    mean = sum(evaluation.returns) / len(evaluation.returns)
    against = {"teacher_mean_reward": of_teacher, "score_vs_teacher": None if of_teacher is None else mean - of_teacher}
    num_states = learner.replay.num_states
    records.add_evaluation(learner.num_updates, num_states, evaluation.returns, evaluation.lengths, against)
    return time.perf_counter() - began


def spelt_out(arguments: list[str]) -> list[str]:
    """Returns a command line with `--states dataset:PATH` (or teacher, student, mixed) as tyro's subcommand."""
    kept, chosen, options, words = list[str](), list[str](), list[str](), iter(arguments)
    for word in words:
        flag, joined, value = word.partition("=")
        if flag.startswith("--states."):  # belongs behind the subcommand
            options += [word] if joined else [word, next(words, "")]
            continue
        if flag != "--states":
            kept.append(word)
            continue
        kind, _, path = (value if joined else next(words, "")).partition(":")
        if kind not in ("mixed", "student", "teacher", "dataset") or (kind == "dataset") != bool(path):
            raise ValueError(f"--states {kind}: give mixed, student, teacher or dataset:PATH")
        chosen = [f"states:{kind}-states", *(["--states.path", path] if path else [])]
    return [*kept, *chosen, *options]


if __name__ == "__main__":
    with_subcommands = (tyro.conf.CascadeSubcommandArgs,)
    exit_with_one_line(lambda: main(tyro.cli(Args, args=spelt_out(sys.argv[1:]), config=with_subcommands)))
