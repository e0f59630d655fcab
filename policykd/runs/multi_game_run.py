"""A distillation run with several games: one student, one teacher per game (Rusu et al., 2015, section 3.2).

The run's folder has the checkpoints and the shared student. Each game has a folder inside it, which is that of an
ordinary run: its own curves, evaluations, results, report, and the student with the outputs of this game alone.
"""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from policykd.agents.card import Provenance, TeacherRecord
from policykd.agents.student import Student, make_student, save_student
from policykd.agents.teacher import Teacher
from policykd.envs.emulators import action_names
from policykd.evaluation.aggregate import geometric_mean
from policykd.evaluation.evaluate import PROTOCOLS, periodic_evaluation
from policykd.evaluation.results import FinalEvaluationOptions
from policykd.evaluation.teacher_check import check_fits, check_teacher
from policykd.io.files import write_atomically
from policykd.io.signals import deferred_signals
from policykd.loop import Round, distill
from policykd.multi_game import (
    Heads,
    MultiGameEnvs,
    MultiGameLoss,
    MultiGameStates,
    MultiGameTeacher,
    separate_heads,
    shared_head,
)
from policykd.runs.config import RESUMABLE_CHANGES, DistillRunConfig, to_settings
from policykd.runs.distill_run import OpenRun, load_distill_teacher, open_run
from policykd.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    Machine,
    RunRecord,
    RunResult,
    check_resumable,
    lengthen_run,
    load_results,
    load_run_config,
    load_started_run,
    write_run_config,
)
from policykd.runs.records import RunLogger
from policykd.storage.checkpoints import restore_checkpoint, save_checkpoint
from policykd.storage.generations import Origin, has_generations
from policykd.train_state import TrainState, make_train_state

ALL_ACTIONS = (
    *("NOOP", "FIRE", "UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPLEFT", "DOWNRIGHT", "DOWNLEFT", "UPFIRE"),
    *("RIGHTFIRE", "LEFTFIRE", "DOWNFIRE", "UPRIGHTFIRE", "UPLEFTFIRE", "DOWNRIGHTFIRE", "DOWNLEFTFIRE"),
)
"""ALE's full action set, in its order"""


@dataclass(frozen=True)
class _Job:
    """Objects that all steps of one run need."""

    opened: OpenRun
    teachers: dict[str, Teacher]
    envs: MultiGameEnvs


def distill_games_run(config: DistillRunConfig) -> dict[str, RunResult]:
    """Distils one teacher per game into one student, and returns the results of each game.

    Everything else is as in `policykd.runs.distill_run.distill_run`.
    """
    with open_run(config) as opened:
        return _run_in_folder(opened)


def _run_in_folder(opened: OpenRun) -> dict[str, RunResult]:
    """Does the steps of a run in order; each of them is skipped or repeated on resume as its result requires."""
    from policykd.envs.atari import make_atari  # emulators and OpenCV

    run, config = opened.folder, opened.config
    games = config.games
    # 1. Load the teachers and start the environments.
    started = load_started_run(run, resume=config.resume)
    refs = [config.teacher] * len(games) if config.teacher == "auto" else config.teacher.split(",")
    # What a run of each game alone would have: its folder is that of one.
    configs = {g: replace(config, game=g, teacher=ref, heads="separate") for g, ref in zip(games, refs, strict=True)}
    records = {game: load_run_config(run / game) for game in games if started and (run / game / CONFIG).is_file()}
    teachers = {game: load_distill_teacher(c, records.get(game), opened.device) for game, c in configs.items()}
    with ExitStack() as stack:
        vectors = {
            game: stack.enter_context(
                closing(make_atari(game, config.num_envs, config.seed, num_workers=opened.threads))
            )
            for game in games
        }
        for game, teacher in teachers.items():
            check_fits(teacher, vectors[game], configs[game].teacher, game)
        envs = MultiGameEnvs(vectors, _heads(config))

        # 2. Resume only what is the same run; a finished one is shown again.
        machine = Machine(device=str(opened.device), threads=opened.threads)
        record = RunRecord(
            subcommand="distill", settings=to_settings(config), machine=machine, teacher=_record_of(teachers)
        )
        if started:
            check_resumable(run, started, record, may_change=RESUMABLE_CHANGES)
            started = lengthen_run(run, started, record)
            if finished := _finished_results(run, config):
                print(summary(finished))
                return finished

        # 3. Check the teachers once per run. Nothing is written before.
        for game, teacher in teachers.items():
            if game not in records:
                check = check_teacher(teacher, game, seed=config.seed, allow_weak=config.allow_weak_teacher)
                warning = f"warning: {game}: the teacher {check.warning}"
                print(warning if check.warning else f"{game}: the teacher plays {check}")
                records[game] = replace(record, teacher=teacher.record, teacher_check=check)
        if started is None:
            write_run_config(run, record)
        for game in games:
            # A resumed run may have been given more rounds.
            write_run_config(run / game, replace(records[game], settings=to_settings(configs[game])))

        # 4. Restore the last checkpoint, train, and log every round.
        job = _Job(opened, teachers, envs)
        state = _make_state(job)
        if has_generations(run / CHECKPOINTS):
            restore_checkpoint(state, run / CHECKPOINTS)
        loggers = {game: stack.enter_context(closing(RunLogger(run / game, state.round))) for game in games}
        _train(job, state, loggers)
        return _finish(job, state, {game: logger.seconds() for game, logger in loggers.items()})


