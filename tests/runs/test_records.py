import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from policykd.envs.vector import Episode
from policykd.io.files import BadFile
from policykd.legacy.trainer import Round
from policykd.runs.records import Records


def a_round(index: int) -> Round:
    numbers: dict[str, Any] = dict.fromkeys(
        ("loss", "kl", "action_agreement", "new_kl", "new_action_agreement", "teacher_entropy"), 0.5
    )
    return Round(
        index=index,
        num_states=100 * (index + 1),
        num_updates=10 * (index + 1),
        grad_norm=1.0,
        num_nonfinite_states=0,
        num_nonfinite_updates=2,
        learning_rate=1e-3,
        student_fraction=0.0,
        episodes=[Episode(0, -21.0, 800)] if index else [],
        collect_seconds=2.0,
        label_seconds=1.0,
        fit_seconds=4.0,
        seconds=5.0,
        student_return=-20.5 if index else None,
        scheduled={"loss.hard": 0.5 - 0.1 * index},
        terms={"value": 0.25},
        teacher_disagreement=None,
        teacher_weights=(0.75, 0.25),
        state_weight=None,
        **numbers,
    )


def test_a_line_a_round_and_seconds_by_phase(tmp_path: Path) -> None:
    records = Records(tmp_path, 0)
    for k in range(3):
        records.add_round(a_round(k), temperature=1.0)
    records.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["index"] for r in rows] == [0, 1, 2]
    assert [r["episodes"] for r in rows] == [[], [-21.0], [-21.0]]
    assert {r["num_nonfinite_updates"] for r in rows} == {2}
    assert [r["scheduled"]["loss.hard"] for r in rows] == pytest.approx([0.5, 0.4, 0.3])
    assert not any("seconds" in key for row in rows for key in row)  # the next run's metrics are the same bytes
    assert records.seconds() == {"collect": 6.0, "label": 3.0, "fit": 12.0, "rounds": 15.0}


def test_what_came_after_the_last_checkpoint_is_dropped(tmp_path: Path) -> None:
    records = Records(tmp_path, 0)
    for k in range(3):
        records.add_round(a_round(k), temperature=1.0)
        records.add_evaluation([1.0, 2.0], [5, 6], {"teacher_mean_reward": None})
    records.close()
    resumed = Records(tmp_path, 2)
    resumed.add_round(a_round(2), temperature=1.0)
    resumed.add_evaluation([3.0, 4.0], [7, 8], {})
    resumed.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    with np.load(tmp_path / "evaluations.npz", allow_pickle=False) as arrays:
        assert arrays["timesteps"].tolist() == [100, 200, 300]
        assert arrays["results"].tolist() == [[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]]
        assert arrays["ep_lengths"].shape == (3, 2)
    assert resumed.seconds()["collect"] == pytest.approx(6.0)
    assert resumed.has_evaluation(30)
    assert not resumed.has_evaluation(40)


def test_metrics_that_end_before_the_checkpoint_are_refused(tmp_path: Path) -> None:
    records = Records(tmp_path, 0)
    records.add_round(a_round(0), temperature=1.0)
    records.close()
    with pytest.raises(BadFile, match=r"metrics.jsonl: holds 1 rounds, the checkpoint 2"):
        Records(tmp_path, 2)


def test_everything_that_changes_is_a_curve(tmp_path: Path) -> None:
    records = Records(tmp_path, 0)
    for k in range(3):
        records.add_round(a_round(k), temperature=1.0)
    records.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("schedule/loss.hard")] == pytest.approx([0.5, 0.4, 0.3])
    assert [e.value for e in events.Scalars("train/value_loss")] == pytest.approx([0.25] * 3)
    assert [e.step for e in events.Scalars("rollout/student_return")] == [20, 30]  # before, it had not played
    assert [e.value for e in events.Scalars("data/teacher_weight_1")] == [0.25] * 3
    assert "data/teacher_disagreement" not in events.Tags()["scalars"]
