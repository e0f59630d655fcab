import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.student import Student, load_student, make_student
from policykd.compression.comparison import (
    COMPARISON_FILE,
    ROW_FILE,
    Comparison,
    Row,
    compare,
    comparison_table,
    export_student,
    pack_sparse,
    read_comparison,
    shipped_bytes,
)
from policykd.compression.fine_tuning import ComparisonSettings, FineTuning
from policykd.compression.networks import weight_layers
from policykd.compression.pareto import _separate_names, draw_pareto, pareto_front
from policykd.compression.recipes import (
    STANDARD,
    Quantization,
    check_recipe,
    family,
    num_trainings,
    parent,
    quantization,
)
from policykd.evaluation.evaluate import PROTOCOLS, Evaluation
from policykd.evaluation.results import FinishedGames, summarise_episodes
from policykd.io.files import BadFile


@pytest.mark.parametrize(
    ("recipe", "kind", "previous", "trainings", "how"),
    [
        ("teacher", "teacher", "", 0, None),
        ("student", "student", "", 0, None),
        ("7%", "distilled", "", 1, None),
        ("1%:hard", "hard labels", "", 1, None),
        ("1%:sharp", "sharp targets", "", 1, None),
        ("student+int8", "int8", "student", 0, "int8"),
        ("7%+int8", "int8", "7%", 1, "int8"),
        ("teacher+magnitude:0.94", "magnitude", "teacher", 1, None),
        ("student+low-rank:8", "low-rank", "student", 1, None),
        ("7%+structured:0.5+int8", "combined", "7%+structured:0.5", 2, "int8"),
        ("7%+structured:0.5", "combined", "7%", 2, None),
        ("student+structured:0.5+magnitude:0.25+int8-static", "combined", None, 2, "int8-static"),
    ],
)
def test_a_recipe_names_family_parent_budget_and_quantization(
    recipe: str, kind: str, previous: str | None, trainings: int, how: str | None
) -> None:
    check_recipe(recipe)
    assert family(recipe) == kind
    assert parent(recipe) == (recipe.rpartition("+")[0] if previous is None else previous)
    assert num_trainings(recipe) == trainings
    assert quantization(recipe) == how


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("8%", "expected student, teacher or a size"),
        ("7%:soft", "expected student, teacher or a size"),
        ("student+prune:0.5", "unknown method 'prune:0.5'"),
        ("student+int8+structured:0.5", "unknown method 'int8'"),
        ("student+structured", "expected a sparsity, such as structured:0.5"),
        ("student+magnitude:1.5", "expected a sparsity"),
        ("student+magnitude:nan", "expected a sparsity"),
        ("student+low-rank:0.5", "expected a rank"),
    ],
)
def test_invalid_recipes_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_recipe(text)


