"""The result of a run: what was lost and gained, as `results.json` and as a table."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from policykd.costs import Costs
from policykd.envs.games import human_normalised_score
from policykd.evaluation import PROTOCOLS, Evaluation
from policykd.statistics import difference_interval, summarise, teacher_normalised_score


def judgement(evaluation: Evaluation) -> dict[str, Any]:
    """Returns every game of one protocol and its statistics, as JSON."""
    return {
        "returns": evaluation.returns,
        "lengths": evaluation.lengths,
        "num_truncated": evaluation.num_truncated,
        **asdict(summarise(evaluation.returns)),
    }


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
                f"{row['num_macs'] / 1e6:.2f} M",
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