def _heads(config: DistillRunConfig) -> Heads:
    """Returns the outputs of the student that are each game's actions."""
    names = {game: action_names(game) for game in config.games}
    if config.heads == "shared":
        return shared_head(names, ALL_ACTIONS)
    return separate_heads({game: len(actions) for game, actions in names.items()})


def _record_of(teachers: Mapping[str, Teacher]) -> TeacherRecord:
    """Returns the identity of all teachers together; each game's own is in its folder."""
    hashes = "\n".join(f"{game} {teacher.sha256}" for game, teacher in teachers.items())
    return TeacherRecord(
        ref=",".join(teacher.ref for teacher in teachers.values()),
        sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        algorithm=",".join(teacher.algorithm for teacher in teachers.values()),
    )


def _finished_results(run: Path, config: DistillRunConfig) -> dict[str, RunResult]:
    """Returns the results of all games if they are those of the whole run, else an empty dictionary."""
    found: dict[str, RunResult] = {}
    for game in config.games:
        result = load_results(run / game)
        num_updates = config.rounds * config.updates_per_round * len(config.games)
        if not result or (result.num_updates or 0) < num_updates or result.num_episodes < config.eval_episodes:
            return {}
        found[game] = result
    return found


def _make_state(job: _Job) -> TrainState:
    """Returns the training state at the start of the run."""
    config = job.opened.config
    student = make_student(config.student, job.envs.num_actions, seed=config.seed).to(job.opened.device)
    return make_train_state(student, job.envs, config.loop_config(job.opened.threads))


def _train(job: _Job, state: TrainState, loggers: Mapping[str, RunLogger]) -> None:
    """Runs the loop; saves and logs every round, and evaluates every few."""
    run, config = job.opened.folder, job.opened.config
    print(f"{run}: {', '.join(config.games)}; watch it with: tensorboard --logdir {config.folder}")
    loop_config = config.loop_config(job.opened.threads)
    loop_config = replace(loop_config, states=MultiGameStates(loop_config.states, job.envs), temperature=None)
    loss_fn = MultiGameLoss(config.policy_loss, job.envs)
    teacher = MultiGameTeacher(job.teachers, job.envs, temperature=config.temperature)
    _evaluate_if_due(job, state, loggers)
    rounds = distill(teacher, state.student, job.envs, loop_config, loss_fn=loss_fn, state=state)
    with tqdm(rounds, total=config.rounds, initial=state.round, unit="round", desc="+".join(config.games)) as bar:
        for r in bar:
            with deferred_signals():  # so that logs and checkpoint belong to the same round
                for game, logger in loggers.items():
                    logger.add_round(game_round(r, game, job.envs), teacher.temperature)
                save_checkpoint(state, run / CHECKPOINTS, Origin(source=f"the run {run.absolute().name}"))
            _evaluate_if_due(job, state, loggers)
            bar.set_postfix_str(", ".join(f"{game} kl={r.train[f'{game}/kl']:.4f}" for game in config.games))


