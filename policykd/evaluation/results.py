"""Typed results of evaluations: episodes, costs and the comparison of a student with its teacher.

`FinalEvaluation` is what `results.json` holds of teacher, student and random play; `policykd.io.typed` reads and writes
it.
"""

import hashlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

from policykd.agents.card import CardProtocol
from policykd.agents.policy import Policy
from policykd.agents.student import Student, packed_weights
from policykd.agents.teacher import Teacher
from policykd.envs.games import human_normalised_score
from policykd.evaluation.costs import Costs, measure_costs
from policykd.evaluation.evaluate import (
    PROTOCOLS,
    AtariOptions,
    Evaluation,
    ProtocolName,
    RandomPolicy,
    evaluate_on_atari,
    sampling_temperature,
)
from policykd.evaluation.statistics import Summary, difference_interval, summarise, teacher_normalised_score
from policykd.io.files import write_atomically
from policykd.io.signals import check_interrupted
from policykd.io.typed import read_json, to_json

NUM_TIMED_OBSERVATIONS = 8
"""first frames of so many games are what the networks are timed on"""
NUM_RANDOM_EPISODES = 32
"""enough for the mean of random play, whose returns vary little"""

PolicyRole = Literal["teacher", "student", "random"]


@dataclass(frozen=True, kw_only=True)
class ProtocolResult(Summary):
    """Every episode of one policy under one protocol, and the statistics of their returns."""

    returns: tuple[float, ...]
    """episodic returns, unclipped"""
    lengths: tuple[int, ...] = ()
    """agent steps; empty in cards that do not record them"""
    num_truncated: int = 0
    """episodes that a time limit ended"""
    num_unfinished: int = 0
    """episodes that were cut off; they are in no statistic"""


@dataclass(frozen=True, kw_only=True)
class PolicyResult(Costs):
    """Costs and episodes of one policy."""

    protocols: dict[ProtocolName, ProtocolResult]


@dataclass(frozen=True, kw_only=True)
class StudentVsTeacher:
    """Difference between a student and its teacher under one protocol."""

    difference_to_teacher: float
    """mean return of the student minus the teacher's"""
    difference_interval: tuple[float, float]
    """95 % bootstrap interval of that difference"""
    teacher_normalised: float | None
    """(student - random) / (teacher - random); None if the teacher is no better than random play"""
    human_normalised: float | None
    """(student - random) / (human - random); None for a game outside the table"""


@dataclass(frozen=True, kw_only=True)
class FinalEvaluation:
    """Costs and episodes of teacher, student and random play, and the comparison under each protocol."""

    teacher: PolicyResult
    student: PolicyResult
    random: PolicyResult
    comparison: dict[ProtocolName, StudentVsTeacher]
    evaluation_seconds: float = 0.0
    """seconds that the games took, in whichever process they were played"""


@dataclass(frozen=True, kw_only=True)
class FinalEvaluationOptions:
    """Settings of `final_evaluation`."""

    num_episodes: int = 50
    """full episodes per protocol, for the student and for a teacher whose card has none"""
    seed: int = 0
    threads: int = 1
    """protocols played in parallel, each with an emulator process of its own; the games are the same"""


def final_evaluation(
    student: Student,
    teacher: Teacher,
    game: str,
    games_file: Path,
    options: FinalEvaluationOptions = FinalEvaluationOptions(),
) -> FinalEvaluation:
    """Plays the final games of student, teacher and random play under every protocol, and measures the networks' costs.

    The teacher's games come from its card where that has them: they were played with this very archive. Finished games
    are kept in `games_file` (`final_eval.json` of a run), so that an interrupted evaluation does not play them again.
    The student is left in evaluation mode.

    Raises:
        BadFile: `games_file` is damaged.
        KeyboardInterrupt: a signal was received.
    """
    student.eval()  # here, not per game: the games are played in threads
    sha256 = hashlib.sha256(packed_weights(student)).hexdigest()
    # The hash of the weights identifies the student's games in the file: after more training it is another.
    on_card = protocols_of_card(teacher)
    random = RandomPolicy(student.shape.num_actions)
    finished = FinishedGames(games_file)
    n = options.num_episodes
    # Policy, hash, episodes and seed. The longest games come first, so that no thread ends up alone with them. The
    # teacher has another seed than the student, or both would play the same starts and not be independent.
    players: dict[PolicyRole, tuple[Policy, str, int, int]] = {
        "student": (student, sha256, n, options.seed),
        "teacher": (teacher, teacher.sha256, n, options.seed + 1),
        "random": (random, "random", min(n, NUM_RANDOM_EPISODES), options.seed),
    }
    found: dict[PolicyRole, dict[ProtocolName, ProtocolResult]] = {"teacher": on_card, "student": {}, "random": {}}
    playing: dict[tuple[PolicyRole, ProtocolName], Future[Evaluation]] = {}
    with ThreadPoolExecutor(options.threads) as pool:
        for role, (policy, key, num_episodes, seed) in players.items():
            for protocol in PROTOCOLS:
                if protocol not in found[role]:
                    playing[role, protocol] = pool.submit(
                        finished.play, policy, key, game, protocol, num_episodes, seed=seed
                    )
        try:
            for (role, protocol), games in playing.items():
                found[role][protocol] = summarise_episodes(games.result())
        except BaseException:  # an interrupt too: what has not started need not start
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    from policykd.envs.atari import make_atari

    # After the games, when no emulator competes for the CPU.
    with closing(make_atari(game, NUM_TIMED_OBSERVATIONS, options.seed)) as envs:
        costs = measure_costs({"teacher": teacher.net, "student": student}, envs.reset())
    rows = {
        role: PolicyResult(protocols=protocols, **vars(costs.get(role, Costs()))) for role, protocols in found.items()
    }
    return FinalEvaluation(
        teacher=rows["teacher"],
        student=rows["student"],
        random=rows["random"],
        comparison=compare_with_teacher(rows["student"], rows["teacher"], rows["random"], game),
        evaluation_seconds=finished.seconds,
    )


