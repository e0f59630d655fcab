import json

import pytest

from policykd.agents.networks import num_parameters
from policykd.agents.student import make_student
from policykd.agents.teacher import load_teacher
from policykd.costs import measure_costs
from policykd.evaluation import Evaluation
from policykd.results import comparison, entry, judgement, judgement_of_card, table


def test_the_table_and_the_comparison() -> None:
    student = make_student("4%", 6)
    costs = measure_costs(student, (4, 84, 84), num_calls=20)
    assert costs.num_parameters == num_parameters(student)
    assert costs.num_bytes == 4 * costs.num_parameters
    assert costs.latency_microseconds > 1

    games = {"teacher": [20.0, 18.0, 19.0], "student": [10.0, 8.0, 9.0], "random": [-21.0, -20.0, -21.0]}
    results: dict[str, object] = {
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
    assert "student minus teacher -10.00" in text


def test_a_cards_statistics_are_those_of_its_returns() -> None:
    little = {"returns": [20.0, 18.0, 19.0], "mean": -3.0, "interval": [0, 0]}
    played = judgement(Evaluation([20.0, 18.0, 19.0], [], 0))
    assert judgement_of_card(little) == {k: v for k, v in played.items() if k not in ("lengths", "num_truncated")}
    for protocol in load_teacher("bundled", game="Pong").card["protocols"].values():
        assert json.loads(json.dumps(judgement_of_card(protocol))) == protocol
