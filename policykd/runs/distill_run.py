"""A whole distillation run: teacher, training, evaluations, checkpoints, results, report.

`distill_run` is what `policykd distill` does. It reads top to bottom; the training itself is `policykd.loop.distill`.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from policykd.agents.student import Student, make_student
from policykd.agents.teacher import Teacher
from policykd.envs.games import canonical_names
from policykd.envs.vector import VectorEnv
from policykd.evaluation.evaluate import NUM_PERIODIC_EPISODES, derived_seed, periodic_evaluation
from policykd.evaluation.results import FinalEvaluationOptions, FinishedGames
from policykd.evaluation.statistics import teacher_normalised_score
from policykd.evaluation.teacher_check import TeacherCheck, check_fits, check_teacher
from policykd.io.files import BadFile, lock_folder
from policykd.io.machine import prepare_device
from policykd.io.signals import deferred_signals
from policykd.loop import Round, distill
from policykd.losses import LogitHuber, LogitMSE, LossFn
from policykd.runs.budget import StageResult, Stop, decide
from policykd.runs.config import RESUMABLE_CHANGES, DistillRunConfig, check_config, depends_on_return, to_settings
from policykd.runs.folder import (
    CHECKPOINTS,
    FINAL_EVALUATION,
    Machine,
    RunRecord,
    RunResult,
    check_resumable,
    lengthen_run,
    load_results,
    load_run_teacher,
    load_started_run,
    resume_command,
    write_run_config,
)
from policykd.runs.records import EVALUATIONS, RunLogger
from policykd.states import BlendedStates, DatasetStates
from policykd.storage.checkpoints import restore_checkpoint, save_checkpoint
from policykd.storage.generations import Origin, TeacherRef, has_generations
from policykd.train_state import TrainState, make_train_state

NUM_STAGE_EPISODES = 32
"""episodes that decide whether a run with a budget continues"""


@dataclass(frozen=True)
class _Job:
    """Objects that all steps of one run need."""

    run: Path
    """the run's folder"""
    config: DistillRunConfig
    device: torch.device
    threads: int
    teacher: Teacher
    envs: VectorEnv


def distill_run(config: DistillRunConfig) -> RunResult:
    """Distils a teacher into a student, from the teacher's reference to the report, and returns the results.

    The run has a folder, `run_folder(config)`. With `config.resume` an interrupted run continues from its last
    checkpoint, with the same bits as without the interruption; a finished one returns its results.

    Raises:
        ValueError: invalid settings, or other ones than those of the run to resume.
        BadFile: a teacher or a file of the run that is damaged, or a teacher that is no better than a random policy.
        OSError: disk, network or permissions, or another process works in the folder.
        FloatingPointError: too many teacher outputs or updates are not finite.
        KeyboardInterrupt: SIGINT or SIGTERM; the message names the command that resumes the run.
    """
    if len(config.games) > 1:
        raise ValueError(f"game {config.game}: several; call policykd.runs.multi_game_run.distill_games_run")
    with open_run(config) as opened:
        return _run_in_folder(opened)


@dataclass(frozen=True)
class OpenRun:
    """A run whose settings are checked and whose folder is locked."""

    folder: Path
    config: DistillRunConfig
    device: torch.device
    threads: int


@contextmanager
def open_run(config: DistillRunConfig) -> Iterator[OpenRun]:
    """Checks a run's settings and locks its folder; errors inside name the folder or the command that resumes it.

    Raises:
        ValueError: invalid settings.
        OSError: another process works in the folder.
    """
    # Everything that can be refused without reading a file is refused first.
    config = replace(config, game=",".join(canonical_names(config.game)))
    check_config(config)
    device = prepare_device(config.device, config.threads)
    check_device(config, device)
    run = run_folder(config)
    threads = torch.get_num_threads()
    # The lock also keeps `policykd resume` out of a run that is still in progress.
    with lock_folder(run):
        # The trainer's own threads share each batch instead of torch's.
        torch.set_num_threads(1)
        try:
            yield OpenRun(run, config, device, threads)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; the rounds before it are saved in {run}") from error
        except KeyboardInterrupt:
            advice = f"what was finished is saved; resume with: {resume_command(run)}"
            raise KeyboardInterrupt(advice) from None
        finally:
            torch.set_num_threads(threads)


