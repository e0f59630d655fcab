"""Findings of the compression benchmark, and its list of rows."""

from pathlib import Path

import findings
import pytest

from policykd.compression.comparison import Comparison, Row
from policykd.compression.fine_tuning import ComparisonSettings
from policykd.compression.recipes import check_recipe, family
from policykd.evaluation.evaluate import PROTOCOLS, Evaluation
from policykd.evaluation.results import summarise_episodes
from policykd.io.typed import write_json

ROWS = Path(__file__).parents[2] / "benchmarks" / "compression" / "rows.txt"
SETTINGS = ComparisonSettings("Pong", "ab", "/states")


def _row(recipe: str, num_parameters: int, mean: float, num_bytes: int = 0) -> Row:
    games = summarise_episodes(Evaluation((mean - 1.0, mean, mean + 1.0) * 20, (9,) * 60, 0))
    return Row(
        recipe=recipe,
        family="random" if recipe == "random" else family(recipe),
        settings=SETTINGS,
        num_parameters=num_parameters,
        num_macs=10 * num_parameters,
        num_bytes=num_bytes or 4 * num_parameters,
        protocols=dict.fromkeys(PROTOCOLS, games),
    )


@pytest.fixture
def comparison() -> Comparison:
    rows = [
        _row("teacher", 1_000_000, 19.0),
        _row("7%", 70_000, 19.5),
        _row("1%", 10_000, 18.5),
        _row("teacher+magnitude:0.9", 40_000, 12.0, 280_000),
        _row("teacher+int8", 250_000, 19.5, 270_000),
        _row("7%:hard", 70_000, 19.9),
        _row("7%+int8", 70_000, 19.4, 75_000),
        _row("teacher+magnitude:0.99", 9_000, 19.9, 70_000),
        _row("random", 0, -20.0),
    ]
    return Comparison(SETTINGS, {row.recipe: row for row in rows}, "", {})


def test_the_published_rows_are_valid_recipes() -> None:
    rows = [line for line in ROWS.read_text().splitlines() if not line.startswith("#")]
    assert len(rows) == len(set(rows)) == 39  # as benchmarks/compression.sh says
    for row in rows:
        check_recipe(row)


def test_distilled_networks_are_compared_with_others_of_their_bytes(comparison: Comparison) -> None:
    pairs = {(p.distilled.recipe, p.other.recipe): p for p in findings.pairs_at_equal_bytes(comparison)}
    assert set(pairs) == {
        ("7%", "teacher+magnitude:0.9"),
        ("7%", "teacher+int8"),
        ("7%", "7%:hard"),
        ("7%+int8", "teacher+magnitude:0.99"),
    }
    winners = [pair.winner("noop_sampled") for pair in pairs.values()]
    assert [winner and winner.recipe for winner in winners] == ["7%", None, "7%:hard", "teacher+magnitude:0.99"]
    lines = findings.equal_bytes(comparison)
    assert any("sampled, from teacher: the distilled network wins 1 of 3, loses 1" in line for line in lines)


def test_the_smallest_within_a_point_of_the_teacher(comparison: Comparison, tmp_path: Path) -> None:
    lines = findings.smallest(comparison)
    assert any("sampled, on average: distilled student: 1%" in line for line in lines)
    worse = {**comparison.rows, "1%": _row("1%", 10_000, 17.0)}
    lines = findings.smallest(Comparison(SETTINGS, worse, "", {}))
    assert any("sampled, on average: distilled student: 7%" in line for line in lines)
    write_json(tmp_path / "compression.json", comparison)
    findings.main(tmp_path)