def test_all_standard_recipes_are_valid() -> None:
    for recipe in STANDARD:
        check_recipe(recipe)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The games that were asked for; each takes no time."""
    played: list[tuple[str, str]] = []

    def play(
        self: FinishedGames, policy: object, sha256: str, game: str, protocol: str, num: int, *, seed: int
    ) -> object:
        played.append((self.path.parent.name, protocol))
        mean = -20.0 if sha256 == "random" else 15.0
        return Evaluation(tuple(mean + k % 2 for k in range(num)), (9,) * num, 0)

    monkeypatch.setattr(FinishedGames, "play", play)
    return played


@pytest.fixture(autouse=True)
def few_calibration_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policykd.compression.comparison.CALIBRATION_STATES", 64)


def test_rows_are_made_once_and_the_folder_collects_them(
    tuning: FineTuning, tmp_path: Path, played: list[tuple[str, str]]
) -> None:
    student = make_student("0.3%", 6)
    first = compare(tmp_path, ["student+structured:0.3+int8"], student, tuning, 2)
    assert set(first.rows) == {"teacher", "student", "student+structured:0.3", "student+structured:0.3+int8", "random"}
    # The teacher's games are on its card.
    assert {name for name, _ in played} == {
        "student",
        "student+structured-0.3",
        "student+structured-0.3+int8",
        tmp_path.name,
    }
    structured = first.rows["student+structured:0.3"]
    assert structured.updates == tuning.settings.updates
    assert structured.num_parameters <= 0.7 * first.rows["student"].num_parameters
    assert first.rows["teacher"].kl == pytest.approx(0.0, abs=1e-6)
    assert all(row.latency_microseconds > 1.0 for name, row in first.rows.items() if name != "random")

    # Every row is a student folder that other commands take.
    folder = tmp_path / "student+structured-0.3"
    assert load_student(folder).shape.widths != student.shape.widths
    weights = (folder / "student.safetensors").stat().st_mtime_ns

    # A second command adds its rows and repeats nothing.
    played.clear()
    second = compare(tmp_path, ["0.1%"], student, tuning, 2)
    assert set(second.rows) == set(first.rows) | {"0.1%"}
    assert {name for name, _ in played} == {"0.1pct", tmp_path.name}
    assert (folder / "student.safetensors").stat().st_mtime_ns == weights
    assert read_comparison(tmp_path) == second

    # Killed between training and games, a row is not trained again.
    row = (tmp_path / "0.1pct" / ROW_FILE).read_bytes()
    played.clear()
    compare(tmp_path, ["0.1%"], student, tuning, 3)
    assert {name for name, _ in played} >= {"0.1pct"}
    assert (tmp_path / "0.1pct" / ROW_FILE).read_bytes() != row

    other = replace(tuning, settings=replace(tuning.settings, seed=1))
    with pytest.raises(ValueError, match=r"made with .*use another --name"):
        compare(tmp_path, ["0.1%"], student, other, 2)
    (tmp_path / "0.1pct" / ROW_FILE).write_text("{")
    with pytest.raises(BadFile, match="the row is made again"):
        compare(tmp_path, ["0.1%"], student, tuning, 2)


def test_without_episodes_only_costs_and_fidelity_are_measured(tuning: FineTuning, tmp_path: Path) -> None:
    found = compare(tmp_path, ["student"], make_student("0.1%", 6), tuning, 0)
    assert set(found.rows) == {"teacher", "student"}
    assert "| student | student |" in comparison_table(found)


def test_each_stored_form_is_a_real_file(tuning: FineTuning, obs: Tensor, tmp_path: Path) -> None:
    student = make_student("1%", 6)
    for layer in weight_layers(student):
        layer.weight.data[::2] = 0.0
    num_bytes: dict[tuple[str | None, bool], int] = {}
    ways: tuple[Quantization | None, ...] = (None, "int8", "int8-static")
    for way in ways:
        path = export_student(student, tmp_path, way, tuning)
        policy = OnnxPolicy(path)
        agreement = float((policy(obs).argmax(1) == student(obs).argmax(1)).float().mean())
        assert agreement > (0.7 if way else 0.99)
        for is_sparse in (False, True):
            num_bytes[way, is_sparse] = shipped_bytes(student, path, is_quantized=way is not None, is_sparse=is_sparse)
    assert num_bytes[None, True] == (tmp_path / "sparse.npz").stat().st_size
    assert num_bytes["int8", True] < num_bytes["int8", False] < num_bytes[None, True]
    assert num_bytes[None, True] < 0.7 * num_bytes[None, False]


def test_numpy_reads_a_sparse_network_bit_for_bit(tmp_path: Path) -> None:
    student = make_student("1%", 6)
    weight_layers(student)[3].weight.data[3:] = 0.0
    content = pack_sparse(student)
    assert content == pack_sparse(student)
    with np.load(io.BytesIO(content)) as arrays:
        tensors = dict(sorted(student.state_dict().items()))
        flat = np.zeros(sum(t.numel() for t in tensors.values()), np.float32)
        flat[np.unpackbits(arrays["mask"], count=len(flat)).astype(bool)] = arrays["values"]
    assert torch.equal(torch.from_numpy(flat), torch.cat([t.flatten() for t in tensors.values()]))


def _row(recipe: str, family: str, num_parameters: int, mean: float) -> Row:
    result = summarise_episodes(Evaluation((mean - 1.0, mean, mean + 1.0) * 20, (9,) * 60, 0))
    return Row(
        recipe=recipe,
        family=family,
        settings=ComparisonSettings("Pong", "ab", "/states", 20, 8, 0),
        num_parameters=num_parameters,
        num_macs=10 * num_parameters,
        num_bytes=4 * num_parameters,
        latency_microseconds=num_parameters / 100,
        latency_min_microseconds=num_parameters / 200,
        updates=3000,
        kl=0.1,
        agreement=0.9,
        protocols=dict.fromkeys(PROTOCOLS, result),
    )


@pytest.fixture
def comparison() -> Comparison:
    rows = [
        _row("teacher", "teacher", 1_000_000, 19.0),
        _row("7%", "distilled", 70_000, 19.5),
        _row("1%", "distilled", 10_000, 18.5),
        _row("teacher+magnitude:0.9", "magnitude", 40_000, 12.0),
        _row("random", "random", 0, -20.0),
    ]
    return Comparison(rows[0].settings, {row.recipe: row for row in rows}, "command", {"torch": "2"})


def test_the_table_has_costs_differences_and_normalised_scores(comparison: Comparison) -> None:
    text = comparison_table(comparison)
    assert "| 70,000 | 0.70 M | 280,000 | 700 us (350) | 3,000 | 0.1000 | 90.0% | 60 |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| teacher+magnitude:0.9 |")]
    assert "-7.00 [" in line
    assert "82.1% [" in line  # (12 + 20) / (19 + 20)
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_a_teacher_no_better_than_random_play_gives_no_normalised_score(comparison: Comparison) -> None:
    rows = {**comparison.rows, "random": replace(comparison.rows["teacher"], recipe="random", family="random")}
    assert "19.50 [" in comparison_table(replace(comparison, rows=rows))


def test_the_front_holds_what_no_cheaper_point_equals() -> None:
    assert pareto_front([(3.0, 9.0), (1.0, 5.0), (2.0, 5.0), (2.5, 7.0), (4.0, 8.0)]) == [1, 3, 0]
    generator = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in generator.integers(0, 10, (50, 2))]
    front = pareto_front(points)
    for i, (x, y) in enumerate(points):
        beaten = any(
            (u <= x and v > y) or (u < x and v >= y) or ((u, v) == (x, y) and i != j) for j, (u, v) in enumerate(points)
        )
        assert i in front or beaten


def test_the_picture_is_the_same_svg_every_time_with_four_panels(comparison: Comparison) -> None:
    pictures = []
    for _ in range(2):
        this_run = _row("this run <b>", "this run", 2_000, 5.0)
        pictures.append(draw_pareto(comparison, this_run=replace(this_run, latency_microseconds=0.0)))
    assert pictures[0] == pictures[1]
    text = pictures[0].decode()
    assert text.startswith("<?xml")
    assert text.count('<g id="axes_') == 4
    assert "<b>" not in text
    without_random = replace(comparison, rows={"teacher": comparison.rows["teacher"]})
    with pytest.raises(ValueError, match="no episodes of teacher and random play"):
        draw_pareto(without_random)


def test_a_damaged_comparison_is_named(tmp_path: Path) -> None:
    (tmp_path / COMPARISON_FILE).write_text('{"rows": {"teacher": {}}}')
    with pytest.raises(BadFile, match=r"compression\.json: invalid .*run policykd compress"):
        read_comparison(tmp_path)


def test_a_student_that_is_not_on_frames_is_refused(tuning: FineTuning, tmp_path: Path) -> None:
    student: Student = make_student((8,), 6, (4,))
    with pytest.raises(ValueError, match="on frames"):
        tuning.prepare(student)


def test_names_of_close_points_do_not_overlap() -> None:
    figure = Figure()
    ax = figure.subplots()
    for i in range(4):
        ax.annotate("a long name", (0.5 + i / 100, 0.5), xytext=(4, 8), textcoords="offset points")
    figure.draw_without_rendering()
    _separate_names(ax)
    boxes = [name.get_window_extent() for name in ax.texts]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
