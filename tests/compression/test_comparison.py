import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from policykd.agents.networks import num_macs
from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.student import Size, make_student, save_student
from policykd.compression import comparison
from policykd.compression.comparison import (
    DONE,
    INT8,
    SPARSE,
    Setting,
    calibration_states,
    macs_without_zeros,
    make_row,
    results_of,
    stored,
)
from policykd.compression.compressors import Distilled, Fit, Unchanged, layers_with_weights
from policykd.compression.rows import (
    TEACHER,
    Row,
    Store,
    check_order,
    chosen,
    lineage,
    origin,
    standard_rows,
    updates_in_all,
)
from policykd.compression.sparse import load_sparse
from policykd.export.layers import layers_of
from policykd.io.files import BadFile
from policykd.legacy.states import DatasetStates

PLAIN = Row(TEACHER, "teacher", "teacher", Unchanged())
SMALL = Row("small", "0.1%", "distilled", Distilled("0.1%"))


@pytest.fixture
def setting(dataset: Path, tmp_path: Path) -> Setting:
    states = DatasetStates(dataset, held_out=0.2)
    return Setting(tmp_path, "Pong", "auto", states, updates=20, batch_size=8, episodes=1, seed=0)


def test_a_row_is_fitted_stored_measured_and_played_once(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = make_row(PLAIN, setting)
    assert (teacher["num_parameters"], teacher["agreement"]) == (1_687_206, 1.0)
    assert teacher["protocols"]["noop_sampled"]["num_episodes"] == 200  # of its card: none was played
    made = make_row(SMALL, setting)
    assert made["num_bytes"] == (setting.folder / "small" / "student.safetensors").stat().st_size
    assert set(made["protocols"]) == {"noop_sampled", "sticky_greedy"}
    assert made["num_macs"] == made["num_macs_dense"]
    capsys.readouterr()
    assert json.loads(json.dumps(made)) == make_row(SMALL, setting)
    (setting.folder / "small" / DONE).unlink()  # as if killed after its games
    again = make_row(SMALL, setting)
    assert json.loads(json.dumps(again["protocols"])) == json.loads(json.dumps(made["protocols"]))
    assert "begins" not in (said := capsys.readouterr().out)
    assert "playing" not in said
    assert results_of(SMALL, replace(setting, episodes=2)) is None  # more games are asked for
    assert results_of(SMALL, replace(setting, episodes=0))  # fewer: those that are there are kept
    assert results_of(PLAIN, replace(setting, episodes=500))  # its card has no more
    _without_card(setting.folder / TEACHER)
    assert results_of(PLAIN, replace(setting, episodes=201)) is None
    assert results_of(PLAIN, replace(setting, episodes=200))
    with pytest.raises(ValueError, match="made by Distilled"):
        results_of(replace(SMALL, make=Distilled("1%")), setting)
    (setting.folder / "small" / DONE).write_text("{}")
    with pytest.raises(BadFile, match="damaged"):
        results_of(SMALL, setting)


def _without_card(folder: Path) -> None:
    """Leaves a teacher's results as they were written, before `from_card` was, where its games were played."""
    content = json.loads((folder / DONE).read_text())
    assert content.pop("from_card") == ["noop_sampled", "sticky_greedy"]
    (folder / DONE).write_text(json.dumps(content))
    (folder / "games.json").write_text("{}")


def test_a_damaged_card_of_a_fitted_row_is_named(setting: Setting) -> None:
    (setting.folder / "small").mkdir()
    (setting.folder / "small" / "student.json").write_text('{"made_by": ')
    with pytest.raises(BadFile, match=r"small/student\.json: damaged .*; remove .*small, the row is made anew"):
        make_row(SMALL, setting)


def test_ranges_are_taken_from_no_state_held_out(fit: Fit) -> None:
    first = len(fit.replay) - fit.replay.num_held_out
    held_out = {fit.replay.gather(torch.tensor([row])).numpy().tobytes() for row in range(first, len(fit.replay))}
    taken = {state.numpy().tobytes() for state in calibration_states(fit.replay, 300)}
    assert len(taken) > 100
    assert not taken & held_out


def test_each_way_to_store_gives_the_bytes_of_a_real_file(
    fit: Fit, obs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "CALIBRATION", 64)
    begin = make_student("1%", 6)
    for layer in layers_with_weights(begin):
        layer.weight.data[::2] = 0.0
    save_student(begin, tmp_path)
    ways: tuple[Store, ...] = ("int8-weights", "sparse", "int8", "sparse-int8")
    made = [stored(way, begin, tmp_path, fit.replay) for way in ways]
    (weights_alone, of_weights), (policies, costs) = made[0], zip(*made[1:], strict=True)
    sparse = load_sparse(tmp_path / SPARSE)
    assert all(torch.equal(t, begin.state_dict()[name]) for name, t in sparse.state_dict().items())
    num_bytes = [c["num_bytes"] for c in costs]
    assert num_bytes[0] == (tmp_path / SPARSE).stat().st_size
    assert num_bytes[2] < num_bytes[1] < num_bytes[0] < 0.7 * 4 * 16_446
    assert costs[0]["num_parameters"] == pytest.approx(16_446 / 2, rel=0.01)
    assert costs[0]["num_macs"] == pytest.approx(costs[0]["num_macs_dense"] / 2, rel=0.01)
    assert OnnxPolicy(tmp_path / INT8).sha256 == costs[1]["sha256"]
    torch.testing.assert_close(policies[0](obs), begin(obs), atol=1e-4, rtol=1e-4)
    assert of_weights["num_bytes"] < num_bytes[0]
    torch.testing.assert_close(weights_alone(obs), begin(obs), atol=0.05, rtol=0.05)
    assert fit.agreement(weights_alone, begin) >= fit.agreement(policies[1], begin) > 0.5
    assert fit.agreement(begin, begin) == 1.0
    assert float((policies[1](obs).argmax(1) == begin(obs).argmax(1)).float().mean()) > 0.7


@pytest.mark.parametrize("size", get_args(Size))
def test_multiply_accumulates_without_zeros_are_all_where_there_are_none(size: Size) -> None:
    student = make_student(size, 6)
    assert macs_without_zeros(layers_of(student.net), (4, 84, 84)) == num_macs(student, (4, 84, 84))


def test_the_rows_of_the_comparison() -> None:
    rows = standard_rows(6, 1.0)
    check_order([*rows.values()])
    assert [row.name for row in chosen(rows, ["7pct-structured-int8"])] == [
        TEACHER,
        "7pct",
        "7pct-structured",
        "7pct-structured-int8",
    ]
    assert chosen(rows, []) == [*rows.values()]
    assert len(rows) == 39  # as benchmarks/compression.sh says
    assert (rows["teacher-int8-weights"].store, rows["7pct-int8-weights"].begins_with) == ("int8-weights", "7pct")
    with pytest.raises(ValueError, match="--rows nothing: choose from teacher"):
        chosen(rows, ["nothing"])
    with pytest.raises(ValueError, match="begins with 7pct"):
        check_order([rows[TEACHER], rows["7pct-int8"]])
    with pytest.raises(ValueError, match="two rows are called small"):
        check_order([PLAIN, SMALL, SMALL])


def test_what_a_row_was_born_from_and_the_steps_behind_it() -> None:
    rows = standard_rows(6, 1.0)
    for name, born, begins, updates in (
        (TEACHER, "teacher", (), 0),
        ("7pct", "distillation", (), 30),
        ("sharp-1pct", "distillation", (), 30),
        ("hard-7pct", "hard labels", (), 30),
        ("magnitude-7pct", "teacher", (TEACHER,), 30),
        ("teacher-int8", "teacher", (TEACHER,), 0),
        ("7pct-structured-int8", "distillation", ("7pct-structured", "7pct"), 60),
    ):
        row = rows[name]
        assert (origin(row, rows), lineage(row, rows), updates_in_all(row, rows, 30)) == (born, begins, updates)