def run_folder(config: DistillRunConfig) -> Path:
    """Returns the folder of a run; without a name, one made of the student's size, the seed and the time."""
    name = f"{config.student.replace('%', 'pct')}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(config.folder) / ",".join(config.games) / (config.name or name)


def check_device(config: DistillRunConfig, device: torch.device) -> None:
    """Raises ValueError for settings that this device does not support, or only ten times more slowly."""
    if config.cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda-graph needs --device cuda, this is {device}; leave it out")
    if config.bf16 and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        raise ValueError("--bf16: this CPU has no bfloat16 arithmetic and would take ten times as long; leave it out")


def _run_in_folder(opened: OpenRun) -> RunResult:
    """Does the steps of a run in order; each of them is skipped or repeated on resume as its result requires."""
    # Emulators, OpenCV and the report: not before the settings are checked.
    from policykd.envs.atari import make_atari
    from policykd.runs.finish import TrainingCost, finish_run

    run, config, device, threads = opened.folder, opened.config, opened.device, opened.threads
    # 1. Load the teacher and start the environments.
    started = load_started_run(run, resume=config.resume)
    teacher = load_distill_teacher(config, started, device)
    # An offline run never steps its environment: it only has the shapes of observations and actions.
    num_envs = 1 if config.is_offline else config.num_envs
    num_workers = 0 if config.is_offline else threads
    with closing(make_atari(config.game, num_envs, config.seed, num_workers=num_workers)) as envs:
        check_fits(teacher, envs, config.teacher, config.game)
        job = _Job(run, config, device, threads, teacher, envs)

        # 2. Resume only what is the same run; a finished one is shown again.
        record = _record(job)
        if started:
            # Evaluations may move to other rounds, unless a schedule follows the returns that they measure.
            may_change = RESUMABLE_CHANGES - ({"eval_every"} if depends_on_return(config) else set())
            check_resumable(run, started, record, may_change=may_change)
            started = lengthen_run(run, started, record)
            result = load_results(run)
            if result and _has_ended(result, config) and result.num_episodes >= config.eval_episodes:
                print(result.summary())
                return result

        # 3. Check the teacher once per run. Nothing is written before: a wrong archive leaves no folder.
        check = started.teacher_check if started else None
        check = check or check_teacher(teacher, config.game, seed=config.seed, allow_weak=config.allow_weak_teacher)
        state, loss_fn = _make_state(job, check)
        if config.budget != "none":
            state.teacher_return = _teacher_return(job, state)
        if started is None:
            print(f"warning: the teacher {check.warning}" if check.warning else f"the teacher plays {check}")
            write_run_config(run, replace(record, teacher_check=check))

        # 4. Restore the last checkpoint, train, and log every round.
        if state.replay.num_preloaded:
            from policykd.storage.dataset import label

            label(state.replay, teacher)
        if has_generations(run / CHECKPOINTS):
            restore_checkpoint(state, run / CHECKPOINTS)
        elif started:
            print(f"warning: {run}: no checkpoint yet; the run starts from the beginning", file=sys.stderr)
        with closing(RunLogger(run, state.round)) as logger:
            stop = _train(job, state, loss_fn, logger)
            seconds = logger.seconds()

        # 5. Save the student, play the final games, write the results and the report.
        cost = TrainingCost(state.replay.num_states, state.num_updates, seconds, stop)
        options = FinalEvaluationOptions(num_episodes=config.eval_episodes, seed=config.seed, threads=threads)
        assert isinstance(state.student, Student)
        return finish_run(run, state.student, teacher, config.game, cost, options)


def load_distill_teacher(config: DistillRunConfig, started: RunRecord | None, device: torch.device) -> Teacher:
    """Returns the teacher on the device, with the fastest backend that is installed; from the Hub, at one commit."""
    from policykd.envs.atari import make_atari
    from policykd.export.compiled import compile_policy

    teacher = load_run_teacher(config, started, config.game, config.seed)
    # One real frame, on which the compiled network is compared with torch's.
    with closing(make_atari(config.game, 1, config.seed)) as envs:
        return compile_policy(teacher.to(device), envs.reset().to(device))


