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
from policykd.agents.teacher import Teacher
from policykd.evaluation.costs import measure_costs
from policykd.evaluation.evaluate import PROTOCOLS, Evaluation, RandomPolicy
from policykd.evaluation.results import FinishedGames, comparison, entry, judge, judgement, judgement_of_card, table
from policykd.io.files import BadFile
from policykd.io.signals import noting_signals


def test_the_table_and_the_comparison() -> None:
    student = make_student("4%", 6)
    obs = torch.zeros((2, 4, 84, 84), dtype=torch.uint8)
    costs = measure_costs({"student": student}, obs, rounds=1, calls_per_round=20)["student"]
    assert costs.num_parameters == num_parameters(student)
    assert costs.num_bytes == 4 * costs.num_parameters
    assert costs.latency_least_microseconds is not None
    assert 1 < costs.latency_least_microseconds <= costs.latency_microseconds

    games = {"teacher": [20.0, 18.0, 19.0], "student": [10.0, 8.0, 9.0], "random": [-21.0, -20.0, -21.0]}
    results: dict[str, dict[str, Any]] = {
        who: entry(
            None if who == "random" else costs,
            {p: judgement(Evaluation(returns, [9] * 3, 0)) for p in ("noop_sampled", "sticky_greedy")},
        )
        for who, returns in games.items()
    }
    compared = comparison(results, "Pong")
    for row in compared.values():
        assert row["difference_to_teacher"] == pytest.approx(-10.0)
        assert row["difference_interval"][0] <= -10.0 <= row["difference_interval"][1]
        assert row["teacher_normalised"] == pytest.approx((9 + 62 / 3) / (19 + 62 / 3))
        assert row["human_normalised"] == pytest.approx((9 + 20.7) / 35.3)
    text = table({**results, "comparison": compared})
    assert "| student | 61,174 | 2.13 M | 245 kB |" in text
    assert "| random | - | - |" in text
    assert f" us (least {costs.latency_least_microseconds:.0f}) |" in text
    assert "student minus teacher -10.00" in text
    del results["student"]["latency_least_microseconds"]  # as results were before
    assert f"| {costs.latency_microseconds:.0f} us | 9.00" in table({**results, "comparison": compared})


def test_teacher_and_student_are_timed_in_turns_on_the_observations_that_are_given() -> None:
    """One after the other, a machine that grew busy in between would be in their ratio."""
    obs, seen = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 4, 84, 84), list[tuple[str, int]]()
    nets = {name: make_student("0.1%", 6).train() for name in ("teacher", "student")}

    def note(name: str) -> Callable[[Any, tuple[torch.Tensor]], None]:
        return lambda _, given: seen.append((name, int(given[0][0, 0, 0, 0])))

    for name, net in nets.items():
        net.register_forward_pre_hook(note(name))
    found = measure_costs(nets, obs, rounds=2, calls_per_round=5)
    assert [(name, len(list(turn))) for name, turn in groupby(seen, lambda call: call[0])][:4] == [
        ("teacher", 15), ("student", 15), ("teacher", 15), ("student", 15),
    ]  # fmt: skip
    assert [number for name, number in seen if name == "student"][:30] == [0, 1, 2] * 10
    assert list(found) == ["teacher", "student"]
    assert not nets["student"].training


def test_a_cards_statistics_are_those_of_its_returns() -> None:
    little = {"returns": [20.0, 18.0, 19.0], "mean": -3.0, "interval": [0, 0]}
    played = judgement(Evaluation([20.0, 18.0, 19.0], [], 0))
    unsaid = ("lengths", "num_truncated", "num_unfinished")
    assert judgement_of_card(little) == {k: v for k, v in played.items() if k not in unsaid}


def test_an_interrupted_judgement_goes_on(tmp_path: Path) -> None:
    """C04: SIGTERM in the second of the student's two games; what was finished is not played again."""
    card = {"protocols": {protocol: {"returns": [30.0, 31.0]} for protocol in PROTOCOLS}}
    student, teacher = make_student("1%", 4), Teacher(make_student("4%", 4).net, "PPO", Path("a.zip"), "aa", card)
    num_calls: list[int] = []

    def play(done: Path, signal_at: int = 0) -> dict[str, Any]:
        num_calls.append(0)

        def count(*_: object) -> None:
            num_calls[-1] += 1
            if num_calls[-1] == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)  # to the process: this is no main thread

        hook = student.register_forward_pre_hook(count)
        try:
            rows, seconds = judge(student, teacher, "Breakout", 1, 0, torch.device("cpu"), done=done)
        finally:
            hook.remove()
        assert seconds > 0
        games: dict[str, Any] = {who: rows[who]["protocols"] for who in ("teacher", "student", "random")}
        games |= rows["comparison"]
        return games

    whole = play(tmp_path / "whole.json")
    first = whole["student"]["noop_sampled"]["lengths"][0]
    with noting_signals(), pytest.raises(KeyboardInterrupt):
        play(tmp_path / "cut.json", signal_at=first + 10)
    assert len(json.loads((tmp_path / "cut.json").read_text())) == 1  # the student's first protocol
    assert play(tmp_path / "cut.json") == whole
    assert num_calls[0] - num_calls[2] == first


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"seconds": 1}}'])
def test_a_damaged_file_of_games_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "judged.json").write_text(content)
    with pytest.raises(BadFile, match=r"judged\.json: .*remove it"):
        FinishedGames(tmp_path / "judged.json")


def test_games_of_other_weights_are_not_taken_up(tmp_path: Path) -> None:
    games = Evaluation([3.0], [5], 0)
    kept = {f"{sha256} Pong noop_sampled 1 0 1.0": {"seconds": 1.0, **vars(games)} for sha256 in ("aa", "bb")}
    (tmp_path / "judged.json").write_text(json.dumps(kept))
    finished = FinishedGames(tmp_path / "judged.json")
    assert finished.play(RandomPolicy(6), "aa", "Pong", "noop_sampled", 1, seed=0) == games
    with noting_signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):  # it begins to play
            finished.play(RandomPolicy(6), "cc", "Pong", "noop_sampled", 1, seed=0)
