"""The result of a run: what was lost and gained, as `results.json` and as a table."""

import hashlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from policykd.agents.policy import Policy
from policykd.agents.student import Student, packed_weights
from policykd.agents.teacher import Teacher
from policykd.envs.atari import make_atari
from policykd.envs.games import human_normalised_score
from policykd.evaluation.costs import Costs, measure_costs
from policykd.evaluation.evaluate import PROTOCOLS, Evaluation, ProtocolName, RandomPolicy, evaluate_on_atari
from policykd.evaluation.statistics import difference_interval, summarise, teacher_normalised_score
from policykd.io.files import BadFile, write_atomically
from policykd.io.signals import check_interrupted
from policykd.runs.records import Records

NUM_TIMED = 8
"""games whose first frames the networks are timed on"""


class FinishedGames:
    """Games that a judgement has finished, kept in a file: one that was interrupted goes on behind them."""

    def __init__(self, path: Path) -> None:
        """Reads what is there already.

        Raises:
            BadFile: not what is written here.
        """
        self.path, self.seconds, self._writing = path, 0.0, Lock()
        """time that the games asked for took, whenever they were played"""
        try:
            rows = json.loads(path.read_text()) if path.is_file() else {}
            self._rows = {key: (float(row.pop("seconds")), Evaluation(**row)) for key, row in rows.items()}
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise BadFile(
                f"{path}: not the games of a judgement ({error!r}); remove it, they are played anew"
            ) from error

    def play(
        self,
        policy: Policy,
        sha256: str,
        game: str,
        protocol: ProtocolName,
        num_episodes: int,
        *,
        seed: int,
        temperature: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> Evaluation:
        """Returns whole games of a policy with weights of `sha256`: those kept, or new ones, which are kept."""
        check_interrupted()
        key = " ".join(map(str, (sha256, game, protocol, num_episodes, seed, temperature)))
        if key not in self._rows:
            print(f"playing {num_episodes} games, {protocol} ...", flush=True)
            began = time.perf_counter()
            how: dict[str, Any] = {"seed": seed, "temperature": temperature, "device": device, "num_workers": 1}
            games = evaluate_on_atari(policy, game, protocol, num_episodes, **how)
            with self._writing:
                self._rows[key] = time.perf_counter() - began, games
                rows = {key: {"seconds": seconds, **asdict(games)} for key, (seconds, games) in self._rows.items()}
                write_atomically(self.path, (json.dumps(rows) + "\n").encode())
        seconds, games = self._rows[key]
        with self._writing:
            self.seconds += seconds
        return games


def judge(
    student: Student,
    teacher: Teacher,
    game: str,
    num_episodes: int,
    seed: int,
    device: torch.device,
    *,
    done: Path,
    threads: int = 1,
) -> tuple[dict[str, Any], float]:
    """Returns the results of student, teacher and random play under every protocol, and the seconds of play.

    The teacher's games come from its card where that has them: it says that they were played on this very archive. What
    is finished goes to the file `done`; called with it again, the same games are not played twice. So many `threads`
    play side by side, each with an emulator process; the games are the same.
    """
    student.eval()
    sha256 = hashlib.sha256(packed_weights(student)).hexdigest()
    on_card = teacher.card.get("protocols", {})
    random = RandomPolicy(student.shape.num_actions)
    finished = FinishedGames(done)
    of_student: dict[str, Any] = {"seed": seed, "device": device}
    of_teacher: dict[str, Any] = {"seed": seed + 1, "device": device, "temperature": teacher.temperature}
    results: dict[str, dict[str, Any]] = {"teacher": {}, "student": {}, "random": {}}
    with ThreadPoolExecutor(threads) as pool:
        playing = {}
        for protocol in PROTOCOLS:  # the longest first
            what = game, protocol, num_episodes
            playing["student", protocol] = pool.submit(finished.play, student, sha256, *what, **of_student)
            if protocol in on_card:
                results["teacher"][protocol] = judgement_of_card(on_card[protocol])
            else:
                playing["teacher", protocol] = pool.submit(finished.play, teacher, teacher.sha256, *what, **of_teacher)
        for protocol in PROTOCOLS:
            what = game, protocol, min(num_episodes, 32)
            playing["random", protocol] = pool.submit(finished.play, random, "random", *what, seed=seed)
        try:
            for (who, protocol), games in playing.items():
                results[who][protocol] = judgement(games.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is not begun need not be
            raise
    with closing(make_atari(game, NUM_TIMED, seed)) as envs:
        costs = measure_costs({"teacher": teacher.net, "student": student}, envs.reset())
    rows: dict[str, Any] = {who: entry(costs.get(who), protocols) for who, protocols in results.items()}
    return rows | {"comparison": comparison(rows, game)}, finished.seconds


def judgement(evaluation: Evaluation) -> dict[str, Any]:
    """Returns every game of one protocol and its statistics, as JSON."""
    return {
        "returns": evaluation.returns,
        "lengths": evaluation.lengths,
        "num_truncated": evaluation.num_truncated,
        "num_unfinished": len(evaluation.unfinished),
        **asdict(summarise(evaluation.returns)),
    }


def judgement_of_card(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the games of one protocol of a card, and the statistics of their returns, whatever the card says."""
    games = {key: protocol[key] for key in ("returns", "lengths", "num_truncated", "num_unfinished") if key in protocol}
    return {**games, **asdict(summarise(protocol["returns"]))}


def entry(costs: Costs | None, protocols: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one policy's row of the results; random play costs nothing."""
    return {**asdict(costs or Costs(0, 0, 0, 0.0)), "protocols": protocols}


def comparison(results: Mapping[str, Any], game: str) -> dict[str, dict[str, Any]]:
    """Returns for each protocol what the student lost: difference to the teacher with interval, normalised scores."""
    compared: dict[str, dict[str, Any]] = {}
    for protocol in PROTOCOLS:
        student, teacher, random = (results[who]["protocols"][protocol] for who in ("student", "teacher", "random"))
        difference, low, high = difference_interval(student["returns"], teacher["returns"])
        compared[protocol] = {
            "difference_to_teacher": difference,
            "difference_interval": [low, high],
            "teacher_normalised": teacher_normalised_score(student["mean"], teacher["mean"], random["mean"]),
            "human_normalised": human_normalised_score(game, student["mean"]),
        }
    return compared


def table(results: Mapping[str, Any]) -> str:
    """Returns the result as Markdown: a row a policy, then the difference under each protocol."""
    lines = [
        "| | parameters | MACs | float32 bytes | batch-1 latency | no-op starts, sampled | sticky 0.25, greedy |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for who in ("teacher", "student", "random"):
        row = results[who]
        costs = ("-", "-", "-", "-")
        least = row.get("latency_least_microseconds")
        if row["num_parameters"]:
            costs = (
                f"{row['num_parameters']:,}",
                f"{row['num_macs'] / 1e6:.2f} M" if row["num_macs"] else "-",
                f"{row['num_bytes'] / 1e3:,.0f} kB",
                f"{row['latency_microseconds']:.0f} us" + (f" (least {least:.0f})" if least else ""),
            )
        scores = [_score(row["protocols"][protocol]) for protocol in PROTOCOLS]
        lines.append("| " + " | ".join((who, *costs, *scores)) + " |")
    for protocol, row in results["comparison"].items():
        low, high = row["difference_interval"]
        share = (
            f"; {row['teacher_normalised']:.1%} of the teacher's score" if row["teacher_normalised"] is not None else ""
        )
        lines.append(
            f"\n{protocol}: student minus teacher {row['difference_to_teacher']:+.2f} [{low:+.2f}, {high:+.2f}]{share}"
        )
    return "\n".join(lines)


def _score(protocol: Mapping[str, Any]) -> str:
    low, high = protocol["interval"]
    distinct = f"{protocol['num_distinct']} distinct of {protocol['num_episodes']}"
    return f"{protocol['mean']:.2f} [{low:.2f}, {high:.2f}] ({distinct})"


def about(teacher: Teacher) -> dict[str, str]:
    """Returns which teacher it was."""
    where = {"ref": teacher.ref, "revision": teacher.revision}
    return {"algorithm": teacher.algorithm, "file": teacher.path.name, **where, "sha256": teacher.sha256}


def evaluate_on_the_way(
    student: Student, records: Records, game: str, teacher: Teacher, seed: int, device: torch.device, threads: int
) -> None:
    """Plays 16 games with the student as it stands and writes them down."""
    student.eval()
    evaluation = evaluate_on_atari(student, game, "noop_sampled", 16, seed=seed, device=device, num_workers=threads)
    of_teacher = teacher.reported_return
    mean = sum(evaluation.returns) / len(evaluation.returns)
    against = {"teacher_mean_reward": of_teacher, "score_vs_teacher": None if of_teacher is None else mean - of_teacher}
    records.add_evaluation(evaluation.returns, evaluation.lengths, against)