def game_round(r: Round, game: str, envs: MultiGameEnvs) -> Round:
    """Returns a round as that of one game: its metrics, its episodes and its states."""
    rows = envs.rows[game]
    episodes = [replace(e, env=e.env - rows.start) for e in r.collected.episodes if rows.start <= e.env < rows.stop]
    prefix = f"{game}/"
    common = ("loss", "grad_norm", "num_skipped")

    def of_game(metrics: dict[str, float]) -> dict[str, float]:
        own = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
        return {name: metrics[name] for name in common if name in metrics} | own

    return replace(
        r,
        num_states=r.num_states // len(envs.games),
        train=of_game(r.train),
        new_states=of_game(r.new_states),
        student_return=None,  # of all games together
        collected=replace(r.collected, episodes=episodes),
    )


def _evaluate_if_due(job: _Job, state: TrainState, loggers: Mapping[str, RunLogger]) -> None:
    """Plays and logs games of the student every `eval_every` rounds."""
    config = job.opened.config
    if not config.eval_every or not state.round or state.round % config.eval_every:
        return
    for game, logger in loggers.items():
        # A resumed run may be past this evaluation already.
        if not logger.has_evaluation(state.num_updates):
            student = _student_of(state, game, job.envs)
            games = periodic_evaluation(student, game, seed=config.seed, num_workers=job.opened.threads)
            logger.add_evaluation(games, job.teachers[game].reported_return)


def _student_of(state: TrainState, game: str, envs: MultiGameEnvs) -> Student:
    """Returns the student with the outputs of one game."""
    assert isinstance(state.student, Student)
    return state.student.with_outputs(envs.heads[game])


def _finish(job: _Job, state: TrainState, seconds: Mapping[str, dict[str, float]]) -> dict[str, RunResult]:
    """Saves the students, plays the final games of every game, and writes its results and report."""
    from policykd.runs.finish import TrainingCost, finish_run

    run, config = job.opened.folder, job.opened.config
    assert isinstance(state.student, Student)
    save_student(
        state.student, run, Provenance(game=config.game, teacher=_record_of(job.teachers)), heads=job.envs.heads
    )
    options = FinalEvaluationOptions(num_episodes=config.eval_episodes, seed=config.seed, threads=job.opened.threads)
    results: dict[str, RunResult] = {}
    for game, teacher in job.teachers.items():
        num_states = state.replay.num_states // len(config.games)
        cost = TrainingCost(num_states, state.num_updates, seconds[game])
        student = _student_of(state, game, job.envs)
        results[game] = finish_run(run / game, student, teacher, game, cost, options)
    write_atomically(run / "results.md", summary(results).encode())
    print(f"\n{summary(results)}\n{run}/ holds the student of all games, {run}/GAME/ each game's report")
    return results


def summary(results: Mapping[str, RunResult]) -> str:
    """Returns a Markdown table of the games, with the geometric mean of the teacher's score that the student keeps."""
    lines = [
        "| | student / teacher, no-op starts, sampled | kept | student / teacher, sticky 0.25, greedy | kept |",
        "|---|---:|---:|---:|---:|",
    ]
    kept: dict[str, list[float]] = {protocol: [] for protocol in PROTOCOLS}
    for game, result in results.items():
        cells = [game]
        for protocol in PROTOCOLS:
            share = result.comparison[protocol].teacher_normalised
            cells.append(
                f"{result.student.protocols[protocol].mean:.2f} / {result.teacher.protocols[protocol].mean:.2f}"
            )
            cells.append("-" if share is None else f"{share:.1%}")
            kept[protocol].append(0.0 if share is None else share)
        lines.append("| " + " | ".join(cells) + " |")
    noop, sticky = (_geometric_mean(kept[protocol]) for protocol in PROTOCOLS)
    lines.append(f"| geometric mean | | {noop} | | {sticky} |")
    return "\n".join(lines) + "\n"


def _geometric_mean(shares: list[float]) -> str:
    """Returns the geometric mean in per cent, or a dash where it is not defined."""
    return f"{geometric_mean(np.array([shares])):.1%}" if min(shares) > 0.0 else "-"
