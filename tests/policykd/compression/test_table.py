import io
from typing import Any

import numpy as np
import pytest

from policykd.compression.pareto import draw_pareto, pareto_front
from policykd.compression.table import compared, equal_bytes, report, smallest
from policykd.evaluation import PROTOCOLS, Evaluation
from policykd.results import judgement


def row(label: str, family: str, num: int, mean: float, *, num_bytes: int = 0) -> dict[str, Any]:
    returns = [mean - 1.0, mean, mean + 1.0] * 20
    costs = {
        "num_parameters": num,
        "num_macs": 10 * num,
        "num_macs_dense": 10 * num,
        "num_bytes": num_bytes or 4 * num,
        "latency_microseconds": num / 100,
        "latency_p99_microseconds": num / 50,
        "kl": 0.1,
        "agreement": 0.9,
    }
    games = {p: judgement(Evaluation(returns, [9] * 60, 0)) for p in PROTOCOLS}
    return {"label": label, "family": family, **(costs if num else {}), "protocols": games}


@pytest.fixture
def rows() -> dict[str, dict[str, Any]]:
    return {
        "teacher": row("teacher", "teacher", 1_000_000, 19.0),
        "7pct": row("7%", "distilled", 70_000, 19.5),
        "1pct": row("1%", "distilled", 10_000, 18.5),
        "tiny": row("0.1%", "distilled", 1_000, -10.0),
        "magnitude": row("magnitude <b>", "magnitude", 40_000, 12.0, num_bytes=280_000),
        "int8": row("25%, int8", "int8", 250_000, 19.5, num_bytes=270_000),
        "random": row("random play", "random", 0, -20.0),
    }


def test_differences_and_normalised_scores(rows: dict[str, dict[str, Any]]) -> None:
    found = compared(rows)
    assert found["magnitude"]["noop_sampled"]["difference_to_teacher"] == pytest.approx(-7.0)
    assert found["7pct"]["noop_sampled"]["teacher_normalised"] == pytest.approx(39.5 / 39.0)
    assert found["teacher"]["sticky_greedy"]["difference_to_teacher"] == 0.0


def test_who_wins_at_equal_bytes(rows: dict[str, dict[str, Any]]) -> None:
    lines = equal_bytes(rows)
    (magnitude,) = [line for line in lines if line.startswith("| magnitude")]
    (int8,) = [line for line in lines if line.startswith("| 25%, int8")]
    assert magnitude.count("| distilled |") == 2
    assert "+7.50 [" in magnitude
    assert int8.count("| cannot tell |") == 2
    assert not any(line.startswith("Distilled 1%") for line in lines)  # nothing is near its bytes


def test_the_smallest_that_is_as_good(rows: dict[str, dict[str, Any]]) -> None:
    said = smallest(rows)
    assert any("on average: distilled student: 1%" in line for line in said)
    assert "1% by num_parameters" not in report(rows)
    rows["1pct"] = row("1%", "distilled", 10_000, 17.0)
    assert any("on average: distilled student: 7%" in line for line in smallest(rows))


def test_every_row_is_in_the_table(rows: dict[str, dict[str, Any]]) -> None:
    text = report(rows)
    assert all(f"| {r['label']} |" in text for r in rows.values())
    assert "| 70,000 | 0.70 M | 280,000 | 700 us (1400) | 0.1000 | 90.0% |" in text
    header, rule, *body = text.split("\n\n", maxsplit=1)[0].splitlines()
    assert {line.count("|") for line in (header, rule, *body)} == {header.count("|")}


def test_the_front_holds_what_nothing_cheaper_equals() -> None:
    assert pareto_front([(3.0, 9.0), (1.0, 5.0), (2.0, 5.0), (2.5, 7.0), (4.0, 8.0)]) == [1, 3, 0]
    generator = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in generator.integers(0, 10, (50, 2))]
    front = pareto_front(points)
    for i, (x, y) in enumerate(points):
        beaten = any(
            (u <= x and v > y) or (u < x and v >= y) or ((u, v) == (x, y) and i != j) for j, (u, v) in enumerate(points)
        )
        assert i in front or beaten


def test_the_picture_is_svg_with_every_panel_and_always_the_same(rows: dict[str, dict[str, Any]]) -> None:
    one, other = io.BytesIO(), io.BytesIO()
    draw_pareto(rows, one, highlight="7pct")
    draw_pareto(rows, other, highlight="7pct")
    text = one.getvalue().decode()
    assert text.startswith("<?xml")
    assert one.getvalue() == other.getvalue()
    assert text.count('<g id="axes_') == 4
    assert "<b>" not in text
    with pytest.raises(ValueError, match="measure one first"):
        draw_pareto({"random": rows["random"]}, io.BytesIO())
