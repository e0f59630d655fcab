"""The result of a run: what was lost and gained, as `results.json` and as a table."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from policykd.agents.student import Student
from policykd.agents.teacher import Teacher
from policykd.costs import Costs, measure_costs
from policykd.envs.games import human_normalised_score
from policykd.evaluation import PROTOCOLS, Evaluation, RandomPolicy, evaluate_on_atari
from policykd.statistics import difference_interval, summarise, teacher_normalised_score


def judge(
    student: Student, teacher: Teacher, game: str, num_episodes: int, seed: int, device: torch.device
) -> tuple[dict[str, Any], float]:
    """Returns the results of student, teacher and random play under every protocol, and the seconds it took to play.

    The teacher's games come from its card where that has them: it says that they were played on this very archive.
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
            results["teacher"][protocol] = judgement_of_card(on_card[protocol])
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


def judgement(evaluation: Evaluation) -> dict[str, Any]:
    """Returns every game of one protocol and its statistics, as JSON."""
    return {
        "returns": evaluation.returns,
        "lengths": evaluation.lengths,
        "num_truncated": evaluation.num_truncated,
        **asdict(summarise(evaluation.returns)),
    }


def judgement_of_card(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the games of one protocol of a card, and the statistics of their returns, whatever the card says."""
    games = {key: protocol[key] for key in ("returns", "lengths", "num_truncated") if key in protocol}
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
        if row["num_parameters"]:
            costs = (
                f"{row['num_parameters']:,}",
                f"{row['num_macs'] / 1e6:.2f} M" if row["num_macs"] else "-",
                f"{row['num_bytes'] / 1e3:,.0f} kB",
                f"{row['latency_microseconds']:.0f} us",
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