def _record(job: _Job) -> RunRecord:
    """Returns what identifies the run, but for the check of its teacher."""
    # A dataset can change between start and resume just as the teacher can, so its hash is part of the run.
    inputs: dict[str, str] = {}
    if isinstance(job.config.states, DatasetStates | BlendedStates):
        from policykd.storage.dataset import open_dataset

        inputs["dataset"] = open_dataset(job.config.states.path).sha256
    return RunRecord(
        subcommand="distill",
        settings=to_settings(job.config),
        machine=Machine(device=str(job.device), threads=job.threads, teacher_backend=job.teacher.backend),
        teacher=job.teacher.record,
        inputs=inputs,
    )


def _make_state(job: _Job, check: TeacherCheck) -> tuple[TrainState, LossFn]:
    """Returns the training state at the start of the run, and its loss function."""
    config = job.config
    teacher = job.teacher
    # The student's seed makes its first weights; the value head is there only if something trains it.
    student = make_student(
        config.student,
        job.envs.num_actions,
        seed=config.seed,
        value="value" in config.auxiliary.active,
        temperature=student_temperature(config, teacher),
    ).to(job.device)
    # The loss before the optimizer: auxiliary losses have weights of their own to train.
    loss_fn: LossFn = config.policy_loss
    if config.auxiliary.active:
        from policykd.methods.auxiliary import AuxiliaryLosses

        loss_fn = AuxiliaryLosses(config.policy_loss, config.auxiliary, student, teacher, seed=config.seed)
    # A dataset to start with, with room for the states that the run adds: buffers are allocated once.
    replay = None
    if isinstance(config.states, DatasetStates | BlendedStates):
        from policykd.storage.dataset import open_replay

        room = 0 if config.is_offline else config.rounds * config.states_per_round
        replay = open_replay(config.states, teacher, config.game, room=room).to(job.device)
    state = make_train_state(student, job.envs, config.loop_config(job.threads), loss_fn=loss_fn, replay=replay)
    # The two ends of the scale on which schedules see the student's return.
    state.teacher_return, state.random_return = check.goal(config.game)
    if depends_on_return(config):
        _ = state.progress(0.0).return_progress  # raises ValueError if the teacher's return is not known
    return state, loss_fn


def _teacher_return(job: _Job, state: TrainState) -> float:
    """Returns the return that a run with a budget aims at: the reported one, else that of games played once per run."""
    teacher_return = state.teacher_return
    if teacher_return is None:
        games = FinishedGames(job.run / FINAL_EVALUATION)
        teacher_return = games.play(
            job.teacher,
            job.teacher.sha256,
            job.config.game,
            "noop_sampled",
            NUM_STAGE_EPISODES,
            seed=derived_seed(job.config.seed, 3),
        ).mean_return
    if teacher_return <= state.random_return:
        raise ValueError(
            f"--budget {job.config.budget}: the teacher's return {teacher_return:.2f} is no better than a random"
            f" policy's {state.random_return:.2f}; give --budget none"
        )
    return teacher_return


def student_temperature(config: DistillRunConfig, teacher: Teacher) -> float:
    """Returns the divisor of the student's outputs that gives logits.

    A student that regresses on Q-values has outputs in their units, and plays them with the loss's temperature.
    """
    if not isinstance(config.loss, LogitMSE | LogitHuber):
        return 1.0
    return config.loss.temperature or config.temperature or teacher.temperature


def _has_ended(result: RunResult, config: DistillRunConfig) -> bool:
    """Returns whether a run's results are those of the whole budget, which may have grown since."""
    if result.stop:
        return result.stop.budget == config.budget
    return (result.num_updates or 0) >= config.stage_ends[-1] * config.updates_per_round


def _train(job: _Job, state: TrainState, loss_fn: LossFn, logger: RunLogger) -> Stop | None:
    """Trains stage by stage until the rule of the budget ends the run, and returns the reason; one stage without it."""
    config = job.config
    print(
        f"{job.run}: {config.game} from {job.teacher.algorithm} {job.teacher.ref}; watch it with: tensorboard --logdir"
        f" {config.folder}"
    )
    for number, end in enumerate(config.stage_ends, start=1):
        # A resumed run may be past this stage: then the rule has let it continue.
        if state.round <= end:
            _train_stage(job, state, loss_fn, logger, end)
            if config.budget != "none":
                stages = [_stage_result(job, state, logger, n) for n in config.stage_ends[:number]]
                if stop := decide(stages, config.budget, config.rounds):
                    return stop
    return None


