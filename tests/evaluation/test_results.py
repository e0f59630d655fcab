import json
import os
import signal
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from policykd.agents.networks import num_parameters
from policykd.agents.student import make_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.evaluation.costs import measure_costs
from policykd.evaluation.evaluate import PROTOCOLS, Evaluation, RandomPolicy
from policykd.evaluation.results import (
    FinalEvaluation,
    FinalEvaluationOptions,
    FinishedGames,
    PolicyResult,
    compare_with_teacher,
    final_evaluation,
    protocols_of_card,
    results_table,
    summarise_episodes,
)
from policykd.io.files import BadFile
from policykd.io.signals import handle_signals
from policykd.io.typed import parse_json, to_json


def test_the_table_and_the_comparison() -> None:
    student = make_student("4%", 6)
    obs = torch.zeros((2, 4, 84, 84), dtype=torch.uint8)
    costs = measure_costs({"student": student}, obs)["student"]
    assert costs.num_parameters == num_parameters(student)
    assert costs.num_bytes == 4 * costs.num_parameters
    assert costs.latency_min_microseconds is not None
    assert 1 < costs.latency_min_microseconds <= costs.latency_microseconds

    def row(returns: tuple[float, ...], is_random: bool = False) -> PolicyResult:
        games = summarise_episodes(Evaluation(returns, (9,) * 3))
        return PolicyResult(protocols=dict.fromkeys(PROTOCOLS, games), **({} if is_random else vars(costs)))

    rows = row((10.0, 8.0, 9.0)), row((20.0, 18.0, 19.0)), row((-21.0, -20.0, -21.0), is_random=True)
    results = FinalEvaluation(
        student=rows[0], teacher=rows[1], random=rows[2], comparison=compare_with_teacher(*rows, "Pong")
    )
    for compared in results.comparison.values():
        assert compared.difference_to_teacher == pytest.approx(-10.0)
        assert compared.difference_interval[0] <= -10.0 <= compared.difference_interval[1]
        assert compared.teacher_normalised == pytest.approx((9 + 62 / 3) / (19 + 62 / 3))
        assert compared.human_normalised == pytest.approx((9 + 20.7) / 35.3)
    text = results_table(results)
    assert "| student | 61,174 | 2.13 M | 245 kB |" in text
    assert "| random | - | - |" in text
    assert f" us (min {costs.latency_min_microseconds:.0f}) |" in text
    assert "student minus teacher -10.00" in text
    # What is written is read back, and so is what earlier versions wrote.
    content = to_json(results)
    assert parse_json(FinalEvaluation, content, "results.json") == results
    old = json.loads(content.replace(b"latency_min_", b"latency_least_"))
    assert parse_json(FinalEvaluation, json.dumps(old), "results.json") == results
    for who in ("teacher", "student", "random"):
        del old[who]["latency_least_microseconds"]
    oldest = parse_json(FinalEvaluation, json.dumps(old), "results.json")
    assert f"| {costs.latency_microseconds:.0f} us | 9.00" in results_table(oldest)


def test_teacher_and_student_are_timed_in_turns_on_the_given_observations() -> None:
    """One after the other, a machine that became busy in between would change their ratio."""
    obs = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 4, 84, 84)
    seen: list[tuple[str, int]] = []
    nets = {name: make_student("0.1%", 6).train() for name in ("teacher", "student")}

    def note(name: str) -> Callable[[Any, tuple[torch.Tensor]], None]:
        return lambda _, given: seen.append((name, int(given[0][0, 0, 0, 0])))

    for name, net in nets.items():
        net.register_forward_pre_hook(note(name))
    found = measure_costs(nets, obs)
    assert [(name, len(list(turn))) for name, turn in groupby(seen, lambda call: call[0])][:4] == [
        ("teacher", 50), ("student", 50), ("teacher", 50), ("student", 50),
    ]  # fmt: skip
    assert [number for name, number in seen if name == "student"][:30] == [0, 1, 2] * 10
    assert list(found) == ["teacher", "student"]
    assert not nets["student"].training


def test_a_cards_statistics_are_those_of_its_returns() -> None:
    for protocol, result in protocols_of_card(load_teacher("bundled", game="Pong")).items():
        assert result == summarise_episodes(Evaluation(result.returns, result.lengths, result.num_truncated))
        assert (result.num_episodes, protocol in PROTOCOLS) == (200, True)


def test_an_interrupted_evaluation_continues(tmp_path: Path) -> None:
    """C04: SIGTERM in the second of the student's two games; a finished game is not played again."""
    student = make_student("1%", 4)
    teacher = Teacher(make_student("4%", 4).net, "PPO", Path("a.zip"), "aa")
    num_calls: list[int] = []

    def play(games_file: Path, signal_at: int = 0) -> FinalEvaluation:
        num_calls.append(0)

        def count(*_: object) -> None:
            num_calls[-1] += 1
            if num_calls[-1] == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)  # to the process: this is not the main thread

        hook = student.register_forward_pre_hook(count)
        try:
            return final_evaluation(student, teacher, "Breakout", games_file, FinalEvaluationOptions(num_episodes=1))
        finally:
            hook.remove()

    whole = play(tmp_path / "whole.json")
    assert whole.evaluation_seconds > 0
    first = whole.student.protocols["noop_sampled"].lengths[0]
    with handle_signals(), pytest.raises(KeyboardInterrupt):
        play(tmp_path / "cut.json", signal_at=first + 10)
    assert 1 <= len(json.loads((tmp_path / "cut.json").read_text())) < 6
    again = play(tmp_path / "cut.json")
    for role in ("teacher", "student", "random"):
        assert getattr(again, role).protocols == getattr(whole, role).protocols
    assert again.comparison == whole.comparison
    assert num_calls[0] - num_calls[2] == first


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"seconds": 1}}'])
def test_a_damaged_file_of_games_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "final_eval.json").write_text(content)
    with pytest.raises(BadFile, match=r"final_eval\.json: .*remove it"):
        FinishedGames(tmp_path / "final_eval.json")


def test_games_of_other_weights_are_not_used(tmp_path: Path) -> None:
    games = Evaluation((3.0,), (5,))
    kept = {f"{sha256} Pong noop_sampled 1 0 1.0": {"seconds": 1.0, **vars(games)} for sha256 in ("aa", "bb")}
    (tmp_path / "final_eval.json").write_text(json.dumps(kept))
    finished = FinishedGames(tmp_path / "final_eval.json")
    assert finished.play(RandomPolicy(6), "aa", "Pong", "noop_sampled", 1, seed=0).returns == games.returns
    other = finished.play(RandomPolicy(6), "cc", "Pong", "noop_sampled", 1, seed=0)
    assert other.lengths[0] > 500
