"""Distils a trained Stable-Baselines3 Atari agent into a compact student, and says what was lost and gained."""

import json
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from policykd.agents.files import write_atomically
from policykd.agents.student import Size, Student, make_student, save_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.animation import play_to_gif
from policykd.checkpoints import MANIFEST, restore_checkpoint, save_checkpoint
from policykd.command import DeviceName, exit_with_one_line, prepare_device, versions
from policykd.costs import measure_costs
from policykd.distill import Learner, distill, make_learner
from policykd.envs.atari import make_atari
from policykd.envs.games import canonical_name
from policykd.evaluation import PROTOCOLS, RandomPolicy, evaluate_on_atari
from policykd.losses import ActionNLL, ForwardKL, ReverseKL, ScoreMSE
from policykd.records import Records
from policykd.results import comparison, entry, judgement, table
from policykd.schedules import WarmupCosine
from policykd.states import MixedStates, StudentStates, TeacherStates


@dataclass(frozen=True)
class Args:
    """Distils a trained Stable-Baselines3 Atari agent into a compact student, and says what was lost and gained.

    Writes runs/GAME/NAME/ with config.json, TensorBoard curves, metrics.jsonl, evaluations.npz, checkpoints/,
    student.safetensors + student.json, results.json and student.gif.
    """

    game: str
    """Pong, PongNoFrameskip-v4 and ALE/Pong-v5 all mean the same game"""
    teacher: str = "bundled"
    """path of an SB3 PPO, A2C or DQN .zip archive (read without unpickling), or the teacher bundled for the game"""
    student: Size = "7%"
    """size, in per cent of the teacher's NatureCNN: 16-32-32-256, 16-16-16-128, 16-16-16-64 or 8-8-8-32"""
    loss: ForwardKL | ReverseKL | ScoreMSE | ActionNLL = ForwardKL()  # noqa: RUF009
    """what the student minimises; a KL is taken at the teacher's temperature unless it has its own"""
    states: MixedStates | StudentStates | TeacherStates = MixedStates()  # noqa: RUF009
    """whose actions choose the states: handed over from teacher to student (DAgger), the student's, the teacher's"""
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
    teacher = load_teacher(args.teacher, game=game)
    loss = args.loss
    if isinstance(loss, ForwardKL | ReverseKL) and loss.temperature is None:
        loss = replace(loss, temperature=teacher.temperature)
    if isinstance(loss, ScoreMSE) and teacher.algorithm == "DQN":
        raise ValueError(
            "loss:score-mse on a DQN teacher leaves a student whose actions cannot be drawn; use another loss"
        )
    name = args.name or f"{args.student[:-1]}pct-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = args.folder / game / name
    envs = make_atari(game, args.num_envs, args.seed)
    if (teacher.num_actions, teacher.obs_shape) != (envs.num_actions, envs.obs_shape):
        raise ValueError(
            f"{teacher.path}: scores {teacher.num_actions} actions on {teacher.obs_shape}, {game} has"
            f" {envs.num_actions} on {envs.obs_shape}; it is a teacher of another game"
        )
    student = make_student(args.student, envs.num_actions, seed=args.seed)
    learner = make_learner(student, envs, capacity=args.rounds * args.states_per_round, seed=args.seed, device=device)
    if not open_run(run, args, teacher, {"device": str(device), "threads": torch.get_num_threads()}):
        print((run / "results.md").read_text())
        return

    if (run / "checkpoints" / MANIFEST).is_file():
        restore_checkpoint(learner, run / "checkpoints")
    records = Records(run, learner.round)
    print(
        f"{run}: {game} from {teacher.algorithm} {teacher.path.name}; watch it with: tensorboard --logdir {args.folder}"
    )
    rounds = distill(
        teacher.to(device),
        learner,
        loss=loss,
        states=args.states,
        learning_rate=WarmupCosine(args.learning_rate),
        rounds=args.rounds,
        states_per_round=args.states_per_round,
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
        more = [*([] if args.name else ["--name", run.name]), *([] if args.resume else ["--resume"])]
        command = shlex.join([sys.executable, *sys.argv, *more])
        raise KeyboardInterrupt(f"{num_saved} rounds are saved; go on with: {command}") from None
    results |= {
        "num_states_labelled": len(learner.replay),
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
    for flag in ("rounds", "states_per_round", "updates_per_round", "batch_size", "num_envs", "eval_episodes"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(args, flag)}")
    for flag in ("eval_every", "seed"):
        if getattr(args, flag) < 0:
            raise ValueError(f"--{flag.replace('_', '-')} must not be negative, not {getattr(args, flag)}")
    if args.name != Path(args.name).name or args.name in {".", ".."}:
        raise ValueError(f"--name must be the name of a folder, not {args.name!r}; --folder says where it lies")
    if (gigabytes := args.rounds * args.states_per_round * 7.2e-6) > 1000:
        raise ValueError(
            f"--rounds times --states-per-round would take {gigabytes:,.0f} GB of memory; lower one of them"
        )
    if args.states_per_round % args.num_envs:
        raise ValueError(f"--states-per-round {args.states_per_round} is not a multiple of --num-envs {args.num_envs}")
    if not 0.0 < args.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate must be a positive number, not {args.learning_rate}")


def open_run(run: Path, args: Args, teacher: Teacher, machine: dict[str, Any]) -> bool:
    """Makes the run's folder and returns whether there is anything left to do in it.

    On another `machine` (device, threads) or with other versions it goes on with a warning: not bit for bit the same.

    Raises:
        ValueError: a run of that name exists and is not to be resumed, or was started with other settings.
    """
    free = {"device", "threads", "name", "folder", "resume", "eval_episodes"}
    given = {k: v for k, v in vars(args).items() if k not in free}
    settings: dict[str, Any] = {k: v if isinstance(v, int | float | str) else repr(v) for k, v in given.items()}
    settings |= {"game": canonical_name(args.game), "teacher": about(teacher)}
    config = run / "config.json"
    content = {"settings": settings, "command": shlex.join(sys.argv), "versions": versions(), "machine": machine}
    if config.is_file():
        if not args.resume:
            raise ValueError(f"{run}: holds a run already; go on with it by --resume, or give another --name")
        try:
            started = json.loads(config.read_text())
            before, elsewhere = started["settings"], (started["versions"], started["machine"]) != (versions(), machine)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{config}: not what a run writes ({error!r}); give another --name") from error
        changed = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in settings.items() if before.get(k) != v]
        if changed:
            raise ValueError(f"{run}: cannot resume with other settings ({'; '.join(changed)}); give another --name")
        if elsewhere:
            print(f"warning: {config} was written with other versions, threads or device: not bit for bit the same run")
        return not (run / "results.json").is_file()
    if (run / "checkpoints").exists():
        raise ValueError(f"{run}: holds checkpoints but no config.json to tell whose; give another --name")
    write_atomically(config, (json.dumps(content, indent=1) + "\n").encode())
    return True


def about(teacher: Teacher) -> dict[str, str]:
    """Returns which teacher it was."""
    return {"algorithm": teacher.algorithm, "file": teacher.path.name, "sha256": teacher.sha256}


def evaluate_on_the_way(
    learner: Learner, records: Records, game: str, teacher: Teacher, seed: int, device: torch.device
) -> float:
    """Plays 16 games with the student as it stands, writes them down and returns the seconds that it took."""
    began = time.perf_counter()
    learner.student.eval()
    evaluation = evaluate_on_atari(learner.student, game, "noop_sampled", 16, seed=seed, device=device)
    of_teacher = teacher.card.get("protocols", {}).get("noop_sampled", {}).get("mean")
    mean = sum(evaluation.returns) / len(evaluation.returns)
    against = {"teacher_mean_reward": of_teacher, "score_vs_teacher": None if of_teacher is None else mean - of_teacher}
    records.add_evaluation(learner.num_updates, len(learner.replay), evaluation.returns, evaluation.lengths, against)
    return time.perf_counter() - began


def judge(
    student: Student, teacher: Teacher, game: str, num_episodes: int, seed: int, device: torch.device
) -> tuple[dict[str, Any], float]:
    """Returns the results of student, teacher and random play under every protocol, and the seconds it took to play.

    The teacher's games come from its card where that has them: they were played by scripts/evaluate.py on this very
    archive.
    """
    began = time.perf_counter()
    student.eval()
    on_card = teacher.card.get("protocols", {})
    random = RandomPolicy(student.shape.num_actions)
    results: dict[str, Any] = {"teacher": {}, "student": {}, "random": {}}
    for protocol in PROTOCOLS:
        print(f"playing {num_episodes} games, {protocol} ...", flush=True)
        games = evaluate_on_atari(student, game, protocol, num_episodes, seed=seed, device=device)
        results["student"][protocol] = judgement(games)
        if protocol in on_card:
            results["teacher"][protocol] = on_card[protocol]
        else:
            games = evaluate_on_atari(
                teacher, game, protocol, num_episodes, seed=seed + 1, temperature=teacher.temperature, device=device
            )
            results["teacher"][protocol] = judgement(games)
        games = evaluate_on_atari(random, game, protocol, min(num_episodes, 32), seed=seed)
        results["random"][protocol] = judgement(games)
    seconds = time.perf_counter() - began
    costs = {
        "teacher": measure_costs(teacher.net, teacher.obs_shape),
        "student": measure_costs(student, teacher.obs_shape),
    }
    rows: dict[str, Any] = {who: entry(costs.get(who), protocols) for who, protocols in results.items()}
    return rows | {"comparison": comparison(rows, game)}, seconds


if __name__ == "__main__":
    exit_with_one_line(lambda: main(tyro.cli(Args, config=(tyro.conf.CascadeSubcommandArgs,))))