def _stage_result(job: _Job, state: TrainState, logger: RunLogger, num_rounds: int) -> StageResult:
    """Returns how the student played after a number of rounds; the present student plays now if it has not yet."""
    num_updates = num_rounds * job.config.updates_per_round
    if not logger.has_evaluation(num_updates):
        if num_rounds != state.round:
            raise BadFile(
                f"{job.run / EVALUATIONS}: lacks the evaluation after {num_rounds} rounds, by which the budget is"
                " decided; start a new run under another --name"
            )
        _evaluate(job, state, logger)
    returns = logger.evaluation_returns(num_updates)
    assert state.teacher_return is not None  # `_teacher_return` has set it, above that of random play
    score = teacher_normalised_score(sum(returns) / len(returns), state.teacher_return, state.random_return)
    assert score is not None
    return StageResult(score, logger.round_metric(num_rounds, "new_kl"))


def _train_stage(job: _Job, state: TrainState, loss_fn: LossFn, logger: RunLogger, end: int) -> None:
    """Runs the loop up to a number of rounds; saves and logs every round, and evaluates every few."""
    config = job.config
    teacher_ref = TeacherRef(algorithm=job.teacher.algorithm, sha256=job.teacher.sha256)
    origin = Origin(source=f"the run {job.run.absolute().name}", game=config.game, teacher=teacher_ref)
    temperature = config.temperature or job.teacher.temperature
    # A run that was stopped between a checkpoint and its evaluation evaluates first.
    _evaluate_if_due(job, state, logger)
    # All training happens in this loop; a round is the unit that is logged, saved and repeated after a crash.
    loop_config = config.loop_config(job.threads, rounds=end)
    rounds = distill(job.teacher, state.student, job.envs, loop_config, loss_fn=loss_fn, state=state)
    with tqdm(rounds, total=end, initial=state.round, unit="round", desc=config.game) as bar:
        for r in bar:
            with deferred_signals():  # so that logs and checkpoint belong to the same round
                logger.add_round(r, temperature)
                save_checkpoint(state, job.run / CHECKPOINTS, origin)
            _evaluate_if_due(job, state, logger)
            bar.set_postfix_str(_progress_line(r))


def _evaluate_if_due(job: _Job, state: TrainState, logger: RunLogger) -> None:
    """Evaluates the student every `eval_every` rounds; schedules may follow these returns."""
    config = job.config
    is_due = config.eval_every and state.round and state.round % config.eval_every == 0
    if not is_due or config.budget != "none":
        return
    # A resumed run may be past this evaluation already, and a schedule still needs its returns.
    if not logger.has_evaluation(state.num_updates):
        _evaluate(job, state, logger)
    state.student_returns = logger.evaluation_returns(state.num_updates)


def _evaluate(job: _Job, state: TrainState, logger: RunLogger) -> None:
    """Plays and logs games of the student; those that decide whether a run ends are not those of its final result."""
    assert isinstance(state.student, Student)
    config = job.config
    is_stage = config.budget != "none"
    evaluation = periodic_evaluation(
        state.student,
        config.game,
        seed=derived_seed(config.seed, 3) if is_stage else config.seed,
        num_episodes=NUM_STAGE_EPISODES if is_stage else NUM_PERIODIC_EPISODES,
        num_workers=job.threads,
    )
    logger.add_evaluation(evaluation, job.teacher.reported_return)


def _progress_line(r: Round) -> str:
    """Returns the measurements that the progress bar shows."""
    episodes = r.collected.episodes
    parts = [f"kl={r.train['kl']:.4f}", f"agree={r.train['action_agreement']:.1%}"]
    parts.append(f"student={r.collected.student_fraction:.0%}")
    if episodes:
        parts.append(f"score={sum(e.episodic_return for e in episodes) / len(episodes):.1f}")
    return ", ".join(parts)
