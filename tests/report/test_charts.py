"""Charts of the report: the data that they draw, and the SVG in the page."""

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from policykd.evaluation.evaluate import Evaluation
from policykd.evaluation.results import ProtocolResult, summarise_episodes
from policykd.report.charts import Series, bin_edges, cost_chart, histogram, line_chart


@given(st.integers(2, 3000), st.sampled_from([1, 20, 250]), st.integers(-21, 21))
def test_every_bar_holds_as_many_returns_as_the_others(num: int, step: int, first: int) -> None:
    """Whatever a game can bring, once each; only the last bar may hold fewer."""
    returns = [float(first + step * k) for k in range(num)]
    edges = bin_edges(returns)
    counts, _ = np.histogram(returns, edges)
    assert len(counts) <= 64
    assert set(counts[:-1].tolist()) <= {counts[0]}
    assert 0 < counts[-1] <= counts[0]
    assert counts.sum() == num
    assert {round((value - edges[0]) / step % 1, 6) for value in returns} == {0.5}


def test_edges_of_one_return_and_of_fractions() -> None:
    assert bin_edges([3.0, 3.0]).tolist() == [2.5, 3.5]
    assert len(bin_edges([0.25, 0.5])) > 2


def result(returns: list[float]) -> ProtocolResult:
    return summarise_episodes(Evaluation(tuple(returns), (1,) * len(returns), 0))


def test_a_histogram_has_a_bar_per_return() -> None:
    """0 to 42 once each: 43 bars of the same height."""
    student = result([float(value) for value in range(43)])
    chart = histogram("x", {"student": student, "random": result([0.0])})
    bars = re.findall(r'<path d="([^"]*)"[^>]*fill: var\(--student\)"', chart.svg)
    heights = {max(map(float, re.findall(r"(?<= )[\d.]+(?= [LZz])", bar))) for bar in bars}
    assert len(bars) == 43
    assert len(heights) == 1
    assert "student 21.00 [" in chart.caption
    assert "] in 43 games" in chart.caption


def test_a_point_of_return_is_visible_at_the_top_of_the_costs() -> None:
    """Random play is 40 points away and the student one: on a linear axis they would be one dot."""
    played = {"teacher": result([19.0, 19.2]), "student": result([18.0, 18.2]), "random": result([-20.7])}
    chart = cost_chart("Parameters", {"teacher": 1e6, "student": 1e5}, played)  # type: ignore[arg-type]
    heights = [
        float(re.findall(rf'<use href="[^"]*" x="[\d.]+" y="([\d.]+)" style="fill: var\(--{role}\)', chart.svg)[0])
        for role in ("teacher", "student")
    ]
    assert 15 < heights[1] - heights[0] < 60  # 4 on a linear axis
    assert ">100 k<" in chart.svg


def test_a_value_that_is_not_finite_leaves_a_gap() -> None:
    line = Series("x", "student", [1.0, 2.0, 3.0, 4.0], [1.0, float("nan"), 2.0, 3.0])
    chart = line_chart("x", "nats", [line], x_label="x", scale="log")
    assert chart.svg.count("<use") == 3
    assert "nan" not in chart.svg


def test_a_chart_is_reproducible_and_takes_its_colours_from_the_page() -> None:
    lines = [Series("<b>", "second", [0.0, 5000.0], [-0.5, 1.0])]
    first, second = (line_chart("Return", "x", lines, x_label="<script>") for _ in range(2))
    assert first == second
    assert "&lt;script&gt;" in first.svg
    assert "var(--second)" in first.svg
    assert not re.search(r"#[0-9a-f]{6}|font-family|https?:", first.svg)
    assert ">\N{MINUS SIGN}0.5<" in first.svg
