"""The logs of a run: one line per round, SB3's tags and arrays, dropped after the last checkpoint."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from policykd.envs.vector import Episode
from policykd.evaluation.evaluate import Evaluation
from policykd.io.files import BadFile
from policykd.loop import Round
from policykd.runs.records import RunLogger
from policykd.train_state import Rollout, TrainState


def a_round(index: int) -> Round:
    metrics = {"loss": 0.5, "kl": 0.25, "action_agreement": 0.75, "teacher_entropy": 1.0, "state_weight": 0.5}
    return Round(
        index=index,
        num_states=100 * (index + 1),
        num_updates=10 * (index + 1),
        train=metrics | {"grad_norm": 1.0, "num_skipped": 2.0, "value_loss": 0.25},
        new_states=metrics,
        learning_rate=1e-3,
        student_return=-20.5 if index else None,
        schedules={"loss.hard": 0.5 - 0.1 * index},
        collected=Rollout(
            first=0,
            student_fraction=0.0,
            episodes=[Episode(0, -21.0, 800)] if index else [],
            collect_seconds=2.0,
            label_seconds=1.0,
            metrics={"teacher_weight_1": 0.25},
        ),
        train_seconds=4.0,
        seconds=5.0,
        state=cast(TrainState, SimpleNamespace()),
    )


def evaluation(*returns: float) -> Evaluation:
    return Evaluation(returns=returns, lengths=(5,) * len(returns))


@pytest.fixture
def three_rounds(tmp_path: Path) -> RunLogger:
    logger = RunLogger(tmp_path, 0)
    for k in range(3):
        logger.add_round(a_round(k), temperature=1.0)
        logger.add_evaluation(evaluation(1.0, 2.0), None)
    logger.close()
    return logger


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_line_per_round_and_seconds_per_phase(tmp_path: Path, three_rounds: RunLogger) -> None:
    found = rows(tmp_path)
    assert [row["index"] for row in found] == [0, 1, 2]
    assert [row["episodes"] for row in found] == [[], [-21.0], [-21.0]]
    assert [row["schedules"]["loss.hard"] for row in found] == pytest.approx([0.5, 0.4, 0.3])
    expected = {"kl": 0.25, "new_kl": 0.25, "teacher_entropy": 1.0, "num_skipped": 2.0, "value_loss": 0.25}
    assert expected.items() <= found[0].items()
    assert not any("seconds" in key for key in found[0])  # the next run's metrics are the same bytes
    assert three_rounds.seconds() == {"collect": 6.0, "label": 3.0, "train": 12.0, "rounds": 15.0}


def test_rounds_after_the_last_checkpoint_are_dropped(tmp_path: Path, three_rounds: RunLogger) -> None:
    resumed = RunLogger(tmp_path, 2)
    resumed.add_round(a_round(2), temperature=1.0)
    resumed.add_evaluation(evaluation(3.0, 4.0), -1.0)
    resumed.close()
    assert len(rows(tmp_path)) == 3
    with np.load(tmp_path / "evaluations.npz", allow_pickle=False) as arrays:
        assert arrays["timesteps"].tolist() == [100, 200, 300]
        assert arrays["results"].tolist() == [[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]]
        assert arrays["ep_lengths"].shape == (3, 2)
    assert resumed.seconds()["collect"] == pytest.approx(6.0)
    assert resumed.has_evaluation(30)
    assert not resumed.has_evaluation(40)
    assert resumed.evaluation_returns(30) == [3.0, 4.0]


def test_damaged_logs_are_one_line(tmp_path: Path, three_rounds: RunLogger) -> None:
    with pytest.raises(BadFile, match=r"metrics.jsonl: contains 3 rounds, the checkpoint 4"):
        RunLogger(tmp_path, 4)
    (tmp_path / "evaluations.npz").write_bytes(b"cut")
    with pytest.raises(BadFile, match=r"evaluations.npz: damaged .*; remove it and resume"):
        RunLogger(tmp_path, 3)


def test_curves_have_sb3s_tags(tmp_path: Path, three_rounds: RunLogger) -> None:
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert values["schedule/loss.hard"] == pytest.approx([0.5, 0.4, 0.3])
    assert values["train/value_loss"] == pytest.approx([0.25] * 3)
    assert values["train/n_nonfinite_updates"] == [2.0] * 3
    assert values["data/teacher_weight_1"] == [0.25] * 3
    assert values["eval/mean_reward"] == [1.5] * 3
    assert values["time/time_elapsed"] == [5.0, 10.0, 15.0]
    assert [event.step for event in events.Scalars("rollout/student_return")] == [20, 30]  # it had not played before
    usual = {
        "train/loss",
        "train/kl",
        "train/learning_rate",
        "data/new_kl",
        "data/teacher_entropy",
        "data/state_weight",
    }
    assert usual | {"rollout/ep_rew_mean", "time/total_timesteps", "eval/mean_ep_length"} <= values.keys()
    assert "data/new_teacher_entropy" not in values
