# ruff: noqa: D103
"""The old, untyped names; deleted as soon as no module imports them."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from policykd.agents.teacher import Teacher


def about(teacher: Teacher) -> dict[str, str]:
    where = {"ref": teacher.ref, "revision": teacher.revision}
    return {"algorithm": teacher.algorithm, "file": teacher.path.name, **where, "sha256": teacher.sha256}


def judgement(evaluation: Any) -> dict[str, Any]:
    from policykd.evaluation.results import summarise_episodes

    return asdict(summarise_episodes(evaluation))


def judgement_of_card(protocol: Mapping[str, Any]) -> dict[str, Any]:
    from policykd.evaluation.statistics import summarise

    games = {key: protocol[key] for key in ("returns", "lengths", "num_truncated", "num_unfinished") if key in protocol}
    return {**games, **asdict(summarise(protocol["returns"]))}


def entry(costs: Any, protocols: Mapping[str, Any]) -> dict[str, Any]:
    from policykd.evaluation.costs import Costs

    return {**asdict(costs or Costs()), "protocols": protocols}


def comparison(results: Mapping[str, Any], game: str) -> dict[str, dict[str, Any]]:
    from policykd.evaluation.results import compare_with_teacher

    rows = _typed({**results, "comparison": {}})
    return {k: asdict(v) for k, v in compare_with_teacher(rows.student, rows.teacher, rows.random, game).items()}


def table(results: Mapping[str, Any]) -> str:
    from policykd.evaluation.results import results_table

    return results_table(_typed(results))


def _typed(results: Mapping[str, Any]) -> Any:
    from pydantic import TypeAdapter

    from policykd.evaluation.results import FinalEvaluation

    return TypeAdapter(FinalEvaluation).validate_python(dict(results))


def judge(student: Any, teacher: Any, game: str, num_episodes: int, seed: int, device: Any, **how: Any) -> Any:
    from policykd.evaluation.results import FinalEvaluationOptions, final_evaluation

    options = FinalEvaluationOptions(num_episodes=num_episodes, seed=seed, threads=how.get("threads", 1))
    found = final_evaluation(student, teacher, game, how["done"], options)
    rows = asdict(found)
    return rows, rows.pop("evaluation_seconds")


def evaluate_on_the_way(
    student: Any, records: Any, game: str, teacher: Teacher, seed: int, device: Any, threads: int
) -> None:
    from policykd.evaluation.evaluate import periodic_evaluation

    games = periodic_evaluation(student, game, seed=seed, num_workers=threads)
    of_teacher = teacher.reported_return
    against = {
        "teacher_mean_reward": of_teacher,
        "score_vs_teacher": None if of_teacher is None else games.mean_return - of_teacher,
    }
    records.add_evaluation(games.returns, games.lengths, against)
