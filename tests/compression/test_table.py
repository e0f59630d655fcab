import io
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from policykd.compression.pareto import _part_names, draw_pareto, pareto_front
from policykd.compression.table import at_equal_bytes, compared, equal_bytes, report, smallest
from policykd.evaluation.evaluate import PROTOCOLS, Evaluation
from policykd.evaluation.results import judgement

ORIGINS = {"distilled": "distillation", "hard labels": "hard labels", "magnitude": "teacher", "teacher": "teacher"}


def row(
    label: str, family: str, num: int, mean: float, *, num_bytes: int = 0, origin: str = "", games: int = 60
) -> dict[str, Any]:
    returns = [mean - 1.0, mean, mean + 1.0] * (games // 3)
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
    played = {p: judgement(Evaluation(returns, [9] * games, 0)) for p in PROTOCOLS}
    born = {"origin": origin or ORIGINS[family]} if num else {}
    return {"label": label, "family": family, **(costs if num else {}), **born, "protocols": played}


@pytest.fixture
def rows() -> dict[str, dict[str, Any]]:
    return {
        "teacher": row("teacher", "teacher", 1_000_000, 19.0),
        "7pct": row("7%", "distilled", 70_000, 19.5),
        "1pct": row("1%", "distilled", 10_000, 18.5),
        "tiny": row("0.1%", "distilled", 1_000, -10.0),
        "magnitude": row("magnitude <b>", "magnitude", 40_000, 12.0, num_bytes=280_000),
        "int8": row("teacher, int8", "int8", 250_000, 19.5, num_bytes=270_000, origin="teacher"),
        "hard": row("7%, hard labels", "hard labels", 70_000, 19.9),
        "7pct-int8": row("7%, int8", "int8", 70_000, 19.4, num_bytes=75_000, origin="distillation"),
        "small": row("magnitude, small", "magnitude", 9_000, 19.9, num_bytes=70_000),
        "random": row("random play", "random", 0, -20.0),
    }


def test_differences_and_normalised_scores(rows: dict[str, dict[str, Any]]) -> None:
    found = compared(rows)
    assert found["magnitude"]["noop_sampled"]["difference_to_teacher"] == pytest.approx(-7.0)
    assert found["7pct"]["noop_sampled"]["teacher_normalised"] == pytest.approx(39.5 / 39.0)
    low, high = found["7pct"]["noop_sampled"]["teacher_normalised_interval"]
    assert 0.99 < low < 39.5 / 39.0 < high < 1.04
    assert found["7pct"]["noop_sampled"]["ratio_of_means"] == pytest.approx(19.5 / 19.0)
    assert found["teacher"]["sticky_greedy"]["difference_to_teacher"] == 0.0


def test_a_teacher_that_may_play_no_better_than_chance_gives_no_share(rows: dict[str, dict[str, Any]]) -> None:
    rows["teacher"] = row("teacher", "teacher", 1_000_000, -19.95, games=3)
    found = compared(rows)["7pct"]["noop_sampled"]
    assert (found["teacher_normalised_interval"], found["ratio_of_means"]) == (None, None)


def test_who_wins_at_equal_bytes(rows: dict[str, dict[str, Any]]) -> None:
    """What is born from the scores, its int8 too, against what began with the teacher's weights or with hard labels."""
    pairs = {(pair["distilled"], pair["against"]): pair for pair in at_equal_bytes(rows)}
    assert set(pairs) == {("7pct", "magnitude"), ("7pct", "int8"), ("7pct", "hard"), ("7pct-int8", "small")}
    assert pairs["7pct", "magnitude"]["noop_sampled"]["winner"] == "7pct"
    assert pairs["7pct", "int8"]["noop_sampled"]["winner"] is None
    assert pairs["7pct-int8", "small"]["sticky_greedy"]["winner"] == "small"
    (line,) = [line for line in equal_bytes(rows) if "| magnitude <b> |" in line]
    assert line.count("| 7% |") == 3
    assert "+7.50 [" in line
    (line,) = [line for line in equal_bytes(rows) if "| magnitude, small |" in line]
    assert line.startswith("| 7%, int8 | 75,000 |")
    assert line.count("| magnitude, small |") == 3
    assert any(
        "sampled, against those born from the teacher: the distilled one wins 1 of 3 pairs and loses 1" in line
        for line in equal_bytes(rows)
    )
    del rows["7pct"], rows["7pct-int8"]
    assert equal_bytes(rows)[-1] == "No row is near the bytes of a distilled one."


def test_the_smallest_that_is_as_good(rows: dict[str, dict[str, Any]]) -> None:
    said = smallest(rows)
    assert any("on average: distilled student: 1%" in line for line in said)
    assert "1% by num_parameters" not in report(rows)
    assert any("surely (the whole interval): distilled student: 1%" in line for line in said)
    rows["1pct"] = row("1%", "distilled", 10_000, 18.1)  # the interval is 0.25 to either side
    said = smallest(rows)
    assert any("on average: distilled student: 1%" in line for line in said)
    assert any("surely (the whole interval): distilled student: 7%" in line for line in said)
    rows["1pct"] = row("1%", "distilled", 10_000, 17.0)
    assert any("on average: distilled student: 7%" in line for line in smallest(rows))


def test_every_row_is_in_the_table(rows: dict[str, dict[str, Any]]) -> None:
    rows["7pct"] |= {"updates_in_all": 3000, "agreement_with_float": 0.98}
    text = report(rows, ["1pct-int8"])
    assert "Asked for and not finished: 1pct-int8\n" in text
    assert "Asked for" not in report(rows)
    assert all(f"| {r['label']} |" in text for r in rows.values())
    assert "| 70,000 | 0.70 M | 280,000 | 700 us (1400) | 3,000 | 0.1000 | 90.0% (own float32 98.0%) | 60 |" in text
    assert "| teacher-normalised |" in text
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


def test_a_highlighted_row_is_named_where_it_is_not_on_the_front(
    rows: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each panel that it is in; the other rows off the front are points without a name."""
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(Axes, "annotate", lambda ax, text, at, **how: said.append((text, how["weight"])))
    worse = {
        name: row(name, "this run", 2_000_000, 0.0, origin="this run") | {"latency_microseconds": None}
        for name in ("mine", "other")
    }
    draw_pareto({**rows, **worse}, io.BytesIO(), highlight="mine")
    assert said.count(("mine", "bold")) == 3
    assert "other" not in [text for text, _ in said]


def test_the_picture_is_svg_with_every_panel_and_always_the_same(rows: dict[str, dict[str, Any]]) -> None:
    one, other = io.BytesIO(), io.BytesIO()
    draw_pareto(rows, one, highlight="7pct")
    draw_pareto(rows, other, highlight="7pct")
    text = one.getvalue().decode()
    assert text.startswith("<?xml")
    assert one.getvalue() == other.getvalue()
    assert text.count('<g id="axes_') == 4
    assert "<b>" not in text
    alone = row("teacher", "teacher", 1_687_206, 20.0) | {"latency_microseconds": 140.745, "num_bytes": 6_749_784}
    draw_pareto({"teacher": alone, "random": rows["random"]}, io.BytesIO())  # matplotlib warned of an axis of no width
    with pytest.raises(ValueError, match="measure one first"):
        draw_pareto({"random": rows["random"]}, io.BytesIO())


def test_names_of_points_that_lie_close_do_not_lie_on_each_other() -> None:
    figure = Figure()
    ax = figure.subplots()
    for i in range(4):
        ax.annotate("a long name", (0.5 + i / 100, 0.5), xytext=(4, 8), textcoords="offset points")
    figure.draw_without_rendering()
    _part_names(ax)
    boxes = [name.get_window_extent() for name in ax.texts]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