@dataclass(frozen=True, kw_only=True)
class _StoredGames(Evaluation):
    seconds: float


class FinishedGames:
    """Finished games, kept in a file: an evaluation that was interrupted continues after them."""

    def __init__(self, path: Path) -> None:
        """Reads the games that the file holds already.

        Raises:
            BadFile: not such a file.
        """
        self.path = path
        self.seconds = 0.0
        """seconds that the games returned by `play` took, in whichever process they were played"""
        self._writing = Lock()
        self._rows: dict[str, _StoredGames] = {}
        if path.is_file():
            next_step = "remove it, its games are then played again"
            self._rows = read_json(dict[str, _StoredGames], path, next_step=next_step)

    def play(
        self, policy: Policy, sha256: str, game: str, protocol: ProtocolName, num_episodes: int, *, seed: int
    ) -> Evaluation:
        """Returns full games of a policy whose weights have this `sha256`: stored ones, else new ones."""
        check_interrupted()
        # Everything that the games depend on.
        key = " ".join(map(str, (sha256, game, protocol, num_episodes, seed, sampling_temperature(policy))))
        if key not in self._rows:
            print(f"playing {num_episodes} games, {protocol} ...", flush=True)
            started = time.perf_counter()
            games = evaluate_on_atari(
                policy, game, protocol, num_episodes, seed=seed, options=AtariOptions(num_workers=1)
            )
            stored = _StoredGames(**vars(games), seconds=time.perf_counter() - started)
            # Written after every protocol: at most one is lost when the process is killed.
            with self._writing:
                self._rows[key] = stored
                write_atomically(self.path, to_json(self._rows, indent=None))
        stored = self._rows[key]
        with self._writing:
            self.seconds += stored.seconds
        return stored


def summarise_episodes(games: Evaluation | CardProtocol) -> ProtocolResult:
    """Returns every episode, played now or recorded on a teacher's card, with the statistics of the returns.

    Raises:
        ValueError: no finished episode.
    """
    return ProtocolResult(
        returns=games.returns,
        lengths=games.lengths,
        num_truncated=games.num_truncated,
        num_unfinished=games.num_unfinished,
        **vars(summarise(games.returns)),
    )


def protocols_of_card(teacher: Teacher) -> dict[ProtocolName, ProtocolResult]:
    """Returns the games on a teacher's card by protocol, with statistics computed from the returns themselves."""
    games = teacher.card.protocols
    return {protocol: summarise_episodes(games[protocol]) for protocol in PROTOCOLS if protocol in games}


def compare_with_teacher(
    student: PolicyResult, teacher: PolicyResult, random: PolicyResult, game: str
) -> dict[ProtocolName, StudentVsTeacher]:
    """Returns, for each protocol, the difference in return with its interval and the normalised scores."""
    compared: dict[ProtocolName, StudentVsTeacher] = {}
    for protocol in PROTOCOLS:
        ours = student.protocols[protocol]
        theirs = teacher.protocols[protocol]
        # The interval of the difference, not the difference of two intervals: it is narrower.
        difference, low, high = difference_interval(ours.returns, theirs.returns)
        compared[protocol] = StudentVsTeacher(
            difference_to_teacher=difference,
            difference_interval=(low, high),
            teacher_normalised=teacher_normalised_score(ours.mean, theirs.mean, random.protocols[protocol].mean),
            human_normalised=human_normalised_score(game, ours.mean),
        )
    return compared


def results_table(results: FinalEvaluation) -> str:
    """Returns the results as Markdown: one row per policy, then the difference under each protocol."""
    lines = [
        "| | parameters | MACs | float32 bytes | batch-1 latency | no-op starts, sampled | sticky 0.25, greedy |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for role, row in (("teacher", results.teacher), ("student", results.student), ("random", results.random)):
        scores = [_score_cell(row.protocols[protocol]) for protocol in PROTOCOLS]
        lines.append("| " + " | ".join((role, *_cost_cells(row), *scores)) + " |")
    for protocol, compared in results.comparison.items():
        low, high = compared.difference_interval
        line = f"\n{protocol}: student minus teacher {compared.difference_to_teacher:+.2f} [{low:+.2f}, {high:+.2f}]"
        if compared.teacher_normalised is not None:
            line += f"; {compared.teacher_normalised:.1%} of the teacher's score"
        lines.append(line)
    return "\n".join(lines)


def _cost_cells(row: PolicyResult) -> tuple[str, str, str, str]:
    if not row.num_parameters:  # random play
        return "-", "-", "-", "-"
    latency = f"{row.latency_microseconds:.0f} us"
    if row.latency_min_microseconds:
        latency += f" (min {row.latency_min_microseconds:.0f})"
    macs = f"{row.num_macs / 1e6:.2f} M" if row.num_macs else "-"
    return f"{row.num_parameters:,}", macs, f"{row.num_bytes / 1e3:,.0f} kB", latency


def _score_cell(result: ProtocolResult) -> str:
    low, high = result.interval
    return f"{result.mean:.2f} [{low:.2f}, {high:.2f}] ({result.num_distinct} distinct of {result.num_episodes})"
